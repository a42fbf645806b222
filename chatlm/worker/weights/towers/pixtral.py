"""The Pixtral tower, with which Mistral Small 3.1, 3.2 and 4, Ministral 3 and Devstral see pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Vision
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, Scores
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.families.family import both
from chatlm.worker.weights.rules import ROPE_BASE, Rule
from chatlm.worker.weights.towers.families import (
    CHANNELS, HEADS, LAYERS, SIDE, TowerFamily, colors_of, scaled, stored_tower, tower)

if TYPE_CHECKING:
    from chatlm.worker.tower import StoredTower
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.towers.families import Colors, Said, Shapes

# Rows of a picture, as in llama.cpp. The makers' processor allows 3,025; a tower's attention costs the square
# of it.
MOST_ROWS = 1024
EPS = 1e-5  # of the tower's norms
COLORS: Colors = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
ACTIVATIONS = {"silu": "swiglu", "gelu": "gelu"}
PARTS = {  # of a layer: ours -> a folder's modules, those of a GGUF file
    "attention_norm": ("attention_norm", "ln1"), "ffn_norm": ("ffn_norm", "ln2"),
    "qkv": ("attention.q_proj attention.k_proj attention.v_proj", "attn_q attn_k attn_v"),
    "output": ("attention.o_proj", "attn_out"),
    "gate_up": ("feed_forward.gate_proj feed_forward.up_proj", "ffn_gate ffn_up"),
    "down": ("feed_forward.down_proj", "ffn_down")}
NAMES = {
    ours: tuple(f"transformer.layers.{{}}.{module}.weight" for module in theirs.split())
    for ours, (theirs, _) in PARTS.items()} | {
    "patch": ("patch_conv.weight",), "first_norm": ("ln_pre.weight",),
    "final_norm": ("multi_modal_projector.norm.weight",),
    "merge": ("multi_modal_projector.patch_merger.merging_layer.weight",)} | both({
        "widen": "multi_modal_projector.linear_1", "project": "multi_modal_projector.linear_2"})
FILE_NAMES = {
    ours: tuple(f"v.blk.{{}}.{module}.weight" for module in theirs.split())
    for ours, (_, theirs) in PARTS.items()} | {
    "patch": ("v.patch_embd.weight",), "first_norm": ("v.pre_ln.weight",),
    "final_norm": ("mm.input_norm.weight",), "merge": ("mm.patch_merger.weight",)} | both({
        "widen": "mm.1", "project": "mm.2"})


def pixtral_tower(said: Said, model: Model, width: int, depth: int, heads: int, ffn_size: int,
                  eps: float, base: float, activation: str, patches: int) -> Model:
    """RMS norms before each block, nothing with a bias, every patch sees all others of its picture.

    The norm that begins the projector is the tower's last one here. It has the eps of the text model."""
    assert model.norm
    said.divides("hidden_size", width, heads)
    size = width // heads
    said.divides("the size of the tower's heads", size, 4)
    attention = Attention(heads, heads, size, size, Rope(size, base), Scores(sees="text"))
    norm = RmsNorm(eps)
    layer = Layer(attention, FeedForward(ffn_size, ACTIVATIONS[activation]), attention_norm=norm,
                  ffn_norm=norm)
    return tower(width, patches, (layer,) * depth, RmsNorm(model.norm.eps))


def pixtral_vision(model: Model, longest: int, unit: int) -> Vision:
    """`longest`: what a picture's longer side is shrunk to, in pixels."""
    rows = min(math.ceil(longest / unit)**2, MOST_ROWS)
    return Vision("pixtral", model.vocab_size, "[IMG]", 0, rows, longest, unit=unit)


def pixtral_stored(said: Said, vision: Vision, layers: Model, patch: int, shuffle: int, eps: float,
                   biased: bool) -> StoredTower:
    return stored_tower(
        vision, layers, patch, shuffle, colors_of(said, COLORS), filter="bicubic",
        projector="pixtral_biased" if biased else "pixtral", places="", angles="by_turns", first_norm=eps)


def pixtral_of_folder(said: Said, model: Model) -> StoredTower:
    scaled(said, 3)
    said.tower("model_type", Rule(str, choices=("pixtral",)), "pixtral")
    said.tower("num_channels", Rule(int, 3, 3), 3)
    said.tower("rope_parameters.rope_type", Rule(str, choices=("axial", "default")), "axial")
    said.model("vision_feature_layer", Rule(int, -1, -1), -1)
    said.model("projector_hidden_act", Rule(str, choices=("gelu",)), "gelu")
    patch = said.tower("patch_size", SIDE, 14)
    shuffle = said.model("spatial_merge_size", Rule(int, 1, 64), 2)
    width = said.tower("hidden_size", CHANNELS, 1024)
    heads = said.tower("num_attention_heads", HEADS, 16)
    base = said.tower("rope_parameters.rope_theta", ROPE_BASE, said.tower("rope_theta", ROPE_BASE, 1e4))
    vision = pixtral_vision(model, said.picture("size.longest_edge", SIDE, 1024), patch * shuffle)
    layers = pixtral_tower(
        said, model, width, said.tower("num_hidden_layers", LAYERS, 24), heads,
        said.tower("intermediate_size", CHANNELS, 4096), EPS, base,
        said.tower("hidden_act", Rule(str, choices=tuple(ACTIVATIONS)), "gelu"), vision.tokens * shuffle**2)
    size = width // heads
    said.tower("head_dim", Rule(int, size, size), size)
    return pixtral_stored(said, vision, layers, patch, shuffle, EPS,
                          said.model("multimodal_projector_bias", Rule(bool), False))


def pixtral_of_file(said: Said, model: Model) -> StoredTower:
    if "mm.patch_merger.weight" not in said.shapes:
        said.refuse("projector_type is pixtral, and mm.patch_merger.weight is missing, as in Pixtral 12B: "
                    "only the towers of Mistral Small 3.1 and later models are supported")
    patch = said.tower("patch_size", SIDE)
    shuffle = said.tower("spatial_merge_size", Rule(int, 1, 64), 2)
    eps = said.tower("attention.layer_norm_epsilon", Rule(float, 0, 1), EPS)
    vision = pixtral_vision(model, said.tower("image_size", SIDE), patch * shuffle)
    layers = pixtral_tower(
        said, model, said.tower("embedding_length", CHANNELS), said.tower("block_count", LAYERS),
        said.tower("attention.head_count", HEADS), said.tower("feed_forward_length", CHANNELS), eps, 1e4,
        "gelu" if said.flag("use_gelu") else "silu", vision.tokens * shuffle**2)
    return pixtral_stored(said, vision, layers, patch, shuffle, eps, "mm.1.bias" in said.shapes)


def pixtral_own(tower: StoredTower, width: int) -> Shapes:
    C = tower.architecture.width
    shapes: Shapes = {
        "patch": (C, 3 * tower.patch**2), "first_norm": (C,), "merge": (C, C * tower.shuffle**2),
        "widen": (width, C), "project": (width, width)}
    if tower.projector == "pixtral_biased":
        shapes |= {"widen_bias": (width,), "project_bias": (width,)}
    return shapes


PIXTRAL = TowerFamily(
    NAMES, FILE_NAMES, pixtral_own, pixtral_of_folder, pixtral_of_file, "[IMG_BREAK]",
    ("llama", "mistral3", "mistral4"), adjacent=r"\.attn_[qk]\.", unread=("v.token_embd.img_break",))
TOWERS = {"mistral3": PIXTRAL}
FILE_TOWERS = {"pixtral": PIXTRAL}
