"""The encoder of Ollama's chat and generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.jsontext import dump
from chatlm.common.log import utc
from chatlm.common.messages.requests import Finished, Piece
from chatlm.front.api.encode import BlockEncoder, calculator_member, parsed_arguments
from chatlm.front.api.errors import ollama_error
from chatlm.front.api.logprobs import entries

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.requests import TokenLogprob
    from chatlm.front.api.encode import AnswerBlock


class OllamaEncoder(BlockEncoder):
    """Ollama's `/api/chat` and `/api/generate`: a JSON object on each line. A call comes whole."""

    # each line must be an object, so none is a ping
    ping = b""
    content_type = "application/x-ndjson"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.held: list[bytes] = []      # log-probabilities that no line has had yet, in JSON
        self.logprobs: list[bytes] = []  # all of them, for an answer that is sent whole

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
    def call_body(block: AnswerBlock) -> dict:
        return {"function": {"name": block.name, "arguments": parsed_arguments(block.text)}}

    def open_block(self, block: AnswerBlock) -> bytes:
        return b""

    def start_in(self, block: AnswerBlock) -> int:
        return sum(each.characters for each in self.blocks if each.kind == "text")

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
        return self.line(self.members(calls=[self.call_body(block)]), self.take_held())

    def ending(self) -> dict:
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
        return self.line(self.members(), self.take_held(), **self.ending())

    def collect(self, event: Piece | Finished) -> int:
        before = len(self.logprobs)
        size = super().collect(event)
        return size + sum(map(len, self.logprobs[before:]))

    def completion(self) -> Iterator[bytes]:
        choice = self.choices[0]
        members = self.members(choice.text("text"), choice.text("reasoning"),
                               [self.call_body(block) for block in choice.calls],
                               [call for block in choice.blocks for call in block.calculator])
        yield self.line(members, self.logprobs, **self.ending())

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return dump(ollama_error(error)) + b"\n"

    def without_work(self) -> bytes:
        """Without a question, Ollama only loads the model."""
        return self.line(self.members(), done=True, **self.parsed.details) if (
            "done_reason" in self.parsed.details) else b""
