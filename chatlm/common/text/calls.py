"""Reads function calls in an answer's text, written in JSON or with their arguments in tags."""

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
    """A parameter's value as JSON, when its tags do not say its type. `types`: the JSON types that it may
    have, "" for any. Text that cannot be read as one of them becomes a string."""
    readers: list[Callable] = [json.loads]
    # Templates also write Python's True and None. Long text is not read so: 450 KB of it take 0.6 s.
    if len(text) < 10_000 and re.search("True|False|None|'", text):
        readers.append(ast.literal_eval)
    for read in readers:
        with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = read(text.strip())
            if not is_text(value) and any(JSON_TYPES[name](value) for name in types.split() or JSON_TYPES):
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return as_json(text)


def in_json_string(text: str) -> bool | None:
    """Whether the text ends inside a string of a JSON list or object; None if it cannot be JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        in_string = str(error).startswith("Unterminated string")
        return True if in_string and text.lstrip()[:1] in ("[", "{") else None
    return False


def whole_calls(text: str, names: Seq[str]) -> list[tuple[str, str]]:
    """The (name, arguments) of each call in a text that is one call in JSON or a list of calls, else []."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if isinstance(call, dict):
            call = call.get("function", call)
        if not isinstance(call, dict) or call.get("name") not in names:
            return []
        arguments = call.get("arguments", call.get("parameters")) or {}
        if not is_text(arguments):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append((call["name"], arguments))
    return calls


class CallStart:
    """Reads the beginning of a call up to its arguments. Text that only looks like a call stays text."""

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str]):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names

    def read(self, head: Callable[[str], re.Match | bool], begin: str, end: str,
             may_be_call: Callable[[str], bool] = lambda text: False
             ) -> Generator[None, None, re.Match | None]:
        """Read what follows `begin`, the sign before a call.

        `head` looks at the text: it returns a match with the function's name, or True if more text must
        decide, or False if this is no head. The match is returned, and its text stays unread. If there is no
        head, all up to `end` is read, as complete calls in JSON or as text, and None is returned.
        `may_be_call`: whether an answer that was cut here is dropped, where there is no `begin`."""
        scanner = self.scanner
        while True:
            match = head(scanner.held)
            if match and match is not True:
                return match
            if not match and (not end or end in scanner.held):
                break
            if scanner.over:
                self._finish(begin, may_be_call)
            yield
        place = scanner.held.find(end) if end else len(scanner.held)
        if end and self._whole(scanner.held[:place]):
            self.deltas.begin("text")
        else:
            self.deltas.write(scanner.spelled(begin + scanner.held[:place] + end))
        scanner.held = scanner.held[place + len(end):]
        return None

    def _finish(self, begin: str, may_be_call: Callable[[str], bool]):
        """Read the rest of an answer that ended before a head was complete."""
        scanner = self.scanner
        is_cut_call = scanner.cut and (begin or may_be_call(scanner.held))
        if not self._whole(scanner.held) and not is_cut_call:
            self.deltas.write(scanner.spelled(begin + scanner.held))
        scanner.held = ""

    def _whole(self, text: str) -> bool:
        """Read a text of complete calls in JSON; False if it is something else."""
        calls = whole_calls(text, self.names)
        for name, arguments in calls:
            self.deltas.arguments(self.scanner.spelled(arguments), name)
        return bool(calls)


class JsonCalls:
    """Reads calls whose arguments are JSON. The name is in JSON too ({"name": ...}), or stands before a
    sign."""

    FIELD = r'"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*'
    HEAD = re.compile(rf'[\s,;\[]*{{\s*(?:{FIELD})*"name"\s*:\s*"([^"\\]*)"\s*,\s*(?:{FIELD})*'
                      r'"(?:arguments|parameters)"\s*:\s*(?={|\Z)')
    BEGINNING = re.compile(r'[\s,;\[]*(?:{\s*(?:"(\w*)("?).*)?)?', re.DOTALL)  # of a call in JSON
    KEYS = ("name", "type", "id", "function", "arguments", "parameters")

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str], call_format: CallFormat):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names
        self.opening = CallStart(scanner, deltas, names)
        self.untagged = call_format.untagged
        self.lead = call_format.lead
        self.begin, self.end, *self.around = map(scanner.sign, call_format.marks)
        self.starts = (self.begin,)
        call_id = re.escape(scanner.sign("[CALL_ID]"))
        separator = re.escape(scanner.sign("<｜tool▁sep｜>"))
        name_ends = {re.escape(scanner.sign(row.name_end)) for row in CALL_FORMATS.values() if row.name_end}
        self.named_head = re.compile(
            rf"\s*(?:functions\.|\w+{separator})?([\w.-]+)(?::\d+)?\s*(?:{call_id}[\w\s-]*)?"
            rf"(?:{'|'.join(name_ends)})\s*(?={{|\Z)")

    def read(self, begin: str) -> Iterator[None]:
        """Read calls up to their end marker, or as long as more follow. begin: the marker before them, "" if
        they are the whole answer."""
        scanner = self.scanner
        end = self.end if begin else ""

        def head(text: str) -> re.Match | bool:
            match = self.HEAD.match(text) or self.named_head.match(text)
            if match and match.end() < len(text):
                return match[1] in self.names and match
            self.deltas.begun_call = match and Delta("call", "", match[1])
            if match:  # its arguments begin with the next text
                return True
            if end:
                return end not in text
            return bool(begin) or self._may_be_call(text)

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
        if beginning is None:
            return False
        key, quote = beginning.groups()
        if key is None:
            return True
        if quote:  # the key is complete
            return key in self.KEYS
        return any(known.startswith(key) for known in self.KEYS)

    def _copy_object(self, write: Callable[[str], None], depth: int, end: str) -> Iterator[None]:
        """Write text up to the end of a JSON object, `depth` brackets away. The sign that ends the call also
        ends an object that is not complete."""
        quoted = False
        escaped = False
        while True:
            length = 0
            for length, character in enumerate(self.scanner.held, 1):
                if character == end:
                    length -= 1
                    depth = 0
                elif quoted:
                    quoted = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                else:
                    quoted = character == '"'
                    if character in "{[":
                        depth += 1
                    elif character in "}]":
                        depth -= 1
                if depth == 0:
                    break
            write(self.scanner.take(length))
            if depth == 0:
                return
            yield


