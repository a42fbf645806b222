"""What the next step computes; no tensors here."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from chatlm.worker.engine.background import BackgroundLane
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.planners import BackgroundPlanner, PromptPlanner, StepPlan, TextPlanner
from chatlm.worker.engine.run_queue import RunQueue
from chatlm.worker.engine.sequence import Chunk, Sequence
from chatlm.worker.engine.times import Times


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
        self.prompts = PromptPlanner(self.queue, limits, self.lane, self.times)
        self.background = BackgroundPlanner(self.queue, limits, self.lane, self.prompts, self.times)
        self.texts = TextPlanner(self.queue, limits, self.prompts, self.times)

    def schedule(self) -> list[Chunk]:
        """Plan the next step. A sequence is left out if the token being drawn brings it to its limit, or in
        the background."""
        self.queue.admit()
        plan = StepPlan(self.queue.running)
        if plan.nobody_waits and self.lane.must_wait():
            return []
        if self.texts.due(plan):
            self.texts.add_to(plan)
        else:
            self._add_decoding(plan)
            self.prompts.add_to(plan)
            self.background.add_to(plan)
        return self.queue.prepared(plan.chunks)

    def _add_decoding(self, plan: StepPlan):
        """A token of each answer that is being written, with its draft."""
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
        may_run, stages = self.queue.may_run, self.limits.stages
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
