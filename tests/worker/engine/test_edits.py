"""Replacements in copied texts: drafts go on as the copy does, and stop when it stops."""

import random
from array import array

import pytest

from chatlm.worker.engine.edits import LONGEST_EDIT, MOST_ALIKE, MOST_FIRST, Edit, Edits, Lost
from chatlm.worker.engine.lookup import LONGEST, PLACES, Lookup, Matches, Text
from chatlm.worker.engine.sequence import Assignment, Sequence
from chatlm.common.messages.requests import AnswerParams

NEWLINE, SLASH, N = 900, 901, 902


def lines(count, length, begin=100):
    return [[*range(begin + 20 * number, begin + 20 * number + length)] for number in range(count)]


def joined(parts, between):
    return [token for part in parts for token in (*part, *between)]


def drafts(source, copy, others=()):
    """What is proposed before each token of a copy of the sequence's own beginning."""
    live = [*source, 1, 2]
    follower, found = Matches(live, others), []
    for token in copy:
        found.append(follower.propose()[0])
        live.append(token)
    return found


def steps(source, copy, others=()):
    """How many steps the copy takes if each has a draft of which what is right is taken."""
    live = [*source, 1, 2]
    follower, at, count = Matches(live, others), 0, 0
    while at < len(copy):
        tokens = follower.propose()[0]
        right = next((i for i, (one, other) in enumerate(zip(tokens, copy[at:])) if one != other), min(len(tokens), len(copy) - at))
        live += copy[at:at + right + 1]
        at += right + 1
        count += 1
    return count


def test_a_file_is_drafted_into_a_json_string():
    """Newlines become two tokens: after the first of them whole lines follow in one draft."""
    parts = lines(12, 9)
    source, copy = joined(parts, [NEWLINE]), joined(parts, [SLASH, N])
    first = drafts(source, copy)
    at = len(parts[0]) + 4      # two tokens after the first newline
    assert first[at][:12] == tuple(copy[at:at + 12])
    assert steps(source, copy) <= 12


@pytest.mark.parametrize("old, new", [([800], [700]), ([800, 801], [700, 701, 702]), ([800, 801, 802], [700])])
def test_a_renamed_name_is_drafted_renamed(old, new):
    """Whatever the lengths of both names."""
    parts = [[*part, *old] for part in lines(10, 8)]
    copy = [[*part[:8], *new] for part in parts]
    source, copied = joined(parts, []), joined(copy, [])
    plain = steps(source, source)
    assert steps(source, copied) <= plain + 6


def test_a_copy_without_the_edit_ends_it():
    """The first name that stays as it is ends a rename, and the next one that changes starts it again."""
    edits = Edits()
    edits.learn([800], (700,))
    assert [*edits.rewritten([5, 800, 6])] == [5, 700, 6]
    assert edits.follow([5, 800, 6], 0, (), [5, 800]) == (2, (), 2)
    assert [*edits.rewritten([5, 800, 6])] == [5, 800, 6]
    assert edits.follow([5, 800, 6], 0, (), [5, 700, 6]) == (3, (), 3)
    assert [*edits.rewritten([5, 800, 6])] == [5, 700, 6]
    assert edits.follow([5, 800, 6], 0, (), [5, 9]) == (1, (), 1)
    assert [*edits.rewritten([5, 800, 6])] == [5, 800, 6]


def test_half_of_a_replacement_is_followed_by_the_rest():
    """A step may end in the middle of the new name."""
    edits = Edits()
    edits.learn([800, 801], (700, 701, 702,))
    place, owed, right = edits.follow([5, 800, 801, 6], 0, (), [5, 700])
    assert (place, owed, right) == (3, (701, 702), 2)
    assert edits.follow([5, 800, 801, 6], place, owed, [701, 702, 6]) == (4, (), 3)
    assert edits.follow([5, 800, 801, 6], place, owed, [701, 9]) == (3, (), 1)


def test_an_earlier_answer_s_edit_waits_for_its_sign():
    """An edit of an earlier answer is made from its first token here on, and not before."""
    known = {}
    Edits(known).learn([800], (700, 701,))
    edits = Edits(known)
    assert [*edits.rewritten([5, 800, 6, 800])] == [5, 800, 6, 800]
    assert edits.follow([5, 800, 6], 1, (), [700]) == (2, (701,), 1)
    assert [*edits.rewritten([6, 800, 6])] == [6, 700, 701, 6]


