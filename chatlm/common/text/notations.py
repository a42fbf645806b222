"""Values of arguments as families write them that do not write JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from chatlm.common.config import LIMITS
from chatlm.common.errors import shown
from chatlm.common.jsontext import as_json


BARE = r"[^\s=:,()\[\]{}\"'<>]"  # a character of a name without quotes
A_NAME = re.compile(rf"(?=.{{1,{LIMITS.parameter_characters}}}\Z){BARE}+(?: {BARE}+)*")


@dataclass(frozen=True)
class Notation:
    """Lists and objects are those of JSON; names, words, strings and what is between them are its own."""

    equals: str = ": "              # between a parameter's name and its value
    colon: str = ": "               # the same inside of values
    comma: str = ", "
    words: tuple[str, str, str] = ("null", "true", "false")
    quote: str = '"'                # around strings, in which only JSON's own quotes need escapes
    bare_keys: bool = False         # have names inside of values no quotes?

    def text(self, value) -> str:
        """A value of JSON in this notation."""
        if isinstance(value, str):
            return as_json(value) if self.quote == '"' else self.quote + value + self.quote
        if isinstance(value, dict):
            return "{" + self.comma.join(f"{self.key(name)}{self.colon}{self.text(item)}"
                                         for name, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + self.comma.join(map(self.text, value)) + "]"
        if value is None or isinstance(value, bool):
            return self.words[(None, True, False).index(value)]
        return as_json(value)

    def key(self, name: str) -> str:
        return name if self.bare_keys and A_NAME.fullmatch(name) else self.text(name)

    def arguments(self, values: Mapping) -> str:
        return self.comma.join(f"{name}{self.equals}{self.text(value)}" for name, value in values.items())


def bare(name: str) -> str:
    """A name that is written without quotes; ValueError if it cannot be."""
    if not A_NAME.fullmatch(name):
        raise ValueError(f"this model's calls cannot have a parameter {shown(name)}; a name has 1 to "
                         f"{LIMITS.parameter_characters} characters, and none of =:,()[]{{}}\"'<> or a space "
                         "at its ends")
    return name


JSON = Notation()
PYTHON = Notation(equals="=", words=("None", "True", "False"))  # keyword arguments
GEMMA = Notation(equals=":", colon=":", comma=",", quote='<|"|>', bare_keys=True)
