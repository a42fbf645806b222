"""Which tokens a grammar allows next, computed in threads."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence as Seq
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy

from chatlm.common.errors import require_library
from chatlm.common.text.formats import A_MARK, MARKS
from chatlm.common.text.patterns import GRAMMAR_LIMITS

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer


LONGEST_WAY = 2048        # the most bytes tried to end an answer
TEXT_ENDS = b'" @:0'      # tried first in text: its end, then characters that a format may still require
VALUE_ENDS = b'}]n",0'    # tried first elsewhere: the end of an object or list, null, other short values
ANY_BYTE = (*range(0x20, 0x100), *range(0x20))
A_LIMIT = re.compile(r"too (many|big|large|complex|deep)|limit|exceed")  # llguidance, of a grammar's size
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a character that began earlier


class Grammar:
    """Which tokens may come next. A thread computes the mask of the next token in the background, and those
    after each token of its draft.

    Copies share a lexer with a limited number of states. The states that drafts add, or hours of answers, may
    use them up, which breaks the grammar. It then starts over with a new lexer (`renew`): once without
    drafts, so that these make no answer fail, and once more."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        llguidance = require_library("llguidance", "constrained decoding")
        limits = llguidance.LLParserLimits(**GRAMMAR_LIMITS)
        self.matcher = llguidance.LLMatcher(tokenizer.ready_vocabulary, source, log_level=0, limits=limits)
        self.unusable = self.matcher.is_error()  # llguidance has refused the source
        self.tokenizer = tokenizer
        self.ends = tokenizer.stop_tokens
        self.bytes = tokenizer.byte_tokens
        self.source, self.lexer = source, object()  # lexer: the same one in its copies
        self.fed = []          # the tokens so far
        self.renewed = False
        self.follows_drafts = True
        self.size = 0                 # bytes, shared with its copies
        self.masks: Future = Future()  # the masks of the next token and after a draft's, each as bytes

    def copy(self) -> Grammar:
        """An independent copy in the same state (10 us; compiling takes up to 1 s)."""
        twin = copy.copy(self)
        twin.matcher = self.matcher.deep_copy()
        twin.masks = Future()
        twin.fed = []
        return twin

    def renew(self, fresh: Grammar) -> Grammar:
        """Bring `fresh`, a new copy of the same grammar, to the state of this one."""
        fresh.renewed = not self.follows_drafts
        fresh.follows_drafts = False
        fresh.fed = self.fed
        fresh.matcher.consume_tokens(fresh.fed)
        return fresh

    def compute_masks(self, draft: Seq[int] = ()) -> list[bytes]:
        """The mask of the next token, and those after each token of a draft, up to one that is not
        allowed."""
        matcher = self.matcher
        masks = [self.matcher.compute_bitmask()]
        fed = 0
        for token in draft:
            if not masks[-1][token >> 3] >> (token & 7) & 1 or token in self.ends:
                break
            fed += 1
            if not matcher.consume_token(token) or matcher.is_stopped():
                break
            masks.append(matcher.compute_bitmask())
        if fed:
            matcher.rollback(fed)
        return masks

    def allowed(self, vocab_size: int, row: int = 0) -> numpy.ndarray | None:
        """The mask after `row` tokens of the draft, one flag per token (vocab_size,). None if the draft has
        broken the grammar before that, so that what is drawn there does not matter."""
        masks = self.masks.result()
        if row >= len(masks):
            return None
        words = numpy.frombuffer(masks[row], dtype=numpy.uint8)
        return numpy.unpackbits(words, count=vocab_size, bitorder="little").astype(bool)

    def fitting(self, tokens: Seq[int]) -> int:
        """How many of these tokens may follow. One that ends the answer does not count."""
        count = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        if not count or not self.follows_drafts or self.matcher.is_error():
            return 0
        return self.matcher.validate_tokens(list(tokens[:count]))

    def forced(self) -> list[int]:
        """The tokens that must come next, each the only one that is allowed. Takes up to 80 us."""
        able = self.follows_drafts and not self.matcher.is_error()
        return self.matcher.compute_ff_tokens() if able else []

    def feed(self, token: int) -> bool:
        """False if the grammar rejects the token, has grown too large to follow, or cannot be satisfied."""
        if token in self.ends:
            return self.matcher.is_accepting()
        self.fed.append(token)
        return self.matcher.consume_token(token)

    def feed_text(self, text: str) -> bool:
        """Feed text, in which some characters stand for marker tokens."""
        marks = {MARKS[name]: [token] for name, token in self.tokenizer.markers.items()}
        tokenize = self.tokenizer.ready_vocabulary.greedy_tokenize
        parts = (marks.get(part) or tokenize(part) for part in re.split(f"({A_MARK.pattern})", text))
        self.fed += itertools.chain(*parts)
        return self.matcher.consume_tokens(self.fed)

    def take_back(self):
        """Forget the last token that was fed."""
        self.fed.pop()
        self.matcher.rollback(1)

    def way_to_end(self, most: int) -> list[int] | None:
        """The tokens of a short way from here to where the answer may end; None if it takes more than `most`.

        It tries bytes (3 us each), first those that end something. LookupError if there is no way."""
        matcher = self.matcher.deep_copy()
        way = bytearray()
        one = self.bytes

        def fitting(several: Iterable[int]) -> Iterator[int]:
            return (byte for byte in several if byte in one and matcher.validate_tokens([one[byte]]))

        while not matcher.is_accepting() or matcher.is_error():
            if not (more := matcher.compute_ff_bytes()):
                first = TEXT_ENDS if any(fitting(b"aA")) else VALUE_ENDS
                more = bytes(itertools.islice(fitting((*first, *ANY_BYTE)), 1))
            if matcher.is_error() or not more or not all(byte in one for byte in more):
                raise LookupError("only markers can follow, or the lexer is full")
            if len(way) > LONGEST_WAY:
                return None
            matcher.consume_tokens([one[byte] for byte in more])
            way += more
        rest = bytes(way).lstrip(CONTINUATION_BYTES)
        tokens = [one[byte] for byte in way[:len(way) - len(rest)]]
        tokens += self.tokenizer.ready_vocabulary.greedy_tokenize(rest.decode(errors="ignore"))
        return tokens if len(tokens) <= most else None

    @property
    def complete(self) -> bool:
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def fault(self) -> str:
        """What broke the matcher, if that is our fault; "" if it works, or if the client's grammar is wrong
        or too large."""
        if self.unusable or not self.matcher.is_error():
            return ""
        error = self.matcher.get_error()
        return "" if A_LIMIT.search(error) else error

    @property
    def may_renew(self) -> bool:
        """Is it broken, perhaps only since its lexer is full, and may it start over with another lexer?"""
        return self.matcher.is_error() and not self.renewed
