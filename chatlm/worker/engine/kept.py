"""Which pages of a model lie in segments, in memory and in the store, and their bytes."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.common.segments import HEADER_BYTES, ROOT, Record, Segment, key_of, open_file
from chatlm.common.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence as Seq
    from chatlm.common.segments import Entry


def page_address(parent: bytes, tokens: Iterable[int]) -> bytes:
    """16 bytes, of a page with these tokens after the prefix whose address is `parent`."""
    return hashlib.blake2b(parent + numpy.array(tokens, "<u4").tobytes(), digest_size=16).digest()


def owner_address(owner: str) -> bytes:
    """Of no tokens: where all prefixes of an owner begin. Two owners have no address in common."""
    return hashlib.blake2b(owner.encode(), digest_size=16, person=b"owner").digest()


ROWS, COLUMNS = 16, 130  # of words; no multiple of a sector, so that two that are exchanged are noticed


def checksum(payload) -> bytes:
    """16 bytes. Words are added up in columns, which is as fast as memory, and the sums are hashed: it tells
    what a disk may do to bytes, not what somebody may who computes checksums too."""
    data = numpy.asarray(payload, numpy.uint8)
    summed = len(data) // (8 * ROWS * COLUMNS) * 8 * ROWS * COLUMNS
    digest = hashlib.blake2b(data[summed:].tobytes(), digest_size=16)
    if summed:
        words = data[:summed].view(numpy.uint64).reshape(-1, ROWS, COLUMNS)
        digest.update(numpy.add.reduce(words, axis=1).tobytes())
    return digest.digest()


class KeptPages:
    """The records of one profile: in memory, which all workers of this machine share, and in the store. Only
    memory is written here."""

    TRIAL_BYTES = 4 << 20
    SEGMENTS = 16         # that a chain takes, which is all there is in memory
    LOOK_S = 1.0          # between two looks into the store, and at the memory that is free
    SPARE = 8             # a share of the memory's limit, which stays free of what the system has

    def __init__(self, memory: Seq[str], memory_bytes: int, store: Path | None, name: str):
        """memory: paths of segments; memory_bytes: the most they may take; name: the model's."""
        self.folder, self.name, self.profile = store, name, b""
        self.store = Tier(0, 0, 0)
        self.memory = Tier(memory_bytes, memory_bytes // self.SEGMENTS, len(memory), self.store.index)
        for path in memory:
            self.memory.add(Segment(path, path, open_file(path, writable=True)))
        self.most_bytes = memory_bytes
        self.looked_s = self.measured_s = -self.LOOK_S

    def key(self, content: int, address: bytes) -> bytes:
        return key_of(content, self.profile, address)

    def __contains__(self, key: bytes) -> bool:
        return key in self.memory.index or key in self.store.index

    def look_at_memory(self):
        """Know what other workers have written and given up, and what the one before this."""
        self.memory.look_at_all()

    @property
    def may_look(self) -> bool:
        """Is there a store, and was it last looked at LOOK_S ago?"""
        return self.folder is not None and time.monotonic() - self.looked_s >= self.LOOK_S

    def look_at_store(self):
        """The same of the store, at most once in LOOK_S."""
        if self.folder and self.may_look:
            self.looked_s, self.store.only = time.monotonic(), self.profile
            with suppress(OSError):  # without the folder there is nothing in it
                self.store.look_at_folder(self.folder)

    def add(self, content: int, address: bytes, payload: numpy.ndarray, groups: int = 0,
            tokens: Seq[int] = (0,) * PAGE_SIZE, parent: bytes = ROOT) -> bool:
        """Keep a payload in memory, bytes in one dimension. False if it does not fit there. OSError if the
        system has no memory for it."""
        if HEADER_BYTES + len(payload) > self.most_bytes // 2:
            return False
        self._measure()
        self.memory.names[self.profile] = self.name
        record = Record(content, groups, self.profile, address, parent, tuple(tokens), len(payload),
                        checksum(payload))
        return self.memory.append(record, payload)

    def _measure(self):
        """Take no more memory than the system can spare."""
        if time.monotonic() - self.measured_s >= self.LOOK_S:
            self.measured_s = time.monotonic()
            free = available_memory() - self.most_bytes // self.SPARE
            self.memory.limit = min(self.most_bytes, self.memory.bytes + max(free, 0))

    def use(self, key: bytes):
        """A chain was used up to this record: where it ends there, it was not used least recently."""
        for tier in (self.memory, self.store):
            if (entry := tier.index.get(key)) and entry.segment.last == key:
                with suppress(OSError):  # a read-only file system
                    os.utime(entry.segment.path)

    def on_disk(self, key: bytes) -> bool:
        return key not in self.memory.index and key in self.store.index

    def disk_byte_s(self) -> float | None:
        """Seconds that the store's disk takes for a byte, by reading some that it has in no cache."""
        with suppress(OSError, ValueError, AttributeError):
            segment = max(self.store.segments.values(), key=lambda segment: segment.size)
            size = min(segment.size, self.TRIAL_BYTES)
            with segment.opened() as descriptor:
                os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
                began_s = time.monotonic()
                if len(os.pread(descriptor, size, 0)) == size > 0:
                    return (time.monotonic() - began_s) / size
        return None

    def read(self, key: bytes) -> tuple[Record, memoryview] | None:
        """A record and its payload, or None: it is gone, or damaged. Waits for the disk."""
        tier = self.memory if key in self.memory.index else self.store
        if (entry := tier.index.get(key)) is None:
            return None
        read, damage = None, ""
        try:
            read = entry.segment.read(entry)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # a disk that fails; a file closed meanwhile
            damage = getattr(error, "strerror", None) or str(error)
        if read and read[0].key == key:  # else somebody has cut it off, and something else may lie there
            if checksum(read[1]) == read[0].checksum:
                return read
            damage = "its checksum is another"
        tier.index.pop(key, None)
        if damage and tier is self.store:
            self._give_up(entry, damage)
        return None

    def _give_up(self, entry: Entry, damage: str):
        """Cut a damaged record off, with what continues it: what fails once will fail again."""
        path = entry.segment.path
        cut = ", and cut off with what follows" if self.store.cut(entry.segment, entry.begin) else ""
        log.warning("a page in %s cannot be used (%s): it is computed again%s", path, damage, cut)
