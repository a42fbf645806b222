"""The kept pages of a model: which of them are in segments, in memory or in the store, and their bytes."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
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
    """The 16-byte address of a page with these tokens, after the prefix whose address is `parent`."""
    return hashlib.blake2b(parent + numpy.array(tokens, "<u4").tobytes(), digest_size=16).digest()


def owner_address(owner: str) -> bytes:
    """The address of the empty prefix, with which all prefixes of an owner begin. Owners share no address."""
    return hashlib.blake2b(owner.encode(), digest_size=16, person=b"owner").digest()


# of words; not a multiple of a disk sector, so swapped sectors are detected
ROWS = 16
COLUMNS = 130


def checksum(payload) -> bytes:
    """16 bytes that detect corruption by a disk, not deliberate changes. Words are summed in columns, at the
    speed of memory, and the sums are hashed."""
    data = numpy.asarray(payload, numpy.uint8)
    summed = len(data) // (8 * ROWS * COLUMNS) * 8 * ROWS * COLUMNS
    digest = hashlib.blake2b(data[summed:].tobytes(), digest_size=16)
    if summed:
        words = data[:summed].view(numpy.uint64).reshape(-1, ROWS, COLUMNS)
        digest.update(numpy.add.reduce(words, axis=1).tobytes())
    return digest.digest()


class KeptPages:
    """The records of one profile (same weights, same arithmetic), in memory that all workers of this machine
    share, and in the store. This class writes only to memory: the front copies that to the store."""

    TRIAL_BYTES = 4 << 20
    SEGMENTS = 16         # into which the memory is divided
    LOOK_S = 1.0          # between two scans of the store, and between two looks at the system's free memory
    BUFFERS = 64          # kept for the next reads
    SPARE = 8             # 1 / SPARE of the memory's limit must stay free in the system

    def __init__(self, memory: Seq[str], memory_bytes: int, store: Path | None, name: str):
        """memory: paths of segments; memory_bytes: their limit together; name: the model's name."""
        self.folder = store
        self.name = name
        self.profile = b""
        self.store = Tier(0, 0, 0)
        self.memory = Tier(memory_bytes, memory_bytes // self.SEGMENTS, len(memory), self.store.index)
        for path in memory:
            self.memory.add(Segment(path, path, open_file(path, writable=True)))
        self.most_bytes = memory_bytes
        self.spare: deque[bytearray] = deque(maxlen=self.BUFFERS)  # memory of payloads that were copied
        self.looked_s = self.measured_s = -self.LOOK_S

    def use_profile(self, profile: bytes):
        """Find and add only records of this profile from now on. b"": none yet, so none are kept."""
        self.profile = profile

    def key(self, content: int, address: bytes) -> bytes:
        return key_of(content, self.profile, address)

    def __contains__(self, key: bytes) -> bool:
        return key in self.memory.index or key in self.store.index

    def look_at_memory(self):
        """Find what other workers, and the one before this, have written or dropped."""
        self.memory.look_at_all()

    @property
    def may_look(self) -> bool:
        """Is there a store, and was its last scan at least LOOK_S ago?"""
        return self.folder is not None and time.monotonic() - self.looked_s >= self.LOOK_S

    def look_at_store(self):
        """Scan the store, at most once per LOOK_S."""
        if self.folder and self.may_look:
            self.looked_s = time.monotonic()
            self.store.only = self.profile
            with suppress(OSError):  # no folder, no records
                self.store.look_at_folder(self.folder)

    def add(self, content: int, address: bytes, payload: numpy.ndarray, groups: int = 0,
            tokens: Seq[int] = (0,) * PAGE_SIZE, parent: bytes = ROOT) -> bool:
        """Keep a payload (one-dimensional, bytes) in memory. False if it does not fit. OSError if the system
        has no memory for it."""
        if HEADER_BYTES + len(payload) > self.most_bytes // 2:
            return False
        self._measure()
        self.memory.names[self.profile] = self.name
        record = Record(content, groups, self.profile, address, parent, tuple(tokens), len(payload),
                        checksum(payload))
        return self.memory.append(record, payload)

    def _measure(self):
        """Limit the memory to what the system can spare."""
        if time.monotonic() - self.measured_s >= self.LOOK_S:
            self.measured_s = time.monotonic()
            free = available_memory() - self.most_bytes // self.SPARE
            self.memory.limit = min(self.most_bytes, self.memory.bytes + max(free, 0))

    def use(self, key: bytes):
        """Mark the segment that ends with this record as recently used: a chain was used up to here."""
        for tier in (self.memory, self.store):
            if (entry := tier.index.get(key)) and entry.segment.last == key:
                with suppress(OSError):  # a read-only file system
                    os.utime(entry.segment.path)

    def on_disk(self, key: bytes) -> bool:
        return key not in self.memory.index and key in self.store.index

    def disk_byte_s(self) -> float | None:
        """Seconds that the store's disk takes per byte, measured by an uncached read; None if unknown."""
        with suppress(OSError, ValueError, AttributeError):
            segment = max(self.store.segments.values(), key=lambda segment: segment.size)
            size = min(segment.size, self.TRIAL_BYTES)
            with segment.opened() as descriptor:
                os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
                began_s = time.monotonic()
                if len(os.pread(descriptor, size, 0)) == size > 0:
                    return (time.monotonic() - began_s) / size
        return None

    def reuse(self, payload: memoryview):
        """A payload that was read has been copied: read another record where it is. To provide memory takes
        the system longer than to copy a page."""
        if isinstance(payload.obj, bytearray):
            self.spare.append(payload.obj)

    def _buffer(self) -> bytearray:
        """Memory that nobody reads any more; none of it if there is none."""
        try:
            return self.spare.pop()
        except IndexError:  # another thread may have taken the last one
            return bytearray()

    def read(self, key: bytes) -> tuple[Record, memoryview] | None:
        """A record and its payload; None if it is gone or damaged. Waits for the disk."""
        tier = self.memory if key in self.memory.index else self.store
        if (entry := tier.index.get(key)) is None:
            return None
        read = None
        damage = ""
        try:
            read = entry.segment.read(entry, self._buffer())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # the disk failed; the file was closed meanwhile
            damage = getattr(error, "strerror", None) or str(error)
        if read and read[0].key == key:  # else it was cut off, and its bytes may have been overwritten
            if checksum(read[1]) == read[0].checksum:
                return read
            damage = "its checksum does not match"
        tier.index.pop(key, None)
        if damage and tier is self.store:
            self._cut_damaged(entry, damage)
        return None

    def _cut_damaged(self, entry: Entry, damage: str):
        """Cut off a damaged record and what follows it: a read that failed once will fail again."""
        path = entry.segment.path
        cut = "; it and what follows it are cut off" if self.store.cut(entry.segment, entry.begin) else ""
        log.warning("a page in %s is unusable (%s) and is computed again%s", path, damage, cut)
