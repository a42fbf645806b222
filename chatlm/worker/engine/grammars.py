"""The compiled grammars of an engine, and the masks that threads compute of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from chatlm.common.memory import heap_bytes
from chatlm.worker.engine.fair_thread import FairThread
from chatlm.worker.engine.grammar import Grammar

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.engine.sequence import Sequence


class Grammars:
    """Compiles each grammar once, with the vocabulary that is there, and computes masks in a thread.

    Masks are computed ahead of the step that needs them. A sequence whose mask is late sits out steps: its
    `SequenceOutput.preparing` is then the mask."""

    KEPT = 16
    KEPT_BYTES = 64 << 20
    MANY = 16  # after so many it pays to make masks faster, even if somebody waits
    MASK_PATIENCE_S = 0.004  # how long a queue of masks may be that a step waits for

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.masking = FairThread("masks")
        self.made = 0  # grammars, copies included
        self.fastest: object = None  # the vocabulary that no other will replace
        self.kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()  # LRU, by owner and source

    # Called by the thread that compiles

    def compiled(self, owner: str, source: str) -> Grammar:
        """A copy of a grammar, which is compiled only once for each owner."""
        self.made += 1
        if self.made == self.MANY and self.may_be_faster:
            self.make_faster()
        key = owner, source
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key].copy()
        self.tokenizer.ready_vocabulary       # make it first: its memory belongs to no one grammar
        before = heap_bytes()
        grammar = Grammar(self.tokenizer, source)
        self.kept[key] = grammar
        grammar.matcher.compute_bitmask()     # makes it allocate all its memory
        grammar.size = heap_bytes() - before  # approximate: other threads allocate and free meanwhile
        while len(self.kept) > self.KEPT or self._kept_bytes() > self.KEPT_BYTES:
            self.kept.popitem(last=False)
        return grammar.copy()

    def _kept_bytes(self) -> int:
        return sum(grammar.size for grammar in self.kept.values())

    def renewed(self, owner: str, broken: Grammar) -> Grammar:
        """A grammar in the state of one that is broken, with another lexer."""
        if self.compiled(owner, broken.source).lexer is broken.lexer:
            del self.kept[owner, broken.source]
        return broken.renew(self.compiled(owner, broken.source))

    @property
    def may_be_faster(self) -> bool:
        """Have grammars been made with the vocabulary that is made soonest?"""
        return bool(self.kept) and self.tokenizer.ready_vocabulary is not self.fastest

    def make_faster(self):
        """Make the vocabulary that has the fastest masks, for the grammars from now on."""
        try:
            self.fastest = self.tokenizer.grammar_vocabulary
        except Exception:  # what there is will do
            self.fastest = self.tokenizer.ready_vocabulary
            raise
        self.kept.clear()

    # Called by the thread that computes steps

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
