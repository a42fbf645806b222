"""Readers of the bodies that ask for vectors of texts, for a ranking of documents, or for scores of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import Overloaded, RequestError, bad_value, invalid, shown
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import AnswerParams, Request, Retrieval
from chatlm.front.admission.retrieval_prompts import check_task, task_for
from chatlm.front.api.fields import parse_fields, within_limit
from chatlm.front.api.tables import (
    EMBEDDING_FIELDS, OLLAMA_EMBED_FIELDS, OLLAMA_EMBEDDINGS_FIELDS, RERANK_FIELDS, SCORE_FIELDS,
    TEI_EMBED_FIELDS)

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.common.messages.protocol import Known
    from chatlm.common.messages.requests import Embedder
    from chatlm.front.api.fields import Field


EMBEDDING_BODIES: dict[str, Seq[Field]] = {  # by the name of the encoder that answers
    "embeddings": EMBEDDING_FIELDS, "ollama embed": OLLAMA_EMBED_FIELDS,
    "ollama embeddings": OLLAMA_EMBEDDINGS_FIELDS, "tei embed": TEI_EMBED_FIELDS}
INPUT_TYPES = {  # what clients call the sort of an input -> the names that models have for its prompt
    "query": ("query", "search_query"), "search_query": ("query", "search_query"),
    **dict.fromkeys(("document", "passage", "search_document"), ("document", "passage", "search_document"))}


def asked_of(values: Mapping, texts: Seq[Any], params: AnswerParams, retrieval: Retrieval) -> Request:
    """A request for vectors or scores of these texts."""
    return Request(params=params, low_priority=values.get("priority", False), prompts=tuple(texts),
                   truncate=retrieval.cut, retrieval=retrieval)


def read_embedding_body(body: dict, known: Known, api: str = "embeddings") -> ParsedBody:
    """OpenAI's Embeddings API, or with another `api` one of Ollama's or TEI's."""
    values = parse_fields(body, EMBEDDING_BODIES[api])
    embedder = known.embedder
    params = AnswerParams(pooling=pooling_of(values, embedder), dimensions=dimensions_of(values, known),
                          normalized=values.get("normalize", api != "ollama embeddings"))
    retrieval = Retrieval(prompt_of(values, embedder), cut=values.get("cut", api != "embeddings"))
    name = EMBEDDING_BODIES[api][0].name
    inputs = values["input"]
    if api.startswith("ollama") and inputs in ((), ("",)):
        return ParsedBody(asked_of(values, (), params, retrieval), stream=False, api=api,
                          details={"nothing": True})
    if not all(inputs):
        raise invalid(name, f"the {name} is empty" if len(inputs) == 1 else
                      f"{name}[{[*map(bool, inputs)].index(False)}] is empty")
    return ParsedBody(asked_of(values, inputs, params, retrieval), stream=False, api=api,
                      details={"encoding": values.get("encoding_format", "float")})


def pooling_of(values: Mapping, embedder: Embedder | None) -> str:
    """How vectors are made; only chat models leave a choice. RequestError for another than the model's."""
    asked = values.get("pooling")
    if embedder is None:
        return asked or "mean"
    if asked not in (None, embedder.pooling):
        raise bad_value("pooling", asked, f"{shown(embedder.pooling)}, for which this model was trained")
    return embedder.pooling


def dimensions_of(values: Mapping, known: Known) -> int:
    """How many numbers a vector keeps; 0: all. RequestError for what the model was not trained for, with the
    width that its vectors have."""
    asked = values.get("dimensions")
    embedder = known.embedder
    if asked is None:
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
    if not least <= asked <= width:
        allowed = f"from {least} to {width}" if least < width else f"left out or {width}: {why}"
        raise bad_value("dimensions", asked, allowed)
    return asked


def prompt_of(values: Mapping, embedder: Embedder | None) -> str:
    """The text that goes before each input. RequestError for the name of one that the model does not have."""
    prompts = dict(embedder.prompts if embedder else ())
    name = values.get("prompt_name")
    if name is not None and name not in prompts:
        raise bad_value("prompt_name", name, f"one of {', '.join(map(shown, prompts))}" if prompts else
                        "left out: this model has no prompts")
    if name is None and (sort := values.get("input_type")) is not None:
        name = next((own for own in (sort, *INPUT_TYPES.get(sort, ())) if own in prompts), "")
    return prompts.get((embedder.default_prompt if embedder else "") if name is None else name, "")


