"""Vectors of texts, rankings of documents and scores of pairs, as OpenAI, Ollama, Text Embeddings Inference
(TEI), Cohere, Jina, vLLM and llama-server have them: what needs no answer in words."""

from __future__ import annotations

import base64
import math
import operator
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from functools import lru_cache, partial
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import Overloaded, RequestError, bad_value, invalid, shown
from chatlm.common.jsontext import dump, is_text
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import AnswerParams, Embedding, Request, Retrieval
from chatlm.front.admission.retrieval_prompts import task_for
from chatlm.front.api.dialect import Dialect, Form
from chatlm.front.api.encode import Encoder
from chatlm.front.api.field_types import INPUTS, INTEGER, SWITCH, TEXT
from chatlm.front.api.fields import (
    A_TEXT, Field, FieldType, as_list, as_prompts, list_schema, object_schema, parse_fields, within_limit)
from chatlm.front.api.tables import LOW, MODEL

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known
    from chatlm.common.messages.requests import Embedder, Finished
    from chatlm.front.api.dialect import Terms


# when fields have no effect

def without_tei(parsed: ParsedBody, known: Known) -> bool:
    """The field is one of Text Embeddings Inference, and the request is not in its form."""
    return parsed.kind in ("rerank", "llama rerank")


def with_tei(parsed: ParsedBody, known: Known) -> bool:
    return parsed.kind == "tei rerank"


def for_cosines(parsed: ParsedBody, known: Known) -> bool:
    """The scores are cosines of vectors, which no instruction changes."""
    return parsed.kind == "cosines"


def without_a_prompt(parsed: ParsedBody, known: Known) -> bool:
    """The model has no prompt for this type of input."""
    retrieval = parsed.request.retrieval
    return retrieval is not None and not retrieval.prompt


# fields

DIMENSIONS = Field("dimensions", INTEGER, "numbers of each vector, where the model was trained for fewer", 1,
                   math.inf)
PROMPT_NAME = Field("prompt_name", TEXT, "which prompt of the model goes before each text (see /v1/models)")
INPUT_TYPE = Field("input_type", TEXT, "query, document or a prompt's name: which prompt goes before each "
                                       "text, if the model has it", idle={"": without_a_prompt})
POOLING = Field("pooling", FieldType('"mean" or "last"', {"enum": ["mean", "last"]}),
                "for a chat model: the mean over an input's tokens (the default), or its last token")
CUT = Field("truncate", SWITCH, "an input longer than the context is cut at its end (default); false: it is "
                                "refused", means="cut")
EMBEDDING_FIELDS = (
    Field("input", INPUTS, "text, token ids, or a list of these", required=True),
    MODEL,
    Field("encoding_format", FieldType('"float" or "base64"', {"enum": ["float", "base64"]}),
          "numbers (the default), or float32, little-endian, in base64"),
    POOLING, LOW, DIMENSIONS, PROMPT_NAME, INPUT_TYPE,
    Field("embd_normalize", FieldType("2 or -1", {"enum": [2, -1]}, lambda value: value == 2),
          "2: vectors have the length 1 (the default); -1: they are not scaled", means="normalize"),
    Field("truncate_prompt_tokens", FieldType("a number of tokens, at least 1, or -1",
                                              {"anyOf": [{"enum": [-1]}, {"type": "integer", "minimum": 1}]}),
          "an input with more tokens is cut at its end; -1: at the context's. Absent: it is refused if it "
          "does not fit"),
)
OLLAMA_EMBED_FIELDS = (
    Field("input", INPUTS._replace(schema={"anyOf": [
        *INPUTS.schema["anyOf"], {"type": "array", "maxItems": 0}]}),
          "text, or a list of texts; an empty list gives no vectors", required=True),
    MODEL, POOLING, LOW, DIMENSIONS, CUT)
OLLAMA_EMBEDDINGS_FIELDS = (  # of the older route
    Field("prompt", TEXT._replace(convert=as_prompts), "a text; one longer than the context is cut at its "
          "end", required=True, means="input"),
    MODEL, POOLING)
TEI_EMBED_FIELDS = (  # Text Embeddings Inference
    Field("inputs", INPUTS, "text, token ids, or a list of these", required=True, means="input"),
    MODEL, DIMENSIONS, PROMPT_NAME,
    Field("normalize", SWITCH, "vectors have the length 1 (the default)"),
    CUT)

SOME_TEXTS = {"minItems": 1, "maxItems": LIMITS.embeddings}
TEXTS = FieldType(f"a list of 1 to {LIMITS.embeddings:,} strings", list_schema(A_TEXT, **SOME_TEXTS),
                  lambda value: tuple(as_list(value)))
