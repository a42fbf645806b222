"""Numbers in an answer's text, such as [2] or [1, 3], that cite what the model was given to read.

Code has none: `rows[1]` is no citation, neither between backticks in a line nor in a fenced block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence as Seq

NUMBERS = r"[1-9][0-9]{0,3}(?:[,;] ?[1-9][0-9]{0,3}){0,9}"
TOKEN = re.compile(rf"\[(?P<numbers>{NUMBERS})\]|(?P<fence>`+|~~~+)|(?P<end>\n)")
BEGUN = re.compile(r"(?:\[[0-9,; ]{0,60}|`+|~+)\Z")  # what may become a token with the text that follows


class Citations:
    """Finds the citations in a text that comes in pieces. sources: what [1], [2] and so on stand for, as the
    members of an annotation. Numbers for which nothing was given are no citation, nor those beside them."""

    def __init__(self, sources: Seq[Mapping]):
        self.sources = sources
        self.found: list[dict] = []
        self.open = ""              # the end of the text so far, if a token may begin there
        self.characters = 0         # of the text so far
        # of the line so far
        self.is_blank = True        # it has nothing but spaces
        self.code = ""              # the backticks that have begun code which has not ended
        self.held: list[dict] = []  # found behind these: citations if they turn out to begin none
        # of a fenced block
        self.fence = ""             # the marks that have begun it; "": there is none
        self.closing = False        # this line ends it, if nothing follows
        self.opening = ""           # this line begins one with these marks, if its code does not end

    def add(self, text: str):
        begin = self.characters - len(self.open)
        self.characters += len(text)
        text = self.open + text
        begun = BEGUN.search(text)
        self.open = begun[0] if begun else ""
        self._read(text[:len(text) - len(self.open)], begin)

    def finish(self):
        """The text has ended."""
        self._read(self.open, self.characters - len(self.open))
        self.open = ""
        self._end_line()

    def _read(self, text: str, begin: int):
        last = 0
        for token in TOKEN.finditer(text):
            self._pass(text[last:token.start()])
            last = token.end()
            if token["end"]:
                self._end_line()
            elif token["fence"]:
                self._mark(token["fence"])
            else:
                self._cite([int(number) for number in re.split("[,;] ?", token["numbers"])],
                           begin + token.start())
        self._pass(text[last:])

    def _pass(self, text: str):
        """Text between tokens."""
        if text.strip():
            self.is_blank = self.closing = False

    def _end_line(self):
        if self.fence and self.closing:
            self.fence = ""
        elif self.opening and (self.opening[0] == "~" or self.code == self.opening):
            self.fence = self.opening
        elif self.code:  # it was never ended: so these are just backticks
            self.found += self.held
        self.is_blank = True
        self.closing = False
        self.code = self.opening = ""
        self.held = []

    def _mark(self, marks: str):
        if self.fence:
            self.closing = self.is_blank and marks[0] == self.fence[0] and len(marks) >= len(self.fence)
        elif marks[0] == "~":
            self.opening = marks if self.is_blank else self.opening
        elif self.code == marks:
            self.code = self.opening = ""
            self.held = []
        elif not self.code:
            self.opening = marks if self.is_blank and len(marks) >= 3 else self.opening
            self.code = marks
        self.is_blank = False

    def _cite(self, numbers: Seq[int], place: int):
        self.is_blank = self.closing = False
        if not self.fence and max(numbers) <= len(self.sources):
            cited = [{**self.sources[number - 1], "index": place, "passage": number} for number in numbers]
            (self.held if self.code or self.opening else self.found).extend(cited)

    def member(self) -> dict:
        """The member of a message with these citations, once its text has ended."""
        self.finish()
        return {"annotations": self.found} if self.found else {}


def citations_in(text: str, sources: Seq[Mapping]) -> dict:
    """The member of a message with the citations in all of its text."""
    citations = Citations(sources)
    citations.add(text)
    return citations.member()
