"""Reads calls whose values are not in JSON: name(city="Rome") or name{city:<|"|>Rome<|"|>}."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass

from chatlm.common.jsontext import as_json, whole_unicode
from chatlm.common.text.calls import CallStart
from chatlm.common.text.formats import MARKERS, MARKS, CallFormat
from chatlm.common.text.scanner import Deltas, Scanner, begun_length


WORDS = {"null": "null", "None": "null", "true": "true", "True": "true", "false": "false", "False": "false"}
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": "",
           **{sign: sign for sign in "\\\"'/"}}
AN_ESCAPE = re.compile(
    r"\\(?:u([0-9A-Fa-f]{4})|U(000[0-9A-Fa-f]{5}|0010[0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|[^\ud800-\udfff])")
PART_OF_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3}|U[0-9A-Fa-f]{0,7}|x[0-9A-Fa-f]?)?\Z")
QUOTES = ('"""', "'''", '"', "'")  # as Python has them
CLOSING = {"[": "]", "(": ")", "{": "}"}


def unquoted(text: str, types: str) -> str:
    """A value without quotes as JSON: a word or number, else a string. `types`: the JSON types that the
    parameter may have, "" for any."""
    text = text.strip()
    if text in WORDS:
        return WORDS[text]
    if "string" in types and "integer" not in types:  # a parameter that may be a number may be an integer
        return as_json(text)
    for read in (int, float, lambda text: int(text, 0)):
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := read(text)):
                return as_json(number)
    return as_json(text)


def unescaped(escape: re.Match) -> str:
    """An escape in a Python or JSON string, as a JSON string writes it."""
    if code := escape[1] or escape[2] or escape[3]:
        number = int(code, 16)
        if 0xd800 <= number < 0xe000:  # half of a surrogate pair, which is no character
            return f"\\u{number:04x}"
        return as_json(chr(number))[1:-1]
    return as_json(ESCAPED.get(escape[0][1:], escape[0]))[1:-1]


@dataclass
class Bracket:
    """An open list or object, and how many of its values have begun."""

    closing: str
    is_list: bool
    count: int = 0


