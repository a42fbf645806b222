"""Encoders of answers that are vectors of texts, rankings of documents or scores of pairs."""

from __future__ import annotations

import base64
import math
import operator
import struct
import time
from collections.abc import Callable, Iterator, Sequence as Seq
from functools import lru_cache
from typing import TYPE_CHECKING

from chatlm.common.jsontext import dump
from chatlm.common.messages.requests import Embedding
from chatlm.front.api.encode import Encoder

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Finished


class EmbeddingsEncoder(Encoder):
    """`/v1/embeddings`, Ollama's `/api/embed` and `/api/embeddings`, TEI's `/embed`: each input's vector."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.vectors = [b""] * len(self.choices)

    def collect(self, event: Embedding | Finished) -> int:
        """Keep a vector as it will be sent; returns its size in bytes."""
        if not isinstance(event, Embedding):
            self.choices[event.choice].done = event
            return 0
        vector = dump(event.vector)
        if self.parsed.details["encoding"] == "float":
            numbers = decoded_vector(event)
            vector = number_list(len(numbers)) % numbers
        self.vectors[event.choice] = vector
        return len(vector)

    def without_work(self) -> bytes:
        if "nothing" not in self.parsed.details:
            return b""
        if self.parsed.api == "ollama embed":
            return dump({"model": self.model, "embeddings": [], "total_duration": 0, "load_duration": 0,
                         "prompt_eval_count": 0})
        return dump({"embedding": []})

    def completion(self) -> Iterator[bytes]:
        count = self.usage().prompt_tokens
        api = self.parsed.api
        if api == "ollama embeddings":
            yield b'{"embedding": %s}' % self.vectors[0]
            return
        if api == "tei embed":
            yield b"[%s]" % b", ".join(self.vectors)
            return
        if api == "ollama embed":
            seconds = max(choice.done.ttft_ms for choice in self.choices) / 1e3
            name = "embeddings"
            form = b"%(vector)s"
            more = {"model": self.model, "total_duration": int(seconds * 1e9), "load_duration": 0,
                    "prompt_eval_count": count}
        else:
            name = "data"
            form = b'{"object": "embedding", "index": %(index)d, "embedding": %(vector)s}'
            more = {"object": "list", "model": self.model,
                    "usage": {"prompt_tokens": count, "total_tokens": count}}
        yield dump(more)[:-1] + b', "%s": [' % name.encode()
        for index, vector in enumerate(self.vectors):
            yield b", " * bool(index) + form % {b"index": index, b"vector": vector}
        yield b"]}"


def decoded_vector(event: Embedding) -> tuple[float, ...]:
    data = base64.b64decode(event.vector)
    return struct.unpack(f"<{len(data) // 4}f", data)


@lru_cache(maxsize=64)
def number_list(count: int) -> bytes:
    """The format of a list of so many numbers. Nine digits tell all float32 numbers apart."""
    return b"[%s]" % b",".join([b"%.9g"] * count)


class ScoresEncoder(Encoder):
    """`/v1/rerank` and `/v1/score` and their like: a score of each pair."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        # a score, or a vector, for each prompt
        self.numbers: list[tuple[float, ...]] = [()] * len(self.choices)

    def collect(self, event: Embedding | Finished) -> int:
        """Keep a score, or a vector to compare; returns how many bytes it takes."""
        if not isinstance(event, Embedding):
            self.choices[event.choice].done = event
            return 0
        numbers = decoded_vector(event)
        self.numbers[event.choice] = numbers
        return 100 + 32 * len(numbers)

    def completion(self) -> Iterator[bytes]:
        count = self.usage().prompt_tokens
        write = FORMS[self.parsed.api]
        yield dump(write(self, {"prompt_tokens": count, "total_tokens": count}))

    @property
    def raw(self) -> list[float]:
        """The logits of the pairs, in the order in which they were sent."""
        return [number for number, in self.numbers]

    @property
    def scores(self) -> list[float]:
        return self.raw if self.parsed.details["raw"] else list(map(sigmoid, self.raw))

    @property
    def cosines(self) -> list[float]:
        """The cosines of pairs. The vectors, of length 1, are first those of all first texts, then those of
        all second texts."""
        pairs = self.parsed.details["pairs"]
        first = self.numbers[:-pairs]
        second = self.numbers[-pairs:]
        first = first * pairs if len(first) == 1 else first
        return [math.fsum(map(operator.mul, a, b)) for a, b in zip(first, second)]

    def ranked(self, score: str, document: Callable[[str], dict]) -> list[dict]:
        """The best pairs, highest first; of equal ones the earlier comes first."""
        details = self.parsed.details
        scores = self.scores
        raw = self.raw
        best = sorted(range(len(scores)), key=lambda index: (-raw[index], index))[:details["top"]]
        texts: Seq[str] | None = details["documents"]
        return [{"index": index, score: scores[index], **(document(texts[index]) if texts else {})}
                for index in best]

    def rerank_body(self, usage: dict) -> dict:
        return {"id": "rerank-" + self.request.id, "object": "list", "model": self.model,
                "results": self.ranked("relevance_score", lambda text: {"document": {"text": text}}),
                "usage": usage, "meta": {"billed_units": {"search_units": 1}}}

    def tei_body(self, usage: dict) -> list[dict]:
        return self.ranked("score", lambda text: {"text": text})

    def score_body(self, usage: dict) -> dict:
        scores = self.cosines if self.parsed.api == "cosines" else self.scores
        return {"id": "score-" + self.request.id, "object": "list", "created": int(time.time()),
                "model": self.model, "usage": usage,
                "data": [{"index": index, "object": "score", "score": score}
                         for index, score in enumerate(scores)]}


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(min(score, 700)))


FORMS: dict[str, Callable[[ScoresEncoder, dict], dict | list[dict]]] = {
    "rerank": ScoresEncoder.rerank_body, "llama rerank": ScoresEncoder.rerank_body,
    "tei rerank": ScoresEncoder.tei_body, "score": ScoresEncoder.score_body,
    "cosines": ScoresEncoder.score_body}
