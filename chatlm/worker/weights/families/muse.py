"""Muse Glimmer: gates of what heads give, norms of different eps, and every fourth layer without rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.model.blocks.attention import HeadGates
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import Family, Gguf, Header
from chatlm.worker.weights.rules import Rule, checked

FACTOR = Rule(float, 1e-4, 10**6)
BASES = Rule(float, 0, 10**15, many=True, optional=True)
TENSORS = {ours: (f"model.layers.{{}}.{theirs}.weight",) for ours, theirs in (
    ("output_norm", "post_attention_layernorm"), ("ffn_norm", "pre_feedforward_layernorm"),
    ("down_norm", "post_feedforward_layernorm"), ("head_gates", "self_attn.gate_proj"))}


def has_window(config: Mapping, layer: int) -> bool:
    """All layers but every fourth, counted from the last."""
    return (config["num_hidden_layers"] - 1 - layer) % 4 > 0


def rotated(path: Path, config: Mapping) -> dict:
    """Which layers turn. Those that do have one base."""
    layers = config["num_hidden_layers"]
    bases = checked(path, "layer_rope_theta", config["layer_rope_theta"], BASES, layers)
    if bases is None:
        bases = [float(has_window(config, layer)) for layer in range(layers)]
    elif len({base for base in bases if base}) > 1:
        raise ConfigError(f"{path}: layer_rope_theta is {shown(bases)}; it must be 0 or the same in all "
                          "layers")
    return {"layer_rope_theta": bases}


def muse(facts: Facts) -> Model:
    """Norms before and after each block, and of the embedding; gates of each number that heads give."""
    config = facts.config
    norm = RmsNorm(facts.eps)
    after = RmsNorm(config["post_norm_eps"])
    norms = facts.head_norms(weights=False)
    layers = []
    for number in facts.layers:
        attention = replace(facts.attention(number, norms, config["qk_scale_factor"]), gates=HeadGates())
        layers.append(Layer(attention, facts.feed(number), norm, norm, after, after))
    return facts.decoder(layers, norm, Input(norm=RmsNorm(facts.eps, weights=False)), config["logit_scale"])


def norms_of_heads(name: str) -> bool:
    return name.endswith((".attn_q_norm.weight", ".attn_k_norm.weight"))


def gguf_layers(header: Header) -> tuple[dict, dict]:
    """Norms of heads have no weights. A file has the factor of queries in the place of theirs."""
    factors = {}
    for part in "qk":
        stored = [floats(tensor.data) for name, tensor in header.stored.items()
                  if name.endswith(f".attn_{part}_norm.weight")]
        numbers = {float(number) for tensor in stored for number in tensor.ravel()} or {1.0}
        factors[part] = numbers.pop()
        if numbers or part == "k" and factors[part] != 1:
            raise ConfigError(f"{header.path}: the tensors attn_{part}_norm.weight must be "
                              f"{'a constant' if part == 'q' else 'ones'} in a muse-glimmer model")
    config: dict[str, Any] = {"qk_scale_factor": factors["q"]}
    windows = header.raw("attention.sliding_window_pattern")
    if isinstance(windows, list):  # in layers without one heads do not turn
        config["layer_rope_theta"] = [float(has_one is True) for has_one in windows]
    return {}, config


def unrotated(config: Mapping, windows: Any) -> set[int]:
    return {layer for layer, base in enumerate(config["layer_rope_theta"]) if not base}


FAMILIES = {"muse_glimmer_text": Family(
    "Muse Glimmer", {
        "hidden_activation": "silu", "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "attention_bias": False, "sliding_window": 2048, "layer_types": None, "final_logit_softcapping": 20.0,
        "qk_scale_factor": 3.87, "output_multiplier": 0.19611613513818404, "logit_scale": 0.19611613513818404,
        "post_norm_eps": 1e-8, "layer_rope_theta": None},
    muse, TENSORS, has_window, keys={
        "qk_scale_factor": FACTOR, "output_multiplier": FACTOR, "logit_scale": FACTOR,
        "post_norm_eps": Rule(float, 0, 1)},
    one_more=True, plain_norms=("model.norm.weight",), aliases={"output_multiplier": "logit_scale"},
    complete=rotated, unrotated=unrotated, gguf=Gguf(
        "muse-glimmer", permuted=True, layers=gguf_layers,
        names={"head_gates": ("blk.{}.attn_gate.weight",)}, repack=lambda stored: {
            name: tensor for name, tensor in stored.items() if not norms_of_heads(name)}))}
