"""What there is of an answer so far: `AnswerState`, one for each answer.

It is made where the answer begins. Each event is folded into it once, before anybody gets the event, and only
the fold writes it. Whoever needs the answer so far reads it: the encoder, which renders it for an API, and
what keeps responses, writes chats, runs rounds of tools, compares answers and logs conversations.

Log-probabilities are not in it: as objects they take 14 KB for a token, so an encoder that was asked for them
keeps them as the JSON that it sends, which takes 2 KB."""

from __future__ import annotations

import hashlib
import json
import secrets
from array import array
from collections.abc import Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import TYPE_CHECKING

from chatlm.common.errors import EngineFailure
from chatlm.common.messages.requests import (
    Accepted, CallApproved, CallEnded, Delta, Finished, Piece, RoundEnded, ToolsListed, Usage)

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Event, Request
    from chatlm.common.messages.tool_rounds import PlannedTool, ToolPlan


def part_id(origin: str, index: int) -> str:
    """24 hexadecimal digits, derived from what the id must depend on; random if that is ""."""
    return hashlib.sha256(f"{origin}/{index}".encode()).hexdigest()[:24] if origin else secrets.token_hex(12)


@dataclass(slots=True, eq=False)
class Part:
    """A part of an answer: a `text`, `reasoning`, a `call` of a function, the `result` of a call that the
    server has run, or a `list` of a server's tools."""

    kind: str
    index: int          # among all parts of its choice
    id: str
    name: str = ""      # of a call's function
    place: int = 0      # of a call: among those of its choice
    begin: int = 0      # characters of the choice's text before it
    sources: int = 0    # how many of the answer's sources its numbers may cite
    is_closed: bool = False  # True: nothing can be added
    buffer: StringIO = field(default_factory=StringIO)  # a list of pieces would take 50 bytes more for each
    calculations: list[dict] = field(default_factory=list)  # in its text; `start` counts the choice's text
    tool: PlannedTool | None = None     # of a call that the server makes; None: it is the client's
    approval_id: str | None = None      # of the request that a call was approved by; "": it needed none
    result: CallEnded | None = None     # of a call that the server has run
    tool_list: ToolsListed | None = None
    call: Part | None = None            # whose result this is

    @property
    def text(self) -> str:
        return self.buffer.getvalue()

    @property
    def characters(self) -> int:
        """Of its text."""
        return self.buffer.tell()


@dataclass(slots=True, eq=False)
class ChoiceState:
    """One choice of an answer: its parts, and its end."""

    index: int
    origin: str = ""    # see `part_id`
    parts: list[Part] = field(default_factory=list)
    open: Part | None = None  # the last of them, if it can grow
    calls: list[Part] = field(default_factory=list)         # those of them that are calls
    calculations: list[dict] = field(default_factory=list)  # calls of the calculator, in all of its text
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    done: Finished = None  # pyright: ignore[reportAssignmentType]  until it has ended

    def text(self, kind: str = "text") -> str:
        return "".join([part.text for part in self.parts if part.kind == kind])


