"""The base classes of all encoders: `Encoder` and `BlockEncoder`.

An encoder turns the events of one answer into the bytes that one API sends, as a stream or as one body."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from typing import Any, TYPE_CHECKING

from chatlm import __version__
from chatlm.common.jsontext import dump
from chatlm.common.messages.requests import (
    DRAFT_SOURCES, Accepted, CallApproved, CallEnded, Delta, Finished, Piece, PromptProgress, RoundEnded,
    ToolsListed, Usage)
from chatlm.common.text.calculations import shift_calls
from chatlm.front.api.answer_state import AnswerState, Part, part_id
from chatlm.front.api.errors import openai_error

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Event
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.api.answer_state import ChoiceState
    from chatlm.front.api.citations import Citations


SYSTEM_FINGERPRINT = f"chat_server-{__version__}"


def frame(value) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def timings_body(done: Finished) -> dict:
    body = {"queue_ms": round(done.queue_ms, 1), "ttft_ms": round(done.ttft_ms, 1),
            "tokens_per_second": done.tokens_per_second and round(done.tokens_per_second, 1),
            "drafted_tokens": done.usage.drafted_tokens, "accepted_tokens": done.usage.accepted_tokens}
    if drafts := drafts_body(done.usage):
        body["drafts"] = drafts
    if done.dropped_messages:
        body["dropped_messages"] = done.dropped_messages
    return body


def drafts_body(usage: Usage) -> dict[str, dict[str, int]]:
    """How many tokens each source of drafts proposed, and how many of them were right. Sources without drafts
    are left out."""
    return {source: {"drafted": drafted, "accepted": getattr(usage.accepted, source)}
            for source in DRAFT_SOURCES if (drafted := getattr(usage.drafted, source))}


class AnswerBlock:
    """How an API shows a part of an answer, or several as one: as `text`, `reasoning`, a `call` that its
    client makes, a `result`, or one of what the server's own calls of tools make: `mcp`, such a call; `own`,
    one that has an item of its own; `approval`, one that the client is asked about; `list`, a server's
    tools."""

    def __init__(self, kind: str, index: int, part: Part):
        self.kind = kind
        self.index = index
        self.part = part
        self.parts = [part]  # and those that are shown with it
        # what was sent:
        self.frame = b""     # the beginning of an event with more of its text
        self.calculated = 0  # calls of the calculator
        self.citations: Citations | None = None  # None: none yet

    @property
    def id(self) -> str:
        return (self.part.call or self.part).id

    @property
    def text(self) -> str:
        return self.part.text if len(self.parts) == 1 else "".join([part.text for part in self.parts])

    @property
    def result(self) -> CallEnded | None:
        return (self.part.call or self.part).result

    @property
    def calculations(self) -> list[dict]:
        return [call for part in self.parts for call in part.calculations]


def usage_body(usage: Usage) -> dict[str, int]:
    """The counts that the native API and the access log show."""
    return {name: getattr(usage, name)
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")}


def size_of(event: Event) -> int:
    """Roughly how many bytes an answer that is sent whole needs for an event."""
    if type(event) is Piece:
        size = 100
        for delta in event.deltas:
            size += len(delta.text)
        return size
    match event:
        case CallEnded():
            return 100 + 2 * len(event.text)  # its item may have it too
        case ToolsListed():
            return len(dump(event.tools))
    return 0


PROGRESS_FIELDS = "queue_position", "prompt_tokens", "prompt_tokens_done"


class Encoder:
    """Renders an answer for its API: with `encode` event by event, or with `completion` as one body. What
    the answer has so far is in its state, into which each event was folded before the encoder gets it."""

    ping = b": ping\n\n"
    content_type = "text/event-stream; charset=utf-8"
    frame_end = b"\n\n"
    repeated_bytes = 0

    def __init__(self, parsed: ParsedBody, model: str, tokenizer: Tokenizer | None = None):
        self.parsed = parsed
        self.model = model
        self.request = parsed.request
        self.tokenizer: Tokenizer = tokenizer  # pyright: ignore[reportAttributeAccessIssue]  who needs it has it
        self.repeated_bytes = len(parsed.repeated)
        self.state = AnswerState(parsed.request, parsed.plan)

    def start(self, accepted: Accepted) -> bytes:
        """The first frames of a stream. None are needed: the headers say that the request was accepted."""
        return b""

    def failed(self, error: ChatServerError) -> bytes:
        """The frames that end a stream after an error."""
        return self.lone_failure(error)

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        """The same without the answer's state, for a recording that outlives its answer."""
        return frame(openai_error(error))

    @staticmethod
    def numbered(number: int, frame: bytes) -> bytes:
        """A frame of a recording, which has its number if the API has a place for that."""
        return b"id: %d\n%s" % (number, frame)

    def encode(self, event: Event) -> bytes:
        """The frames of a stream for the latest event; b"" for none."""
        raise NotImplementedError

    def collect(self, event: Any) -> int:
        """How many bytes an answer that is sent whole needs for the latest event. Only what the state does
        not keep has to be noted here."""
        return size_of(event)

    def completion(self) -> Iterator[bytes]:
        """The whole answer, in parts, after its last event."""
        raise NotImplementedError
        yield b""

    async def collect_all(self, events: AsyncIterator[Event], grow: Callable[[int], object]) -> bytes:
        """The whole answer, once its events have come. `grow` is called with the bytes that each event takes,
        and may raise."""
        async for event in events:
            if not isinstance(event, Accepted | PromptProgress):
                grow(self.collect(event))
        return b"".join(self.completion())

    def without_work(self) -> bytes:
        """The whole answer to a request that asks for nothing; b"" for all others."""
        return b""

    def progress(self, event: PromptProgress) -> bytes:
        body: dict = {name: getattr(event, name) for name in PROGRESS_FIELDS}
        if event.loading is not None:
            body["loading"] = {"model": self.model, "fraction": event.loading}
        return self.framed({"progress": body})

    def framed(self, body: dict) -> bytes:
        return frame(body)

    def usage(self) -> Usage:
        return self.state.usage()