class ValueCalls:
    """Reads calls whose arguments are values in brackets, and writes them as JSON while they arrive.

    - Whatever is still open when the call ends is closed.
    - A value without a name belongs to the parameter at its position.
    - A value without quotes is a string, unless it is a word such as true or a number.
    - A quote belongs to its string if no string can end there: LFM2.5's template writes earlier calls as
      say='it's late'."""

    untagged = False

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str], call_format: CallFormat,
                 types: Seq[Mapping[str, str]] = ()):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names
        self.types = dict(zip(names, types))  # by function: its parameters' types, in their order
        self.opening = CallStart(scanner, deltas, names)
        self.begin, self.end, *self.around = map(scanner.sign, call_format.marks)
        self.starts = (self.begin,)
        self.lead = call_format.lead
        self.over = MARKS[call_format.marks[1]]
        self.ends = self.over  # characters that end a call, whatever is open
        if self.begin in MARKERS:
            self.ends += self.begin
        assert call_format.notation
        quote = scanner.sign(call_format.notation.quote)
        self.raw = () if quote in QUOTES else (quote,)  # quotes of strings without escapes
        self.quotes = (*self.raw, *QUOTES)

        before, self.closing = call_format.around_arguments
        name = r"([^\s=:,()\[\]{}\"'<>\ud800-\udfff]+)\s*"
        lead = re.escape(self.lead)  # a bracket, or the line that begins a block of code
        tail = call_format.calls.partition("{calls}")[2].removesuffix(call_format.marks[1])
        self.after_calls = f" \r\n\t,;]{tail}"  # characters that are no text there
        self.head = re.compile(rf"(?:\s*{lead})?[\s,\[]*" + re.escape(before).replace(r"\{name\}", name))
        self.closers = "]}" if self.closing == "}" else ")]}"
        ends = rf"[,{re.escape(self.closers)}{self.ends}]|{re.escape(self.end)}"
        self.value_end = re.compile(ends)
        self.name_end = re.compile(f"[=:]|{ends}")
        self.call_end = re.compile("|".join(map(re.escape, (self.end, self.over, self.begin))))

    def read(self, begin: str) -> Iterator[None]:
        """Read calls up to their end. begin: the sign before them."""
        scanner = self.scanner

        def head(text: str) -> re.Match | bool:
            if match := self.head.match(text):
                return match[1] in self.names and match
            return self.end not in text

        match = yield from self.opening.read(head, begin, self.end)
        while match:
            scanner.held = scanner.held[match.end():]
            self.deltas.begin_call(match[1], scanner.held)
            scanner.closing = self.over
            yield from self._arguments(self.types.get(match[1], {}))
            scanner.closing = ""
            match = yield from self._next_call()

    def _next_call(self) -> Generator[None, None, re.Match | None]:
        """The head of another call in the same list, which stays unread; None if the list's end was read."""
        scanner = self.scanner
        searched = 0
        while True:
            match = self.head.match(scanner.held)
            if match and match[1] in self.names:
                return match
            end = self.call_end.search(scanner.held, searched)
            if end or scanner.over:
                break
            searched = max(0, len(scanner.held) - max(len(self.begin), len(self.end)))
            yield
        rest = scanner.held[:end.start()] if end else scanner.held
        sign = end[0] if end and end[0] != self.begin else ""  # models may forget the end of a call
        self.deltas.begin("text")
        if rest.strip(self.after_calls) and (end or not scanner.cut):
            self.deltas.write(scanner.spelled(rest))
        scanner.held = scanner.held[len(rest + sign):]
        return None

    def _arguments(self, types: Mapping[str, str]) -> Iterator[None]:
        """Read arguments up to the bracket that closes them, which is removed, or up to the call's end, which
        stays."""
        scanner = self.scanner
        brackets = [Bracket(self.closing, False)]
        while brackets:
            sign = yield from self._next()
            if sign and sign not in self.closers:
                yield from self._member(brackets, types)
                continue
            scanner.held = scanner.held[len(sign):]
            open_ones = [bracket.closing for bracket in brackets]
            if not sign:
                self._close(brackets, 0)
            elif sign in open_ones:
                self._close(brackets, len(open_ones) - 1 - open_ones[::-1].index(sign))

    def _close(self, brackets: list[Bracket], place: int):
        """Close the bracket at this place, and those that are still open inside it."""
        if not brackets[0].count:  # there was no argument, so the object was not begun
            self.deltas.arguments("{")
        for bracket in reversed(brackets[place:]):
            self.deltas.arguments("]" if bracket.is_list else "}")
        del brackets[place:]

    def _member(self, brackets: list[Bracket], types: Mapping[str, str]) -> Iterator[None]:
        """Read a value and its name, or the bracket with which it begins."""
        scanner = self.scanner
        write = self.deltas.arguments
        inside = brackets[-1]
        is_parameter = len(brackets) == 1
        place = inside.count
        wanted = ""  # the value's types; "" for any
        inside.count += 1
        if place:
            write(", ")
        elif is_parameter:
            write("{")
        if not inside.is_list:
            names = [name for name in types if name]
            at_place = names[place] if is_parameter and place < len(names) else str(place)
            name, value = yield from self._name(types.get(at_place, "") if is_parameter else "")
            wanted = types.get(name, types.get("", "")) if is_parameter else ""
            write(as_json(name or at_place) + ": " + value)
            if value:
                return
            sign = yield from self._next(" \t\r\n")
            if not sign or sign in self.closers + ",":
                return write("null")
        first = scanner.held[0]
        if first in CLOSING and CLOSING[first] in self.closers:
            scanner.held = scanner.held[1:]
            brackets.append(Bracket(CLOSING[first], first != "{"))
            write("{" if first == "{" else "[")
        elif quote := (yield from self._quote()):
            write('"')
            yield from self._string(quote, write, self.value_end)
            write('"')
        else:
            text = yield from self._until(self.value_end)
            write(unquoted(text, wanted))

    def _name(self, wanted: str) -> Generator[None, None, tuple[str, str]]:
        """Read a name and the sign after it: (name, ""). If the value has no name, read the value, which
        should be of the types `wanted`: ("", its JSON). If a list or object begins here: ("", "")."""
        scanner = self.scanner
        value = ""
        if scanner.held[0] in CLOSING:
            return "", ""
        if quote := (yield from self._quote()):
            parts = ['"']
            yield from self._string(quote, parts.append, self.name_end)
            value = "".join(parts) + '"'
            sign = yield from self._next(" \t\r\n")
            name = whole_unicode(json.loads(value))
        else:
            name = (yield from self._until(self.name_end)).strip()
            sign = scanner.held[0]
        if not sign or sign not in "=:":
            return "", value or unquoted(name, wanted)
        scanner.held = scanner.held[1:]
        return name, ""

    def _next(self, skipped: str = ", \t\r\n") -> Generator[None, None, str]:
        """The next character that is not skipped, which stays unread; "" if the call ends here."""
        scanner = self.scanner
        while not (rest := scanner.held.lstrip(skipped)) or rest != self.end and self.end.startswith(rest):
            scanner.held = rest
            yield
        scanner.held = rest
        return "" if rest.startswith((self.end, *self.ends)) else rest[0]

    def _until(self, end: re.Pattern) -> Generator[None, None, str]:
        """Read text up to its end mark, which stays unread."""
        scanner = self.scanner
        searched = 0
        while not (match := end.search(scanner.held, searched)):
            searched = max(0, len(scanner.held) - len(self.end))
            yield
        return scanner.take(match.start())

    def _quote(self) -> Generator[None, None, str]:
        """The quote of a string that begins here; "" if none does."""
        scanner = self.scanner
        while any(quote != scanner.held and quote.startswith(scanner.held) for quote in self.quotes):
            yield
        return next((quote for quote in self.quotes if scanner.held.startswith(quote)), "")

    def _string(self, quote: str, write: Callable[[str], object], after: re.Pattern) -> Iterator[None]:
        """Read a string and its quotes, and write its characters as in a JSON string. `after`: what may
        follow the string."""
        scanner = self.scanner
        scanner.held = scanner.held[len(quote):]
        sign = re.compile(rf"{re.escape(quote)}|[{self.ends}]" + ("" if quote in self.raw else r"|\\"))
        while True:
            match = sign.search(scanner.held)
            length = match.start() if match else len(scanner.held) - begun_length(scanner.held, quote)
            write(as_json(scanner.take(length))[1:-1])
            if not match:
                yield
            elif match[0] in self.ends:
                return
            elif match[0] == "\\":
                while not scanner.held or PART_OF_ESCAPE.fullmatch(scanner.held):
                    yield
                escape = AN_ESCAPE.match(scanner.held)
                write(unescaped(escape) if escape else "\\\\")
                length = escape.end() if escape else 1
                scanner.held = scanner.held[length:]
            elif (yield from self._ends_string(quote, after)):
                scanner.held = scanner.held[len(quote):]
                return
            else:
                write(as_json(scanner.take(len(quote)))[1:-1])

    def _ends_string(self, quote: str, after: re.Pattern) -> Generator[None, None, bool]:
        """Whether this quote ends its string."""
        while quote not in self.raw:
            rest = self.scanner.held[len(quote):].lstrip()
            if rest and (rest == self.end or not self.end.startswith(rest)):
                return after.match(rest) is not None
            yield
        return True
