"""The families of towers, which see pictures: each a row of `TOWERS`, with the names of its tensors and what
its files say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TYPE_CHECKING

import numpy

from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import Vision
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, HeadNorms, Scores
from chatlm.worker.model.blocks.clamps import MOST
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import LayerNorm, RmsNorm
from chatlm.worker.tower import StoredTower
from chatlm.worker.weights.families.family import ACTIVATIONS, both
from chatlm.worker.weights.rules import MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, ROPE_BASE, Rule

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.norms import AnyNorm


Shapes = dict[str, tuple[int, ...]]


class Said(Protocol):
    """What a model's files say. Each method checks a value, and takes the default for one that is missing."""

    shapes: dict[str, tuple[int, ...]]  # of the tensors of a GGUF file; of a folder's none

    def tower(self, key: str, rule: Rule, default: Any = None) -> Any:
        """From config.json's vision_config, or a GGUF file's keys that begin with clip.vision."""

    def model(self, key: str, rule: Rule, default: Any = None) -> Any:
        """From the rest of config.json. A GGUF file has none of these."""

    def picture(self, key: str, rule: Rule, default: Any = None, length: int | None = None) -> Any:
        """From preprocessor_config.json, where the key may be a path such as size.longest_edge. A GGUF file
        has it where `tower` looks."""

    def divides(self, key: str, value: int, by: int):
        """ConfigError unless the value of a key is a multiple of `by`."""

    def flag(self, key: str) -> bool:
        """From a GGUF file's keys that begin with clip. A folder has none of these."""
        ...

    def sections(self) -> tuple[int, ...]:
        """M-RoPE: how many pairs of a text model's head turn by time, row and column."""
        ...

    def refuse(self, problem: str):
        """ConfigError."""


class TowerFamily(NamedTuple):
    names: Mapping[str, tuple[str, ...]]       # ours -> those of a folder, from the tower's or projector's on
    file_names: Mapping[str, tuple[str, ...]]  # ours -> those of a GGUF file
    own: Callable[[StoredTower, int], Shapes]  # tensors beside the layers'; int: the model's width
    of_folder: Callable[[Said, Model], StoredTower]   # all but the tensors
    of_file: Callable[[Said, Model], StoredTower]
    token: str                                 # the models that it belongs to have this special token
    architectures: tuple[str, ...]             # and one of these, as GGUF files
    added: Mapping[str, float] = {}            # to values of a folder; those of a GGUF file have it
    transposed: tuple[str, ...] = ()           # ours that files store as (in, out)
    swapped: tuple[str, ...] = ()              # ours whose first two axes are exchanged in a folder
    planar: tuple[str, ...] = ()               # ours whose columns are by color first in a GGUF file
    axes: str = ""  # files' tensors, whose heads have two halves, one for each axis, each with its own pairs;
                    # ours are (i, i + D / 2)
    adjacent: str = ""             # a GGUF file's tensors, whose pairs are (2 i, 2 i + 1)
    unread: tuple[str, ...] = ()   # a GGUF file's tensors that nothing needs


Colors = tuple[tuple[float, ...], tuple[float, ...]]  # the mean and the standard deviation of each color
HALVES: Colors = ((0.5,) * 3, (0.5,) * 3)
UNCHANGED: Colors = ((0.0,) * 3, (1.0,) * 3)


def stored_tower(vision: Vision, layers: Model, patch: int, shuffle: int, colors: Colors,
                 **more: Any) -> StoredTower:
    """A tower with these layers. Its tensors are still to be found."""
    mean, std = colors
    return StoredTower(vision, layers, {}, patch, shuffle, mean=mean, std=std, **more)


# of a picture
TOKENS = Rule(int, 1, 1 << 14)
TILES = Rule(int, 1, 64)
SIDE = Rule(int, 1, 1 << 14)  # in pixels
CHANNELS = Rule(int, 16, MOST_CHANNELS)
LAYERS = Rule(int, 1, MOST_LAYERS)
HEADS = Rule(int, 1, MOST_HEADS)
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # by the numbers that Pillow has for them

