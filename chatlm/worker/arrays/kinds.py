"""The types of numbers by name: those of numpy, and bfloat16 and FP8, which numpy holds as bits."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy


class Device(str):
    """The name of a device: "cpu", "cuda:0". torch takes it where it takes a name."""

    @property
    def type(self) -> str:
        return self.partition(":")[0]

    @property
    def index(self) -> int:
        return int(self.partition(":")[2] or 0)


class Bits(numpy.ndarray):
    """Numbers of a type that numpy lacks, held as bits.

    Slices and other shapes of it keep the type. Arithmetic is refused. numpy's concatenation loses the type:
    use `joined`."""

    kind = ""
    __array_ufunc__ = None  # pyright: ignore[reportAssignmentType]  numpy then refuses arithmetic


class Bfloat16(Bits):
    """In uint16."""

    kind = "bfloat16"


class E4m3(Bits):
    """FP8 with 4 bits of exponent and no infinity, in uint8."""

    kind = "float8_e4m3fn"


class E5m2(Bits):
    """FP8 with 5 bits of exponent, in uint8: the upper half of a float16."""

    kind = "float8_e5m2"


BITS: dict[str, tuple[type[Bits], str]] = {
    "bfloat16": (Bfloat16, "<u2"), "float8_e4m3fn": (E4m3, "u1"), "float8_e5m2": (E5m2, "u1")}
FLOATS = ("float32", "float16", "bfloat16")  # of weights


def kind_of(array) -> str:
    """The name of an array's type: "float32", "bfloat16"."""
    return getattr(array, "kind", None) or str(array.dtype).removeprefix("torch.")


def item_bytes(kind: str) -> int:
    return numpy.dtype(BITS[kind][1] if kind in BITS else kind).itemsize


def of_kind(data, kind: str) -> numpy.ndarray:
    """Memory, or an array of bytes, as numbers of this type. Nothing is copied."""
    if kind not in BITS:
        return numpy.asarray(data).view(kind)
    bits, stored = BITS[kind]
    return numpy.asarray(data).view(stored).view(bits)


def bits_of(array: numpy.ndarray) -> numpy.ndarray:
    """A `Bits` as unsigned integers, any other array as it is."""
    return array.view(numpy.ndarray)


@functools.cache
def e4m3_values() -> numpy.ndarray:
    """The values of the 256 codes of E4m3, float32."""
    codes = numpy.arange(256)
    exponents = codes >> 3 & 15
    fractions = codes & 7
    sizes = numpy.where(exponents, 2.0**(exponents - 7) * (1 + fractions / 8), 2.0**-6 * fractions / 8)
    sizes[codes & 127 == 127] = math.nan
    return (sizes * numpy.where(codes & 128, -1, 1)).astype(numpy.float32)


def floats(array: numpy.ndarray) -> numpy.ndarray:
    """The values as float32. An array of float32 is returned itself."""
    bits = bits_of(array)
    match kind_of(array):
        case "float32":
            return array
        case "bfloat16":
            return numpy.left_shift(bits, 16, dtype=numpy.uint32).view(numpy.float32)
        case "float8_e4m3fn":
            return e4m3_values()[bits]
        case "float8_e5m2":
            return numpy.left_shift(bits, 8, dtype=numpy.uint16).view(numpy.float16).astype(numpy.float32)
    return array.astype(numpy.float32)


ROWS_AT_ONCE = 1 << 18  # numbers that are converted at once, so few that their copies stay in the cache


