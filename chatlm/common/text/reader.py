"""Turns an answer's tokens into characters, finds stop strings, and splits off reasoning and calls.

A token passes `StreamDecoder` (bytes to whole characters), `StopFinder` (stop strings), and `AnswerReader`
(reasoning, content and calls)."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.text.calls import JsonCalls, TaggedCalls
from chatlm.common.text.formats import HARMONY, HEADINGS, MARKERS, MARKS, MUSE, NO_CALLS, with_markers
from chatlm.common.text.loose_calls import LooseCalls, loose_calls
from chatlm.common.text.scanner import Deltas, Scanner, skip
from chatlm.common.text.value_calls import ValueCalls

if TYPE_CHECKING:
    from chatlm.common.messages.requests import AnswerParams, Delta
    from chatlm.common.text.tokenizer import Tokenizer


CHARACTERS = 0x110000  # more than any code point


class StopTable:
    """Stop strings as one automaton (Aho and Corasick, 1975): reading a character takes the same time however
    many stop strings there are.

    A state stands for the longest beginning of a stop string that the text ends with. State 0: there is
    none."""

    def __init__(self, stops: Seq[str]):
        self.next: dict[int, int] = {}  # state * CHARACTERS + code point -> the state that is one longer
        self.length = [0]    # by state: its characters,
        self.fallback = [0]  # the longest shorter state that it ends with,
        self.ended = [""]    # and the longest stop string that it ends with
        for stop in filter(None, stops):
            self._add(stop)
        # shorter states first, since a state's fallback is shorter than the state
        arrows = sorted(self.next.items(), key=lambda arrow: self.length[arrow[1]])
        for key, state in arrows:
            before, character = divmod(key, CHARACTERS)
            self.fallback[state] = self.after(self.fallback[before], character) if before else 0
            self.ended[state] = self.ended[state] or self.ended[self.fallback[state]]

    def _add(self, stop: str):
        state = 0
        for character in map(ord, stop):
            key = state * CHARACTERS + character
            if key not in self.next:
                self.next[key] = len(self.length)
                self.length.append(self.length[state] + 1)
                self.fallback.append(0)
                self.ended.append("")
            state = self.next[key]
        self.ended[state] = stop

    def after(self, state: int, character: int) -> int:
        """The state after one more character."""
        while (found := self.next.get(state * CHARACTERS + character)) is None and state:
            state = self.fallback[state]
        return found or 0


@functools.lru_cache(8)
def stop_table(stops: tuple[str, ...], owner: str) -> StopTable:
    """A table that all answers of a request share. Owners never share one: the time to make it would tell an
    owner what others have asked."""
    return StopTable(stops)


class StopFinder:
    """Finds stop strings in text that arrives in pieces. It holds back at most the beginning of one.

    After a match, `stopped_by` is the stop string. The string and all text after it are dropped."""

    def __init__(self, stop: Seq[str] = (), owner: str = ""):
        self.table = stop_table(tuple(stop), owner) if any(stop) else None
        self.state = 0
        self.held = ""  # possibly the beginning of a stop string
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        table = self.table
        if self.stopped_by is not None:
            return ""
        if table is None:
            return text
        for i, character in enumerate(text):
            self.state = table.after(self.state, ord(character))
            if stop := table.ended[self.state]:  # if several end here it is the longest, which began first
                self.stopped_by = stop
                text = (self.held + text[:i + 1])[:-len(stop)]
                self.held = ""
                return text
        text = self.held + text
        keep = len(text) - table.length[self.state]
        self.held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Release the text held back: no more text comes, so it is not the beginning of a stop string."""
        text = self.held
        self.held = ""
        self.state = 0
        return text


