"""The encoder of llama-server's /infill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence as Seq
from dataclasses import asdict
from typing import Any, TYPE_CHECKING

from chatlm.common.jsontext import dump
from chatlm.common.messages.requests import Piece
from chatlm.front.api.encode import frame
from chatlm.front.api.encode_openai import OpenAIEncoder

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Accepted, Finished
    from chatlm.front.api.encode import Choice


def chosen_fields(body: Mapping, paths: Seq[str]) -> dict[str, Any]:
    """The values at paths like `timings/prompt_n`, by path; without paths that lead nowhere."""
    chosen = {}
    for path in paths:
        value: Any = body
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            chosen[path] = value
    return chosen


class InfillEncoder(OpenAIEncoder):
    """`/infill`: objects with more of the text, then one with `"stop": true`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        # for an answer that is sent whole
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.probabilities: list[dict] = []
        # for all answers
        self.prompt_tokens = 0
        self.predicted = 0
        self.has_new_line = False

    def start(self, accepted: Accepted) -> bytes:
        self.prompt_tokens = accepted.prompt_tokens
        return b""

    def framed(self, body: dict) -> bytes:
        return frame(body)

    def part(self, part: Piece) -> dict:
        probabilities = {"completion_probabilities": self.entries(part.logprobs)} if part.logprobs else {}
        return {"index": 0, "content": part.text, "tokens": part.tokens if self.parsed.token_ids else [],
                "stop": False, "id_slot": -1, "tokens_predicted": self.predicted,
                "tokens_evaluated": self.prompt_tokens, **probabilities}

    def receive(self, event: Piece | Finished) -> Piece:
        """Count an event; returns what to send of it."""
        part = self.take(self.choices[0], event)
        self.predicted += len(event.tokens) if isinstance(event, Piece) else 0
        self.has_new_line = self.has_new_line or "\n" in part.text
        return part

    def encode(self, event: Piece | Finished) -> bytes:
        choice = self.choices[0]
        part = self.receive(event)
        frames = frame(self.part(part)) if part.deltas or part.tokens or part.logprobs else b""
        if choice.done:
            frames += frame(self.final(choice))
        return frames

    def collect(self, event: Piece | Finished) -> int:
        part = self.receive(event)
        self.texts.append(part.text)
        self.tokens += part.tokens if self.parsed.token_ids else ()
        self.probabilities += self.entries(part.logprobs)
        return 100 + len(part.text) + 400 * len(part.logprobs)

    def completion(self) -> Iterator[bytes]:
        yield dump(self.final(self.choices[0], "".join(self.texts)))

    def final(self, choice: Choice, content: str = "") -> dict:
        done = choice.done
        usage = self.usage()
        request = self.request
        by_text = done.stop_reason in request.params.stop
        stop_type = "word" if by_text else "eos"
        if done.reason == "length":
            stop_type = "limit"
        sampling = asdict(request.params.sampling)
        sampling["repeat_penalty"] = sampling.pop("repetition_penalty")
        del sampling["choice"]
        body = {"index": 0, "content": content, "tokens": self.tokens, "id_slot": -1, "stop": True,
                "model": self.model, "tokens_predicted": usage.completion_tokens,
                "tokens_evaluated": usage.prompt_tokens,
                "generation_settings": sampling | {
                    "n_predict": -1 if request.max_tokens is None else request.max_tokens,
                    "stop": request.params.stop, "ignore_eos": request.params.ignore_eos},
                "has_new_line": self.has_new_line, "truncated": bool(done.dropped_messages),
                "stop_type": stop_type,
                "stopping_word": done.stop_reason if by_text else "",
                "tokens_cached": usage.cached_tokens, "timings": self.timings(done)}
        if self.probabilities:
            body["completion_probabilities"] = self.probabilities
        paths = self.parsed.details["response_fields"]
        return chosen_fields(body, paths) if paths else body

    def timings(self, done: Finished) -> dict:
        """llama-server's names for how long the prompt and the answer took."""
        usage = self.usage()
        computed = usage.prompt_tokens - usage.cached_tokens
        predicted = usage.completion_tokens
        prompt_ms = done.ttft_ms - done.queue_ms
        speed = done.tokens_per_second
        predicted_ms = (predicted - 1) / speed * 1e3 if speed else 0.0
        return {"cache_n": usage.cached_tokens, "prompt_n": computed, "prompt_ms": round(prompt_ms, 3),
                "prompt_per_token_ms": round(prompt_ms / max(computed, 1), 3),
                "prompt_per_second": round(computed / prompt_ms * 1e3, 3) if prompt_ms else 0.0,
                "predicted_n": predicted, "predicted_ms": round(predicted_ms, 3),
                "predicted_per_token_ms": round(predicted_ms / max(predicted, 1), 3),
                "predicted_per_second": round(speed or 0.0, 3),
                "draft_n": usage.drafted_tokens, "draft_n_accepted": usage.accepted_tokens}
