"""Long lists of strings in a GGUF file, such as a vocabulary: Python's objects for them are made late."""

from __future__ import annotations

import itertools
import json
import struct
from array import array
from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring
from typing import Any

import numpy

LENGTH = struct.Struct("<Q")   # before each string
SHORT = 256                    # a length below it is a byte and seven zeros
MARK = "\x7f"                  # JSON writes it as it is, and strings hardly ever have it
WINDOW_BYTES = 1 << 16         # where lengths are looked for together
WORTH_A_WINDOW = 500          # strings
MOST_BYTES = (1 << 64) - 1


class Texts(Sequence):
    """A long list of strings in a file, decoded whenever they are needed.

    A vocabulary of 49,152 objects that lives while others are made would leave holes of 10 MB in a process's
    memory."""

    def __init__(self, spelled: bytes, ends: array):
        # each string after its length; ends[0]: 0
        self.spelled = spelled
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[str]:
        _, *texts = self._joined().split(MARK)
        return iter(texts if len(texts) == len(self) else self._decoded_alone())

    def _joined(self) -> str:
        """All strings, each after a MARK: one call decodes them all, in a third of the time. A string that
        has a MARK itself makes one too many; if one has a NUL, this is ""."""
        ends = numpy.frombuffer(self.ends, numpy.uint64).astype(numpy.int64)
        begins = ends[:-1]
        apart = numpy.frombuffer(self.spelled, numpy.uint8).copy()
        long = begins[numpy.diff(ends) >= LENGTH.size + SHORT]
        apart[long[:, None] + numpy.arange(1, LENGTH.size)] = 0
        apart[begins] = ord(MARK)
        kept = apart[apart != 0]
        if len(kept) != len(apart) - (LENGTH.size - 1) * len(self):
            return ""
        return kept.tobytes().decode("utf-8", "replace")

    def _decoded_alone(self) -> list[str]:
        """The strings, if some have a MARK or a NUL."""
        return [self.spelled[begin + LENGTH.size:end].decode("utf-8", "replace")
                for begin, end in itertools.pairwise(self.ends)]

    def as_json(self) -> str:
        """A JSON list, the same text as `json.dumps(list(self), ensure_ascii=False)` in half the time."""
        joined = self._joined()
        if not joined or joined.count(MARK) != len(self):
            return json.dumps(list(self), ensure_ascii=False)
        return "[" + encode_basestring(joined[1:]).replace(MARK, '", "') + "]"

    def __eq__(self, other: object) -> bool:
        return list(self) == (list(other) if isinstance(other, Texts) else other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  as a list has none


def ends_of_strings(buffer: memoryview, begin: int, count: int) -> array:
    """Where the `count` strings from `begin` on end, counted from `begin`, after a 0. Each has its length
    before it. If one ends beyond the buffer, it is the last.

    Lengths are looked for together, where a zero follows another byte. They are those of the strings as long
    as each says where the next one is. Any other string (empty, of 256 bytes or more, with a NUL) is read by
    itself."""
    data = numpy.frombuffer(buffer, numpy.uint8)
    ends = array("Q", (0,))
    at = begin
    while len(ends) <= count and at <= len(data):
        found = chained_ends(data[at:at + WINDOW_BYTES])[:count + 1 - len(ends)]
        ends.frombytes((found + (at - begin)).astype(numpy.uint64).tobytes())
        at = begin + ends[-1]
        alone = 64 if len(found) > WORTH_A_WINDOW else 4 * WORTH_A_WINDOW
        for _ in range(min(alone, count + 1 - len(ends))):
            complete = at + LENGTH.size <= len(data)
            at += LENGTH.size + (LENGTH.unpack_from(buffer, at)[0] if complete else 0)
            ends.append(min(at - begin, MOST_BYTES))
            if at > len(data):
                break
    return ends


def chained_ends(window: numpy.ndarray) -> numpy.ndarray:
    """Where strings end whose lengths are found together, from the first one of the window on."""
    if len(window) < LENGTH.size:
        return numpy.empty(0, numpy.int64)
    # as if one began at each byte
    lengths = numpy.ndarray(len(window) - LENGTH.size + 1, "<u8", window, strides=(1,))
    filled = window != 0
    begins = numpy.flatnonzero(filled[:len(lengths)] & ~filled[1:len(lengths) + 1])
    ends = begins + LENGTH.size + lengths[begins].astype(numpy.int64)
    if not len(begins) or begins[0]:
        return ends[:0]
    [broken] = numpy.nonzero(ends[:-1] != begins[1:])
    return ends[:broken[0] if len(broken) else len(ends) - 1]