SIGLIP = both({
    "patch": "embeddings.patch_embedding", "final_norm": "post_layernorm",
    **{ours: f"encoder.layers.{{}}.{theirs}" for ours, theirs in (
        ("attention_norm", "layer_norm1"), ("ffn_norm", "layer_norm2"), ("output", "self_attn.out_proj"),
        ("up", "mlp.fc1"), ("down", "mlp.fc2"))}}) | {
    f"qkv{ending}": tuple(f"encoder.layers.{{}}.self_attn.{name}_proj.{part}" for name in "qkv")
    for ending, part in (("", "weight"), ("_bias", "bias"))} | {
    "places": ("embeddings.position_embedding.weight",)}
SIGLIP_FILE = both({
    "patch": "v.patch_embd", "final_norm": "v.post_ln", "attention_norm": "v.blk.{}.ln1",
    "ffn_norm": "v.blk.{}.ln2", "output": "v.blk.{}.attn_out", "up": "v.blk.{}.ffn_up",
    "down": "v.blk.{}.ffn_down"}) | {
    f"qkv{ending}": tuple(f"v.blk.{{}}.attn_{name}.{part}" for name in "qkv")
    for ending, part in (("", "weight"), ("_bias", "bias"))} | {"places": ("v.position_embd.weight",)}


def tower(width: int, patches: int, layers: tuple[Layer, ...], norm: AnyNorm) -> Model:
    """The blocks of a tower, whose input others compute. `norm` comes after the last layer."""
    return Model(0, width, patches, None, layers, norm, None, of_texts=True)


def siglip(said: Said, width: int, layers: int, heads: int, ffn_size: int, patches: int, eps: float,
           activation: str, rotates: bool = False) -> Model:
    """`rotates`: heads turn by the place of their patch."""
    said.divides("the tower's width", width, heads)
    size = width // heads
    norm = LayerNorm(eps, bias=True)
    layer = siglip_layer(heads, size, ffn_size, norm, activation, Rope(size if rotates else 0))
    return tower(width, patches, (layer,) * layers, norm)


def siglip_layer(heads: int, head_size: int, ffn_size: int, norm: LayerNorm, activation: str,
                 rope: Rope) -> Layer:
    """LayerNorms before each block, everything with a bias, every patch sees all others (Zhai et al.,
    "Sigmoid Loss for Language Image Pre-Training", 2023)."""
    attention = Attention(heads, heads, head_size, head_size, rope, Scores(sees="text"),
                          biases=("qkv", "output"))
    feed = FeedForward(ffn_size, activation, biased=True)
    return Layer(attention, feed, attention_norm=norm, ffn_norm=norm)


def siglip_of_folder(said: Said, patches: int, width: int, layers: int, heads: int) -> Model:
    """`patches`: the most in a tile. The others are defaults."""
    said.tower("num_channels", Rule(int, 3, 3), 3)
    return siglip(
        said, said.tower("hidden_size", CHANNELS, width), said.tower("num_hidden_layers", LAYERS, layers),
        said.tower("num_attention_heads", HEADS, heads), said.tower("intermediate_size", CHANNELS, 3072),
        patches, said.tower("layer_norm_eps", Rule(float, 0, 1), 1e-6),
        ACTIVATIONS[said.tower("hidden_act", Rule(str, choices=tuple(ACTIVATIONS)), "gelu_pytorch_tanh")])


def siglip_of_file(said: Said, patches: int, rotates: bool = False) -> Model:
    return siglip(
        said, said.tower("embedding_length", CHANNELS), said.tower("block_count", LAYERS),
        said.tower("attention.head_count", HEADS), said.tower("feed_forward_length", CHANNELS), patches,
        said.tower("attention.layer_norm_epsilon", Rule(float, 0, 1)), "gelu_tanh", rotates)


def colors_of(said: Said, usual: Colors = HALVES) -> Colors:
    rule = Rule(float, -10, 10, many=True)
    mean, std = (tuple(said.picture(f"image_{name}", rule, [*default], 3))
                 for name, default in zip(("mean", "std"), usual))
    if not all(std):
        said.refuse(f"image_std is {list(std)}; none may be 0")
    return mean, std


def scaled(said: Said, filters: int):
    """ConfigError unless colors become 0 to 1, and pictures are resized with this filter."""
    said.picture("resample", Rule(int, filters, filters), filters)
    said.picture("rescale_factor", Rule(float, 1 / 255 - 1e-9, 1 / 255 + 1e-9), 1 / 255)


