"""How a terminal shows calls of nanochat's calculator: between the words where they stand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq

from chatlm.common.errors import RequestError
from chatlm.common.messages.requests import Delta
from chatlm.common.text.calculations import moved
from chatlm.front.api.earlier_calculations import read_calculation, read_calculations


def call_text(call: Mapping) -> str:
    """For example: 12+30 = 42. "" for a stray mark."""
    expression, result = (call.get(name) for name in ("expression", "result"))
    if expression is None and result is None:
        return ""
    return f"{expression or ''} = {result}".strip() if result is not None else str(expression)


def bracketed(text: str) -> str:
    return f"[{text}]"


def as_code(text: str) -> str:
    """Markdown for a text that stays as it is."""
    line = " ".join(text.split())
    return f"`{line}`" if line and "`" not in line else bracketed(line)


class MarkedText:
    """Puts an answer's calls into its text, as both arrive. Spaces separate them."""

    def __init__(self, mark: Callable[[str], str] = bracketed, before: str = ""):
        self.mark = mark
        self.last = before[-1:]  # the last character that was shown
        self.follows = False     # the last thing that was shown is a call

    def push(self, delta: Delta) -> str:
        """What to show of a delta."""
        if delta.kind != "calculator":
            needs_space = self.follows and not delta.text[:1].isspace()
            self.follows = False
            self.last = delta.text[-1:] or self.last
            if not delta.text:
                return ""
            return f" {delta.text}" if needs_space else delta.text
        shown = call_text(json.loads(delta.text))
        if not shown:
            return ""
        needs_space = self.follows or self.last and not self.last.isspace()
        self.follows = True
        return f" {self.mark(shown)}" if needs_space else self.mark(shown)


def split_at_calls(text: str, calls: Iterable[Mapping], begin: int = 0) -> list[Delta]:
    """A text, `begin` characters behind the answer's beginning, and its calls where they stand."""
    deltas = list[Delta]()
    for call in calls:
        place = min(max(call["start"] - begin, 0), len(text))
        before = text[:place]
        text = text[place:]
        begin += place
        others = {name: value for name, value in call.items() if name != "start"}
        if before:
            deltas.append(Delta("text", before))
        deltas.append(Delta("calculator", json.dumps(others)))
    if text:
        deltas.append(Delta("text", text))
    return deltas


def marked(text: str, calls: Iterable[Mapping], mark: Callable[[str], str] = bracketed) -> str:
    writer = MarkedText(mark)
    return "".join(map(writer.push, split_at_calls(text, calls)))


def calls_of_file(sent, text: str) -> list[dict]:
    """The calls beside a message of a file; none if they cannot be."""
    try:
        return read_calculations(sent, text, "calculator")
    except RequestError:
        return []


def calls_of_event(sent) -> list[dict]:
    """The calls in an event of a server; of something else, none."""
    if isinstance(sent, dict):  # the native API sends one
        sent = [sent]
    calls = list[dict]()
    for call in sent if isinstance(sent, list) else ():
        if isinstance(call, dict) and type(call.get("start")) is int:
            try:
                calls.append({"start": call["start"], **read_calculation(call, "calculator")})
            except RequestError:
                continue
    return calls


def joined_calls(texts: Seq[str], calls: Seq[list[dict]], between: str) -> list[dict]:
    """The calls of several texts that become one."""
    found = list[dict]()
    begin = 0
    for text, own in zip(texts, calls):
        found += moved(own, begin)
        begin += len(text) + len(between)
    return found
