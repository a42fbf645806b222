"""The bytes of a GGUF file's header: pairs of keys and values, and where each tensor lies."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from chatlm.common.gguf_values import ARRAY, BOOL, F32, I32, STRING, U32
from chatlm.worker.arrays.gguf_types import TYPES, block_of

VERSION = 3
ALIGNMENT = 32


class Value(bytes):
    """A value as the header has it: its type, then its bytes."""


def spelled(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def of_text(text: str) -> Value:
    return Value(struct.pack("<I", STRING) + spelled(text))


def of_number(number: int) -> Value:
    return Value(struct.pack("<II", U32, number))


def of_float(number: float) -> Value:
    return Value(struct.pack("<If", F32, number))


def of_switch(is_on: bool) -> Value:
    return Value(struct.pack("<IB", BOOL, is_on))


def of_texts(texts: Seq[str | bytes]) -> Value:
    return Value(struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(map(spelled, texts)))


def of_numbers(numbers: Iterable[int]) -> Value:
    data = numpy.array([*numbers], "<i4")
    return Value(struct.pack("<IIQ", ARRAY, I32, len(data)) + data.tobytes())


def of_floats(numbers: Iterable[float]) -> Value:
    data = numpy.array([*numbers], "<f4")
    return Value(struct.pack("<IIQ", ARRAY, F32, len(data)) + data.tobytes())


class TensorPlace(NamedTuple):
    """A tensor in a file."""

    name: str
    sizes: tuple[int, ...]  # columns first
    kind: str
    offset: int             # from the first tensor's first byte
    n_bytes: int


@dataclass(frozen=True)
class GgufLayout:
    """A file's header, and the places of its tensors."""

    header: bytes
    places: tuple[TensorPlace, ...]
    size: int  # bytes of the whole file

    def begin_of(self, place: TensorPlace) -> int:
        return len(self.header) + place.offset


def bytes_of(kind: str, sizes: Seq[int]) -> int:
    block, block_bytes = block_of(kind)
    count = 1
    for size in sizes:
        count *= size
    return count // block * block_bytes


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def layout_of(metadata: Mapping[str, Value],
              tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> GgufLayout:
    """tensors: each one's name, sizes (columns first) and type, in their order in the file."""
    places = []
    offset = 0
    for name, sizes, kind in tensors:
        n_bytes = bytes_of(kind, sizes)
        places.append(TensorPlace(name, sizes, kind, offset, n_bytes))
        offset += padded(n_bytes)
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(places), len(metadata))]
    for key, value in metadata.items():
        parts += spelled(key), value
    for place in places:
        parts += (spelled(place.name), struct.pack("<I", len(place.sizes)),
                  struct.pack(f"<{len(place.sizes)}Q", *place.sizes),
                  struct.pack("<IQ", int(TYPES[place.kind]), place.offset))
    header = b"".join(parts)
    header += bytes(padded(len(header)) - len(header))
    return GgufLayout(header, tuple(places), len(header) + offset)
