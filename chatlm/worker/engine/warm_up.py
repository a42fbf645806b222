"""A worker's first steps, which nobody has asked for: before it is ready, or while nobody asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from chatlm.common.errors import error_text
from chatlm.common.log import log
from chatlm.common.messages.requests import AnswerParams
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.engine.sequence import Assignment

if TYPE_CHECKING:
    from chatlm.worker.engine.engine import Engine


class WarmUp:
    """First calls are slow, so the worker makes them itself and no user pays for them.

    On a GPU a step of each shape must be recorded: `complete` runs them all before the worker is ready. On a
    CPU a first step is hardly slower than later ones: it only writes memory for the first time. So `begin`
    computes one token, and `more` does the rest while nobody asks.

    `more` also makes what the first answer in a format needs of a large vocabulary, and after it what makes
    its masks faster."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.left: list[tuple[int, int]] = []  # (rows, tokens) of the steps that `begin` has left, next last
        self.grammar_parts: list[Callable[[], object]] = []  # see AnswerMaker.ahead

    REST_S = 2.0  # without a request, before what only later answers need

    @property
    def rests(self) -> bool:
        """Should it wait first, since the next answer is soon asked for and does not need what is left?"""
        return not (self.left or self.grammar_parts)

    @property
    def is_due(self) -> bool:
        return bool(self.left or self.grammar_parts or self.engine.answers.may_be_faster)

    def complete(self, progress: Callable[[float], None]):
        """Run a full prefill chunk and a step of each decode batch size."""
        engine = self.engine
        self._leave_grammar_parts()
        max_batch = engine.limits.max_batch
        smaller = [1 << n for n in range(10) if 1 << n < max_batch]
        shapes = [(1, engine.first_chunk), *((rows, 1) for rows in smaller), (max_batch, 1)]
        engine.prepare_steps(lambda fraction: progress(fraction / 2))
        for done, (rows, length) in enumerate(shapes):
            progress(0.5 + done / len(shapes) / 2)
            self._run(rows, length)

    def begin(self):
        """Compute one token, and leave the rest to `more`."""
        self._leave_grammar_parts()
        self._run(1, 1)
        self.left = [(FREE_ROWS, 1), (1, self.engine.first_chunk)]

    def more(self):
        """Run the next of the steps that are left, or make the next part of what grammars need."""
        if self.left:
            self._run(*self.left.pop())
            return
        try:
            if self.grammar_parts:
                self.grammar_parts.pop(0)()
            else:
                self.engine.answers.make_faster()
        except Exception as error:  # the first answer in a format will say so to whoever asks for it
            self.grammar_parts.clear()
            log.debug("nothing was prepared for grammars: %s", error_text(error))

    def skip(self):
        """Leave out the steps that are left: requests run others like them. What grammars need is still
        due."""
        self.left.clear()

    def _leave_grammar_parts(self):
        if not self.engine.of_texts:
            self.grammar_parts = self.engine.answers.ahead()

    def _run(self, rows: int, length: int):
        """Compute this many prompts of this length, and a token of each."""
        engine = self.engine
        rows = min(rows, engine.pool.num_pages // 2 // engine.pool.groups)
        vocab_size = engine.tokenizer.vocab_size
        works = []
        for row in range(rows):
            ids = tuple((row + 7 * i) % vocab_size for i in range(length))
            works.append(Assignment(f"warm-up {row}", ids, AnswerParams(), 1))
        engine.run_apart(works)
