"""nanochat's checkpoints as Hugging Face folders of the model_type `nanochat_generations`: what `export`
writes (chatlm/export/nanochat_folders.py), and how such a folder is read again.

Its config.json says in transformers' words what sets a generation apart. All of it follows from the
generation and the sizes, so it is compared with these: a folder that says anything else is another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.weights.formats.checkpoint import CheckpointModel
from chatlm.worker.weights.formats.folder.description import hf_text
from chatlm.worker.weights.formats.folder.tensors import read_safetensors
from chatlm.worker.weights.formats.nanochat.checkpoint import nanochat_generation
from chatlm.worker.weights.formats.nanochat.generations import (
    GENERATIONS, IN_TRANSFORMERS, NANOCHAT_KEYS, NANOCHAT_TENSORS, name_in_transformers, names_in_adapters,
    nanochat_model)
from chatlm.worker.weights.rules import Rule, check_divides, checked, read_json

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.model.blocks.model import Model


MODEL_TYPE = "nanochat_generations"
SIZES = {  # key of model_config -> of config.json
    "sequence_len": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size"}
LAYERS = {"sliding_attention": "S", "full_attention": "L"}


def read_nanochat_folder(source: ModelSource, settings: Settings) -> CheckpointModel:
    path = source.path / "config.json"
    stated = read_json(path)
    model, number = folder_blocks(path, stated, settings.softcap)
    tensors, scales = read_safetensors(source.path)
    packed = {name for name, tensor in tensors.items() if not isinstance(tensor, numpy.ndarray)} | {*scales}
    if packed:
        raise ConfigError(f"{source.path}: {shown(min(packed))} is packed; nanochat's models have plain "
                          "weights here")
    state = {upstream_name(name): tensor for name, tensor in tensors.items()}
    if state and (found := nanochat_generation(state)) != number:
        raise ConfigError(f"{path}: generation is {number}, and the tensors are those of generation {found}")
    title = f"nanochat generation {number} ({GENERATIONS[number].since})"
    return CheckpointModel(source, "nanochat", title, model, NANOCHAT_TENSORS, model.vocab_size, state,
                           hf_text(source.path, model.vocab_size), names_in_adapters)


def folder_blocks(path: Path, stated: Mapping[str, Any], softcap: float | None = None) -> tuple[Model, int]:
    """The blocks of a config.json, and its generation. softcap: instead of its own."""
    number = checked(path, "generation", stated.get("generation"), Rule(int, 1, max(GENERATIONS)))
    config = {key: checked(path, name, stated.get(name), NANOCHAT_KEYS[key]) for key, name in SIZES.items()}
    kinds = stated.get("layer_types")
    layers = checked(path, "layer_types", kinds, Rule(str, many=True))
    if len(layers) != config["n_layer"] or {*layers} - LAYERS.keys():
        raise ConfigError(f"{path}: layer_types must have one of {' and '.join(LAYERS)} for each layer")
    window = checked(path, "sliding_window", stated.get("sliding_window"),
                     Rule(int, 2, NANOCHAT_KEYS["sequence_len"].high, optional=True))
    config["window_pattern"] = "".join(map(LAYERS.__getitem__, layers))
    config["short_seq_len"] = window and window - 1  # a window has the token itself, too
    check_divides(path, "hidden_size", config["n_embd"], 2 * config["n_head"], "2 * num_attention_heads")
    check_divides(path, "num_attention_heads", config["n_head"], config["n_kv_head"], "num_key_value_heads")
    own = checked(path, "final_logit_softcapping", stated.get("final_logit_softcapping"),
                  Rule(float, 0.0, 1e6))
    model = nanochat_model(config, number, softcap or own)
    for key, value in (sizes_of(model) | features_of(model, number)).items():
        if key in stated and stated[key] != value and key not in ("final_logit_softcapping", "generation"):
            raise ConfigError(f"{path}: {key} is {shown(stated[key])}, and generation {number} of nanochat "
                              f"with these sizes has {shown(value)}")
    return model, number


# what config.json says

def sizes_of(model: Model) -> dict[str, Any]:
    """What the folders of all generations, and those of transformers' own `nanochat`, say alike."""
    attention = attentions_of(model)[0]
    assert model.head and model.norm and model.feed
    return {
        "vocab_size": model.vocab_size, "hidden_size": model.width, "intermediate_size": model.feed.width,
        "num_hidden_layers": len(model.layers), "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads, "head_dim": attention.head_size,
        "hidden_act": "relu2", "max_position_embeddings": model.answer_positions,
        "rms_norm_eps": model.norm.eps, "final_logit_softcapping": model.head.softcap,
        "tie_word_embeddings": False}


def features_of(model: Model, number: int) -> dict[str, Any]:
    """What sets a generation apart, in the words of hub_code/configuration_nanochat_generations.py."""
    generation = GENERATIONS[number]
    channels, scale = generation.value_gate or (0, 0.0)
    attentions = attentions_of(model)
    windows = [attention.scores.window for attention in attentions]
    long = windows[-1] or None  # the last layer has the long one
    short = next((window for window in windows if window != windows[-1]), None)
    return {
        "generation": number, "rope_theta": rope_base(model), "rope_bfloat16": generation.rope_bfloat16,
        "layer_types": ["full_attention" if window == windows[-1] else "sliding_attention"
                        for window in windows],
        "sliding_window": short, "long_window": long, "mixes_x0": generation.mixes_x0,
        "value_embed_layers": [layer for layer, attention in enumerate(attentions) if attention.embed],
        "value_gate_channels": channels, "value_gate_scale": scale, "qk_scale": generation.qk_scale,
        "smear_channels": generation.smear_channels,
        "backout_layer": len(attentions) // 2 if generation.backs_out else None}


def attentions_of(model: Model) -> list[Attention]:
    return [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]


def rope_base(model: Model) -> float:
    return attentions_of(model)[0].rope.base


# names of tensors

def folder_name(name: str) -> str:
    """The name in a folder of a tensor of a checkpoint."""
    if name.startswith("value_embeds."):
        return f"model.layers.{name.split('.')[1]}.self_attn.value_embed.weight"
    if "." not in name:  # the lambdas
        return f"model.scalars.{name}"
    called = name_in_transformers(name).replace("attn.ve_gate", "self_attn.ve_gate")
    return called if called.startswith(("model.", "lm_head.")) else f"model.{called}"


def upstream_name(name: str) -> str:
    """The name in a checkpoint of a tensor of a folder."""
    if name.startswith("model.scalars."):
        return name.removeprefix("model.scalars.")
    if name.endswith(".self_attn.value_embed.weight"):
        return f"value_embeds.{name.split('.')[2]}.weight"
    for upstream, theirs in IN_TRANSFORMERS.items():
        name = name.replace(theirs, upstream)
    return name.replace("self_attn.ve_gate", "attn.ve_gate").removeprefix("model.")
