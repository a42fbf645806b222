"""The zip archives of torch.save, opened so that a damaged or hostile one costs little.

Python's zipfile makes an object of each entry of the table of contents before anybody asks for one, and
unpacks members with what memory they ask for. torch.save never compresses."""

from __future__ import annotations

import os
import struct
import zipfile
from typing import BinaryIO

MOST_LISTED = 32 << 20  # bytes of a table of contents; that of 100,000 tensors has 10 MB
END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
PLACE_64 = struct.Struct("<4sLQL")
LONGEST_COMMENT = 0xFFFF


def archive_in(file: BinaryIO) -> zipfile.ZipFile:
    """The archive in an open file. BadZipFile if it is none, or if its table of contents is too long."""
    if listed_bytes(file) > MOST_LISTED:
        raise zipfile.BadZipFile(f"its table of contents has more than {MOST_LISTED:,} bytes")
    return zipfile.ZipFile(file)


def listed_bytes(file: BinaryIO) -> int:
    """The bytes of an archive's table of contents, as its end states them. BadZipFile without an end."""
    size = file.seek(0, os.SEEK_END)
    tail_at = max(size - END.size - LONGEST_COMMENT, 0)
    file.seek(tail_at)
    tail = file.read()
    at = len(tail) - END.size
    if at < 0 or tail[at:at + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":  # as zipfile looks for it
        at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < END.size:
        raise zipfile.BadZipFile("it has no table of contents")
    listed = END.unpack_from(tail, at)[5]
    place = tail_at + at - PLACE_64.size
    if place >= END_64.size:
        file.seek(place)
        mark = PLACE_64.unpack(file.read(PLACE_64.size))
        file.seek(place - END_64.size)
        large = END_64.unpack(file.read(END_64.size))
        if mark[0] == b"PK\6\7" and large[0] == b"PK\6\6":
            listed = max(listed if listed != 0xFFFFFFFF else 0, large[8])
    return listed


def first_bytes(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The first bytes of a member. BadZipFile if it is compressed."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{name} is compressed")
    with archive.open(name) as member:
        return member.read(most)