def test_come_back_needs_two_tokens_nearby():
    """A copy has come back where two tokens in a row are as in the text, a few tokens later."""
    text = [*range(100, 200)]
    for came, back in (([7, 8, 115, 116], 17), ([7, 115], None), ([7, 8, 190, 191], None), ([112, 113], 14), ([7, 108, 109], None)):
        tokens = [*text[:10], *came]
        assert Edits().come_back(Lost(text, 10, 10, 8.0), tokens) == back
    edits = Edits()
    edits.come_back(Lost(array("i", text), 10, 10, 8.0), [*text[:10], 7, 8, 112, 113])
    [[edit]] = edits.made.values()
    assert (edit.old, edit.new) == ([110, 111], (7, 8))


def test_only_short_and_few_edits_are_remembered():
    edits = Edits()
    for first in range(200):
        for second in range(20):
            edits.learn([first, second], (1,))
    assert len(edits.known) == len(edits.made) == MOST_FIRST and all(len(alike) <= MOST_ALIKE for alike in edits.known.values())
    text = [*range(100, 200)]
    edits = Edits()
    assert edits.come_back(Lost(text, 10, 10, 8.0), [*text[:10], *range(LONGEST_EDIT + 1), 112, 113]) == 14
    assert not edits.known


def sequence(name, prompt, **params):
    made = Sequence(Assignment(name, tuple(prompt), AnswerParams(**params), 100), [*prompt], 10_000)
    made.computed = len(made.tokens) - 1
    return made


@pytest.mark.parametrize("other, shared", [({}, True), ({"client": "bob"}, False), ({"owner": "other key"}, False)])
def test_edits_are_their_owner_s_alone(other, shared):
    """The answers of another owner do not show what somebody has replaced."""
    lookup, parts = Lookup(), lines(4, 9)
    source, copy = joined(parts, [NEWLINE]), joined(parts, [SLASH, N])
    one = sequence("a", [*source, 1, 2], client="alice", owner="a key")
    lookup.begin(one)
    for token in copy:
        lookup.propose([one])
        one.tokens.append(token)
    lookup.end(one)
    again = joined(lines(4, 9, begin=400), [NEWLINE])
    two = sequence("b", [*again, 1, 2, *again[:9], SLASH], **({"client": "alice", "owner": "a key"} | other))
    two.tokens, came = two.tokens[:-1], two.tokens[-1:]
    lookup.begin(two)
    lookup.propose([two])
    two.tokens += came
    [draft] = lookup.propose([two])
    assert (draft.tokens[:3] == (N, *again[10:12])) is shared
    lookup.forget()
    assert not lookup.edits


def test_few_owners_edits_are_kept():
    lookup = Lookup()
    for number in range(2 * lookup.MOST_OWNERS):
        one = sequence("a", [1, 2, 3], client=str(number))
        lookup.begin(one)
        lookup.propose([one])
        lookup.end(one)
    assert len(lookup.edits) == lookup.MOST_OWNERS
    nothing = Lookup(0)
    nothing.begin(one)
    nothing.propose([one])
    assert not nothing.edits


@pytest.mark.parametrize("seed", range(6))
def test_drafts_of_random_edits_are_tokens(seed):
    """Copies with random changes, of own and other texts: every draft has tokens of the texts, at most so many."""
    dice = random.Random(seed)
    vocabulary = dice.choice([3, 30, 300])
    other = Text(array("i", [-1, -1, *(dice.randrange(vocabulary) for _ in range(400)), -1]))
    other.index(len(other.tokens))
    live = [dice.randrange(vocabulary) for _ in range(200)]
    follower = Matches(live, [other])
    for _ in range(60):
        begin = dice.randrange(len(live) - 20)
        for token in live[begin:begin + 20] if dice.random() < 0.5 else other.tokens[begin % 380 + 2:begin % 380 + 20]:
            for came in dice.choice([[token], [token], [token], [dice.randrange(vocabulary)], [token, 1, 2], []]):
                tokens, chances = follower.propose()
                assert len(tokens) == len(chances) <= LONGEST and all(0 <= each < max(vocabulary, 3) for each in tokens)
                assert len(follower.best) <= PLACES and [*chances] == sorted(chances, reverse=True)
                live.append(came)


def test_an_edit_is_compared_by_its_place():
    """Of edits with the same first token, the newest one whose tokens are all there is made."""
    edits = Edits()
    edits.learn([1, 2], (7,))
    edits.learn([1, 3], (8,))
    edits.learn([1], (9,))
    assert [*edits.rewritten([1, 2, 1, 3, 1])] == [9, 2, 9, 3, 9]
    edits = Edits()
    edits.learn([1], (9,))
    edits.learn([1, 2], (7,))
    assert [*edits.rewritten([1, 2, 1, 3, 1])] == [7, 9, 3, 9] and Edit([1], (2,)) != Edit([1], (2,))
