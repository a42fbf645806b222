"""Readers of bodies that ask for vectors of texts, for a ranking of documents, or for scores of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
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
INPUT_TYPES = {  # a client's name for a kind of input -> the names that models have for its prompt
    "query": ("query", "search_query"), "search_query": ("query", "search_query"),
    **dict.fromkeys(("document", "passage", "search_document"), ("document", "passage", "search_document"))}


def retrieval_request(values: Mapping, texts: Seq[Any], params: AnswerParams,
                      retrieval: Retrieval) -> Request:
    """A request for vectors or scores of these texts."""
    return Request(params=params, low_priority=values.get("priority", False), prompts=tuple(texts),
                   truncate=retrieval.cut, retrieval=retrieval)


def read_embedding_body(body: dict, known: Known, api: str = "embeddings") -> ParsedBody:
    """OpenAI's Embeddings API, or with another `api` one of Ollama's or TEI's."""
    values = parse_fields(body, EMBEDDING_BODIES[api])
    embedder = known.embedder
    params = AnswerParams(pooling=chosen_pooling(values, embedder),
                          dimensions=chosen_dimensions(values, known),
                          normalized=values.get("normalize", api != "ollama embeddings"))
    most = values.get("truncate_prompt_tokens")
    cut = values.get("cut", api != "embeddings" or most is not None)
    retrieval = Retrieval(chosen_prompt(values, embedder), most=None if most == -1 else most, cut=cut)
    name = EMBEDDING_BODIES[api][0].name
    inputs = values["input"]
    if api.startswith("ollama") and inputs in ((), ("",)):
        return ParsedBody(retrieval_request(values, (), params, retrieval), stream=False, api=api,
                          details={"nothing": True})
    if not all(inputs):
        raise invalid(name, f"the {name} is empty" if len(inputs) == 1 else
                      f"{name}[{[*map(bool, inputs)].index(False)}] is empty")
    return ParsedBody(retrieval_request(values, inputs, params, retrieval), stream=False, api=api,
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


def read_rerank_body(body: dict, known: Known, api: str = "rerank") -> ParsedBody:
    """The rerank API of Jina, Cohere and vLLM, or llama-server's; with `texts` TEI's, on either route."""
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
    retrieval = Retrieval(queries=(values["query"],), instruction=checked_instruction(values, embedder),
                          most=values.get("max_tokens_per_doc"), cut=cuts)
    # llama-server makes probabilities only for models whose query and document are one text
    usually_raw = api == "llama rerank" and not (embedder and embedder.form)
    raw = values.get("raw_scores", not values.get("use_activation", not usually_raw))
    shows = values.get("return_text" if api == "tei rerank" else "return_documents", False)
    details = {"top": values.get("top_n", len(documents)), "raw": raw,
               "documents": documents if shows else None}
    request = retrieval_request(values, documents, AnswerParams(pooling="rank"), retrieval)
    return ParsedBody(request, stream=False, api=api, details=details)


def checked_instruction(values: Mapping, embedder: Embedder | None) -> str | None:
    instruction = values.get("instruction")
    if instruction is not None and embedder and not embedder.instruction:
        raise bad_value("instruction", instruction, "left out: this model reads none")
    return instruction


def read_score_body(body: dict, known: Known) -> ParsedBody:
    """vLLM's scores of pairs. A reranker reads each pair; for an embedder they are cosines of vectors."""
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
        retrieval = Retrieval(queries=first, instruction=checked_instruction(values, embedder))
        sigmoid = embedder is None or embedder.sigmoid
        details = {"raw": not values.get("use_activation", True) or not sigmoid, "pairs": len(second)}
        request = retrieval_request(values, second, AnswerParams(pooling="rank"), retrieval)
        return ParsedBody(request, stream=False, api="score", details=details)
    within_limit("texts in text_1 and text_2", len(first) + len(second), LIMITS.embeddings, "text_2")
    retrieval = Retrieval(chosen_prompt({}, embedder))
    params = AnswerParams(pooling=pooling, dimensions=embedder.dimensions if embedder else 0)
    request = retrieval_request(values, (*first, *second), params, retrieval)
    return ParsedBody(request, stream=False, api="cosines", details={"pairs": len(second)})


ROUTE_TASKS = {  # route -> what its model must be able to do, if that is not to answer
    **dict.fromkeys(
        ("/v1/embeddings", "/api/v0/embeddings", "/api/embed", "/api/embeddings", "/embed"), "embed"),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking"), "rank")}
SCORES = "/v1/score", "/score"


def check_route(route: str, known: Known):
    """Raise RequestError if the model cannot do what the route is for. Of a model that is still loading,
    nobody knows."""
    if known.infill is None:
        return
    task = ROUTE_TASKS.get(route, "answer")
    if route in SCORES:
        task = task_for(known.embedder.pooling) if known.embedder else "rank"
    check_task(known.embedder, task)


RETRIEVAL_READERS: dict[str, Callable[..., ParsedBody]] = {
    **dict.fromkeys(("/v1/embeddings", "/api/v0/embeddings"), read_embedding_body),
    "/api/embed": partial(read_embedding_body, api="ollama embed"),
    "/api/embeddings": partial(read_embedding_body, api="ollama embeddings"),
    "/embed": partial(read_embedding_body, api="tei embed"),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank"), read_rerank_body),
    **dict.fromkeys(("/reranking", "/v1/reranking"), partial(read_rerank_body, api="llama rerank")),
    **dict.fromkeys(SCORES, read_score_body),
}
