"""Zeros where decode_core needs multiples of 16 and a model has other sizes.

A head of D numbers becomes one of D', the next multiple of 16. The additional rows of q, k and v
are zeros, and so are the columns of the output matrix that read them: all scores and sums stay what
they were. Only what divides by D must be told: the scores, in `q_scale`, and the norms of q and k,
in their eps and weights. A feed-forward part gets rows of zeros in its first matrix and columns of
zeros in its second. A residual stream of C numbers ends with zeros, because whatever is added to it
does; its RMS norms are told as those of heads are, and LayerNorms count (`Transformer.counted`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.errors import require_library
from chatlm.worker.arrays.kinds import AdapterMatrix, as_kind, bits_of, joined, kind_of, zeros
from chatlm.worker.arrays.gguf_types import TYPES
from chatlm.worker.arrays.packed import dequantized
from chatlm.worker.model.spec import ShortConv, expected_tensors
from chatlm.worker.model.tensors import TILE_ROWS, Cut, Unread

if TYPE_CHECKING:
    from chatlm.worker.model.spec import Attention, ModelSpec


def rounded_up(size: int) -> int:
    return -(-size // TILE_ROWS) * TILE_ROWS


def padded_spec(spec: ModelSpec) -> ModelSpec:
    """The spec of the padded model; an equal one if nothing has to be padded, or nothing can be."""
    return with_padded_heads(with_padded_width(spec))


def with_padded_width(spec: ModelSpec) -> ModelSpec:
    """With a width that is a multiple of 16, unless a norm without weights would see the zeros."""
    C, wide = spec.width, rounded_up(spec.width)
    if C == wide or not spec.norm_weights or spec.embedding_norm:
        return spec
    mixers = tuple(replace(mixer, channels=rounded_up(mixer.channels or C))
                   if isinstance(mixer, ShortConv) else None for mixer in spec.mixers)
    if [*map(bool, mixers)] != [*map(bool, spec.mixers)]:  # the norms of other mixers have the same eps
        return spec
    return replace(spec, width=wide, mixers=mixers, qk_norm_eps=spec.head_eps,
                   norm_eps=spec.norm_eps * (1 if spec.layer_norms else C / wide))


def with_padded_heads(spec: ModelSpec) -> ModelSpec:
    """With heads and feed-forward parts of multiples of 16; heads only if one eps serves all their norms."""
    own = replace(spec, attentions=tuple(map(padded_attention, spec.attentions)), **{
        name: rounded_up(getattr(spec, name)) for name in ("ffn_size", "dense_size", "shared_size")})
    attentions = [attn for attn in spec.by_layer if attn]
    parts = {attn.head_size / rounded_up(attn.head_size) for attn in attentions}
    mixed = len(parts) > 1 and spec.qk_norm != "none"
    if parts <= {1.0} or mixed or any(attn.value_norm for attn in attentions):  # these norms have no weights
        return replace(own, attentions=spec.attentions)
    if not spec.attentions:
        head = padded_attention(spec.attention(0))
        own = replace(own, head_size=head.head_size, rope_size=head.rope_size, q_scale=head.q_scale)
    if spec.qk_norm == "none":
        return own
    (part,) = parts
    return replace(own, qk_norm_eps=part * spec.head_eps,
                   qk_scale=spec.qk_scale * (1 if spec.qk_norm_weights else math.sqrt(part)))


def padded_attention(attn: Attention) -> Attention:
    D, wide = attn.head_size, rounded_up(attn.head_size)
    if D == wide:
        return attn
    return replace(attn, head_size=wide, q_scale=attn.q_scale * math.sqrt(wide / D),
                   own_value_size=attn.own_value_size and rounded_up(attn.own_value_size),
                   rope_size=D if attn.rope_size is None else attn.rope_size)


class Padding(NamedTuple):
    """Where the numbers of a tensor go in the padded one, along each axis; None: where they were."""

    shape: tuple[int, ...]   # of the padded tensor
    places: tuple[numpy.ndarray | None, ...]
    factor: float = 1.0      # of a norm's weights

    def spread(self, array: numpy.ndarray, axis: int) -> numpy.ndarray:
        """An array with zeros between its numbers along one axis."""
        if (places := self.places[axis]) is None:
            return array
        made = zeros((*array.shape[:axis], self.shape[axis], *array.shape[axis + 1:]), kind_of(array))
        bits_of(made)[(slice(None),) * axis + (places,)] = bits_of(array)
        return made

    def apply(self, read: Any) -> Any:
        """What a tensor's `read` returned: an array, several that form its rows, or packed blocks."""
        if hasattr(read, "parts"):
            return self.of_blocks(read)
        array = joined(read) if isinstance(read, tuple) else read
        for axis in range(array.ndim):
            array = self.spread(array, axis)
        return array if self.factor == 1 else array * numpy.float32(self.factor)

    def of_blocks(self, matrix: Any) -> Any:
        """A QuantizedMatrix of decode_core; if columns move, it becomes Q8_0, or floats if no block fits."""
        parts, rows, columns = matrix.parts, self.places[0], self.places[1]
        if columns is not None:
            gguf = require_library("gguf", "packed weights")
            blocks = [(SimpleNamespace(tensor_type=TYPES[kind.upper()], data=data), None)
                      for kind, data in parts]
            values = self.spread(dequantized(matrix.shape, blocks, "float32"), 1)
            if self.shape[1] % 32:
                return self.spread(as_kind(values, "bfloat16"), 0)
            parts = (("q8_0", gguf.quantize(values, TYPES["Q8_0"])),)
        if rows is not None:
            wide = self.rows_of_blocks([data for _, data in parts], rows)
            parts = tuple((kind, data) for (kind, _), data in zip(parts, wide))
        return type(matrix)(parts, self.shape[1])

    def rows_of_blocks(self, parts: list[numpy.ndarray], rows: numpy.ndarray) -> list[numpy.ndarray]:
        """Each part with rows of zeros after its own; zero bytes are a block of zeros in every type."""
        done, made = 0, []
        for data in parts:
            first = int(rows[done]) if done else 0
            end = int(rows[done + len(data)]) if done + len(data) < len(rows) else self.shape[0]
            wide = numpy.zeros((end - first, data.shape[1]), data.dtype)
            wide[rows[done:done + len(data)] - first] = data
            made.append(wide)
            done += len(data)
        return made


