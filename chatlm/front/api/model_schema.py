"""How a served model is described to clients, as /openapi.json says it."""

from __future__ import annotations

from chatlm.front.api.fields import A_TEXT

ABILITIES = {  # members of `capabilities`
    "chat": "it has a chat template: /v1/chat/completions and the other chat routes",
    "completion": "it continues texts: /v1/completions",
    "completions": "the same as completion",
    "infill": "it fills in the middle of a text: /infill and `suffix`",
    "embedding": "/v1/embeddings",
    "rerank": "it ranks documents for a query: /v1/rerank",
    "logprobs": "log-probabilities of tokens",
    "tools": "it can call functions; the model's field `tools` says how they are described to it",
    "reasoning": "its reasoning is separate from its content",
    "reasoning_history": "its template includes the reasoning of earlier answers",
    "reasoning_budget": "its reasoning can be ended",
    "continue_final_message": "it can continue the last message",
    "token_ids": "return_token_ids and prefix_token_ids",
    "compare": "/v1/compare",
    "vision": "it sees pictures in messages",
    "json_schema": "answers that follow a JSON schema or grammar"}
A_MODEL = {"type": "object", "properties": {
    "id": A_TEXT, "parent": {"type": ["string", "null"], "description":
                             "of an adapter, its base model; the adapter's alias is MODEL@NAME"},
    "type": {"enum": ["chat", "text", "embedding", "rerank"], "description":
             "what it is for; text: it continues texts, and if it can chat, as a base checkpoint of nanochat "
             "can, it was not taught to"},
    "state": {"enum": ["unloaded", "loading", "ready", "failed"]}, "reason": A_TEXT,
    "loading": {"type": "number", "description": "share that is loaded, from 0 to 1, while it loads"},
    "bytes": {"type": "integer", "description": "in memory; what it will need if it is not loaded"},
    "weights_bytes": {"type": "integer", "description": "those of its weights alone"},
    "default": {"type": "boolean", "description": "it answers requests without a model"},
    "weights_digest": {"type": "string", "description":
                       "a hash of the sizes of the weight files and of 256 samples of each"},
    "arithmetic": {**A_TEXT, "description": "--arithmetic: fast or fine"},
    "better": {**A_TEXT, "description": "of a demonstration model: a MODEL that fits here, or nothing"},
    "run": {**A_TEXT, "description": "of a checkpoint: the training run, RUN of RUN@STEP"},
    "lineage": {**A_TEXT, "description": "of a checkpoint: the run together with its other stages"},
    "step": {"type": "integer", "description": "of a checkpoint"},
    "tag": {**A_TEXT, "description": "of a checkpoint of nanochat: its run's folder, such as d20"},
    "stage": {"enum": ["base", "mid", "sft", "rl", "chat", ""], "description": "of a checkpoint of nanochat"},
    "stale": {"type": "array", "items": A_TEXT,
              "description": "of a checkpoint: metrics of its training that belong to an earlier step"},
    "warning": {**A_TEXT, "description": "of a checkpoint: what to know before it is evaluated"},
    "bits_per_byte": {"type": ["number", "null"],
                      "description": "of a checkpoint: how well it predicts --watch-text, once scored"},
    "scoring": {"type": "boolean", "description": "of a checkpoint: whether it is scored now"},
    "context_length": {"type": "integer"},
    "scored_length": {"type": "integer", "description": "most tokens of a prompt that is only scored"},
    "tools": {"enum": ["native", "generic", None]},
    "capabilities": {"type": "object", "description": "what the model can do here", "properties": {
        name: {"type": "boolean", "description": doc} for name, doc in ABILITIES.items()}},
    "embedder": {"type": "object", "description":
                 "of a model that only embeds or ranks texts: its prompts, dimensions and so on"}}}
MODELS = {"type": "object", "properties": {"data": {"type": "array", "items": A_MODEL}}}
