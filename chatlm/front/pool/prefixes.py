"""Cached prefixes that outlive the workers: segments in memory, and a thread that stores them on disk.

Workers append to segments in memory. This process owns the segments. So they survive any worker, and they end
with the server, however it ends. A thread copies new records unchanged to --prefix-store while no answer is
being computed, or before the memory would be overwritten. No worker ever waits for a disk write."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence as Seq
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.config import ranks_per_replica, store_place
from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.common.segments import HEADER_BYTES, SUFFIX, Entry, Record, Segment, check_folder, locked
from chatlm.common.tiers import Tier
from chatlm.front.pool.local_devices import cuda_device_count

if TYPE_CHECKING:
    from chatlm.common.config import Settings

SHARE = 0.1               # share of the free memory for prefixes, without --prefix-memory
STAGING_BYTES = 64 << 20  # the least memory for prefixes that are stored on disk
SEGMENTS = 256            # in memory; also the most conversations that can be kept there
LEAST_SEGMENTS = 32       # if there can only be fewer, no prefixes are kept


class Prefixes:
    """The memory for a server's prefixes, and their store. All models of a server share it, since a page's
    address identifies its model."""

    END_S = 5.0  # how long the end of the server waits for the store

    def __init__(self, settings: Settings):
        """Raises ConfigError if the store's folder cannot be used."""
        self.store, self.files = None, list[FileIO]()
        self.count = segments_in_memory()
        self.bytes = memory_for(settings)
        if settings.models_memory is not None and self.bytes >= settings.models_memory:
            raise ConfigError(f"--prefix-memory {self.bytes:,} is taken from --models-memory "
                              f"{settings.models_memory:,} and must leave room for the models")
        if self.count < LEAST_SEGMENTS:  # few descriptors: connections need them more
            self.bytes = 0
        store = settings.prefix_store and store_place(settings.prefix_store)
        if store and self.bytes:
            self.store = StoreWriter(check_folder(store[0]), store[1])

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the segments in memory, for child processes."""
        return tuple(f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self.files)

    @property
    def used(self) -> int:
        """Bytes of memory in use."""
        return sum(os.fstat(file.fileno()).st_size for file in self.files)

    def start(self, busy: Callable[[], bool]):
        """Allocate the memory and begin to store. This comes before workers start. busy: are answers being
        computed?"""
        if self.bytes and not self.files:
            self.files = [FileIO(os.memfd_create(f"prefixes {number}"), "r+") for number in range(self.count)]
        if self.store and not self.store.thread:
            self.store.start([Segment(path, path, file) for path, file in zip(self.paths, self.files)],
                             self.bytes, busy)

    async def close(self):
        """Store the rest, for at most END_S, and release the memory."""
        if self.store:
            await asyncio.to_thread(self.store.close, self.END_S)
        for file in self.files:
            file.close()
        self.files = []

    @property
    def line(self) -> str:
        """The line for the start-up log; "" if no prefixes are kept."""
        if not self.bytes:
            return ""
        stored = self.store and (f"; {self.store.folder} stores them, at most "
                                 f"{self.store.limit / 1e9:,.1f} GB (--prefix-store)")
        return (f"Prefixes outlive the workers in up to {self.bytes / 1e9:,.2f} GB of memory "
                f"(--prefix-memory){stored or ''}")

    def stats(self) -> dict:
        """Its part of /stats."""
        pages, stored_bytes = (self.store.pages, self.store.bytes) if self.store else (0, 0)
        return {"memory_bytes": self.used, "memory_limit": self.bytes,
                "stored_pages": pages, "stored_bytes": stored_bytes}


def segments_in_memory() -> int:
    """How many segments there may be, since each takes a descriptor."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return SEGMENTS if hard == resource.RLIM_INFINITY else min(SEGMENTS, hard // 16)


def why_none(settings: Settings) -> str:
    """Why prefixes cannot outlive a worker; "" if they can."""
    if settings.ray_address:
        return "the replicas are on Ray"
    if ranks_per_replica(settings) > 1:
        return "a replica has several ranks (--tp, --pp)"
    on_gpus = settings.device_type in ("auto", "cuda") and cuda_device_count() > 0
    if on_gpus or settings.device_type == "mps":
        return "the KV cache is in the memory of a GPU"
    return "" if hasattr(os, "memfd_create") else "this is not Linux"