def paddings(spec: ModelSpec) -> dict[str, Padding]:
    """The tensors that padding changes, by name."""
    own, found = padded_spec(spec), {}
    shapes = expected_tensors(own)
    for name, shape in expected_tensors(spec).items():
        factor, part = 1.0, name.rpartition(".")[2]
        of_heads = part in ("q_norm", "k_norm")
        if of_heads and not spec.qk_norm_sizes or not of_heads and part.endswith("norm") and not (
                spec.layer_norms or part == "router_norm"):  # which is divided by sqrt(C)
            factor = math.sqrt(shape[0] / shapes[name][0])
        if shapes[name] != shape:
            places = tuple(None if old == new else places_of(spec, name, axis, old, new)
                           for axis, (old, new) in enumerate(zip(shape, shapes[name])))
            found[name] = Padding(shapes[name], places, factor)
    return found


def places_of(spec: ModelSpec, name: str, axis: int, old: int, new: int) -> numpy.ndarray:
    """Where the `old` numbers along an axis of a tensor go among `new` ones."""
    layer, _, part = name.rpartition(".")
    part, D = part.removesuffix("_bias"), spec.attention(int(layer or 0)).head_size
    runs = {("qkv", 0): old // D, ("output", 1): old // D, ("value_embed", 1): old // D,
            ("q_norm", 0): old // D, ("k_norm", 0): old // D, ("gate_up", 0): 2, ("shared_gate_up", 0): 2,
            ("expert_gate_up", 0): 2 * spec.experts, ("expert_up", 0): spec.experts,
            ("expert_down", 0): spec.experts,
            ("mix_in", 0): 3, ("positions", 0): spec.positions,
            ("types", 0): spec.token_types}.get((part, axis), 1)  # of equal length
    return (numpy.arange(runs)[:, None] * (new // runs) + numpy.arange(old // runs)).ravel()


def padded_tensors(spec: ModelSpec, tensors: dict) -> dict:
    """The padded model's tensors; those not yet read are padded when they are read. Empties `tensors`."""
    found = {}
    for name, padding in paddings(spec).items():
        if name in tensors:
            tensor = tensors.pop(name)
            found[name] = (padded_unread(tensor, padding) if isinstance(tensor, Unread) else
                           padding.apply(tensor))
    found |= tensors
    tensors.clear()
    return found


def padded_unread(tensor: Unread, padding: Padding) -> Unread:
    size = tensor.nbytes * math.prod(padding.shape) // math.prod(tensor.cut.shape)
    return Unread(Cut.whole(padding.shape), lambda cut: padding.apply(tensor.read()), size, (),
                  lambda cut, read, packed: tensor.refuse_faults(tensor.read(), packed))


def padded_adapter(spec: ModelSpec, matrices: Mapping[str, AdapterMatrix]) -> dict[str, AdapterMatrix]:
    """What an adapter adds to the products of the padded model; both are named after what they change."""
    found = paddings(spec)
    return {name: matrix if name not in found else padded_matrix(matrix, found[name])
            for name, matrix in matrices.items()}


def padded_matrix(matrix: AdapterMatrix, padding: Padding) -> AdapterMatrix:
    (a, b, scales), (rows, columns) = matrix, padding.shape
    return AdapterMatrix(padding._replace(shape=(len(a), columns)).spread(a, 1),
                         padding._replace(shape=(rows, b.shape[1])).spread(b, 0), scales)
