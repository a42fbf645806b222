"""The annexes of the front: what a server has beside its core, loaded when a flag or a request asks for it.

An annex is a row of `ANNEXES`: data, and functions that import its modules when they are called. Nothing of
it is imported before. The rows of its routes are here, so that the router, the rules of access, 404 and 405,
and /openapi.json know all routes. A handler is a function of the annex's room and the request; the type
checker refuses one that the room does not have."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TYPE_CHECKING, TypeVar

from chatlm.common.commands import Command
from chatlm.common.late import importer
from chatlm.front.api.additions import AddedField, Addition, ServerTool
from chatlm.front.api.errors import NANOCHAT, OLLAMA, OPENAI
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import A_TEXT, Field, list_schema, object_schema
from chatlm.front.api.kept_fields import (
    AFTER, CHAT_PLACE, COUNT, FILES_LIMIT, LIMIT, ORDER, PURPOSE, SINCE, STARTING_AFTER, STREAM, WAIT, WORDS)
from chatlm.front.api.knowledge_fields import (
    BEFORE, FILE_SEARCH_ITEM, FILE_SEARCH_OPTIONS, FILE_SEARCH_PARAMETERS, KNOWLEDGE_OF_CHAT, PAGE, QUERIES,
    STATUS)
from chatlm.front.api.model_schema import A_MODEL
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Request
    from chatlm.front.api.encode import Encoder
    from chatlm.front.chats.routes import ChatRoutes
    from chatlm.front.front import Front
    from chatlm.front.intake.opened_body import Caller, OpenedBody
    from chatlm.front.intake.budget import Holding
    from chatlm.front.intake.envelope import Envelope
    from chatlm.front.intake.intake import KeptBefore
    from chatlm.front.knowledge.routes import KnowledgeRoutes
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.answering import Answering, Ask, Begin
    from chatlm.front.server.batches import BatchRoutes
    from chatlm.front.server.budgets import Budgets
    from chatlm.front.server.compare import CompareRoutes
    from chatlm.front.server.conversations import ConversationRoutes, ResponseKeeper
    from chatlm.front.server.downloading import DownloadRoutes
    from chatlm.front.server.exporting import ExportRoutes
    from chatlm.front.server.file_routes import FileRoutes
    from chatlm.front.server.metric_families import MetricRoutes
    from chatlm.front.server.recordings import Recording
    from chatlm.front.server.rounds import Rounds
    from chatlm.front.server.runs import RunRoutes
    from chatlm.front.server.tooling import ToolRoutes
    from chatlm.front.server.usage import UsageRoutes
    from chatlm.front.server.usage_writer import UsageWriter
    from chatlm.front.server.watching import Watcher
    from chatlm.front.store.schema import Step
    from chatlm.front.store.store import Store
    from chatlm.front.tools.toolbox import Toolbox


T = TypeVar("T")
Make = Callable[["Front"], T]


async def nothing(room: Any):
    pass


@dataclass(frozen=True)
class Annex(Generic[T]):
    """What the core can do without. T: its room, the object that has the handlers of its routes."""

    name: str
    load: Callable[[], Make[T]]     # imports its modules, in a thread if a request asks; makes the room
    routes: tuple[Route[T], ...] = ()
    wanted: Callable[[Front], bool] = lambda front: False   # opened at the start, because of a flag
    start: Callable[[T], Awaitable[None]] = nothing  # its tasks
    close: Callable[[T], Awaitable[None]] = nothing  # at the server's end
    # What it adds to the bodies of answers; `needs` is the flag that an error names where it is not wanted
    fields: tuple[AddedField, ...] = ()
    tools: tuple[ServerTool[T], ...] = ()  # of Responses and Messages, whose answers may be in rounds
    needs: str = ""
    # The part of the worker's engine (chatlm/worker/parts.py) that gets the values of these fields, by their
    # names. What it says of the answer, `watch` gets
    part: str = ""
    # The hooks of those that are wanted. `prompt` may change what a body asks the model (of a pool), before
    # that is rendered, and what its answer has `beside`: of bodies with one of its fields or tools; of all,
    # if it has neither
    prompt: Callable[[T, ParsedBody, Caller, WorkerPool], Awaitable[ParsedBody]] | None = None
    # Has it to do with the answer to a body? Then `prepare` may change how the body is answered, before its
    # encoder is made, and `around` begins the answer: it gets what begins the one within
    joins: Callable[[ParsedBody], bool] = lambda parsed: False
    prepare: Callable[[T, ParsedBody], ParsedBody] | None = None
    around: Callable[[T, Begin, Ask], Answering] | None = None
    # what sees the events of each answer
    watch: Callable[[T, Request], Watcher] | None = None
    # the tools that may be run for a body that names tool servers, each as JSON
    offers: Callable[[T, web.Request, Envelope], Awaitable[list[bytes]]] | None = None
    # the items that a body continues or refers to
    earlier: Callable[[T, OpenedBody, Holding], Awaitable[KeptBefore]] | None = None
    # the response to a body whose answer goes on in the background, where it is recorded
    in_background: Callable[[T, Encoder, Recording], bytes] | None = None
    # Of all: its tables in the database, as steps from none to the current ones (see store/schema.py); a
    # command; what it counts, in the classes of prometheus_client.metrics_core
    tables: Callable[[], Seq[Step]] | None = None
    command: Command | None = None
    metrics: Callable[[T, Any], Iterator[Any]] | None = None


def additions_of(annexes: Seq[Annex[Any]], wanted: Seq[Annex[Any]] = ()) -> list[Addition]:
    """What annexes add to bodies. wanted: those that this server runs with."""
    names = {annex.name for annex in wanted}
    return [Addition(annex.name, annex.name in names, annex.needs, annex.fields, annex.tools,
                     annex.prompt is not None) for annex in annexes]


def with_parts(parsed: ParsedBody, annexes: Seq[Annex[Any]]) -> ParsedBody:
    """A body that asks parts of the worker's engine for what its fields say. annexes: those that are
    wanted."""
    asked = {annex.part: {added.field.name: parsed.added[added.field.name] for added in annex.fields
                          if added.field.name in parsed.added} for annex in annexes if annex.part}
    parts = {part: values for part, values in asked.items() if values}
    if not parts:
        return parsed
    params = replace(parsed.request.params, parts=parts)
    return replace(parsed, request=replace(parsed.request, params=params))


def with_database(front: Front) -> bool:
    return front.store is not None


def with_tools(front: Front) -> bool:
    return front.settings.mcp_config is not None


def with_rounds(front: Front) -> bool:
    return with_tools(front) or any(annex.tools and annex.wanted(front) for annex in front.annexes)


# Tools that run here, and answers for which the server calls them

def load_rounds() -> Make[Rounds]:
    TOOLS.load()
    make = importer("chatlm.front.server.rounds:Rounds.of")()
    return lambda front: make(front, front.room(TOOLS).toolbox, {
        (annex.name, tool.type): partial(tool.call, front.room(annex))
        for annex in front.wanted for tool in annex.tools})


MODEL = Field("model", TEXT, "whose format of calls decides which parameters can be enforced")
A_TOOL = object_schema(
    ["name", "server", "tool", "digest"], name=A_TEXT, server=A_TEXT, tool=A_TEXT, description=A_TEXT,
    parameters={"type": "object"}, annotations={"type": "object"}, digest=A_TEXT,
    enforced={"description": "true, or why calls can't be held to the parameters"},
    ask={"type": "boolean", "description": "whether a person should approve of each call"})
A_LIST = object_schema(["data", "servers"], data=list_schema(A_TOOL), servers=list_schema(
    object_schema(["label", "state"], label=A_TEXT, state=A_TEXT, reason=A_TEXT, notices=list_schema(
        A_TEXT | {"description": "such as that tools are left out, and why"}))))
TOOL_ROUTES: tuple[Route[ToolRoutes], ...] = (
    Route("GET", "/v1/tools", OPENAI, lambda tools, http: tools.handle_list(http),
          "the tools of --mcp-config that this client may use", query=(MODEL,), returns=A_LIST),
    Route("POST", "/v1/tools/call", OPENAI, lambda tools, http: tools.handle_call(http),
          "call one of these tools"),
)
TOOLS: Annex[ToolRoutes] = Annex(
    "tools", importer("chatlm.front.server.tooling:ToolRoutes.of"), TOOL_ROUTES, with_tools,
    lambda tools: tools.start(), lambda tools: tools.close(),
    offers=lambda tools, http, envelope: tools.offered_to(http, envelope),
    metrics=lambda tools, families: tools.metric_families(families))
ROUNDS = Annex(
    "rounds", load_rounds, wanted=with_rounds, start=lambda rounds: rounds.approvals.open(),
    joins=lambda parsed: parsed.plan is not None, prepare=lambda rounds, parsed: rounds.marked(parsed),
    around=lambda rounds, begin, ask: rounds.begin(ask))


# What is kept: responses, conversations, files, batches

def load_files() -> Make[FileRoutes]:
    BATCHES.load()
    return lambda front: front.room(BATCHES).files


def load_kept() -> Make[ResponseKeeper]:
    make = importer("chatlm.front.server.conversations:ResponseKeeper.of")()
    return lambda front: make(front, lambda: front.room(BATCHES).wake_up())


def load_conversations() -> Make[ConversationRoutes]:
    KEPT.load()
    return lambda front: front.room(KEPT).routes


BATCH_ROUTES: tuple[Route[BatchRoutes], ...] = (
    Route("POST", "/v1/batches", OPENAI, lambda batches, http: batches.handle_create(http),
          "answer each line of a file while nobody else asks"),
    Route("GET", "/v1/batches", OPENAI, lambda batches, http: batches.handle_list(http),
          "your batches, the newest first",
          query=(LIMIT, AFTER)),
    Route("GET", "/v1/batches/{id}", OPENAI, lambda batches, http: batches.handle_batch(http),
          "how far a batch is"),
    Route("POST", "/v1/batches/{id}/cancel", OPENAI, lambda batches, http: batches.handle_cancel(http),
          "end a batch; what it has answered is kept"),
)
FILE_ROUTES: tuple[Route[FileRoutes], ...] = (
    Route("POST", "/v1/files", OPENAI, lambda files, http: files.handle_upload(http),
          "keep a file of requests for a batch: a form with `file` and `purpose`"),
    Route("GET", "/v1/files", OPENAI, lambda files, http: files.handle_list(http), "your files",
          query=(PURPOSE, FILES_LIMIT, ORDER, AFTER)),
    Route("GET", "/v1/files/{id}", OPENAI, lambda files, http: files.handle_file(http),
          "what is known of a file"),
    Route("GET", "/v1/files/{id}/content", OPENAI, lambda files, http: files.handle_content(http),
          "its content"),
    Route("DELETE", "/v1/files/{id}", OPENAI, lambda files, http: files.handle_delete(http),
          "delete a file"),
)
CONVERSATION_ROUTES: tuple[Route[ConversationRoutes], ...] = (
    Route("GET", "/v1/responses/{id}", OPENAI, lambda kept, http: kept.handle_response(http),
          "a response that was kept, or that runs in the background", query=(STREAM, STARTING_AFTER)),
    Route("POST", "/v1/responses/{id}/cancel", OPENAI, lambda kept, http: kept.handle_cancel(http),
          "stop a response that runs in the background"),
    Route("DELETE", "/v1/responses/{id}", OPENAI, lambda kept, http: kept.handle_delete(http),
          "delete it"),
    Route("GET", "/v1/responses/{id}/input_items", OPENAI, lambda kept, http: kept.handle_inputs(http),
          "what it was asked, with what was said before", query=(LIMIT, ORDER, AFTER)),
    Route("POST", "/v1/conversations", OPENAI, lambda kept, http: kept.handle_create(http),
          "begin a conversation"),
    Route("GET", "/v1/conversations/{id}", OPENAI, lambda kept, http: kept.handle_conversation(http),
          "a conversation"),
    Route("POST", "/v1/conversations/{id}", OPENAI, lambda kept, http: kept.handle_update(http),
          "change its metadata"),
    Route("DELETE", "/v1/conversations/{id}", OPENAI, lambda kept, http: kept.handle_forget(http),
          "delete it with its items"),
    Route("GET", "/v1/conversations/{id}/items", OPENAI, lambda kept, http: kept.handle_items(http),
          "its items",
          query=(LIMIT, ORDER, AFTER)),
    Route("POST", "/v1/conversations/{id}/items", OPENAI, lambda kept, http: kept.handle_add(http),
          "add items to it"),
    Route("GET", "/v1/conversations/{id}/items/{item}", OPENAI, lambda kept, http: kept.handle_item(http),
          "one item"),
    Route("DELETE", "/v1/conversations/{id}/items/{item}", OPENAI,
          lambda kept, http: kept.handle_drop(http),
          "delete it; the answer is the conversation"),
)
BATCHES: Annex[BatchRoutes] = Annex(
    "batches", importer("chatlm.front.server.batches:BatchRoutes.of"), BATCH_ROUTES, with_database,
    lambda batches: batches.start(), lambda batches: batches.close())
FILES = Annex("files", load_files, FILE_ROUTES)
KEPT = Annex("kept", load_kept, wanted=with_database, close=lambda kept: kept.close(),
             joins=lambda parsed: parsed.is_kept,
             around=lambda kept, begin, ask: kept.answering(begin(ask), ask.encoder),
             earlier=lambda kept, opened_body, reading: kept.earlier(opened_body, reading),
             in_background=lambda kept, encoder, recording: kept.show_running(encoder, recording))
CONVERSATIONS = Annex("conversations", load_conversations, CONVERSATION_ROUTES)


# Vector stores: files that are cut into passages, embedded and searched

A_PLACE = LIMIT, ORDER, AFTER, BEFORE
KNOWLEDGE_ROUTES: tuple[Route[KnowledgeRoutes], ...] = (
    Route("POST", "/v1/vector_stores", OPENAI, lambda knowledge, http: knowledge.handle_create(http),
          "make a vector store, perhaps with files"),
    Route("GET", "/v1/vector_stores", OPENAI, lambda knowledge, http: knowledge.handle_list(http),
          "your vector stores", query=A_PLACE),
    Route("GET", "/v1/vector_stores/{id}", OPENAI, lambda knowledge, http: knowledge.handle_store(http),
          "a vector store, and how far its files are"),
    Route("POST", "/v1/vector_stores/{id}", OPENAI, lambda knowledge, http: knowledge.handle_update(http),
          "change its name, metadata or expiry"),
    Route("DELETE", "/v1/vector_stores/{id}", OPENAI, lambda knowledge, http: knowledge.handle_delete(http),
          "delete it with all passages; the files stay"),
    Route("POST", "/v1/vector_stores/{id}/search", OPENAI,
          lambda knowledge, http: knowledge.handle_search(http), "the passages that fit a question"),
    Route("POST", "/v1/vector_stores/{id}/files", OPENAI, lambda knowledge, http: knowledge.handle_add(http),
          "put an uploaded file into it, which is read in the background"),
    Route("GET", "/v1/vector_stores/{id}/files", OPENAI, lambda knowledge, http: knowledge.handle_files(http),
          "its files", query=(*A_PLACE, STATUS)),
    Route("GET", "/v1/vector_stores/{id}/files/{file}", OPENAI,
          lambda knowledge, http: knowledge.handle_file(http), "how far a file is, or why it has failed"),
    Route("POST", "/v1/vector_stores/{id}/files/{file}", OPENAI,
          lambda knowledge, http: knowledge.handle_change(http), "change a file's attributes"),
    Route("DELETE", "/v1/vector_stores/{id}/files/{file}", OPENAI,
          lambda knowledge, http: knowledge.handle_remove(http), "take a file out of it"),
    Route("GET", "/v1/vector_stores/{id}/files/{file}/content", OPENAI,
          lambda knowledge, http: knowledge.handle_content(http), "the passages of a file", query=(PAGE,)),
    Route("POST", "/v1/vector_stores/{id}/file_batches", OPENAI,
          lambda knowledge, http: knowledge.handle_begin_batch(http), "put several files into it"),
    Route("GET", "/v1/vector_stores/{id}/file_batches/{batch}", OPENAI,
          lambda knowledge, http: knowledge.handle_batch(http), "how far a batch of files is"),
    Route("POST", "/v1/vector_stores/{id}/file_batches/{batch}/cancel", OPENAI,
          lambda knowledge, http: knowledge.handle_cancel(http), "leave out those of its files that wait"),
    Route("GET", "/v1/vector_stores/{id}/file_batches/{batch}/files", OPENAI,
          lambda knowledge, http: knowledge.handle_batch_files(http), "the files of a batch",
          query=(*A_PLACE, STATUS)),
)


def with_knowledge(front: Front) -> bool:
    return front.store is not None and KNOWLEDGE.name in front.store.tables


FILE_SEARCH: ServerTool[KnowledgeRoutes] = ServerTool(
    "file_search", "Search the user's documents. Returns numbered passages that may help to answer.",
    FILE_SEARCH_PARAMETERS, lambda knowledge, call: knowledge.searched(call), FILE_SEARCH_OPTIONS,
    FILE_SEARCH_ITEM, first=QUERIES, rounds=3)
KNOWLEDGE: Annex[KnowledgeRoutes] = Annex(
    "knowledge", importer("chatlm.front.knowledge.routes:KnowledgeRoutes.of"), KNOWLEDGE_ROUTES,
    with_knowledge, lambda knowledge: knowledge.start(), lambda knowledge: knowledge.close(),
    fields=(AddedField(KNOWLEDGE_OF_CHAT, ("/chat/completions", "/v1/chat/completions")),),
    needs="--database", tools=(FILE_SEARCH,),
    prompt=lambda knowledge, parsed, caller, pool: knowledge.prompted(parsed, caller, pool),
    tables=importer("chatlm.front.knowledge.tables:KNOWLEDGE"),
    metrics=lambda knowledge, families: knowledge.metric_families(families))


# Chats that all devices of their owner have

def with_chats(front: Front) -> bool:
    return front.store is not None and CHATS.name in front.store.tables and front.settings.chats


CHAT_ROUTES: tuple[Route[ChatRoutes], ...] = (
    Route("POST", "/v1/chats/changes", OPENAI, lambda chats, http: chats.handle_change(http),
          "change records of your chats: a list of up to 500 changes"),
    Route("GET", "/v1/chats/changes", OPENAI, lambda chats, http: chats.handle_changes(http),
          "what has changed after a revision; waits until something does", query=(SINCE, WAIT), quiet=True),
    Route("GET", "/v1/chats/search", OPENAI, lambda chats, http: chats.handle_search(http),
          "your chats that have all of these words, the newest first", query=(WORDS, AFTER)),
    Route("GET", "/v1/chats/export", OPENAI, lambda chats, http: chats.handle_export(http),
          "all your chats as a file"),
    Route("POST", "/v1/chats/files", OPENAI, lambda chats, http: chats.handle_picture(http),
          "keep a picture, the body, which messages then show by its SHA-256"),
    Route("GET", "/v1/chats/files/{sha256}", OPENAI, lambda chats, http: chats.handle_show(http),
          "a picture of your chats"),
    Route("GET", "/v1/chats", OPENAI, lambda chats, http: chats.handle_list(http),
          "your chats, the newest first", query=(LIMIT, AFTER)),
    Route("DELETE", "/v1/chats", OPENAI, lambda chats, http: chats.handle_delete_all(http),
          "delete all your chats", query=(COUNT,)),
    Route("GET", "/v1/chats/{id}", OPENAI, lambda chats, http: chats.handle_chat(http),
          "a chat with its messages"),
    Route("DELETE", "/v1/chats/{id}", OPENAI, lambda chats, http: chats.handle_delete(http), "delete it"),
)
CHATS: Annex[ChatRoutes] = Annex(
    "chats", importer("chatlm.front.chats.routes:ChatRoutes.of"), CHAT_ROUTES, with_chats,
    lambda chats: chats.start(), lambda chats: chats.close(),
    tables=importer("chatlm.front.chats.tables:STEPS"), needs="--database",
    fields=(AddedField(CHAT_PLACE, ("/v1/chat/completions",)),),
    joins=lambda parsed: CHAT_PLACE.name in parsed.added,
    prepare=lambda chats, parsed: chats.prepared(parsed),
    around=lambda chats, begin, ask: chats.written(begin, ask))


# What an operator does

def load_metrics() -> Make[MetricRoutes]:
    for annex in ANNEXES:
        if annex.metrics:
            annex.load()
    make = importer("chatlm.front.server.metric_families:MetricRoutes")()
    return lambda front: make(front.metrics, [
        partial(annex.metrics, front.room(annex)) for annex in front.annexes if annex.metrics])


GET_MODELS = "download and delete models"
HUB_SEARCH = Field("search", TEXT, "also search the hub, for this")
DOWNLOAD_ROUTES: tuple[Route[DownloadRoutes], ...] = (
    Route("GET", "/models/hub", OPENAI, lambda downloads, http: downloads.handle_list(http),
          "models that can be downloaded, those in the cache, downloads, and room", query=(HUB_SEARCH,),
          operator_act=GET_MODELS),
    Route("GET", "/models/hub/{name:.+}", OPENAI, lambda downloads, http: downloads.handle_look(http),
          "what the hub has of a model: files with sizes, and whether this program can run it",
          operator_act=GET_MODELS),
    Route("GET", "/models/downloads", OPENAI, lambda downloads, http: downloads.handle_downloads(http),
          "the state of each download, then each change, as events; ends when none is running",
          operator_act=GET_MODELS),
    Route("POST", "/models/download", OPENAI, lambda downloads, http: downloads.handle_download(http),
          "download a model, or follow its download", operator_act=GET_MODELS),
    Route("POST", "/models/cancel", OPENAI, lambda downloads, http: downloads.handle_cancel(http),
          "end a download; the next one continues where it was", operator_act=GET_MODELS),
    Route("POST", "/models/delete", OPENAI, lambda downloads, http: downloads.handle_delete(http),
          "remove a downloaded model from the cache", operator_act=GET_MODELS),
    Route("POST", "/api/pull", OLLAMA, lambda downloads, http: downloads.handle_pull(http),
          "download a model as Ollama does",
          operator_act=GET_MODELS),
    Route("DELETE", "/api/delete", OLLAMA, lambda downloads, http: downloads.handle_ollama_delete(http),
          "remove a downloaded model from the cache", operator_act=GET_MODELS),
)
EXPORT_ROUTES: tuple[Route[ExportRoutes], ...] = (
    Route("GET", "/models/exports", OPENAI, lambda exports, http: exports.handle_list(http),
          "what is in the folder of --export-folder", operator_act="export models"),
    Route("POST", "/models/export", OPENAI, lambda exports, http: exports.handle_export(http),
          "write a served model as a folder for transformers, into that of --export-folder",
          operator_act="export models"),
)
METRIC_ROUTES: tuple[Route[MetricRoutes], ...] = (
    Route("GET", "/metrics", NANOCHAT, lambda metrics, http: metrics.handle_metrics(http),
          "Prometheus metrics", polled=True),
)
DOWNLOADS: Annex[DownloadRoutes] = Annex(
    "downloads", importer("chatlm.front.server.downloading:DownloadRoutes.of"), DOWNLOAD_ROUTES,
    close=lambda downloads: downloads.close())
EXPORTS: Annex[ExportRoutes] = Annex(
    "exports", importer("chatlm.front.server.exporting:ExportRoutes.of"), EXPORT_ROUTES,
    close=lambda exports: exports.close())
METRICS = Annex("metrics", load_metrics, METRIC_ROUTES)


# What an operator is told

FROM_DAY = Field("from", TEXT, "the first day (UTC), as 2026-11-24; default: 30 days before the last")
TO_DAY = Field("to", TEXT, "the last day; default: today")
USAGE_ROUTES: tuple[Route[UsageRoutes], ...] = (
    Route("GET", "/v1/usage", OPENAI, lambda usage, http: usage.handle_usage(http),
          "what the request's API key used by day and model; a key with role=admin sees all keys",
          query=(FROM_DAY, TO_DAY)),
)
USAGE: Annex[UsageRoutes] = Annex("usage", importer("chatlm.front.server.usage:UsageRoutes.of"), USAGE_ROUTES)
CONVERSATION_LOG = Annex("conversation log", importer("chatlm.front.server.conversation_log:watching"),
                         wanted=lambda front: front.settings.log_conversations,
                         watch=lambda make, request: make(request))


# Several models and training runs

COMPARE_ROUTES: tuple[Route[CompareRoutes], ...] = (
    Route("POST", "/v1/compare", OPENAI, lambda compare, http: compare.handle_compare(http),
          "answers of several models to one question, streamed, and where each diverges from the first"),
)
A_FLIP = {"type": "object", "properties": {
    "task": A_TEXT, "item": {"type": "integer"}, "correct": {"type": "boolean", "description": "in `after`"},
    "chat": {"type": "boolean"}, "texts": {"type": "array", "items": A_TEXT}}}
A_STAGE = {"type": "object", "properties": {
    "id": A_TEXT, "stage": A_TEXT, "steps": {"type": "integer"}, "latest": A_TEXT}}
RUN_PARTS = {"object": A_TEXT, "id": A_TEXT, "runs": {
    "type": "array", "items": A_STAGE, "description": "its stages as they were trained, each a run"}}
A_LIST_OF_RUNS = {"type": "object", "properties": {
    "object": A_TEXT, "data": {"type": "array", "items": {"type": "object", "properties": RUN_PARTS}}}}
A_RUN = {"type": "object", "properties": {**RUN_PARTS, "flips": {
    "type": "object", "description": "with ?before=STEP&after=STEP: items that only one of them got right",
    "properties": {"gained": {"type": "integer"}, "lost": {"type": "integer"},
                   "items": {"type": "array", "items": A_FLIP}}}, "steps": {"type": "array", "items": {
    "type": "object", "properties": {
        "model": A_TEXT, "run": A_TEXT, "stage": A_TEXT, "step": {"type": "integer"},
        "state": {"enum": ["unloaded", "loading", "ready", "failed", "removed"],
                  "description": "removed: its files are gone"},
        "weights_digest": A_TEXT, "judged": {"type": "boolean"},
        "metrics": {"type": "object", "additionalProperties": {"type": "number"},
                    "description": "what is known of the step so far"},
        "stale": A_MODEL["properties"]["stale"], "warning": A_MODEL["properties"]["warning"],
        "samples": {"type": "array", "items": {"type": "object", "properties": {
            "prompt": A_TEXT, "text": A_TEXT}}}}}}}}
RUN_ROUTES: tuple[Route[RunRoutes], ...] = (
    Route("GET", "/v1/runs", OPENAI, lambda runs, http: runs.handle_list(http),
          "the runs of --watch, by lineage",
          returns=A_LIST_OF_RUNS),
    Route("GET", "/v1/runs/{tag:.+}", OPENAI, lambda runs, http: runs.handle_run(http),
          "the steps of a run or a lineage",
          returns=A_RUN),
)
COMPARE: Annex[CompareRoutes] = Annex(
    "compare", importer("chatlm.front.server.compare:CompareRoutes.of"), COMPARE_ROUTES)
RUNS: Annex[RunRoutes] = Annex("runs", importer("chatlm.front.server.runs:RunRoutes.of"), RUN_ROUTES)

# They start in this order, and are closed in it. The `around` of one is within those of the rows after it
ANNEXES: tuple[Annex[Any], ...] = (
    BATCHES, FILES, CHATS, KNOWLEDGE, DOWNLOADS, EXPORTS, METRICS, USAGE, CONVERSATION_LOG, COMPARE, RUNS,
    TOOLS, ROUNDS, KEPT, CONVERSATIONS)