def memory_for(settings: Settings) -> int:
    """Bytes of memory for prefixes, taken from --models-memory; 0 if none can be kept."""
    reason = why_none(settings)
    if reason:
        if settings.prefix_store or settings.prefix_memory:
            flag = "--prefix-store" if settings.prefix_store else "--prefix-memory"
            log.warning("%s: prefixes do not outlive their worker, because %s", flag, reason)
        return 0
    wanted = settings.prefix_memory
    if wanted is None and settings.command == "serve":
        whole = available_memory() if settings.models_memory is None else settings.models_memory
        wanted = int(whole * SHARE)
    return max(wanted or 0, STAGING_BYTES if settings.prefix_store else 0)


class StoreWriter:
    """Copies new records from segments in memory to segments in the store's folder, the least recently used
    ones first. So if the store is full, the most recently used ones are deleted last.

    A record is written once, and synced to disk before anything relies on it. If that fails, pages are lost,
    a line is logged, and the writer tries again later."""

    LOOK_S = 0.5              # between two scans of the memory
    RETRY_S = 60.0            # after a failure
    BATCH_BYTES = 8 << 20     # synced together
    MOST_SEGMENTS = 4096
    HEAD_BYTES = 2048         # of a segment, including its model's name

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self.memory = Tier(0, 0, 0)
        self.tier = self._unscanned_tier()
        # segment in memory -> its first key, and how many of its entries are finished
        self.finished: dict[Segment, tuple[bytes, int]] = {}
        self.thread: threading.Thread | None = None
        self.stopping = threading.Event()
        self.deadline_s = 0.0
        self.trouble = ""
        self.retry_s = 0.0
        self.pages = 0  # written so far
        self.bytes = 0  # written so far

    def _unscanned_tier(self) -> Tier:
        """The store before its first scan."""
        tier = Tier(self.limit, max(min(64 << 20, self.limit // 8), 1 << 20), self.MOST_SEGMENTS)
        tier.names = self.memory.names
        return tier

    def start(self, memory: Seq[Segment], memory_bytes: int, busy: Callable[[], bool]):
        """Start the thread. memory_bytes: the limit of all segments in memory together."""
        self.memory = Tier(memory_bytes, 0, len(memory))
        self.busy = busy
        for segment in memory:
            self.memory.add(segment)
        self.tier = self._unscanned_tier()
        self.thread = threading.Thread(target=self._run, name="prefix store", daemon=True)
        self.thread.start()

    def close(self, timeout_s: float):
        """Store the rest, for at most this long."""
        self.deadline_s = time.monotonic() + timeout_s
        self.stopping.set()
        if self.thread:
            self.thread.join(timeout_s + 0.5)

    def _run(self):
        with suppress(OSError):  # the workers come first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        ended = False
        while not ended:
            ended = self.stopping.wait(self.LOOK_S)
            if time.monotonic() < self.retry_s and not ended:
                continue
            try:
                self._copy_news()
                self.trouble = ""
            except OSError as error:
                reason = error.strerror or str(error)
                if reason != self.trouble:
                    log.warning("prefixes are not stored in %s: %s", self.folder, reason)
                self.trouble, self.retry_s = reason, time.monotonic() + self.RETRY_S
                self.tier = self._unscanned_tier()

    def _may_write(self, news: Iterable[Segment]) -> bool:
        """Is no answer being computed, is half of the memory still unstored, or is the server ending?"""
        if self.stopping.is_set():
            return time.monotonic() < self.deadline_s
        behind = sum(entry.size for segment in news for entry in segment.entries[self._done(segment):])
        return not self.busy() or 2 * behind > self.memory.limit

    def _done(self, segment: Segment) -> int:
        """How many entries of a segment are finished."""
        first, count = self.finished.get(segment, (b"", 0))
        return min(count, len(segment.entries)) if segment.entries and segment.entries[0].key == first else 0

    def _copy_news(self):
        self.memory.look_at_all()
        news = [segment for segment in self.memory.segments.values()
                if self._done(segment) < len(segment.entries)]
        if news and self._may_write(news):
            self.tier.look_at_folder(self.folder)
        for source in sorted(news, key=lambda segment: segment.used_ns):
            while self._done(source) < len(source.entries) and self._may_write(news):
                done = self._done(source)
                count = self._store_some(source.entries[done:])
                self.finished[source] = source.entries[0].key, done + count
                self.memory.look(source)

    def _store_some(self, entries: Seq[Entry]) -> int:
        """Store about one batch. Each record comes after those that it continues. Returns how many entries
        are finished."""
        wanted: list[Entry] = []
        known = set[bytes]()
        size = 0
        count = 0
        for entry in entries:
            chain = self._missing(entry, known)
            wanted += chain
            known |= {each.key for each in chain}
            size += sum(each.size for each in chain)
            count += 1
            if size >= self.BATCH_BYTES:
                break
        while wanted:
            run = next_run(wanted)
            self._store(run)
            del wanted[:len(run)]
        return count

    def _missing(self, entry: Entry, known: Container[bytes]) -> list[Entry]:
        """A record and its predecessors that are not in the store; none if a predecessor is lost."""
        chain = list[Entry]()
        key = entry.key
        while key and key not in self.tier.index and key not in known:
            if key not in self.memory.index:  # newer than the last scan?
                self.memory.look_at_all()
            in_memory = self.memory.index.get(key)
            if in_memory is None:
                return []
            chain.insert(0, in_memory)
            key = in_memory.parent
        return chain

    def _store(self, run: list[Entry]):
        """Append a run of records of a segment in memory to one in the store, and sync them. If there is no
        room for all, the last ones are taken off `run`."""
        source = run[0].segment
        header = Record.unpack(os.pread(descriptor_of(source), HEADER_BYTES, run[0].begin))
        if header is None or header.key != run[0].key or (
                header.parent_key and header.parent_key not in self.tier.index):
            return  # it was cut off, or its predecessor was deleted or could not be stored
        size = run[-1].end - run[0].begin
        target = self.tier.continued_by(header, size)
        while not self.tier.make_room(size + self.HEAD_BYTES, header, target):
            if len(run) == 1:
                return
            last = run.pop()
            size -= last.end - last.begin
        for segment in (*([target] if target else []), None):
            segment = segment or self._new()
            with self.tier.writing(segment, header) as descriptor:
                if descriptor is None:
                    continue  # another server writes it
                self._copy(source, run, segment, descriptor)
            return

    def _copy(self, source: Segment, run: list[Entry], segment: Segment, descriptor: int):
        before = segment.end
        count = 0
        try:
            # the lock keeps others from cutting it: every record that is in the store must be complete
            with locked(descriptor_of(source), wait=True):
                self.memory.look(source)
                for entry in run:
                    if entry not in source.entries:
                        break
                    send_whole(descriptor, segment.end, source, entry)
                    self.tier.index[entry.key] = segment.add(entry)
                    count += 1
            os.fdatasync(descriptor)
            os.utime(descriptor, ns=(source.used_ns, source.used_ns))
            self.pages = self.pages + count
            self.bytes = self.bytes + segment.end - before
        except OSError:
            os.ftruncate(descriptor, before)
            raise

    def _new(self) -> Segment:
        name = f"{time.time_ns():x}-{secrets.token_hex(4)}{SUFFIX}"
        os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        segment = Segment(self.folder / name, name)
        self.tier.add(segment)
        return segment


def next_run(entries: Seq[Entry]) -> list[Entry]:
    """The first of these records and those that directly follow it in its segment, where each page continues
    the one before it."""
    run = [entries[0]]
    for entry in entries[1:]:
        if entry.segment is not run[-1].segment or entry.begin != run[-1].end:
            break
        run.append(entry)
    return run


def descriptor_of(segment: Segment) -> int:
    """The descriptor of a segment in memory."""
    assert segment.file
    return segment.file.fileno()


def send_whole(target: int, offset: int, source: Segment, entry: Entry):
    """Copy a record to an offset in a file, within the kernel."""
    begin = entry.begin
    os.lseek(target, offset, os.SEEK_SET)
    while begin < entry.end:
        begin += os.sendfile(target, descriptor_of(source), begin, entry.end - begin)
