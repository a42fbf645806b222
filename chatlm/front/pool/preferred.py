"""What models are for, and which of a folder people want to chat with first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from chatlm.common.hub.better import FAST_ENOUGH

if TYPE_CHECKING:
    from chatlm.common.hub.better import MemoryRate
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.pool.models import ServedModel


KINDS = "chat", "text", "embedding", "rerank"  # those that people chat with first


def by_preference(rate: MemoryRate) -> Callable[[ServedModel], tuple]:
    """A key that sorts models, the best to chat with first: the largest that is fast enough here, of equally
    large ones the last step; then those that are slower, the smallest first; then those for texts, those that
    give no answers, and at last those that cannot be served. rate: this machine's; without it no model is
    slow."""
    def key(model: ServedModel) -> tuple:
        pool = model.pool
        if not pool or not pool.tokenizer:
            return (len(KINDS),)
        speed = None
        if not pool.workers[0].device.startswith("cuda"):
            speed = rate.expected_speed(model.name, model.bytes)
        slow = speed is not None and speed < FAST_ENOUGH
        size = model.bytes if slow else -model.bytes
        return KINDS.index(kind_of(pool.tokenizer)), slow, size, -int(pool.checkpoint.get("step") or 0)
    return key


def kind_of(tokenizer: Tokenizer) -> str:
    """What a model is for. A base checkpoint is for texts, although it has a chat template too."""
    if embedder := tokenizer.spec.embedder:
        return "rerank" if embedder.pooling == "rank" else "embedding"
    return "text" if tokenizer.continues_texts else "chat"
