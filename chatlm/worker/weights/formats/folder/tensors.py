"""Reads the tensors of a Hugging Face folder, as far as its text model has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.arrays.kinds import FLOATS, kind_of
from chatlm.worker.weights.files.safetensors_file import read_safetensors_file
from chatlm.worker.weights.files.weight_files import weight_files
from chatlm.worker.weights.packed.fp8 import FP8
from chatlm.worker.weights.packed.layouts import PackedWeight
from chatlm.worker.weights.packed.quantization import join_packed

# not part of the text model
IMAGES = ("vision_tower|vision_model|vision_embedder|visual|multi_modal_projector|connector|image_newline"
          "|embed_vision|vision_adapter|vision_projection|audio_tower|embed_audio")

# rotary frequencies, causal masks and positions in old files
UNREAD = r".*\.rotary_emb\.|.*\.(attn|attention)\.(masked_)?bias$|.*\bposition_ids$"

# scales for keys and values that others keep in FP8; here pages have types of their own
KV_SCALES = (r".*\.(([qkv]|kv|prob)(_cache)?(_global)?_(scale|zero_point)(_inv)?"
             r"|[kv]_proj\.output_(scale|zero_point))$")
SKIPPED = re.compile(rf"(model\.)?({IMAGES})\b|{UNREAD}|{KV_SCALES}")

# scales for activations, and for cached keys and values, whose types differ here
OTHER_SCALES = re.compile(r"\.(input|output|[kqv])_scale(_inv)?$")


def read_safetensors(folder: Path) -> tuple[dict[str, Any], dict[str, numpy.ndarray]]:
    """A folder's tensors, mapped from its files, and the scales of those in FP8. Skips image encoders."""
    stored = {}
    for path in weight_files(folder):
        stored |= read_safetensors_file(path)
    state: dict[str, Any] = {}
    for name, tensor in join_packed(folder, stored).items():
        if not SKIPPED.match(name):
            # image models prefix the text model's names
            state[re.sub(r"(language|text)_model\.", "", name, count=1)] = tensor
    scales = take_scales(state)
    for name, tensor in list(state.items()):
        if isinstance(tensor, PackedWeight):
            continue
        kind = kind_of(tensor)
        is_mxfp4 = kind == "uint8" and name.endswith(("_blocks", "_scales"))
        if scales and OTHER_SCALES.search(name):
            del state[name]
        elif not (kind in FLOATS or is_mxfp4 or name in scales):
            raise ConfigError(f"{folder}: {shown(name)} is of type {kind}; it must be float32, float16 or "
                              "bfloat16, or FP8 with a tensor of scales")
    return state, scales


def take_scales(state: dict[str, Any]) -> dict[str, numpy.ndarray]:
    """Take the scales of tensors in FP8 out of a folder's tensors, by the names of those tensors."""
    scales = {}
    for name in list(state):
        for scale in (f"{name}_scale_inv", f"{name}_scale"):
            # scales may be in FP8 too, and so be taken already
            if name in state and kind_of(state[name]) in FP8 and scale in state:
                scales[name] = state.pop(scale)
    return scales