DOCUMENTS = FieldType(
    f'a list of 1 to {LIMITS.embeddings:,} strings or objects with a string "text"',
    list_schema({"anyOf": [A_TEXT, object_schema(["text"], text=A_TEXT)]}, **SOME_TEXTS),
    lambda value: tuple(as_list([each if is_text(each) else each["text"] for each in value])))
TEXT_OR_TEXTS = FieldType(f"a string or {TEXTS.allowed}", {"anyOf": [A_TEXT, TEXTS.schema]}, TEXTS.convert)
INSTRUCTION = Field("instruction", TEXT, "what makes a document right for its query, if a model reads it",
                    idle={"": for_cosines})
RAW = Field("use_activation", SWITCH, "false: raw scores, instead of those from 0 to 1")
RERANK_FIELDS = (
    Field("query", TEXT, "what the documents are compared with", required=True),
    Field("documents", DOCUMENTS, "texts, or objects with a `text`"),
    Field("texts", TEXTS, "as TEI calls them; the answer then has TEI's form"),
    MODEL,
    Field("top_n", INTEGER, "return only this many of the best", 1, math.inf),
    Field("return_documents", SWITCH, "put each document beside its score", idle={"": with_tei}),
    Field("max_tokens_per_doc", INTEGER, "read only the start of each document", 1, math.inf),
    RAW, INSTRUCTION, LOW,
    Field("raw_scores", SWITCH, "with `texts`: scores that may be below 0 and above 1",
          idle={"": without_tei}),
    Field("return_text", SWITCH, "with `texts`: put each text beside its score", idle={"": without_tei}),
    Field("truncate", SWITCH, "with `texts`: one that is too long is cut at its end (default); false: it is "
          "refused", idle={"": without_tei}),
)
SCORE_FIELDS = (
    Field("text_1", TEXT_OR_TEXTS, "a text, or as many as text_2 has"),
    Field("text_2", TEXT_OR_TEXTS, "a text, or several: each makes a pair with text_1"),
    Field("queries", TEXT_OR_TEXTS, "the same as text_1", means="text_1"),
    Field("documents", TEXT_OR_TEXTS, "the same as text_2", means="text_2"),
    MODEL, RAW, INSTRUCTION, LOW,
)


# readers

EMBEDDING_BODIES: dict[str, tuple[Field, ...]] = {  # by the kind of answer
    "embeddings": EMBEDDING_FIELDS, "ollama embed": OLLAMA_EMBED_FIELDS,
    "ollama embeddings": OLLAMA_EMBEDDINGS_FIELDS, "tei embed": TEI_EMBED_FIELDS}
INPUT_TYPES = {  # a client's name for a kind of input -> the names that models have for its prompt
    "query": ("query", "search_query"), "search_query": ("query", "search_query"),
    **dict.fromkeys(("document", "passage", "search_document"), ("document", "passage", "search_document"))}


def retrieval_request(values: Mapping, texts: Seq[Any], params: AnswerParams,
                      retrieval: Retrieval) -> Request:
    """A request for vectors or scores of these texts."""
    return Request(params=params, low_priority=values.get("priority", False), prompts=tuple(texts),
                   truncate=retrieval.cut, retrieval=retrieval)


def read_embedding_body(kind: str, body: dict, terms: Terms) -> ParsedBody:
    """A body that asks for vectors. api: one of EMBEDDING_BODIES."""
    values = parse_fields(body, EMBEDDING_BODIES[kind])
    known = terms.known
    embedder = known.embedder
    params = AnswerParams(pooling=chosen_pooling(values, embedder),
                          dimensions=chosen_dimensions(values, known),
                          normalized=values.get("normalize", kind != "ollama embeddings"))
    most = values.get("truncate_prompt_tokens")
    cut = values.get("cut", kind != "embeddings" or most is not None)
    retrieval = Retrieval(chosen_prompt(values, embedder), most=None if most == -1 else most, cut=cut)
    name = EMBEDDING_BODIES[kind][0].name
    inputs = values["input"]
    if kind.startswith("ollama") and inputs in ((), ("",)):
        return ParsedBody(retrieval_request(values, (), params, retrieval), stream=False, kind=kind,
                          details={"nothing": True})
    if not all(inputs):
        raise invalid(name, f"the {name} is empty" if len(inputs) == 1 else
                      f"{name}[{[*map(bool, inputs)].index(False)}] is empty")
    return ParsedBody(retrieval_request(values, inputs, params, retrieval), stream=False, kind=kind,
                      details={"encoding": values.get("encoding_format", "float")})


