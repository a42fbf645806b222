"""Ollama's API: chats, texts to continue, and a model's name to describe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.errors import bad_value
from chatlm.common.jsontext import dump
from chatlm.common.log import utc
from chatlm.common.messages.requests import AnswerParams, Finished, Infill, Message, Piece
from chatlm.front.api import idle
from chatlm.front.api.dialect import Dialect, Form, TextForm
from chatlm.front.api.encode import BlockEncoder, calculator_member, parsed_arguments
from chatlm.front.api.errors import ollama_error
from chatlm.front.api.field_types import (
    EFFORT, INTEGER, LIST, OBJECT, OLLAMA_FORMAT, OPENAI_MESSAGES, OPENAI_ROLES, SWITCH, TEXT, TOOLS,
    thinking)
from chatlm.front.api.fields import Field, FieldType, functions_among, parse_fields
from chatlm.front.api.ignored import idle_fields
from chatlm.front.api.logprobs import entries
from chatlm.front.api.message_readers import SentMessage, chat_messages, message_from, sent_messages
from chatlm.front.api.readers import (
    openai_request, parse_answer, parse_openai_request, parsed_body, with_infill_ends, without_lone_top)
from chatlm.front.api.tables import MODEL, OLLAMA_NAMES, REPETITION, SAMPLED, STOPS

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import Known, ParsedBody
    from chatlm.common.messages.requests import TokenLogprob
    from chatlm.front.api.answer_state import Part
    from chatlm.front.api.dialect import Terms, TextTerms
    from chatlm.front.api.encode import AnswerBlock


# when fields have no effect

def in_a_continued_text(parsed: ParsedBody, known: Known) -> bool:
    """A text to continue has no conversation around it."""
    return bool(parsed.request.prompts)


def ollama_without_thinking(parsed: ParsedBody, known: Known) -> bool:
    return idle.without_thinking(parsed, known) or in_a_continued_text(parsed, known)


# fields

OLLAMA_OPTIONS = (
    *(field._replace(name=OLLAMA_NAMES[name], means=name) if name in OLLAMA_NAMES else field
      for name, field in SAMPLED.items()),
    STOPS, REPETITION,
    Field("num_predict", INTEGER._replace(convert=lambda value: int(value) if value > 0 else -1),
          "most tokens of the answer; -1 and -2 = up to the context", -2, math.inf, means="max_tokens"),
)
OLLAMA_FIELDS = (  # for both of Ollama's routes
    MODEL,
    Field("stream", SWITCH, "one JSON object per line (the default); false: one object"),
    Field("format", OLLAMA_FORMAT, '"json" or a JSON schema', means="response_format"),
    Field("think", FieldType(f"true, false, {EFFORT.allowed}",
                             {"anyOf": [{"enum": [True, False]}, *EFFORT.schema["anyOf"]]},
                             lambda value: thinking(value)),
          "whether, or how much, the model thinks, if its template supports that; a number: most tokens that "
          "it thinks", means="template_options", idle={"": ollama_without_thinking}),
    Field("logprobs", SWITCH, "log-probabilities of the answer's tokens"),
    Field("top_logprobs", INTEGER, "with `logprobs`: alternatives listed for each token", 0, 20,
          idle={"": idle.without_logprobs}),
    Field("options", OBJECT._replace(details={"properties": {
        field.name: field.described for field in OLLAMA_OPTIONS}}), "how to draw tokens, and when to stop"),
)
OLLAMA_CHAT_FIELDS = (
    Field("messages", OPENAI_MESSAGES._replace(details={}), "the conversation; without any, an empty answer"),
    Field("tools", TOOLS, "functions the model may call"),
    Field("truncate", SWITCH, "drop the oldest turns if not all fit (default); false: refused"),
    *OLLAMA_FIELDS)
OLLAMA_GENERATE_FIELDS = (
    Field("prompt", TEXT, "a question; without any, an empty answer"),
    Field("system", TEXT, "the system message", idle={"": in_a_continued_text}),
    Field("raw", SWITCH, "the prompt is a text to continue"),
    Field("suffix", TEXT, "the text after the answer, which then fills the gap between prompt and suffix"),
    Field("images", LIST, "picture files in base64, which come before the prompt"),
    *OLLAMA_FIELDS)
OLLAMA_SHOW_FIELDS = (Field("model", TEXT, "one of the served model's names"),
                      Field("name", TEXT, "the same, for older clients", means="model"))


# readers

def read_chat(body: dict, terms: Terms) -> ParsedBody:
    known = terms.known
    values = parse_answer(body, OLLAMA_CHAT_FIELDS, known)
    values.setdefault("truncate", True)
    sent = sent_messages(values["messages"], [*OPENAI_ROLES, "tool"]) if values.get("messages") else ()
    messages = chat_messages(map(from_ollama, sent), known.tool_format is not None)
    return ollama_body("ollama chat", values, known, messages=messages)


def from_ollama(message: SentMessage) -> SentMessage:
    """A message of Ollama's as one of Chat Completions."""
    fields = message.fields
    return message._replace(fields={
        "name": fields.get("tool_name"), "reasoning_content": fields.get("thinking"),
        "calculator": fields.get("calculator"),
        "content": with_images(fields.get("content"), fields.get("images")),
        "tool_calls": fields.get("tool_calls")})


