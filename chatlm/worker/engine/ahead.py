"""Restores the prefixes that were used last before anybody asks for them, while nothing is computed.

After a start, the first prompt of each conversation would wait for its stored pages: less for the disk than
for memory, which the system has to provide for each page of a new process. Nobody's name is stored with a
page, so these prefixes wait in the prefix index below a root of their own until their owner's first prompt
claims them (`PagePool.claim`)."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.memory import available_memory
from chatlm.common.segments import HEADER_BYTES, PAGE, STATE, Record
from chatlm.worker.engine.kept_pages import page_address

if TYPE_CHECKING:
    from concurrent.futures import Future
    from chatlm.common.segments import Entry
    from chatlm.worker.engine.keeper import PageKeeper, Restoration
    from chatlm.worker.engine.kept_pages import KeptPages

Chain = tuple[list[int], list[bytes]]  # the tokens of a stored prefix, and the addresses of its pages


def ends_by_use(kept: KeptPages) -> list[bytes]:
    """The keys of the last pages of the store's segments, the most recently used one last."""
    with kept.store.changing:
        segments = sorted(kept.store.segments.values(), key=lambda segment: segment.used_ns)
        return [segment.last for segment in segments if segment.last in kept.store.index]


def read_chain(kept: KeptPages, end: bytes) -> Chain:
    """The stored prefix that ends with this page, from the headers of its records. Nothing if one of them is
    gone, cannot be read, or does not continue the one before it."""
    with kept.store.changing:
        index = kept.store.index
        entries: list[Entry] = []
        key = end
        while key and key in index and len(entries) <= len(index):
            entries.append(index[key])
            key = entries[-1].parent
    if key:
        return [], []
    tokens: list[int] = []
    addresses: list[bytes] = []
    for entry in reversed(entries):
        record = None
        with suppress(OSError), entry.segment.opened() as descriptor:
            record = Record.unpack(os.pread(descriptor, HEADER_BYTES, entry.begin))
        if record is None or record.key != entry.key:
            return [], []
        if addresses and record.address != page_address(addresses[-1], record.tokens):
            return [], []
        tokens += record.tokens
        addresses.append(record.address)
    return tokens, addresses


class Ahead:
    """Stored prefixes of a new worker, on their way into its cache."""

    SHARE = 4              # at most 1 / SHARE of the cache's pages, and none that hold anything,
    MOST_BYTES = 1 << 30   # nor more than this, or than 1 / SHARE of the memory that the system can spare
    STEP_BYTES = 4 << 20   # copied between two looks at what the front sends
    WAIT_S = 0.005         # for the disk between two looks
    REST_S = 0.1           # without a request before it goes on after one

    def __init__(self, keeper: PageKeeper):
        self.keeper = keeper
        self.ends: list[bytes] = []           # of prefixes that are left; the next one is last
        self.bytes_left = self.MOST_BYTES
        self.chain: Future[Chain] | None = None       # that a thread reads,
        self.chain_began_s = 0.0                      # and since when
        self.restoration: Restoration | None = None   # the one under way
        self.rests = False                    # has somebody asked for something since the last look?

    def find(self):
        """In a thread, once the store has been scanned: note which prefixes there are."""
        self.bytes_left = min(self.MOST_BYTES, available_memory() // self.SHARE)
        self.ends = ends_by_use(self.keeper.kept)

    @property
    def is_due(self) -> bool:
        return bool(self.ends or self.chain or self.restoration)

    @property
    def waits(self) -> bool:
        """Is there nothing to do until the disk has answered?"""
        if self.chain:
            return not self.chain.done()
        return self.restoration is not None and not self.keeper.has_arrivals

    def more(self):
        """Do a little of it. Call it while nothing is computed."""
        keeper = self.keeper
        self.rests = False
        keeper.adopt(self.STEP_BYTES)
        if keeper.abandon_stuck():
            self.stop()
        if self.restoration:
            if self.restoration in keeper.restorations:
                return
            self.restoration = None
        if self.chain and self.chain.done():
            self._start(self.chain)
            self.chain = None
        elif self.chain and time.monotonic() - self.chain_began_s > keeper.STUCK_S:
            self.stop()
        elif not self.chain and self.ends:
            self.chain_began_s = time.monotonic()
            self.chain = keeper.reader.threads.submit(read_chain, keeper.kept, self.ends.pop())
            self.chain.add_done_callback(lambda chain: keeper.reader.news.set())

    def pause(self):
        """Somebody asks for something: stop, and go on with the prefix that is under way when nobody does."""
        self.rests = True
        if self.restoration and not self.restoration.over:
            self.restoration.over = True
            self.ends.append(self.keeper.kept.key(PAGE, self.restoration.addresses[-1]))

    def stop(self):
        """Restore nothing more."""
        self.ends.clear()
        self.chain = None
        if self.restoration:
            self.restoration.over = True

    def _start(self, read: Future[Chain]):
        """Start to restore a prefix, as much of it as there is room for."""
        tokens, addresses = read.result()
        usable = min(len(addresses), self._room())
        keeper = self.keeper
        if keeper.pool.states:  # whose pages are of use only up to a stored state
            kept = keeper.kept
            while usable and kept.key(STATE, addresses[usable - 1]) not in kept:
                usable -= 1
        if usable <= 0:
            return
        self.restoration = keeper.restore_ahead(tokens[:usable * keeper.pool.page_size], addresses[:usable])
        if self.restoration:
            pages = len(self.restoration.addresses) - self.restoration.begin
            self.bytes_left -= pages * keeper.memory.page_bytes * keeper.pool.groups

    def _room(self) -> int:
        """How many pages of a prefix may be restored now. If none, no other prefix is."""
        pool = self.keeper.pool
        pages = len(pool.free) - pool.num_pages + pool.num_pages // self.SHARE
        room = min(pages, self.bytes_left // max(self.keeper.memory.page_bytes, 1)) // pool.groups
        if room <= 0:
            self.ends.clear()
        return max(room, 0)
