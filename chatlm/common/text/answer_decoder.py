"""Turns an answer's tokens into characters and the calculator's calls, which stand beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from chatlm.common.jsontext import as_json
from chatlm.common.messages.requests import Delta
from chatlm.common.text.reader import StreamDecoder

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer


# In decoded text a low surrogate stands for a call; the high ones are MARKS. No decoded text contains either.
CALLS_AT_ONCE = 1024
A_CALL = re.compile("([\udc00-\udfff])")


class CallFinder:
    """Finds the calculator's calls among the tokens of an answer."""

    def __init__(self, tokenizer: Tokenizer):
        assert tokenizer.tool_tokens
        self.tokenizer = tokenizer
        self.ids = tokenizer.tool_tokens
        self.part = ""                     # what is being written: expression, result or neither
        self.tokens: list[int] = []        # of that part
        self.expression: str | None = None  # of a call whose result may follow

    def push(self, token: int) -> tuple[list[dict], bool]:
        """The calls that are known to be over now, and whether the token belongs to a call."""
        ids = self.ids
        over = list[dict]()
        if token not in ids:
            if self.part:
                self.tokens.append(token)
                return over, True
            return self.finish() if self.expression is not None else over, False
        if token == ids.python_end and self.part == "expression":
            self.expression = self._text()
            self.part = ""
            self.tokens = []
        elif token == ids.output_end and self.part == "result":
            over = [{"expression": self.expression, "result": self._text()}]
            self._begin("")
        elif token == ids.output_start and not self.part and self.expression is not None:
            self.part = "result"
        else:
            over = self.finish()
            if token in (ids.python_start, ids.output_start):
                self._begin("expression" if token == ids.python_start else "result")
            else:
                over.append({"stray": ids._fields[ids.index(token)]})
        return over, True

    def finish(self) -> list[dict]:
        """No more of the open call comes. Returns it, if there is one."""
        expression = self.expression
        part = self.part
        text = self._text()
        self._begin("")
        if part == "expression":
            return [{"expression": text, "result": None, "cut": True}]
        if part == "result":
            return [{"expression": expression, "result": text, "cut": True}]
        return [] if expression is None else [{"expression": expression, "result": None}]

    def _begin(self, part: str):
        self.part = part
        self.tokens = []
        self.expression = None

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens)


class CallDecoder(StreamDecoder):
    """A decoder whose text has a character of A_CALL in place of each call of the calculator."""

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[int, str] | None = None):
        super().__init__(tokenizer, marks)
        self.finder = CallFinder(tokenizer)
        self.calls: dict[str, dict] = {}  # by their characters, the latest CALLS_AT_ONCE
        self.count = 0

    def push(self, token: int) -> str:
        over, inside = self.finder.push(token)
        text = self._placed(over) if over else ""
        return text if inside else text + super().push(token)

    def finish(self) -> str:
        return self._placed(self.finder.finish())

    def _placed(self, calls: Iterable[dict]) -> str:
        text = ""
        for call in calls:
            place = chr(0xdc00 + self.count % CALLS_AT_ONCE)
            self.count += 1
            self.calls[place] = call
            text += self.utf8.decode(b"", True) + place
        return text

    def parts(self, text: str) -> Iterator[Delta]:
        return (Delta("calculator", as_json(self.calls[part])) if A_CALL.fullmatch(part) else
                Delta("text", part) for part in A_CALL.split(text) if part)


def answer_decoder(tokenizer: Tokenizer | None, marks: Mapping[int, str] | None = None,
                   skips_specials: bool = True) -> StreamDecoder:
    """A decoder for an answer. Without `skips_specials` its text has the names of special tokens, but for
    those that `marks` stand for, and no calls beside it."""
    if tokenizer and not skips_specials:
        return StreamDecoder(tokenizer, {**tokenizer.special_names, **(marks or {})})
    if tokenizer and tokenizer.tool_tokens:
        return CallDecoder(tokenizer, marks)
    return StreamDecoder(tokenizer, marks)  # pyright: ignore[reportArgumentType]  who needs one has it


def parts_of(decoder: StreamDecoder, text: str) -> Iterable[Delta]:
    """Decoded text as what was said and the calls in it."""
    if isinstance(decoder, CallDecoder):
        return decoder.parts(text)
    return [Delta("text", text)] if text else []


def without_calls(text: str) -> str:
    return A_CALL.sub("", text)