def with_images(content, images):
    """Ollama's content as parts, if it has images, which come first; else as it is."""
    if not isinstance(images, list | None):
        raise bad_value("images", images, "a list of images in base64")
    return [*images, {"type": "text", "text": content or ""}] if images else content


def read_generate(body: dict, terms: Terms) -> ParsedBody:
    known = terms.known
    kind = "ollama generate"
    values = parse_answer(body, OLLAMA_GENERATE_FIELDS, known)
    prompt = values.get("prompt", "")
    suffix = values.get("suffix")
    if suffix:
        values = with_infill_ends(values, known, "suffix")
        return ollama_body(kind, values, known, prompts=(prompt,), infill=Infill((suffix,)))
    if prompt and (values.get("raw", False) or not known.chats):
        return ollama_body(kind, values, known, prompts=(prompt,))
    system = (Message("system", values["system"]),) if "system" in values else ()
    question = message_from("user", with_images(prompt, values.get("images")), {}, "images")
    messages = (*system, question) if prompt or question.pictures else ()
    return ollama_body(kind, values, known, messages=messages)


def ollama_body(kind: str, values: dict, known: Known, **source) -> ParsedBody:
    values = {"stream": True} | values | parse_fields(values.get("options", {}), OLLAMA_OPTIONS)
    values = without_lone_top(values)
    values["tools"], ignored = functions_among(values.get("tools", ()))
    if "prompts" in source:
        grammar, param = values.get("response_format", ("", ""))
        logprobs = values.get("top_logprobs", 0) if values.get("logprobs") else None
        params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=logprobs)
        request = openai_request(values, known.settings, params, **source)
    else:
        messages = source["messages"] or (Message("user", ""),)
        request = parse_openai_request(values, known.settings, known.tool_format, messages)
    nothing = {"done_reason": "load"} if source.get("messages") == () else None
    return parsed_body(kind, values, known, request, nothing, ignored)


async def read_show(body: dict, terms: TextTerms) -> bytes:
    """The model's name. A very long name is cut: its start is just as unknown."""
    return parse_fields(body, OLLAMA_SHOW_FIELDS).get("model", "")[:1000].encode()


def idle_options(body: Mapping, parsed: ParsedBody, known: Known) -> Iterator[str]:
    """Those of `options` that have no effect."""
    if isinstance(body.get("options"), dict):
        yield from idle_fields(body["options"], OLLAMA_OPTIONS, parsed, known, "options.")


# the encoder