def as_kind(array: numpy.ndarray, kind: str) -> numpy.ndarray:
    """The values as another type, rounded to the nearest, ties to even. An array of that type is returned
    itself."""
    if kind_of(array) == kind:
        return array
    if kind != "bfloat16":
        return floats(array).astype(kind)
    made = empty(array.shape, kind)
    from_rows = array
    to_rows = bits_of(made)
    if array.ndim > 1:
        from_rows = from_rows.reshape(-1, array.shape[-1])
        to_rows = to_rows.reshape(-1, array.shape[-1])
    step = max(1, ROWS_AT_ONCE // max(math.prod(from_rows.shape[1:]), 1))
    for begin in range(0, len(from_rows), step):
        bits = numpy.ascontiguousarray(floats(from_rows[begin:begin + step])).view(numpy.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        is_nan = bits & 0x7FFFFFFF > 0x7F800000
        if is_nan.any():
            rounded[is_nan] = 0x7FC0
        to_rows[begin:begin + step] = rounded
    return made


def joined(parts: Seq[numpy.ndarray], axis: int = 0) -> numpy.ndarray:
    """Arrays of one type, concatenated along an axis. They keep the type."""
    if len(parts) == 1:
        return parts[0]
    made = numpy.concatenate([bits_of(part) for part in parts], axis)
    return made.view(type(parts[0])) if isinstance(parts[0], Bits) else made


def contiguous(array: numpy.ndarray) -> numpy.ndarray:
    """The array itself if its rows follow each other in memory, else a copy for which they do."""
    return array if array.flags.c_contiguous else array.copy()


def same(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    """Do both have the same values?"""
    return a.shape == b.shape and bool((floats(a) == floats(b)).all())


def empty(shape: tuple[int, ...], kind: str) -> numpy.ndarray:
    bits, stored = BITS.get(kind, (numpy.ndarray, kind))
    return numpy.empty(shape, stored).view(bits)


def zeros(shape: tuple[int, ...], kind: str) -> numpy.ndarray:
    bits, stored = BITS.get(kind, (numpy.ndarray, kind))
    return numpy.zeros(shape, stored).view(bits)


def mapped_zeros(shape: tuple[int, ...], kind: str) -> numpy.ndarray:
    """Zeros that take memory only where they are written."""
    size = math.prod(shape) * item_bytes(kind)
    if not size:
        return zeros(shape, kind)
    if hasattr(mmap, "MAP_PRIVATE"):  # the system takes half as long again to provide shared memory
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:  # Windows
        memory = mmap.mmap(-1, size)
    return of_kind(numpy.frombuffer(memory, numpy.uint8), kind).reshape(shape)


def address_of(array) -> int:
    """Where an array of numpy or a tensor of torch begins in memory."""
    return array.data_ptr() if hasattr(array, "data_ptr") else array.__array_interface__["data"][0]


class Arrays:
    """What a Transformer and an engine do with arrays besides calling ops. Here: numpy, on a CPU.

    TorchArrays does the same with tensors on any device."""

    computing = nullcontext  # a context for all that computes; each thread enters its own

    def of(self, array: numpy.ndarray, kind: str | None = None) -> Any:
        """An array of the files where ops can read it, as `kind`; None: of its own type."""
        return array if kind is None else as_kind(array, kind)

    def copy(self, array) -> Any:
        return array.copy()

    def empty(self, shape: tuple[int, ...], kind: str) -> Any:
        return empty(shape, kind)

    def zeros(self, shape: tuple[int, ...], kind: str) -> Any:
        """Zeros. On a CPU they take memory only where they are written."""
        return mapped_zeros(shape, kind)

    def numpy(self, array) -> numpy.ndarray:
        """The values as float32. They may share the array's memory."""
        return floats(array)

    def bytes(self, array) -> numpy.ndarray:
        """The memory of an array on a CPU, (bytes,) uint8."""
        return bits_of(array).reshape(-1).view(numpy.uint8)

    def put(self, values: numpy.ndarray, out):
        """float32 values -> out."""
        out[...] = values

    def wait(self, array):
        """Wait until the device has computed this array, because the host is about to read it."""


class Norm(NamedTuple):
    """An RMS norm that `linear` applies to its input first. `weight` is (C) or None."""

    weight: Any
    eps: float


class AdapterMatrix(NamedTuple):
    """What an adapter adds to the product of a matrix (N, K) with x: b @ (scales * (a @ x)).

    The matrix may be made of parts with an adapter each. R is the sum of their ranks, and `b` is zero where
    the rows belong to another part."""

    a: Any       # (R, K), as in its file
    b: Any       # (N, R)
    scales: Any  # (R,) float32
