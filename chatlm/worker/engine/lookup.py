"""Drafts from text that was seen before: a sequence's own, its owner's other answers, the operator's texts.

A text is indexed by its runs of two tokens; the places of a run are chained, latest first. For each sequence
the places where its last tokens were found are kept. A new token drops the places where the text goes on
differently, so a long match is not lost among many short ones. Where a copied text is changed again and again
in the same way, the drafts are changed alike (edits.py). Places vote with the lengths of their matches.
(Suffix trees, as in Oliaro et al., "SuffixDecoding", 2024, count all places. Here the latest decide, which
takes Python 10 us a token.)"""

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
from chatlm.worker.engine.edits import WINDOW, Edits, Known, Lost

if TYPE_CHECKING:
    from chatlm.worker.engine.sequence import Sequence


RUN = 2        # tokens that must recur
LENGTHS = 3, 4, 6, 8, 12, 16, 24, 32, 48, 64  # to which a longer match is measured
LONGEST = 64   # tokens proposed
PLACES = 16    # of a sequence's last tokens that are kept, in all texts
LEAST = 0.05   # chance below which a token is not proposed
# see Match
TRUST = 0.25
MOST_TRUST = 16.0
LEAST_TRUST = 2.0
LEAST_LOST = 4  # tokens of a match to which a copy may come back
MOST_LOST = 4   # such matches
BULK = 48      # from so many tokens on, numpy is faster than a loop
BETWEEN = -1   # follows each text of a store; it is no token
TOKEN_BYTES = 200  # about what a store takes for a token: its number, its place and its key in a dictionary


def run_key(first, second):
    return first << 32 ^ second


class Text:
    """Tokens, and where each run of RUN tokens ends in them. Both only ever grow, so that a thread may read
    while another one adds."""

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


class TextStore:
    """Texts in which all sequences of one owner look. They are in parts, of which the oldest is dropped
    first."""

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


class TextStores:
    """The tokens of ended answers, by their owners, and the operator's texts. There is room for so many
    tokens; the oldest part of the owner who added least recently goes first. A thread adds them."""

    PARTS = 16  # the share of the memory that is dropped at a time

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.by_owner: OrderedDict[tuple[str, ...], TextStore] = OrderedDict()
        self.common = TextStore()                   # texts of the operator, for everybody; never dropped
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
        store = self.by_owner.get(owner) or TextStore()
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


class Match(NamedTuple):
    """A place where the last tokens of a sequence were found: text.tokens[end:] may come next."""

    text: Text
    end: int
    length: int        # about how many tokens before it match
    trust: float = 0.0  # from the match before a token that differs
    owed: Seq[int] = ()  # tokens that replace some of the text and come before its end

    @property
    def weight(self) -> float:
        return self.length + TRUST * self.trust

    def moved_on(self, new: Seq[int], edits: Edits) -> tuple[list[Match], int, int]:
        """The match after new tokens, if the text has them here too. Else, if the match was long, the places
        where the text may go on as if a token had been replaced, inserted or left out.

        Also where in the text it ends, and how many of the tokens were right."""
        text = self.text.tokens
        many = len(new)
        owed: Seq[int] = ()
        followed = text[self.end:self.end + many]
        if self.owed or edits.concern(followed):
            end, owed, same = edits.follow(text, self.end, self.owed, new)
        else:
            same = common_length(followed, new)
            end = self.end + same
        if same == many:
            return [self._replace(end=end, length=self.length + many, owed=owed)], end, same
        trust = min((self.length + same + self.trust) / 2, MOST_TRUST)
        rest = new[same + 1:]
        if trust < LEAST_TRUST or len(rest) > 1:
            return [], end, same
        at = end
        found = []
        for skipped, used in ((1, rest), (0, rest), (1, new[same:]), (2, new[same:])):
            begin = at + skipped
            if text[begin:begin + len(used)] == used and begin + len(used) < len(text):
                found.append(Match(self.text, begin + len(used), len(used), trust))
        return found, end, same