def read_rerank_body(body: dict, known: Known, api: str = "rerank") -> ParsedBody:
    """The rerank API of Jina, Cohere and vLLM, or llama-server's; with `texts` TEI's on either route."""
    values = parse_fields(body, RERANK_FIELDS)
    api = "tei rerank" if "texts" in values else api
    if ("texts" in values) == ("documents" in values):
        raise invalid("documents", "documents is missing" if "texts" not in values else
                      "documents and texts exclude each other: they are two APIs' names for the same")
    documents = values.get("documents", values.get("texts", ()))
    embedder = known.embedder
    if not values["query"].strip():
        raise invalid("query", "the query is empty")
    cuts = values.get("truncate", True) if api == "tei rerank" else api == "rerank"
    retrieval = Retrieval(queries=(values["query"],), instruction=instruction_of(values, embedder),
                          most=values.get("max_tokens_per_doc"), cut=cuts)
    usual = api == "llama rerank" and not (embedder and embedder.form)  # it makes only these probabilities
    raw = values.get("raw_scores", not values.get("use_activation", not usual))
    shows = values.get("return_text" if api == "tei rerank" else "return_documents", False)
    details = {"top": values.get("top_n", len(documents)), "raw": raw,
               "documents": documents if shows else None}
    request = asked_of(values, documents, AnswerParams(pooling="rank"), retrieval)
    return ParsedBody(request, stream=False, api=api, details=details)


def instruction_of(values: Mapping, embedder: Embedder | None) -> str | None:
    instruction = values.get("instruction")
    if instruction is not None and embedder and not embedder.instruction:
        raise bad_value("instruction", instruction, "left out: this model reads none")
    return instruction


def read_score_body(body: dict, known: Known) -> ParsedBody:
    """vLLM's: scores of pairs. A reranker reads each pair; an embedder's are the cosines of vectors."""
    values = parse_fields(body, SCORE_FIELDS)
    embedder = known.embedder
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
        retrieval = Retrieval(queries=first, instruction=instruction_of(values, embedder))
        sigmoid = embedder is None or embedder.sigmoid
        details = {"raw": not values.get("use_activation", True) or not sigmoid, "pairs": len(second)}
        request = asked_of(values, second, AnswerParams(pooling="rank"), retrieval)
        return ParsedBody(request, stream=False, api="score", details=details)
    within_limit("texts in text_1 and text_2", len(first) + len(second), LIMITS.embeddings, "text_2")
    retrieval = Retrieval(prompt_of({}, embedder))
    params = AnswerParams(pooling=pooling, dimensions=embedder.dimensions if embedder else 0)
    request = asked_of(values, (*first, *second), params, retrieval)
    return ParsedBody(request, stream=False, api="cosines", details={"pairs": len(second)})


TASKS = {  # of the routes whose models need not be able to answer
    **dict.fromkeys(("/v1/embeddings", "/api/embed", "/api/embeddings", "/embed"), "embed"),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking"), "rank")}
SCORES = "/v1/score", "/score"


def check_route(route: str, known: Known):
    """RequestError if the model, where it is known, cannot do what the route is for."""
    if known.infill is None:
        return
    task = TASKS.get(route, "answer")
    if route in SCORES:
        task = task_for(known.embedder.pooling) if known.embedder else "rank"
    check_task(known.embedder, task)


RETRIEVAL_READERS: dict[str, Callable[..., ParsedBody]] = {
    "/v1/embeddings": read_embedding_body,
    "/api/embed": partial(read_embedding_body, api="ollama embed"),
    "/api/embeddings": partial(read_embedding_body, api="ollama embeddings"),
    "/embed": partial(read_embedding_body, api="tei embed"),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank"), read_rerank_body),
    **dict.fromkeys(("/reranking", "/v1/reranking"), partial(read_rerank_body, api="llama rerank")),
    **dict.fromkeys(SCORES, read_score_body),
}
