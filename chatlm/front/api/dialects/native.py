"""nanochat's API: a chat within limits, streamed. The page uses it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

from chatlm.common.config import DEFAULT_MAX_TOKENS, LIMITS
from chatlm.common.jsontext import dump
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import SAMPLING_FLAGS, Piece
from chatlm.common.text.calculations import calculations_of, text_in
from chatlm.front.admission.prompts import turn_starts
from chatlm.front.api.dialect import Dialect, Form
from chatlm.front.api.encode import Encoder, frame, timings_body, usage_body
from chatlm.front.api.field_types import INTEGER, NATIVE_MESSAGES, NATIVE_ROLES, TEXT
from chatlm.front.api.fields import Field, within_limit
from chatlm.front.api.ignored import idle_variables
from chatlm.front.api.message_readers import (
    SentMessage, chat_message, earlier_reasoning, sent_messages, template_options)
from chatlm.front.api.readers import make_request, parse_answer
from chatlm.front.api.tables import COMMON_FIELDS, PREFIX, SAMPLED, TEMPLATE_OPTIONS

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Accepted, Delta, Message
    from chatlm.front.api.dialect import Terms


NATIVE_FIELDS = (
    Field("messages", NATIVE_MESSAGES, "the conversation", required=True),
    Field("max_tokens", INTEGER, "most tokens of the answer", *LIMITS.max_tokens, clamp=True),
    *(field._replace(low=-math.inf, high=math.inf) if name == "seed" else
      field._replace(**dict(zip(("low", "high"), getattr(LIMITS, name, ()))), clamp=True)
      for name, field in SAMPLED.items() if name in SAMPLING_FLAGS),
    *TEMPLATE_OPTIONS, PREFIX, *COMMON_FIELDS,
)


def read_native(body: dict, terms: Terms) -> ParsedBody:
    known = terms.known
    values = parse_answer(body, NATIVE_FIELDS, known)
    settings = known.settings
    messages, dropped = native_messages(values["messages"], values.get("truncate", False))
    return ParsedBody(kind="native", request=make_request(
        values, settings, messages=messages, dropped_messages=dropped,
        template_options=template_options(values),
        max_tokens=values.get("max_tokens", settings.max_tokens or DEFAULT_MAX_TOKENS)))


def native_messages(messages: list, truncate: bool = False) -> tuple[tuple[Message, ...], int]:
    """Messages within the native API's limits, and how many of the oldest were dropped to fit."""
    most = LIMITS.truncated_messages if truncate else LIMITS.messages
    within_limit("messages", len(messages), most, "messages")
    sent = list(sent_messages(messages, NATIVE_ROLES))
    newest = newest_turns(sent) if truncate else sent
    within_limit("messages", len(newest), LIMITS.messages, "messages")
    parsed = []
    for name, role, fields, _ in newest:
        content = fields.get("content")
        if not isinstance(content, list):
            content = Field(f"{name}.content", TEXT, "").read(content)
        more = earlier_reasoning(role, fields, name)
        message = chat_message(role, {**fields, "content": content}, more, name)
        if role != "assistant":
            within_limit(f"characters in {name}", len(message.content), LIMITS.message_characters,
                         f"{name}.content")
        parsed.append(message)
    size = sum(map(characters_in, parsed))
    within_limit("characters in all messages", size, LIMITS.total_characters, "messages")
    return tuple(parsed), len(sent) - len(newest)


def characters_in(message: Message) -> int:
    """How many characters of a message the model reads: its text, its reasoning and its calculations."""
    reasoning = (message.more or {}).get("reasoning_content", "")
    return len(message.content) + len(reasoning) + len(text_in(calculations_of(message)))


def newest_turns(sent: list[SentMessage]) -> list[SentMessage]:
    """The system messages, the last turn, and as many turns before it as native_messages allows."""
    def size(message: SentMessage) -> float:
        content = message.fields.get("content")
        length = len(content) if isinstance(content, str) else 0
        limited = message.role not in ("assistant", "system")
        return math.inf if limited and length > LIMITS.message_characters else length

    fixed = [size(message) for message in sent if message.role == "system"]
    count = len(fixed)
    characters = sum(fixed)
    first = len(sent)
    for start in reversed(turn_starts([message.role for message in sent])):
        turn = [size(message) for message in sent[start:first] if message.role != "system"]
        count += len(turn)
        characters += sum(turn)
        if first < len(sent) and (count > LIMITS.messages or characters > LIMITS.total_characters):
            break
        first = start
    return [message for index, message in enumerate(sent) if index >= first or message.role == "system"]


class NativeEncoder(Encoder):
    """Turns events into frames of the native API."""

    MEMBERS = {"reasoning": "reasoning", "text": "token"}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calculations = iter(self.state.choices[0].calculations)

    @classmethod
    def members(cls, delta: Delta, calculations: Iterator[dict]) -> dict:
        """The members of a delta's frame; {}: it has no frame. Old clients read only `token`. calculations:
        those of the state whose deltas had no frame yet; more are added to it as they come."""
        if delta.kind == "calculator":
            return {"calculator": next(calculations)}
        return {cls.MEMBERS[delta.kind]: delta.text} if delta.kind in cls.MEMBERS else {}

    def start(self, accepted: Accepted) -> bytes:
        """What stands beside the answer comes first."""
        return frame(self.parsed.beside) if self.parsed.beside else b""

    def encode(self, event: Any) -> bytes:
        grown = self.state.grown_part
        if grown and grown.kind == "text":
            return b'data: {"token": %b, "gpu": %d}\n\n' % (dump(event.deltas[0].text), event.gpu)
        if isinstance(event, Piece):
            frames = [self.members(delta, self.calculations) for delta in event.deltas]
            return b"".join([frame({**members, "gpu": event.gpu}) for members in frames if members])
        return frame({"done": True, "finish_reason": event.reason, "stop_reason": event.stop_reason,
                      "gpu": event.gpu, "usage": usage_body(self.usage()), "timings": timings_body(event),
                      "seed": self.request.params.sampling.seed})


DIALECT = Dialect({"/chat/completions": Form(
    NATIVE_FIELDS, read_native, NativeEncoder, idle=idle_variables)})
