"""What the next step computes; no tensors here."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

from chatlm.worker.engine.background import BackgroundLane, in_background
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.run_queue import RunQueue
from chatlm.worker.engine.sequence import Chunk, Sequence
from chatlm.worker.engine.times import Times


# While the same model writes answers: seconds between two steps that embed texts, and about how long one is
TEXTS_S, TEXT_STEP_S = 2.0, 0.1


class Scheduler:
    """Continuous batching: which tokens of which sequences the next step computes; `RunQueue` decides which
    sequences run.

    Decode rows come before prefill. Half of `prefill_chunk` goes to the oldest prompt, so that it never
    starves; the rest goes to the shortest prompts, so that a long one never stalls them. A step of
    interactive sequences has only as many tokens of the background as hardly lengthen it
    (`BackgroundLane`)."""

    def __init__(self, pool: PagePool, limits: StepLimits, times: Times | None = None,
                 lane: BackgroundLane | None = None):
        """times: what was measured of steps; lane: how much of a step the background may have."""
        self.pool, self.limits = pool, limits
        self.times = times or Times()
        self.lane = lane or BackgroundLane()
        self.queue = RunQueue(pool, limits, self.lane)
        self.texts_s = 0.0  # when a step last embedded texts

    def schedule(self) -> list[Chunk]:
        """Plan the next step: a one-token chunk for each decoding sequence, then chunks of prompts.

        A sequence is left out if the token being drawn brings it to its limit, or in the background."""
        self.queue.admit()
        running = self.queue.running
        background = in_background(running)
        beside = background if len(background) < len(running) else []  # interactive sequences
        if beside != background and self.lane.must_wait():
            return []
        lane = [s for s in running if not s.work.background] if beside else running
        answers = [s for s in lane if not s.pooling]
        if len(answers) < len(lane) and (texts := self._texts_now(answers, lane)) is not None:
            return texts
        share = -(-sum(s.pending == 1 for s in answers) // self.limits.stages)
        able = [s for s in answers if s.decodes and len(s.tokens) < s.limit and self.queue.may_run(s)]
        grown = [s for s in able[:share] if self.queue.grow(s)]
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
        return self.queue.prepared([*plan, *self._plan_beside(plan, beside)])

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
            elif sequence.pending == 1 and len(sequence.tokens) < sequence.limit:
                if self.queue.grow(sequence):
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
            if (not chunks or sequence.pending <= left) and self.queue.grow(sequence):
                chunks.append(Chunk(sequence, sequence.pending))
                left -= sequence.pending
        return self.queue.prepared(chunks)

    def _draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """As much of a sequence's draft as fits in the step's room, its token limit and its pages."""
        most = max(0, min(room, sequence.limit - len(sequence.tokens) - 1))
        draft = sequence.draft.tokens[:most]
        return draft[:self.queue.grow_spare(sequence, len(draft))]

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
                self.queue.catch_up(sequence)
            share = max(left // 2, left - wanted) if sequence is oldest else left
            bare = max(sequence.unscored - sequence.computed, 0)  # tokens without logits
            count = min(sequence.seen, share, bare + 1 + rows if sequence.scoring else share)
            most = left if beside or sequence is not oldest else self.limits.prefill_chunk
            count = sequence.uncut(count, most)
            if count > 0 and self.queue.grow(sequence, sequence.computed + count):
                draws = count == sequence.pending and not sequence.pooling
                chunks.append(chunk := Chunk(sequence, count, int(draws)))
                left -= count
                rows -= max(chunk.rows - 1, 0)
        return chunks
