"""What to serve in place of the default model, which only demonstrates: the best that fits the memory."""

from __future__ import annotations

from chatlm.common.invocation import program_command

# The bytes that weights, 4,096 tokens of keys and values, and both processes take; those of the file; MODEL
BETTER = (
    (20_500_000_000, 18_560_000_000, "Qwen/Qwen3-30B-A3B-GGUF:Qwen3-30B-A3B-Q4_K_M.gguf"),
    (6_500_000_000, 5_030_000_000, "Qwen/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf"),
    (3_900_000_000, 2_500_000_000, "Qwen/Qwen3-4B-GGUF:Qwen3-4B-Q4_K_M.gguf"),
    (3_000_000_000, 1_830_000_000, "Qwen/Qwen3-1.7B-GGUF:Qwen3-1.7B-Q8_0.gguf"),
    (1_700_000_000, 640_000_000, "Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf"))
SHARE = 0.8  # of free memory that a model may take: other programs grow too


def only_demonstrates(model: str) -> bool:
    return model.startswith("SmolLM2-135M")


def better_model(free: float) -> str:
    """The first of BETTER that fits in `free` bytes; "" if none does."""
    return next((model for needed, _, model in BETTER if needed <= SHARE * free), "")


def warning_of(model: str, free: float) -> str:
    """The line of the start-up log about a model that only demonstrates; "" about others."""
    better = better_model(free)
    advice = f"; a better one that fits here: {program_command()} {better}" if better else ""
    return only_demonstrates(model) * (
        f"This is a demonstration model of 135 million parameters, which is often wrong{advice}")
