"""The dialects that this server speaks, and where.

A further dialect is one file in chatlm/front/api/dialects/ and one row of `DIALECTS`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple, TYPE_CHECKING

from chatlm.front.api.dialect import Dialect, Form, TextForm
from chatlm.front.api.dialects import (
    messages, native, ollama, openai, own, responses, retrieval, tokenization)
from chatlm.front.api.errors import ANTHROPIC, NANOCHAT, OLLAMA, OPENAI, Api

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.api.encode import Encoder
    from chatlm.front.api.fields import Field


class InBatches(NamedTuple):
    """What lines of a batch may say to a path."""

    has_seed: bool = True     # its bodies have a `seed`,
    seed_is_ours: bool = False  # which other servers of this API refuse


class DialectPath(NamedTuple):
    """A path of a dialect."""

    api: Api
    doc: str              # what one gets there; "": its route has a handler of its own, and stands there
    with_model: str = ""  # the path as whose a body counts that names a model; "": this one
    in_batches: InBatches | None = None  # None: lines of batches cannot ask it


class DialectRow(NamedTuple):
    dialect: Dialect
    places: Mapping[str, DialectPath]  # by path


def of_api(api: Api, docs: Mapping[str, str]) -> dict[str, DialectPath]:
    """Places of one API. docs: what one gets at each path."""
    return {path: DialectPath(api, doc) for path, doc in docs.items()}


VECTORS = "a vector for each input, from the model's final hidden states"
RANKING = "documents by how well they suit a query"
SCORES = "scores of pairs of texts"
# The API of the first row with a path below /api answers for all that is not there below /api, and so on
DIALECTS: tuple[DialectRow, ...] = (
    DialectRow(native.DIALECT, {
        "/chat/completions": DialectPath(
            NANOCHAT, "an answer in nanochat's format, streamed; with `model` as /v1/chat/completions",
            with_model="/v1/chat/completions")}),
    DialectRow(ollama.DIALECT, of_api(OLLAMA, {
        "/api/chat": "an answer in Ollama's format",
        "/api/generate": "an answer in Ollama's format",
        "/api/show": ""})),
    DialectRow(openai.DIALECT, {
        "/v1/chat/completions": DialectPath(
            OPENAI, "an answer in OpenAI's format, streamed or whole", in_batches=InBatches()),
        "/v1/completions": DialectPath(
            OPENAI, "the continuation of a text, streamed or whole", in_batches=InBatches()),
        **of_api(OPENAI, {
            "/infill": "the text between two others, in llama-server's format, streamed or whole",
            "/api/v0/chat/completions": "as /v1/chat/completions, for clients of LM Studio",
            "/api/v0/completions": "as /v1/completions, for clients of LM Studio"})}),
    DialectRow(responses.DIALECT, {
        "/v1/responses": DialectPath(
            OPENAI, "an answer in the format of OpenAI's Responses, streamed or whole",
            in_batches=InBatches(seed_is_ours=True)),
        "/v1/responses/input_tokens": DialectPath(
            OPENAI, "how many tokens the prompt of such a response has")}),
    DialectRow(messages.DIALECT, of_api(ANTHROPIC, {
        "/v1/messages": "an answer in the format of Anthropic's Messages, streamed or whole",
        "/v1/messages/count_tokens": "how many tokens such a request has"})),
    DialectRow(retrieval.DIALECT, {
        "/v1/embeddings": DialectPath(OPENAI, VECTORS, in_batches=InBatches(has_seed=False)),
    } | of_api(OPENAI, {
        "/api/v0/embeddings": VECTORS,
        "/embed": "the same in the format of Text Embeddings Inference",
        "/v1/rerank": RANKING, "/rerank": RANKING, "/v2/rerank": RANKING,
        "/reranking": "as above, in llama-server's format",
        "/v1/reranking": "as above, in llama-server's format",
        "/v1/score": SCORES, "/score": SCORES}) | of_api(OLLAMA, {
            "/api/embed": "embeddings in Ollama's format",
            "/api/embeddings": "one embedding, for older clients"})),
    DialectRow(tokenization.DIALECT, of_api(OPENAI, {
        "/tokenize": "text to token ids",
        "/detokenize": "token ids to text",
        "/apply-template": "a conversation to the text of its prompt"})),
    DialectRow(own.DIALECT, of_api(OPENAI, {
        "/v1/compare": "", "/models/load": "", "/models/unload": ""})),
)


@cache
def rows_by_path() -> dict[str, DialectRow]:
    return {path: row for row in DIALECTS for path in row.places}


def all_places() -> Iterator[tuple[str, DialectPath]]:
    """Each path of each dialect, with what is there."""
    return (item for row in DIALECTS for item in row.places.items())


def paths_of_batches() -> tuple[str, ...]:
    """The paths that lines of a batch may ask."""
    return tuple(path for path, place in all_places() if place.in_batches)


def all_paths() -> tuple[str, ...]:
    return tuple(rows_by_path())


def has_body(path: str) -> bool:
    """Does a dialect read the bodies that are sent to a path?"""
    return path in rows_by_path()


def place_of(path: str) -> DialectPath:
    return rows_by_path()[path].places[path]


def path_of_form(path: str, names_model: bool) -> str:
    """The path as whose a body counts that was sent to `path`. names_model: has it a `model`?"""
    if not names_model or not has_body(path):
        return path
    return place_of(path).with_model or path


def paths_of(path: str) -> tuple[str, ...]:
    """All paths of the dialect of a path."""
    return tuple(rows_by_path()[path].places)


def form_of(path: str) -> Form | TextForm:
    """What bodies of a path are."""
    return rows_by_path()[path].dialect.forms[path]


def answer_form(path: str) -> Form:
    """The form of a path whose bodies a model answers."""
    form = form_of(path)
    assert isinstance(form, Form), f"a body of {path} is answered without a model"
    return form


def fields_of(path: str) -> tuple[Field, ...]:
    """The fields of the bodies of a path; () if they are not of a dialect."""
    return form_of(path).fields if has_body(path) else ()


def answer_encoder(parsed: ParsedBody, model: str, tokenizer: Tokenizer | None) -> Encoder:
    """Make the encoder of an answer. It keeps no more of the request than it needs."""
    return answer_form(parsed.form).encoder(parsed.lasting(), model, tokenizer)
