"""Which sequences run, and who gives up pages for whom. No tensors here."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import contextmanager
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Usage
from chatlm.worker.engine.background import in_background
from chatlm.worker.engine.kvcache import PagePool, PageTables

if TYPE_CHECKING:
    from chatlm.worker.engine.background import BackgroundLane
    from chatlm.worker.engine.limits import StepLimits
    from chatlm.worker.engine.sequence import Chunk, Sequence


class RunQueue:
    """The sequences that wait, and those that run: these hold pages.

    Clients share pages fairly: the one with the fewest is admitted first, the one with the most is preempted
    first. Background sequences wait until no interactive one does. Once one is admitted they are set aside:
    they keep their pages until an interactive sequence needs these. So there may be more running sequences
    than rows."""

    def __init__(self, pool: PagePool, limits: StepLimits, lane: BackgroundLane):
        self.pool = pool
        self.limits = limits
        self.lane = lane
        self.tables = PageTables(pool)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self.gates: list[Callable[[Sequence], bool]] = []   # see add_gate
        self.on_end: list[Callable[[Sequence], None]] = []  # see tell_ends_to

    def add_gate(self, must_wait: Callable[[Sequence], bool]):
        """Have a sequence that is ready wait all the same, as long as this says so."""
        self.gates.append(must_wait)

    @contextmanager
    def without_gates(self) -> Iterator[None]:
        """Meanwhile no gate keeps a ready sequence waiting."""
        gates = self.gates
        self.gates = []
        try:
            yield
        finally:
            self.gates = gates

    def tell_ends_to(self, ended: Callable[[Sequence], None]):
        """Call this with each sequence that is removed, however it ended."""
        self.on_end.append(ended)

    def gauges(self) -> dict[str, float]:
        return {"running": len(self.running), "queued": len(self.waiting), "max_batch": self.limits.max_batch,
                "preemptions": self.preemptions}

    def add(self, sequence: Sequence):
        sequence.output.added_s = time.monotonic()
        self.waiting.append(sequence)

    def cancel(self, request_id: str) -> list[Sequence]:
        """Drop a request's sequences, running or waiting, and free their pages at once."""
        gone = [s for s in (*self.running, *self.waiting) if s.work.id == request_id]
        for sequence in gone:
            self.remove(sequence)
        return gone

    def remove(self, sequence: Sequence):
        (self.running if sequence.pages else self.waiting).remove(sequence)
        sequence.finished = True
        self.tables.release(sequence)
        end_restoration(sequence)
        for ended in self.on_end:
            ended(sequence)

    def isolate(self) -> list[Sequence]:
        """After a failed step, send each running sequence back to be recomputed alone, now as a suspect.

        A sequence that ran alone, or was the only suspect, is dropped. Returns what was dropped."""
        running = list(self.running)
        blamed = [sequence for sequence in running if sequence.suspect] or running
        for sequence in (*running, *self.waiting):
            if sequence.tokens[-1] < 0:  # stands for the token that the step should have drawn
                sequence.tokens.pop()
        for sequence in reversed(running):
            self.preempt(sequence)
            sequence.suspect = True
        if len(blamed) != 1:
            return []
        self.remove(blamed[0])
        return blamed

    @property
    def unready(self) -> list[Sequence]:
        return [sequence for sequence in (*self.running, *self.waiting) if not sequence.output.ready]

    def may_run(self, sequence: Sequence) -> bool:
        """Is it prepared and, with several stages, is its last token known?"""
        return sequence.output.ready and (self.limits.stages == 1 or sequence.tokens[-1] >= 0)

    # pages of running sequences

    def grow(self, sequence: Sequence, computed: int | None = None) -> bool:
        """Give a running sequence pages for all its tokens, preempting others if needed; False if it was
        itself preempted.

        Layers with a window get pages only for the first `computed` tokens (default: all)."""
        size = self.pool.page_size
        whole = -(-len(sequence.tokens) // size)
        near = whole if computed is None else min(whole, -(-computed // size))
        while sequence.pages and (missing := self.tables.missing(sequence, whole, near)):
            if (pages := self.pool.allocate(len(missing))) is not None:
                self.tables.fill(sequence, missing, pages, near)
            else:
                self.preempt(richest(self.tables, in_background(self.running) or self.running))
        return bool(sequence.pages)

    def grow_spare(self, sequence: Sequence, count: int) -> int:
        """Give a running sequence pages for `count` more tokens, as far as nobody else needs these pages now;
        returns how many of these tokens fit."""
        groups = self.pool.groups
        length = len(sequence.tokens)
        slots = len(sequence.pages) // groups * self.pool.page_size
        while length + count > slots and self.pool.available >= groups * (len(self.running) + 1):
            sequence.pages += self.pool.take(groups)
            sequence.filled += 1
            slots += self.pool.page_size
        return min(count, slots - length)

    def preempt(self, sequence: Sequence):
        """Take a sequence's pages and put it at the head of the queue, to be recomputed from its tokens."""
        self.running.remove(sequence)
        self.tables.release(sequence)
        self.waiting.appendleft(sequence)
        end_restoration(sequence)
        self.preemptions += 1

    def advance(self, chunk: Chunk):
        """A chunk's step has started: its tokens count as computed.

        Steps run in the order they start, so a later step that finds their pages reads them once written."""
        self.tables.advance(chunk.sequence, chunk.count)

    def prepared(self, chunks: Seq[Chunk]) -> list[Chunk]:
        """The chunks of those that a later one has not preempted, with states where layers keep some."""
        chunks = [chunk for chunk in chunks if chunk.sequence.pages]
        states = self.tables.states
        return [chunk for chunk in map(states.prepare, chunks) if chunk] if states else chunks

    def catch_up(self, sequence: Sequence):
        """Skip tokens whose pages have entered the prefix index since the sequence was admitted."""
        pool = self.pool
        size = self.pool.page_size
        groups = self.pool.groups
        if self.tables.holes or pool.states or sequence.computed % size or sequence.uncached:
            return
        while (row := sequence.computed // size) < (len(sequence.tokens) - 1) // size:
            content = pool.index.get((sequence.serial, tuple(sequence.tokens[row * size:(row + 1) * size])))
            if content is None or pool.hole in content.pages:
                return
            mine = slice(row * groups, (row + 1) * groups)
            pool.exchange(sequence.pages[mine], content.pages)
            sequence.pages[mine] = content.pages
            sequence.computed += size
            sequence.serial = content.serial
            if sequence.computed <= len(sequence.work.prompt_ids):
                sequence.output.usage += Usage(cached_tokens=size)

    # admission

    def admit(self):
        """Move ready sequences from the queue into the batch while rows and pages last; suspects run alone.

        The client with the fewest pages goes first; within a client, order is kept. What is in the background
        waits for all others."""
        if not self.waiting:
            return
        ready = [sequence for sequence in self.waiting if self.may_run(sequence)]
        for must_wait in self.gates:
            ready = [sequence for sequence in ready if not must_wait(sequence)]
        while sequence := self._next(ready):
            ready.remove(sequence)
            if not self._let_in(sequence):
                return

    def _next(self, ready: Seq[Sequence]) -> Sequence | None:
        """Which of the ready sequences is to be admitted next: an interactive one, while there is one, then
        one of the client with the fewest pages in its lane. None: there is no row for it."""
        lane = [sequence for sequence in ready if not sequence.work.background] or ready
        if not lane or any(running.suspect for running in self.running):
            return None
        peers = self._peers(lane[0])
        if not self._has_row(lane[0].work.background, len(peers)):
            return None
        holdings = holdings_of(self.tables, peers)
        return min(lane, key=lambda waiting: holdings[waiting.work.params.client])

    def _has_row(self, background: bool, peers: int) -> bool:
        """May one more run in this lane, of which so many do? An interactive sequence takes the state of one
        in the background, since there are no more states than rows."""
        most = self.limits.max_batch
        count = len(self.running)
        if background:
            is_alone = peers == count
            return count < most and (is_alone or peers < self.lane.room)
        if peers < most and self.tables.states and count >= most:
            self.preempt(richest(self.tables, in_background(self.running)))
        return peers < most

    def _peers(self, sequence: Sequence) -> list[Sequence]:
        """What runs in its lane: the background, or before it."""
        return [running for running in self.running if running.work.background == sequence.work.background]

    def _let_in(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the pages of its cached prefix, and those that it lacks; False if there are
        not enough."""
        pool = self.pool
        size = self.pool.page_size
        length = len(sequence.tokens)
        chunk = self.limits.prefill_chunk
        known = sequence.cacheable
        if self.limits.of_texts:  # a step computes it whole
            chunk = size * pool.num_pages
            known = 0
        matched, serial = pool.match_prefix(sequence.tokens[:known], sequence.root)
        cached = len(matched) // pool.groups
        sequence.pages = matched
        sequence.filled = cached
        whole = -(-length // size)
        near = -(-min(length, cached * size + chunk) // size)
        missing = self.tables.missing(sequence, whole, near)
        # it may later hold more pages than it takes now
        needed = max(len(missing), pool.pages_for(length, chunk) - self.tables.held(sequence))
        if not self._make_room(sequence, needed):
            self.tables.release(sequence)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.tables.fill(sequence, missing, pool.take(len(missing)), near)
        sequence.serial = serial
        sequence.computed = cached * size
        if self.tables.states:
            self.tables.states.begin(sequence, sequence.computed)
        output = sequence.output
        if output.queued_s is None:
            output.queued_s = time.monotonic() - output.added_s
            output.usage = Usage(cached_tokens=min(sequence.computed, len(sequence.work.prompt_ids)))
        return True

    def _make_room(self, newcomer: Sequence, needed: int) -> bool:
        """Are there so many pages for it, and a page of each group for each running sequence that it could
        otherwise preempt at once? Sequences that should give up theirs for it do."""
        while True:
            peers = self._peers(newcomer)
            others = len(self.running) if newcomer.work.background else len(peers)
            headroom = others * self.pool.groups
            if needed + headroom <= self.pool.available:
                return True
            if not self._give_up_pages(newcomer, needed, headroom, peers):
                return False

    def _give_up_pages(self, newcomer: Sequence, needed: int, headroom: int, peers: Seq[Sequence]) -> bool:
        """Preempt a sequence for one that needs so many pages: the youngest of the client with the most.

        Only if that client would still hold at least as many as the newcomer's would then; one in the
        background always, if that can be enough. peers: what runs in the newcomer's lane. Returns whether it
        did."""
        if not newcomer.work.background and (background := in_background(self.running)):
            if needed + headroom > self.pool.available + sum(map(self.tables.held, background)):
                return False
            self.preempt(richest(self.tables, background))
            return True
        if not peers:
            return False
        holdings = holdings_of(self.tables, peers)
        victim = richest(self.tables, peers)
        rich = victim.work.params.client
        client = newcomer.work.params.client
        if rich == client or (holdings[rich] - self.tables.held(victim)
                              < holdings[client] + needed + self.tables.held(newcomer)):
            return False
        self.preempt(victim)
        return True


def holdings_of(tables: PageTables, sequences: Seq[Sequence]) -> Counter[str]:
    """How many pages each client's sequences hold; the client of the youngest sequence comes first."""
    holdings = Counter()
    for sequence in reversed(sequences):
        holdings[sequence.work.params.client] += tables.held(sequence)
    return holdings


def richest(tables: PageTables, sequences: Seq[Sequence]) -> Sequence:
    """The youngest of these sequences that belongs to the client that holds the most pages with them."""
    holdings = holdings_of(tables, sequences)
    rich = max(holdings, key=holdings.__getitem__)
    return next(sequence for sequence in reversed(sequences) if sequence.work.params.client == rich)


def end_restoration(sequence: Sequence):
    """End the restoration of its pages: nobody waits for them any more."""
    if sequence.restoration:
        sequence.restoration.over = True
        sequence.restoration = None
