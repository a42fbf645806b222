"""Builds our tensors from those of a file: safetensors, FP8, MXFP4, packed blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, require_library, shown
from chatlm.worker.arrays.gguf_types import TYPES, block_of
from chatlm.worker.arrays.kinds import FLOATS, as_kind, contiguous, floats, item_bytes, joined, kind_of
from chatlm.worker.arrays.packed import RopePairs, dequantized
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.mixers import DeltaRule, Mixer
from chatlm.worker.model.tensors import TILE_ROWS, Cut, MappedRows, Unread
from chatlm.worker.weights.files import weight_files
from chatlm.worker.weights.finite import refuse_faults
from chatlm.worker.weights.model_of import model_of
from chatlm.worker.weights.packed_layouts import NotExact, PackedWeight
from chatlm.worker.weights.quantization import check_quantization, ct_groups, join_packed
from chatlm.worker.weights.rules import MOST_CHANNELS, Rule, checked
from chatlm.worker.weights.safetensors_file import read_safetensors_file

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.model.blocks.step import Block
    from chatlm.worker.weights.recipe import ModelSpec


def check_names_and_shapes(path: Path, state: Mapping[str, tuple], sources: Sources):
    expected = file_shapes(sources)
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in state]
    problems += [f"unknown {name} {state[name]}" for name in state if name not in expected]
    problems += [f"{name} is {state[name]} instead of {expected[name]}"
                 for name in expected if name in state and state[name] != expected[name]]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ConfigError(f"{path}: the tensors do not match this model: {'; '.join(problems[:20])}{more}")


Sources = dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]]]]


def file_shapes(sources: Sources) -> dict[str, tuple[int, ...]]:
    return {name: shape for _, theirs in sources.values() for name, shape in theirs.items()}


def tensor_sources(spec: ModelSpec, table: Mapping[str, tuple[str, ...]], padded: int) -> Sources:
    """Our tensor -> (its shape, {the file's tensors whose rows it is made of: their shapes}).

    The file's vocabulary tensors have `padded` rows. Experts have either a tensor each, where a second {} in
    the name in `table` stands for the expert, or one tensor for all (experts, rows of each, ...)."""
    E = spec.experts
    vocabulary = (padded,)
    model = model_of(spec)
    split: dict[str, tuple[int, ...]] = {
        name: vocabulary for name in ("embed", "head", "value_embed", "layer_embed")}
    sources = {}
    for ours, shape in model.shapes().items():
        layer, _, part = ours.rpartition(".")
        if not (part == "head" and spec.tied_head):
            theirs = table.get(part, (part,))
            rows = split.get(part, shape[:1])
            if part in ("qkv", "qkv_bias"):  # a layer may have no k or v of its own
                rows = qkv_rows(model.layers[int(layer)].mixer)
                theirs = theirs[:len(rows)]
            mixer = model.layers[int(layer)].mixer if layer else None
            if part in ("gate_up", "gate_up_bias", "shared_gate_up"):
                rows = (shape[0] // 2,) * 2
            if isinstance(mixer, DeltaRule) and part == "mix_in":
                rows = mixer.rows
            if part.startswith("expert_"):
                all_of_one = E, shape[0] // E // len(theirs), *shape[1:]
                sources[ours] = shape, {
                    name.format(layer, expert): all_of_one[1:] if name.count("{}") > 1 else all_of_one
                    for name in theirs for expert in range(E)}
                continue
            if part in ("positions", "types"):
                sources[ours] = shape, {theirs[0]: (shape[0] // spec.width, spec.width)}
                continue
            if part == "buckets":
                sources[ours] = shape, {theirs[0]: (shape[0] // spec.heads, spec.heads)}
                continue
            if part == "taps":  # flattened, since no product uses it as a matrix
                assert isinstance(mixer, Mixer)
                size = mixer.size
                sources[ours] = shape, {theirs[0].format(layer): (shape[0] // size, size)}
                continue
            rows = rows if len(rows) == len(theirs) else shape[:1]  # phi3 has one tensor for all
            sources[ours] = shape, {name.format(layer): (count, *shape[1:])
                                    for name, count in zip(theirs, rows)}
    return sources


def qkv_rows(attention: Block | None) -> tuple[int, ...]:
    """The rows of q, with its gates, k and v, as far as the layer has them."""
    assert isinstance(attention, Attention)
    q, *kv = attention.runs
    return q.length * (1 + attention.gated), *(run.length for run in kv)


# not part of the text model
IMAGES = ("vision_tower|vision_model|vision_embedder|visual|multi_modal_projector|connector|image_newline"
          "|embed_vision|audio_tower|embed_audio")

# rotary frequencies, causal masks and positions in old files
UNREAD = r".*\.rotary_emb\.|.*\.(attn|attention)\.(masked_)?bias$|.*\bposition_ids$"


def layers_without_keys(spec: ModelSpec) -> dict[int, Attention]:
    """How layers attend that read the keys and values of another layer, by their numbers."""
    return {layer: attn for layer, attn in enumerate(model_of(spec).by_layer)
            if isinstance(attn, Attention) and attn.source is not None}


def without_shared(spec: ModelSpec, state: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors without the keys and values that some files have for layers that read another's."""
    layers = {str(l) for l in layers_without_keys(spec)}
    return {name: tensor for name, tensor in state.items() if not layers or not (
        match := re.match(r"(?:model\.layers|blk)\.(\d+)\.(?:self_attn\.|attn_)[kv](?:_proj|_norm)?\.", name))
        or match[1] not in layers}


def unread_keys(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face's key and value matrices of layers that read another's; an adapter may contain them."""
    return {f"model.layers.{l}.self_attn.{part}_proj.weight": (attn.kv_heads * size, spec.width)
            for l, attn in layers_without_keys(spec).items()
            for part, size in (("k", attn.head_size), ("v", attn.value_size))}


# scales for keys and values that others keep in FP8; here pages have types of their own
KV_SCALES = (r".*\.(([qkv]|kv|prob)(_cache)?(_global)?_(scale|zero_point)(_inv)?"
             r"|[kv]_proj\.output_(scale|zero_point))$")


class Mxfp4:
    """A safetensors file's experts (experts, rows, columns) presented as a GGUF tensor of type MXFP4.

    `blocks` (experts, rows, columns / 32, 16) holds the codes of two adjacent columns in each byte, where
    GGUF has columns i and i + 16; `scales` (experts, rows, columns / 32) are exponents + 127."""

    tensor_type = SimpleNamespace(name="MXFP4")

    def __init__(self, blocks: numpy.ndarray, scales: numpy.ndarray):
        self.blocks = blocks
        self.scales = scales
        self.shape = *scales.shape[:2], 32 * scales.shape[2]

    def __getitem__(self, index) -> Mxfp4:
        return Mxfp4(self.blocks[index], self.scales[index])

    @property
    def data(self) -> numpy.ndarray:
        """(experts * rows, columns / 32 * 17) uint8: for each block its scale, then the codes."""
        made: Any = numpy.empty((*self.scales.shape, 17), numpy.uint8)
        made[..., 0] = self.scales
        for blocks, to in zip(self.blocks, made):  # one expert at a time avoids large temporaries
            # columns 0 to 15, 16 to 31
            first = blocks[..., :8]
            second = blocks[..., 8:]
            to[..., 1::2] = first & 15 | second << 4
            to[..., 2::2] = first >> 4 | second & 240
        return made.reshape(-1, made.shape[2] * 17)


def read_safetensors(folder: Path) -> tuple[dict[str, numpy.ndarray], dict[str, numpy.ndarray]]:
    """A folder's tensors, mapped from its files, and the scales of those in FP8. Skips image encoders."""
    state = {}
    for path in weight_files(folder):
        state |= read_safetensors_file(path)
    state = join_packed(folder, state)
    # image models prefix the text model's names
    state = {re.sub(r"(language|text)_model\.", "", name, count=1): tensor for name, tensor in state.items()
             if not re.match(rf"(model\.)?({IMAGES})\b|{UNREAD}|{KV_SCALES}", name)}
    scales = {name: state.pop(of) for name in list(state) for of in (f"{name}_scale_inv", f"{name}_scale")
              if name in state and kind_of(state[name]) in FP8 and of in state}  # scales may be FP8 too
    for name, tensor in list(state.items()):
        if isinstance(tensor, PackedWeight):
            continue
        kind = kind_of(tensor)
        mxfp4 = kind == "uint8" and name.endswith(("_blocks", "_scales"))
        if scales and re.search(r"\.(input|output|[kqv])_scale(_inv)?$", name):
            del state[name]  # for activations and cached keys and values, whose types differ here
        elif not (kind in FLOATS or mxfp4 or name in scales):
            raise ConfigError(f"{folder}: {shown(name)} is of type {kind}; it must be float32, float16 or "
                              "bfloat16, or FP8 with a tensor of scales")
    return state, scales


def assembled(path: Path, settings: Settings, sources: Sources, state: Mapping, dtype: str,
              changed: Callable[[str, Any], Any] = lambda name, tensor: tensor,
              as_stored: Callable | None = None,
              kept: Callable[[str, numpy.ndarray], numpy.ndarray] = lambda name, blocks: blocks) -> dict[
                  str, Unread | MappedRows]:
    """Our tensors, yet to be read from rows of the file's, each passed through `changed`: matrices as
    `dtype`, vectors as float32.

    `as_stored`, if given, builds those with packed weights; `kept` orders the rows of a PackedWeight, or
    raises NotExact if it must become floats."""
    def read(target: str, theirs: Iterable[str], cut: Cut):
        stacked = (changed(name, state[name]) for name in theirs)
        stacked = (tensor.reshape(-1, *tensor.shape[tensor.ndim - len(cut.shape) + 1:]) for tensor in stacked)
        # a vocabulary's padding is dropped
        rows = tuple(as_kind(contiguous(part), target) for _, part in cut.apply(stacked))
        return rows if len(cut.shape) > 1 and cut == Cut.whole(cut.full) else joined(rows)

    def read_packed(theirs: Iterable[str], cut: Cut):
        make = as_stored or partial(dequantized, kind=dtype)
        return make(cut.shape, cut_stored([(state[name], None) for name in theirs], cut))

    def read_tiles(make: Callable, theirs: Iterable[str], cut: Cut):
        """Packed matrices as tiles hold them, or as floats where one does not fit or the cut divides one's
        blocks."""
        try:
            stored = [state[name].as_blocks(partial(kept, name)) for name in theirs]
            edges = {edge for span in cut.ranges for edge in (span.start, span.stop)} if cut.axis else {0}
            if any(edge % packed_together(tensor) for tensor in stored for edge in edges):
                raise NotExact
        except NotExact:
            return read(dtype, theirs, cut)
        return make(cut.shape, cut_stored([(tensor, None) for tensor in stored], cut))

    def unread(shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]]) -> Unread:
        parts = [state[name] for name in theirs]
        target = "float32" if len(shape) == 1 else dtype
        size = math.prod(shape) * item_bytes(target)
        whole = Cut.whole(shape)
        packed = isinstance(parts[0], Mxfp4)
        make = read_packed if packed else partial(read, target)
        mapped = tuple(parts)
        if packed:
            mapped = tuple(tensor for part in parts for tensor in (part.blocks, part.scales))
            size = math.prod(shape) * 17 // 32 if as_stored else size
        if any(isinstance(part, PackedWeight) for part in parts):
            mapped = tuple(tensor for part in parts for tensor in (
                part.layout.mapped if isinstance(part, PackedWeight) else (part,)))
            if as_stored and (held := tile_bytes(parts)):
                make = partial(read_tiles, as_stored)
                size = held
        check = partial(refuse_faults, path, settings, theirs, make)
        return Unread(whole, partial(make, theirs), size, mapped, check, (make, theirs))

    def rows_of(name: str) -> MappedRows:
        if isinstance(state[name], PackedWeight):
            raise ConfigError(f"{path}: {name} is packed; it must be float32, float16 or bfloat16, because "
                              "its rows are read from the file")
        return mapped_rows(state[name])

    return {ours: rows_of(next(iter(source[1]))) if ours == "layer_embed" else unread(*source)
            for ours, source in sources.items()}


def tile_bytes(parts: Seq[Any]) -> int:
    """What packed matrices take that form one, as tiles; 0 if they do not go together, or into none."""
    kinds = {getattr(getattr(part, "layout", None), "kind", "") for part in parts}
    row = 0
    for part in parts[:-1] if len(kinds) > 1 else ():
        row += len(part)
        if row % TILE_ROWS:  # the next one begins within a tile, which has one type
            return 0
    return 0 if "" in kinds else sum(
        part.shape[0] * part.shape[1] // columns * size
        for part in parts for columns, size in (block_of(part.layout.kind),))


def mapped_rows(table: numpy.ndarray) -> MappedRows:
    return MappedRows(table, {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[kind_of(table)])


FP8 = "float8_e4m3fn", "float8_e5m2"


def fp8_block(path: Path, config: Mapping) -> list[int]:
    """The rows and columns that share a scale in FP8 weights that are scaled by blocks. ConfigError if
    config.json specifies a quantization that is not read."""
    if (found := check_quantization(path, config)) is None:
        return [128, 128]
    blocks = [group.weights.get("block_structure") for group in ct_groups(found)]
    block = found.stated.get("weight_block_size") or next(filter(None, blocks), [128, 128])
    return checked(found.path, f"{found.key}.weight_block_size", block,
                   Rule(int, 1, MOST_CHANNELS, many=True), 2)


def unscaled(path: Path, scales: Mapping[str, numpy.ndarray], block: Seq[int], name: str,
             weight: numpy.ndarray) -> numpy.ndarray:
    """FP8 weights (N, K) times their scales: one for all, one for each row, or one for each block. A vector
    (N,) has one for all, or one for each value."""
    values = floats(weight)
    scale = floats(scales[name])
    if scale.size == 1:
        return values * scale.reshape(())
    if weight.ndim == 1 and scale.shape == weight.shape:
        return values * scale
    if weight.ndim != 2:
        raise ConfigError(f"{path.parent}: the scales of {name} {tuple(weight.shape)} are "
                          f"{tuple(scale.shape)}; there must be 1")
    N, K = weight.shape
    if scale.shape in ((N,), (N, 1)):
        return values * scale.reshape(N, 1)
    if scale.shape != (-(-N // block[0]), -(-K // block[1])):
        raise ConfigError(f"{path.parent}: the scales of {name} {(N, K)} are {tuple(scale.shape)}; there "
                          f"must be 1, one for each row, or one for each block of {block[0]} x {block[1]}")
    for first in range(0, N, block[0]):  # in place, band by band, to avoid a second float32 matrix
        band = scale[first // block[0]].repeat(block[1])[:K]
        values[first:first + block[0]] *= band
    return values


def as_rows(tensor, shape: tuple[int, ...]):
    """A gguf_header.Tensor as rows of a tensor of this shape; the experts' matrices become one."""
    data = tensor.data.reshape(-1, *tensor.data.shape[-1:] * (len(shape) - 1))
    return SimpleNamespace(tensor_type=tensor.tensor_type, data=data)


def cut_stored(parts: Seq[tuple[Any, RopePairs | None]], cut: Cut) -> list[tuple[Any, RopePairs | None]]:
    """Cut parts, each (gguf_header.Tensor, pairs to unpermute or None). Those whose blocks the cut divides
    become Q8_0 or floats."""
    if cut == Cut.whole(cut.full):
        return list(parts)
    edges = {edge for span in cut.ranges for edge in (span.start, span.stop)}
    if cut.axis and any(edge % packed_together(tensor) for tensor, _ in parts for edge in edges):
        whole = (dequantized((len(part[0].data), cut.full[1]), [part], "float32") for part in parts)
        gguf = require_library("gguf", "packed weights")
        gguf_type = TYPES["F32" if cut.shape[1] % 32 else "Q8_0"]
        return [(SimpleNamespace(tensor_type=gguf_type, data=gguf.quantize(
            contiguous(rows), gguf_type)), None) for _, rows in cut.apply(whole)]
    return [(SimpleNamespace(tensor_type=parts[i][0].tensor_type, data=numpy.ascontiguousarray(data)),
             parts[i][1]) for i, data in cut.apply(tensor.data for tensor, _ in parts)]


def packed_together(tensor) -> int:
    return block_of(tensor.tensor_type.name)[0]
