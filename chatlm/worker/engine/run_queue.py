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
    """The sequences that wait, and those that run: only these hold pages.

    Clients share pages fairly: the one with the fewest is admitted first, the one with the most is preempted
    first. Background sequences wait until no interactive one does. Those that run are set aside when an
    interactive one is admitted: they keep their pages until it needs them. So more sequences may run than a
    step has rows."""

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
        """Drop a request's sequences, running or waiting, and free their pages at once; returns them. What
        was computed of their prompts stays cached."""
        dropped = [s for s in (*self.running, *self.waiting) if s.work.id == request_id]
        for sequence in dropped:
            if self.tables.states:
                self.tables.states.keep_cut(sequence)
            self.remove(sequence)
        return dropped

    def remove(self, sequence: Sequence):
        if sequence.pages:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.finished = True
        self.tables.release(sequence)
        sequence.end_restoration()
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
            pages = self.pool.allocate(len(missing))
            if pages is not None:
                self.tables.fill(sequence, missing, pages, near)
            else:
                self.preempt(self._richest(in_background(self.running) or self.running))
        return bool(sequence.pages)

    def grow_spare(self, sequence: Sequence, count: int) -> int:
        """Give a running sequence pages for up to `count` more tokens, without taking any that others need
        now; returns how many of these tokens fit."""
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
        sequence.end_restoration()
        self.preemptions += 1

    def advance(self, chunk: Chunk):
        """Count the tokens of a chunk whose step has started as computed. A later step may read their pages
        at once: steps run in the order in which they start."""
        self.tables.advance(chunk.sequence, chunk.count)

    def prepared(self, chunks: Seq[Chunk]) -> list[Chunk]:
        """The chunks whose sequences have not been preempted since, with the slots of their states where
        layers keep some."""
        chunks = [chunk for chunk in chunks if chunk.sequence.pages]
        states = self.tables.states
        if not states:
            return chunks
        return [chunk for chunk in map(states.prepare, chunks) if chunk]

    def catch_up(self, sequence: Sequence):
        """Skip tokens whose pages have entered the prefix index since the sequence was admitted."""
        pool = self.pool
        size = self.pool.page_size
        groups = self.pool.groups
        if self.tables.holes or pool.states or sequence.computed % size or sequence.uncached:
            return
        if not sequence.shares_pages:  # its serial is that of the prefix with which it began
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
        """The ready sequence to admit next, of the client with the fewest pages: an interactive one while
        there is one. None if there is no row for it."""
        lane = [sequence for sequence in ready if not sequence.work.background] or ready
        if not lane or any(running.suspect for running in self.running):
            return None
        peers = self._peers(lane[0])
        if not self._has_row(lane[0].work.background, len(peers)):
            return None
        holdings = self._holdings(peers)
        return min(lane, key=lambda waiting: holdings[waiting.work.params.client])

    def _has_row(self, background: bool, peers: int) -> bool:
        """May one more sequence run in this lane, beside `peers` others? There are no more states than rows,
        so an interactive sequence may take the state of one in the background."""
        most = self.limits.max_batch
        count = len(self.running)
        if background:
            is_alone = peers == count
            return count < most and (is_alone or peers < self.lane.room)
        if peers >= most:
            return False
        if self.tables.states and count >= most:
            self.preempt(self._richest(in_background(self.running)))
        return True

    def _peers(self, sequence: Sequence) -> list[Sequence]:
        """The running sequences in its lane: the interactive ones, or those in the background."""
        return [running for running in self.running if running.work.background == sequence.work.background]

    def _let_in(self, sequence: Sequence) -> bool:
        """Run a waiting sequence: give it the pages of its cached prefix, and those that it lacks. False if
        there are not enough."""
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
        needed = max(len(missing), pool.pages_for(length, chunk) - self.tables.held_pages(sequence))
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
        """Have sequences give up pages that a newcomer should have, until `needed` pages are available and,
        for each running sequence that it would otherwise preempt at once, a page of each group. False if
        there are not enough."""
        while True:
            peers = self._peers(newcomer)
            others = len(self.running) if newcomer.work.background else len(peers)
            headroom = others * self.pool.groups
            if needed + headroom <= self.pool.available:
                return True
            if not self._give_up_pages(newcomer, needed, headroom, peers):
                return False

    def _give_up_pages(self, newcomer: Sequence, needed: int, headroom: int, peers: Seq[Sequence]) -> bool:
        """Preempt the youngest sequence of the client with the most pages, for a newcomer that needs so many;
        False if none should give way. peers: what runs in the newcomer's lane.

        One in the background gives way to an interactive newcomer if that can be enough. A peer does only if
        its client then still holds at least as many pages as the newcomer's client."""
        background = [] if newcomer.work.background else in_background(self.running)
        if background:
            if needed + headroom > self.pool.available + sum(map(self.tables.held_pages, background)):
                return False
            self.preempt(self._richest(background))
            return True
        if not peers:
            return False
        holdings = self._holdings(peers)
        victim = self._richest(peers)
        rich = victim.work.params.client
        client = newcomer.work.params.client
        left = holdings[rich] - self.tables.held_pages(victim)
        if rich == client or left < holdings[client] + needed + self.tables.held_pages(newcomer):
            return False
        self.preempt(victim)
        return True

    def _holdings(self, sequences: Seq[Sequence]) -> Counter[str]:
        """How many pages each client's sequences hold; the client of the youngest sequence comes first."""
        holdings = Counter()
        for sequence in reversed(sequences):
            holdings[sequence.work.params.client] += self.tables.held_pages(sequence)
        return holdings

    def _richest(self, sequences: Seq[Sequence]) -> Sequence:
        """The youngest of these sequences of the client that holds the most pages with them."""
        holdings = self._holdings(sequences)
        rich = max(holdings, key=holdings.__getitem__)
        return next(sequence for sequence in reversed(sequences) if sequence.work.params.client == rich)
