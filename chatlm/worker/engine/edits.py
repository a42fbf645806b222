"""Replacements seen while a text is copied, so that drafts go on as the copy does.

An agent that writes a file into a JSON string copies its lines, but has two other tokens in place of each
newline. An edit renames one identifier wherever it occurs. So when a copy has left a text and comes back to
it a few tokens later, what stood there and what came instead are remembered, and the drafts that follow have
the same replacement."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

LONGEST_EDIT = 8  # tokens replaced, and tokens in their place
WINDOW = 12       # a copy that has left a text may come back within so many tokens, to as many tokens of it
MOST_FIRST = 64   # first tokens of what is replaced that are remembered; the oldest is forgotten first
MOST_ALIKE = 8    # edits with the same first token


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """These tokens of a text were replaced by others."""

    old: list[int]
    new: tuple[int, ...]


class Lost(NamedTuple):
    """A copy that has left a text."""

    tokens: Seq[int]  # of the text
    place: int        # in the text, where it has left it
    since: int        # how many tokens the sequence had then
    weight: float     # of the match


Known = dict[int, list[Edit]]  # edits by the first token that is replaced, the newest one first


class Edits:
    """The replacements that one sequence makes. An edit of its owner's earlier sequences counts from its
    first occurrence here; what is copied unchanged, or replaced otherwise, ends it."""

    def __init__(self, known: Known | None = None):
        """known: those of its owner."""
        self.known: Known = {} if known is None else known
        self.made: Known = {}  # in this sequence, and not ended

    def learn(self, old: list[int], new: tuple[int, ...]):
        edit = Edit(old, new)
        self._start(edit)
        remember(self.known, edit)

    def _start(self, edit: Edit):
        if edit not in self.made.get(edit.old[0], ()):
            remember(self.made, edit)

    def _end(self, edit: Edit):
        first = edit.old[0]
        if first in self.made:
            self.made[first] = [other for other in self.made[first] if other.old != edit.old]
            if not self.made[first]:
                del self.made[first]

    def concern(self, tokens: Seq[int]) -> bool:
        """Might one of these tokens be replaced?"""
        return not self.known.keys().isdisjoint(tokens)

    def rewritten(self, tokens: Seq[int]) -> Seq[int]:
        """The tokens of a text, with the replacements that this sequence makes."""
        made = self.made
        if made.keys().isdisjoint(tokens):
            return tokens
        found: list[int] = []
        begin = 0
        for place in [place for place, token in enumerate(tokens) if token in made]:
            edit = edit_at(made, tokens, place) if place >= begin else None
            if edit:
                found += tokens[begin:place]
                found += edit.new
                begin = place + len(edit.old)
        found += tokens[begin:]
        return found

    def follow(self, tokens: Seq[int], place: int, owed: Seq[int],
               new: Seq[int]) -> tuple[int, Seq[int], int]:
        """Follow a text from a place with new tokens, of which those `owed` come before the text goes on ->
        (place, what is owed there, how many of the new tokens were right)."""
        done = 0
        while done < len(new):
            if owed:
                if new[done] != owed[0]:
                    return place, (), done
                owed = owed[1:]
                done += 1
                continue
            edit = edit_at(self.known, tokens, place)
            if edit and new[done] == edit.new[0]:
                self._start(edit)
                owed = edit.new
                place += len(edit.old)
                continue
            if edit:
                self._end(edit)
            if place >= len(tokens) or tokens[place] != new[done]:
                return place, (), done
            place += 1
            done += 1
        return place, owed, done

    def come_back(self, lost: Lost, tokens: list[int]) -> int | None:
        """The place in the text to which a copy has come back with its last two tokens; None if it has not.
        What was replaced meanwhile is learned."""
        text = lost.tokens
        left = len(tokens) - 2
        if left < lost.since:
            return None
        last = tokens[left:]
        places = range(lost.place, min(lost.place + WINDOW, len(text) - 2))
        place = next((at for at in places if text[at] == last[0] and text[at + 1] == last[1]), None)
        if place is None:
            return None
        back = place + 2
        while place > lost.place and left > lost.since and text[place - 1] == tokens[left - 1]:
            place -= 1
            left -= 1
        old = [*text[lost.place:place]]
        new = tuple(tokens[lost.since:left])
        if 0 < len(old) <= LONGEST_EDIT and 0 < len(new) <= LONGEST_EDIT:
            self.learn(old, new)
        return back


def edit_at(known: Known, tokens: Seq[int], place: int) -> Edit | None:
    """The newest edit of what is at this place."""
    for edit in known.get(tokens[place], ()) if place < len(tokens) else ():
        if len(edit.old) == 1 or [*tokens[place:place + len(edit.old)]] == edit.old:
            return edit
    return None


def remember(known: Known, edit: Edit):
    """Add an edit, in place of one of the same tokens."""
    first = edit.old[0]
    others = [other for other in known.pop(first, ()) if other.old != edit.old]
    known[first] = [edit, *others[:MOST_ALIKE - 1]]
    if len(known) > MOST_FIRST:
        del known[next(iter(known))]
