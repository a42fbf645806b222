"""Fixed prompts, whose likeliest continuations show at a glance what a checkpoint has learnt."""

SAMPLE_TOKENS = 16
# without a prompt, as base_eval has them
FREE_SAMPLES = 8
FREE_TOKENS = 128
PROMPTS = (  # those of nanochat's base_train and base_eval
    "The capital of France is", "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be", "The opposite of hot is",
    "The planets of the solar system are:", "My favorite color is", "If 5*x + 3 = 13, then x is")
