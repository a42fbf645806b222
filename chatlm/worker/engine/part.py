"""What an engine has beside its core: the hooks of a part, and all parts that it is made with.

The rows of all parts are in chatlm/worker/parts.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from concurrent.futures import Future
    from chatlm.common.messages.requests import WorkerEvent
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.engine.adapter_slots import AdapterSlots
    from chatlm.worker.engine.calculator import CalculatorTool
    from chatlm.worker.engine.drafts import DraftSource
    from chatlm.worker.engine.embedding import Pooler
    from chatlm.worker.engine.grammars import Grammars
    from chatlm.worker.engine.model_drafts import ModelDrafts
    from chatlm.worker.engine.sequence import Assignment, Chunk, Sequence
    from chatlm.worker.engine.encoded_pictures import Pictures


class EnginePart:
    """A part of an engine, by its hooks, which do nothing here.

    A sequence comes and ends. In between, step after step is planned with it, perhaps with another input, and
    computed; its hidden states can be read, and its new tokens become events. The thread that computes calls
    all hooks, between steps. So what takes long goes into a thread of the part."""

    def comes(self, sequence: Sequence) -> str:
        """A sequence comes, and has not run yet. Why it cannot be computed here; "" if it can."""
        return ""

    def ends(self, sequence: Sequence):
        """It has ended, failed or been cancelled, whether or not it is of this part."""

    def before_step(self, running: Iterable[Sequence]):
        """A step will be planned: do a little of what these sequences wait for."""

    @property
    def preparing(self) -> list[Future]:
        """What threads do now that sequences wait for."""
        return []

    def changes_input(self, chunks: Seq[Chunk]) -> bool:
        """Must what the model reads be changed before a step of these chunks? Such a step starts only once
        all others have finished."""
        return False

    def change_input(self, chunks: Seq[Chunk]):
        """Change it: a step of these chunks is about to start, and no other is under way."""

    def wants_hidden(self, sequence: Sequence) -> bool:
        """Are the hidden states of a sequence needed after the step that is planned? Nothing is then computed
        ahead of it. With --pp they are in another process: such a part should refuse to be made there."""
        return False

    def read_hidden(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray):
        """A step has finished whose hidden states some part wants. rows: (count + D, C), after the last
        layer: of `count` tokens of the sequence from position `first` on, and of its draft of D tokens. The
        next step overwrites them. The sequence has got the tokens of the step, and may have ended: rows from
        position len(tokens) - 1 on are of a draft that was wrong."""

    def awaits(self, sequence: Sequence) -> bool:
        """Must the next token of a sequence be known before the step after it is planned?"""
        return False

    def adds(self, sequence: Sequence) -> Seq[WorkerEvent]:
        """What the client of a sequence gets before its new tokens, and before its end."""
        return ()

    def prepare_steps(self):
        """Record what steps of its own can be recorded before they run."""

    def forget(self):
        """A step has failed, or other models need the memory: forget what may be wrong, or is not needed."""

    def gauges(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class MissingPart:
    """What this engine is without, and what an answer is told that needs it."""

    asked: Callable[[Assignment], bool]
    words: str


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made with. Without any of them it answers plain requests, and drafts only what
    grammars force."""

    lookup: DraftSource | None = None               # drafts from texts
    draft_models: Seq[ModelDrafts] = ()
    adapters: AdapterSlots | None = None
    pictures: Pictures | None = None
    texts: Pooler | None = None                     # what becomes vectors and scores
    grammars: Grammars | None = None
    calculator: Callable[[Tokenizer], CalculatorTool] | None = None
    others: Mapping[str, EnginePart] = field(default_factory=dict)  # of later features, by name
    refusals: Seq[MissingPart] = ()


NO_PARTS = EngineParts()