def chosen_pooling(values: Mapping, embedder: Embedder | None) -> str:
    """How vectors are made. Only chat models leave a choice; for other models this raises RequestError if the
    body names a pooling that is not theirs."""
    pooling = values.get("pooling")
    if embedder is None:
        return pooling or "mean"
    if pooling not in (None, embedder.pooling):
        raise bad_value("pooling", pooling, f"{shown(embedder.pooling)}, for which this model was trained")
    return embedder.pooling


def chosen_dimensions(values: Mapping, known: Known) -> int:
    """How many numbers a vector keeps; 0: all. Raises RequestError for a number that the model was not
    trained for; the error says the width of its vectors."""
    dimensions = values.get("dimensions")
    embedder = known.embedder
    if dimensions is None:
        return embedder.dimensions if embedder else 0
    if embedder is None:
        width = known.width
        why = "a chat model's vectors have the width of its hidden states"
    else:
        width = embedder.size
        why = "this model's vectors cannot be cut"
    if not width:
        raise Overloaded("the model is still loading", retry_after_s=2)
    least = embedder.least if embedder and embedder.least else width
    if not least <= dimensions <= width:
        allowed = f"from {least} to {width}" if least < width else f"left out or {width}: {why}"
        raise bad_value("dimensions", dimensions, allowed)
    return dimensions


def chosen_prompt(values: Mapping, embedder: Embedder | None) -> str:
    """The text that goes before each input. Raises RequestError if the body names a prompt that the model
    does not have."""
    prompts = dict(embedder.prompts if embedder else ())
    name = values.get("prompt_name")
    if name is not None:
        if name not in prompts:
            allowed = "left out: this model has no prompts"
            if prompts:
                allowed = f"one of {', '.join(map(shown, prompts))}"
            raise bad_value("prompt_name", name, allowed)
        return prompts[name]
    kind = values.get("input_type")
    if kind is not None:
        name = next((own for own in (kind, *INPUT_TYPES.get(kind, ())) if own in prompts), "")
        return prompts.get(name, "")
    return prompts.get(embedder.default_prompt, "") if embedder else ""


def read_rerank_body(kind: str, body: dict, terms: Terms) -> ParsedBody:
    """The rerank API of Jina, Cohere and vLLM, or llama-server's; with `texts` it is TEI's.

    kind: "rerank" or "llama rerank"."""
    values = parse_fields(body, RERANK_FIELDS)
    kind = "tei rerank" if "texts" in values else kind
    if ("texts" in values) == ("documents" in values):
        raise invalid("documents", "documents is missing" if "texts" not in values else
                      "documents and texts exclude each other: they are two APIs' names for the same")
    documents = values.get("documents", values.get("texts", ()))
    embedder = terms.known.embedder
    if not values["query"].strip():
        raise invalid("query", "the query is empty")
    cuts = values.get("truncate", True) if kind == "tei rerank" else kind == "rerank"
    retrieval = Retrieval(queries=(values["query"],), instruction=checked_instruction(values, embedder),
                          most=values.get("max_tokens_per_doc"), cut=cuts)
    # llama-server makes probabilities only for models whose query and document are one text
    usually_raw = kind == "llama rerank" and not (embedder and embedder.form)
    raw = values.get("raw_scores", not values.get("use_activation", not usually_raw))
    shows = values.get("return_text" if kind == "tei rerank" else "return_documents", False)
    details = {"top": values.get("top_n", len(documents)), "raw": raw,
               "documents": documents if shows else None}
    request = retrieval_request(values, documents, AnswerParams(pooling="rank"), retrieval)
    return ParsedBody(request, stream=False, kind=kind, details=details)


def checked_instruction(values: Mapping, embedder: Embedder | None) -> str | None:
    instruction = values.get("instruction")
    if instruction is not None and embedder and not embedder.instruction:
        raise bad_value("instruction", instruction, "left out: this model reads none")
    return instruction


