"""What a step computes, by kind of work: each planner adds chunks, within what those before it have left."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Protocol, TYPE_CHECKING

from chatlm.worker.engine.background import in_background
from chatlm.worker.engine.pace import PromptPace
from chatlm.worker.engine.sequence import Chunk, Sequence

if TYPE_CHECKING:
    from chatlm.worker.engine.background import BackgroundLane
    from chatlm.worker.engine.limits import StepLimits
    from chatlm.worker.engine.run_queue import RunQueue
    from chatlm.worker.engine.times import Times


class StepPlan:
    """The next step while it is planned: whose turn it is, and its chunks so far.

    It is the interactive sequences' turn if any run; those in the background may then join `beside` them.
    Else it is the background's turn, and nobody waits for the step."""

    def __init__(self, running: list[Sequence]):
        background = in_background(running)
        self.nobody_waits = bool(running) and len(background) == len(running)
        self.beside = [] if self.nobody_waits else background
        self.turn = running
        if self.beside:
            self.turn = [sequence for sequence in running if not sequence.work.background]
        self.answers = [sequence for sequence in self.turn if not sequence.pooling]
        self.chunks: list[Chunk] = []

    @property
    def rows(self) -> int:
        """Rows of logits from which tokens are drawn."""
        return sum(chunk.draws for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        """Drafts included."""
        return sum(chunk.count + len(chunk.draft) for chunk in self.chunks)

    @property
    def has_drafts(self) -> bool:
        return any(chunk.draft for chunk in self.chunks)

    @property
    def on_host(self) -> bool:
        """Does the host need logits or hidden states of it?"""
        return any(chunk.on_host for chunk in self.chunks)


class Planner(Protocol):
    """Plans one kind of work. Its chunks may take what earlier planners have left of the step's rows and
    tokens, and pages as `RunQueue.grow` gives them. A sequence that gets none has no chunk; neither has one
    that a later sequence preempts (`RunQueue.prepared`)."""

    def add_to(self, plan: StepPlan): ...


class DecodingPlanner:
    """A token of each answer that is being written, with its draft. Each is given pages first. With several
    stages a step has only its share of the answers, so that each stage has work.

    An answer is left out if the token being drawn brings it to its limit."""

    def __init__(self, queue: RunQueue, limits: StepLimits):
        self.queue = queue
        self.limits = limits

    def add_to(self, plan: StepPlan):
        grown = [sequence for sequence in self._able(plan.answers) if self.queue.grow(sequence)]
        plan.answers = [sequence for sequence in plan.answers if sequence.pages]  # some may be preempted now
        room = self._draft_room(plan.answers)
        for sequence in grown:
            if sequence.pages:
                draft = self._draft(sequence, room) if sequence.draft.tokens else ()
                plan.chunks.append(Chunk(sequence, 1, 1 + len(draft), draft))
                room -= len(draft)

    def _able(self, answers: Seq[Sequence]) -> list[Sequence]:
        """The answers whose next token this step draws."""
        may_run = self.queue.may_run
        stages = self.limits.stages
        able = [sequence for sequence in answers
                if sequence.decodes and len(sequence.tokens) < sequence.limit and may_run(sequence)]
        if stages == 1:
            return able
        decoding = sum(sequence.pending == 1 for sequence in answers)
        return able[:-(-decoding // stages)]

    def _draft_room(self, answers: Seq[Sequence]) -> int:
        """How many tokens of drafts the step may have: without exact rows none beside prompts."""
        if not self.limits.exact_rows and any(sequence.prefilling for sequence in answers):
            return 0
        return self.limits.draft_rows - len(answers)

    def _draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """As much of a sequence's draft as fits in the step's room, its token limit and its pages."""
        most = max(0, min(room, sequence.limit - len(sequence.tokens) - 1))
        draft = sequence.draft.tokens[:most]
        return draft[:self.queue.grow_spare(sequence, len(draft))]


class PromptPlanner:
    """Chunks of prompts, after the answers' tokens. Half of the tokens go to the oldest prompt, so that it
    never starves; the rest go to the shortest prompts, so that a long one never stalls them. Beside answers
    that are being written, there are only so many tokens that the step stays short."""

    def __init__(self, queue: RunQueue, limits: StepLimits, lane: BackgroundLane, times: Times):
        self.queue = queue
        self.limits = limits
        self.lane = lane
        self.times = times
        self.pace = PromptPace()

    def add_to(self, plan: StepPlan):
        prompts = [sequence for sequence in plan.answers if sequence.prefilling]
        if prompts:
            plan.chunks += self.share(prompts, self.limits.max_rows - plan.rows, self.most(plan, prompts))

    def most(self, plan: StepPlan, prompts: Seq[Sequence]) -> int:
        """How many tokens of these prompts the step may have."""
        whole = self.limits.prefill_chunk
        if plan.nobody_waits:
            return self.lane.prompt_tokens(self.times, len(plan.chunks), whole)
        paced = self.pace.tokens(self.times, whole, plan.tokens)
        answers_wait = len(prompts) < len(plan.answers)
        # one that such a step would finish has its first token the sooner
        newcomer_waits = any(sequence.pending <= paced // 2 for sequence in prompts[1:])
        return paced if answers_wait or newcomer_waits else whole

    def share(self, prompts: Seq[Sequence], rows: int, left: int, beside: bool = False) -> list[Chunk]:
        """Share `left` tokens among prompts: at least half to the oldest, the rest to the shortest first.
        Unless `beside` interactive answers, the oldest may exceed its share for a picture that one step must
        compute.

        Each prompt may need one of the `rows` rows of logits; prompts being scored share the other rows."""
        oldest, *others = prompts
        others.sort(key=lambda sequence: sequence.pending)
        wanted = sum(sequence.pending for sequence in others)
        rows -= len(prompts)
        chunks = list[Chunk]()
        for sequence in (oldest, *others):
            if sequence.restoration:
                self.queue.catch_up(sequence)
            share = max(left // 2, left - wanted) if sequence is oldest else left
            count = min(sequence.encoded, share)
            if sequence.scoring:
                without_logits = max(sequence.unscored - sequence.computed, 0)
                count = min(count, without_logits + 1 + rows)
            most = left if beside or sequence is not oldest else self.limits.prefill_chunk
            count = sequence.uncut(count, most)
            if count > 0 and self.queue.grow(sequence, sequence.computed + count):
                draws = count == sequence.pending and not sequence.pooling
                chunk = Chunk(sequence, count, int(draws))
                chunks.append(chunk)
                left -= count
                rows -= max(chunk.rows - 1, 0)
        return chunks


class TextPlanner:
    """Texts to embed have steps of their own, so that the steps of answers are as fast as without them. While
    answers are written, such steps are few and short, unless a text is urgent: then it is embedded at once,
    without the others."""

    EVERY_S = 2.0  # between two such steps beside answers
    STEP_S = 0.1   # about how long one is then

    def __init__(self, queue: RunQueue, limits: StepLimits, prompts: PromptPlanner, times: Times):
        self.queue = queue
        self.limits = limits
        self.prompts = prompts
        self.times = times
        self.last_s = 0.0  # when a step last embedded texts

    def due(self, plan: StepPlan) -> bool:
        """Is the next step to be one of texts? Else it is one of answers."""
        if len(plan.answers) == len(plan.turn) or not self._waiting(plan):
            return False
        if not plan.answers or any(sequence.work.params.urgent for sequence in self._waiting(plan)):
            return True
        tokens = self._most_tokens(plan)
        rest_s = max(self.EVERY_S, self.EVERY_S / self.STEP_S * tokens * self.times.token_s)
        return time.monotonic() - self.last_s >= rest_s

    def add_to(self, plan: StepPlan):
        self.last_s = time.monotonic()
        waiting = self._waiting(plan)
        left = self._most_tokens(plan)
        if not self.limits.of_texts:
            plan.chunks += self.prompts.share(waiting, self.limits.max_rows, left)
            return
        for sequence in waiting:  # the oldest, however long, and what fits beside it
            if (not plan.chunks or sequence.pending <= left) and self.queue.grow(sequence):
                plan.chunks.append(Chunk(sequence, sequence.pending))
                left -= sequence.pending

    def _waiting(self, plan: StepPlan) -> list[Sequence]:
        waiting = [sequence for sequence in plan.turn if sequence.pooling and sequence.prefilling]
        return [sequence for sequence in waiting if sequence.work.params.urgent] or waiting

    def _most_tokens(self, plan: StepPlan) -> int:
        """How many tokens of texts the step may have."""
        most = self.limits.prefill_chunk
        if not plan.answers:
            return most
        in_time = int(self.STEP_S / (self.times.token_s or self.STEP_S))
        return min(most, max(self.queue.pool.page_size, in_time))


class BackgroundPlanner:
    """Background work beside interactive sequences, so little that it hardly lengthens the step: a token of
    each answer in order of admission, then pieces of prompts."""

    def __init__(self, queue: RunQueue, limits: StepLimits, lane: BackgroundLane, prompts: PromptPlanner,
                 times: Times):
        self.queue = queue
        self.limits = limits
        self.lane = lane
        self.prompts = prompts
        self.times = times

    def add_to(self, plan: StepPlan):
        if self.limits.stages > 1 or not plan.beside or not plan.chunks:
            return
        has_drafts = plan.has_drafts
        rows = self._rows_left(plan)
        times = self.times.of(plan.on_host)
        room = self.lane.room_beside(times, plan.tokens, max(min(rows, self.limits.max_batch), 0))
        if not room:
            return
        chunks = list[Chunk]()
        prompts = list[Sequence]()
        for sequence in filter(self.lane.joins, plan.beside):
            if sequence.prefilling:
                prompts.append(sequence)
            elif sequence.pending == 1 and len(sequence.tokens) < sequence.limit:
                if self.queue.grow(sequence):
                    chunks.append(Chunk(sequence, 1, 1))
                if len(chunks) == room:
                    break
        plan.chunks += chunks
        left = room - len(chunks)
        prompts = [sequence for sequence in prompts if sequence.pages]
        if prompts and left and (self.limits.exact_rows or not has_drafts):
            plan.chunks += self.prompts.share(prompts, rows - len(chunks), left, beside=True)

    def _rows_left(self, plan: StepPlan) -> int:
        """How many rows of logits the step may still have. Unless rows are exact, a step with drafts has
        few."""
        few = plan.has_drafts and not self.limits.exact_rows
        most = self.limits.draft_rows if few else self.limits.max_rows
        return most - plan.rows
