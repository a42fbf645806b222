"""The messages between the front and the process that searches vectors."""

from __future__ import annotations

from typing import NamedTuple

from chatlm.common.messages.wire import Pipe, wire_message


@wire_message(1 << 16)
class VectorsConfig:
    """Front to process, first: where the vectors are."""

    database: str
    kept_bytes: int  # of vectors that it may keep in memory; a store that does not fit is read for each scan


@wire_message(4 << 20)
class Scan:
    """Front to process: compare a vector with all windows of these stores that one embedder has made."""

    stores: tuple[int, ...]   # their numbers
    embedder: int             # its number
    vector: bytes             # float32, little-endian, of length 1
    most: int                 # how many passages to return
    files: tuple[int, ...] | None = None  # the numbers of those that are searched; None: all
    others: tuple[int, ...] = ()          # passages whose scores are wanted, however low


class Near(NamedTuple):
    """A passage, with the cosine of its best window."""

    passage: int
    file: int
    score: float


@wire_message(4 << 20)
class Scanned:
    """Process to front: the passages that are nearest, of equal ones first those of earlier files, then
    earlier passages."""

    nearest: tuple[Near, ...]
    others: tuple[Near, ...]  # those of Scan.others that are among the windows, in the same order
    windows: int              # that were compared


@wire_message(1 << 16)
class ScanFailed:
    """Process to front: it cannot read what it needs now."""

    reason: str


VECTORS_PIPE = Pipe(VectorsConfig, Scan, Scanned, ScanFailed)
