"""How packed safetensors store a matrix: its values in numpy, and its rows as blocks of a type of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import numpy

from chatlm.worker.arrays.gguf_types import TYPES, block_of
from chatlm.worker.arrays.kinds import as_kind, bits_of, contiguous, empty, floats, kind_of
from chatlm.worker.arrays.packed import MXFP4_DOUBLED, joined_nibbles, powers_of_two

CODES_AT_ONCE = 1 << 21  # of a matrix, so that what is made of them on the way takes some megabytes


class NotExact(Exception):
    """The matrix' numbers do not fit its type of tiles, so it is multiplied out."""


class PackedLayout(Protocol):
    """A matrix (N, K) as a format stores it. `kind`: the type of tiles that holds its numbers, or "".
    `mapped`: the file's tensors."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def kind(self) -> str: ...

    @property
    def mapped(self) -> tuple[numpy.ndarray, ...]: ...

    def values(self, begin: int, end: int) -> numpy.ndarray:
        """Rows [begin, end) as float32, by the format's own arithmetic."""
        ...

    def blocks(self, begin: int, end: int) -> numpy.ndarray:
        """The same rows as blocks of `kind`, (n, bytes of a row) uint8. NotExact if they do not fit."""
        ...


class PackedWeight:
    """Some rows of a packed matrix, in place of an array (N, K). Its values are made when they are needed."""

    ndim = 2
    kind = "packed"

    def __init__(self, layout: PackedLayout, title: str, rows: range | None = None):
        # the format's
        self.layout = layout
        self.title = title
        self.rows = range(layout.shape[0]) if rows is None else rows

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.layout.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> PackedWeight:
        """Some adjacent rows, as families need that split fused matrices."""
        [rows] = index if isinstance(index, tuple) else (index,)
        assert rows.step in (None, 1)
        return PackedWeight(self.layout, self.title, self.rows[rows])

    def chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """(first row here, last, first row in the layout, last) of some rows at a time, in whole eights."""
        step = max(64, CODES_AT_ONCE // self.shape[1] // 64 * 64)
        for begin in range(0, len(self.rows), step):
            part = self.rows[begin:begin + step]
            yield begin, begin + len(part), part.start, part.stop

    def values(self, kind: str) -> numpy.ndarray:
        """Its values (N, K), rounded once to a type of floats."""
        made = empty(self.shape, kind)
        for begin, end, first, last in self.chunks():
            bits_of(made)[begin:end] = bits_of(as_kind(self.layout.values(first, last), kind))
        return made

    def blocks(self) -> numpy.ndarray:
        columns, size = block_of(self.layout.kind)
        made = numpy.empty((len(self.rows), self.shape[1] // columns * size), numpy.uint8)
        for begin, end, first, last in self.chunks():
            made[begin:end] = self.layout.blocks(first, last)
        return made

    def as_blocks(self, ordered: Callable[[numpy.ndarray], numpy.ndarray]) -> Any:
        """Like a gguf.header.GgufTensor of its type of tiles, with its rows `ordered`."""
        return SimpleNamespace(tensor_type=TYPES[self.layout.kind], data=ordered(self.blocks()))


def unpacked(words: numpy.ndarray, bits: int, count: int, begin: int = 0,
             end: int | None = None) -> numpy.ndarray:
    """Codes [begin, end) of the `count` in each row of 32-bit words (n, W), as (n, end - begin) uint8.

    The words are a little-endian stream, or, in older files, each has as many whole codes as fit."""
    end = count if end is None else end
    stream = words.shape[1] == -(-count * bits // 32)
    each, width = (32, bits) if stream else (32 // bits, 1)  # codes, and the words that they fill
    first = begin // each * each
    words = contiguous(words[:, first // each * width:-(-end // each) * width])
    packed = words.view(numpy.uint8).reshape(len(words), -1)
    if 8 % bits == 0:
        codes = numpy.empty((*packed.shape, 8 // bits), numpy.uint8)
        for i in range(8 // bits):
            numpy.right_shift(packed, bits * i, out=codes[..., i])
        codes &= (1 << bits) - 1
    elif stream:
        codes = numpy.unpackbits(packed, axis=1, bitorder="little")
        codes = codes[:, :codes.shape[1] // bits * bits].reshape(len(words), -1, bits) @ (
            1 << numpy.arange(bits)).astype(numpy.uint8)
    else:
        shifts = (bits * numpy.arange(each)).astype(numpy.uint32)
        codes = (words.view(numpy.uint32)[..., None] >> shifts & ((1 << bits) - 1)).astype(numpy.uint8)
    return codes.reshape(len(words), -1)[:, begin - first:end - first]


def word_counts(codes: int, bits: int) -> set[int]:
    """How many words may hold so many codes: as a stream, or with whole codes in each word."""
    return {-(-codes * bits // 32), -(-codes // (32 // bits))}


AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of a word


def awq_codes(words: numpy.ndarray, begin: int, end: int) -> numpy.ndarray:
    """Columns [begin, end) of the codes in AWQ's words (K, N / 8), as rows (end - begin, K)."""
    first = begin // 8
    packed = contiguous(words[:, first:-(-end // 8)].T).view(numpy.uint8).reshape(-1, len(words), 4)
    codes = numpy.empty((len(packed), 8, len(words)), numpy.uint8)
    for i, column in enumerate(AWQ_COLUMNS):
        if i % 2:
            numpy.right_shift(packed[..., i // 2], 4, out=codes[:, column])
        else:
            numpy.bitwise_and(packed[..., i // 2], 15, out=codes[:, column])
    return codes.reshape(-1, len(words))[begin - 8 * first:end - 8 * first]


def halves_of(scales: numpy.ndarray) -> numpy.ndarray:
    """Scales as float16. Scales of bfloat16 must be exact in it; float32 is rounded, by at most 2^-11, an
    eighth of what bfloat16 weights would lose. NotExact if one is too large or too small."""
    values = floats(scales)
    halves = values.astype(numpy.float16)
    if kind_of(scales) == "bfloat16":
        fits = halves == values
    else:
        size = numpy.abs(values)
        fits = (size >= 2.0**-14) & (size < 65_504) | (halves == values)
    if not (fits | numpy.isnan(values)).all():  # a NaN is reported by its name
        raise NotExact
    return halves


@dataclass
class Grouped:
    """w = scale * (code - zero). `group` adjacent columns share both; with an `order` (K,), the columns that
    have the same number in it.

    `codes(begin, end)` gives those of some rows, (n, K) uint8, or int8 if 8 bits have a sign. `scales` is (N,
    G). `zeros(begin, end)` gives (n, G) of small integers; None: they are 2^(bits - 1), or 0 with a sign."""

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Callable[[int, int], numpy.ndarray]
    scales: numpy.ndarray
    mapped: tuple[numpy.ndarray, ...]
    zeros: Callable[[int, int], numpy.ndarray] | None = None
    order: numpy.ndarray | None = None
    signed: bool = False
    divisor: float = 1
    few_bits_of_x: bool = False  # the file asks for activations of 8 bits
    kind: str = field(init=False)

    def __post_init__(self):
        group = min(self.group, self.shape[1])
        whole = self.order is None and self.shape[1] % group == 0
        fits = whole and group % 32 == 0
        wide = whole and group % 128 == 0
        one_scale = whole and group == self.shape[1]
        if self.few_bits_of_x and self.zeros is None and one_scale and group % 256 == 0:
            self.kind = "I8_ROW"
        elif self.zeros is None:
            self.kind = fits * ("Q4_0" if self.bits <= 4 else "Q8_0" if self.bits == 8 else "")
        else:
            self.kind = "" if self.bits > 4 else "U4_G128" if wide else fits * "U4_G32"

    @property
    def middle(self) -> int:
        return 0 if self.signed else 1 << self.bits - 1

    def values(self, begin: int, end: int) -> numpy.ndarray:
        made = self.codes(begin, end).astype(numpy.float32)  # (n, K)
        zeros: Any = self.middle if self.zeros is None else contiguous(self.zeros(begin, end))
        scales = contiguous(floats(self.scales[begin:end]))
        G = self.scales.shape[1]
        if self.order is None and self.shape[1] == G * min(self.group, self.shape[1]):
            by_group = made.reshape(len(made), G, -1)
            by_group -= zeros if self.zeros is None else zeros[..., None]
            by_group *= scales[..., None]
        else:
            groups = numpy.arange(self.shape[1]) // self.group if self.order is None else self.order
            made -= zeros if self.zeros is None else zeros[:, groups]
            made *= scales[:, groups]
        return made if self.divisor == 1 else made / numpy.float32(self.divisor)

    def blocks(self, begin: int, end: int) -> numpy.ndarray:
        columns, size = block_of(self.kind)
        n = end - begin
        count = self.shape[1] // columns
        scales = self.scales[begin:end]
        if self.divisor != 1:
            scales = floats(scales) / numpy.float32(self.divisor)
        repeats = count // scales.shape[1]
        made = numpy.empty((n, count, size), numpy.uint8)
        if self.kind == "I8_ROW":
            wide = contiguous(floats(scales)).repeat(repeats, 1)
            made[..., :4] = wide.view(numpy.uint8).reshape(n, count, 4)
            made[..., 4:] = self.codes(begin, end).view(numpy.uint8).reshape(n, count, columns)
            return made.reshape(n, -1)
        scales = contiguous(halves_of(scales)).repeat(repeats, 1)
        made[..., :2] = scales.view(numpy.uint8).reshape(n, count, 2)
        codes = self.codes(begin, end)
        if self.kind == "Q8_0":
            made[..., 2:] = (codes if self.signed else codes ^ 0x80).view(numpy.uint8).reshape(n, count, 32)
            return made.reshape(n, -1)
        if self.zeros is None:
            shift = 8 - (1 << self.bits - 1)
            codes = codes + numpy.uint8(shift) if shift else codes
            made[..., 2:] = joined_nibbles(codes).reshape(n, count, 16)
        else:
            made[..., 2] = self.zeros(begin, end).repeat(repeats, 1)
            made[..., 3:] = joined_nibbles(codes).reshape(n, count, -1)
        return made.reshape(n, -1)


E2M1 = MXFP4_DOUBLED / 2


def nibbles(packed: numpy.ndarray, high_first: bool = False) -> numpy.ndarray:
    """The two codes of each byte: (n, B) -> (n, 2 B) uint8."""
    codes = numpy.empty((*packed.shape, 2), numpy.uint8)
    numpy.right_shift(packed, 4, out=codes[..., 1 - high_first])
    numpy.bitwise_and(packed, 15, out=codes[..., int(high_first)])
    return codes.reshape(len(packed), -1)


@dataclass
class Mx4:
    """MXFP4: codes of e2m1, with an exponent for each 32 columns."""

    packed: numpy.ndarray     # (N, K / 2), the first code in the low nibble
    exponents: numpy.ndarray  # (N, K / 32)
    kind = "MXFP4"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), 2 * self.packed.shape[1]

    @property
    def mapped(self) -> tuple[numpy.ndarray, ...]:
        return self.packed, self.exponents

    def values(self, begin: int, end: int) -> numpy.ndarray:
        codes = nibbles(self.packed[begin:end]).reshape(end - begin, -1, 32)
        return (MXFP4_DOUBLED[codes] * powers_of_two(self.exponents[begin:end])[..., None]).reshape(
            end - begin, -1)

    def blocks(self, begin: int, end: int) -> numpy.ndarray:
        made = numpy.empty((end - begin, self.exponents.shape[1], 17), numpy.uint8)
        made[..., 0] = self.exponents[begin:end]
        made[..., 1:] = joined_nibbles(nibbles(self.packed[begin:end])).reshape(end - begin, -1, 16)
        return made.reshape(end - begin, -1)


class WithoutTiles:
    """A layout whose numbers no type of tiles holds."""

    kind = ""

    def blocks(self, begin: int, end: int) -> numpy.ndarray:
        raise NotExact


@dataclass
class Nv4(WithoutTiles):
    """NVFP4: codes of e2m1, with a scale of e4m3 for each 16 columns and a factor for the matrix."""

    packed: numpy.ndarray   # (N, K / 2)
    scales: numpy.ndarray   # (N, K / 16)
    factor: numpy.ndarray   # one float32
    divides: bool           # compressed-tensors divides by the factor, modelopt multiplies

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), 2 * self.packed.shape[1]

    @property
    def mapped(self) -> tuple[numpy.ndarray, ...]:
        return self.packed, self.scales

    def values(self, begin: int, end: int) -> numpy.ndarray:
        factor = floats(self.factor).reshape(())
        scales = floats(self.scales[begin:end])
        scales = scales / factor if self.divides else scales * factor
        codes = nibbles(self.packed[begin:end]).reshape(*scales.shape, 16)
        return (E2M1[codes] * scales[..., None]).reshape(end - begin, -1)


@dataclass
class Codebook(WithoutTiles):
    """bitsandbytes' nf4 and fp4: one of `levels` (16,), times a scale for each `block` of the flattened
    matrix."""

    shape: tuple[int, int]
    packed: numpy.ndarray   # (bytes,), the first code in the high nibble
    levels: numpy.ndarray
    scales: Callable[[int, int], numpy.ndarray]  # float32 of blocks [begin, end)
    block: int
    mapped: tuple[numpy.ndarray, ...]

    def values(self, begin: int, end: int) -> numpy.ndarray:
        K = self.shape[1]
        first = begin * K // self.block
        last = -(-end * K // self.block)
        start = first * self.block
        stop = min(last * self.block, self.shape[0] * K)
        codes = nibbles(self.packed[None, start // 2:-(-stop // 2)], high_first=True)[0, :stop - start]
        scales = self.scales(first, last).repeat(self.block)[:len(codes)]
        return (self.levels[codes] * scales)[begin * K - start:end * K - start].reshape(-1, K)
