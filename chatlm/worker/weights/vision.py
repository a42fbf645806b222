"""What a folder sees pictures with: the tower of SmolVLM, SmolVLM2 and Idefics3 (SigLIP), its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.messages.requests import Vision
from chatlm.worker.arrays.kinds import FLOATS, bits_of, kind_of, of_kind
from chatlm.worker.model.spec import ModelSpec
from chatlm.worker.model.tower import Eyes
from chatlm.worker.weights.assemble import (
    IMAGES, assembled, check_names_and_shapes, tensor_sources)
from chatlm.worker.weights.files import weight_files
from chatlm.worker.weights.layernorms import ACTIVATIONS, both
from chatlm.worker.weights.rules import (
    MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, Rule, check_divides, checked, read_json)
from chatlm.worker.weights.safetensors_file import read_safetensors_file

if TYPE_CHECKING:
    from chatlm.common.config import Settings


SIGLIP = both({
    "patch": "embeddings.patch_embedding", "final_norm": "post_layernorm",
    **{ours: f"encoder.layers.{{}}.{theirs}" for ours, theirs in (
        ("attention_norm", "layer_norm1"), ("ffn_norm", "layer_norm2"), ("output", "self_attn.out_proj"),
        ("up", "mlp.fc1"), ("down", "mlp.fc2"))}}) | {
    f"qkv{ending}": tuple(f"encoder.layers.{{}}.self_attn.{name}_proj.{part}" for name in "qkv")
    for ending, part in (("", "weight"), ("_bias", "bias"))}
PLACES, PROJECT = "embeddings.position_embedding.weight", "modality_projection.proj.weight"
TOWERS = ("smolvlm", "idefics3")  # model_type
SIDE = Rule(int, 1, 1 << 14)      # of tiles and patches, in pixels
SIZES = {  # of vision_config, with transformers' defaults
    "hidden_size": (1152, Rule(int, 16, MOST_CHANNELS)),
    "intermediate_size": (3072, Rule(int, 16, MOST_CHANNELS)),
    "num_hidden_layers": (12, Rule(int, 1, MOST_LAYERS)),
    "num_attention_heads": (16, Rule(int, 1, MOST_HEADS)),
    "image_size": (32, SIDE), "patch_size": (32, SIDE), "layer_norm_eps": (1e-6, Rule(float, 0, 1)),
    "num_channels": (3, Rule(int, 3, 3)),
    "hidden_act": ("gelu_pytorch_tanh", Rule(str, choices=tuple(ACTIVATIONS)))}


def tower_spec(width: int, layers: int, heads: int, ffn_size: int, patches: int, eps: float,
               activation: str) -> ModelSpec:
    """Of SigLIP: LayerNorms before each block, everything with a bias, every patch sees all others."""
    return ModelSpec(
        0, layers, width, heads, heads, width // heads, ffn_size, patches, norm_eps=eps, layer_norms=True,
        norm_biases=True, of_texts=True, qkv_bias=True, output_bias=True, ffn_bias=True, rope_size=0,
        activation=activation, opens=False)


def folder_eyes(folder: Path, settings: Settings, spec: ModelSpec, dtype: str) -> Eyes | None:
    """None if the folder sees nothing, or nothing that this program knows."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") not in TOWERS:
        return None
    raw = config.get("vision_config")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: vision_config is {shown(raw)}; it must be an object")
    own = {key: checked(path, f"vision_config.{key}", raw.get(key, default), rule)
           for key, (default, rule) in SIZES.items()}
    width, side, patch = own["hidden_size"], own["image_size"], own["patch_size"]
    check_divides(path, "vision_config.hidden_size", width, own["num_attention_heads"])
    check_divides(path, "vision_config.image_size", side, patch)
    shuffle: int = checked(path, "scale_factor", config.get("scale_factor", 2), Rule(int, 1, 64))
    check_divides(path, "vision_config.image_size / patch_size", side // patch, shuffle)
    patches = (side // patch) ** 2
    tower = tower_spec(width, own["num_hidden_layers"], own["num_attention_heads"], own["intermediate_size"],
                       patches, own["layer_norm_eps"], ACTIVATIONS[own["hidden_act"]])
    vision, mean, std = picture_settings(folder, spec, side, patches // shuffle**2)
    tensors = folder_tensors(folder, settings, tower, spec.width, patch, shuffle, patches, dtype)
    return Eyes(vision, tower, tensors, patch, shuffle, "lanczos", mean, std)


def picture_settings(folder: Path, spec: ModelSpec, side: int,
                     tokens: int) -> tuple[Vision, tuple[float, ...], tuple[float, ...]]:
    """What the files say of resizing and colors."""
    path = folder / "preprocessor_config.json"
    raw = read_json(path, needed=False)
    if not raw:
        path = folder / "processor_config.json"
        raw = read_json(path, needed=False).get("image_processor") or {}

    def value(name: str, default: Any, rule: Rule, of: Mapping = raw, length: int | None = None) -> Any:
        return checked(path, name, of.get(name, default), rule, length)

    color = Rule(float, -10, 10, many=True)
    mean, std = (tuple(value(f"image_{name}", [0.5] * 3, color, length=3)) for name in ("mean", "std"))
    if not all(std):
        raise ConfigError(f"{path}: image_std is {shown(list(std))}; none may be 0")
    value("resample", 1, Rule(int, 1, 1))  # Lanczos
    value("rescale_factor", 1 / 255, Rule(float, 1 / 255 - 1e-9, 1 / 255 + 1e-9))
    tile = value("longest_edge", side, SIDE, raw.get("max_image_size") or {})
    if tile != side:
        raise ConfigError(f"{path}: max_image_size.longest_edge is {tile}; the tower's image_size is {side}, "
                          "and tiles of another size are not supported")
    longest = value("longest_edge", 4 * side, SIDE, raw.get("size") or {})
    splits = value("do_image_splitting", True, Rule(bool))
    return Vision("idefics3", spec.vocab_size, "<image>", side, tokens, longest, splits), mean, std


def folder_tensors(folder: Path, settings: Settings, tower: ModelSpec, width: int, patch: int, shuffle: int,
                   patches: int, dtype: str) -> dict[str, Any]:
    """The tensors of Eyes, yet to be read."""
    found = {}
    for path in weight_files(folder):
        found |= {re.sub(r"^(model\.)?(vision_tower\.)?(vision_model\.|connector\.)", "", name): tensor
                  for name, tensor in read_safetensors_file(path).items()
                  if re.match(rf"(model\.)?({IMAGES})\b", name)}
    state = {name: tensor for name, tensor in found.items() if not name.startswith("head.")}
    for name, tensor in state.items():
        if kind_of(tensor) not in FLOATS:
            raise ConfigError(f"{folder}: {shown(name)} is of type {kind_of(tensor)}; what sees images must "
                              f"be {', '.join(FLOATS)}")
    C, numbers = tower.width, 3 * patch * patch
    kernel = "embeddings.patch_embedding.weight"
    if (weight := state.get(kernel)) is not None and weight.shape == (C, 3, patch, patch):
        by_color = numpy.ascontiguousarray(bits_of(weight).transpose(0, 2, 3, 1)).reshape(C, numbers)
        state[kernel] = of_kind(by_color, kind_of(weight))
    sources = tensor_sources(tower, SIGLIP, 0) | {
        "patch": ((C, numbers), {kernel: (C, numbers)}),
        "patch_bias": ((C,), {SIGLIP["patch_bias"][0]: (C,)}),
        "places": ((patches, C), {PLACES: (patches, C)}),
        "project": ((width, C * shuffle**2), {PROJECT: (width, C * shuffle**2)})}
    check_names_and_shapes(folder, {name: tuple(tensor.shape) for name, tensor in state.items()}, sources)
    return dict(assembled(folder, settings, sources, state, dtype))
