"""Makes the text side of sequences, in a thread if a grammar must be compiled, and the masks of grammars."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from chatlm.common.log import log
from chatlm.common.memory import heap_bytes
from chatlm.common.text.reader import answer_reader
from chatlm.worker.engine.answer import Answer
from chatlm.worker.engine.drafts import NO_DRAFT
from chatlm.worker.engine.grammar import FairThread, Grammar
from chatlm.worker.ops.sampling import preparation

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.engine.sequence import Sequence


class AnswerMaker:
    """Makes the Answer of each sequence, and computes the masks of its grammar.

    Slow work happens in threads that serve clients in turn. `SequenceOutput.preparing` is then the future
    that the sequence must wait for before it may run."""

    KEPT_GRAMMARS = 16
    KEPT_GRAMMAR_BYTES = 64 << 20
    LARGE_VOCABULARY = 1 << 16  # tokens
    MANY_GRAMMARS = 16  # after so many it pays to make masks faster, even if somebody waits
    MASK_PATIENCE_S = 0.004  # how long a step waits for the masks of its rows

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.compiling = FairThread("grammars")
        self.masking = FairThread("masks")
        self.made = 0  # grammars, copies included
        self.fastest: object = None  # the vocabulary that no other will replace
        self.grammars: OrderedDict[tuple[str, str], Grammar] = OrderedDict()  # LRU, by owner and source

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
        return bool(self.grammars) and self.tokenizer.ready_vocabulary is not self.fastest

    def make_faster(self):
        """Make the vocabulary that has the fastest masks, for the grammars from now on."""
        self._on_thread(self._make_faster)

    def _on_thread(self, work: Callable[[], object]):
        """Have the thread do it as if a request needed it; returns then."""
        self.compiling.submit("", work).result()

    def _make_faster(self):
        try:
            self.fastest = self.tokenizer.grammar_vocabulary
        except Exception:  # what there is will do
            self.fastest = self.tokenizer.ready_vocabulary
            raise
        self.grammars.clear()

    def start_masks(self, sequences: Iterable[Sequence]):
        """Start to compute the masks of the next tokens, and of drafts, for those that go on with a grammar.
        If the queue is long, they sit out steps until their masks are ready."""
        for sequence in sequences:
            grammar = None if sequence.finished or not sequence.output.ready else sequence.output.grammar
            if not grammar:
                continue
            behind_s = self.masking.behind_s
            grammar.masks = self.masking.submit(sequence.work.params.client, grammar.compute_masks,
                                                sequence.draft.tokens)
            if behind_s > self.MASK_PATIENCE_S:
                sequence.output.preparing = grammar.masks

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

    def grammar(self, owner: str, source: str) -> Grammar:
        """A copy of a grammar, which is compiled only once. Runs only on the `compiling` thread."""
        self.made += 1
        if self.made == self.MANY_GRAMMARS and self.may_be_faster:
            self._make_faster()
        key = owner, source
        if key in self.grammars:
            self.grammars.move_to_end(key)
            return self.grammars[key].copy()
        self.tokenizer.ready_vocabulary       # make it first: its memory belongs to no one grammar
        before = heap_bytes()
        grammar = Grammar(self.tokenizer, source)
        self.grammars[key] = grammar
        grammar.matcher.compute_bitmask()     # makes it allocate all its memory
        grammar.size = heap_bytes() - before  # approximate: other threads allocate and free meanwhile
        while len(self.grammars) > self.KEPT_GRAMMARS or self._grammar_bytes() > self.KEPT_GRAMMAR_BYTES:
            self.grammars.popitem(last=False)
        return grammar.copy()

    def _grammar_bytes(self) -> int:
        return sum(grammar.size for grammar in self.grammars.values())

    def _prepare(self, sequence: Sequence):
        """Make the answer, or give an existing one the grammar that it needs now."""
        work = sequence.work
        output = sequence.output
        answer = output.answer
        try:
            if output.kept is None and (prepare := preparation(work.sampling)):
                output.kept = prepare(work.sampling, self.tokenizer, sequence.tokens)
            if answer and answer.awaits_grammar:
                answer.hold_call()
            elif answer and answer.grammar:
                answer.constraint.grammar = self._renewed(work.params.owner, answer.grammar)
            else:
                answer = self._new_answer(sequence)
            if answer.grammar:
                answer.grammar.masks.set_result(answer.grammar.compute_masks())
            output.answer = answer
        except Exception:
            output.answer = None  # so the answer fails when its next token is drawn
            log.exception("failed to prepare an answer")

    def _renewed(self, owner: str, broken: Grammar) -> Grammar:
        """A grammar in the state of one that is broken, with another lexer."""
        if self.grammar(owner, broken.source).lexer is broken.lexer:
            del self.grammars[owner, broken.source]
        return broken.renew(self.grammar(owner, broken.source))

    def _new_answer(self, sequence: Sequence) -> Answer:
        work = sequence.work
        compiled = partial(self.grammar, work.params.owner)
        source = work.params.grammar
        if source and (reader := answer_reader(self.tokenizer, work.params, work.prompt_ids)):
            source = reader.grammar(work.params)  # of the whole answer
        return Answer(work, self.tokenizer, compiled(source) if source else None, compiled,
                      sequence.limit - len(work.prompt_ids))
