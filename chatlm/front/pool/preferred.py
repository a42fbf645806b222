"""Which models of a folder people want to chat with first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from chatlm.common.hub.better import FAST_ENOUGH

if TYPE_CHECKING:
    from chatlm.common.hub.better import MemoryRate
    from chatlm.front.pool.models import ServedModel
    from chatlm.front.pool.pool import WorkerPool


def by_preference(rate: MemoryRate) -> Callable[[ServedModel], tuple]:
    """A key that sorts models, the best to chat with first: the largest that is fast enough here, of equally
    large ones the last step; then those that are slower, the smallest first; then those for texts, those that
    give no answers, and at last those that cannot be served. rate: this machine's; without it no model is
    slow."""
    def key(model: ServedModel) -> tuple:
        pool = model.pool
        if not pool:
            return (len(USES),)
        speed = None
        if not pool.workers[0].device.startswith("cuda"):
            speed = rate.expected_speed(model.name, model.bytes)
        slow = speed is not None and speed < FAST_ENOUGH
        size = model.bytes if slow else -model.bytes
        return USES.index(use_of(pool)), slow, size, -int(pool.checkpoint.get("step") or 0)
    return key


USES = "chat", "texts", "vectors"


def use_of(pool: WorkerPool) -> str:
    if pool.tokenizer and pool.tokenizer.spec.embedder:
        return "vectors"
    return "texts" if pool.continues_texts or not pool.chats else "chat"