class BlockEncoder(Encoder):
    """Turns events into an answer that is a list of blocks. Each begins, grows and ends before the next one
    begins. A subclass writes these moments for its API."""

    open_block: Callable[[AnswerBlock], bytes]
    grow_block: Callable[..., bytes]  # with the new text, and maybe a call of the calculator
    close_block: Callable[[AnswerBlock], bytes]
    end: Callable[[], bytes]          # of the answer
    body: Callable[[], dict]          # of a whole answer

    # of an answer whose tools the server calls itself:
    list_tools: Callable[[AnswerBlock], bytes]  # the whole block of a list
    end_call: Callable[[AnswerBlock], bytes]    # what follows once a call has its result
    has_own_items = False  # does its API show calls of some tools in items of their own?

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.unsent_calls = iter(self.choice.calculations)  # which grows
        self.shown_blocks: list[AnswerBlock] = []     # so far: ask `blocks`
        self.block_of: list[AnswerBlock | None] = []  # by the indexes of parts; None: it is not shown
        self.open: AnswerBlock | None = None          # the block whose beginning was sent, and not its end
        self.needs_a_block = True  # clients expect at least one, besides lists of tools

    @property
    def choice(self) -> ChoiceState:
        return self.state.choices[0]

    @property
    def blocks(self) -> list[AnswerBlock]:
        """All that this API shows of the answer."""
        self._show_new_parts()
        return self.shown_blocks

    def _show_new_parts(self):
        for part in self.choice.parts[len(self.block_of):]:
            self.block_of.append(self.block_for(part))
        has_none = all(block.kind == "list" for block in self.shown_blocks)
        if has_none and self.choice.done and self.needs_a_block:
            index = len(self.choice.parts)
            self._show("text", Part("text", index, part_id(self.choice.origin, index)))

    def block_for(self, part: Part) -> AnswerBlock | None:
        """The block that shows a part; None: none does."""
        kind = self.kind_of(part)
        return self._show(kind, part) if kind else None

    def _show(self, kind: str, part: Part) -> AnswerBlock:
        self.shown_blocks.append(AnswerBlock(kind, len(self.shown_blocks), part))
        return self.shown_blocks[-1]

    def kind_of(self, part: Part) -> str:
        """The kind of the block that shows a part; "": none does."""
        if part.kind == "result":
            return ""
        if part.tool is None:
            return part.kind
        if part.tool.asks and part.approval_id is None:
            return "approval"
        return "own" if part.tool.item and self.has_own_items else "mcp"

    def encode(self, event: Event) -> bytes:
        if type(event) is Piece:
            if self.state.grown_part:
                return self._grow(self.state.grown_part, event.deltas[0])
            return b"".join(map(self._grow, self.state.parts_of(event), event.deltas))
        match event:
            case Finished():
                lone = [block for block in self.blocks if block.part.index == len(self.choice.parts)]
                return b"".join(map(self._open, lone)) + self._close() + self.end()
            case RoundEnded():
                return self._close()
            case CallApproved():
                block = self.blocks[-1]
                return self._open(block) + self.grow_block(block, event.arguments) + self._close()
            case CallEnded():
                call = self.block_of[self.state.server_calls[event.number].index]
                assert call
                return self.end_call(call)
            case ToolsListed():
                return self._close() + self.list_tools(self.blocks[-1])
        return b""

    def _grow(self, part: Part, delta: Delta) -> bytes:
        """The frames for a delta of a part, after the end of the block before it if that is another one."""
        if part.index >= len(self.block_of):
            self._show_new_parts()
        block = self.block_of[part.index]
        if block is None:
            return b""
        frames = b"" if block is self.open else self._open(block)
        if not delta.text:
            return frames
        if delta.kind == "calculator":
            [call] = self.placed_calls(block, [next(self.unsent_calls)])
            block.calculated += 1
            return frames + self.grow_block(block, "", {"index": block.calculated - 1, **call})
        return frames + self.grow_block(block, delta.text)

    def _open(self, block: AnswerBlock) -> bytes:
        frames = self._close()
        self.open = block
        return frames + self.open_block(block)

    def _close(self) -> bytes:
        block = self.open
        self.open = None
        return self.close_block(block) if block else b""

    def placed_calls(self, block: AnswerBlock, calls: Seq[dict]) -> Seq[dict]:
        """Calls of the calculator in a block. Each stands after so many characters of the text that clients
        see as one: the block's, unless a subclass says otherwise."""
        return shift_calls(calls, -block.part.begin)

    def completion(self) -> Iterator[bytes]:
        yield dump(self.body())

    def event(self, event_type: str, **fields) -> bytes:
        return b"event: %s\n" % event_type.encode() + frame({"type": event_type} | fields)

    def framed(self, body: dict) -> bytes:
        return self.event(*body, **body)


def calculator_member(calls: Seq[Mapping]) -> dict:
    """The member that stands beside a text with these calls of the calculator."""
    return {"calculator": calls} if calls else {}


def parsed_arguments(text: str) -> dict:
    """The arguments of a call; {} if its JSON was cut."""
    with suppress(ValueError):
        arguments = json.loads(text)
        if isinstance(arguments, dict):
            return arguments
    return {}
