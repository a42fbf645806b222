"""Answers as Responses, Messages and Ollama write them; the table of encoders."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.jsontext import dump
from chatlm.common.log import utc
from chatlm.common.messages.requests import Finished, Piece, Usage
from chatlm.front.api.encode import (
    BlockEncoder, Encoder, NativeEncoder, arguments_of, calculator_member, frame, timings_body)
from chatlm.front.api.encode_openai import ChatEncoder, CompletionEncoder, FunctionEncoder
from chatlm.front.api.encode_retrieval import RETRIEVAL_ENCODERS
from chatlm.front.api.errors import anthropic_error, ollama_error, response_error
from chatlm.front.api.infill import InfillEncoder
from chatlm.front.api.logprobs import TokensOfText, entries

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Accepted, TokenLogprob
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.api.encode import Block


class ResponsesEncoder(BlockEncoder):
    """`/v1/responses`: every block is an item. Unless it is a call, its text is the only part of the item."""

    # kind of block -> its item's type and id, the part's type, and what its events' names begin with
    ITEMS = {"text": ("message", "msg_", "output_text", "response.output_text"),
             "reasoning": ("reasoning", "rs_", "reasoning_text", "response.reasoning_text"),
             "call": ("function_call", "fc_", "", "response.function_call_arguments")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        sampling = self.request.params.sampling
        kept = self.parsed.details
        self.numbers = itertools.count()
        self.scored = self.request.params.logprobs is not None
        self.tokens = TokensOfText(self.tokenizer, self.request.params.skip_special_tokens)
        self.logprobs: dict[str, list[bytes]] = {}  # of the blocks with these ids, in JSON
        self.logprob_bytes = 0
        self.head = {"id": "resp_" + self.request.id, "object": "response", "created_at": int(time.time()),
                     "model": self.model, "error": None, "incomplete_details": None,
                     "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
                     "top_logprobs": self.request.params.logprobs or 0, "background": False,
                     "previous_response_id": kept.get("previous_response_id"),
                     "store": kept.get("store", False), "usage": None}
        if "conversation" in kept:
            self.head["conversation"] = {"id": kept["conversation"]}

    def event(self, event_type: str, **fields) -> bytes:
        return self.filled(super().event(event_type, sequence_number=next(self.numbers), **fields))

    def filled(self, data: bytes) -> bytes:
        """JSON with the log-probabilities, which are JSON already, where `place_of_logprobs` is. No text can
        spell that: its quotes are escaped."""
        for name, encoded in self.logprobs.items():
            data = data.replace(b'"logprobs": ["%s"]' % name.encode(),
                                b'"logprobs": [%s]' % b", ".join(encoded))
        return data

    def place_of_logprobs(self, block: Block) -> list[str]:
        return [block.id] if block.id in self.logprobs else []

    def scores(self, block: Block, text: str) -> bytes:
        """The log-probabilities of the tokens behind the next text of a block, kept for a whole answer and
        for the last events of a stream. Four of these repeat them before the client has read any, so where
        there are many, only the events that brought them have them."""
        tokens = self.tokens.take(text) if self.scored else ()
        if not tokens or block.kind != "text":
            return b""
        encoded = [*map(dump, entries(tokens, self.request.params, self.tokenizer))]
        self.logprob_bytes += sum(map(len, encoded))
        if self.parsed.stream and self.logprob_bytes > LIMITS.repeated_bytes:
            self.logprobs.clear()
        else:
            self.logprobs.setdefault(block.id, []).extend(encoded)
        return b", ".join(encoded)

    def encode(self, event: Piece | Finished) -> bytes:
        if self.scored and isinstance(event, Piece):
            self.tokens.add(event.logprobs)
        return super().encode(event)

    def collect(self, event: Piece | Finished) -> int:
        before = self.logprob_bytes
        return super().collect(event) + self.logprob_bytes - before

    def response(self, status: str, **fields) -> bytes:
        body = self.head | {"status": status, "output": [self.item(block) for block in self.blocks]} | fields
        return b"%s, %s}" % (self.filled(dump(body))[:-1], self.parsed.repeated)

    def response_event(self, moment: str, response: bytes) -> bytes:
        event = dump({"type": f"response.{moment}", "sequence_number": next(self.numbers)})[:-1]
        return b'event: response.%s\ndata: %s, "response": %s}\n\n' % (moment.encode(), event, response)

    def start(self, accepted: Accepted) -> bytes:
        return b"".join(self.response_event(moment, self.response("in_progress"))
                        for moment in ("created", "in_progress"))

    def item(self, block: Block, begins: bool = False) -> dict:
        kind, prefix, _, _ = self.ITEMS[block.kind]
        cut = block is self.blocks[-1] and (done := self.choices[0].done) and done.reason == "length"
        item = {"id": prefix + block.id, "type": kind,
                "status": "in_progress" if begins else "incomplete" if cut else "completed"}
        if block.kind == "call":
            return item | {"call_id": "call_" + block.id, "name": block.name, "arguments": block.text}
        more = {"role": "assistant"} if block.kind == "text" else {"summary": []}
        return item | more | {"content": [] if begins else [self.part(block, block.text)]}

    def part(self, block: Block, text: str) -> dict:
        more = ({"annotations": [], "logprobs": self.place_of_logprobs(block),
                 **calculator_member(block.calculator)} if block.kind == "text" else {})
        return {"type": self.ITEMS[block.kind][2], "text": text, **more}

    def place(self, block: Block) -> dict:
        part = {} if block.kind == "call" else {"content_index": 0}
        return {"item_id": self.ITEMS[block.kind][1] + block.id, "output_index": block.index, **part}

    def opened(self, block: Block) -> bytes:
        item = self.event("response.output_item.added", output_index=block.index, item=self.item(block, True))
        if block.kind == "call":
            return item
        part = self.part(block, "")
        return item + self.event("response.content_part.added", **self.place(block), part=part)

    def grown(self, block: Block, text: str, call: dict | None = None) -> bytes:
        if not block.frame:  # to dump each whole event takes 13 us, its text alone 3
            event = self.ITEMS[block.kind][3] + ".delta"
            fields = dump({"type": event, **self.place(block)})[:-1]
            block.frame = b"event: %s\ndata: %s, " % (event.encode(), fields)
        scores = self.scores(block, text) if text else b""
        logprobs = b'"logprobs": [%s], ' % scores if block.kind == "text" else b""
        more = b', "calculator": %s' % dump([call]) if call else b""
        return b'%s"sequence_number": %d, %s"delta": %s%s}\n\n' % (
            block.frame, next(self.numbers), logprobs, dump(text), more)

    def closed(self, block: Block) -> bytes:
        event = self.ITEMS[block.kind][3] + ".done"
        place = self.place(block)
        text = block.text
        if block.kind == "call":
            done = self.event(event, **place, name=block.name, arguments=text)
        else:
            logprobs = {"logprobs": self.place_of_logprobs(block)} if block.kind == "text" else {}
            done = self.event(event, **place, text=text, **logprobs) + self.event(
                "response.content_part.done", **place, part=self.part(block, text))
        return done + self.event("response.output_item.done", output_index=block.index, item=self.item(block))

    def whole(self) -> tuple[str, bytes]:
        """The response's status, and all of it."""
        count = self.usage()
        usage = {"input_tokens": count.prompt_tokens,
                 "input_tokens_details": {"cached_tokens": count.cached_tokens, "cache_write_tokens": 0},
                 "output_tokens": count.completion_tokens,
                 "output_tokens_details": {"reasoning_tokens": count.reasoning_tokens},
                 "total_tokens": count.prompt_tokens + count.completion_tokens}
        done = self.choices[0].done
        cut = {"incomplete_details": {"reason": "max_output_tokens"}} if done.reason == "length" else {}
        status = "incomplete" if cut else "completed"
        return status, self.response(status, usage=usage, timings=timings_body(done), **cut)

    def end(self) -> bytes:
        return self.response_event(*self.whole())

    def completion(self) -> Iterator[bytes]:
        yield self.whole()[1]

    def failed(self, error: ChatServerError) -> bytes:
        return self.response_event("failed", self.response("failed", error=response_error(error)))

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return b"event: error\n" + frame({"type": "error", **response_error(error), "param": error.param})


