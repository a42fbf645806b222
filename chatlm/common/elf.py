"""What a compiled library needs of glibc, read from its file (ELF with 64 bits, little-endian)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

VERSIONS_NEEDED = 0x6FFFFFFE        # the type of a section: SHT_GNU_verneed
WEAK = 0x2                          # VER_FLG_WEAK: the library loads without that version


class Section(NamedTuple):
    kind: int
    start: int
    size: int
    link: int                       # the number of the section with its strings
    entries: int


def glibc_of(data: bytes) -> tuple[int, ...]:
    """The version of glibc without which a library does not load, such as (2, 17); () if it needs none, or is
    no such library."""
    found = (re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", name) for name in versions_needed(data))
    return max((tuple(map(int, match[1].split("."))) for match in found if match), default=())


def versions_needed(data: bytes) -> Iterator[str]:
    """The names of the versions that a library needs of others."""
    sections = list(sections_of(data))
    for section in sections:
        if section.kind != VERSIONS_NEEDED:
            continue
        strings = sections[section.link].start
        file = section.start
        for _ in range(section.entries):
            _, count, _, first, following = struct.unpack_from("<HHIII", data, file)
            version = file + first
            for _ in range(count):
                _, flags, _, name, after = struct.unpack_from("<IHHII", data, version)
                if not flags & WEAK:
                    yield data[strings + name:data.index(b"\0", strings + name)].decode("ascii", "replace")
                version += after
            file += following


def sections_of(data: bytes) -> Iterator[Section]:
    if data[:6] != b"\x7fELF\2\1":
        return
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    for number in range(count):
        header = struct.unpack_from("<IIQQQQII", data, table + number * size)
        _, kind, _, _, start, length, link, entries = header
        yield Section(kind, start, length, link, entries)