class Matches:
    """Where one sequence's last tokens were found, in its own text and in others."""

    def __init__(self, tokens: list[int], others: Seq[Text], edits: Edits | None = None):
        self.tokens = tokens      # the sequence's own list
        self.edits = Edits() if edits is None else edits
        self.lost: list[tuple[Text, Lost]] = []  # long matches that the last tokens have left
        self.own = Text(tokens)
        self.texts = [self.own, *others]
        self.best: list[Match] = []  # the longest ones
        self.moved = 0               # how many of the tokens they have been moved on by

    def move_on(self) -> list[Match]:
        """The places where the last tokens were found, the longest matches first."""
        tokens = self.tokens
        length = len(self.tokens)
        if length < RUN:
            return []
        self.own.index(length)
        kept = self._moved_on(tokens[self.moved:]) if self.moved else {}
        self.moved = length
        tail = tokens[-LENGTHS[-1]:]
        packed = array("i", tail)
        run = run_key(*tail[-RUN:])
        for text in self.texts:
            same = tail if text is self.own else packed
            for end in text.places(run, PLACES):
                if (id(text), end, 0) not in kept:
                    kept[id(text), end, 0] = Match(text, end, match_length(text.tokens, end, same))
        # stable: where lengths are equal, places that were followed come first, then later ones
        self.best = sorted(kept.values(), key=lambda match: -match.weight)[:PLACES]
        return self.best

    def _moved_on(self, new: list[int]) -> dict[tuple[int, int, int], Match]:
        """The matches after new tokens, by text, place and what is owed: at each place the best one."""
        if not new:
            return {(id(match.text), match.end, len(match.owed)): match for match in self.best}
        found: list[Match] = []
        packed = array("i", new)
        lost: list[tuple[Text, Lost]] = []
        for match in self.best:
            followed, end, same = match.moved_on(new if match.text is self.own else packed, self.edits)
            found += followed
            if same < len(new) and match.length + same >= LEAST_LOST and len(lost) < MOST_LOST:
                lost.append((match.text, Lost(match.text.tokens, end, self.moved + same, match.weight)))
        found += self._come_back(lost)
        kept: dict[tuple[int, int, int], Match] = {}
        for moved in found:
            key = id(moved.text), moved.end, len(moved.owed)
            if key not in kept or moved.weight > kept[key].weight:
                kept[key] = moved
        return kept

    def _come_back(self, newly: list[tuple[Text, Lost]]) -> list[Match]:
        """Matches at the places to which long ones that were lost have come back."""
        found: list[Match] = []
        waiting: list[tuple[Text, Lost]] = []
        for text, lost in [*newly, *self.lost][:MOST_LOST]:
            place = self.edits.come_back(lost, self.tokens)
            if place is not None:
                found.append(Match(text, place, RUN, min(lost.weight, MOST_TRUST)))
            elif len(self.tokens) - lost.since < WINDOW:
                waiting.append((text, lost))
        self.lost = waiting
        return found

    def propose(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The likeliest continuation, and the chance of each token that it and all before are right."""
        ways = []  # (what followed, weight) of each match
        for match in self.move_on():
            way = self.edits.rewritten(match.text.tokens[match.end:match.end + LONGEST])
            if match.owed:
                way = [*match.owed, *way]
            way = way[:LONGEST]
            if len(way) and way[0] != BETWEEN:
                ways.append((way, match.weight))
        if not ways:
            return (), ()
        votes: dict[int, float] = {}  # for the next token
        for way, length in ways:
            votes[way[0]] = votes.get(way[0], 0) + length * length
        first = max(votes, key=votes.__getitem__)
        best, length = next((way, length) for way, length in ways if way[0] == first)
        # how many tokens each way has in common with the best one, and its vote
        leaving = sorted((common_length(best, way), weight * weight) for way, weight in ways)
        left = 0                       # ways that have left the best one
        support = sum(votes.values())  # of the others
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
    """About how many tokens before `end` equal the last ones of the tail: one of LENGTHS, or RUN, which
    do."""
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
    """The source that looks up what followed a sequence's last tokens before: in its own prompt and answer,
    in its owner's latest answers with the same adapter, and in the operator's texts."""

    name = "lookup"
    rests = True
    MOST_OWNERS = 256  # whose edits are kept

    def __init__(self, num_tokens: int = 1 << 16):
        """num_tokens: of ended answers and the operator's texts to keep, 0: none."""
        self.stores = TextStores(num_tokens)
        self.edits: OrderedDict[tuple[str, ...], Known] = OrderedDict()
        self.matches: dict[Sequence, Matches | None] = {}  # None: has not been asked yet

    def read(self, texts: Seq[str], encode: Callable[[str], Seq[int]]):
        """Tokenize texts of the operator, in the thread; all answers may be drafted from them."""
        for text in texts:
            self.stores.adding = self.stores.thread.submit(self.stores.add_common, text, encode)

    def begin(self, sequence: Sequence):
        self.matches[sequence] = None

    def propose(self, sequences: Seq[Sequence]) -> list[Draft]:
        return [self._draft(sequence) for sequence in sequences]

    def _draft(self, sequence: Sequence) -> Draft:
        if (matches := self.matches[sequence]) is None:
            # marks beside log-probabilities say what repeats itself here: the page's token lens asks again
            marked = sequence.work.params.logprobs is not None
            owner = owner_of(sequence)
            others = [] if marked else self.stores.of(owner)
            learns = not marked and not sequence.work.params.temporary
            edits = Edits(self._known_edits(owner)) if learns else Edits()
            matches = self.matches[sequence] = Matches(sequence.tokens, others, edits)
        tokens, chances = matches.propose()
        return Draft(self.name, tokens, chances, len(sequence.tokens)) if tokens else NO_DRAFT

    def _known_edits(self, owner: tuple[str, ...]) -> Known:
        """The edits of this owner's answers, kept as long as it is among the last owners, if texts are."""
        known = self.edits.pop(owner, {})
        if self.stores.num_tokens:
            self.edits[owner] = known
            if len(self.edits) > self.MOST_OWNERS:
                self.edits.popitem(last=False)
        return known

    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int):
        pass  # Drafting measures it

    def end(self, sequence: Sequence):
        """Keep what was new in it, however it ended: its answer, and what it had to compute of its prompt.
        Nothing of a temporary one."""
        if self.matches.pop(sequence, None) is None:  # it has drawn no token that another one followed
            return
        if sequence.work.params.temporary:
            return
        new = min(sequence.output.usage.cached_tokens, len(sequence.work.prompt_ids))
        self.stores.add(owner_of(sequence), [token for token in sequence.tokens[new:] if token >= 0])

    def forget(self):
        self.stores.forget()
        self.edits.clear()


def owner_of(sequence: Sequence) -> tuple[str, ...]:
    """Whose text it is: that of one key or, without keys, of one address, with one adapter. How fast an
    answer comes shows what was drafted, so nobody's text is drafted from another's."""
    params = sequence.work.params
    return params.owner, params.client, sequence.adapter_digest
