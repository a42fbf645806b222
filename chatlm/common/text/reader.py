"""An answer's tokens become characters; stop strings, reasoning and calls are told apart as they arrive."""

from __future__ import annotations

import ast
import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.jsontext import JSON_TYPES, as_json, is_text
from chatlm.common.messages.requests import Delta
from chatlm.common.text.formats import (
    A_MARK, A_MARKER, CALLS, HARMONY, IN_CALLS, MARKS, TAGGED_ARGUMENTS, with_markers)

if TYPE_CHECKING:
    from chatlm.common.messages.requests import AnswerParams
    from chatlm.common.text.tokenizer import Tokenizer


class StopMatcher:
    """Finds one stop string in text that arrives in pieces (Knuth-Morris-Pratt), in linear time."""

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0  # the last `matched` characters are a prefix of `stop`
        self.fallback = [0] * len(stop)    # fallback[i]: longest proper border of stop[:i + 1]
        for i in range(1, len(stop)):
            border = self.fallback[i - 1]
            while border and stop[i] != stop[border]:
                border = self.fallback[border - 1]
            self.fallback[i] = border + (stop[i] == stop[border])

    def feed(self, character: str) -> bool:
        """True when the stop string ends here."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self.fallback[self.matched - 1]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)


class StopFinder:
    """Looks for stop strings in text that arrives in pieces; holds back at most the beginning of one. After a
    match `stopped_by` names the string; its text and all that follows is dropped."""

    def __init__(self, stop: Seq[str] = ()):
        self.matchers = [StopMatcher(text) for text in sorted(set(stop), key=len, reverse=True) if text]
        self.held = ""  # possibly the beginning of a stop string
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self.matchers:
            return text
        for i, character in enumerate(text):
            # every matcher sees every character; if several end here, the longest, which began first, wins
            ended = [matcher for matcher in self.matchers if matcher.feed(character)]
            if ended:
                self.stopped_by = ended[0].stop
                text = (self.held + text[:i + 1])[:-len(self.stopped_by)]
                self.held = ""
                return text
        text = self.held + text
        keep = len(text) - max(matcher.matched for matcher in self.matchers)
        self.held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Release the text held back: no stop string goes on from here."""
        text, self.held = self.held, ""
        for matcher in self.matchers:
            matcher.matched = 0
        return text


class StreamDecoder:
    """Tokens in, whole characters out; holds back an unfinished character, and drops it at the end.

    Bytes that cannot become valid UTF-8 turn into U+FFFD at once. `marks` are characters that stand for
    tokens."""

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[int, str] | None = None):
        self.tokenizer, self.marks = tokenizer, marks or {}
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self.marks:
            return self.utf8.decode(b"", True) + self.marks[token]
        return self.utf8.decode(self.tokenizer.token_bytes(token))


def typed_value(text: str, types: str) -> str:
    """The JSON of a parameter's value whose tags do not say its type: of one of these JSON types ("": of any)
    if it can be read so, else a string."""
    # templates write Python's True and None too; reading 450 KB of it takes 0.6 s
    python = len(text) < 10_000 and re.search("True|False|None|'", text)
    for read in (json.loads, ast.literal_eval) if python else (json.loads,):
        with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = read(text.strip())
            if not is_text(value) and any(JSON_TYPES[name](value) for name in types.split() or JSON_TYPES):
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return as_json(text)