class StreamDecoder:
    """Turns tokens into whole characters. It holds back an unfinished character, and drops it at the end.

    Bytes that cannot become valid UTF-8 turn into U+FFFD at once. `marks`: the characters that stand for some
    tokens."""

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[int, str] | None = None):
        self.tokenizer = tokenizer
        self.marks = marks or {}
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self.marks:
            return self.utf8.decode(b"", True) + self.marks[token]
        return self.utf8.decode(self.tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Text for tokens that waited for more. A plain decoder has none."""
        return ""


class Prose:
    """Reads reasoning and content. `calls` reads calls after their marks, and `loose` those in plain JSON.

    `wrapper`: two markers that may enclose the content. They are left out."""

    def __init__(self, scanner: Scanner, deltas: Deltas, calls: JsonCalls | TaggedCalls | ValueCalls,
                 thoughts: tuple[str, str] = ("", ""), wrapper: tuple[str, str] = ("", ""),
                 loose: LooseCalls | None = None):
        self.scanner = scanner
        self.deltas = deltas
        self.thoughts = thoughts
        self.calls = calls
        self.loose = loose
        self.think, self.end = map(scanner.sign, thoughts)
        self.wrapper, self.wrapper_end = map(scanner.sign, wrapper)
        self.wrapped = False  # the content has begun with a wrapper that has not ended
        self.heading = HEADINGS.get(thoughts[0], "")
        self.thought = False  # the prompt ends with finished reasoning
        # a call that begins with a token also ends reasoning, because Qwen3.5 may leave out the end marker
        self.call_marks = (calls.begin,) if calls.lead and calls.begin in MARKERS else ()

    def after_prompt(self, text: str) -> str:
        """The end of the prompt from which an answer goes on: from where reasoning began, else ""."""
        begin = text.rfind(self.think)
        end = text.rfind(self.end)
        self.thought = end > begin
        self.deltas.stripping = self.thought
        if self.wrapper:
            self.wrapped = text.rfind(self.wrapper) > max(begin, end, text.rfind(self.wrapper_end))
        return text[begin:] if begin > end else ""

    def read(self) -> Iterator[None]:
        scanner = self.scanner
        deltas = self.deltas
        calls = self.calls
        signs = {self.end, *calls.starts, *calls.around, *(self.loose.signs if self.loose else ())}
        if self.think in MARKS.values():
            signs.add(self.think)
        while True:
            allowed = set(signs)
            if not {"text", "call"} & set(deltas.kinds):  # nothing but reasoning came so far
                yield from self._first_text()
                first = scanner.held.lstrip()
                if calls.untagged and first[:1] in ("{", "["):
                    yield from calls.read("")
                    continue
                if self.wrapper and not self.wrapped and first.startswith(self.wrapper):
                    self.wrapped = True
                    deltas.stripping = True
                    scanner.held = first[len(self.wrapper):]
                    continue
                if first.startswith(self.think):  # a marker that is spelled out counts only here
                    allowed.add(self.think)
            wrapper_ends = (f"\n{self.wrapper_end}", self.wrapper_end) if self.wrapped else ()
            sign = yield from scanner.until(
                deltas.write, *filter(None, allowed), *wrapper_ends,
                dropped=(calls.begin, calls.end, *calls.around, *wrapper_ends))
            if sign in wrapper_ends:
                yield from self._end_of_content(sign)
            elif sign == self.think:
                yield from self._reasoning()
            elif sign in calls.starts:
                yield from calls.read(sign)
            elif self.loose and sign in self.loose.signs:
                yield from self.loose.read(sign)

    def _first_text(self) -> Iterator[None]:
        """Wait until the answer's first text is there, and is not just the beginning of a marker."""
        while not self.scanner.over:
            first = self.scanner.held.lstrip()
            signs = self.think, "" if self.wrapped else self.wrapper
            is_beginning = any(first != sign and sign.startswith(first) for sign in signs)
            if first and not is_beginning:
                return
            yield

    def _end_of_content(self, sign: str) -> Iterator[None]:
        """Drop a wrapper's end if nothing but calls comes after it, else it is text."""
        scanner = self.scanner
        starts = tuple(filter(None, self.calls.starts))
        yield from self._undecided(*starts, self.wrapper_end)
        rest = scanner.held.lstrip()
        if not rest or rest.startswith(starts):
            scanner.held = rest
            self.wrapped = False
        else:
            self.deltas.write(scanner.spelled(sign))

    def _reasoning(self) -> Iterator[None]:
        scanner = self.scanner
        deltas = self.deltas
        deltas.begin("reasoning")
        if self.heading:
            headings = (self.heading + "\n", self.heading + self.end)
            yield from self._undecided(*headings)
            if scanner.held.startswith(headings):
                scanner.held = scanner.held[len(self.heading):]
        while deltas.part == "reasoning":
            sign = yield from scanner.until(deltas.write, self.end, *self.call_marks)
            if sign == self.end:
                return deltas.begin("text")
            yield from self._undecided(self.calls.lead)
            if scanner.held.lstrip().startswith(self.calls.lead):
                yield from self.calls.read(sign)
            else:
                deltas.write(scanner.spelled(sign))

    def _undecided(self, *signs: str) -> Iterator[None]:
        """Wait while the text that comes may become one of these signs."""
        while not self.scanner.over:
            text = self.scanner.held.lstrip()
            if not any(sign != text and sign.startswith(text) for sign in signs):
                return
            yield

    def end_of_thinking(self, again: bool) -> str:
        return self.thoughts[1]

    def reasoning_grammar(self, of_calls: bool) -> str:
        """Rules of a grammar in which reasoning comes before `content`; "" if no reasoning can come."""
        if self.thought:
            return ""
        opening, closing = (f"<[{name}]>" for name in self.thoughts)
        if self.heading:
            opening += f' "{self.heading}\\n"'
        if self.thoughts[1] in self.scanner.markers:
            markers = [*self.thoughts, *(MARKERS[mark] for mark in self.call_marks)]
            thought = f"{any_token(self.scanner, markers)} {closing} BLANK"
            rule = "BLANK: /\\n{0,2}/"
        else:  # the end marker is spelled out
            thought = "thought"
            rule = f"thought[suffix={json.dumps(self.thoughts[1])}]: /(?s:.*)/"
        if self.deltas.part != "reasoning":
            thought = f"({opening} {thought})?"
        return f"start: {thought} content\n{rule}"


class Headers:
    """Reads the headers of an answer's messages, which end with the sign `message`."""

    CHARACTERS = 300  # more than any header has

    def __init__(self, scanner: Scanner, deltas: Deltas, start: str, message: str, within: str):
        """within: what only a header has, so that an answer which ends there is not all text."""
        self.scanner = scanner
        self.deltas = deltas
        self.start = start
        self.message = message
        self.within = within
        self.reading = True

    def read(self) -> Generator[None, None, str]:
        """Read a message's header and return it; "" if there is none and all is text."""
        scanner = self.scanner
        self.reading = True
        self.deltas.part = "text"
        while self.message not in scanner.held and len(scanner.held) <= self.CHARACTERS:
            rest = scanner.held.rpartition(self.start)[2].removeprefix("assistant")
            if scanner.over and not scanner.cut and self.within not in rest:
                self.deltas.write(scanner.spelled(rest))
            yield
        header, message, rest = scanner.held.partition(self.message)
        scanner.held = rest if message else scanner.held.removeprefix("assistant")
        self.reading = False
        return header if message else ""


class Harmony:
    """Reads the messages of gpt-oss. Each has a header, which names its role, its channel and its
    recipient."""

    def __init__(self, scanner: Scanner, deltas: Deltas, names: Seq[str] = ()):
        self.scanner = scanner
        self.deltas = deltas
        self.names = names
        self.start, self.channel, _, message, *self.ends = map(scanner.sign, HARMONY)
        self.headers = Headers(scanner, deltas, self.start, message, self.channel)

    def after_prompt(self, text: str) -> str:
        return text

    def read(self) -> Iterator[None]:
        scanner = self.scanner
        deltas = self.deltas
        while True:
            header = yield from self.headers.read()
            words = header.rpartition(self.start)[2].partition(self.channel)[2].split()
            channel = words[0] if words else "final"
            # a function may come without `to=`; openai-harmony accepts that too
            recipient = re.search("(?:to=|(?=functions\\.))([^\\s<\ud800-\udfff]+)", header)
            name = recipient[1].removeprefix("functions.") if recipient else ""
            if name in self.names:
                deltas.begin_call(name, scanner.held)
                yield from scanner.until(deltas.arguments, *self.ends, self.start)
            else:
                hidden = recipient or channel.startswith("analysis")  # recipient: of an unknown function
                deltas.begin("reasoning" if hidden else "text")
                yield from scanner.until(deltas.write, *self.ends, self.start)

    def end_of_thinking(self, again: bool) -> str:
        """The text that ends this message and begins the next one, which may be of any kind. `again`:
        reasoning was ended before, so the next message is the final one."""
        if again:
            return "<|end|><|start|>assistant<|channel|>final<|message|>"
        return "<|end|><|start|>assistant"

    def reasoning_grammar(self, of_calls: bool) -> str:
        """Rules of a grammar in which reasoning comes before `content`, which is a message or calls; "" if no
        reasoning can come."""
        if not self.headers.reading:
            return ""
        start, channel, _, message, end, *_ = (f"<[{name}]>" for name in HARMONY)
        final = "" if of_calls else f'{channel} "final" {message}'
        return (f"start: thought? {final} content\nthought: {channel} \"analysis\" {message} "
                f'{any_token(self.scanner, HARMONY)} {end} {start} "assistant"')


class Addressed:
    """Reads the messages of Muse Glimmer. Each has a header, which names its recipient: "self" of reasoning,
    "user" of the answer, or a function, to which the message has a call."""

    def __init__(self, scanner: Scanner, deltas: Deltas, calls: TaggedCalls):
        self.scanner = scanner
        self.deltas = deltas
        self.calls = calls
        start, message, *ends = map(scanner.sign, MUSE)
        self.ends = (*ends, start)
        self.headers = Headers(scanner, deltas, start, message, "to=")

    def after_prompt(self, text: str) -> str:
        return text

    def read(self) -> Iterator[None]:
        scanner = self.scanner
        deltas = self.deltas
        while True:
            header = yield from self.headers.read()
            recipient = re.search("to=([^\\s<\ud800-\udfff]+)", header)
            if recipient is None or recipient[1] == "user":
                deltas.begin("text")
                yield from scanner.until(deltas.write, *self.ends)
                continue
            deltas.begin("reasoning")  # also what is sent to a function that there is not
            if recipient[1] not in self.calls.names:
                yield from scanner.until(deltas.write, *self.ends)
                continue
            sign = yield from scanner.until(skip, self.calls.begin, *self.ends)
            if sign == self.calls.begin:
                yield from self.calls.read(sign)
                yield from scanner.until(skip, *self.ends)

    def end_of_thinking(self, again: bool) -> str:
        """As in Harmony."""
        if again:
            return "<|eom|><|start|>assistant to=user<|message|>"
        return "<|eom|><|start|>assistant"

    def reasoning_grammar(self, of_calls: bool) -> str:
        """As in Harmony."""
        if not self.headers.reading:
            return ""
        start, message, eom, _ = (f"<[{name}]>" for name in MUSE)
        final = "" if of_calls else f'" to=user" {message}'
        return (f"start: thought? {final} content\nthought: \" to=self\" {message} "
                f'{any_token(self.scanner, MUSE)} {eom} {start} "assistant"')


def any_token(scanner: Scanner, markers: Seq[str]) -> str:
    """A grammar's expression for any tokens but these markers and those that end an answer."""
    ends = {scanner.markers[name] for name in markers if name in scanner.markers}
    excluded = sorted(ends | scanner.tokenizer.stop_tokens)
    return f"<[^{','.join(map(str, excluded))}]>*"


class AnswerReader:
    """Splits an answer's text, as it arrives, into reasoning, content and function calls.

    A call that starts with its name is passed on when its arguments begin, and these follow as they arrive.
    Any other call is passed on when it is complete. Text that only looks like a call stays text."""

    def __init__(self, tokenizer: Tokenizer, names: Seq[str] = (), types: Seq[Mapping[str, str]] = (),
                 schemas: Seq[str] = ()):
        self.tokenizer = tokenizer
        self.names = names
        call_format = tokenizer.call_format
        scanner = Scanner(tokenizer)
        deltas = Deltas()
        self.scanner = scanner
        self.deltas = deltas
        if call_format.thoughts and call_format.tags:
            body = replace(call_format, call=call_format.call.partition("<|message|>")[2])
            self.parts = Addressed(scanner, deltas, TaggedCalls(scanner, deltas, names, body, types))
        elif call_format.thoughts:
            self.parts = Harmony(scanner, deltas, names)
        else:
            if not names:
                call_format = NO_CALLS
            if call_format.typed:
                reader = TaggedCalls if call_format.tags else ValueCalls
                calls = reader(scanner, deltas, names, call_format, types)
            else:
                calls = JsonCalls(scanner, deltas, names, call_format)
            self.parts = Prose(scanner, deltas, calls, tokenizer.thoughts or ("", ""), tokenizer.wrapper,
                               loose_calls(scanner, deltas, names, schemas))
        self.reading = self.parts.read()

    @property
    def thinking(self) -> bool:
        return self.deltas.part == "reasoning"

    def push(self, text: str):
        self.scanner.held += text
        next(self.reading)

    def prime(self, text: str):
        """Read how the prompt ends: the answer may begin inside reasoning."""
        self.push(self.parts.after_prompt(text))
        self.deltas.forget()

    def finish(self, cut: bool = False):
        """Read the rest; no more text comes. A call that was cut before its arguments, or in its tag, is
        dropped."""
        self.scanner.finish(cut)
        next(self.reading)

    def take(self) -> list[Delta]:
        """The parts read since the last call."""
        return self.deltas.take()

    def end_of_thinking(self, last_thought: str = "", again: bool = False) -> list[int]:
        """The tokens that end reasoning with a last thought. `again`: reasoning was ended before."""
        tokens = []
        if last_thought:
            tokens = self.tokenizer.encode(f"\n\n{last_thought}\n", False)
        return tokens + self.tokenizer.encode_with_specials(self.parts.end_of_thinking(again))

    def grammar(self, params: AnswerParams) -> str:
        """The grammar of a whole answer. `params.grammar` describes its content or its calls."""
        markers = self.scanner.markers
        source = with_markers(params.grammar, markers)
        first = self.tokenizer.thoughts and self.parts.reasoning_grammar(params.grammar_param == "tools")
        if not first:
            return source
        return with_markers(f"{first}\ncontent: %lark {{\n{source}\n}}", markers)


def answer_reader(tokenizer: Tokenizer, params: AnswerParams, prompt_ids: Seq[int]) -> AnswerReader | None:
    """A reader for the answer to a prompt; None if an answer has neither reasoning nor calls."""
    may_call = tokenizer.tool_format and (not params.grammar or params.grammar_param == "tools")
    names = params.tool_names if may_call else ()
    if not params.chat or not (tokenizer.thoughts or names):
        return None
    reader = AnswerReader(tokenizer, names, params.tool_types, params.tool_schemas)
    if tokenizer.thoughts:
        marks = tokenizer.marks(with_calls=False)
        ends = tokenizer.special_names.keys() - marks.keys() | {tokenizer.markers.get("<|start|>")}
        first = len(prompt_ids)  # of the prompt's last turn
        while first and prompt_ids[first - 1] not in ends:
            first -= 1
        decoder = StreamDecoder(tokenizer, marks)
        reader.prime("".join(map(decoder.push, prompt_ids[first:])))
    return reader
