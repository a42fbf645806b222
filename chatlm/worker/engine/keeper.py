"""Brings back pages of the KV cache that an earlier process has computed, for prompts that begin with them.

A prompt that waits is looked up by the addresses of its pages. What is kept of it beyond the prefix
cache is read by a thread, and the engine puts what was read into free pages and the prefix index, where the
scheduler finds it like anything else. The prompt waits as long as reading is ahead of computing it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy
import torch

from chatlm.common.log import log
from chatlm.common.segments import PAGE, STATE
from chatlm.worker.engine.copier import Addresses, Copier
from chatlm.worker.engine.kept import owner_address, page_address

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.common.segments import Record
    from chatlm.worker.engine.kept import KeptPages
    from chatlm.worker.engine.kvcache import PagePool
    from chatlm.worker.engine.scheduler import Sequence
    from chatlm.worker.model.transformer import Transformer


@dataclass(eq=False)
class Restoration:
    """The kept pages of a prompt, on their way into the prefix cache."""

    tokens: list[int]        # as many as it brings, from the prompt's first
    addresses: list[bytes]   # of their pages
    begin: int               # pages that the prefix cache has
    serial: int | str        # of the last of these
    pages: list[int]         # that are held for it: those, and what it brought
    restores_state: bool
    began_s: float
    here: int = 0            # pages read so far, those that the cache had included
    moved_s: float = math.inf  # when the disk last gave something, while it is waited for
    over: bool = False       # nobody waits for it any more
    slot: int | None = None  # with the state after its tokens
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(Keeper.BATCHES))


class Keeper:
    """Copies contents of the prefix index to kept pages, and back."""

    GRACE_S, GRACE_SHARE = 0.03, 0.05  # a prompt waits so long, or such a share of what it may save
    STUCK_S = 5.0         # without a page, a restoration is given up
    BATCHES, BATCH_BYTES = 32, 4 << 20  # read ahead of the engine
    STEP_BYTES = 64 << 20  # copied into or out of pages between two steps
    OVERHEAD_S = 0.0005   # of a restoration
    LEAST_READ_BYTES = 1 << 20  # from which the speed of reading is learned

    def __init__(self, pool: PagePool, transformer: Transformer, kept: KeptPages):
        layout, memory = transformer.layout, transformer.cache
        depth = layout.size // layout.own if layout.own else 1
        pages = pool.num_pages + transformer.groups.holes
        # (layers of a page, pages, bytes): a page is a column, where its layers lie apart. As numpy's arrays:
        # torch copies with threads, which wait for each other while a step has all cores
        self.rows = (memory.view(torch.uint8).numpy().reshape(depth, pages, -1) if layout.size else
                     numpy.empty((1, pages, 0), numpy.uint8))
        self.states = [state.view(torch.uint8).numpy().reshape(len(state), -1)
                       for states in transformer.states for state in states]
        self.page_bytes = self.rows.shape[0] * self.rows.shape[2]
        self.state_bytes = sum(state.shape[1] for state in self.states)
        self.pool, self.kept = pool, kept
        pool.addresses = Addresses()
        self.reader = ThreadPoolExecutor(2, "prefixes")
        self.restorations: list[Restoration] = []
        self.arrived: deque[tuple[Restoration, list[tuple[Record, memoryview]] | None]] = deque()
        self.news = threading.Event()
        self.look: Future | None = None  # into the store, and when it began
        self.looked_s = 0.0
        self.token_s = 0.0     # of computing a token of a prompt
        self.byte_s = 1e-9     # of reading a byte of the store, as far as is known
        self.counts: dict[str, int] = dict.fromkeys(
            ("restored_tokens", "restored_bytes", "kept_pages", "kept_bytes", "missed_pages"), 0)
        self.saved_s = 0.0     # of computing
        self.copier = Copier(pool, kept, self.rows, self.states, self.counts, self._look_at_store)

    def begin(self, profile: Callable[[], bytes], patience_s: float):
        """Learn in a thread what weights these are and what is kept, and wait for it, but not for long."""
        def learn():
            try:
                self.kept.profile = profile()
                self.kept.look_at_store()
                self.byte_s = self.kept.disk_byte_s() or self.byte_s
            except Exception as error:
                log.warning("no prefix is kept or restored: %s", error)

        wait([self.reader.submit(learn)], patience_s)

    def settle(self):
        """Keep what the steps so far have filled: none of them is under way."""
        self._give_up_stuck()
        self.copier.copy()

    # restoring

    def awaits(self, sequence: Sequence) -> bool:
        """Should a sequence that may run wait a little for pages of its prompt?"""
        if not self.kept.profile:
            return False
        if sequence.restoration is None:
            if self._looking(sequence):
                return True
            sequence.restoration = self._found(sequence)
        return self._leads(sequence.restoration)

    def _looking(self, sequence: Sequence) -> bool:
        """Look once for a sequence what others have stored by now, if that is due. Is it still worth the
        wait?"""
        if self.looked_s < sequence.added_s:
            self._look_at_store()
        return (self.look is not None and not self.look.done()
                and time.monotonic() - self.looked_s < self.GRACE_S)

    def _look_at_store(self):
        """Begin to look, if that is due."""
        if self.kept.may_look and (self.look is None or self.look.done()):
            self.looked_s, self.look = time.monotonic(), self.reader.submit(self.kept.look_at_store)
            self.look.add_done_callback(lambda look: self.news.set())

    def _leads(self, restoration: Restoration) -> bool:
        """Is reading ahead of what computing would have done by now?"""
        if restoration.over:
            return False
        pages_s = self.token_s * self.pool.page_size * (len(restoration.addresses) - restoration.begin)
        elapsed_s = time.monotonic() - restoration.began_s - max(self.GRACE_S, self.GRACE_SHARE * pages_s)
        computed = elapsed_s / self.token_s / self.pool.page_size if self.token_s else 0.0
        return elapsed_s < 0 or restoration.here - restoration.begin > computed

    def _found(self, sequence: Sequence) -> Restoration:
        """Begin to restore what is kept of a sequence's tokens; it is over where nothing is worth it."""
        pool, kept, size = self.pool, self.kept, self.pool.page_size
        tokens, owner = sequence.tokens, sequence.root
        table, serial = pool.match_prefix(tokens, owner)
        begin, end, most = len(table) // pool.groups, 0, (len(tokens) - 1) // size
        address, addresses = owner_address(owner), []
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
        if end <= begin or not self._worthwhile(found):
            found.over = True
            pool.release(table)
            return found
        self.restorations.append(found)
        self.reader.submit(self._read, found)
        return found

    def _worthwhile(self, restoration: Restoration) -> bool:
        """Would computing take longer than reading?"""
        pages = len(restoration.addresses) - restoration.begin
        size = pages * self.page_bytes + restoration.restores_state * self.state_bytes
        on_disk = self.kept.on_disk(self.kept.key(PAGE, restoration.addresses[-1]))
        read_s = self.OVERHEAD_S + size * (self.byte_s if on_disk else 3e-10)
        return pages * self.pool.page_size * self.token_s >= read_s

    def _read(self, restoration: Restoration):
        """In a thread: read its records, in batches, as far as the engine has put them into pages."""
        try:
            batch, size, disk_bytes, disk_s = [], 0, 0, 0.0
            keys = [self.kept.key(PAGE, address) for address in restoration.addresses[restoration.begin:]]
            if restoration.restores_state:  # first: without it the pages are of no use
                keys.insert(0, self.kept.key(STATE, restoration.addresses[-1]))
            for key in keys:
                on_disk, began_s = self.kept.on_disk(key), time.monotonic()
                restoration.moved_s = began_s
                if restoration.over or (read := self.kept.read(key)) is None:
                    break
                batch.append(read)
                size += read[0].size
                if on_disk:
                    disk_bytes, disk_s = disk_bytes + read[0].size, disk_s + time.monotonic() - began_s
                if size >= self.BATCH_BYTES:
                    self._hand_over(restoration, batch)
                    batch, size = [], 0
            if batch:
                self._hand_over(restoration, batch)
            if disk_bytes >= self.LEAST_READ_BYTES:
                self.byte_s += 0.3 * (disk_s / disk_bytes - self.byte_s)
        except Exception:
            log.exception("failed to read kept pages")
        finally:
            restoration.moved_s = math.inf
            self.arrived.append((restoration, None))
            self.news.set()

    def _hand_over(self, restoration: Restoration, batch: list[tuple[Record, memoryview]]):
        restoration.moved_s = math.inf  # the engine is waited for, whose steps may be long
        while not restoration.room.acquire(timeout=1.0):
            if restoration.over:
                return
        restoration.here += sum(record.content == PAGE for record, _ in batch)
        self.arrived.append((restoration, batch))
        self.news.set()

    def wait(self, timeout_s: float):
        """Wait for something to arrive."""
        self.news.wait(timeout_s)
        self.news.clear()

    def adopt(self):
        """Put what has arrived into pages: no step is under way, which might still write to one of these."""
        left = self.STEP_BYTES
        while self.arrived and left > 0:
            restoration, batch = self.arrived.popleft()
            for record, payload in batch or ():
                if not restoration.over:
                    left -= record.size
                    (self._adopt_state if record.content == STATE else self._adopt_page)(
                        restoration, record, payload)
            restoration.room.release()
            if batch is None:
                self._end(restoration)

    def _give_up_stuck(self):
        """Where the disk does not answer, forget all restorations: those that wait for their turn too."""
        if any(time.monotonic() - each.moved_s > self.STUCK_S for each in self.restorations):
            log.warning("a kept prefix could not be read in %g s: it is computed", self.STUCK_S)
            for restoration in [*self.restorations]:
                self._end(restoration)

    def _adopt_page(self, restoration: Restoration, record: Record, payload: memoryview):
        pool, size = self.pool, self.pool.page_size
        row = len(restoration.pages) // pool.groups
        tokens = tuple(restoration.tokens[row * size:(row + 1) * size])
        there = [group for group in range(pool.groups) if record.groups >> group & 1]
        length = len(restoration.addresses) * size
        needed = [group for group, window in enumerate(pool.windows)
                  if row >= pool.first_seen(length, window)]
        if (record.tokens != tokens or len(payload) != len(there) * self.page_bytes
                or not set(needed) <= set(there)
                or (pages := pool.allocate(len(needed))) is None):
            restoration.over = True  # what it has brought so far may still be used
            return
        parts = numpy.asarray(payload, numpy.uint8).reshape(
            len(there), self.rows.shape[0], self.rows.shape[2])
        table = [pool.hole] * pool.groups
        for group, page in zip(needed, pages):
            self.rows[:, page] = parts[there.index(group)]
            table[group] = page
        restoration.serial = pool.register(restoration.serial, tokens, table)
        restoration.pages += table
        self.counts["restored_tokens"] += size
        self.counts["restored_bytes"] += len(payload)
        self.saved_s += size * self.token_s

    def _adopt_state(self, restoration: Restoration, record: Record, payload: memoryview):
        """Into a slot that becomes a snapshot once the pages are here."""
        states = self.pool.states
        if states is None or len(payload) != self.state_bytes or (slot := states.allocate()) is None:
            restoration.over = True
            return
        data, begin = numpy.asarray(payload, numpy.uint8), 0
        for state in self.states:
            state[slot] = data[begin:begin + state.shape[1]]
            begin += state.shape[1]
        restoration.slot = slot

    def _end(self, restoration: Restoration):
        """All of it has arrived, or it is given up: the prefix cache keeps what came."""
        if restoration not in self.restorations:
            return
        self.restorations.remove(restoration)
        restoration.over, states = True, self.pool.states
        if states and restoration.slot is not None:
            if len(restoration.pages) == len(restoration.addresses) * self.pool.groups:
                states.keep(restoration.serial, restoration.slot, None)
            states.release(restoration.slot)
        self.pool.release(restoration.pages)

    def empty(self):
        """Before the memory of pages is given back: keep what is new, and forget what is on its way."""
        self.settle()
        while self.copier.behind and not self.copier.waits:
            self.settle()
        for restoration in [*self.restorations]:
            self._end(restoration)