class AnswerState:
    """An answer so far. Only `fold` writes it."""

    def __init__(self, request: Request, plan: ToolPlan | None = None):
        """plan: the tools that the server calls for it."""
        count = (len(request.prompts) or 1) * request.n
        # a line of a batch may have been answered by another server: its ids are always the same
        origins = [f"{request.id}/{index}" if request.low_priority else "" for index in range(count)]
        self.choices = [ChoiceState(index, origin) for index, origin in enumerate(origins)]
        self.choices_of_prompt = request.n
        self.tools = {tool.name: tool for tool in plan.tools} if plan else {}
        self.server_calls: list[Part] = []  # calls of these tools, in the order of their numbers
        self.sources: list[Mapping] = []    # what numbers in its texts cite, from [1] on
        self.prompt_tokens = 0              # of all prompts, once it is accepted
        self.latest: Event | None = None
        self.grown_part: Part | None = None  # to which the latest event has added text, and done no more
        self._touched_parts: Seq[Part] = ()  # if it has: the part that each of its deltas belongs to

    # reading

    @property
    def touched_parts(self) -> Seq[Part]:
        """The part that each delta of the latest event belongs to."""
        return (self.grown_part,) if self.grown_part else self._touched_parts

    def parts_of(self, event: Event) -> Seq[Part]:
        """The same of an event that must be the latest one."""
        assert self.latest is event, "an event is encoded before the next one is folded"
        return self.touched_parts

    @property
    def has_ended(self) -> bool:
        return all(choice.done for choice in self.choices)

    def usage(self) -> Usage:
        """The tokens of all choices. A prompt counts once, each answer to it separately.

        Raises EngineFailure if a choice has not ended."""
        if not self.has_ended:
            raise EngineFailure("the answer ended early")
        ends = [choice.done for choice in self.choices]
        prompts = sum((done.usage for done in ends[::self.choices_of_prompt]), Usage())
        return replace(sum((done.usage for done in ends), Usage()),
                       prompt_tokens=prompts.prompt_tokens, cached_tokens=prompts.cached_tokens)

    # writing

    def fold(self, event: Event):
        self.latest = event
        if type(event) is not Piece:
            self.grown_part = None
            self._touched_parts = [*self._fold_other(event)]
            return
        choice = self.choices[event.choice]
        for token in event.tokens:  # `extend` takes longer for one
            choice.token_ids.append(token)
        deltas = event.deltas
        part = choice.open
        if part and len(deltas) == 1:
            kind, text, name = deltas[0]
            if text and kind == part.kind and not name:
                part.buffer.write(text)
                self.grown_part = part
                return
        self.grown_part = None
        self._touched_parts = [self._add(choice, delta) for delta in deltas]

    def _fold_other(self, event: Event) -> Iterator[Part]:
        first = self.choices[0]  # all of an answer for which the server calls tools
        match event:
            case Accepted():
                self.prompt_tokens = event.prompt_tokens
            case Finished():
                choice = self.choices[event.choice]
                choice.done = event
                self._close(choice)
            case RoundEnded():
                self._close(first)
            case ToolsListed():
                part = self._begin(first, "list", event.label)
                part.tool_list = event
                self._close(first)
                yield part
            case CallApproved():  # a call that the model has not made, whole
                part = self._begin(first, "call", event.name)
                part.approval_id = event.approval_id
                part.buffer.write(event.arguments)
                self._close(first)
                yield part
            case CallEnded():
                call = self.server_calls[event.number]
                call.result = event
                self.sources += event.cited
                part = self._begin(first, "result", call.name)
                part.call = call
                self._close(first)
                yield part

    def _add(self, choice: ChoiceState, delta: Delta) -> Part:
        """Add a delta to its part: the last one or, if its kind is another or a call begins, a new one."""
        kind = "text" if delta.kind == "calculator" else delta.kind
        part = choice.open
        if part is None or part.kind != kind or delta.name:
            part = self._begin(choice, kind, delta.name)
        if delta.kind == "calculator":
            call = {"start": part.begin + part.characters, **json.loads(delta.text)}
            part.calculations.append(call)
            choice.calculations.append(call)
        else:
            part.buffer.write(delta.text)
        return part

    def _begin(self, choice: ChoiceState, kind: str, name: str) -> Part:
        self._close(choice)
        index = len(choice.parts)
        part = Part(kind, index, part_id(choice.origin, index), name, sources=len(self.sources))
        if choice.parts:
            before = choice.parts[-1]
            part.begin = before.begin + (before.characters if before.kind == "text" else 0)
        choice.parts.append(part)
        choice.open = part
        if kind == "call":
            part.place = len(choice.calls)
            part.tool = self.tools.get(name)
            choice.calls.append(part)
            if part.tool:
                self.server_calls.append(part)
        return part

    @staticmethod
    def _close(choice: ChoiceState):
        if choice.open:
            choice.open.is_closed = True
            choice.open = None
