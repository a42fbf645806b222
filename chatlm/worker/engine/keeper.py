"""Restores KV pages that an earlier process computed, for prompts that begin with the same tokens.

A waiting prompt is looked up by the addresses of its pages. A thread reads the kept pages that the prefix
cache lacks; the engine copies them into free pages and adds them to the prefix index, where the scheduler
finds them like any others. The prompt waits for as long as reading is ahead of computing it."""

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
from chatlm.worker.engine.copier import Addresses, Copier, PageBytes
from chatlm.worker.engine.kept import owner_address, page_address

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.common.segments import Record
    from chatlm.worker.engine.kept import KeptPages
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
    pages: list[int]         # held for it: those from the prefix cache, then the restored ones
    restores_state: bool
    began_s: float
    pages_read: int = 0      # so far, including those that the prefix cache had
    read_began_s: float = math.inf  # when the current read began; infinite while none is under way
    over: bool = False       # nobody waits for it any more
    slot: int | None = None  # with the state after its tokens
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(Reader.BATCHES))


class Pace:
    """How long computing and reading take, as measured so far: for which kept pages does it pay to wait?"""

    # a prompt waits this long, or this share of what it may save
    GRACE_S = 0.03
    GRACE_SHARE = 0.05
    OVERHEAD_S = 0.0005   # of a restoration
    MEMORY_BYTE_S = 3e-10  # to read a byte of memory

    def __init__(self, page_size: int, times: Times):
        self.page_size = page_size
        self.times = times
        self.byte_s = 1e-9  # to read a byte of the store

    def pays(self, pages: int, size: int, on_disk: bool) -> bool:
        """Would computing the pages take longer than reading their `size` bytes? Yes if nobody knows."""
        read_s = self.OVERHEAD_S + size * (self.byte_s if on_disk else self.MEMORY_BYTE_S)
        return not self.times.token_s or pages * self.page_size * self.times.token_s >= read_s

    def reads_faster(self, restoration: Restoration) -> bool:
        """Has reading brought more pages than computing would have by now?"""
        if restoration.over:
            return False
        page_s = self.page_size * self.times.token_s
        pages_s = page_s * (len(restoration.addresses) - restoration.begin)
        elapsed_s = time.monotonic() - restoration.began_s - max(self.GRACE_S, self.GRACE_SHARE * pages_s)
        computed = elapsed_s / page_s if page_s else 0.0
        return elapsed_s < 0 or restoration.pages_read - restoration.begin > computed


class Reader:
    """Threads that read kept pages ahead of the engine, and look at what other workers have stored."""

    LEAST_READ_BYTES = 1 << 20  # a smaller read does not update the measured speed
    # read ahead of the engine
    BATCHES = 32
    BATCH_BYTES = 4 << 20

    def __init__(self, kept: KeptPages, pace: Pace):
        self.kept = kept
        self.pace = pace
        self.threads = ThreadPoolExecutor(2, "prefixes")
        self.arrived: deque[tuple[Restoration, list[tuple[Record, memoryview]] | None]] = deque()
        self.news = threading.Event()
        self.look: Future | None = None  # the last scan of the store
        self.looked_s = 0.0    # when it began

    def start(self, restoration: Restoration):
        self.threads.submit(self._read, restoration)

    def wait(self, timeout_s: float):
        """Wait for something to arrive."""
        self.news.wait(timeout_s)
        self.news.clear()

    def looks(self, since_s: float) -> bool:
        """Scan the store if a scan since then is due: other workers may have added pages. Is one under way
        that a sequence should wait for?"""
        if self.looked_s < since_s:
            self.look_at_store()
        return (self.look is not None and not self.look.done()
                and time.monotonic() - self.looked_s < self.pace.GRACE_S)

    def look_at_store(self):
        """Start a scan of the store, if one is due."""
        if self.kept.may_look and (self.look is None or self.look.done()):
            self.looked_s, self.look = time.monotonic(), self.threads.submit(self.kept.look_at_store)
            self.look.add_done_callback(lambda look: self.news.set())

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
                    disk_bytes = disk_bytes + read[0].size
                    disk_s = disk_s + time.monotonic() - began_s
                if size >= self.BATCH_BYTES:
                    self._hand_over(restoration, batch)
                    batch = []
                    size = 0
            if batch:
                self._hand_over(restoration, batch)
            if disk_bytes >= self.LEAST_READ_BYTES:
                self.pace.byte_s += 0.3 * (disk_s / disk_bytes - self.pace.byte_s)
        except Exception:
            log.exception("failed to read kept pages")
        finally:
            restoration.read_began_s = math.inf
            self.arrived.append((restoration, None))
            self.news.set()

    def _hand_over(self, restoration: Restoration, batch: list[tuple[Record, memoryview]]):
        restoration.read_began_s = math.inf  # now it waits for the engine, whose steps may be long
        while not restoration.room.acquire(timeout=1.0):
            if restoration.over:
                return
        restoration.pages_read += sum(record.content == PAGE for record, _ in batch)
        self.arrived.append((restoration, batch))
        self.news.set()