def in_json_string(text: str) -> bool | None:
    """Does the text end inside a string of a JSON list or object? None if it does not begin as JSON does."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return text.lstrip()[:1] in ("[", "{") and str(error).startswith("Unterminated string") or None
    return False


class AnswerReader:
    """Splits an answer's text, as it arrives, into reasoning, content and calls of functions.

    `told` lists what is new, in order. A call that begins with its name is told as soon as its arguments
    begin, and they follow as they arrive; any other call is told once it is complete. What looks like a call
    but is none stays text."""

    FIELD = r'"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*'
    HEAD = re.compile(rf'[\s,;\[]*{{\s*(?:{FIELD})*"name"\s*:\s*"([^"\\]*)"\s*,\s*(?:{FIELD})*'
                      r'"(?:arguments|parameters)"\s*:\s*(?={|\Z)')
    BEGINNING = re.compile(r'[\s,;\[]*(?:{\s*(?:"(\w*)("?).*)?)?', re.DOTALL)  # of a call in JSON
    KEYS = ("name", "type", "id", "function", "arguments", "parameters")
    HEADER_CHARACTERS = 300  # a harmony message's header has fewer

    def __init__(self, tokenizer: Tokenizer, names: Seq[str] = (), types: Seq[Mapping[str, str]] = ()):
        self.tokenizer, self.names, self.markers = tokenizer, names, tokenizer.markers
        self.types = dict(zip(names, types))  # of the functions' parameters
        self.tool_format = tokenizer.tool_format if names else None
        self.harmony = tokenizer.tool_format == "harmony"
        self.told: list[Delta] = []
        self.held, self.kind = "", "text"  # text not read yet; what kind is being told
        self.space = ""                    # told before more reasoning, or between two parts
        self.begins = False                # is white space dropped until this part has text?
        self.seen: list[str] = []          # the kinds told so far; the last one last
        self.calling = ""                  # the sign that began calls, until they are over
        self.header, self.closed = self.harmony, False  # closed: the prompt ended the reasoning
        self.over = False                  # no more text comes
        self.called: tuple[str, str] | None = None  # a function whose arguments begin; what is read of them
        self.tags = tuple(A_MARKER.sub(lambda found: self.sign(found[0]), tag)
                          for tag in TAGGED_ARGUMENTS.get(self.tool_format, ()))
        call_id, arguments, separator, begin, *_ = map(re.escape, map(self.sign, IN_CALLS))
        self.named_head = re.compile(
            rf"\s*(?:functions\.|\w+{separator})?([\w.-]+)(?::\d+)?\s*(?:{call_id}[\w\s-]*)?"
            rf"(?:{arguments}|{separator}|```json|{begin})\s*(?={{|\Z)")
        self.reading = self._read_harmony() if self.harmony else self._read()

    def sign(self, marker: str) -> str:
        """How a marker looks in the text."""
        return MARKS[marker] if marker in self.markers else marker

    @property
    def thinking(self) -> bool:
        return self.kind == "reasoning"

    def push(self, text: str):
        self.held += text
        next(self.reading)

    def prime(self, text: str):
        """Read how the prompt ends: the answer may begin inside reasoning."""
        if self.harmony:
            self.push(text)
        else:
            opening, closing = map(self.sign, self.tokenizer.thoughts)
            begin, end = text.rfind(opening), text.rfind(closing)
            self.closed = self.begins = end > begin
            if begin > end:
                self.push(text[begin:])
        self.told, self.seen, self.space = [], [], ""

    def finish(self, cut: bool = False):
        """Read the rest: no more text comes. A call cut before its arguments, or in its tag, is dropped."""
        self.over = True
        if self.tags and self.kind not in ("text", "reasoning"):  # in the arguments of a call
            close = self.sign(CALLS[self.tool_format][1]) * (self.kind != "ended")
            self.held = "" if cut else self.held + close
            next(self.reading)
        if self.header:
            self.held = self.held.rpartition(self.sign("<|start|>"))[2].removeprefix("assistant")
            self.held *= not (cut or self.sign("<|channel|>") in self.held)
        elif self.kind == "text" and self.calling and self._tell_whole(self.held):
            self.held = ""
        elif self.kind == "text" and self.calling:
            self.held = "" if cut and self._may_be_call() else self.calling.strip() + self.held
        elif cut and self.kind == "text":
            signs = map(self.sign, CALLS.get(self.tool_format, ("",)))
            self.held *= not any(sign.startswith(self.held) for sign in signs)
        self._say(len(self.held))

    def take(self) -> list[Delta]:
        told, self.told = self.told, []
        return told

    def _say(self, length: int):
        """Tell `length` characters of what is held."""
        text, self.held = A_MARK.sub(self._spelled, self.held[:length]), self.held[length:]
        if self.kind in ("call", "string") and text:
            self._tell_call(text if self.kind == "call" else as_json(text)[1:-1])
        text = text.lstrip() if self.begins else text
        if not text or self.kind in ("call", "string", "skipped", "ended"):
            return
        text, self.space, self.begins = self.space + text, "", False
        if self.thinking:  # white space at its end is not told
            self.space = text[len(text.rstrip()):]
            text = text.rstrip()
        if text:
            self._note(self.kind)
            self.told.append(Delta(self.kind, text))

    def _spelled(self, mark: re.Match) -> str:
        """The text of a marker that turned out to mark nothing: special tokens have none."""
        name = next(name for name, each in MARKS.items() if each == mark[0])
        return self.tokenizer.token_bytes(self.markers[name]).decode()

    def _note(self, kind: str):
        self.seen = [each for each in self.seen if each != kind] + [kind]

    def _tell_call(self, arguments: str, name: str = ""):
        self._note("call")
        if not name and self.told and self.told[-1].kind == "call":
            last = self.told.pop()
            arguments, name = last.text + arguments, last.name
        self.told.append(Delta("call", arguments, name))

    def _part(self, kind: str):
        """Another part begins; a blank line separates it from an earlier one, unless a call does."""
        self.kind, self.begins = kind, True
        self.space = "\n\n" if kind in self.seen and self.seen[-1] != "call" else ""

    def _until(self, *signs: str) -> Iterator[None]:
        """Tell text up to the first of these signs; removes and returns the sign."""
        while True:
            if found := [(place, sign) for sign in signs if (place := self.held.find(sign)) >= 0]:
                place, sign = min(found)
                self._say(place)
                self.held = self.held[len(sign):]
                return sign
            # what is held may end with the beginning of a sign
            self._say(len(self.held) - max((n for sign in signs for n in range(1, len(sign))
                                            if self.held.endswith(sign[:n])), default=0))
            yield

    def _read(self) -> Iterator[None]:
        """Read what is held; yield whenever more text is needed."""
        think, end = map(self.sign, self.tokenizer.thoughts or ("", ""))
        begin, close, *around = map(self.sign, CALLS.get(self.tool_format, ("", "")))
        while True:
            # Qwen3-Coder may leave out <tool_call>
            bare = self.tags[0].partition("{")[0] if self.tags else ""
            signs = {end, begin, bare, *around, think if think in MARKS.values() else ""}
            if not {"text", "call"} & set(self.seen):
                # what can only come first: reasoning that is spelled out, and a call without a tag
                while not (first := self.held.lstrip()) or first != think and think.startswith(first):
                    yield
                if self.tool_format == "json" and first[0] in "{[":
                    yield from self._read_calls("", "")
                    continue
                if think and first.startswith(think):
                    signs.add(think)
            sign = yield from self._until(*filter(None, signs))
            if sign == think:
                self._part("reasoning")
                yield from self._until(end)
                self._part("text")
            elif sign == bare:
                self.held = bare + self.held
                yield from self._read_tags("", bare, close)
            elif sign == begin:
                yield from (self._read_tags(begin, bare, close) if self.tags
                            else self._read_calls(begin, close))

    def _read_calls(self, begin: str, close: str) -> Iterator[None]:
        """Read calls up to `close`, or while there are more; `begin` was before them."""
        self.calling = begin or " "
        while True:
            while not (head := self.HEAD.match(self.held) or self.named_head.match(self.held)) or (
                    head.end() == len(self.held)):
                self.called = head and (head[1], "")
                if not head and (close in self.held if close else not self._may_be_call()):
                    head = None
                    break
                yield
            if not head or head[1] not in self.names:
                return (yield from self._read_whole(begin, close))
            self.held, self.kind = self.held[head.end():], "call"
            self.called = head[1], self.held
            self._tell_call("", head[1])
            yield from self._read_json(0, close)
            self.kind = "skipped"  # the end of the call
            if close:
                yield from self._until(close)
                break
            if head.re is self.HEAD:
                yield from self._read_json(1, close)
            while not (rest := self.held.lstrip(" \r\n\t,;]")):
                yield
            self.held, self.kind = rest, "text"
            if not rest.startswith("{"):
                break
        self.calling = ""
        self._part("text")

    def _read_tags(self, begin: str, bare: str, close: str) -> Iterator[None]:
        """The same for calls with TAGGED_ARGUMENTS, told as JSON; without `begin`, `bare` was there."""
        name, parameter, end, last = map(str.strip, self.tags)
        pattern = re.escape(name).replace(r"\{\}", r"\s*([^\s<>\ud800-\udfff]+)\s*")
        head = re.compile(rf"\s*{pattern}" if bare else rf"{pattern}(?=[<\n\ud800-\udfff])")
        self.calling = begin or " "
        while not (found := head.match(self.held)) and (
                close not in self.held if begin else not re.search("[\n>]", self.held)):
            yield
        while found and found[1] in self.names:
            self.held, self.kind = self.held[found.end():], "skipped"
            self.called = found[1], self.held
            self._tell_call("", found[1])
            yield from self._read_parameters(self.types.get(found[1], {}), parameter, end, last, close)
            self.kind = "ended"
            if self.held.startswith(close):
                break
            # the end of the call, or another one in the same tags
            while not (rest := self.held.lstrip()) or rest != close and close.startswith(rest) or (
                    bare.startswith(rest) or rest.startswith(bare) and ">" not in rest):
                yield
            found = head.match(self.held)
            if rest.startswith(close):
                self.held = rest
                break
        if self.kind != "ended":  # no call
            return (yield from self._read_whole(begin, close if begin else bare))
        self.held, self.calling = self.held.removeprefix(close), ""
        self._part("text")

    def _read_parameters(self, types: Mapping[str, str], parameter: str, end: str, last: str,
                         close: str) -> Iterator[None]:
        """Read parameters up to `last`, which is removed, or `close`, which is not. Strings are told as they
        arrive, other values once they are complete."""
        most = LIMITS.parameter_characters
        key = re.escape(parameter).replace("\\\n", r"\s*")
        key = key.replace(r"\{\}", rf"([^<>\ud800-\udfff]{{1,{most}}})")
        newline = "\n" * self.tags[2].startswith("\n")
        first = "(?:\n|(?=[^\n]))" * len(newline)  # a value's own line break before it is dropped
        step = re.compile(rf"{key}{first}|{re.escape(last) or '(?!)'}|(?={re.escape(close)})")
        stops = tuple(before + sign for sign in (end, close) for before in {newline, ""})
        stop, lead = re.compile(rf"(?:{newline})?({re.escape(end)}|(?={re.escape(close)}))"), "{"
        while True:
            while not (found := step.search(self.held)):
                self.held = self.held[-2 * most:]  # no parameter began before
                yield
            self.held = self.held[found.end():]
            if not found[1]:
                return self._tell_call("{}" if lead == "{" else "}")
            name, before, lead = found[1].strip(), lead, ", "
            said = f"{before}{as_json(name)}: "
            if (wanted := types.get(name, types.get("", ""))) == "string":
                self._tell_call(said + '"')
                self.kind = "string"
                sign = yield from self._until(*stops)
                self.held = close * sign.endswith(close) + self.held
                said = '"'
            else:
                last, rest = yield from self._find_end(stop, max(map(len, stops)))
                value, self.held = A_MARK.sub(self._spelled, self.held[:last]), self.held[rest:]
                said += typed_value(value, wanted)
            self.kind = "skipped"
            self._tell_call(said)

    def _find_end(self, stop: re.Pattern, most: int) -> Iterator[None]:
        """Where a value ends, and where the sign that ends it does: the first that is not spelled out inside
        a string of JSON, or the first of all if this string never ends."""
        first, seen = None, 0
        while True:
            if found := stop.search(self.held, seen):
                first, (sign, seen) = first or found, found.span(1)
                seen += sign == seen
                inside = in_json_string(self.held[:found.start()])
                if not inside or A_MARK.match(self.held, sign):
                    return (found if inside is False else first).span()
            elif self.over and first:
                return first.span()
            else:
                seen = max(seen, len(self.held) - most)
                yield

    def _read_whole(self, begin: str, close: str) -> Iterator[None]:
        """Read what did not begin as a call does: it may be one once it is complete, or it is text."""
        while close and close not in self.held:
            yield
        end = self.held.find(close) if close else len(self.held)
        if close and self._tell_whole(self.held[:end]):
            self.held, self.calling = self.held[end + len(close):], ""
            self._part("text")
        else:
            self.held, self.calling = begin + self.held, ""
            self._say(len(begin) + end + len(close))

    def _may_be_call(self) -> bool:
        """May what is held become a call in JSON? After a tag, anything may."""
        beginning = self.BEGINNING.fullmatch(self.held)
        key, quote = beginning.groups() if beginning else ("", "")
        return bool(self.calling.strip() or beginning and (key is None or (
            key in self.KEYS if quote else any(each.startswith(key) for each in self.KEYS))))

    def _tell_whole(self, text: str) -> bool:
        """Tell the text as calls if it is a call or a list of calls; False if it is neither."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        calls = [call.get("function", call) if isinstance(call, dict) else call
                 for call in (found if isinstance(found, list) else [found])]
        if not calls or not all(isinstance(call, dict) and call.get("name") in self.names for call in calls):
            return False
        for call in calls:
            arguments = call.get("arguments", call.get("parameters")) or {}
            self._tell_call(arguments if isinstance(arguments, str) else
                            json.dumps(arguments, ensure_ascii=False), call["name"])
        return True

    def _read_json(self, depth: int, close: str) -> Iterator[None]:
        """Tell text to the end of a JSON object, `depth` brackets from it. A token that closes ends even
        what is not complete."""
        quoted = escaped = False
        while True:
            length = 0
            for length, character in enumerate(self.held, 1):
                if character == close:
                    length, depth = length - 1, 0
                elif quoted:
                    quoted, escaped = escaped or character != '"', character == "\\" and not escaped
                else:
                    quoted, depth = character == '"', depth + (character in "{[") - (character in "}]")
                if depth == 0:
                    break
            self._say(length)
            if depth == 0:
                return
            yield

    def _read_harmony(self) -> Iterator[None]:
        """The same for messages, of which each has a header: its role, its channel, who receives it."""
        start, channel, constrain, message, *ends = map(self.sign, HARMONY)
        while True:
            self.header, self.kind = True, "text"
            while message not in self.held and len(self.held) <= self.HEADER_CHARACTERS:
                yield
            header, found, rest = self.held.partition(message)
            self.held, self.header = rest if found else self.held.removeprefix("assistant"), False
            kind = (header.rpartition(start)[2].partition(channel)[2].split() or ["final"])[0]
            # openai-harmony too accepts a function without `to=`
            recipient = found and re.search("(?:to=|(?=functions\\.))([^\\s<\ud800-\udfff]+)", header)
            name = recipient[1].removeprefix("functions.") if recipient else ""
            if name in self.names:
                self.kind, self.calling, self.called = "call", " ", (name, self.held)
                self._tell_call("", name)
            else:  # a call of an unknown function is not content
                self._part("reasoning" if found and (recipient or kind.startswith("analysis")) else "text")
            yield from self._until(*ends, start)
            self.calling = ""

    def grammar(self, params: AnswerParams) -> str:
        """The grammar of a whole answer, whose content, or calls, `params.grammar` describes."""
        source, thoughts = with_markers(params.grammar, self.markers), self.tokenizer.thoughts
        if not thoughts or self.closed or self.harmony and not self.header:
            return source
        start, channel, _, message, end, *_ = (f"<[{name}]>" for name in HARMONY)
        opening, closing = (f"<[{name}]>" for name in thoughts)
        ends = {self.markers.get(name) for name in (HARMONY if self.harmony else thoughts)} - {None}
        text = f"<[^{','.join(map(str, sorted(ends | self.tokenizer.stop_tokens)))}]>*"
        if self.harmony:
            final = f'{channel} "final" {message}' if params.grammar_param != "tools" else ""
            first = (f"start: thought? {final} content\n"
                     f'thought: {channel} "analysis" {message} {text} {end} {start} "assistant"')
        elif thoughts[1] in self.markers:
            thought = f"{'' if self.thinking else opening} {text} {closing} BLANK"
            first = f"start: {thought if self.thinking else f'({thought})?'} content\nBLANK: /\\n{{0,2}}/"
        else:
            mark = "" if self.thinking else opening
            first = (f"start: {mark + ' thought' if self.thinking else f'({mark} thought)?'} content\n"
                     f"thought[suffix={json.dumps(thoughts[1])}]: /(?s:.*)/")
        return with_markers(f"{first}\ncontent: %lark {{\n{source}\n}}", self.markers)


def answer_reader(tokenizer: Tokenizer, params: AnswerParams, prompt_ids: Seq[int]) -> AnswerReader | None:
    """A reader for an answer to this prompt; None if there is nothing to tell apart from its text."""
    may_call = tokenizer.tool_format and (not params.grammar or params.grammar_param == "tools")
    names = params.tool_names if may_call else ()
    if not params.chat or not (tokenizer.thoughts or names):
        return None
    reader = AnswerReader(tokenizer, names, params.tool_types)
    if tokenizer.thoughts:
        marks = tokenizer.marks(with_calls=False)
        ends = tokenizer.special_names.keys() - marks.keys() | {tokenizer.markers.get("<|start|>")}
        first = next((i for i in range(len(prompt_ids), 0, -1) if prompt_ids[i - 1] in ends), 0)
        decoder = StreamDecoder(tokenizer, marks)
        reader.prime("".join(map(decoder.push, prompt_ids[first:])))
    return reader
