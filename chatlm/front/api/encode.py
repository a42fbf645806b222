"""The base classes of all encoders: `Encoder` and `BlockEncoder`.

An encoder turns the events of one answer into the bytes that one API sends, as a stream or as one body."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, TYPE_CHECKING

from chatlm import __version__
from chatlm.common.errors import EngineFailure
from chatlm.common.jsontext import dump
from chatlm.common.messages.requests import (
    DRAFT_SOURCES, Accepted, CallApproved, CallEnded, Delta, Finished, Piece, PromptProgress, RoundEnded,
    ToolsListed, Usage)
from chatlm.common.text.answer_decoder import CallCounter, answer_decoder
from chatlm.front.api.errors import openai_error

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Event, TokenLogprob
    from chatlm.common.messages.tool_rounds import PlannedTool
    from chatlm.common.text.reader import StreamDecoder
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.api.citations import Citations


SYSTEM_FINGERPRINT = f"chat_server-{__version__}"


def frame(value) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def is_plain_text(piece: Piece) -> bool:
    """Is a piece nothing but text, as most are?"""
    return len(piece.deltas) == 1 and piece.deltas[0].kind == "text" and not piece.logprobs


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
    """A part of an answer: text, reasoning, a call of a function, or what the server's own calls of tools
    make: `mcp`, such a call; `own`, one that has an item of its own; `approval`, one that the client is asked
    about; `list`, a server's tools."""

    def __init__(self, kind: str, index: int, name: str):
        self.kind = kind
        self.index = index
        self.name = name
        self.id = secrets.token_hex(12)   # see Encoder.derive_ids
        self.texts: list[str] = []
        self.calculator: list[dict] = []  # calls of the calculator in its text
        self.characters = 0               # of its text so far
        self.frame = b""                  # the beginning of an event with more of its text
        self.is_closed = False            # True: nothing can be added
        # of what the server's own calls make
        self.tool: PlannedTool | None = None    # what is called
        self.result: CallEnded | None = None    # of a call; None: it has none yet
        self.listed: ToolsListed | None = None  # of a list
        self.approval_id = ""                   # of the approval request that the call was approved by
        self.citations: Citations | None = None  # in a text; None: nothing can be cited

    @property
    def text(self) -> str:
        return "".join(self.texts)