class Keeper:
    """Copies contents of the prefix index to kept pages, and back."""

    STUCK_S = 5.0         # a restoration is abandoned if one read takes longer
    STEP_BYTES = 64 << 20  # copied into pages between two steps

    def __init__(self, pool: PagePool, transformer: Transformer, kept: KeptPages, times: Times):
        self.pool = pool
        self.kept = kept
        self.memory = PageBytes(transformer, pool.num_pages)
        pool.note_addresses(Addresses())
        self.pace = Pace(pool.page_size, times)
        self.reader = Reader(kept, self.pace)
        self.restorations: list[Restoration] = []
        self.counts: dict[str, int] = dict.fromkeys(
            ("restored_tokens", "restored_bytes", "kept_pages", "kept_bytes", "missed_pages"), 0)
        self.saved_s = 0.0     # computing time
        self.copier = Copier(pool, kept, self.memory, self.counts, self.reader.look_at_store)

    def gauges(self) -> dict[str, float]:
        return {**self.counts, "prefill_saved_s": round(self.saved_s, 3),
                "keeping_s": round(self.copier.spent_s, 3)}

    def begin(self, profile: Callable[[], bytes], patience_s: float):
        """Identify the weights and scan what is kept, in a thread; wait for it at most `patience_s`."""
        def learn():
            try:
                self.kept.profile = profile()
                self.kept.look_at_store()
                self.pace.byte_s = self.kept.disk_byte_s() or self.pace.byte_s
            except Exception as error:
                log.warning("prefixes are neither kept nor restored: %s", error)

        wait([self.reader.threads.submit(learn)], patience_s)

    def settle(self):
        """Keep the pages filled so far. Call it while no step is under way."""
        self._abandon_stuck()
        self.copier.copy()

    # restoring

    def awaits(self, sequence: Sequence) -> bool:
        """Should a sequence that is ready to run wait for kept pages of its prompt?"""
        if not self.kept.profile or sequence.uncached:
            return False
        if sequence.restoration is None:
            if self.reader.looks(sequence.output.added_s):
                return True
            sequence.restoration = self._start_restoring(sequence)
        return self.pace.reads_faster(sequence.restoration)

    def _start_restoring(self, sequence: Sequence) -> Restoration:
        """Start to restore the kept pages of a sequence; it is over at once if that would not pay."""
        pool = self.pool
        kept = self.kept
        size = self.pool.page_size
        tokens = sequence.tokens
        owner = sequence.root
        table, serial = pool.match_prefix(tokens, owner)
        begin = len(table) // pool.groups
        end = 0
        most = (len(tokens) - 1) // size
        address = owner_address(owner)
        addresses = []
        kept.look_at_memory()
        for row in range(most):
            address = page_address(address, tokens[row * size:(row + 1) * size])
            if row >= begin and kept.key(PAGE, address) not in kept:
                break
            addresses.append(address)
            if not pool.states or kept.key(STATE, address) in kept:
                end = row + 1
        if addresses:
            kept.use(kept.key(PAGE, addresses[-1]))
        found = Restoration(tokens[:end * size], addresses[:end], begin, serial, table, bool(pool.states),
                            time.monotonic(), begin)
        self.counts["missed_pages"] += most - max(begin, end)
        if end <= begin or not self._pays(found):
            found.over = True
            pool.release(table)
            return found
        self.restorations.append(found)
        self.reader.start(found)
        return found

    def _pays(self, found: Restoration) -> bool:
        pages = len(found.addresses) - found.begin
        size = pages * self.memory.page_bytes + found.restores_state * self.memory.state_bytes
        return self.pace.pays(pages, size, self.kept.on_disk(self.kept.key(PAGE, found.addresses[-1])))

    def adopt(self):
        """Copy arrived records into pages. No step may be under way: it might still write to these pages."""
        left = self.STEP_BYTES
        while self.reader.arrived and left > 0:
            restoration, batch = self.reader.arrived.popleft()
            for record, payload in batch or ():
                if not restoration.over:
                    left -= record.size
                    (self._adopt_state if record.content == STATE else self._adopt_page)(
                        restoration, record, payload)
            restoration.room.release()
            if batch is None:
                self._end(restoration)

    def _abandon_stuck(self):
        """If the disk does not answer, abandon all restorations, since the queued ones wait for it too."""
        if any(time.monotonic() - each.read_began_s > self.STUCK_S for each in self.restorations):
            log.warning("a kept prefix could not be read within %g s and is computed instead", self.STUCK_S)
            for restoration in [*self.restorations]:
                self._end(restoration)

    def _adopt_page(self, restoration: Restoration, record: Record, payload: memoryview):
        pool = self.pool
        size = self.pool.page_size
        row = len(restoration.pages) // pool.groups
        tokens = tuple(restoration.tokens[row * size:(row + 1) * size])
        present = [group for group in range(pool.groups) if record.groups >> group & 1]
        length = len(restoration.addresses) * size
        needed = [group for group, window in enumerate(pool.windows)
                  if row >= pool.first_seen(length, window)]
        if (record.tokens != tokens or len(payload) != len(present) * self.memory.page_bytes
                or not set(needed) <= set(present)
                or (pages := pool.allocate(len(needed))) is None):
            restoration.over = True  # the pages restored so far remain usable
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
        self.saved_s += size * self.pace.times.token_s

    def _adopt_state(self, restoration: Restoration, record: Record, payload: memoryview):
        """Copy a state into a slot, which becomes a snapshot once all pages have arrived."""
        states = self.pool.states
        if states is None or len(payload) != self.memory.state_bytes or (slot := states.allocate()) is None:
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

    def empty(self):
        """Keep new pages and abandon restorations, before the memory of the pages is freed."""
        self.settle()
        while self.copier.behind and not self.copier.waits:
            self.settle()
        for restoration in [*self.restorations]:
            self._end(restoration)
