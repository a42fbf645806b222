"""Makes the text side of sequences, in a thread if a grammar must be compiled for one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError
from chatlm.common.log import log
from chatlm.common.text.reader import answer_reader
from chatlm.worker.engine.answer import Answer
from chatlm.worker.engine.drafts import NO_DRAFT
from chatlm.worker.engine.drawn import failure_of
from chatlm.worker.engine.fair_thread import FairThread
from chatlm.worker.engine.part import NO_PARTS, EngineParts
from chatlm.worker.ops.sampling import preparation

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Failed
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.engine.grammar import Grammar
    from chatlm.worker.engine.sequence import Sequence


class AnswerMaker:
    """Makes the Answer of each sequence, and has the masks of its grammar computed.

    Slow work happens in a thread that serves clients in turn. `SequenceOutput.preparing` is then the future
    that the sequence must wait for before it may run. `lacking` has sequences whose answers cannot be made
    here, each with what ends it."""

    LARGE_VOCABULARY = 1 << 16  # tokens
    MASK_PATIENCE_S = 0.004     # how long a step waits for the masks of its rows

    def __init__(self, tokenizer: Tokenizer, parts: EngineParts = NO_PARTS):
        self.tokenizer = tokenizer
        self.calculator = parts.calculator
        self.grammars = parts.grammars
        self.compiling = FairThread("grammars")
        self.lacking: deque[tuple[Sequence, Failed]] = deque()

    def make(self, sequence: Sequence):
        """Set `SequenceOutput.answer`. A thread does it if the answer needs a grammar or its draws a
        preparation, so that no other answer waits; the first grammar also prepares the vocabulary."""
        work = sequence.work
        if work.params.pooling:  # it becomes a vector, which has no text
            return
        resumes_calls = work.resumed_ids and any(work.params.call_grammars)
        if work.params.grammar or preparation(work.sampling) or resumes_calls:
            self.remake(sequence)
        else:
            self._prepare(sequence)

    def remake(self, sequence: Sequence):
        """Have the thread make the answer, or the grammar that an existing answer needs now."""
        client = sequence.work.params.client
        sequence.output.preparing = self.compiling.submit(client, self._prepare, sequence)

    def ahead(self) -> list[Callable[[], object]]:
        """What the first grammar needs of a large vocabulary, in parts that may be made before anybody asks.
        They take up to half a second each, or more for 262,144 tokens, and keep other Python threads from
        running. For a small vocabulary, and without the library, there are none: they would take memory for
        little."""
        tokenizer = self.tokenizer
        if tokenizer.vocab_size < self.LARGE_VOCABULARY or not find_spec("llguidance"):
            return []
        return [partial(self._on_thread, lambda: tokenizer.bare_vocabulary),
                partial(self._on_thread, lambda: tokenizer.encode("{"))]  # opens what encodes forced text

    @property
    def may_be_faster(self) -> bool:
        """Have grammars been made with the vocabulary that is made soonest?"""
        return self.grammars is not None and self.grammars.may_be_faster

    def make_faster(self):
        """Make the vocabulary that has the fastest masks, for the grammars from now on."""
        if self.grammars:
            self._on_thread(self.grammars.make_faster)

    def _on_thread(self, work: Callable[[], object]):
        """Have the thread do it as if a request needed it; returns then."""
        self.compiling.submit("", work).result()

    def start_masks(self, sequences: Iterable[Sequence]):
        """Start to compute the masks of the next tokens, for those that go on with a grammar."""
        if self.grammars:
            self.grammars.start_masks(sequences)

    def masked(self, sequence: Sequence, deadline_s: float) -> bool:
        """Is the next mask ready by the deadline, or not needed? If not, the sequence sits out steps."""
        grammar = sequence.output.grammar
        if not grammar:
            return True
        if not wait([grammar.masks], max(0.0, deadline_s - time.monotonic())).done:
            sequence.output.preparing = grammar.masks
        elif grammar.may_renew:
            sequence.draft = NO_DRAFT  # its grammar follows no drafts from now on
            self.remake(sequence)
        else:
            return True
        return False

    # In the thread

    def _prepare(self, sequence: Sequence):
        """Make the answer, or give an existing one the grammar that it needs now."""
        output = sequence.output
        try:
            output.answer = self._prepared(sequence)
        except ChatServerError as error:
            log.warning("an answer could not be prepared: %s", error)
            self.lacking.append((sequence, failure_of(error)))
        except Exception:
            output.answer = None  # so the answer fails when its next token is drawn
            log.exception("failed to prepare an answer")

    def _prepared(self, sequence: Sequence) -> Answer:
        work = sequence.work
        output = sequence.output
        answer = output.answer
        if output.kept is None and (prepare := preparation(work.sampling)):
            output.kept = prepare(work.sampling, self.tokenizer, sequence.tokens)
        if answer and answer.awaits_grammar:
            answer.hold_call()
        elif answer and answer.grammar:
            assert self.grammars
            answer.constraint.grammar = self.grammars.renewed(work.params.owner, answer.grammar)
        else:
            answer = self._new_answer(sequence)
        if answer.grammar:
            answer.grammar.masks.set_result(answer.grammar.compute_masks())
        return answer

    def compiled(self, owner: str, source: str) -> Grammar:
        """A grammar of its own for an answer. ConfigError if this engine makes none."""
        if not self.grammars:
            raise ConfigError("this engine makes no grammars")
        return self.grammars.compiled(owner, source)

    def _new_answer(self, sequence: Sequence) -> Answer:
        work = sequence.work
        compiled = partial(self.compiled, work.params.owner)
        source = work.params.grammar
        if source and (reader := answer_reader(self.tokenizer, work.params, work.prompt_ids)):
            source = reader.grammar(work.params)  # of the whole answer
        tool = self.calculator(self.tokenizer) if self.calculator else None
        return Answer(work, self.tokenizer, compiled(source) if source else None, compiled,
                      sequence.limit - len(work.prompt_ids), tool)
