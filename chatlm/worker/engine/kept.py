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
from chatlm.common.segments import (
    HEADER_BYTES, MODEL, Record, Segment, model_record, segment_paths, write_whole)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence as Seq


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
    """An index of the records of one profile: in segments in memory, which all workers of this machine share,
    and in those of the store. Only memory is written here, to a segment that no other worker writes."""

    TRIAL_BYTES = 4 << 20
    LOOK_S, TOUCH_S = 1.0, 30.0  # between two looks into the store, and two notes that a segment is used

    def __init__(self, memory: Seq[str], segment_bytes: int, store: Path | None, name: str):
        """memory: paths of segments, of so many bytes each; name: the model's."""
        self.memory = [Segment(path, path, writable=True) for path in memory]
        self.segment_bytes, self.store, self.name, self.profile = segment_bytes, store, name, b""
        self.index: dict[bytes, tuple[Segment, int, int]] = {}  # key -> segment, place and size of a payload
        self.inside: dict[Segment, list[bytes]] = {}            # the keys of a segment
        self.stored: dict[str, Segment] = {}                    # segments of the store
        self.touched_s: dict[Segment, float] = {}
        self.own: Segment | None = None
        self.looked_s = -self.LOOK_S

    def key(self, content: int, address: bytes) -> bytes:
        return bytes([content]) + self.profile + address

    def look_at_memory(self):
        """Know what other workers have written, and what the one before this."""
        for segment in self.memory:
            if segment is not self.own:
                self._look(segment)

    @property
    def may_look(self) -> bool:
        """Is there a store, and was it last looked at LOOK_S ago?"""
        return self.store is not None and time.monotonic() - self.looked_s >= self.LOOK_S

    def look_at_store(self):
        """The same of the store, at most once in LOOK_S."""
        if self.store is None or not self.may_look:
            return
        self.looked_s = time.monotonic()
        with suppress(OSError):  # without the folder there is nothing in it
            paths = {path.name: path for path in segment_paths(self.store)}
            for name in self.stored.keys() - paths.keys():
                self._forget(self.stored.pop(name))
            for name, path in paths.items():
                with suppress(OSError):  # deleted by now, or another user's
                    if name not in self.stored:
                        self.stored[name] = Segment(path, name)
                    self._look(self.stored[name])

    def _look(self, segment: Segment):
        if segment.restarted():
            self._forget(segment)
        for place, record in segment.news():
            if record.profile == self.profile and record.content != MODEL and record.key not in self.index:
                self._note(segment, place, record)

    def _note(self, segment: Segment, place: int, record: Record):
        self.index[record.key] = segment, place, record.size
        self.inside.setdefault(segment, []).append(record.key)

    def _forget(self, segment: Segment):
        for key in self.inside.pop(segment, ()):
            if (entry := self.index.get(key)) and entry[0] is segment:
                del self.index[key]

    def add(self, content: int, address: bytes, payload: numpy.ndarray, groups: int = 0,
            tokens: Seq[int] = (0,) * PAGE_SIZE) -> bool:
        """Keep a payload in memory, bytes in one dimension. False if it does not fit there. OSError if the
        system has no memory for it."""
        if (size := HEADER_BYTES + len(payload)) > self.segment_bytes // 2:
            return False
        if (self.own is None or self.own.end + size > self.segment_bytes) and not self._begin_segment():
            return False
        assert self.own
        record = Record(content, groups, self.profile, address, tuple(tokens), len(payload),
                        checksum(payload))
        self._note(self.own, self.own.append(record, payload), record)
        return True

    def _begin_segment(self) -> bool:
        """Write to an empty segment while memory is free, else over the least recently used one."""
        before, self.own = self.own, None
        for segment in self.memory:  # one that a worker has left with room
            roomy = HEADER_BYTES < segment.size < self.segment_bytes // 2
            if segment is not before and roomy and segment.lock():
                self._look(segment)
                os.ftruncate(segment.file.fileno(), segment.end)  # what that worker died over
                self.own = segment
                self._name_model()
                break
        free = available_memory() > 4 * self.segment_bytes
        for segment in sorted(self.memory, key=lambda its: (bool(its.size) if free else not its.size,
                                                            its.used_s)):
            if self.own is None and segment is not before and segment.lock():
                self._forget(segment)
                segment.restart()
                self.own = segment
                self._name_model()
        if before:
            before.unlock()
        return self.own is not None

    def _name_model(self):
        assert self.own
        data = model_record(self.profile, self.name)
        write_whole(self.own.file.fileno(), data, self.own.end)
        self.own.end += len(data)

    def on_disk(self, key: bytes) -> bool:
        return (entry := self.index.get(key)) is not None and entry[0].name in self.stored

    def disk_byte_s(self) -> float | None:
        """Seconds that the store's disk takes for a byte, by reading some that it has in no cache."""
        with suppress(OSError, ValueError, AttributeError):
            segment = max(self.stored.values(), key=lambda its: its.size)
            descriptor, size = segment.file.fileno(), min(segment.size, self.TRIAL_BYTES)
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
            began_s = time.monotonic()
            if len(os.pread(descriptor, size, 0)) == size > 0:
                return (time.monotonic() - began_s) / size
        return None

    def read(self, key: bytes) -> tuple[Record, memoryview] | None:
        """A record and its payload, or None: it is gone, or damaged. Waits for the disk."""
        if (entry := self.index.get(key)) is None:
            return None
        segment, place, size = entry
        read, damage = None, ""
        try:
            read = segment.read(place, size)
        except (OSError, ValueError) as error:  # a disk that fails; a file closed meanwhile
            damage = getattr(error, "strerror", None) or str(error)
        if read and read[0].key == key:  # else its writer has died over it, and another went on there
            if checksum(read[1]) == read[0].checksum:
                if time.monotonic() - self.touched_s.get(segment, -self.TOUCH_S) >= self.TOUCH_S:
                    self.touched_s[segment] = time.monotonic()
                    segment.touch()
                return read
            damage = "its checksum is another"
        self.index.pop(key, None)
        if damage and self.store and segment.name in self.stored:
            self._give_up(segment, damage)
        return None

    def _give_up(self, segment: Segment, damage: str):
        """Use nothing more of a segment in the store, and delete it: what fails once will fail again."""
        assert self.store
        self._forget(segment)
        path, deleted = self.store / segment.name, ""
        with suppress(OSError):  # a read-only folder
            os.unlink(path)
            deleted = ", and the file is deleted"
        log.warning("a page in %s cannot be used (%s): it is computed again%s", path, damage, deleted)