class TaggedCalls:
    """Reads calls whose arguments are in tags, and writes the arguments as JSON."""

    untagged = False

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str], call_format: CallFormat,
                 types: Seq[Mapping[str, str]] = ()):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names
        self.types = dict(zip(names, types))  # by function: its parameters' types
        self.lead = call_format.lead
        self.opening = CallStart(scanner, deltas, names)
        self.begin, self.end, *self.around = map(scanner.sign, call_format.marks)
        function, last = (scanner.signs(text).strip() for text in call_format.around_arguments)
        self.bare = function.partition("{")[0]  # begins a call as well: Qwen3-Coder may leave out <tool_call>
        self.starts = tuple(filter(None, (self.begin, self.bare)))
        function = re.escape(function).replace(r"\{name\}", r"\s*([^\s<>\ud800-\udfff]+)\s*")
        self.head = re.compile(rf"\s*{function}" if self.bare else rf"{function}(?=[<\n\ud800-\udfff])")

        assert call_format.tags
        parameter, value_end, _ = call_format.tags
        most = LIMITS.parameter_characters
        end = re.escape(self.end)
        key = re.escape(scanner.signs(parameter).strip()).replace("\\\n", r"\s*")
        key = key.replace(r"\{name\}", rf"([^<>\ud800-\udfff]{{1,{most}}})")
        own_line = value_end.startswith("\n")
        value_end = scanner.signs(value_end).strip()
        self.stops = [value_end, self.end]
        stop = rf"({re.escape(value_end)}|(?={end}))"
        if own_line:  # the line breaks around a value are not part of it
            key += r"(?:\n|(?=[^\n]))"
            self.stops += ["\n" + sign for sign in self.stops]
            stop = r"\n?" + stop
        self.stop = re.compile(stop)
        self.step = re.compile(rf"{key}|{re.escape(last) or '(?!)'}|(?={end})")

    def read(self, begin: str) -> Iterator[None]:
        """Read calls up to their end. begin: the marker before them, or the beginning of a call that has no
        marker."""
        scanner = self.scanner
        end = self.end
        tagged = begin == self.begin
        if not tagged:
            scanner.held = self.bare + scanner.held

        def head(text: str) -> re.Match | bool:
            if match := self.head.match(text):
                return match[1] in self.names and match
            return end not in text if tagged else not re.search("[\n>]", text)

        if tagged:
            match = yield from self.opening.read(head, begin, end)
        else:
            match = yield from self.opening.read(head, "", self.bare)
        if not match:
            return
        while match and match[1] in self.names:
            scanner.held = scanner.held[match.end():]
            self.deltas.begin_call(match[1], scanner.held)
            scanner.closing = end
            yield from self._parameters(self.types.get(match[1], {}))
            scanner.closing = ""
            while self._next_is_undecided():
                yield
            if scanner.held.lstrip().startswith(end):
                match = None
            else:
                match = self.head.match(scanner.held)
        rest = scanner.held.lstrip()
        if rest.startswith(end):
            scanner.held = rest.removeprefix(end)
        self.deltas.begin("text")

    def _next_is_undecided(self) -> bool:
        """Whether more text must decide if the call ends here, or another one begins in the same tags."""
        rest = self.scanner.held.lstrip()
        if rest.startswith(self.end):
            return False
        if self.end.startswith(rest) or self.bare.startswith(rest):
            return True
        return rest.startswith(self.bare) and ">" not in rest

    def _parameters(self, types: Mapping[str, str]) -> Iterator[None]:
        """Read parameters up to the text after the last one, which is removed, or up to the call's end, which
        stays. Strings are written as they arrive, other values when they are complete."""
        scanner = self.scanner
        deltas = self.deltas
        before = "{"
        while True:
            while not (match := self.step.search(scanner.held)):
                # only the end of the text can be the beginning of a parameter
                scanner.held = scanner.held[-2 * LIMITS.parameter_characters:]
                yield
            scanner.held = scanner.held[match.end():]
            if not match[1]:
                return deltas.arguments("{}" if before == "{" else "}")
            name = match[1].strip()
            key = f"{before}{as_json(name)}: "
            before = ", "
            wanted = types.get(name, types.get("", ""))
            if wanted == "string":
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
        """Where a value ends, and where the sign after it ends. That is the first sign outside JSON strings;
        if a string never ends, it is the very first sign."""
        scanner = self.scanner
        first = None
        searched = 0
        longest = max(map(len, self.stops))
        while True:
            if match := self.stop.search(scanner.held, searched):
                first = first or match
                sign, searched = match.span(1)
                if sign == searched:  # the sign is empty: go on after it
                    searched += 1
                inside = in_json_string(scanner.held[:match.start()])
                if inside is False:
                    return match.span()
                if inside is None or A_MARK.match(scanner.held, sign):
                    return first.span()
            elif scanner.over and first and not scanner.cut:
                return first.span()
            else:
                searched = max(searched, len(scanner.held) - longest)
                yield
