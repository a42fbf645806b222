"""The types of numbers, by name: those of numpy, and bfloat16 and FP8, which are their bits."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Sequence as Seq
from contextlib import nullcontext, suppress
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
    """Numbers of a type that numpy lacks, as their bits. Parts of it and other shapes keep the type;
    arithmetic is refused, and numpy's joins lose the type: see `joined`."""

    kind = ""
    __array_ufunc__ = None  # pyright: ignore[reportAssignmentType]  that is numpy's way to refuse


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
    """The name of its type: "float32", "bfloat16"."""
    return getattr(array, "kind", None) or str(array.dtype).removeprefix("torch.")


def item_bytes(kind: str) -> int:
    return numpy.dtype(BITS[kind][1] if kind in BITS else kind).itemsize


def of_kind(data, kind: str) -> numpy.ndarray:
    """Some memory, or an array of bytes, as numbers of this type."""
    if kind not in BITS:
        return numpy.asarray(data).view(kind)
    bits, stored = BITS[kind]
    return numpy.asarray(data).view(stored).view(bits)


def bits_of(array: numpy.ndarray) -> numpy.ndarray:
    """A `Bits` as unsigned integers, any other array as it is."""
    return array.view(numpy.ndarray)


@functools.cache
def e4m3_values() -> numpy.ndarray:
    """The value of each of the 256 codes, float32."""
    codes = numpy.arange(256)
    exponents = codes >> 3 & 15
    fractions = codes & 7
    sizes = numpy.where(exponents, 2.0**(exponents - 7) * (1 + fractions / 8), 2.0**-6 * fractions / 8)
    sizes[codes & 127 == 127] = math.nan
    return (sizes * numpy.where(codes & 128, -1, 1)).astype(numpy.float32)


def floats(array: numpy.ndarray) -> numpy.ndarray:
    """Its values as float32; itself if it is."""
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


ROWS_AT_ONCE = 1 << 18  # numbers that are converted together, so that their copies stay in the cache


def as_kind(array: numpy.ndarray, kind: str) -> numpy.ndarray:
    """Its values as another type, rounded to the nearest, ties to even; itself if it has the type."""
    if kind_of(array) == kind:
        return array
    if kind != "bfloat16":
        return floats(array).astype(kind)
    made = empty(array.shape, kind)
    from_rows, to_rows = (x.reshape(-1, array.shape[-1]) if array.ndim > 1 else x
                          for x in (array, bits_of(made)))
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
    """Arrays of one type, one after the other along an axis."""
    if len(parts) == 1:
        return parts[0]
    made = numpy.concatenate([bits_of(part) for part in parts], axis)
    return made.view(type(parts[0])) if isinstance(parts[0], Bits) else made


def contiguous(array: numpy.ndarray) -> numpy.ndarray:
    """Itself, or a copy whose rows follow each other in memory."""
    return array if array.flags.c_contiguous else array.copy()


def same(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    """Have both the same values?"""
    return a.shape == b.shape and bool((floats(a) == floats(b)).all())


def empty(shape: tuple[int, ...], kind: str) -> numpy.ndarray:
    bits, stored = BITS.get(kind, (numpy.ndarray, kind))
    return numpy.empty(shape, stored).view(bits)


def zeros(shape: tuple[int, ...], kind: str) -> numpy.ndarray:
    bits, stored = BITS.get(kind, (numpy.ndarray, kind))
    return numpy.zeros(shape, stored).view(bits)


def mapped_zeros(shape: tuple[int, ...], kind: str) -> numpy.ndarray:
    """Zeros that take memory only as they are written."""
    size = math.prod(shape) * item_bytes(kind)
    if not size:
        return zeros(shape, kind)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; 4-KiB page faults made the first prefill 15 % slower
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return of_kind(numpy.frombuffer(memory, numpy.uint8), kind).reshape(shape)


def address_of(array) -> int:
    """Where it begins in memory; numpy's or torch's."""
    return array.data_ptr() if hasattr(array, "data_ptr") else array.__array_interface__["data"][0]


class Arrays:
    """What a Transformer and an engine do with arrays besides calling ops: here in numpy, on a CPU.

    TorchArrays does the same with tensors on any device."""

    computing = nullcontext  # a context for everything that computes, in each thread

    def of(self, array: numpy.ndarray, kind: str | None = None) -> Any:
        """An array of the files, where ops read it, as `kind`."""
        return array if kind is None else as_kind(array, kind)

    def copy(self, array) -> Any:
        return array.copy()

    def empty(self, shape: tuple[int, ...], kind: str) -> Any:
        return empty(shape, kind)

    def zeros(self, shape: tuple[int, ...], kind: str) -> Any:
        """Zeros; on a CPU they take memory only as they are written."""
        return mapped_zeros(shape, kind)

    def numpy(self, array) -> numpy.ndarray:
        """Its values as float32, perhaps in its own memory."""
        return floats(array)

    def bytes(self, array) -> numpy.ndarray:
        """Its memory (bytes,) uint8, of a CPU."""
        return bits_of(array).reshape(-1).view(numpy.uint8)

    def put(self, values: numpy.ndarray, out):
        """float32 values -> out."""
        out[...] = values

    def wait(self, array):
        """Until the device has computed this array, which the host is about to read."""


class Norm(NamedTuple):
    """The RMS norm that `linear` applies to its input first; `weight` is (C) or None."""

    weight: Any
    eps: float


class AdapterMatrix(NamedTuple):
    """What an adapter adds to the product of a matrix (N, K) with x: b @ (scales * (a @ x)). R is the sum of
    the ranks of the parts that the matrix is made of; `b` is zero where a part has no rows."""

    a: Any       # (R, K), as in its file
    b: Any       # (N, R)
    scales: Any  # (R,) float32
