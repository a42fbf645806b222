"""Keeps KV pages for later processes, and restores those of earlier ones for prompts that begin alike.

A waiting prompt is looked up by the addresses of its pages. A thread reads the kept pages that the prefix
cache lacks. The engine copies them into free pages and adds them to the prefix index, where the scheduler
finds them like any others. The prompt waits as long as reading is ahead of computing."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatlm.common.log import log
from chatlm.common.segments import PAGE, STATE
from chatlm.worker.engine.ahead import Ahead
from chatlm.worker.engine.copier import Addresses, Copier, PageBytes
from chatlm.worker.engine.kept_pages import owner_address, page_address

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.common.segments import Record
    from chatlm.worker.engine.kept_pages import KeptPages
    from chatlm.worker.engine.kvcache import PagePool
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.engine.times import Times
    from chatlm.worker.model.transformer import Transformer


@dataclass(eq=False)
class Restoration:
    """The kept pages of a prompt, on their way into the prefix cache."""

    tokens: list[int]        # the prompt's tokens, as far as its pages are kept
    addresses: list[bytes]   # of their pages
    begin: int               # how many of these pages the prefix cache had
    serial: int | str        # of the last content restored so far
    pages: list[int]         # that it holds: those from the prefix cache, then the restored ones
    restores_state: bool     # also the state after the last page?
    began_s: float
    pages_read: int = 0      # so far, including those that the prefix cache had
    ahead: bool = False      # has nobody asked for it?
    read_began_s: float = math.inf  # when the current read began; infinite while none is under way
    over: bool = False       # does nobody wait for it any more?
    slot: int | None = None  # with the state after its tokens
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(PageReader.BATCHES))


class Pace:
    """Whether it pays to wait for kept pages, by how long computing and reading have taken so far."""

    GRACE_S = 0.03         # a prompt waits this long in any case,
    GRACE_SHARE = 0.05     # or this share of the time that it may save
    OVERHEAD_S = 0.0005    # of a restoration
    MEMORY_BYTE_S = 3e-10  # to read a byte of memory

    def __init__(self, page_size: int, times: Times):
        self.page_size = page_size
        self.times = times
        self.byte_s = 1e-9  # to read a byte of the store

    def pays(self, pages: int, size: int, on_disk: bool) -> bool:
        """Would computing the pages take longer than reading their `size` bytes? Yes if nobody knows."""
        token_s = self.times.token_s
        if not token_s:
            return True
        read_s = self.OVERHEAD_S + size * (self.byte_s if on_disk else self.MEMORY_BYTE_S)
        return pages * self.page_size * token_s >= read_s

    def note_disk(self, byte_s: float):
        """The disk has been measured before anything was read from it."""
        self.byte_s = byte_s

    def note_read(self, nbytes: int, seconds: float):
        """So many bytes were read from the disk."""
        self.byte_s += 0.3 * (seconds / nbytes - self.byte_s)

    def reads_faster(self, restoration: Restoration) -> bool:
        """Has reading brought more pages than computing would have by now?"""
        if restoration.over:
            return False
        page_s = self.page_size * self.times.token_s
        pages_s = page_s * (len(restoration.addresses) - restoration.begin)
        grace_s = max(self.GRACE_S, self.GRACE_SHARE * pages_s)
        elapsed_s = time.monotonic() - restoration.began_s - grace_s
        if elapsed_s < 0:
            return True
        computed = elapsed_s / page_s if page_s else 0.0  # pages that computing would have brought
        return restoration.pages_read - restoration.begin > computed


class PageReader:
    """Threads that read kept pages ahead of the engine, and look at what other workers have stored."""

    LEAST_READ_BYTES = 1 << 20  # a smaller read does not update the measured speed
    BATCHES = 32            # read ahead of the engine,
    BATCH_BYTES = 2 << 20   # of at least so many bytes each; in all as many as the engine copies after a step

    def __init__(self, kept: KeptPages, pace: Pace):
        self.kept = kept
        self.pace = pace
        self.threads = ThreadPoolExecutor(2, "prefixes")
        # records that were read; None: there are no more of this restoration
        self.arrived: deque[tuple[Restoration, list[tuple[Record, memoryview]] | None]] = deque()
        self.news = threading.Event()
        self.scan: Future | None = None  # the last one of the store
        self.scanned_s = 0.0             # when it began

    def start(self, restoration: Restoration):
        self.threads.submit(self._read, restoration)

    def wait(self, timeout_s: float):
        """Wait for something to arrive."""
        self.news.wait(timeout_s)
        self.news.clear()

    def is_scanning(self, since_s: float) -> bool:
        """Scan the store unless that was done since then: other workers may have added pages. Is a scan under
        way that a sequence should wait for?"""
        if self.scanned_s < since_s:
            self.scan_store()
        if self.scan is None or self.scan.done():
            return False
        return time.monotonic() - self.scanned_s < self.pace.GRACE_S

    def scan_store(self):
        """Start a scan of the store, if one is due."""
        if self.kept.may_look and (self.scan is None or self.scan.done()):
            self.scanned_s = time.monotonic()
            self.scan = self.threads.submit(self.kept.look_at_store)
            self.scan.add_done_callback(lambda scan: self.news.set())

    def _read(self, restoration: Restoration):
        """In a thread: read its records in batches, at most BATCHES ahead of the engine."""
        try:
            batch = []
            size = 0
            disk_bytes = 0
            disk_s = 0.0
            keys = [self.kept.key(PAGE, address) for address in restoration.addresses[restoration.begin:]]
            if restoration.restores_state:  # first: the pages are useless without it
                keys.insert(0, self.kept.key(STATE, restoration.addresses[-1]))
            for key in keys:
                on_disk = self.kept.on_disk(key)
                began_s = time.monotonic()
                restoration.read_began_s = began_s
                if restoration.over or (read := self.kept.read(key)) is None:
                    break
                batch.append(read)
                size += read[0].size
                if on_disk:
                    disk_bytes += read[0].size
                    disk_s += time.monotonic() - began_s
                if size >= self.BATCH_BYTES:
                    self._hand_over(restoration, batch)
                    batch = []
                    size = 0
            if batch:
                self._hand_over(restoration, batch)
            if disk_bytes >= self.LEAST_READ_BYTES:
                self.pace.note_read(disk_bytes, disk_s)
        except Exception:
            log.exception("failed to read kept pages")
        finally:
            restoration.read_began_s = math.inf
            self.arrived.append((restoration, None))
            self.news.set()

    def _hand_over(self, restoration: Restoration, batch: list[tuple[Record, memoryview]]):
        """Give a batch to the engine, once it has taken enough of those before it."""
        restoration.read_began_s = math.inf  # now it waits for the engine, whose steps may be long
        while not restoration.room.acquire(timeout=1.0):
            if restoration.over:
                return
        restoration.pages_read += sum(record.content == PAGE for record, _ in batch)
        self.arrived.append((restoration, batch))
        self.news.set()


class PageKeeper:
    """Copies contents of the prefix index to kept pages, and back."""

    STUCK_S = 5.0         # a restoration is abandoned if one read takes longer
    STEP_BYTES = 64 << 20  # copied into pages between two steps

    def __init__(self, pool: PagePool, transformer: Transformer, kept: KeptPages, times: Times):
        self.pool = pool
        self.kept = kept
        self.memory = PageBytes(transformer, pool.num_pages)
        self.addresses = Addresses()
        pool.note_addresses(self.addresses)
        self.pace = Pace(pool.page_size, times)
        self.reader = PageReader(kept, self.pace)
        self.restorations: list[Restoration] = []
        self.counts: dict[str, int] = dict.fromkeys(
            ("restored_tokens", "restored_bytes", "kept_pages", "kept_bytes", "missed_pages"), 0)
        self.saved_s = 0.0     # computing time
        self.copier = Copier(pool, kept, self.memory, self.counts, self.reader.scan_store)
        self.ahead = Ahead(self)

    def gauges(self) -> dict[str, float]:
        return {**self.counts, "prefill_saved_s": round(self.saved_s, 3),
                "keeping_s": round(self.copier.spent_s, 3)}

    def begin(self, profile: Callable[[], bytes], patience_s: float):
        """Identify the weights and scan what is kept, in a thread; wait for it at most `patience_s`."""
        def identify():
            try:
                self.kept.use_profile(profile())
                self.kept.look_at_store()
                byte_s = self.kept.disk_byte_s()
                if byte_s:
                    self.pace.note_disk(byte_s)
                self.ahead.find()
            except Exception as error:
                log.warning("prefixes are neither kept nor restored: %s", error)

        wait([self.reader.threads.submit(identify)], patience_s)

    @property
    def is_behind(self) -> bool:
        """Are there pages to keep, and no failure that prevents it?"""
        return self.copier.behind

    @property
    def waits_for_store(self) -> bool:
        return self.copier.waits

    @property
    def has_arrivals(self) -> bool:
        """Have pages been read that `adopt` can take over?"""
        return bool(self.reader.arrived)

    def wait(self, timeout_s: float):
        """Wait for something to be read."""
        self.reader.wait(timeout_s)

    def settle(self):
        """Keep the pages filled so far. Call it while no step is under way."""
        self.abandon_stuck()
        self.copier.copy()

    # restoring

    def awaits(self, sequence: Sequence) -> bool:
        """Should a sequence that is ready to run wait for kept pages of its prompt?"""
        self.pool.claim(sequence.tokens, sequence.root)
        if not self.kept.profile or sequence.uncached:
            return False
        if sequence.restoration is None:
            if self.reader.is_scanning(sequence.output.added_s):
                return True
            sequence.restoration = self._start_restoring(sequence)
        return self.pace.reads_faster(sequence.restoration)

    def _start_restoring(self, sequence: Sequence) -> Restoration:
        """Start to restore the kept pages of a sequence. It is over at once if that would not pay."""
        pool = self.pool
        size = pool.page_size
        table, serial = pool.match_prefix(sequence.tokens, sequence.root)
        cached = len(table) // pool.groups
        addresses, usable = self._kept_addresses(sequence, cached)
        if addresses:
            self.kept.use(self.kept.key(PAGE, addresses[-1]))
        restoration = Restoration(
            sequence.tokens[:usable * size], addresses[:usable], cached, serial, table, bool(pool.states),
            time.monotonic(), cached)
        self.counts["missed_pages"] += (len(sequence.tokens) - 1) // size - max(cached, usable)
        if usable <= cached or not self._pays(restoration):
            restoration.over = True
            pool.release(table)
            return restoration
        self._start(restoration)
        return restoration

    def _start(self, restoration: Restoration):
        """Read its pages in a thread, while another one provides the memory that they will probably take."""
        self.restorations.append(restoration)
        self.reader.start(restoration)
        pool = self.pool
        count = (len(restoration.addresses) - restoration.begin) * pool.groups
        pages = pool.free[::-1][:count]
        self.reader.threads.submit(self.memory.provide, pages, lambda: restoration.over)

    def restore_ahead(self, tokens: list[int], addresses: list[bytes]) -> Restoration | None:
        """Start to restore a prefix that nobody has asked for; None if the cache has it."""
        pool = self.pool
        table, serial = pool.match_prefix([*tokens, 0], self.addresses.root_of(addresses[0]))
        cached = len(table) // pool.groups
        if cached >= len(addresses):
            pool.release(table)
            return None
        restoration = Restoration(tokens, addresses, cached, serial, table, bool(pool.states),
                                  time.monotonic(), cached, ahead=True)
        self._start(restoration)
        return restoration

    def _kept_addresses(self, sequence: Sequence, cached: int) -> tuple[list[bytes], int]:
        """The addresses of a prompt's pages, as far as they are cached or kept, and how many of these pages
        can be used: with states, those up to the last state."""
        kept = self.kept
        size = self.pool.page_size
        kept.look_at_memory()
        address = owner_address(sequence.root)
        addresses: list[bytes] = []
        usable = 0
        for row in range((len(sequence.tokens) - 1) // size):
            address = page_address(address, sequence.tokens[row * size:(row + 1) * size])
            if row >= cached and kept.key(PAGE, address) not in kept:
                break
            addresses.append(address)
            if not self.pool.states or kept.key(STATE, address) in kept:
                usable = row + 1
        return addresses, usable

    def _pays(self, restoration: Restoration) -> bool:
        pages = len(restoration.addresses) - restoration.begin
        size = pages * self.memory.page_bytes + restoration.restores_state * self.memory.state_bytes
        on_disk = self.kept.on_disk(self.kept.key(PAGE, restoration.addresses[-1]))
        return self.pace.pays(pages, size, on_disk)

    def adopt(self, most_bytes: int = STEP_BYTES):
        """Copy arrived records into pages. No step may be under way: it might still write to these pages."""
        left = most_bytes
        while self.reader.arrived and left > 0:
            restoration, batch = self.reader.arrived.popleft()
            for record, payload in batch or ():
                if restoration.over:
                    continue
                left -= record.size
                if record.content == STATE:
                    self._adopt_state(restoration, payload)
                else:
                    self._adopt_page(restoration, record, payload)
                self.kept.reuse(payload)
            restoration.room.release()
            if batch is None:
                self._end(restoration)

    def abandon_stuck(self) -> bool:
        """If the disk does not answer, abandon all restorations, since the queued ones wait for it too."""
        if not any(time.monotonic() - each.read_began_s > self.STUCK_S for each in self.restorations):
            return False
        log.warning("a kept prefix could not be read within %g s and is computed instead", self.STUCK_S)
        for restoration in [*self.restorations]:
            self._end(restoration)
        return True

    def _adopt_page(self, restoration: Restoration, record: Record, payload: memoryview):
        """Copy the next page of a prompt. If it cannot be used, the pages restored so far remain usable."""
        pool = self.pool
        size = pool.page_size
        row = len(restoration.pages) // pool.groups
        tokens = tuple(restoration.tokens[row * size:(row + 1) * size])
        present = [group for group in range(pool.groups) if record.groups >> group & 1]
        length = len(restoration.addresses) * size
        needed = [group for group, window in enumerate(pool.windows)
                  if row >= pool.first_seen(length, window)]
        fits = (record.tokens == tokens and len(payload) == len(present) * self.memory.page_bytes
                and set(needed) <= set(present))
        pages = pool.allocate(len(needed)) if fits else None
        if pages is None:
            restoration.over = True
            return
        parts = self.memory.parts(payload, len(present))
        table = [pool.hole] * pool.groups
        for group, page in zip(needed, pages):
            self.memory.rows[:, page] = parts[present.index(group)]
            table[group] = page
        restoration.serial = pool.register(restoration.serial, tokens, table)
        restoration.pages += table
        self.counts["restored_tokens"] += size
        self.counts["restored_bytes"] += len(payload)
        if not restoration.ahead:
            self.saved_s += size * self.pace.times.token_s

    def _adopt_state(self, restoration: Restoration, payload: memoryview):
        """Copy a state into a slot, which becomes a snapshot once all pages have arrived."""
        states = self.pool.states
        slot = states.allocate() if states and len(payload) == self.memory.state_bytes else None
        if slot is None:
            restoration.over = True
            return
        self.memory.put_state(slot, payload)
        restoration.slot = slot

    def _end(self, restoration: Restoration):
        """End a restoration, complete or abandoned; what has arrived stays in the prefix cache."""
        if restoration not in self.restorations:
            return
        self.restorations.remove(restoration)
        restoration.over = True
        states = self.pool.states
        if states and restoration.slot is not None:
            if len(restoration.pages) == len(restoration.addresses) * self.pool.groups:
                states.keep(restoration.serial, restoration.slot, None)
            states.release(restoration.slot)
        self.pool.release(restoration.pages)
        if not self.restorations:
            self.kept.spare.clear()

    def empty(self):
        """Keep new pages and abandon restorations, before the memory of the pages is freed."""
        self.ahead.stop()
        self.settle()
        while self.copier.behind and not self.copier.waits:
            self.settle()
        for restoration in [*self.restorations]:
            self._end(restoration)
