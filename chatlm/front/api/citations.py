"""Numbers in an answer's text, such as [2], that cite what the model was given to read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence as Seq

NUMBER = re.compile(r"\[([1-9][0-9]{0,3})\]")
BEGUN = re.compile(r"\[[0-9]{0,4}\Z")  # what may become one with the text that follows


class Citations:
    """Finds the citations in a text that comes in pieces. sources: what [1], [2] and so on stand for, as the
    members of an annotation. A number that nothing was given for is no citation."""

    def __init__(self, sources: Seq[Mapping]):
        self.sources = sources
        self.found: list[dict] = []
        self.open = ""       # the end of the text so far, if a number may begin there
        self.characters = 0  # of the text so far

    def add(self, text: str):
        begin = self.characters - len(self.open)
        self.characters += len(text)
        text = self.open + text
        for match in NUMBER.finditer(text):
            number = int(match[1])
            if number <= len(self.sources):
                self.found.append({**self.sources[number - 1], "index": begin + match.start(), "passage": number})
        begun = BEGUN.search(text)
        self.open = begun[0] if begun else ""

    def member(self) -> dict:
        """The member of a message with these citations."""
        return {"annotations": self.found} if self.found else {}


def citations_in(text: str, sources: Seq[Mapping]) -> dict:
    """The member of a message with the citations in all of its text."""
    citations = Citations(sources)
    citations.add(text)
    return citations.member()
