"""The checks behind every wrapper: they look at numpy arrays and torch CPU tensors without importing
torch."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy

from chatlm.worker.kernels.library import _core

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint16": 2, "uint8": 1}
FORMATS = {"f": "float32", "e": "float16", "d": "float64", "i": "int32", "l": "int64", "q": "int64",
           "H": "uint16", "B": "uint8"}                     # letter of the buffer protocol -> name
CODES = {"float32": 0, "float16": 1, "bfloat16": 2}         # the compiled half's numbers
NUMPY = {"bfloat16": "uint16"}                              # numpy lacks the type and holds its bits as this
CACHE_CODES = CODES | {"uint8": 3}                          # uint8: pages of the type q8_0
FLOAT32 = ("float32",)


def look_at(name: str, array, types: tuple, *shape, rows_apart: bool = False,
            writable: bool = False) -> tuple:
    """(address, type name, shape, elements from row to row) of an array with one of the types, aligned to its
    elements.

    None in `shape` admits any size. The array must be contiguous. With `rows_apart` only each row of a matrix
    must be, and rows may have gaps between them.
    """
    address, kind, size, strides, read_only = _parts(name, array)
    if kind not in types:
        raise ValueError(f"{name}: must be {' or '.join(types)}, not {kind}")
    if writable and read_only:
        raise ValueError(f"{name}: is read-only")
    if strides is None or address % BYTES[kind]:
        raise ValueError(f"{name}: is not aligned to its elements")
    fits = len(size) == len(shape) and all(want in (None, have) for want, have in zip(shape, size))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: must have the shape ({wanted}), not {size}")
    expected = 1
    for axis in reversed(range(len(size))):
        apart = rows_apart and axis == 0 and strides[0] >= expected
        if size[axis] > 1 and strides[axis] != expected and not apart:
            raise ValueError(f"{name}: must be "
                             f"contiguous{' within each row, and its rows apart' if rows_apart else ''}")
        expected *= size[axis]
    return address, kind, size, strides[0]


def _parts(name: str, array) -> tuple:
    """(address, type name, shape, strides, is it read-only?) of an array.

    Strides count elements. They are None if they are no whole numbers of elements."""
    try:
        if hasattr(array, "data_ptr"):
            if array.device.type != "cpu":
                raise ValueError(f"{name}: must be on the CPU, not on {array.device}")
            return array.data_ptr(), str(array.dtype).removeprefix("torch."), tuple(
                array.shape), array.stride(), False
        # None, for an object without a buffer, raises the TypeError
        address, letter, size, read_only, shape, steps = _core.look_at_buffer(array)  # pyright: ignore[reportGeneralTypeIssues]  as said above
    # it has no buffer, or is a sparse tensor, which has no strides
    except (AttributeError, RuntimeError, TypeError):
        raise ValueError(
            f"{name}: must be a numpy array or a torch tensor, not {type(array).__name__}") from None
    strides = None if any(step % size for step in steps) else [step // size for step in steps]
    # an array of a type that numpy lacks has its name as an attribute
    kind = getattr(array, "kind", "") or FORMATS.get(letter.lstrip("@=<^"), letter)
    return address, kind, shape, strides, read_only


def bits_of(name: str, array, types: tuple, *shape) -> tuple[str, numpy.ndarray]:
    """(type name, numpy's view of a contiguous array). The view has the bits where numpy lacks the type."""
    address, kind, size, _ = look_at(name, array, types, *shape)
    count = math.prod(size)
    memory: Any = (ctypes.c_uint8 * (count * BYTES[kind])).from_address(address)
    return kind, numpy.frombuffer(memory, NUMPY.get(kind, kind), count).reshape(size)


def kind_of(name: str, array) -> str:
    """The name of an array's type."""
    return _parts(name, array)[1]


def vector(name: str, array, kind: str, size: int, *, writable: bool = False) -> int:
    """The address of a contiguous array of `size` elements of one type."""
    return look_at(name, array, (kind,), size, writable=writable)[0]


def vector_or_none(name: str, array, kind: str, size: int) -> int:
    """The same, or 0 for None."""
    return 0 if array is None else vector(name, array, kind, size)
