"""The table of routes: its rows, and which row a request matches."""

from __future__ import annotations

import os.path
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from enum import Enum
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.front.api.field_types import INTEGER, TEXT
from chatlm.front.api.fields import A_TEXT, Field, FieldType
from chatlm.front.api.kept_fields import STORE_FIELDS
from chatlm.front.api.tables import BODY_FIELDS, HUB_FIELDS

if TYPE_CHECKING:
    from aiohttp import web
    from chat_server import Front


NO_SCHEMA: Mapping = types.MappingProxyType({})


class Api(Enum):
    """Whose API a route belongs to: its errors have the shape that this API's clients read."""

    NANOCHAT = "nanochat"
    OPENAI = "OpenAI"
    ANTHROPIC = "Anthropic"
    OLLAMA = "Ollama"


class Route(NamedTuple):
    """One route. Router, access rules, log, errors and /openapi.json are made from its row."""

    method: str
    path: str
    api: Api
    handler: str | Callable[[Front, Seq[str]], Any]  # a method, or what makes the JSON (see Front.show)
    doc: str
    query: tuple[Field, ...] = ()   # parameters after the question mark
    returns: Mapping = NO_SCHEMA    # the schema of the response's body, if described
    open: bool = False              # needs no API key
    quiet: bool = False             # successes are logged only at level debug
    polled: bool = False            # likewise, and also served on surplus connections

    @property
    def pattern(self) -> str:
        return re.sub(r":[^}]*", "", self.path)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of the body. ANSWER_READERS or TEXT_READERS has a reader for those of BODY_FIELDS."""
        if self.method == "GET":  # a list has the path of what makes its rows
            return ()
        kept = STORE_FIELDS if self.method == "POST" else {}
        return BODY_FIELDS.get(self.pattern) or HUB_FIELDS.get(self.pattern) or kept.get(self.pattern, ())


RETRIEVAL_ROUTES = tuple(  # whatever they ask for, one handler answers
    Route("POST", path, api, "handle_answer", doc) for api, doc, paths in (
        (Api.OPENAI, "a vector for each input, from the model's final hidden states", "/v1/embeddings"),
        (Api.OPENAI, "the same in the format of Text Embeddings Inference", "/embed"),
        (Api.OPENAI, "documents by how well they suit a query", "/v1/rerank /rerank /v2/rerank"),
        (Api.OPENAI, "as above, in llama-server's format", "/reranking /v1/reranking"),
        (Api.OPENAI, "scores of pairs of texts", "/v1/score /score"),
        (Api.OLLAMA, "embeddings in Ollama's format", "/api/embed"),
        (Api.OLLAMA, "one embedding, for older clients of Ollama", "/api/embeddings"))
    for path in paths.split())

HUB_SEARCH = Field("search", TEXT, "also search the hub, for this")
MANAGING_ROUTES = (
    Route("POST", "/models/load", Api.OPENAI, "models.handle_load", "load a model"),
    Route("POST", "/models/unload", Api.OPENAI, "models.handle_unload",
          "unload a model once its answers have ended; the next request loads it again"),
    Route("GET", "/models/hub", Api.OPENAI, "downloads.handle_list",
          "models that can be downloaded, those in the cache, downloads, and room", query=(HUB_SEARCH,)),
    Route("GET", "/models/hub/{name:.+}", Api.OPENAI, "downloads.handle_look",
          "what the hub has of a model: files with sizes, and whether this program can run it"),
    Route("GET", "/models/downloads", Api.OPENAI, "downloads.handle_downloads",
          "the state of each download, then each change, as events; ends when none is running"),
    Route("POST", "/models/download", Api.OPENAI, "downloads.handle_download",
          "download a model, or follow its download"),
    Route("POST", "/models/cancel", Api.OPENAI, "downloads.handle_cancel",
          "end a download; the next one continues where it was"),
    Route("POST", "/models/delete", Api.OPENAI, "downloads.handle_delete",
          "remove a downloaded model from the cache"),
    Route("POST", "/api/pull", Api.OLLAMA, "downloads.handle_pull", "download a model as Ollama does"),
    Route("DELETE", "/api/delete", Api.OLLAMA, "downloads.handle_ollama_delete",
          "remove a downloaded model from the cache"),
)


DOCUMENT_NAME = Field("name", TEXT, "the document's file name")
DOCUMENT_ROUTES = (
    Route("POST", "/extract", Api.NANOCHAT, "bodies.handle_extract",
          "the text of a document, which is the body or the file of a form", query=(DOCUMENT_NAME,),
          returns={"type": "object", "properties": {
              "text": A_TEXT,
              "pages": {"type": ["integer", "null"],
                        "description": "pages, slides, sheets or chapters; null if the format has none"},
              "cut": {"type": ["string", "null"], "description": "what of the document the text lacks"}}}),)
AFTER = Field("after", TEXT, "the id of the last row of the page before")
ORDER = Field("order", FieldType('"asc" or "desc"', {"enum": ["asc", "desc"]}),
              "by time; desc = newest first")
FILES_LIMIT = Field("limit", INTEGER, "rows of a page (10,000)", 1, 10_000)
LIMIT = Field("limit", INTEGER, "rows of a page (20)", 1, 100)
PURPOSE = Field("purpose", FieldType('"batch" or "batch_output"', {"enum": ["batch", "batch_output"]}),
                "only these files")
STORE_ROUTES = (  # with --database
    Route("POST", "/v1/files", Api.OPENAI, "batches.files.handle_upload",
          "keep a file of requests for a batch: a form with `file` and `purpose`"),
    Route("GET", "/v1/files", Api.OPENAI, "batches.files.handle_list", "your files",
          query=(PURPOSE, FILES_LIMIT, ORDER, AFTER)),
    Route("GET", "/v1/files/{id}", Api.OPENAI, "batches.files.handle_file", "what is known of a file"),
    Route("GET", "/v1/files/{id}/content", Api.OPENAI, "batches.files.handle_content", "its content"),
    Route("DELETE", "/v1/files/{id}", Api.OPENAI, "batches.files.handle_delete", "delete a file"),
    Route("POST", "/v1/batches", Api.OPENAI, "batches.handle_create",
          "answer each line of a file while nobody else asks"),
    Route("GET", "/v1/batches", Api.OPENAI, "batches.handle_list", "your batches, the newest first",
          query=(LIMIT, AFTER)),
    Route("GET", "/v1/batches/{id}", Api.OPENAI, "batches.handle_batch", "how far a batch is"),
    Route("POST", "/v1/batches/{id}/cancel", Api.OPENAI, "batches.handle_cancel",
          "end a batch; what it has answered is kept"),
    Route("GET", "/v1/responses/{id}", Api.OPENAI, "kept.routes.handle_response",
          "a response that was kept"),
    Route("DELETE", "/v1/responses/{id}", Api.OPENAI, "kept.routes.handle_delete", "delete it"),
    Route("GET", "/v1/responses/{id}/input_items", Api.OPENAI, "kept.routes.handle_inputs",
          "what it was asked, with what was said before", query=(LIMIT, ORDER, AFTER)),
    Route("POST", "/v1/conversations", Api.OPENAI, "kept.routes.handle_create", "begin a conversation"),
    Route("GET", "/v1/conversations/{id}", Api.OPENAI, "kept.routes.handle_conversation", "a conversation"),
    Route("POST", "/v1/conversations/{id}", Api.OPENAI, "kept.routes.handle_update", "change its metadata"),
    Route("DELETE", "/v1/conversations/{id}", Api.OPENAI, "kept.routes.handle_forget",
          "delete it with its items"),
    Route("GET", "/v1/conversations/{id}/items", Api.OPENAI, "kept.routes.handle_items", "its items",
          query=(LIMIT, ORDER, AFTER)),
    Route("POST", "/v1/conversations/{id}/items", Api.OPENAI, "kept.routes.handle_add", "add items to it"),
    Route("GET", "/v1/conversations/{id}/items/{item}", Api.OPENAI, "kept.routes.handle_item", "one item"),
    Route("DELETE", "/v1/conversations/{id}/items/{item}", Api.OPENAI, "kept.routes.handle_drop",
          "delete it; the answer is the conversation"))
FROM_DAY = Field("from", TEXT, "the first day (UTC), as 2026-11-24; default: 30 days before the last")
TO_DAY = Field("to", TEXT, "the last day; default: today")
USAGE_ROUTES = (
    Route("GET", "/v1/usage", Api.OPENAI, "ledger.handle_usage",
          "what the request's API key used by day and model; a key with role=admin sees all keys",
          query=(FROM_DAY, TO_DAY)),
    Route("GET", "/usage", Api.NANOCHAT, "page.handle_usage", "a page that shows it", open=True))
MORE_ROUTES = *USAGE_ROUTES, *RETRIEVAL_ROUTES, *DOCUMENT_ROUTES, *MANAGING_ROUTES, *STORE_ROUTES


class RouteTable:
    """Finds the row of a request. Paths of requests begin with `prefix`, paths of rows do not."""

    def __init__(self, rows: Iterable[Route], prefix: str = ""):
        self.prefix, self.by_method = prefix, {(row.method, row.pattern): row for row in rows}
        self.rows = {row.pattern: row for row in self.by_method.values()}

    def row_of(self, http: web.Request) -> Route:
        """The row whose handler answers. For a request without one, an unnamed row of the API whose path
        shares the longest beginning with the request's."""
        if resource := http.match_info.route.resource:
            pattern = resource.canonical.removeprefix(self.prefix).rstrip("/") or "/"
            return self.by_method.get((http.method, pattern), self.rows[pattern])
        words = http.path.removeprefix(self.prefix).split("/")
        nearest = max(self.rows.values(),
                      key=lambda row: len(os.path.commonprefix([row.path.split("/"), words])))
        return Route("", "", nearest.api, "", "no route")

    def is_polled(self, path: str) -> bool:
        """Is the path polled? For requests that have not been matched with a row yet."""
        return any(row.polled and path.rstrip("/") == self.prefix + row.path for row in self.rows.values())
