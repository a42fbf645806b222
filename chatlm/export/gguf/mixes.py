"""Which type each tensor of a file gets: the rules of llama-quantize (src/llama-quant.cpp of llama.cpp).

A file's type, such as Q4_K_M, is a mix. Most tensors get its `main` type. Those whose loss costs a model the
most get a better one, by a rule for their kind: attn_v, ffn_down, attn_output, and the head or the embedding
that is the head too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from chatlm.common.errors import ConfigError, did_you_mean
from chatlm.worker.arrays.gguf_types import block_of

FLOATS = "F32", "F16", "BF16"


class TensorPosition(NamedTuple):
    """What a rule of a mix may look at."""

    index: int            # of this tensor among those of its kind, from 0
    count: int            # how many of its kind there are
    grouped: bool         # are there 4 or more heads for each key head?
    has_importance: bool
    experts: int = 0

    @property
    def gets_more(self) -> bool:
        """The first and the last eighth of the layers, and every third between them."""
        eighth = self.count // 8
        return (self.index < eighth or self.index >= 7 * self.count // 8
                or (self.index - eighth) % 3 == 2)

    def is_in_first(self, part: int) -> bool:
        return self.index < self.count // part

    @property
    def is_between(self) -> bool:
        """Neither in the first nor in the last eighth of the layers."""
        return self.count // 8 <= self.index < 7 * self.count // 8


Choice = Callable[[TensorPosition], str | None]  # None: the mix's main type


def never(place: TensorPosition) -> None:
    return None


def always(name: str) -> Choice:
    return lambda place: name


def where_more(name: str) -> Choice:
    return lambda place: name if place.gets_more else None


def where_grouped(name: str, otherwise: str | None = None) -> Choice:
    return lambda place: name if place.grouped else otherwise


def in_first(part: int, name: str, otherwise: str | None = None) -> Choice:
    return lambda place: name if place.is_in_first(part) else otherwise


def in_first_layers(layers: int, name: str, otherwise: str | None = None) -> Choice:
    return lambda place: name if place.index < layers else otherwise


def in_first_with(part: int, name: str) -> Choice:
    """In the first layers of a file that is made with importance."""
    return lambda place: name if place.has_importance and place.is_in_first(part) else None


def in_first_without(part: int, name: str) -> Choice:
    return lambda place: name if not place.has_importance and place.is_in_first(part) else None


def where_shared(name: str, otherwise: str) -> Choice:
    """Where few values are shared by many heads or experts."""
    return lambda place: name if place.grouped or place.experts >= 4 else otherwise


def where_between(name: str) -> Choice:
    return lambda place: name if place.is_between else None


def in_first_or_more_of_8(part: int, name: str) -> Choice:
    """In the first layers, and of 8 experts in those that get more."""
    return lambda place: (
        name if place.is_in_first(part) or place.experts == 8 and place.gets_more else None)


@dataclass(frozen=True)
class Mix:
    """The types of a file: `main`, and what replaces it for tensors of some kinds."""

    main: str
    attn_v: Choice = never        # attn_qkv and attn_kv_b too
    ffn_down: Choice = never
    attn_output: str | None = None
    of_8_experts: bool = False    # does attn_output become Q5_K in a model of 8 experts?
    embed: str | None = None      # of token_embd, if it is not the head too
    needs_importance: bool = False
    attn_qk: str | None = None    # of attn_q and attn_k
    ffn_up: Choice = never        # ffn_gate too
    head: str = "Q6_K"
    of_two_bits: bool = False     # has it llama-quantize's own rules for models of 8 experts?

    @property
    def is_quantized(self) -> bool:
        return self.main not in FLOATS


def two_bits(main: str, better: str, attn_output: str | None = None) -> Mix:
    """A file of IQ2 or IQ1. `better`: the type of the embedding, of most values and of the first feed-forward
    outputs."""
    return Mix(main, where_shared("Q4_K", better), in_first(8, better), attn_output, True, better,
               needs_importance=True, head="Q5_K", of_two_bits=True)


MIXES = {
    "F32": Mix("F32"), "F16": Mix("F16"), "BF16": Mix("BF16"),
    "Q8_0": Mix("Q8_0"),
    "Q4_0": Mix("Q4_0", ffn_down=in_first_with(8, "Q4_1")), "Q4_1": Mix("Q4_1"),
    "Q5_0": Mix("Q5_0", ffn_down=in_first_with(8, "Q5_1")), "Q5_1": Mix("Q5_1"),
    "Q2_K": Mix("Q2_K", where_grouped("Q4_K", "Q3_K"), always("Q3_K"), "Q3_K", True),
    "Q2_K_S": Mix("Q2_K", where_grouped("Q4_K"), in_first(8, "Q4_K"), needs_importance=True),
    "Q3_K_S": Mix("Q3_K", of_8_experts=True),
    "Q3_K_M": Mix("Q3_K", in_first_layers(2, "Q5_K", "Q4_K"), in_first(16, "Q5_K", "Q4_K"), "Q4_K", True),
    "Q3_K_L": Mix("Q3_K", always("Q5_K"), always("Q5_K"), "Q5_K"),
    "Q4_K_S": Mix("Q4_K", in_first_layers(4, "Q5_K"), in_first(8, "Q5_K"), of_8_experts=True),
    "Q4_K_M": Mix("Q4_K", where_more("Q6_K"), where_more("Q6_K"), of_8_experts=True),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", where_more("Q6_K"), where_more("Q6_K")),
    "Q6_K": Mix("Q6_K"),
    "IQ4_NL": Mix("IQ4_NL", where_grouped("Q5_K"), in_first_without(8, "Q5_K"), of_8_experts=True),
    "IQ4_XS": Mix("IQ4_XS", where_grouped("Q5_K"), in_first_without(8, "Q5_K"), of_8_experts=True),
    "IQ3_M": Mix("IQ3_S", always("Q4_K"), in_first_or_more_of_8(8, "Q4_K"), "Q4_K", True),
    "IQ3_S": Mix("IQ3_S", where_grouped("Q4_K"), of_8_experts=True),
    "IQ3_XS": Mix("IQ3_S", where_grouped("Q4_K"), of_8_experts=True, needs_importance=True,
                  attn_qk="IQ3_XXS", ffn_up=where_between("IQ3_XXS")),
    "IQ3_XXS": Mix("IQ3_XXS", where_grouped("Q4_K"), attn_output="IQ3_S", of_8_experts=True,
                   embed="IQ3_S", needs_importance=True, attn_qk="IQ2_S", head="Q5_K"),
    "IQ2_M": two_bits("IQ2_S", "IQ3_S", "IQ3_S"), "IQ2_S": two_bits("IQ2_XS", "IQ3_S", "IQ3_S"),
    "IQ2_XS": two_bits("IQ2_XS", "Q2_K"), "IQ2_XXS": two_bits("IQ2_XXS", "Q2_K"),
    "IQ1_M": two_bits("IQ1_M", "Q2_K", "IQ2_XXS"), "IQ1_S": two_bits("IQ1_S", "Q2_K", "IQ2_XXS"),
    "TQ1_0": Mix("TQ1_0", embed="Q4_K"), "TQ2_0": Mix("TQ2_0", embed="Q4_K"),
    "MXFP4_MOE": Mix("MXFP4"),
}
OTHER_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
SMALLER_BLOCKS = {  # a type of 256 weights a block -> what rows of another length get
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
    "Q6_K": "Q8_0"}
# types that are no use without importance
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")

# matrices that are small, or are never multiplied: they stay as they are
LEFT_ALONE = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight|time_mix_(first|w[0-2]|v[0-2]|a[0-2]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|(^|\.)(ve_gate|smear_gate)\.weight$")
EMBEDDINGS = "token_embd.weight", "per_layer_token_embd.weight"
VALUE_EMBEDDING = re.compile(r"value_embd\.weight$")  # nanochat's: rows that are looked up


def mix_of(name: str) -> tuple[str, Mix]:
    """(the type's full name, its mix). ConfigError for a type that cannot be written."""
    full = name.upper()
    full = OTHER_NAMES.get(full, full)
    if full in MIXES:
        return full, MIXES[full]
    allowed = ", ".join(MIXES)
    raise ConfigError(f"--type {name} is no type of file{did_you_mean(full, MIXES)}; allowed are {allowed}")


class ModelShape(NamedTuple):
    """What a mix looks at in a model."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def is_grouped(self) -> bool:
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4

    @property
    def has_small_values(self) -> bool:
        """Llama 2 70B and its like have few values, for which llama-quantize takes more bits."""
        return self.architecture == "llama" and self.layers == 80 and self.heads != self.kv_heads


class TensorInfo(NamedTuple):
    """A tensor that a mix gives a type."""

    name: str
    sizes: tuple[int, ...]  # columns first
    kind: str               # the type it has now


@dataclass(frozen=True)
class TypeRules:
    """Gives each tensor of a model its type."""

    mix: Mix
    shape: ModelShape
    has_importance: bool

    def types_of(self, matrices: Iterable[TensorInfo]) -> dict[str, str]:
        """The type of each tensor by its name."""
        matrices = sorted(matrices, key=lambda matrix: order_of(matrix.name))
        names = {matrix.name for matrix in matrices}
        tied = "output.weight" not in names
        of_kinds = {}
        for matrix in matrices:
            if is_quantizable(matrix):
                of_kinds.setdefault(kind_of(matrix.name), []).append(matrix.name)
        types = {}
        for matrix in matrices:
            if not is_quantizable(matrix):
                types[matrix.name] = matrix.kind
            elif not self.mix.is_quantized:
                types[matrix.name] = self.mix.main
            else:
                wanted = self._wanted(matrix, of_kinds, tied)
                types[matrix.name] = fitting(wanted, matrix.sizes[0])
        return types

    def _wanted(self, matrix: TensorInfo, of_kinds: Mapping[str, list[str]], tied: bool) -> str:
        """The type by the rule for the tensor's kind, whether or not its blocks divide the rows. of_kinds:
        the names of the matrices of each kind."""
        main = self.mix.main
        kind = kind_of(matrix.name)
        if kind == "head" or tied and kind == "embed":
            return self._of_head(matrix)
        if main == "MXFP4":
            return "MXFP4" if len(matrix.sizes) > 2 else "Q8_0"
        if kind == "embed":
            return self.mix.embed or main
        if kind == "attn_v":
            return self._of_values(matrix, of_kinds[kind])
        if kind == "attn_k" and self.shape.experts == 8:
            return "Q4_K" if self.mix.of_two_bits else "Q8_0"
        if kind in ("attn_q", "attn_k"):
            return self.mix.attn_qk or main
        if kind in ("ffn_down", "ffn_gate", "ffn_up"):
            place = self._place(of_kinds[kind].index(matrix.name), self.shape.layers)
            if self.shape.experts > 1 and not self.mix.of_two_bits:
                place = place._replace(index=order_of(matrix.name)[0])
            choice = self.mix.ffn_down if kind == "ffn_down" else self.mix.ffn_up
            return choice(place) or main
        if kind == "attn_output":
            if self.shape.experts == 8:
                return "Q5_K" if self.mix.of_8_experts else main
            return self.mix.attn_output or main
        if VALUE_EMBEDDING.search(matrix.name):
            return "Q8_0"
        return main

    def _of_head(self, matrix: TensorInfo) -> str:
        main = self.mix.main
        if main == "MXFP4" or matrix.sizes[0] % block_of(main)[0]:
            return "Q8_0"
        return main if main == "Q8_0" else self.mix.head

    def _of_values(self, matrix: TensorInfo, values: list[str]) -> str:
        chosen = self.mix.attn_v(self._place(values.index(matrix.name), len(values))) or self.mix.main
        if self.mix.of_two_bits:
            return chosen
        if self.shape.has_small_values and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.shape.experts == 8 else chosen

    def _place(self, index: int, count: int) -> TensorPosition:
        return TensorPosition(index, count, self.shape.is_grouped, self.has_importance, self.shape.experts)


def kind_of(name: str) -> str:
    """The kind of a tensor, as far as a mix distinguishes them."""
    if name == "output.weight":
        return "head"
    if name in EMBEDDINGS:
        return "embed"
    if name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")):
        return "attn_v"
    for kind in ("attn_q", "attn_k", "attn_output"):
        if name.endswith(f"{kind}.weight"):
            return kind
    return next((kind for kind in ("ffn_down", "ffn_gate", "ffn_up") if kind in name), "other")


def order_of(name: str) -> tuple[int, str]:
    """The order in which llama-quantize counts tensors: by layer, what belongs to none first."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1), name


def is_quantizable(matrix: TensorInfo) -> bool:
    """Is this a matrix of weights, large enough that its type matters?"""
    is_matrix = sum(size > 1 for size in matrix.sizes[1:]) > 0
    return is_matrix and matrix.name.endswith("weight") and not LEFT_ALONE.search(matrix.name)


def fitting(kind: str, columns: int) -> str:
    """The type itself, or the nearest one whose blocks divide a row."""
    if columns % block_of(kind)[0] == 0:
        return kind
    smaller = SMALLER_BLOCKS.get(kind, kind)
    return smaller if columns % block_of(smaller)[0] == 0 else "F16"