def read_score_body(body: dict, terms: Terms) -> ParsedBody:
    """vLLM's scores of pairs. A reranker reads each pair; for an embedder they are cosines of vectors."""
    values = parse_fields(body, SCORE_FIELDS)
    embedder = terms.known.embedder
    if missing := [name for name in ("text_1", "text_2") if name not in values]:
        raise RequestError(f"{missing[0]} is missing", code="missing_required_parameter", param=missing[0])
    first = values["text_1"]
    second = values["text_2"]
    if len(first) not in (1, len(second)):
        raise invalid("text_1", f"text_1 has {len(first):,} texts and text_2 has {len(second):,}; it must "
                                "have one, or as many")
    for name, texts in ("text_1", first), ("text_2", second):
        if not all(text.strip() for text in texts):
            raise invalid(name, f"{name}[{[bool(text.strip()) for text in texts].index(False)}] is empty")
    pooling = embedder.pooling if embedder else "rank"
    if pooling == "rank":
        retrieval = Retrieval(queries=first, instruction=checked_instruction(values, embedder))
        sigmoid = embedder is None or embedder.sigmoid
        details = {"raw": not values.get("use_activation", True) or not sigmoid, "pairs": len(second)}
        request = retrieval_request(values, second, AnswerParams(pooling="rank"), retrieval)
        return ParsedBody(request, stream=False, kind="score", details=details)
    within_limit("texts in text_1 and text_2", len(first) + len(second), LIMITS.embeddings, "text_2")
    retrieval = Retrieval(chosen_prompt({}, embedder))
    params = AnswerParams(pooling=pooling, dimensions=embedder.dimensions if embedder else 0)
    request = retrieval_request(values, (*first, *second), params, retrieval)
    return ParsedBody(request, stream=False, kind="cosines", details={"pairs": len(second)})


# encoders

class EmbeddingsEncoder(Encoder):
    """`/v1/embeddings`, Ollama's `/api/embed` and `/api/embeddings`, TEI's `/embed`: each input's vector."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.vectors = [b""] * len(self.state.choices)

    def collect(self, event: Embedding | Finished) -> int:
        """Keep a vector as it will be sent; returns its size in bytes."""
        if not isinstance(event, Embedding):
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
        if self.parsed.kind == "ollama embed":
            return dump({"model": self.model, "embeddings": [], "total_duration": 0, "load_duration": 0,
                         "prompt_eval_count": 0})
        return dump({"embedding": []})

    def completion(self) -> Iterator[bytes]:
        count = self.usage().prompt_tokens
        kind = self.parsed.kind
        if kind == "ollama embeddings":
            yield b'{"embedding": %s}' % self.vectors[0]
            return
        if kind == "tei embed":
            yield b"[%s]" % b", ".join(self.vectors)
            return
        if kind == "ollama embed":
            seconds = max(choice.done.ttft_ms for choice in self.state.choices) / 1e3
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
        self.numbers: list[tuple[float, ...]] = [()] * len(self.state.choices)

    def collect(self, event: Embedding | Finished) -> int:
        """Keep a score, or a vector to compare; returns how many bytes it takes."""
        if not isinstance(event, Embedding):
            return 0
        numbers = decoded_vector(event)
        self.numbers[event.choice] = numbers
        return 100 + 32 * len(numbers)

    def completion(self) -> Iterator[bytes]:
        count = self.usage().prompt_tokens
        write = FORMS[self.parsed.kind]
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
        scores = self.cosines if self.parsed.kind == "cosines" else self.scores
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


# the dialect

def embeds(known: Known) -> str:
    return "embed"


def ranks(known: Known) -> str:
    return "rank"


def scores(known: Known) -> str:
    """A reranker reads pairs, and an embedder compares vectors."""
    return task_for(known.embedder.pooling) if known.embedder else "rank"


def embedding_form(kind: str) -> Form:
    return Form(EMBEDDING_BODIES[kind], partial(read_embedding_body, kind), EmbeddingsEncoder, embeds)


EMBEDDINGS = embedding_form("embeddings")
RERANK = Form(RERANK_FIELDS, partial(read_rerank_body, "rerank"), ScoresEncoder, ranks)
LLAMA_RERANK = Form(RERANK_FIELDS, partial(read_rerank_body, "llama rerank"), ScoresEncoder, ranks)
SCORE = Form(SCORE_FIELDS, read_score_body, ScoresEncoder, scores)
DIALECT = Dialect({
    "/v1/embeddings": EMBEDDINGS, "/api/v0/embeddings": EMBEDDINGS,
    "/embed": embedding_form("tei embed"),
    "/api/embed": embedding_form("ollama embed"), "/api/embeddings": embedding_form("ollama embeddings"),
    "/v1/rerank": RERANK, "/rerank": RERANK, "/v2/rerank": RERANK,
    "/reranking": LLAMA_RERANK, "/v1/reranking": LLAMA_RERANK,
    "/v1/score": SCORE, "/score": SCORE})