def usage_body(usage: Usage) -> dict[str, int]:
    """The counts that the native API and the access log show."""
    return {name: getattr(usage, name)
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")}


class Choice:
    """What an encoder knows of one choice of an answer: its end, its blocks (OpenAI's streams keep only
    calls) and more for OpenAI's APIs."""

    def __init__(self, index: int, tokenizer: Tokenizer, skips_specials: bool = True):
        self.index = index
        self.done: Finished = None  # pyright: ignore[reportAttributeAccessIssue]  until it has ended
        self.blocks: list[AnswerBlock] = []
        self.origin = ""              # the ids of its blocks are derived from this; "": they are random
        # for OpenAI's APIs
        self.tokenizer = tokenizer
        self.skips_specials = skips_specials
        self.held: tuple[TokenLogprob, ...] = ()  # log-probabilities of tokens that have no text yet
        self.held_ids: tuple[int, ...] = ()       # ids of such tokens
        self.echoed = False           # has the prompt been put before its text?
        self.offset = 0               # characters of its text so far, for text_offset
        self.counter = CallCounter()  # counts the calculator's calls in its text
        self.around_text: list[bytes] = []  # a chunk with text alone, before and after that text
        # the same, for an answer that is sent whole
        self.token_ids: list[int] = []
        self.logprobs: dict[str, list[bytes]] = {}  # in JSON
        self.prompt_logprobs: list[bytes] = []      # in JSON
        self.calculator: list[dict] = []

    @cached_property
    def decoder(self) -> StreamDecoder:
        """Decodes tokens for text_offset and for an echoed prompt. Only made if one of these is needed."""
        return answer_decoder(self.tokenizer, None, self.skips_specials)

    def block(self, delta: Delta) -> AnswerBlock:
        """The block that a delta belongs to: the last one or, if its kind is another or a call begins, a new
        one."""
        kind = "text" if delta.kind == "calculator" else delta.kind
        last = self.blocks[-1] if self.blocks else None
        if delta.name or last is None or last.kind != kind or last.is_closed:
            block = AnswerBlock(kind, len(self.blocks), delta.name)
            if self.origin:
                block.id = hashlib.sha256(f"{self.origin}/{block.index}".encode()).hexdigest()[:24]
            self.blocks.append(block)
        return self.blocks[-1]

    def text(self, kind: str) -> str:
        return "".join(block.text for block in self.blocks if block.kind == kind)

    @property
    def calls(self) -> list[AnswerBlock]:
        return [block for block in self.blocks if block.kind == "call"]

    def encoded_logprobs(self, beside: Mapping) -> Iterator[bytes]:
        """The `logprobs` member of an object, with the fields of `beside`; nothing if there are none."""
        separator = b', "logprobs": ' + dump(beside)[:-1] + b", " * bool(beside)
        for name, parts in self.logprobs.items():
            yield separator + dump(name) + b": [" + b", ".join(filter(None, parts))
            separator = b"], "
        if self.logprobs:
            yield b"]}"

    def encoded_prompt(self) -> Iterator[bytes]:
        """The `prompt_logprobs` member of an object, if there are any."""
        if self.prompt_logprobs:
            yield b', "prompt_logprobs": [' + b", ".join(filter(None, self.prompt_logprobs)) + b"]"


PROGRESS_FIELDS = "queue_position", "prompt_tokens", "prompt_tokens_done"


class Encoder:
    """Turns the events of an answer into the bytes that its API sends: with `encode` event by event, or with
    `collect` and `completion` as one body."""

    ping = b": ping\n\n"
    content_type = "text/event-stream; charset=utf-8"
    repeated_bytes = 0

    def __init__(self, parsed: ParsedBody, model: str, tokenizer: Tokenizer | None = None):
        self.parsed = parsed
        self.model = model
        self.request = parsed.request
        self.tokenizer: Tokenizer = tokenizer  # pyright: ignore[reportAttributeAccessIssue]  who needs it has it
        self.repeated_bytes = len(parsed.repeated)
        skips = self.request.params.skip_special_tokens
        count = (len(self.request.prompts) or 1) * self.request.n
        self.choices = [Choice(index, self.tokenizer, skips) for index in range(count)]
        if self.request.low_priority:  # it may be a line of a batch that another server has answered before
            self.derive_ids()

    def derive_ids(self):
        """Derive the ids of calls and items from the request's id, so that its answer is always the same."""
        for choice in self.choices:
            choice.origin = f"{self.request.id}/{choice.index}"

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

    def encode(self, event: Event) -> bytes:
        """The frames of a stream for an event; b"" for none."""
        raise NotImplementedError

    def collect(self, event: Any) -> int:
        """Keep an event of an answer that is sent whole; returns its size in bytes."""
        raise NotImplementedError

    def completion(self) -> Iterator[bytes]:
        """The whole answer, in parts, after its last event was collected."""
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
        """The tokens of all choices. A prompt counts once, each answer to it separately.

        Raises EngineFailure if a choice has not ended."""
        ends = [choice.done for choice in self.choices]
        if None in ends:
            raise EngineFailure("the answer ended early")
        prompts = sum((done.usage for done in ends[::self.request.n]), Usage())
        return replace(sum((done.usage for done in ends), Usage()),
                       prompt_tokens=prompts.prompt_tokens, cached_tokens=prompts.cached_tokens)


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
        plan = self.parsed.plan
        self.tools = {tool.name: tool for tool in plan.tools} if plan else {}  # that the server calls
        self.called: list[AnswerBlock] = []  # calls of these, in the order of their numbers

    @property
    def blocks(self) -> list[AnswerBlock]:
        return self.choices[0].blocks

    def encode(self, event: Event) -> bytes:
        match event:
            case Piece():
                return b"".join(map(self._add, event.deltas))
            case Finished():
                self.choices[0].done = event
                # clients expect at least one part
                first = b"" if any(block.kind != "list" for block in self.blocks) else self._add(
                    Delta("text", ""))
                return first + self._close_last() + self.end()
            case RoundEnded():
                return self._close_last()
            case CallApproved():
                return self._add_approved(event)
            case CallEnded():
                block = self.called[event.number]
                block.result = event
                return self.end_call(block)
            case ToolsListed():
                frames = self._close_last()
                block = self.choices[0].block(Delta("list", "", event.label))
                block.listed = event
                block.is_closed = True
                return frames + self.list_tools(block)
        return b""

    def _add(self, delta: Delta) -> bytes:
        """Add a delta to its block, after ending the block before it if that is another one."""
        before = self.blocks[-1] if self.blocks else None
        if delta.kind == "call":
            delta = delta._replace(kind=self.kind_of_call(delta, before))
        block = self.choices[0].block(delta)
        frames = b""
        if block is not before:
            frames = self._close(before) + self._open(block)
        if not delta.text:
            return frames
        if delta.kind == "calculator":
            return frames + self._calculate(block, delta)
        block.texts.append(delta.text)
        block.characters += len(delta.text)
        return frames + self.grow_block(block, delta.text)

    def kind_of_call(self, delta: Delta, before: AnswerBlock | None) -> str:
        """Whether the server makes a call, asks its client about it, or leaves it to the client."""
        if not delta.name:
            return before.kind if before else delta.kind
        tool = self.tools.get(delta.name)
        if tool is None:
            return "call"
        return "approval" if tool.asks else self._kind_of_own(tool)

    def _kind_of_own(self, tool: PlannedTool) -> str:
        return "own" if tool.item and self.has_own_items else "mcp"

    def _open(self, block: AnswerBlock) -> bytes:
        if block.kind in ("mcp", "own", "approval"):
            block.tool = self.tools[block.name]
            self.called.append(block)
        return self.open_block(block)

    def _close(self, block: AnswerBlock | None) -> bytes:
        if block is None or block.is_closed:
            return b""
        block.is_closed = True
        return self.close_block(block)

    def _close_last(self) -> bytes:
        return self._close(self.blocks[-1] if self.blocks else None)

    def _add_approved(self, call: CallApproved) -> bytes:
        """A call that the model has not made, whole."""
        frames = self._close_last()
        block = self.choices[0].block(Delta(self._kind_of_own(self.tools[call.name]), "", call.name))
        block.approval_id = call.approval_id
        block.texts.append(call.arguments)
        return frames + self._open(block) + self.grow_block(block, call.arguments) + self._close(block)

    def start_in(self, block: AnswerBlock) -> int:
        """Where a call of the calculator stands: after how many characters of the text that clients see as
        one. That is the block's text, unless a subclass says otherwise."""
        return block.characters

    def _calculate(self, block: AnswerBlock, delta: Delta) -> bytes:
        call = {"start": self.start_in(block), **json.loads(delta.text)}
        block.calculator.append(call)
        return self.grow_block(block, "", {"index": len(block.calculator) - 1, **call})

    def collect(self, event: Event) -> int:
        self.encode(event)
        match event:
            case Piece():
                return 100 + sum(len(delta.text) for delta in event.deltas)
            case CallEnded():
                return 100 + 2 * len(event.text)  # its item may have it too
            case ToolsListed():
                return len(dump(event.tools))
        return 0

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
