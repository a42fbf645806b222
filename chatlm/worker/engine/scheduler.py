"""What the next step computes; no tensors here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.worker.engine.background import BackgroundLane
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.planners import (
    BackgroundPlanner, DecodingPlanner, PromptPlanner, StepPlan, TextPlanner)
from chatlm.worker.engine.run_queue import RunQueue
from chatlm.worker.engine.times import Times

if TYPE_CHECKING:
    from chatlm.common.answering import AnswerLease
    from chatlm.worker.engine.sequence import Chunk


class Scheduler:
    """Continuous batching: which tokens of which sequences the next step computes.

    `RunQueue` decides which sequences run. Then each planner adds chunks to the step: a token of each answer,
    chunks of prompts, and background work that hardly lengthens it; or texts to embed, in a step of their
    own."""

    def __init__(self, pool: PagePool, limits: StepLimits, times: Times | None = None,
                 lane: BackgroundLane | None = None):
        """times: how long steps take. lane: how much of a step the background may have."""
        self.pool = pool
        self.limits = limits
        self.times = times or Times()
        self.lane = lane or BackgroundLane()
        self.queue = RunQueue(pool, limits, self.lane)
        self.decoding = DecodingPlanner(self.queue, limits)
        self.prompts = PromptPlanner(self.queue, limits, self.lane, self.times)
        self.texts = TextPlanner(self.queue, limits, self.prompts, self.times)
        self.background = BackgroundPlanner(self.queue, limits, self.lane, self.prompts, self.times)

    def give_way_to(self, lease: AnswerLease):
        """Background work waits from now on while other workers on the same processors write answers."""
        self.lane.give_way_to(lease)

    def schedule(self) -> list[Chunk]:
        """Plan the next step. A running sequence may have no chunk in it: one in the background, or an answer
        that reaches its limit with the token being drawn."""
        self.queue.admit()
        plan = StepPlan(self.queue.running)
        if plan.nobody_waits and self.lane.must_wait():
            return []
        if self.texts.due(plan):
            self.texts.add_to(plan)
        else:
            self.decoding.add_to(plan)
            self.prompts.add_to(plan)
            self.background.add_to(plan)
        return self.queue.prepared(plan.chunks)
