"""What every format's reader gets and returns, and what of a document its text lacks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError, RequestError, require_library
from chatlm.common.invocation import pip_command

PACKAGES = "markdownify", "mammoth", "openpyxl", "pypdfium2", "python-pptx"  # the extra `documents`
NAMED_PLACES = 10       # of each kind of what a text lacks; the others are counted
PLACE_CHARACTERS = 80   # of the name of one

# what a text may lack: one, several
KINDS = {
    "chapter": ("chapter that the book names and has not", "chapters that the book names and has not"),
    "chart": ("chart of a kind that is not read", "charts of a kind that is not read"),
    "embedded": ("embedded file", "embedded files"),
    "form": ("form that only its own program shows (XFA)", "forms that only their own program shows (XFA)"),
    "formula": ("formula without a stored result, which stands as it is written",
                "formulas without stored results, which stand as they are written"),
    "dense": ("page with so many letters that the columns of its tables are not kept",
              "pages with so many letters that the columns of their tables are not kept"),
    "merged": ("table whose merged or repeated cells stand only once",
               "tables whose merged or repeated cells stand only once"),
    "picture": ("picture", "pictures"),
    "sheet": ("hidden sheet", "hidden sheets"),
}


class Document(NamedTuple):
    """What a format's reader returns."""

    parts: Iterable[str]      # the texts of its pages, read one by one, as far as needed
    pages: int | None = None  # how many pages, slides, sheets or chapters; None: the format has none
    noun: str = "part"        # what one of them is called
    marked: bool = False      # is each text put under the number of its page?


class Reading:
    """The reading of one document: how much of it is still read, and what is missing from its text."""

    def __init__(self, cpu_s: float, characters: int = LIMITS.extracted_characters):
        self.deadline_s = time.process_time() + cpu_s  # of processor time
        self.room = characters                         # that the text may still get
        self.place = ""                                # how far a part was read that was not read whole
        self.missing: dict[str, dict[str, int]] = {}   # kind -> place -> how many

    @property
    def is_late(self) -> bool:
        return time.process_time() > self.deadline_s

    def lacks(self, kind: str, place: str = "", count: int = 1):
        """Note that `count` things of one of KINDS are missing at a place."""
        places = self.missing.setdefault(kind, {})
        places[place] = places.get(place, 0) + count

    def lacking(self) -> list[str]:
        """What is missing, in words: kind, number and places."""
        return [in_words(kind, places) for kind, places in self.missing.items()]


def in_words(kind: str, places: dict[str, int]) -> str:
    total = sum(places.values())
    one, several = KINDS[kind]
    named = []
    for place, count in places.items():
        if place and len(named) < NAMED_PLACES:
            several_here = f": {count:,}" if count > 1 and len(places) > 1 else ""
            named.append(place[:PLACE_CHARACTERS] + several_here)
    others = len(places) - len(named)
    if named and others:
        named.append(f"{others:,} other place{'s' * (others > 1)}")
    text = f"{total:,} {several if total > 1 else one}"
    return f"{text} ({'; '.join(named)})" if named else text


def refusal(message: str, code: str = "unreadable_document") -> RequestError:
    return RequestError(message, code=code)


def library(name: str, kind: str) -> Any:
    try:
        return require_library(name, f"reading {kind} files")
    except ConfigError as error:
        advice = f"install all that documents need with: {pip_command(*PACKAGES)}"
        raise RequestError(f"{str(error).partition(';')[0]}; {advice}", status=501,
                           code="not_installed") from None
