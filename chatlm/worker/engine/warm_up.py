"""A worker's first steps, which nobody has asked for: before it is ready, or while nobody asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import AnswerParams
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.engine.sequence import Assignment

if TYPE_CHECKING:
    from chatlm.worker.engine.engine import Engine


def warm_up(engine: Engine, progress: Callable[[float], None]):
    """Run a full prefill chunk and a step of each decode batch size, so no user pays for first calls."""
    max_batch = engine.limits.max_batch
    shapes = [(1, engine.first_chunk), *((1 << n, 1) for n in range(10) if 1 << n < max_batch),
              (max_batch, 1)]
    engine.steps.prepare(lambda fraction: progress(fraction / 2))
    for model in engine.draft_models:
        model.drafter.steps.prepare(lambda fraction: None)
    for done, (rows, length) in enumerate(shapes):
        progress(0.5 + done / len(shapes) / 2)
        run_steps(engine, rows, length)


def warm_up_soon(engine: Engine):
    """Compute one token; `warm_up_more` does the rest while nobody asks.

    A CPU's first steps are hardly slower than later ones: they write memory for the first time."""
    run_steps(engine, 1, 1)
    engine.cold = [(FREE_ROWS, 1), (1, engine.first_chunk)]


def warm_up_more(engine: Engine):
    """Run the next of the steps that `warm_up_soon` has left."""
    run_steps(engine, *engine.cold.pop())


def run_steps(engine: Engine, rows: int, length: int):
    """Compute this many prompts of this length, and a token of each; nothing of them is kept."""
    with engine.apart():
        for row in range(min(rows, engine.pool.num_pages // 2 // engine.pool.groups)):
            ids = tuple((row + 7 * i) % engine.tokenizer.vocab_size for i in range(length))
            engine.add(Assignment(f"warm-up {row}", ids, AnswerParams(), 1))
        while engine.busy:
            engine.step()
    engine.events.clear()
    engine.pool.forget_cached()
