"""A step of the engine, from its plan to its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.worker.engine.hidden import HiddenRows
    from chatlm.worker.engine.sequence import Chunk, Sequence


@dataclass(eq=False)
class EngineStep:
    """A step, of which more is known once it has started, and once its sequences have advanced."""

    chunks: Seq[Chunk]
    planned_s: float
    on_host: bool = False  # does the host need its logits or hidden states?
    alone: bool = False    # may it start only once all others have finished?
    # once it has started
    finish: Callable[[], list[int]] | None = None  # waits for its tokens
    hidden: Seq[HiddenRows] = ()  # hidden states that are read once it has finished
    # once its sequences have advanced
    # (sequence, its draft) in the order of rows; None: the sequence has ended, or was given forced tokens
    drawing: list[tuple[Sequence | None, tuple[int, ...]]] = field(default_factory=list)
    tokens: int = 0        # how many it computes, without drafts
    rows: int = 0          # of answers and drafts, without those that prompts end with
    prompt_tokens: int = 0

    def wait(self) -> list[int]:
        """The tokens of a step that has started."""
        assert self.finish
        return self.finish()

    @property
    def interactive(self) -> bool:
        """Does it compute an answer, or its prompt, that somebody waits for?"""
        return any(not (chunk.sequence.pooling or chunk.sequence.work.background) for chunk in self.chunks)

    @property
    def urgent(self) -> bool:
        """Does it embed a text for which somebody waits as for an answer?"""
        return any(chunk.sequence.work.params.urgent for chunk in self.chunks)

    @property
    def nobody_waits(self) -> bool:
        return all(chunk.sequence.work.background for chunk in self.chunks)

    def share_time(self, seconds: float, only: Sequence | None = None):
        """Divide its time among its sequences, by their tokens, drafts included. only: the one that gets its
        share now; None: all do."""
        tokens = sum(chunk.count + len(chunk.draft) for chunk in self.chunks)
        for chunk in self.chunks:
            if only in (None, chunk.sequence):
                chunk.sequence.output.compute_s += seconds * (chunk.count + len(chunk.draft)) / tokens
