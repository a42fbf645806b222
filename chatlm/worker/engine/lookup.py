"""Drafts from text that was seen before: a sequence's own, its owner's other answers, the operator's texts.

A text is indexed by its runs of two tokens; the places of a run are chained, latest first. A sequence keeps
the places that its last tokens were found at: each new token drops those that went on differently, so a long
match is not lost among many short ones. Places vote with the lengths of their matches. (Suffix trees, as in
Oliaro et al., "SuffixDecoding", 2024, count all places; here the latest decide, which takes Python 10 us a
token.)"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.log import log
from chatlm.worker.engine.drafts import NO_DRAFT, Draft

if TYPE_CHECKING:
    from chatlm.worker.engine.sequence import Sequence


RUN = 2        # tokens that must recur
LENGTHS = 3, 4, 6, 8, 12, 16, 24, 32, 48, 64  # to which a longer match is measured
LONGEST = 32   # tokens proposed
PLACES = 8     # of a sequence's last tokens that are kept, in all texts
LEAST = 0.05   # chance below which a token is not proposed
# see Place
TRUST = 0.25
MOST_TRUST = 16.0
LEAST_TRUST = 2.0
BULK = 48      # from so many tokens on, numpy is faster than a loop
BETWEEN = -1   # follows each text of a store; it is no token
TOKEN_BYTES = 200  # about what a store takes for a token: its number, its place and its key in a dictionary


def run_key(first, second):
    return first << 32 ^ second


class Text:
    """Tokens, and where each run of RUN tokens ends in them. They are only ever added to.

    Another thread may read while one adds."""

    def __init__(self, tokens: list[int] | array):
        self.tokens = tokens
        self.last: dict[int, int] = {}  # run -> the latest place after it
        self.before = [0] * RUN         # by place: the place before it after the same run; 0: none

    def index(self, end: int):
        """Index the places up to, not including, `end`: a token must follow each."""
        tokens = self.tokens
        last = self.last
        before = self.before
        begin = len(before)
        if end - begin >= BULK:
            return self._index_many(begin, end)
        for place in range(begin, end):
            key = run_key(tokens[place - 2], tokens[place - 1])
            before.append(last.get(key, 0))
            last[key] = place

    def _index_many(self, begin: int, end: int):
        ids = numpy.array(self.tokens[begin - RUN:end - 1], dtype=numpy.int64)
        keys = run_key(ids[:-1], ids[1:])
        order = numpy.argsort(keys, kind="stable")
        again = keys[order[1:]] == keys[order[:-1]]
        previous = numpy.zeros(len(keys), dtype=numpy.int64)
        previous[order[1:][again]] = begin + order[:-1][again]
        listed = keys.tolist()
        chained = previous.tolist()
        last = self.last
        for i in numpy.flatnonzero(previous == 0).tolist():  # runs that are new among these
            chained[i] = last.get(listed[i], 0)
        self.before += chained
        last.update(zip(listed, range(begin, end)))

    def places(self, key: int, most: int) -> list[int]:
        """The latest places after a run."""
        found = []
        place = self.last.get(key, 0)
        while place and len(found) < most:
            found.append(place)
            place = self.before[place]
        return found


class Store:
    """Texts that all sequences of one owner look in, in parts of which the oldest is dropped first."""

    def __init__(self):
        self.parts: list[Text] = [Text(array("i", [BETWEEN] * RUN))]

    def add(self, tokens: Seq[int], part_tokens: int):
        """Add a text; a part with more than `part_tokens` tokens is followed by a new one."""
        part = self.parts[-1]
        if len(part.tokens) > part_tokens:
            part = Text(array("i", [BETWEEN] * RUN))
            self.parts = [*self.parts, part]
        part.tokens.extend(tokens)
        part.tokens.append(BETWEEN)
        part.index(len(part.tokens))

    @property
    def num_tokens(self) -> int:
        return sum(len(part.tokens) for part in self.parts)


class Stores:
    """What is kept of ended answers, by their owners, within a number of tokens; the part that was least
    recently added to goes first. Adding happens in a thread."""

    PARTS = 16  # the share of the memory that is dropped at a time

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.by_owner: OrderedDict[tuple[str, ...], Store] = OrderedDict()
        self.common = Store()                   # texts of the operator, for everybody; never dropped
        self.thread = ThreadPoolExecutor(1, "said")
        self.adding: Future | None = None       # the newest task of the thread

    def of(self, owner: tuple[str, ...]) -> list[Text]:
        """The texts that this owner's answers may be drafted from."""
        own = self.by_owner.get(owner)
        return [*(own.parts if own else ()), *self.common.parts]

    def add_common(self, text: str, encode: Callable[[str], Seq[int]]):
        """Tokenize a text of the operator, as much as fits, leaving half of the memory to answers."""
        room = self.num_tokens // 2 - self.common.num_tokens
        tokens = encode(text)
        if len(tokens) > room:
            log.warning("--draft-text: of a text of %d tokens, the first %d fit in half of --draft-memory",
                        len(tokens), max(room, 0))
        if room > 0:
            self.common.add(tokens[:room], sys.maxsize)

    def add(self, owner: tuple[str, ...], tokens: list[int]):
        if self.num_tokens > 0 and len(tokens) > RUN:
            self.adding = self.thread.submit(self._add, owner, tokens[-self.num_tokens:])

    def _add(self, owner: tuple[str, ...], tokens: list[int]):
        store = self.by_owner.get(owner) or Store()
        store.add(tokens, self.num_tokens // self.PARTS)
        self.by_owner[owner] = store
        self.by_owner.move_to_end(owner)
        most = self.num_tokens - self.common.num_tokens
        while sum(each.num_tokens for each in self.by_owner.values()) > most:
            oldest, dropped = next(iter(self.by_owner.items()))
            dropped.parts = dropped.parts[1:]
            if not dropped.parts:
                del self.by_owner[oldest]

    def forget(self):
        """Forget all but the operator's texts."""
        self.thread.submit(self.by_owner.clear).result()

    def settle(self):
        """Wait until everything has been added."""
        if self.adding:
            self.adding.result()


class Place(NamedTuple):
    """Where the last tokens of a sequence were found: what may come next is text.tokens[end:]."""

    text: Text
    end: int
    length: int        # about how many tokens before it match
    trust: float = 0.0  # from the match before a token that differs

    @property
    def weight(self) -> float:
        return self.length + TRUST * self.trust

    def moved_on(self, new: Seq[int]) -> list[Place]:
        """The place after the tokens that came, if they are those of the text; else, if it matched long, the
        places where the text may go on as if a token had been replaced, inserted or left out."""
        text = self.text.tokens
        end = self.end
        many = len(new)
        if text[end:end + many] == new:
            return [self._replace(end=end + many, length=self.length + many)]
        same = common_length(text[end:end + many], new)
        trust = min((self.length + same + self.trust) / 2, MOST_TRUST)
        rest = new[same + 1:]
        if trust < LEAST_TRUST or len(rest) > 1:
            return []
        at = end + same
        found = []
        for skipped, used in ((1, rest), (0, rest), (1, new[same:]), (2, new[same:])):
            begin = at + skipped
            if text[begin:begin + len(used)] == used and begin + len(used) < len(text):
                found.append(Place(self.text, begin + len(used), len(used), trust))
        return found


class Follower:
    """The places of one sequence's last tokens, in its own text and in others."""

    def __init__(self, tokens: list[int], others: Seq[Text]):
        self.tokens = tokens      # the sequence's own list
        self.own = Text(tokens)
        self.texts = [self.own, *others]
        self.places: list[Place] = []
        self.seen = 0             # tokens that the places were moved on by

    def move_on(self) -> list[Place]:
        """The places that the last tokens were found at, the longest matches first."""
        tokens = self.tokens
        length = len(self.tokens)
        if length < RUN:
            return []
        self.own.index(length)
        kept: dict[tuple[int, int], Place] = {}
        if self.seen:
            new = tokens[self.seen:]
            packed = array("i", new)
            for place in self.places:
                for moved in place.moved_on(new if place.text is self.own else packed) if new else (place,):
                    key = id(moved.text), moved.end
                    if key not in kept or moved.weight > kept[key].weight:
                        kept[key] = moved
        self.seen = length
        tail = tokens[-LENGTHS[-1]:]
        packed = array("i", tail)
        run = run_key(*tail[-RUN:])
        for text in self.texts:
            same = tail if text is self.own else packed
            for end in text.places(run, PLACES):
                if (id(text), end) not in kept:
                    kept[id(text), end] = Place(text, end, match_length(text.tokens, end, same))
        # stable: where lengths are equal, places that were followed come first, then later ones
        self.places = sorted(kept.values(), key=lambda place: -place.weight)[:PLACES]
        return self.places

    def propose(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The likeliest continuation, and the chance of each token that it and all before are right."""
        ways = [(place.text.tokens[place.end:place.end + LONGEST], place.weight) for place in self.move_on()]
        ways = [(way, length) for way, length in ways if len(way) and way[0] != BETWEEN]
        if not ways:
            return (), ()
        votes: dict[int, float] = {}
        for way, length in ways:
            votes[way[0]] = votes.get(way[0], 0) + length * length
        first = max(votes, key=votes.__getitem__)
        best, length = next((way, length) for way, length in ways if way[0] == first)
        leaving = sorted((common_length(best, way), match * match) for way, match in ways)
        left = 0
        support = sum(votes.values())
        chance = 1.0
        chances = []
        for token in best:
            i = len(chances)
            total = support
            while leaving[left][0] <= i:  # the best way itself never leaves
                support -= leaving[left][1]
                left += 1
            chance *= support / total * (length + i) / (length + i + 2)
            if chance < LEAST or token == BETWEEN:
                break
            chances.append(chance)
        return tuple(best[:len(chances)]), tuple(chances)


def match_length(tokens: Seq[int], end: int, tail: Seq[int]) -> int:
    """How many tokens before `end` are those of the tail, as one of LENGTHS; RUN are."""
    found = RUN
    for length in LENGTHS:
        if length > end or length > len(tail) or tokens[end - length:end] != tail[-length:]:
            break
        found = length
    return found


def common_length(one: Seq[int], other: Seq[int]) -> int:
    """How many tokens at the beginning are equal. Both may be lists or arrays."""
    if type(one) is type(other) and one == other:
        return len(one)
    for i, (mine, yours) in enumerate(zip(one, other)):
        if mine != yours:
            return i
    return min(len(one), len(other))


class Lookup:
    """Looks up what followed a sequence's last tokens before: in its own prompt and answer, in what its owner
    was answered lately with the same adapter, and in the operator's texts."""

    name = "lookup"

    def __init__(self, num_tokens: int = 1 << 16):
        """num_tokens: of ended answers and the operator's texts to keep, 0: none."""
        self.stores = Stores(num_tokens)
        self.followers: dict[Sequence, Follower | None] = {}  # None: has not been asked yet

    def read(self, texts: Seq[str], encode: Callable[[str], Seq[int]]):
        """Tokenize texts of the operator, in the thread; all answers may be drafted from them."""
        for text in texts:
            self.stores.adding = self.stores.thread.submit(self.stores.add_common, text, encode)

    def begin(self, sequence: Sequence):
        self.followers[sequence] = None

    def propose(self, sequences: Seq[Sequence]) -> list[Draft]:
        return [self._draft(sequence) for sequence in sequences]

    def _draft(self, sequence: Sequence) -> Draft:
        if (follower := self.followers[sequence]) is None:
            # marks beside log-probabilities say what repeats itself here: the page's token lens asks again
            marked = sequence.work.params.logprobs is not None
            others = [] if marked else self.stores.of(owner_of(sequence))
            follower = self.followers[sequence] = Follower(sequence.tokens, others)
        tokens, chances = follower.propose()
        return Draft(self.name, tokens, chances, len(sequence.tokens)) if tokens else NO_DRAFT

    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int):
        pass  # Drafting measures it

    def end(self, sequence: Sequence):
        """Keep what was new in it, however it ended: what it had to compute of its prompt, and its answer."""
        if self.followers.pop(sequence, None) is None:  # it has drawn no token that another one followed
            return
        new = min(sequence.output.usage.cached_tokens, len(sequence.work.prompt_ids))
        self.stores.add(owner_of(sequence), [token for token in sequence.tokens[new:] if token >= 0])

    def forget(self):
        self.stores.forget()


def owner_of(sequence: Sequence) -> tuple[str, ...]:
    """Whose text it is: one key's or, without keys, one address's, with one adapter. What is drafted shows in
    how fast an answer comes, so nobody's text is drafted from another's."""
    params = sequence.work.params
    return params.owner, params.client, sequence.adapter_digest
