"""What Qwen3-VL and Qwen3.5 see pictures with: rotary places in the tower and in the model, deepstack."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.messages.requests import Vision
from chatlm.worker.tower import deep_norm
from chatlm.worker.weights.families.family import ACTIVATIONS, both
from chatlm.worker.weights.rules import MOST_LAYERS, Rule
from chatlm.worker.weights.towers.families import (
    CHANNELS, HEADS, LAYERS, SIDE, SIGLIP_FILE, TowerFamily, colors_of, of_grid, scaled, siglip,
    siglip_of_file, stored_tower)

if TYPE_CHECKING:
    from chatlm.worker.tower import StoredTower
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.towers.families import Said, Shapes


# Rows of a picture. The makers' processor allows 16,384; a tower's attention costs the square of it: with
# 1,024 rows, a megapixel, as much as its products.
MOST_ROWS = 1024
MOST_DEEP = 8
EPS = 1e-6
MARKER = "<|vision_start|><|image_pad|><|vision_end|>"

NAMES = both({
    "patch": "visual.patch_embed.proj", "final_norm": "visual.merger.norm",
    "widen": "visual.merger.linear_fc1", "project": "visual.merger.linear_fc2",
    **{ours: f"visual.blocks.{{}}.{theirs}" for ours, theirs in (
        ("attention_norm", "norm1"), ("ffn_norm", "norm2"), ("qkv", "attn.qkv"), ("output", "attn.proj"),
        ("up", "mlp.linear_fc1"), ("down", "mlp.linear_fc2"))},
    **{f"{ours}_{i}": f"visual.deepstack_merger_list.{i}.{theirs}" for i in range(MOST_DEEP)
       for ours, theirs in (("deep_norm", "norm"), ("widen", "linear_fc1"), ("project", "linear_fc2"))}}) | {
    "places": ("visual.pos_embed.weight",)}
FILE_NAMES = SIGLIP_FILE | both({
    "widen": "mm.0", "project": "mm.2", "qkv": "v.blk.{}.attn_qkv",
    **{f"{ours}_{i}": f"v.deepstack.{i}.{theirs}" for i in range(MOST_DEEP)
       for ours, theirs in (("deep_norm", "norm"), ("widen", "fc1"), ("project", "fc2"))}})


def qwen_stored(said: Said, model: Model, layers: Model, patch: int, shuffle: int, grid: int,
                deep: tuple[int, ...], pixels: tuple[int, int]) -> StoredTower:
    """`layers` are the tower's, with any number of patches. `pixels`: fewest and most of a picture."""
    unit = patch * shuffle
    colors = colors_of(said)
    said.divides("the size of the tower's heads", layers.attentions[0].head_size, 4)
    if round(grid**0.5)**2 != grid:
        said.refuse(f"the table of places has {grid} rows; it must be a square")
    count = len(layers.layers)
    rises = [*deep] == sorted({*deep})
    is_inside = not deep or 0 <= deep[0] <= deep[-1] < count
    if len(deep) > min(MOST_DEEP, len(model.layers)) or not rises or not is_inside:
        said.refuse(f"deepstack is after the layers {list(deep)}; there are {count}, and {MOST_DEEP} "
                    "are the most")
    most = min(max(pixels[1] // unit**2, 1), MOST_ROWS)
    fewest = min(-(-pixels[0] // unit**2), most)
    side = LIMITS.picture_side
    # sides are rounded up from the fewest, and the longest picture is at least one row high
    longest = 1 + max(2 * fewest + 1, math.isqrt(side * fewest), min(math.isqrt(side * most), side // unit))
    vision = Vision("qwen3vl", model.vocab_size, MARKER, 0, most, unit=unit, fewest=fewest)
    layers = replace(layers, max_positions=max(most, longest) * shuffle**2)
    return stored_tower(
        vision, layers, patch, shuffle, colors, filter="bicubic", projector="merger", places="bilinear",
        angles="by_row_and_column", most=longest, hidden=layers.width * shuffle**2, grid=grid, deep=deep,
        axes=said.sections())


def qwen_of_folder(said: Said, model: Model) -> StoredTower:
    scaled(said, 3)
    patch = said.tower("patch_size", SIDE, 16)
    shuffle = said.tower("spatial_merge_size", Rule(int, 1, 64), 2)
    said.tower("temporal_patch_size", Rule(int, 2, 2), 2)
    said.tower("in_channels", Rule(int, 3, 3), 3)
    layers = siglip(
        said, said.tower("hidden_size", CHANNELS, 1152), said.tower("depth", LAYERS, 27),
        said.tower("num_heads", HEADS, 16), said.tower("intermediate_size", CHANNELS, 4304), 1, EPS,
        ACTIVATIONS[said.tower("hidden_act", Rule(str, choices=tuple(ACTIVATIONS)), "gelu_pytorch_tanh")],
        rotates=True)
    area = Rule(int, 1, 1 << 40)
    pixels = (said.picture("size.shortest_edge", area, said.picture("min_pixels", area, 65_536)),
              said.picture("size.longest_edge", area, said.picture("max_pixels", area, 16_777_216)))
    deep = said.tower("deepstack_visual_indexes", Rule(int, 0, MOST_LAYERS, many=True), [])
    return qwen_stored(said, model, layers, patch, shuffle,
                       said.tower("num_position_embeddings", Rule(int, 1, 1 << 20), 2304), tuple(deep),
                       pixels)


def qwen_of_file(said: Said, model: Model) -> StoredTower:
    side = said.tower("image_size", SIDE)
    patch = said.tower("patch_size", SIDE)
    flags = said.tower("is_deepstack_layers", Rule(bool, many=True), [])
    area = Rule(int, 1, 1 << 40)
    pixels = said.picture("image_min_pixels", area, 65_536), said.picture("image_max_pixels", area, 1 << 24)
    return qwen_stored(said, model, siglip_of_file(said, 1, rotates=True), patch,
                       said.tower("spatial_merge_size", Rule(int, 1, 64), 2), (side // patch)**2,
                       tuple(layer for layer, flag in enumerate(flags) if flag), pixels)


def qwen_own(tower: StoredTower, width: int) -> Shapes:
    H = tower.hidden
    projectors: Shapes = {
        name.format(deep): shape for deep in ("", *(f"_{i}" for i in range(len(tower.deep))))
        for name, shape in (("widen{}", (H, H)), ("widen{}_bias", (H,)), ("project{}", (width, H)),
                            ("project{}_bias", (width,)))}
    norms: Shapes = {name: (H,) for i in range(len(tower.deep)) for name in deep_norm(i)}
    return of_grid(tower, width) | {"places": (tower.grid, tower.architecture.width)} | projectors | norms


QWEN = TowerFamily(NAMES, FILE_NAMES, qwen_own, qwen_of_folder, qwen_of_file, "<|vision_start|>",
                   ("qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe"))
TOWERS = {"qwen3_vl": QWEN, "qwen3_vl_moe": QWEN, "qwen3_5": QWEN, "qwen3_5_moe": QWEN}
FILE_TOWERS = {"qwen3vl_merger": QWEN}
