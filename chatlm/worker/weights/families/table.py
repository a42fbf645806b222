"""The table of families: the rows of all modules here, by config.json's model_type."""

from __future__ import annotations

from collections.abc import Mapping

from chatlm.worker.weights.families import (
    encoders, gemma4, granite, laguna, latents, layernorms, lfm2, minicpm, mixtures, muse, nemotron, plain,
    qwen35, rotary_encoders, wide_mixtures)
from chatlm.worker.weights.families.family import Family

FAMILIES: Mapping[str, Family] = {
    name: row for rows in (plain, mixtures, wide_mixtures, gemma4, granite, laguna, latents, layernorms, lfm2,
                           minicpm, muse, nemotron, qwen35, encoders, rotary_encoders)
    for name, row in rows.FAMILIES.items()}
# What general.architecture of GGUF files calls a family -> its name
GGUF_FAMILIES = {architecture: name for name, row in FAMILIES.items()
                 for architecture in row.gguf.architectures.split()}
VISION = {  # model_type of an image model, read as text only -> its text model's default
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral", "llava": "llama",
    "smolvlm": "llama", "idefics3": "llama", "kimi_k25": "kimi_k2", "muse_glimmer": "muse_glimmer_text",
    "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_vl_moe_text", "lfm2_vl": "lfm2",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
TEXT_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
