"""Tiers: segments that share one limit of bytes, in memory or in a store, and the location of each record.

The chains of all segments form a forest: a segment hangs on the page that its first record continues. To make
room, ends of chains are cut, the least recently used first: in a segment, everything after the last page on
which another segment hangs. So the most recently used chain loses pages only after all others."""

from __future__ import annotations

import heapq
import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.segments import (
    HEAD, HEADER_BYTES, MAGIC, MODEL, PAGE, Entry, Record, Segment, key_of, locked, model_record,
    segment_paths, write_whole)


class Tier:
    """Segments, and an index of their records. Each process has its own view of them, which `look` renews."""

    SHARE = 64  # 1/SHARE of the limit is cut from the end of a segment at a time

    def __init__(self, limit: int, segment_bytes: int, most_segments: int, elsewhere: Container[bytes] = ()):
        """elsewhere: keys of records that another tier also has; they may leave this one in any order."""
        self.limit = limit
        self.segment_bytes = segment_bytes
        self.most_segments = most_segments
        self.elsewhere = elsewhere
        self.only: bytes | None = None       # a profile; records of others are ignored
        self.segments: dict[str, Segment] = {}
        self.index: dict[bytes, Entry] = {}
        self.names: dict[bytes, str] = {}    # profile -> name of the model
        self.bytes = 0                       # of all segments
        self.changing = threading.RLock()    # guards all of the above

    # looking

    def add(self, segment: Segment):
        self.segments[segment.name] = segment
        self.look(segment)

    def drop(self, segment: Segment):
        """Remove a segment that is gone."""
        with self.changing:
            self._forget(segment)
            self._resize(segment, 0)
            self.segments.pop(segment.name, None)

    def look_at_all(self):
        for segment in self.segments.values():
            self.look(segment)

    def look_at_folder(self, folder: Path):
        """Look at a folder's segments, skipping unreadable ones. OSError if the folder cannot be read."""
        paths = {path.name: path for path in segment_paths(folder)}
        for name in self.segments.keys() - paths.keys():
            self.drop(self.segments[name])
        for name, path in paths.items():
            with suppress(OSError):  # deleted by now, or another user's
                if segment := self.segments.get(name):
                    self.look(segment)
                else:
                    self.add(Segment(path, name))

    def look(self, segment: Segment):
        """Note what other processes changed in a segment. OSError if it is gone."""
        with self.changing:
            status = os.fstat(segment.file.fileno()) if segment.file else os.stat(segment.path)
            if (status.st_size, status.st_mtime_ns) == (segment.size, segment.used_ns) and (
                    segment.has_its_id):  # it may have been refilled within 4 ms
                return
            self._resize(segment, status.st_size)
            segment.used_ns = status.st_mtime_ns
            before = segment.entries
            with segment.opened() as descriptor:
                if segment.restarted(descriptor):
                    self._forget(segment, before)
                for record, entry in segment.news(descriptor):
                    if record.content == MODEL:
                        name = os.pread(descriptor, entry.size, entry.begin + HEADER_BYTES)
                        self.names[record.profile] = name.decode(errors="replace")
                    if self.only not in (None, record.profile):
                        break
                    if record.content != MODEL:
                        self.index.setdefault(entry.key, entry)

    def _forget(self, segment: Segment, entries: list[Entry] | None = None):
        for entry in segment.entries if entries is None else entries:
            if (found := self.index.get(entry.key)) and found.segment is segment:
                del self.index[entry.key]

    def _resize(self, segment: Segment, size: int):
        self.bytes += size - segment.size
        segment.size = size

    # writing

    def continued_by(self, record: Record, size: int) -> Segment | None:
        """The segment to which `size` bytes that start with this record may be appended."""
        entry = self.index.get(record.parent_key)
        if entry and entry.segment.continues(record) and entry.segment.end + size <= self.segment_bytes:
            return entry.segment
        return None

    @property
    def empty(self) -> list[Segment]:
        """The segments in memory without records."""
        return [segment for segment in self.segments.values() if segment.file and not segment.entries]

    @contextmanager
    def writing(self, segment: Segment, record: Record) -> Iterator[int | None]:
        """Yields a segment's descriptor, to append a record as its only writer; None if impossible."""
        with self.changing, segment.opened(writable=True) as descriptor, locked(descriptor) as mine:
            with suppress(FileNotFoundError):
                self.look(segment)
                mine = mine and segment.continues(record)
                if mine and not segment.entries:
                    segment.restart(descriptor)
                    if name := self.names.get(record.profile):
                        data = model_record(record.profile, name)
                        write_whole(descriptor, data, segment.end)
                        segment.end += len(data)
                elif mine and segment.size > segment.end:  # a record that was never completed
                    os.ftruncate(descriptor, segment.end)
                try:
                    yield descriptor if mine else None
                finally:
                    status = os.fstat(descriptor)
                    self._resize(segment, status.st_size)
                    segment.used_ns = status.st_mtime_ns
                return
            self.drop(segment)  # it was deleted before it was locked
            yield None

    def append(self, record: Record, payload) -> bool:
        """Add a record in memory. False if there is no room; OSError if the system has no memory."""
        size = HEADER_BYTES + len(payload)
        onto = self.continued_by(record, size)
        if not self.make_room(size, record, onto):
            return False
        for segment in (onto, *self.empty):
            if segment:
                with self.writing(segment, record) as descriptor:
                    if descriptor is not None:
                        entry = segment.append(descriptor, record, payload)
                        self.index.setdefault(entry.key, entry)
                        return True
        return False

    # making room

    def make_room(self, needed: int, record: Record | None = None, onto: Segment | None = None) -> bool:
        """Make room for `needed` bytes that start with a record, in the segment `onto` or a new one, without
        cutting the chain that they continue. False if that is impossible."""
        with self.changing:
            crowded = record is not None and onto is None and self._used >= self.most_segments
            if self.bytes + needed <= self.limit and not crowded:
                return True
            # segment -> the segments that hang on it, and up to where each needs it; None is the record
            hanging: dict[Segment, dict[Segment | None, int]] = {}
            for segment in self.segments.values():
                if on := self.index.get(segment.parent):
                    hanging.setdefault(on.segment, {})[segment] = on.end
            if record and (on := self.index.get(record.parent_key)):
                hanging.setdefault(on.segment, {})[None] = on.end if onto is None else onto.end
            queue = [(segment.used_ns, segment.name) for segment in self.segments.values()
                     if segment.size or not segment.file]
            heapq.heapify(queue)
            while queue and ((missing := self.bytes + needed - self.limit) > 0 or crowded):
                segment = self.segments.get(heapq.heappop(queue)[1])
                if segment is None:
                    continue
                on = self.index.get(segment.parent)
                floor = max(hanging.get(segment, {}).values(), default=0)
                if segment.size <= floor and segment.entries or missing <= 0 and floor:
                    continue
                wanted = max(missing, self.limit // self.SHARE, segment.size if crowded and not floor else 0)
                if self._cut(segment, floor, wanted) and not segment.entries:
                    crowded = False
                    if on:  # the segment that it hung on may be cut further now
                        hanging[on.segment].pop(segment)
                        heapq.heappush(queue, (on.segment.used_ns, on.segment.name))
            self._empty_stored(needed, onto)
            return self.bytes + needed <= self.limit and not crowded

    @property
    def _used(self) -> int:
        return sum(bool(segment.entries or not segment.file)
                   for segment in self.segments.values())

    def _empty_stored(self, needed: int, spared: Segment | None):
        """If one chain alone exceeds the limit, its beginning may go, if another tier has it too."""
        for segment in sorted(self.segments.values(), key=lambda segment: segment.used_ns):
            if (self.bytes + needed > self.limit and segment is not spared and segment.entries
                    and all(entry.key in self.elsewhere for entry in segment.entries)):
                self._cut(segment, 0, segment.size)

    def _cut(self, segment: Segment, floor: int, wanted: int) -> bool:
        """Cut `wanted` bytes from a segment's end, none before `floor`, unless another process writes it."""
        ends = [entry.begin for entry in segment.entries if entry.begin <= segment.size - wanted]
        return self.cut(segment, max([floor, *ends[-1:]]), segment.used_ns)

    def cut(self, segment: Segment, end: int, used_ns: int | None = None) -> bool:
        """Cut a segment at the end of a record; if none is left, delete its file, or empty it in memory.
        False if that is impossible, or it was used since `used_ns`."""
        with self.changing, suppress(OSError), segment.opened(writable=True) as descriptor, locked(
                descriptor) as mine:
            if not mine:
                return False
            self.look(segment)
            if used_ns not in (None, segment.used_ns) or end and not any(
                    end in (entry.begin, entry.end) for entry in segment.entries):
                return False
            if not segment.entries or end <= segment.entries[0].begin:
                if segment.file:
                    os.ftruncate(descriptor, 0)
                    self._forget(segment)
                    segment.forget()
                    self._resize(segment, 0)
                else:
                    os.unlink(segment.path)
                    self.drop(segment)
                    segment.forget()
                return True
            write_whole(descriptor, HEAD.pack(MAGIC, secrets.token_bytes(8)), 0)
            os.ftruncate(descriptor, end)
            os.utime(descriptor, ns=(segment.used_ns, segment.used_ns))  # cutting is not use
            self.look(segment)
            return True
        return False


def prune(folder: Path, most_bytes: int) -> int:
    """Delete the least recently used segments of a store, except those being written, until `most_bytes` are
    left; returns how many were deleted. OSError if it cannot be read."""
    tier = Tier(most_bytes, 0, 1 << 30)
    tier.look_at_folder(folder)
    before = len(tier.segments)
    tier.make_room(0)
    return before - len(tier.segments)


def listed_store(folder: Path, most_bytes: int | None = None) -> list[str]:
    """Lines that list a store's contents, after pruning it to `most_bytes`, if given. ConfigError if it
    cannot be read."""
    tier = Tier(0, 0, 0)
    pages = Counter()
    states = Counter()
    sizes = Counter()
    used_s = {}
    try:
        pruned = None if most_bytes is None else prune(folder, most_bytes)
        tier.look_at_folder(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}") from None
    for segment in tier.segments.values():
        for entry in segment.entries:
            profile = entry.key[1:17]
            (pages if entry.key == key_of(PAGE, profile, entry.key[17:]) else states)[profile] += 1
            sizes[profile] += HEADER_BYTES + entry.size
            used_s[profile] = max(used_s.get(profile, 0.0), segment.used_ns / 1e9)
    lines = [] if pruned is None else [f"{pruned:,} segments deleted"]
    lines.append(f"{folder}: {len(tier.segments):,} segments, {tier.bytes / 1e6:,.1f} MB")
    for profile in sorted(used_s, key=used_s.__getitem__, reverse=True):
        snapshots = f" and {states[profile]:,} snapshots of states" if states[profile] else ""
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(used_s[profile]))
        name = json.dumps(tier.names.get(profile, "an unnamed model"), ensure_ascii=False)[1:-1]
        lines.append(
            f"  {name}: {pages[profile] * PAGE_SIZE:,} tokens in {pages[profile]:,} pages{snapshots}, "
            f"{sizes[profile] / 1e6:,.1f} MB, last used {at}, profile {profile.hex()[:12]}")
    return lines
