"""What outlives workers of the prefixes that they cached: segments in memory, and a thread that stores them.

Workers append to segments in memory, which this process holds: they end with it, however it ends, and with
no worker. A thread copies what is new in them to --prefix-store, record by record as it is, while no answer
is computed, or where the memory would otherwise be written over. No worker ever waits for a disk to write."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.config import ranks_per_replica, store_place
from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.common.segments import (
    HEADER_BYTES, MODEL, SUFFIX, Segment, check_folder, model_record, prune, segment_paths, write_whole)
from chatlm.front.pool.local import cuda_device_count

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.segments import Record

SHARE = 0.1             # of the free memory is for prefixes, unless --prefix-memory says otherwise
STAGING_BYTES = 64 << 20  # at least, where they are stored
SEGMENTS = 32             # in memory


class Prefixes:
    """The memory of a server's prefixes, and their store. All models of a server share it: the address of a
    page says which model's it is."""

    END_S = 5.0  # the longest that the end of the server waits for the store

    def __init__(self, settings: Settings):
        """ConfigError if the store's folder cannot be used."""
        self.store, self.files = None, list[FileIO]()
        self.count = max(SEGMENTS, 4 * max(settings.num_workers, 1))
        self.bytes = memory_for(settings)
        if settings.models_memory is not None and self.bytes >= settings.models_memory:
            raise ConfigError(f"--prefix-memory {self.bytes:,}: it is part of --models-memory "
                              f"{settings.models_memory:,} and must leave some of it to the models")
        if self.bytes and not may_open(8 * self.count):
            self.bytes = 0
        place = settings.prefix_store and store_place(settings.prefix_store)
        if place and self.bytes:
            self.store = StoreWriter(check_folder(place[0]), place[1])

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the segments in memory, for processes that this one has started."""
        return tuple(f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self.files)

    @property
    def used(self) -> int:
        """Bytes of memory that it takes now."""
        return sum(os.fstat(file.fileno()).st_size for file in self.files)

    @property
    def segment_bytes(self) -> int:
        return self.bytes // self.count

    def start(self, busy: Callable[[], bool]):
        """Before the workers: get the memory, and begin to store; `busy` says whether answers are computed
        now."""
        if self.bytes and not self.files:
            self.files = [FileIO(os.memfd_create(f"prefixes {number}"), "r+") for number in range(self.count)]
        if self.store and not self.store.thread:
            self.store.start([Segment(path, path) for path in self.paths], self.segment_bytes, busy)

    async def close(self):
        """Store what is not yet stored, for at most END_S, and give the memory back."""
        if self.store:
            await asyncio.to_thread(self.store.close, self.END_S)
        for file in self.files:
            file.close()
        self.files = []

    @property
    def line(self) -> str:
        """For the start-up log; "" without any."""
        if not self.bytes:
            return ""
        stored = self.store and (f"; {self.store.folder} stores them, at most "
                                 f"{self.store.limit / 1e9:,.1f} GB (--prefix-store)")
        return (f"Prefixes outlive the workers in up to {self.bytes / 1e9:,.2f} GB of memory "
                f"(--prefix-memory){stored or ''}")

    def stats(self) -> dict:
        """What /stats shows of it."""
        store = self.store
        return {"memory_bytes": self.used, "memory_limit": self.bytes,
                "stored_pages": store.pages if store else 0, "stored_bytes": store.bytes if store else 0}


def may_open(files: int) -> bool:
    """Whether this process may have so many files open: connections come first."""
    import resource
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard == resource.RLIM_INFINITY or hard >= files


def why_none(settings: Settings) -> str:
    """Why no prefix can outlive a worker, in words; "" where they can."""
    on_gpus = settings.device_type in ("auto", "cuda") and cuda_device_count() > 0
    return ("the replicas are on Ray" if settings.ray_address else
            "a replica has several ranks (--tp, --pp)" if ranks_per_replica(settings) > 1 else
            "the KV cache is in the memory of a GPU" if on_gpus or settings.device_type == "mps" else
            "this is not Linux" if not hasattr(os, "memfd_create") else "")


def memory_for(settings: Settings) -> int:
    """Bytes of memory for prefixes, which are part of --models-memory: 0 where there is no way to keep
    any."""
    if reason := why_none(settings):
        if settings.prefix_store or settings.prefix_memory:
            flag = "--prefix-store" if settings.prefix_store else "--prefix-memory"
            log.warning("%s: no prefix is kept beyond its worker, because %s", flag, reason)
        return 0
    wanted = settings.prefix_memory
    if wanted is None and settings.command == "serve":
        whole = available_memory() if settings.models_memory is None else settings.models_memory
        wanted = int(whole * SHARE)
    return max(wanted or 0, STAGING_BYTES if settings.prefix_store else 0)


class StoreWriter:
    """Appends to a segment of its own in the store's folder what is new in the segments in memory.

    A record is written once; it is synced to the disk before anything relies on it. What fails costs the
    pages and a line in the log, and is tried again later."""

    LOOK_S = 0.5              # between two looks at the memory
    RETRY_S = 60.0            # after a failure
    BATCH_BYTES = 8 << 20     # synced together
    MOST_SEGMENTS = 512

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.segment_bytes = max(min(64 << 20, limit // 8), 1 << 20)
        self.known: dict[bytes, str] = {}    # key of a stored record -> name of its segment
        self.names: dict[bytes, str] = {}    # profile -> name of the model
        self.named: set[bytes] = set()       # those that the current segment names
        self.others: dict[str, Segment] = {}  # segments that were looked at
        self.segment: Segment | None = None  # the one it writes
        self.thread: threading.Thread | None = None
        self.stopping, self.deadline_s = threading.Event(), 0.0
        self.trouble, self.retry_s = "", 0.0
        self.pages = self.bytes = 0          # written so far

    def start(self, memory: list[Segment], memory_bytes: int, busy: Callable[[], bool]):
        """memory_bytes: of each segment in memory."""
        self.memory, self.memory_bytes, self.busy = memory, memory_bytes, busy
        self.thread = threading.Thread(target=self._run, name="prefix store", daemon=True)
        self.thread.start()

    def close(self, timeout_s: float):
        """Store the rest, for so long at most."""
        self.deadline_s = time.monotonic() + timeout_s
        self.stopping.set()
        if self.thread:
            self.thread.join(timeout_s + 0.5)

    def _run(self):
        with suppress(OSError):  # it yields to whoever computes
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
                self._leave_segment()
        self._leave_segment()

    @property
    def _may_write(self) -> bool:
        """Is nobody computing, or is half of the memory not stored yet, or is this the end?"""
        if self.stopping.is_set():
            return time.monotonic() < self.deadline_s
        behind = sum(segment.size - segment.end for segment in self.memory)
        return not self.busy() or 2 * behind > self.memory_bytes * len(self.memory)

    def _copy_news(self):
        looked = False
        for source in self.memory:
            source.restarted()
            batch: list[tuple[int, Record]] = []
            while self._may_write:
                if not looked:
                    self._look_at_others()
                    looked = True
                begin, size = source.end, 0
                for place, record in source.news():
                    if record.content == MODEL:
                        name = os.pread(source.file.fileno(), record.size, place)
                        self.names[record.profile] = name.decode(errors="replace")
                    elif record.key not in self.known:
                        batch.append((place, record))
                        size += record.size
                    if size >= self.BATCH_BYTES:
                        break
                if source.end == begin:
                    break
                try:
                    self._store(source, batch)
                except OSError:
                    source.end = begin  # it is tried again
                    raise
                batch = []

    def _look_at_others(self):
        """Know what this and other servers have stored by now, and what is gone."""
        paths = {path.name: path for path in segment_paths(self.folder)}
        for name in self.others.keys() - paths.keys():
            self.others.pop(name).file.close()
            self.known = {key: where for key, where in self.known.items() if where != name}
            if self.segment and self.segment.name == name:
                self._leave_segment()
        for name, path in paths.items():
            try:
                segment = self.others.get(name) or Segment(path, name)
            except OSError:  # another server has deleted it, or it is not ours
                continue
            self.others[name] = segment
            segment.restarted()
            self.known |= {record.key: name for _, record in segment.news()}

    def _store(self, source: Segment, batch: list[tuple[int, Record]]):
        """Append records of a segment in memory and sync them, unless it is written anew meanwhile."""
        largest = max((HEADER_BYTES + record.size for _, record in batch), default=1)
        count = max(min(64, self.segment_bytes // largest), 1)  # of records that fit into a segment together
        for first in range(0, len(batch), count):
            part = batch[first:first + count]
            target = self._writable(sum(HEADER_BYTES + record.size for _, record in part))
            before, written = target.end, False
            try:
                for profile in {record.profile for _, record in part} - self.named:
                    if name := self.names.get(profile):
                        data = model_record(profile, name)
                        write_whole(target.file.fileno(), data, target.end)
                        target.end += len(data)
                        self.named.add(profile)
                for place, record in part:
                    send_whole(target, source, place - HEADER_BYTES, HEADER_BYTES + record.size)
                if written := not source.restarted():
                    os.fdatasync(target.file.fileno())
            except EOFError:
                pass
            finally:
                if not written:
                    target.end = before
                    os.ftruncate(target.file.fileno(), before)
            if not written:
                return
            self.known |= {record.key: target.name for _, record in part}
            self.pages += len(part)
            self.bytes += target.end - before

    def _writable(self, more: int) -> Segment:
        """The segment to append so many bytes to."""
        if self.segment and self.segment.end + more > self.segment_bytes and self.segment.end > 1024:
            self._leave_segment()
        if self.segment is None:
            prune(self.folder, max(self.limit - self.segment_bytes, 0), self.MOST_SEGMENTS - 1)
            self.segment, self.named = self._begun(more) or self._new(), set()
        return self.segment

    def _begun(self, more: int) -> Segment | None:
        """A segment with room that another writer has left."""
        for path in segment_paths(self.folder):
            with suppress(OSError):
                if path.stat().st_size + more < self.segment_bytes // 2:
                    segment = Segment(path, path.name, writable=True)
                    if segment.lock() and path.exists():
                        segment.restarted()
                        for _ in segment.news():
                            pass
                        if segment.end:
                            os.ftruncate(segment.file.fileno(), segment.end)  # what its writer died over
                            return segment
                    segment.file.close()
        return None

    def _new(self) -> Segment:
        name = f"{time.time_ns():x}-{secrets.token_hex(4)}{SUFFIX}"
        os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        segment = Segment(self.folder / name, name, writable=True)
        segment.lock()
        segment.restart()
        return segment

    def _leave_segment(self):
        if self.segment:
            with suppress(OSError):  # what is not whole would be lost anyway
                os.ftruncate(self.segment.file.fileno(), self.segment.end)
            self.segment.file.close()
            self.segment = None


def send_whole(target: Segment, source: Segment, place: int, size: int):
    """Append bytes of another segment, which never pass through Python."""
    os.lseek(target.file.fileno(), target.end, os.SEEK_SET)
    while size:
        if not (count := os.sendfile(target.file.fileno(), source.file.fileno(), place, size)):
            raise EOFError("a segment in memory was written anew")
        place, size, target.end = place + count, size - count, target.end + count
