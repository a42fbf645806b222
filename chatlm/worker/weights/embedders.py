"""Refuses embedding models for which /v1/embeddings would return other vectors than they were trained for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import parse_json, read_small
from chatlm.worker.weights.rules import read_json

POOLING_TYPES = "none", "mean", "cls", "last", "rank"  # a GGUF file's pooling_type
OURS = ("this server averages over an input's tokens, with causal attention and no end token, so the vectors "
        "would differ from those the model was trained for")


def refuse_gguf_embedder(path: Path, own: str, metadata: Mapping):
    """ConfigError for a GGUF file whose metadata describe vectors computed differently from ours.

    `own` is the architecture and a dot. Without the key, llama.cpp's default is none: a chat model."""
    number = metadata.get(f"{own}pooling_type", 0)
    known = type(number) is int and 0 <= number < len(POOLING_TYPES)
    pooling = POOLING_TYPES[number] if known else "unknown"
    stated = {}
    if pooling not in ("none", "mean"):
        stated[f"{own}pooling_type"] = f"{shown(number)} ({pooling})"
    if metadata.get(f"{own}attention.causal") is False:
        stated[f"{own}attention.causal"] = "false"
    if pooling == "mean" and metadata.get("tokenizer.ggml.add_eos_token"):
        stated["tokenizer.ggml.add_eos_token"] = "true"
    for key, value in stated.items():
        refuse(path, key, value)


def refuse(path: Path, key: str, value: str):
    raise ConfigError(f"{path}: {key} is {value}: such embeddings are not supported; {OURS}")


def refuse_folder_embedder(folder: Path, ends: bool):
    """The same for a folder written by sentence-transformers: modules.json, and the files it names. `ends`:
    does its tokenizer add a token at the end of a text?"""
    path = folder / "modules.json"
    if not path.exists():
        return
    modules = parse_json(path, read_small(path))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(f"{path} holds {shown(modules)}; it must hold a list of objects")
    for index, module in enumerate(modules):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            where = folder / str(module.get("path")) / "config.json"
            config = read_json(where)
            modes = config.get("pooling_mode")
            modes = modes if isinstance(modes, list) else [modes] if modes else [
                key.removeprefix("pooling_mode_") for key, value in config.items()
                if key.startswith("pooling_mode_") and value]
            if modes not in (["mean"], ["mean_tokens"]):
                refuse(where, "pooling_mode", shown(modes[0] if len(modes) == 1 else modes))
        elif kind not in ("Transformer", "Normalize"):
            refuse(path, f"[{index}].type", shown(module.get("type")))
    for name, key in (("config_sentence_transformers", "default_prompt_name"),
                      ("sentence_bert_config", "do_lower_case")):
        where = folder / f"{name}.json"
        if value := read_json(where, needed=False).get(key):
            refuse(where, key, shown(value))
    if ends:
        refuse(folder / "tokenizer.json", "the last item of its post_processor", "a token")