class MessagesEncoder(BlockEncoder):
    """`/v1/messages`, Anthropic's API."""

    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    # kind of block -> its type, its member that grows, and how the deltas call themselves and that member
    BLOCKS = {"text": ("text", "text", "text_delta", "text"),
              "reasoning": ("thinking", "thinking", "thinking_delta", "thinking"),
              "call": ("tool_use", "input", "input_json_delta", "partial_json")}
    REASONS = {"max_tokens": "max_tokens", "context_length": "model_context_window_exceeded"}

    def encode(self, event: Piece | Finished) -> bytes:
        """Without the thoughts, unless the request asks for thinking: who does not takes the first block
        of an answer for its text."""
        if isinstance(event, Piece) and not self.parsed.details.get("thinking"):
            event = event._replace(deltas=tuple(delta for delta in event.deltas if delta.kind != "reasoning"))
        return super().encode(event)

    def message(self, content: list[dict], usage: dict, stop: Mapping) -> dict:
        return {"id": "msg_" + self.request.id, "type": "message", "role": "assistant", "model": self.model,
                "content": content, "stop_reason": None, "stop_sequence": None, **stop, "usage": usage,
                "seed": self.request.params.sampling.seed}

    @staticmethod
    def usage_body(usage: Usage) -> dict:
        return {"input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens}

    def start(self, accepted: Accepted) -> bytes:
        usage = self.usage_body(Usage(accepted.prompt_tokens))
        return self.event("message_start", message=self.message([], usage, {}))

    def content(self, block: Block, grown) -> dict:
        kind, member, _, _ = self.BLOCKS[block.kind]
        call = {"id": "toolu_" + block.id, "name": block.name} if block.kind == "call" else {}
        # nobody checks the signature, but clients send back no thinking without one
        signature = {"signature": block.id} if block.kind == "reasoning" else {}
        return {"type": kind, **call, member: grown, **signature, **calculator_member(block.calculator)}

    def opened(self, block: Block) -> bytes:
        empty = self.content(block, {} if block.kind == "call" else "")
        return self.event("content_block_start", index=block.index, content_block=empty)

    def grown(self, block: Block, text: str, call: dict | None = None) -> bytes:
        _, _, kind, member = self.BLOCKS[block.kind]
        return self.event("content_block_delta", index=block.index, delta={
            "type": kind, member: text, **calculator_member([call] if call else [])})

    def closed(self, block: Block) -> bytes:
        return self.event("content_block_stop", index=block.index)

    def stop(self) -> dict:
        done = self.choices[0].done
        by_text = done.stop_reason in self.request.params.stop
        reason = ("stop_sequence" if by_text else self.REASONS.get(done.stop_reason or "", "max_tokens")
                  if done.reason == "length" else
                  "tool_use" if self.blocks[-1].kind == "call" else "end_turn")
        return {"stop_reason": reason, "stop_sequence": done.stop_reason if by_text else None}

    def body(self) -> dict:
        blocks = [self.content(block, arguments_of(block.text) if block.kind == "call" else block.text)
                  for block in self.blocks]
        return self.message(blocks, self.usage_body(self.usage()), self.stop())

    def end(self) -> bytes:
        return self.event("message_delta", delta=self.stop(), usage=self.usage_body(self.usage())) + \
            self.event("message_stop")

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return b"event: error\n" + frame(anthropic_error(error))


class OllamaEncoder(BlockEncoder):
    """Ollama's `/api/chat` and `/api/generate`: JSON objects, one on each line; a call comes whole."""

    # each line must be an object, so none is a ping
    ping = b""
    content_type = "application/x-ndjson"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.held: list[bytes] = []      # log-probabilities of tokens that no line has had, in JSON
        self.logprobs: list[bytes] = []  # of an answer that is sent whole

    def members(self, text: str = "", reasoning: str = "", calls: Seq[dict] = (),
                calculator: Seq[dict] = ()) -> dict:
        more = {**({"thinking": reasoning} if reasoning else {}), **calculator_member(calculator)}
        if self.parsed.api != "ollama chat":
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
        """Without the likeliest tokens, Ollama's have no list of them."""
        found = entries(logprobs, self.request.params, self.tokenizer)
        return [{name: value for name, value in entry.items() if value != []} for entry in found]

    def taken(self) -> list[bytes]:
        """The log-probabilities that the next line has."""
        held = self.held
        self.held = []
        if not self.parsed.stream:
            self.logprobs += held
        return held

    @staticmethod
    def call_body(block: Block) -> dict:
        return {"function": {"name": block.name, "arguments": arguments_of(block.text)}}

    def opened(self, block: Block) -> bytes:
        return b""

    def start_in(self, block: Block) -> int:
        return sum(each.characters for each in self.blocks if each.kind == "text")

    def grown(self, block: Block, text: str, call: dict | None = None) -> bytes:
        if block.kind == "call":
            return b""
        calls = [call] if call else []
        members = self.members(reasoning=text) if block.kind == "reasoning" else self.members(
            text, calculator=calls)
        return self.line(members, self.taken())

    def closed(self, block: Block) -> bytes:
        if block.kind != "call":
            return b""
        return self.line(self.members(calls=[self.call_body(block)]), self.taken())

    def ended(self) -> dict:
        done = self.choices[0].done
        usage = self.usage()
        decoding_s = (usage.completion_tokens - 1) / done.tokens_per_second if done.tokens_per_second else 0.0
        dropped = {"dropped_messages": done.dropped_messages} if done.dropped_messages else {}
        return {"done": True, "done_reason": done.reason, **dropped,
                "total_duration": int(done.ttft_ms * 1e6 + decoding_s * 1e9),
                "load_duration": 0, "prompt_eval_count": usage.prompt_tokens,
                "prompt_eval_duration": int((done.ttft_ms - done.queue_ms) * 1e6),
                "eval_count": usage.completion_tokens, "eval_duration": int(decoding_s * 1e9)}

    def end(self) -> bytes:
        return self.line(self.members(), self.taken(), **self.ended())

    def collect(self, event: Piece | Finished) -> int:
        before = len(self.logprobs)
        size = super().collect(event)
        return size + sum(map(len, self.logprobs[before:]))

    def completion(self) -> Iterator[bytes]:
        choice = self.choices[0]
        members = self.members(choice.text("text"), choice.text("reasoning"),
                               [self.call_body(block) for block in choice.calls],
                               [call for block in choice.blocks for call in block.calculator])
        yield self.line(members, self.logprobs, **self.ended())

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return dump(ollama_error(error)) + b"\n"

    def without_work(self) -> bytes:
        """Without a question, Ollama only loads the model."""
        return self.line(self.members(), done=True, **self.parsed.details) if (
            "done_reason" in self.parsed.details) else b""


def encoder_of(parsed: ParsedBody, model: str, tokenizer: Tokenizer | None) -> Encoder:
    """The encoder of an answer, which keeps no more of the request than it needs."""
    return ENCODERS[parsed.api](parsed.lasting(), model, tokenizer)


ENCODERS = {"native": NativeEncoder, "chat": ChatEncoder, "functions": FunctionEncoder,
            "completion": CompletionEncoder, "infill": InfillEncoder,
            "responses": ResponsesEncoder, "messages": MessagesEncoder,
            "ollama chat": OllamaEncoder, "ollama generate": OllamaEncoder,
            **RETRIEVAL_ENCODERS}
