"""Function calls in an answer's text: in JSON, or with their arguments in tags."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence as Seq
from contextlib import suppress

from chatlm.common.config import LIMITS
from chatlm.common.jsontext import JSON_TYPES, as_json, is_text
from chatlm.common.messages.requests import Delta
from chatlm.common.text.formats import A_MARK, CALL_FORMATS, CallFormat
from chatlm.common.text.scanner import Deltas, Scanner, skip


def typed_value(text: str, types: str) -> str:
    """The JSON of a parameter's value whose tags do not give its type: a value of one of these JSON types
    ("": of any) if it can be read as one, else a string."""
    # templates write Python's True and None too; reading 450 KB of it takes 0.6 s
    python = len(text) < 10_000 and re.search("True|False|None|'", text)
    for read in (json.loads, ast.literal_eval) if python else (json.loads,):
        with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = read(text.strip())
            if not is_text(value) and any(JSON_TYPES[name](value) for name in types.split() or JSON_TYPES):
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return as_json(text)


def in_json_string(text: str) -> bool | None:
    """Whether the text ends inside a string of a JSON list or object; None if it does not begin like JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return text.lstrip()[:1] in ("[", "{") and str(error).startswith("Unterminated string") or None
    return False


def whole_calls(text: str, names: Seq[str]) -> list[tuple[str, str]]:
    """The (name, arguments) of a text that is one call in JSON, or a list of calls; [] if it is neither."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or call.get("name") not in names:
            return []
        arguments = call.get("arguments", call.get("parameters")) or {}
        calls.append((call["name"], arguments if is_text(arguments) else
                      json.dumps(arguments, ensure_ascii=False)))
    return calls


class Opening:
    """Reads the beginnings of calls. Text that only looks like a call stays text."""

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str]):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names

    def read(self, head: Callable[[str], re.Match | bool], begin: str, end: str,
             may_be_call: Callable[[str], bool] = lambda text: False
             ) -> Generator[None, None, re.Match | None]:
        """Read after `begin`; returns the match of `head` with the function's name, which is not read yet.
        None if something else came, which is read up to `end` then: complete calls in JSON, or text.

        `head` may say that more text decides (True) or that no head comes (False); `may_be_call` is asked of
        text without `begin` that was cut before this was decided."""
        scanner = self.scanner
        while (match := head(scanner.held)) is True or not match and end and end not in scanner.held:
            if scanner.over:
                if not self._whole(scanner.held) and not (
                        scanner.cut and (begin or may_be_call(scanner.held))):
                    self.deltas.write(scanner.spelled(begin + scanner.held))
                scanner.held = ""
            yield
        if match:
            return match
        place = scanner.held.find(end) if end else len(scanner.held)
        if end and self._whole(scanner.held[:place]):
            self.deltas.begin("text")
        else:
            self.deltas.write(scanner.spelled(begin + scanner.held[:place] + end))
        scanner.held = scanner.held[place + len(end):]
        return None

    def _whole(self, text: str) -> bool:
        calls = whole_calls(text, self.names)
        for name, arguments in calls:
            self.deltas.arguments(self.scanner.spelled(arguments), name)
        return bool(calls)


class JsonCalls:
    """Reads calls whose arguments are JSON, behind {"name": or behind a name and a sign."""

    FIELD = r'"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*'
    HEAD = re.compile(rf'[\s,;\[]*{{\s*(?:{FIELD})*"name"\s*:\s*"([^"\\]*)"\s*,\s*(?:{FIELD})*'
                      r'"(?:arguments|parameters)"\s*:\s*(?={|\Z)')
    BEGINNING = re.compile(r'[\s,;\[]*(?:{\s*(?:"(\w*)("?).*)?)?', re.DOTALL)  # of a call in JSON
    KEYS = ("name", "type", "id", "function", "arguments", "parameters")

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str], call_format: CallFormat):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names
        self.opening = Opening(scanner, deltas, names)
        self.untagged = call_format.untagged
        self.lead = call_format.lead
        self.begin, self.end, *self.around = map(scanner.sign, call_format.marks)
        self.starts = (self.begin,)
        call_id, separator = (re.escape(scanner.sign(marker)) for marker in ("[CALL_ID]", "<｜tool▁sep｜>"))
        name_ends = {re.escape(scanner.sign(row.name_end)) for row in CALL_FORMATS.values() if row.name_end}
        self.named_head = re.compile(
            rf"\s*(?:functions\.|\w+{separator})?([\w.-]+)(?::\d+)?\s*(?:{call_id}[\w\s-]*)?"
            rf"(?:{'|'.join(name_ends)})\s*(?={{|\Z)")

    def read(self, begin: str) -> Iterator[None]:
        """Read calls up to the marker that ends them, or while more follow. begin: the marker before them, or
        "" if they are the whole answer."""
        scanner = self.scanner
        end = self.end if begin else ""

        def head(text: str) -> re.Match | bool:
            match = self.HEAD.match(text) or self.named_head.match(text)
            if match and match.end() < len(text):
                return match[1] in self.names and match
            self.deltas.begun_call = match and Delta("call", "", match[1])
            return bool(match or (end not in text if end else begin or self._may_be_call(text)))

        while match := (yield from self.opening.read(head, begin, end, self._may_be_call)):
            scanner.held = scanner.held[match.end():]
            self.deltas.begin_call(match[1], scanner.held)
            yield from self._copy_object(self.deltas.arguments, 0, end)
            if end:
                yield from scanner.until(skip, end)
                return self.deltas.begin("text")
            if match.re is self.HEAD:
                yield from self._copy_object(skip, 1, end)
            while not (rest := scanner.held.lstrip(" \r\n\t,;]")):
                yield
            scanner.held = rest
            if not rest.startswith("{"):
                return self.deltas.begin("text")

    def _may_be_call(self, text: str) -> bool:
        """Whether this text may become a call in JSON."""
        beginning = self.BEGINNING.fullmatch(text)
        key, quote = beginning.groups() if beginning else ("", "")
        return beginning is not None and (key is None or (
            key in self.KEYS if quote else any(known.startswith(key) for known in self.KEYS)))

    def _copy_object(self, write: Callable[[str], None], depth: int, end: str) -> Iterator[None]:
        """Write text up to the end of a JSON object, `depth` brackets away. A token that ends the call also
        ends an incomplete object."""
        quoted = False
        escaped = False
        while True:
            length = 0
            for length, character in enumerate(self.scanner.held, 1):
                if character == end:
                    length = length - 1
                    depth = 0
                elif quoted:
                    quoted = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                else:
                    quoted = character == '"'
                    depth = depth + (character in "{[") - (character in "}]")
                if depth == 0:
                    break
            write(self.scanner.take(length))
            if depth == 0:
                return
            yield


class TaggedCalls:
    """Reads calls whose arguments are in tags, and writes them as JSON."""

    untagged = False

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str], call_format: CallFormat,
                 types: Seq[Mapping[str, str]] = ()):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names
        self.types = dict(zip(names, types))  # of the functions' parameters
        self.lead = call_format.lead
        self.opening = Opening(scanner, deltas, names)
        self.begin, self.end, *self.around = map(scanner.sign, call_format.marks)
        function, last = (scanner.signs(text).strip() for text in call_format.around_arguments)
        # Qwen3-Coder may leave out <tool_call>
        self.bare = function.partition("{")[0]
        self.starts = tuple(filter(None, (self.begin, self.bare)))
        function = re.escape(function).replace(r"\{name\}", r"\s*([^\s<>\ud800-\udfff]+)\s*")
        self.head = re.compile(rf"\s*{function}" if self.bare else rf"{function}(?=[<\n\ud800-\udfff])")

        assert call_format.tags
        parameter, value_end, _ = call_format.tags
        most = LIMITS.parameter_characters
        end = re.escape(self.end)
        key = re.escape(scanner.signs(parameter).strip()).replace("\\\n", r"\s*")
        key = key.replace(r"\{name\}", rf"([^<>\ud800-\udfff]{{1,{most}}})")
        # the line break before a value is dropped
        own_line = value_end.startswith("\n")
        key += r"(?:\n|(?=[^\n]))" if own_line else ""
        value_end = scanner.signs(value_end).strip()
        self.step = re.compile(rf"{key}|{re.escape(last) or '(?!)'}|(?={end})")
        self.stops = tuple(before + sign for sign in (value_end, self.end)
                           for before in (("", "\n") if own_line else ("",)))
        self.stop = re.compile((r"\n?" if own_line else "") + rf"({re.escape(value_end)}|(?={end}))")

    def read(self, begin: str) -> Iterator[None]:
        """Read calls up to their end. begin: the text before them, or the beginning of a call without tag."""
        scanner = self.scanner
        end = self.end
        bare = self.bare
        tagged = begin == self.begin
        scanner.held = scanner.held if tagged else bare + scanner.held

        def head(text: str) -> re.Match | bool:
            if match := self.head.match(text):
                return match[1] in self.names and match
            return end not in text if tagged else not re.search("[\n>]", text)

        opening = (head, begin, end) if tagged else (head, "", bare)
        if not (match := (yield from self.opening.read(*opening))):
            return
        while match and match[1] in self.names:
            scanner.held = scanner.held[match.end():]
            self.deltas.begin_call(match[1], scanner.held)
            scanner.closing = end
            yield from self._parameters(self.types.get(match[1], {}))
            scanner.closing = ""
            # the end of the call, or another one in the same tags
            while not (rest := scanner.held.lstrip()).startswith(end) and (
                    end.startswith(rest) or bare.startswith(rest)
                    or rest.startswith(bare) and ">" not in rest):
                yield
            match = None if rest.startswith(end) else self.head.match(scanner.held)
        rest = scanner.held.lstrip()
        scanner.held = rest.removeprefix(end) if rest.startswith(end) else scanner.held
        self.deltas.begin("text")

    def _parameters(self, types: Mapping[str, str]) -> Iterator[None]:
        """Read parameters up to the text after the last, which is removed, or up to the end of the call,
        which is kept. Strings are written as they arrive, other values once they are complete."""
        scanner = self.scanner
        deltas = self.deltas
        before = "{"
        while True:
            while not (match := self.step.search(scanner.held)):
                # no parameter began before
                scanner.held = scanner.held[-2 * LIMITS.parameter_characters:]
                yield
            scanner.held = scanner.held[match.end():]
            if not match[1]:
                return deltas.arguments("{}" if before == "{" else "}")
            name = match[1].strip()
            key = f"{before}{as_json(name)}: "
            before = ", "
            if (wanted := types.get(name, types.get("", ""))) == "string":
                deltas.arguments(key + '"')
                sign = yield from scanner.until(
                    lambda text: deltas.arguments(as_json(text)[1:-1]), *self.stops)
                if sign.endswith(self.end):
                    scanner.held = self.end + scanner.held
                deltas.arguments('"')
            else:
                length, rest = yield from self._find_end()
                value = scanner.spelled(scanner.held[:length])
                scanner.held = scanner.held[rest:]
                deltas.arguments(key + typed_value(value, wanted))

    def _find_end(self) -> Generator[None, None, tuple[int, int]]:
        """The ends of a value and of the sign that ends it: the first sign outside of JSON strings, or the
        very first if a string never ends."""
        scanner = self.scanner
        first = None
        searched = 0
        longest = max(map(len, self.stops))
        while True:
            if match := self.stop.search(scanner.held, searched):
                first, (sign, searched) = first or match, match.span(1)
                searched += sign == searched
                inside = in_json_string(scanner.held[:match.start()])
                if not inside or A_MARK.match(scanner.held, sign):
                    return (match if inside is False else first).span()
            elif scanner.over and first and not scanner.cut:
                return first.span()
            else:
                searched = max(searched, len(scanner.held) - longest)
                yield