class OllamaEncoder(BlockEncoder):
    """Ollama's `/api/chat` and `/api/generate`: a JSON object on each line. A call comes whole."""

    # each line must be an object, so none is a ping
    ping = b""
    content_type = "application/x-ndjson"
    frame_end = b"\n"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.held: list[bytes] = []      # log-probabilities that no line has had yet, in JSON
        self.logprobs: list[bytes] = []  # all of them, for an answer that is sent whole

    def members(self, text: str = "", reasoning: str = "", calls: Seq[dict] = (),
                calculator: Seq[dict] = ()) -> dict:
        more = {**({"thinking": reasoning} if reasoning else {}), **calculator_member(calculator)}
        if self.parsed.kind != "ollama chat":
            return {"response": text, **more}
        more |= {"tool_calls": calls} if calls else {}
        return {"message": {"role": "assistant", "content": text, **more}}

    def line(self, members: dict, logprobs: Seq[bytes] = (), **more) -> bytes:
        body = dump({"model": self.model, "created_at": utc(), **members, "done": False} | more)
        if logprobs:
            body = b'%s, "logprobs": [%s]}' % (body[:-1], b", ".join(logprobs))
        return body + b"\n"

    def encode(self, event: Piece | Finished) -> bytes:
        if isinstance(event, Piece):
            self.held += map(dump, self.entries(event.logprobs))
        elif event.stop_reason in self.request.params.stop:
            self.held = []  # those of the stop string, which is not part of the answer
        return super().encode(event)

    def entries(self, logprobs: Seq[TokenLogprob]) -> list[dict]:
        """OpenAI's entries without empty lists: if no likeliest tokens are asked for, Ollama has no list."""
        openai = entries(logprobs, self.request.params, self.tokenizer)
        return [{name: value for name, value in entry.items() if value != []} for entry in openai]

    def take_held(self) -> list[bytes]:
        """The log-probabilities for the next line."""
        held = self.held
        self.held = []
        if not self.parsed.stream:
            self.logprobs += held
        return held

    @staticmethod
    def call_body(call: Part) -> dict:
        return {"function": {"name": call.name, "arguments": parsed_arguments(call.text)}}

    def open_block(self, block: AnswerBlock) -> bytes:
        return b""

    def placed_calls(self, block: AnswerBlock, calls: Seq[dict]) -> Seq[dict]:
        return calls

    def grow_block(self, block: AnswerBlock, text: str, call: dict | None = None) -> bytes:
        if block.kind == "call":
            return b""
        calls = [call] if call else []
        members = self.members(reasoning=text) if block.kind == "reasoning" else self.members(
            text, calculator=calls)
        return self.line(members, self.take_held())

    def close_block(self, block: AnswerBlock) -> bytes:
        if block.kind != "call":
            return b""
        return self.line(self.members(calls=[self.call_body(block.part)]), self.take_held())

    def ending(self) -> dict:
        done = self.choice.done
        usage = self.usage()
        decoding_s = (usage.completion_tokens - 1) / done.tokens_per_second if done.tokens_per_second else 0.0
        dropped = {"dropped_messages": done.dropped_messages} if done.dropped_messages else {}
        return {"done": True, "done_reason": done.reason, **dropped,
                "total_duration": int(done.ttft_ms * 1e6 + decoding_s * 1e9),
                "load_duration": 0, "prompt_eval_count": usage.prompt_tokens,
                "prompt_eval_duration": int((done.ttft_ms - done.queue_ms) * 1e6),
                "eval_count": usage.completion_tokens, "eval_duration": int(decoding_s * 1e9)}

    def end(self) -> bytes:
        return self.line(self.members(), self.take_held(), **self.ending())

    def collect(self, event: Piece | Finished) -> int:
        size = super().collect(event)
        if self.request.params.logprobs is None:
            return size
        before = len(self.logprobs)
        self.encode(event)  # its lines say which log-probabilities are those of a stop string
        return size + sum(map(len, self.logprobs[before:]))

    def completion(self) -> Iterator[bytes]:
        choice = self.choice
        members = self.members(choice.text("text"), choice.text("reasoning"),
                               [*map(self.call_body, choice.calls)], choice.calculations)
        yield self.line(members, self.logprobs, **self.ending())

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return dump(ollama_error(error)) + b"\n"

    @staticmethod
    def numbered(number: int, frame: bytes) -> bytes:
        return frame

    def without_work(self) -> bytes:
        """Without a question, Ollama only loads the model."""
        return self.line(self.members(), done=True, **self.parsed.details) if (
            "done_reason" in self.parsed.details) else b""


DIALECT = Dialect({
    "/api/chat": Form(OLLAMA_CHAT_FIELDS, read_chat, OllamaEncoder, idle=idle_options),
    "/api/generate": Form(OLLAMA_GENERATE_FIELDS, read_generate, OllamaEncoder, idle=idle_options),
    "/api/show": TextForm(OLLAMA_SHOW_FIELDS, read_show)})
