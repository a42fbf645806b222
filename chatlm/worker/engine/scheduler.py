"""What the next step computes; no tensors here."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Usage
from chatlm.worker.engine.background import BackgroundLane, in_background
from chatlm.worker.engine.kvcache import PagePool, PageTables
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.sequence import Chunk, Sequence, is_uncached
from chatlm.worker.engine.times import Times

if TYPE_CHECKING:
    from chatlm.worker.engine.drafts import Drafting
    from chatlm.worker.engine.keeper import Keeper


# While the same model writes answers: seconds between two steps that embed texts, and about how long one is
TEXTS_S, TEXT_STEP_S = 2.0, 0.1


class Scheduler:
    """Continuous batching: which tokens of which sequences the next step computes.

    Clients share pages fairly: the one with the fewest is admitted first, the one with the most is preempted
    first. Decode rows come before prefill. Half of `prefill_chunk` goes to the oldest prompt, so that it
    never starves; the rest goes to the shortest prompts, so that a long one never stalls them.

    Background sequences wait until no interactive one does. Once one is admitted they are set aside: they
    keep their pages until an interactive sequence needs these, and a step has only as many of their tokens
    as hardly lengthen it (`BackgroundLane`). So there may be more running sequences than rows."""

    def __init__(self, pool: PagePool, limits: StepLimits, times: Times | None = None,
                 lane: BackgroundLane | None = None):
        """times: what was measured of steps; lane: how much of a step the background may have."""
        self.pool, self.limits = pool, limits
        self.times = times or Times()
        self.lane = lane or BackgroundLane()
        self.tables = PageTables(pool)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []      # in order of admission
        self.preemptions = 0
        self.texts_s = 0.0                     # when a step last embedded texts
        self.keeper: Keeper | None = None
        self.drafting: Drafting | None = None

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
        if self.drafting:
            self.drafting.end(sequence)

    def schedule(self) -> list[Chunk]:
        """Plan the next step: a one-token chunk for each decoding sequence, then chunks of prompts.

        A sequence is left out if the token being drawn brings it to its limit, or in the background."""
        self._admit()
        background = in_background(self.running)
        beside = background if len(background) < len(self.running) else []  # interactive sequences
        if beside != background and self.lane.must_wait():
            return []
        lane = [s for s in self.running if not s.work.background] if beside else self.running
        answers = [s for s in lane if not s.pooling]
        if len(answers) < len(lane) and (texts := self._texts_now(answers, lane)) is not None:
            return texts
        share = -(-sum(s.pending == 1 for s in answers) // self.limits.stages)
        able = [s for s in answers if s.decodes and len(s.tokens) < s.limit and self._may_run(s)]
        grown = [s for s in able[:share] if self._grow(s)]
        answers = [s for s in answers if s.pages]  # without those that were preempted for others' pages
        decoding = [s for s in grown if s.pages]
        prefilling = [s for s in answers if s.prefilling]
        plan = list[Chunk]()
        room = 0 if prefilling and not self.limits.exact_rows else self.limits.draft_rows - len(answers)
        for sequence in decoding:
            draft = self._draft(sequence, room) if sequence.draft.tokens else ()
            plan.append(Chunk(sequence, 1, 1 + len(draft), draft))
            room -= len(draft)
        if prefilling:
            most = self.limits.prefill_chunk
            if background and not beside:  # nobody waits for the step
                most = self.lane.prompt_tokens(self.times, len(plan), most)
            rows = sum(chunk.draws for chunk in plan)
            plan += self._share_prefill(prefilling, self.limits.max_rows - rows, most)
        return prepared(self.tables, [*plan, *self._plan_beside(plan, beside)])

    def _plan_beside(self, plan: Seq[Chunk], background: Seq[Sequence]) -> list[Chunk]:
        """Chunks of background sequences that hardly lengthen a step with a plan of interactive ones: a token
        of each in order of admission, then pieces of prompts."""
        rows, drafted = sum(chunk.draws for chunk in plan), any(chunk.draft for chunk in plan)
        if self.limits.stages > 1 or not background or not plan:
            return []
        # drafts are checked only in steps of few rows if rows are not exact, and without prompts
        few = drafted and not self.limits.exact_rows
        most = (self.limits.draft_rows if few else self.limits.max_rows) - rows
        times = self.times.of(any(chunk.on_host for chunk in plan))
        tokens = sum(chunk.count + len(chunk.draft) for chunk in plan)
        room = self.lane.room_beside(times, tokens, max(min(most, self.limits.max_batch), 0))
        chunks, pieces = list[Chunk](), list[Sequence]()
        for sequence in filter(self.lane.joins, background if room else ()):  # a few of many
            if sequence.prefilling:
                pieces.append(sequence)
            elif sequence.pending == 1 and len(sequence.tokens) < sequence.limit and self._grow(sequence):
                chunks.append(Chunk(sequence, 1, 1))
                if len(chunks) == room:
                    return chunks
        pieces = [s for s in pieces if s.pages]
        if pieces and room > len(chunks) and (self.limits.exact_rows or not drafted):
            chunks += self._share_prefill(pieces, most - len(chunks), room - len(chunks), True)
        return chunks

    def _texts_now(self, answers: list[Sequence], lane: list[Sequence]) -> list[Chunk] | None:
        """A step of texts to embed; None if it is to be one of answers. Texts have steps of their own, so
        that those of answers are as fast as without them; beside answers there are few, and short ones.
        lane: what runs, without the background if somebody waits."""
        waiting = [sequence for sequence in lane if sequence.pooling and sequence.prefilling]
        left = self.limits.prefill_chunk
        if answers:
            left = min(left, max(self.pool.page_size, int(TEXT_STEP_S / (self.times.token_s or TEXT_STEP_S))))
        rest_s = max(TEXTS_S, TEXTS_S / TEXT_STEP_S * left * self.times.token_s)
        if not waiting or answers and time.monotonic() - self.texts_s < rest_s:
            return None
        self.texts_s, chunks = time.monotonic(), []
        if not self.limits.of_texts:
            chunks = self._share_prefill(waiting, self.limits.max_rows, left)
        # of whole texts the oldest, however long, and what fits beside it
        for sequence in waiting if self.limits.of_texts else ():
            if (not chunks or sequence.pending <= left) and self._grow(sequence):
                chunks.append(Chunk(sequence, sequence.pending))
                left -= sequence.pending
        return prepared(self.tables, chunks)

    def _may_run(self, sequence: Sequence) -> bool:
        """Is it prepared and, with several stages, is its last token known?"""
        return sequence.output.ready and (self.limits.stages == 1 or sequence.tokens[-1] >= 0)

    def _grow(self, sequence: Sequence, computed: int | None = None) -> bool:
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
                self._preempt(richest(self.tables, in_background(self.running) or self.running))
        return bool(sequence.pages)

    def _give_up_pages(self, newcomer: Sequence, needed: int, headroom: int, peers: Seq[Sequence]) -> bool:
        """Preempt a sequence for one that needs so many pages: the youngest of the client with the most.

        Only if that client would still hold at least as many as the newcomer's would then; one in the
        background always, if that can be enough. peers: what runs in the newcomer's lane. Returns whether it
        did."""
        if not newcomer.work.background and (background := in_background(self.running)):
            if needed + headroom > self.pool.available + sum(map(self.tables.held, background)):
                return False
            self._preempt(richest(self.tables, background))
            return True
        if not peers:
            return False
        holdings, victim = holdings_of(self.tables, peers), richest(self.tables, peers)
        rich, client = victim.work.params.client, newcomer.work.params.client
        if rich == client or (holdings[rich] - self.tables.held(victim)
                              < holdings[client] + needed + self.tables.held(newcomer)):
            return False
        self._preempt(victim)
        return True

    def _draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """As much of a sequence's draft as fits in the step's room, its token limit and its pages."""
        groups, length = self.pool.groups, len(sequence.tokens)
        draft = sequence.draft.tokens[:max(0, min(room, sequence.limit - length - 1))]
        slots = len(sequence.pages) // groups * self.pool.page_size
        while length + len(draft) > slots and self.pool.available >= groups * (len(self.running) + 1):
            sequence.pages += self.pool.allocate(groups)  # pyright: ignore[reportOperatorIssue]  they are free
            sequence.filled += 1
            slots += self.pool.page_size
        return draft[:slots - length]

    def _preempt(self, sequence: Sequence):
        """Take a sequence's pages and put it at the head of the queue, to be recomputed from its tokens."""
        self.running.remove(sequence)
        self.tables.release(sequence)
        self.waiting.appendleft(sequence)
        end_restoration(sequence)
        self.preemptions += 1

    def isolate(self) -> list[Sequence]:
        """After a failed step, send each running sequence back to be recomputed alone, now as a suspect.

        A sequence that ran alone, or was the only suspect, is dropped. Returns what was dropped."""
        running = list(self.running)
        blamed = [sequence for sequence in running if sequence.suspect] or running
        for sequence in (*running, *self.waiting):
            if sequence.tokens[-1] < 0:  # stands for the token that the step should have drawn
                sequence.tokens.pop()
        for sequence in reversed(running):
            self._preempt(sequence)
            sequence.suspect = True
        if len(blamed) != 1:
            return []
        self.remove(blamed[0])
        return blamed

    def _next(self, ready: Seq[Sequence]) -> Sequence | None:
        """Which of the ready sequences is to be admitted next: an interactive one, while there is one, then
        one of the client with the fewest pages in its lane. None: there is no row for it."""
        lane = [sequence for sequence in ready if not sequence.work.background] or ready
        background = in_background(self.running)
        interactive = len(self.running) - len(background)
        if not lane or any(running.suspect for running in self.running):
            return None
        if lane[0].work.background:
            full = interactive and len(background) >= self.lane.room
        else:
            full = interactive >= self.limits.max_batch
            if not full and self.tables.states and len(self.running) >= self.limits.max_batch:
                self._preempt(richest(self.tables, background))  # there are no more states than rows
        if full or lane[0].work.background and len(self.running) >= self.limits.max_batch:
            return None
        holdings = holdings_of(self.tables, background if lane[0].work.background else
                                  [running for running in self.running if not running.work.background])
        return min(lane, key=lambda waiting: holdings[waiting.work.params.client])

    def _admit(self):
        """Move ready sequences from the queue into the batch while rows and pages last; suspects run alone.

        The client with the fewest pages goes first; within a client, order is kept. What is in the background
        waits for all others."""
        ready = [sequence for sequence in self.waiting if self._may_run(sequence)
                 and (self.keeper is None or is_uncached(sequence) or not self.keeper.awaits(sequence))]
        chunk = self.limits.prefill_chunk
        if self.limits.of_texts:
            chunk = self.pool.page_size * self.pool.num_pages
        while sequence := self._next(ready):
            ready.remove(sequence)
            known = 0 if self.limits.of_texts else sequence.cacheable
            matched, serial = self.pool.match_prefix(sequence.tokens[:known], sequence.root)
            cached, size, length = len(matched) // self.pool.groups, self.pool.page_size, len(sequence.tokens)
            whole, near = -(-length // size), -(-min(length, cached * size + chunk) // size)
            sequence.pages, sequence.filled = matched, cached
            missing = self.tables.missing(sequence, whole, near)
            # needed: it may later hold more pages than it takes now
            needed = max(len(missing),
                         self.pool.pages_for(length, chunk) - self.tables.held(sequence))
            if not self._make_room(sequence, needed):
                self.tables.release(sequence)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            pages = self.pool.allocate(len(missing))
            self.tables.fill(sequence, missing, pages, near)  # pyright: ignore[reportArgumentType]  as many are free
            sequence.serial, sequence.computed = serial, cached * size
            if self.tables.states:
                self.tables.states.begin(sequence, sequence.computed)
            if (output := sequence.output).queued_s is None:
                output.queued_s = time.monotonic() - output.added_s
                output.usage = Usage(cached_tokens=min(sequence.computed, len(sequence.work.prompt_ids)))

    def _make_room(self, newcomer: Sequence, needed: int) -> bool:
        """Are there so many pages for it, and a page of each group for each running sequence that it could
        otherwise preempt at once? Sequences that should give up theirs for it do."""
        while True:
            peers = [running for running in self.running
                     if running.work.background == newcomer.work.background]
            others = len(self.running) if newcomer.work.background else len(peers)
            if needed + (headroom := others * self.pool.groups) <= self.pool.available:
                return True
            if not self._give_up_pages(newcomer, needed, headroom, peers):
                return False

    def _share_prefill(self, prompts: list[Sequence], rows: int, left: int, beside=False) -> list[Chunk]:
        """Split the step's prefill budget, `left`: at least half to the oldest, the rest shortest first.
        Unless `beside` others, the oldest may exceed it for a picture that must be computed in one step.

        Each may need one of the `rows` rows of logits; prompts being scored share the remaining rows."""
        oldest, *others = prompts
        others.sort(key=lambda sequence: sequence.pending)
        wanted = sum(sequence.pending for sequence in others)
        rows -= len(prompts)
        chunks = []
        for sequence in (oldest, *others):
            if sequence.restoration:
                self._catch_up(sequence)
            share = max(left // 2, left - wanted) if sequence is oldest else left
            bare = max(sequence.unscored - sequence.computed, 0)  # tokens without logits
            count = min(sequence.seen, share, bare + 1 + rows if sequence.scoring else share)
            most = left if beside or sequence is not oldest else self.limits.prefill_chunk
            count = sequence.uncut(count, most)
            if count > 0 and self._grow(sequence, sequence.computed + count):
                draws = count == sequence.pending and not sequence.pooling
                chunks.append(chunk := Chunk(sequence, count, int(draws)))
                left -= count
                rows -= max(chunk.rows - 1, 0)
        return chunks

    def _catch_up(self, sequence: Sequence):
        """Skip tokens whose pages have entered the prefix index since the sequence was admitted."""
        pool, size, groups, row = self.pool, self.pool.page_size, self.pool.groups, 0
        if self.tables.holes or pool.states or sequence.computed % size or is_uncached(sequence):
            return
        while (row := sequence.computed // size) < (len(sequence.tokens) - 1) // size:
            content = pool.index.get((sequence.serial, tuple(sequence.tokens[row * size:(row + 1) * size])))
            if content is None or pool.hole in content.pages:
                return
            mine = slice(row * groups, (row + 1) * groups)
            pool.exchange(sequence.pages[mine], content.pages)
            sequence.pages[mine] = content.pages
            sequence.computed, sequence.serial = sequence.computed + size, content.serial
            if sequence.computed <= len(sequence.work.prompt_ids):
                sequence.output.usage += Usage(cached_tokens=size)

    def advance(self, chunk: Chunk):
        """A chunk's step has started: its tokens count as computed.

        Steps run in the order they start, so a later step that finds their pages reads them once written."""
        self.tables.advance(chunk.sequence, chunk.count)

    @property
    def unready(self) -> list[Sequence]:
        return [sequence for sequence in (*self.running, *self.waiting) if not sequence.output.ready]


def prepared(tables: PageTables, plan: Seq[Chunk]) -> list[Chunk]:
    """The chunks of those that a later one has not preempted, with states where layers keep some."""
    plan = [chunk for chunk in plan if chunk.sequence.pages]
    return [chunk for chunk in map(tables.states.prepare, plan) if chunk] if tables.states else plan


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
        sequence.restoration.over, sequence.restoration = True, None