def square_grid(said: Said, side: int, patch: int, shuffle: int) -> int:
    """The patches of a tile of side * side pixels. shuffle * shuffle of them become one row."""
    said.divides("image_size", side, patch)
    said.divides("image_size / patch_size", side // patch, shuffle)
    return (side // patch) ** 2


def of_grid(tower: StoredTower, width: int) -> Shapes:
    """A product for each patch, a row for its place, and a product for the rows of each square."""
    C = tower.architecture.width
    return {"patch": (C, 3 * tower.patch**2), "patch_bias": (C,), "places": (tower.patches, C),
            "project": (width, C * tower.shuffle**2)}


def idefics3_of_folder(said: Said, model: Model) -> StoredTower:
    side = said.tower("image_size", SIDE, 32)
    patch = said.tower("patch_size", SIDE, 32)
    shuffle = said.model("scale_factor", Rule(int, 1, 64), 2)
    patches = square_grid(said, side, patch, shuffle)
    layers = siglip_of_folder(said, patches, 1152, 12, 16)
    colors = colors_of(said)
    scaled(said, 1)
    tile = said.picture("max_image_size.longest_edge", SIDE, side)
    if tile != side:
        said.refuse(f"max_image_size.longest_edge is {tile}; the tower's image_size is {side}, and tiles of "
                    "another size are not supported")
    vision = Vision("idefics3", model.vocab_size, "<image>", side, patches // shuffle**2,
                    said.picture("size.longest_edge", SIDE, 4 * side),
                    said.picture("do_image_splitting", Rule(bool), True))
    return stored_tower(vision, layers, patch, shuffle, colors, filter="lanczos", projector="idefics3")


def idefics3_of_file(said: Said, model: Model) -> StoredTower:
    side = said.tower("image_size", SIDE)
    patch = said.tower("patch_size", SIDE)
    shuffle = said.tower("projector.scale_factor", Rule(int, 1, 64))
    patches = square_grid(said, side, patch, shuffle)
    layers = siglip_of_file(said, patches)
    colors = colors_of(said)
    vision = Vision("idefics3", model.vocab_size, "<image>", side, patches // shuffle**2,
                    said.picture("preproc_image_size", SIDE, 4 * side))
    return stored_tower(vision, layers, patch, shuffle, colors, filter="lanczos", projector="idefics3")


IDEFICS3 = TowerFamily(
    SIGLIP | {"project": ("modality_projection.proj.weight",)},
    SIGLIP_FILE | {"project": ("mm.model.fc.weight",)}, of_grid, idefics3_of_folder, idefics3_of_file,
    "<fake_token_around_image>", ("llama",))

def lfm2_stored(said: Said, model: Model, layers: Callable[[int], Model], patch: int, shuffle: int,
                projector: str, hidden: int, grid: int) -> StoredTower:
    """`layers`: with the most patches of a tile."""
    unit = patch * shuffle
    colors = colors_of(said)
    tile = said.picture("tile_size", SIDE, 512)
    tokens = said.picture("max_image_tokens", TOKENS, 256)
    fewest_tiles = said.picture("min_tiles", TILES, 2)
    most_tiles = said.picture("max_tiles", TILES, 10)
    said.divides("tile_size", tile, unit)
    if fewest_tiles > most_tiles:
        said.refuse(f"min_tiles is {fewest_tiles}, and max_tiles {most_tiles}; it must not be more")
    fewest = said.picture("min_image_tokens", TOKENS, 64)
    # the longest picture is at least one row high
    most = max(math.isqrt(LIMITS.picture_side * max(tokens, fewest)) + 1, (tile // unit)**2)
    vision = Vision(
        "lfm2", model.vocab_size, "<image>", tile, tokens,
        splits=said.picture("do_image_splitting", Rule(bool), True), unit=unit, fewest=fewest,
        tiles=(fewest_tiles, most_tiles),
        whole_from=said.picture("max_pixels_tolerance", Rule(float, 1, 100), 2.0),
        shows_whole=said.picture("use_thumbnail", Rule(bool), True))
    patches = max(most, tokens) * shuffle**2
    return stored_tower(vision, layers(patches), patch, shuffle, colors, filter="bilinear",
                        projector=projector, places="spread", most=most, hidden=hidden, grid=grid)


def lfm2_of_folder(said: Said, model: Model) -> StoredTower:
    scaled(said, 2)
    said.model("vision_feature_layer", Rule(int, -1, -1), -1)
    said.model("projector_hidden_act", Rule(str, choices=("gelu",)), "gelu")
    said.model("projector_bias", Rule(bool), True)
    patch = said.tower("patch_size", SIDE, 16)
    shuffle = said.model("downsample_factor", Rule(int, 1, 64), 2)
    said.picture("encoder_patch_size", Rule(int, patch, patch), patch)
    said.picture("downsample_factor", Rule(int, shuffle, shuffle), shuffle)
    normed = said.model("projector_use_layernorm", Rule(bool), True)
    return lfm2_stored(
        said, model, lambda patches: siglip_of_folder(said, patches, 768, 12, 12), patch, shuffle,
        "lfm2" if normed else "lfm2_bare", said.model("projector_hidden_size", CHANNELS, 2560),
        said.tower("num_patches", Rule(int, 1, 1 << 16), 256))


def lfm2_of_file(said: Said, model: Model) -> StoredTower:
    side = said.tower("image_size", SIDE)
    patch = said.tower("patch_size", SIDE)
    return lfm2_stored(
        said, model, lambda patches: siglip_of_file(said, patches), patch,
        said.tower("projector.scale_factor", Rule(int, 1, 64), 2),
        "lfm2" if "mm.input_norm.weight" in said.shapes else "lfm2_bare",
        said.shapes.get("mm.1.weight", (16,))[0], (side // patch)**2)


def lfm2_own(tower: StoredTower, width: int) -> Shapes:
    joined = tower.architecture.width * tower.shuffle**2
    H = tower.hidden
    norm: Shapes = {"join_norm": (joined,), "join_norm_bias": (joined,)} if tower.projector == "lfm2" else {}
    return of_grid(tower, width) | {
        "places": (tower.grid, tower.architecture.width), "widen": (H, joined), "widen_bias": (H,),
        "project": (width, H), "project_bias": (width,)} | norm


LFM2 = TowerFamily(
    SIGLIP | both({"join_norm": "multi_modal_projector.layer_norm", "widen": "multi_modal_projector.linear_1",
                   "project": "multi_modal_projector.linear_2"}),
    SIGLIP_FILE | both({"join_norm": "mm.input_norm", "widen": "mm.1", "project": "mm.2"}),
    lfm2_own, lfm2_of_folder, lfm2_of_file, "<|image_start|>", ("lfm2", "lfm2moe"))

def gemma3_stored(said: Said, model: Model, layers: Model, side: int, patch: int,
                  shuffle: int) -> StoredTower:
    tokens = (side // patch // shuffle)**2
    vision = Vision("gemma3", model.vocab_size, "<start_of_image>", side, tokens, two_sided=True)
    return stored_tower(vision, layers, patch, shuffle, colors_of(said), filter="bilinear",
                        projector="gemma3", two_sided="all")


def gemma3_of_folder(said: Said, model: Model) -> StoredTower:
    side = said.tower("image_size", SIDE, 896)
    patch = said.tower("patch_size", SIDE, 14)
    tokens = said.model("mm_tokens_per_image", TOKENS, 256)
    said.divides("image_size", side, patch)
    shuffle = max(side // patch // max(math.isqrt(tokens), 1), 1)
    patches = square_grid(said, side, patch, shuffle)
    if patches != tokens * shuffle**2:
        said.refuse(f"mm_tokens_per_image is {tokens}; it must be a square that divides {patches} patches")
    scaled(said, 2)
    for edge in ("height", "width"):
        said.picture(f"size.{edge}", Rule(int, side, side), side)
    return gemma3_stored(said, model, siglip_of_folder(said, patches, 1152, 27, 16), side, patch, shuffle)


def gemma3_of_file(said: Said, model: Model) -> StoredTower:
    side = said.tower("image_size", SIDE)
    patch = said.tower("patch_size", SIDE)
    shuffle = said.tower("projector.scale_factor", Rule(int, 1, 64), 4)
    layers = siglip_of_file(said, square_grid(said, side, patch, shuffle))
    return gemma3_stored(said, model, layers, side, patch, shuffle)


def gemma3_own(tower: StoredTower, width: int) -> Shapes:
    C = tower.architecture.width
    return of_grid(tower, width) | {"project": (width, C), "mean_norm": (C,)}


GEMMA3 = TowerFamily(
    SIGLIP | {"mean_norm": ("multi_modal_projector.mm_soft_emb_norm.weight",),
              "project": ("multi_modal_projector.mm_input_projection_weight",)},
    SIGLIP_FILE | {"mean_norm": ("mm.soft_emb_norm.weight",), "project": ("mm.input_projection.weight",)},
    gemma3_own, gemma3_of_folder, gemma3_of_file, "<start_of_image>", ("gemma3",), added={"mean_norm": 1.0},
    transposed=("project",))

GEMMA4_NORMS = {"attention_norm": ("input_layernorm", "ln1"),
                "ffn_norm": ("pre_feedforward_layernorm", "ln2"),
                "output_norm": ("post_attention_layernorm", "attn_post_norm"),
                "down_norm": ("post_feedforward_layernorm", "ffn_post_norm"),
                "q_norm": ("self_attn.q_norm", "attn_q_norm"), "k_norm": ("self_attn.k_norm", "attn_k_norm")}
GEMMA4_PRODUCTS = {"qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                           ("attn_q", "attn_k", "attn_v")),
                   "output": (("self_attn.o_proj",), ("attn_out",)),
                   "down": (("mlp.down_proj",), ("ffn_down",)),
                   "gate_up": (("mlp.gate_proj", "mlp.up_proj"), ("ffn_gate", "ffn_up"))}
CLAMPS = ".input_min", ".input_max", ".output_min", ".output_max"  # numbers of each product, if it is clamped
GEMMA4_NAMES = {ours: (f"encoder.layers.{{}}.{theirs}.weight",)
                for ours, (theirs, _) in GEMMA4_NORMS.items()} | {
    ours: tuple(f"encoder.layers.{{}}.{each}.linear.weight" for each in theirs)
    for ours, (theirs, _) in GEMMA4_PRODUCTS.items()} | {
    "gate": ("encoder.layers.{}.mlp.gate_proj.linear.weight",),
    "up": ("encoder.layers.{}.mlp.up_proj.linear.weight",),
    "patch": ("patch_embedder.input_proj.weight",), "places": ("patch_embedder.position_embedding_table",),
    "mean_bias": ("std_bias",), "mean_scale": ("std_scale",),
    "project": ("embed_vision.embedding_projection.weight",)}
GEMMA4_FILE_NAMES = {ours: (f"v.blk.{{}}.{theirs}.weight",) for ours, (_, theirs) in GEMMA4_NORMS.items()} | {
    ours: tuple(f"v.blk.{{}}.{each}.weight" for each in theirs)
    for ours, (_, theirs) in GEMMA4_PRODUCTS.items()} | {
    "gate": ("v.blk.{}.ffn_gate.weight",), "up": ("v.blk.{}.ffn_up.weight",),
    "patch": ("v.patch_embd.weight",), "places": ("v.position_embd.weight",), "mean_bias": ("v.std_bias",),
    "mean_scale": ("v.std_scale",), "project": ("mm.input_projection.weight",)}


def gemma4_vision(said: Said, model: Model, unit: int, two_sided: bool) -> Vision:
    scaled(said, 3)
    tokens = said.picture("max_soft_tokens", TOKENS, 280)
    return Vision("gemma4", model.vocab_size, "<|image|>", 0, tokens, unit=unit, two_sided=two_sided)


def gemma4_tower(said: Said, patches: int, width: int, layers: int, heads: tuple[int, int, int],
                 ffn_size: int, eps: float, base: float, clamped: bool) -> Model:
    """`heads`: of queries, of keys, and their size. `base`: of the heads' rotation by places."""
    count, kv_heads, size = heads
    said.divides("the number of heads", count, kv_heads)
    said.divides("the size of heads", size, 4)
    layer = gemma4_layer(count, kv_heads, size, ffn_size, eps, base, clamped)
    norm = RmsNorm(eps, apart=clamped)
    return tower(width, patches, (layer,) * layers, norm)


def gemma4_layer(heads: int, kv_heads: int, head_size: int, ffn_size: int, eps: float, base: float,
                 clamped: bool) -> Layer:
    """Norms before and after each block, and of q, k and v. Scores are q k^T without another scale.

    `clamped`: what products read and give is bounded. Then norms, gate and up are computed apart, since
    bounds come before and after each product."""
    before = RmsNorm(eps, apart=clamped)
    after = RmsNorm(eps)
    attention = Attention(
        heads, kv_heads, head_size, head_size, Rope(head_size, base),
        Scores(scale=head_size**0.5, sees="text"), HeadNorms("before_rope", eps), value_norm=True)
    feed = FeedForward(ffn_size, "geglu", apart=clamped)
    return Layer(attention, feed, attention_norm=before, ffn_norm=before, output_norm=after, down_norm=after,
                 clamped=clamped)


def gemma4_stored(said: Said, model: Model, layers: Callable[[int], Model], patch: int, shuffle: int,
                  grid: int, standard: bool, two_sided: bool, pad: int) -> StoredTower:
    vision = gemma4_vision(said, model, patch * shuffle, two_sided)
    return stored_tower(
        vision, layers(vision.tokens * shuffle**2), patch, shuffle, HALVES, filter="bicubic",
        projector="gemma4_standard" if standard else "gemma4", places="axes", angles="axes", grid=grid,
        two_sided="windows" if two_sided else "", pad=pad)


def gemma4_text(said: Said) -> tuple[bool, int]:
    """Whether rows of a picture see each other, and which token's layer inputs they get."""
    rule = Rule(str, choices=("vision",), optional=True)
    ahead = said.model("text_config.use_bidirectional_attention", rule)
    return ahead == "vision", said.model("text_config.pad_token_id", Rule(int, 0, 1 << 24), 0)


def gemma4_of_folder(said: Said, model: Model) -> StoredTower:
    said.tower("hidden_activation", Rule(str, choices=("gelu_pytorch_tanh",)), "gelu_pytorch_tanh")
    queries = said.tower("num_attention_heads", HEADS, 12)
    keys = said.tower("num_key_value_heads", HEADS, queries)
    heads = queries, keys, said.tower("head_dim", CHANNELS, 64)
    said.tower("rope_parameters.rope_type", Rule(str, choices=("axial", "default")), "axial")
    base = said.tower("rope_parameters.rope_theta", ROPE_BASE, 100.0)
    return gemma4_stored(
        said, model, lambda patches: gemma4_tower(
            said, patches, said.tower("hidden_size", CHANNELS, 768),
            said.tower("num_hidden_layers", LAYERS, 16), heads,
            said.tower("intermediate_size", CHANNELS, 3072),
            said.tower("rms_norm_eps", Rule(float, 0, 1), 1e-6), base,
            said.tower("use_clipped_linears", Rule(bool), False)),
        said.tower("patch_size", SIDE, 16), said.tower("pooling_kernel_size", Rule(int, 1, 64), 3),
        said.tower("position_embedding_size", Rule(int, 1, 1 << 20), 10_240),
        said.tower("standardize", Rule(bool), False), *gemma4_text(said))


def gemma4_of_file(said: Said, model: Model) -> StoredTower:
    clamped = any(name.startswith("v.") and name.endswith(CLAMPS) for name in said.shapes)
    heads = said.tower("attention.head_count", HEADS)
    rows = said.shapes.get("v.blk.0.attn_k.weight", (0,))[0]
    size = said.shapes.get("v.blk.0.attn_q_norm.weight", (1,))[0]
    return gemma4_stored(
        said, model, lambda patches: gemma4_tower(
            said, patches, said.tower("embedding_length", CHANNELS), said.tower("block_count", LAYERS),
            (heads, max(rows // size, 1), size), said.tower("feed_forward_length", CHANNELS),
            said.tower("attention.layer_norm_epsilon", Rule(float, 0, 1)), 100.0, clamped),
        said.tower("patch_size", SIDE), said.tower("projector.scale_factor", Rule(int, 1, 64), 3),
        said.shapes.get("v.position_embd.weight", (2, 1))[1], "v.std_scale" in said.shapes,
        not (isinstance(model.input, Input) and model.input.layers), 0)


def clamps_of(path: Path, names: Mapping[str, tuple[str, ...]], model: Model,
              numbers: Mapping[str, float]) -> dict[str, numpy.ndarray]:
    """The clamps of each layer, from a file's numbers by their names there. Where it has none they are the
    largest number."""
    if not any(layer.clamped for layer in model.layers):
        return {}
    clamps = {}
    parts = (*names["qkv"], *(names[part][0] for part in ("output", "gate", "up", "down")))
    for layer in range(len(model.layers)):
        stems = [re.sub(r"(\.linear)?\.weight$", "", part.format(layer)) for part in parts]
        values = numpy.array([clamps_of_product(stem, numbers) for stem in stems]).clip(-MOST, MOST)
        for same_input in (slice(0, 3), slice(4, 6)):
            first = same_input.start
            if (values[same_input, :2] != values[first, :2]).any():
                raise ConfigError(f"{path}: {stems[first]} has another input_min or input_max than the "
                                  "next products, which read the same; that is not supported")
        clamps[f"{layer}.clamps"] = values.reshape(-1).astype(numpy.float32)
    return clamps


def clamps_of_product(stem: str, numbers: Mapping[str, float]) -> list[float]:
    """The numbers of CLAMPS of a product whose names begin with this stem."""
    return [numbers.get(stem + ending, MOST if ending.endswith("max") else -MOST) for ending in CLAMPS]


def gemma4_own(tower: StoredTower, width: int) -> Shapes:
    C = tower.architecture.width
    standard: Shapes = {"mean_bias": (C,), "mean_scale": (C,)} if tower.projector == "gemma4_standard" else {}
    return {"patch": (C, 3 * tower.patch**2), "places": (2, tower.grid, C), "project": (width, C)} | standard


GEMMA4 = TowerFamily(GEMMA4_NAMES, GEMMA4_FILE_NAMES, gemma4_own, gemma4_of_folder, gemma4_of_file,
                     "<|image|>", ("gemma4",), axes=r"\bself_attn\.[qk]_|\.attn_[qk](_norm)?\.")

def bare_stored(said: Said, model: Model, width: int, patch: int, grid: int, two_sided: bool,
                pad: int) -> StoredTower:
    vision = gemma4_vision(said, model, patch, two_sided)
    layers = tower(width, vision.tokens, (), RmsNorm(1e-5))
    return stored_tower(vision, layers, patch, 1, UNCHANGED, filter="bicubic", projector="gemma4_bare",
                        places="axes", grid=grid, two_sided="windows" if two_sided else "", pad=pad)


def bare_of_folder(said: Said, model: Model) -> StoredTower:
    shuffle = said.tower("pooling_kernel_size", Rule(int, 1, 64), 3)
    return bare_stored(
        said, model, said.tower("mm_embed_dim", CHANNELS, 3840), said.tower("patch_size", SIDE, 16) * shuffle,
        said.tower("mm_posemb_size", Rule(int, 1, 1 << 20), 1120), *gemma4_text(said))


def bare_of_file(said: Said, model: Model) -> StoredTower:
    shuffle = said.tower("projector.scale_factor", Rule(int, 1, 64), 3)
    return bare_stored(
        said, model, said.tower("embedding_length", CHANNELS), said.tower("patch_size", SIDE) * shuffle,
        said.shapes.get("v.position_embd.weight", (2, 1))[1], True, 0)


def bare_own(tower: StoredTower, width: int) -> Shapes:
    C = tower.architecture.width
    numbers = 3 * tower.patch**2
    sizes = {"patch_norm": numbers, "patch_out_norm": C, "place_norm": C}
    places = 2, tower.grid, C
    return {"patch": (C, numbers), "patch_bias": (C,), "places": places, "project": (width, C)} | {
        f"{name}{ending}": (size,) for name, size in sizes.items() for ending in ("", "_bias")}


GEMMA4_BARE = TowerFamily(
    both({"patch": "vision_embedder.patch_dense", "patch_norm": "vision_embedder.patch_ln1",
          "patch_out_norm": "vision_embedder.patch_ln2", "place_norm": "vision_embedder.pos_norm"}) | {
        "places": ("vision_embedder.pos_embedding",),
        "project": ("embed_vision.embedding_projection.weight",)},
    both({"patch": "v.patch_embd", "patch_norm": "v.patch_norm.1", "patch_out_norm": "v.patch_norm.2",
          "place_norm": "v.patch_norm.3"}) | {
        "places": ("v.position_embd.weight",), "project": ("mm.input_projection.weight",)},
    bare_own, bare_of_folder, bare_of_file, "<|image|>", ("gemma4",), swapped=("places",),
    planar=("patch", "patch_norm", "patch_norm_bias"))

# rows of weights/towers/table.py; model_type of a folder
TOWERS: dict[str, TowerFamily] = {
    "smolvlm": IDEFICS3, "idefics3": IDEFICS3, "lfm2_vl": LFM2, "gemma3": GEMMA3,
    "gemma4": GEMMA4, "gemma4_unified": GEMMA4_BARE}
# clip.projector_type of a GGUF file
FILE_TOWERS: dict[str, TowerFamily] = {
    "idefics3": IDEFICS3, "lfm2": LFM2, "gemma3": GEMMA3, "gemma4v": GEMMA4,
    "gemma4uv": GEMMA4_BARE}
