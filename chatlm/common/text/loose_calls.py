"""Reads calls that a model writes as plain JSON where its template shows it other marks."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence as Seq

from chatlm.common.text.fitting import arguments_fit
from chatlm.common.text.scanner import Deltas, Scanner


class LooseCalls:
    """Qwen2.5-Coder writes its calls as JSON in a fence, though its template asks for <tool_call>:

        ```json
        {"name": "weather", "arguments": {"city": "Rome"}}
        ```

    An answer that ends with nothing but such objects ends with calls, if each names a function that is
    offered and has arguments that fit it. They may be in fences or not, and have doubled braces, as the
    template of some files shows them. From the first fence or brace on the text is held back. If anything
    else comes, or the answer is cut, it goes out as the text that it is."""

    signs = ("```", "{")  # what may begin them
    OPENING = re.compile(r"```(?:json|JSON|tool_call)?[ \t]*(?=\n)")
    BEGUN_OPENING = re.compile(r"```[a-zA-Z_]{0,9}[ \t]{0,9}")
    # The beginning of an object up to its first key; the key may be incomplete
    BEGINNING = re.compile(r'\{\s*(?:\{\s*)?(?:"(\w*)("?).*)?', re.DOTALL)
    KEYS = ("name", "arguments", "parameters")
    NAME = re.compile(r'\{\s*(?:\{\s*)?"name"\s*:\s*"([^"\\]*)"')

    def __init__(self, scanner: Scanner, deltas: Deltas, schemas: Mapping[str, str]):
        """schemas: the parameters of each function that is offered, as JSON schemas; "": any object."""
        self.scanner = scanner
        self.deltas = deltas
        self.schemas = schemas

    def read(self, sign: str) -> Iterator[None]:
        """Read what begins with this sign, to the end of the answer or to where it can be no calls."""
        scanner = self.scanner
        scanner.held = sign + scanner.held
        text = ""       # what is held back
        calls = []
        fenced = False
        while True:
            space = scanner.held[:len(scanner.held) - len(scanner.held.lstrip(" \t\r\n,;"))]
            text += space
            scanner.held = scanner.held[len(space):]
            if not scanner.held:
                if scanner.over:
                    break
                yield
                continue
            if scanner.held.startswith("{"):
                written, call = yield from self._object()
                text += written
                if call is None:
                    return self.deltas.write(text)
                calls.append(call)
                continue
            fence = yield from self._fence(fenced)
            if not fence:
                if not text:  # its sign begins nothing
                    text = scanner.held[:len(sign)]
                    scanner.held = scanner.held[len(sign):]
                return self.deltas.write(text)
            text += fence
            fenced = not fenced
        if scanner.cut or not calls:
            self.deltas.write(text)
        else:
            for name, arguments in calls:
                self.deltas.arguments(json.dumps(arguments, ensure_ascii=False), name)
        yield

    def _fence(self, closes: bool) -> Generator[None, None, str]:
        """Read a fence that opens, or `closes`, a block; "" if there is none here."""
        scanner = self.scanner
        while not scanner.over and len(scanner.held) < 3 and "```".startswith(scanner.held):
            yield
        if closes:
            fence = "```" if scanner.held.startswith("```") else ""
        else:
            while not scanner.over and self.BEGUN_OPENING.fullmatch(scanner.held):
                yield
            match = self.OPENING.match(scanner.held)
            fence = match[0] if match else ""
        scanner.held = scanner.held[len(fence):]
        return fence

    def _object(self) -> Generator[None, None, tuple[str, tuple[str, dict] | None]]:
        """Read a JSON object. Returns its text, and its call; None as soon as it can be none."""
        scanner = self.scanner
        written = ""
        depth = 0
        quoted = False
        escaped = False
        while True:
            for length, character in enumerate(scanner.held, 1):
                if quoted:
                    quoted = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                    continue
                quoted = character == '"'
                depth += (character in "{[") - (character in "}]")
                if depth == 0:
                    written += scanner.take(length)
                    return written, self._call(written)
            written += scanner.take(len(scanner.held))
            if scanner.over or not self._may_be_call(written):
                return written, None
            yield

    def _may_be_call(self, text: str) -> bool:
        """Whether an object that begins so may become a call."""
        beginning = self.BEGINNING.fullmatch(text[:400])
        if beginning is None:
            return False
        key, quote = beginning.groups()
        if quote and key not in self.KEYS:
            return False
        if key is not None and not any(known.startswith(key) for known in self.KEYS):
            return False
        name = self.NAME.match(text[:400])
        return name is None or name[1] in self.schemas

    def _call(self, text: str) -> tuple[str, dict] | None:
        """The function and the arguments of a complete object; None if it is no call that fits."""
        if not self._may_be_call(text):
            return None
        for form in (text, text[1:-1], undoubled(text)):
            try:
                call = json.loads(form)
            except (ValueError, RecursionError):
                continue
            if not isinstance(call, dict) or not call.keys() <= {"name", "arguments", "parameters"}:
                return None
            name = call.get("name")
            arguments = call.get("arguments", call.get("parameters", {}))
            if not isinstance(name, str) or name not in self.schemas:
                return None
            return (name, arguments) if arguments_fit(arguments, self.schemas[name]) else None
        return None


def undoubled(text: str) -> str:
    """JSON whose braces are all doubled, as in a format string, with single ones. Its strings stay as they
    are."""
    def single(part: re.Match) -> str:
        return part[0] if part[0][0] == '"' else part[0][0]
    return re.sub(r'"(?:[^"\\]|\\.)*"|\{\{|\}\}', single, text)


def loose_calls(scanner: Scanner, deltas: Deltas, names: Seq[str], schemas: Seq[str]) -> LooseCalls | None:
    """A reader of loose calls; None where no schemas were given, as for formats whose models write none."""
    return LooseCalls(scanner, deltas, dict(zip(names, schemas))) if schemas else None
