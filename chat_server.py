#!/usr/bin/env python3
"""chat_server: a checkpoint becomes a chat site, an OpenAI-compatible API and a terminal chat.

    python chat_server.py                            serve a nanochat checkpoint, else a small default model
    python chat_server.py serve model.gguf           serve a GGUF file or a Hugging Face folder
    python chat_server.py chat                       talk to it here, in the terminal
    python chat_server.py bundle                     make one file of program, page and core: chat_server.pyz
    python chat_server.py store FOLDER               list the prefixes that --prefix-store keeps

This script has the routes and the commands. The rest is the package chatlm beside it: two houses that never
import each other, front and worker, and what both use, common.

The houses

    browser / OpenAI client / chat in the terminal
          | HTTP, server-sent events
    front house: one process, aiohttp, an event loop
          |   reads bodies, renders and tokenizes prompts, queues, routes, streams; never imports torch
          |   `-- sandboxes: processes with time and memory limits, for chat templates, schemas, large bodies
          | one socket pair per worker: typed JSON messages; one has all answers' news of one or several steps
    worker house: one process per replica of the model (per GPU; one on a CPU; or on a Ray cluster)
              loads the weights, then schedules, computes and samples step by step, turns tokens into text;
              never opens a network socket, but for processes that prove to know its secret: a front where
              Ray placed it, and ranks on other machines
          | with --tp or --pp one socket pair per other rank, TCP under torchrun: the steps to compute
    ranks     the worker is rank 0; each has a shard, and they sum in shared memory (or by NCCL or Gloo)

The rooms, each above those that it may import

    chat_server.py            routes, the handlers of answers and streams, the commands
    chatlm/terminal/          chat and generate; a server at --url
    chatlm/export/            models in other formats; to the hub
    chatlm/cli.py             the command line becomes `Settings`; bundling.py: the command `bundle`
    chatlm/front/server/      routes, connections, access, streams, metrics, the page's files
          intake/             a body becomes a request for a model; what a sandbox does
          api/                bodies in: fields and readers; answers out: encoders
          pool/               workers, queue and failover, here and on Ray
          evals/              tasks on disk, and verdicts on a model's answers to them
          admission/          a request becomes prompts that fit; the sandboxes' front end
          store/              the database
          tools/ *.py         tool servers; tasks that are watched; aiohttp at its first use
    chatlm/worker/*.py        a worker's first code and its loop; device and memory
          doctor/             `check MODEL`: what is wrong with a model
          engine/             schedule, run, postprocess; KV pages, grammars, drafts, the text of an answer
          ranks/              one model in several processes
          weights/            a model's files become tensors; families, shards, adapters
          model/              `Transformer`, and which kernels compute
          model/blocks/       `Model`: an input, layers of two blocks each, a head
          ops/                the reference of each op, and torch's tensors
          arrays/             arrays without torch
    chatlm/export/gguf/       a model as one GGUF file of a smaller type; which weights matter
    chatlm/common/hub/        which model: on this machine, on the hub, or the default one
          processes/          starting processes, torchrun, Ray
          text/               tokenizers, chat templates, reasoning and calls
          messages/           requests, events, and what crosses each pipe
          vision/             pictures in a prompt; beside these: flags, limits, errors, the log

Life of a request

    AccessLog.log > errors_to_responses > Access.guard > Front.handle_answer > Bodies.answer > read_bytes
        > Intake.opened > open_body > Intake.resolve > Intake.decode_pictures > read_native_body
        > native_messages > Answers.begin > WorkerPool.answer > PromptMaker.admit > Tokenizer.render
        > Dispatcher.dispatch > Worker.assign > Pipe.packed                                     front process
        > Inbox.obey > Engine.add > Scheduler.schedule > make_batch > EagerSteps.start
        > Transformer.forward > sample_reference > RunQueue.advance > Answer.push
        > StreamDecoder.push > AnswerReader.push > Delta > Piece > Stepped                     worker process
        > Dispatcher.deliver > Job.take > NativeEncoder.encode | OpenAIEncoder.encode | BlockEncoder.encode
        > EventStream.send                                                                      front process

docs/architecture.md has it with modules and in reading order; docs/changes.md says where to change what. A
large body is opened and read in a sandbox, by the same functions.

Glossary

    page        16 KV slots; a slot holds keys and values of one token, in all layers or in a group of them
                (`LayerGroups`). A worker's cache is a pool of pages.
    owner       who may share KV pages: one API key, or everybody where there are no keys
    client      who takes turns: one API key, or one address where there are no keys
    request     what a client asked, checked: `Request`. It may have several prompts and `n` answers to each.
    job         one answer of a request, in the front: `Job`. It survives the death of its worker.
    assignment  one answer of a request, in a worker: `Assignment`; with tokens and pages a `Sequence`,
                with text an `Answer`
    event       what the reader of an answer gets: `Accepted`, a `Piece` per step of its worker, `Finished`
    delta       what is new in an answer, in order: more of its reasoning, its text or a call: `Delta`
    chunk       the tokens of one sequence computed in one step; a step computes a batch of chunks
    draft       tokens that may come next, looked up in earlier text or forced, and checked in one step
    steps       how a backend runs a step: `EagerSteps` op by op, decode_core's recordings or CUDA graphs
    rank, stage one of the processes that compute a replica together; the ranks that have the same layers
    kernels     the ops a worker uses, each either compiled or the reference: `load_kernels`

A worker that dies is restarted, and its answers continue elsewhere from the tokens they have: the client sees
a pause, not an error. Without decode_core (csrc/) torch computes by the references, several times slower.

Exactness: the next token depends on the logits, the request's parameters, its seed and the token's position
(counter-based noise), never on the rest of the batch. With decode_core on a CPU, a row's logits are identical
to the bit alone or batched, cached or cold, drafted or not, so the same request gives the same tokens
(`row_invariant` in /stats). Elsewhere the last bits may vary with the batch; with decode_core on CUDA they do
not in steps of up to 8 tokens that all draw, so drafts are checked there.
"""

from __future__ import annotations

import signal
import sys

# Until `main`, Ctrl-C ends the program at once: nothing has to be cleaned up
STARTED = __name__ == "__main__" or sys.argv[0].endswith("chat-server")
if STARTED and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util

if importlib.util.find_spec("chatlm") is None:
    print("chat_server: the package chatlm is not beside this file. In the checkout, `python chat_server.py "
          "bundle` makes chat_server.pyz, the one file to copy", file=sys.stderr)
    sys.exit(2)
if sys.version_info < (3, 10):  # before the imports, which would fail with tracebacks
    from chatlm.common.invocation import advice_for_old_python
    print(f"chat_server needs Python 3.10 or newer, and this is {sys.version.split()[0]}"
          f"{advice_for_old_python()}", file=sys.stderr)
    sys.exit(2)

import gc

if STARTED:
    gc.disable()  # until `main`, as chatlm.common.memory.uncollected does
if __name__ == "__main__":
    from chatlm.common.streams import repair_streams
    repair_streams()  # first: a pipe to a worker must not take the number of a closed stream
    from chatlm.common.processes.start import start_worker_ahead
    start_worker_ahead(sys.argv[1:])

import asyncio
import logging
import math
import os
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence as Seq
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TYPE_CHECKING, TypeVar

from chatlm.bundling import bundle_lines, with_kept_words
from chatlm.cli import (
    as_quantize, asks_for_json, hide_api_keys, parse_command_line, parse_store_words)
from chatlm.common.config import Settings
from chatlm.common.errors import (
    ChatServerError, ConfigError, RequestError, bad_value, check_library, lack_of_memory, visible)
from chatlm.common.hub.better import MEMORY_RATE, advice_of, only_demonstrates
from chatlm.common.interrupts import raised_interrupts
from chatlm.common.log import ProgressDisplay, json_handler, log, output_as_log, start_logging, tell
from chatlm.common.memory import collect_from_now_on, give_memory_back, share_heap, tune_gc
from chatlm.common.messages.requests import PromptProgress
from chatlm.common.processes.torchrun import RankStore, serve_rank, torchrun
from chatlm.common.program import other_program, page_files, program_root
from chatlm.common.records import record
from chatlm.common.request_ids import MARK
from chatlm.common.streams import lack_of_space, never_fail, repair_streams
from chatlm.common.tiers import listed_store
from chatlm.front.aio import first_of, stop_signals, supervised
from chatlm.front.api.encode import frame, usage_body
from chatlm.front.api.encoders import answer_encoder
from chatlm.front.api.errors import public_error
from chatlm.front.api.field_types import INTEGER, SWITCH
from chatlm.front.api.fields import Field
from chatlm.front.intake.intake import Intake, loaded_tokenizer
from chatlm.front.lazy import import_web, web
from chatlm.front.pool.local_devices import check_nice, niceness
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.pool import free_memory, make_pool
from chatlm.front.server.access import Access, AccessLog, Owners, listen_on, server_urls
from chatlm.front.server.answering import Answers
from chatlm.front.server.approvals import Approvals
from chatlm.front.server.batches import BATCH_ROUTES, BatchRoutes
from chatlm.front.server.bodies import DOCUMENT_ROUTES, Bodies
from chatlm.front.server.compare import Comparison, read_contestants, with_ids
from chatlm.front.server.connections import room_for_connections, serving
from chatlm.front.server.conversations import CONVERSATION_ROUTES, ResponseKeeper
from chatlm.front.server.describe import (
    MODEL_ROUTES, ModelRoutes, alive_body, bare_id, ollama_version, openapi_document, readiness_body,
    stats_body)
from chatlm.front.server.discovery import DISCOVERY_ROUTES
from chatlm.front.server.downloading import DOWNLOAD_ROUTES, DownloadRoutes
from chatlm.front.server.exporting import EXPORT_ROUTES, ExportRoutes
from chatlm.front.server.files import FILE_ROUTES
from chatlm.front.server.history import History
from chatlm.front.server.host_names import is_loopback
from chatlm.front.server.ledger import LEDGER_ROUTES, Ledger, claim_of
from chatlm.front.server.metrics import Metrics, metrics_response
from chatlm.front.server.page import PAGE_ROUTES, PageFiles
from chatlm.front.server.recordings import GRACE_S, Recording, Recordings
from chatlm.front.server.responses import (
    REQUEST_LOG, errors_to_responses, json_response, send_whole, shows)
from chatlm.front.server.routes import Api, Route, RouteTable
from chatlm.front.server.rounds import Rounds
from chatlm.front.server.runs import RUN_ROUTES, RunRoutes
from chatlm.front.server.streams import EventStream
from chatlm.front.server.tooling import TOOL_ROUTES, ToolRoutes
from chatlm.front.store.store import Store, open_store
from chatlm.front.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Accepted, Event, Request
    from chatlm.front.api.encode import Encoder
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.intake.budget import Holding


T = TypeVar("T")


class Front:
    """The HTTP side of the server: owns the rooms whose methods handle routes, and handles answers itself.

    Handlers raise errors; the middleware `errors_to_responses` turns them into responses."""

    def __init__(self, catalogue: Catalogue, settings: Settings, store: Store | None = None,
                 toolbox: Toolbox | None = None):
        self.catalogue = catalogue
        self.settings = settings
        self.store = store
        self.access = Access(settings)
        self.owners = Owners(settings)
        self.ledger = Ledger(settings, store)
        self.bodies = Bodies(Intake(catalogue), self.owners)
        self.models = ModelRoutes(catalogue, self.bodies)
        self.page = PageFiles(page_files())
        self.runs = RunRoutes(catalogue)
        self.compared: dict[str, list[str]] = {}  # id of a running comparison -> ids of its answers
        self.recordings = Recordings()
        self.downloads = DownloadRoutes(catalogue, self.bodies)
        self.exports = ExportRoutes(catalogue, self.bodies)
        toolbox = Toolbox.of(settings) if toolbox is None else toolbox
        self.tools = ToolRoutes(toolbox, settings, catalogue, self.bodies, self.access)
        self.kept = ResponseKeeper(store, self.bodies, self.owners, settings.keep_days)
        self.metrics = Metrics(catalogue, self.ledger, toolbox)
        self.answers = Answers(settings, self.owners, self.ledger, self.metrics)
        self.approvals = Approvals(store, self.owners, settings)
        self.rounds = Rounds(self.answers, toolbox, self.approvals, settings)
        self.batches = BatchRoutes(store, catalogue, self.bodies, self.owners, self.answers, self.ledger)
        self.kept.removed = self.batches.wake_up
        self.kept.cancel = self.cancel
        self.kept.follow = self.follow
        self.history = History(catalogue, self.metrics)

    def is_id_in_use(self, request_id: str) -> bool:
        in_use = (self.answers.running, self.recordings, self.compared)
        return any(request_id in ids for ids in in_use)

    def identified(self, works: Seq[tuple[WorkerPool, Request]], is_kept: bool = False) -> list[Request]:
        """Requests with their id, client and owner, ready to be answered.

        They run in the background if the client's key is over its budget. They get a new id if their answer
        is kept, or if another request has taken their id while the body arrived."""
        record = REQUEST_LOG.get()
        if is_kept or self.is_id_in_use(record.id):
            record.id = secrets.token_hex(16)
        owner = self.owners.of_pages(record.client)
        claims = [claim_of(request, pool.context_length) for pool, request in works]
        is_over_budget = self.ledger.checked(record.client, claims)
        identified = []
        for _, request in works:
            params = replace(request.params, client=record.client, owner=owner)
            identified.append(replace(request, id=record.id, params=params,
                                      low_priority=is_over_budget or request.low_priority))
        return identified

    async def handle_answer(self, http: web.Request) -> web.StreamResponse:
        with self.bodies.holding() as holding:
            served, parsed = await self.bodies.answer(http, holding)
            pool = served.pool
            [request] = self.identified([(pool, parsed.request)], parsed.is_kept)
            parsed = replace(parsed, request=request)
            if parsed.plan:
                parsed = self.rounds.marked(parsed)
            del request  # from here on only what an answer needs is kept, not all messages and tools
            if parsed.plan:
                answering = self.rounds.begin(pool, parsed, served.name, not parsed.stream)
            else:
                answering = self.answers.begin(pool, parsed.request, served.name, not parsed.stream)
            tokenizer = None if parsed.api == "native" else loaded_tokenizer(pool)
            encoder = answer_encoder(parsed, served.name, tokenizer)
            parsed = encoder.parsed
            answering = self.kept.answering(answering, encoder)
            if nothing := encoder.without_work():
                served.model.load()
                return web.Response(body=nothing, content_type="application/json")
            if parsed.in_background:
                recording = await self.record(answering, encoder, holding)
                begun = self.kept.show_running(encoder, recording)
                if parsed.stream:
                    return await self.follow(http, recording, 0)
                return web.Response(body=begun, content_type="application/json")
            if parsed.stream:
                return await self.stream(http, answering, encoder, holding)
            async with answering as (_, events):
                body = await encoder.collect_all(events, holding.grow)
                self.note_end(encoder)
                return await send_whole(http, body)

    async def handle_text(self, http: web.Request) -> web.Response:
        with self.bodies.holding() as holding:
            _, text = await self.bodies.text(http, holding)
            return await send_whole(http, text)

    async def handle_compare(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/compare: several models answer the same question, in one stream."""
        with self.bodies.holding() as holding:
            contestants = await read_contestants(self.bodies, http, holding)
            contestants = with_ids(contestants, self.identified)
            request_id = REQUEST_LOG.get().id
            self.compared[request_id] = [one.request.id for one in contestants]
            try:
                with self.ledger.pledged([one.work for one in contestants]):
                    async with (Comparison(contestants, self.answers.begin) as comparison,
                                EventStream(http, request_id) as stream):
                        async for event in comparison.events():
                            await stream.send(frame(event))
            finally:
                del self.compared[request_id]
        return stream.response

    async def stream(self, http: web.Request, answering: AbstractAsyncContextManager, encoder: Encoder,
                     holding: Holding) -> web.StreamResponse:
        """Send an answer as it is made. A resumable one is recorded, and this client is its first
        follower."""
        if encoder.request.resumable:
            return await self.follow(http, await self.record(answering, encoder, holding), 0)
        async with self.begun(answering, encoder, holding) as (frames, _):
            async with EventStream(http, encoder.request.id, encoder) as stream:
                async for part in frames:
                    await stream.send(part)
        return stream.response

    async def record(self, answering: AbstractAsyncContextManager, encoder: Encoder,
                     holding: Holding) -> Recording:
        """Begin an answer in a task of its own, which records it."""
        request = encoder.request
        async with self.begun(answering, encoder, holding) as (frames, work):
            owner = self.owners.of_answer(request.id, request.client)
            needs_reader = not encoder.parsed.in_background
            recording = Recording(request.id, owner, request.client, encoder.lone_failure, needs_reader)
            return self.recordings.start(recording, frames, work.pop_all())

    @asynccontextmanager
    async def begun(self, answering: AbstractAsyncContextManager, encoder: Encoder,
                    holding: Holding) -> AsyncIterator[tuple[AsyncGenerator[bytes, None], AsyncExitStack]]:
        """Yield the frames of an answer once it is accepted, and what ends its work.

        holding: the memory that the request is accounted for; a recording keeps it after the client has
        left."""
        async with AsyncExitStack() as work:
            work.enter_context(holding.hand_over())
            accepted, events = await work.enter_async_context(answering)
            frames = self.frames(accepted, events, encoder)
            await work.enter_async_context(aclosing(frames))
            yield frames, work

    async def frames(self, accepted: Accepted, events: AsyncIterator[Event],
                     encoder: Encoder) -> AsyncGenerator[bytes, None]:
        """Encode an answer as frames. A failure after the headers is one error frame, not a normal end."""
        try:
            yield encoder.start(accepted)
            async for event in events:
                if isinstance(event, PromptProgress):
                    yield encoder.progress(event)
                else:
                    yield encoder.encode(event)
            self.note_end(encoder)
        except Exception as error:
            REQUEST_LOG.get().note = f"failed: {error}"
            yield encoder.failed(public_error(error))

    async def follow(self, http: web.Request, recording: Recording, start: int) -> web.StreamResponse:
        """Send a recording as it grows. If the answer is still running GRACE_S after its last reader has
        left, cancel it."""
        def cancel_unread():
            if recording.needs_reader and not recording.followers and not recording.ended:
                self.cancel(recording.id)

        recording.followers += 1
        try:
            async with (EventStream(http, recording.id, patient=True) as stream,
                        aclosing(recording.follow(start)) as parts):
                async for part in parts:
                    await stream.send(part)
            return stream.response
        finally:
            recording.followers -= 1
            if not recording.ended:
                asyncio.get_running_loop().call_later(GRACE_S, cancel_unread)

    async def handle_stream(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/streams/{id}: send a recording from event ?from=N on, or from the event after
        Last-Event-ID, which an EventSource sends when it reconnects."""
        request_id = bare_id(http.match_info["id"])
        last = http.headers.get("Last-Event-ID", "")
        wanted = http.query.get("from", "0")
        if not re.fullmatch("[0-9]{1,15}", last or wanted):
            raise bad_value("Last-Event-ID" if last else "from", last or wanted, "the number of an event")
        owner = self.owners.of_answer(request_id, REQUEST_LOG.get().client)
        recording = self.recordings.find(request_id, owner)
        start = int(last) + 1 if last else int(wanted)
        recording.check_kept(start)
        if recording.ended and start >= recording.length:
            return web.Response(status=204)  # tells an EventSource to stop reconnecting
        return await self.follow(http, recording, start)

    def note_end(self, encoder: Encoder):
        """Note for the access log how many tokens all choices had and why they ended."""
        counts = usage_body(encoder.usage())
        reasons = ",".join(sorted({choice.done.reason for choice in encoder.choices if choice.done}))
        record = REQUEST_LOG.get()
        record.note = f"{counts['prompt_tokens']}+{counts['completion_tokens']} tokens {reasons}"
        record.counts = counts | {"reason": reasons}

    async def handle_cancel(self, http: web.Request) -> web.Response:
        """POST /v1/cancel/{id}: stop an answer, or all answers of a comparison.

        The id is in the header X-Request-Id and in an answer's chunks; with -1 and so on behind it, it is
        that of one answer of a comparison. With ?reasoning=true the answers only stop thinking."""
        request_id = bare_id(http.match_info["id"])
        client = REQUEST_LOG.get().client
        only_thinking = ONLY_THINKING.read(http.query.get("reasoning", "false"))
        ids = [one for one in self.answers_of(request_id)
               if self.answers.running.get(one) == self.owners.of_answer(one, client)]
        not_running = RequestError("no answer with this id is running", status=404, code="not_running",
                                   param="id")
        if not ids:
            raise not_running
        if only_thinking:
            ended = [await self.catalogue.end_thinking(self.rounds.running_id(one)) for one in ids]
            if not any(ended):
                raise RequestError("the answer is not thinking now", status=409, code="not_thinking",
                                   param="id")
            return json_response({"id": request_id, "cancelled": "reasoning"})
        cancelled = [self.cancel(one) for one in ids]
        if not any(cancelled):
            raise not_running
        return json_response({"id": request_id, "cancelled": True})

    def answers_of(self, request_id: str) -> Seq[str]:
        """The ids of the answers that a client means by an id."""
        if request_id in self.compared:
            return self.compared[request_id]
        parts = self.compared.get(request_id.rpartition("-")[0], ())
        named = [one for one in parts if one.replace(MARK, "-") == request_id]
        return [request_id] if request_id in self.answers.running else named or [request_id]

    def cancel(self, request_id: str) -> bool:
        """Stop an answer, and the calls of tools that it waits for. False if it does not run."""
        running_id = self.rounds.running_id(request_id)
        has_tools = self.rounds.cancel(request_id)
        return self.catalogue.cancel(running_id) or has_tools

    async def handle_metrics(self, http: web.Request) -> web.Response:
        return await metrics_response(self.metrics)

    async def handle_bare_prefix(self, http: web.Request) -> web.Response:
        """Redirect /chat to /chat/, so that the page's relative URLs work."""
        return web.Response(status=308, headers={"Location": self.settings.prefix + "/"})


ONLY_THINKING = Field("reasoning", SWITCH, "true: end the reasoning of the answer, which goes on with its "
                                           "content; 409 if it is not thinking now")
FIRST_EVENT = Field("from", INTEGER, "the number of the first event", 0, math.inf)
RETRIEVAL = (  # (what a request gets, the routes for it): one handler answers them all
    ("a vector for each input, from the model's final hidden states", "/v1/embeddings /api/v0/embeddings"),
    ("the same in the format of Text Embeddings Inference", "/embed"),
    ("documents by how well they suit a query", "/v1/rerank /rerank /v2/rerank"),
    ("as above, in llama-server's format", "/reranking /v1/reranking"),
    ("scores of pairs of texts", "/v1/score /score"))
ANSWER_ROUTES: tuple[Route[Front], ...] = (
    Route("POST", "/chat/completions", Api.NANOCHAT, Front.handle_answer,
          "an answer in nanochat's format, streamed; with `model` as /v1/chat/completions"),
    Route("POST", "/v1/chat/completions", Api.OPENAI, Front.handle_answer,
          "an answer in OpenAI's format, streamed or whole"),
    Route("POST", "/v1/completions", Api.OPENAI, Front.handle_answer,
          "the continuation of a text, streamed or whole"),
    Route("POST", "/infill", Api.OPENAI, Front.handle_answer,
          "the text between two others, in llama-server's format, streamed or whole"),
    Route("POST", "/v1/responses", Api.OPENAI, Front.handle_answer,
          "an answer in the format of OpenAI's Responses, streamed or whole"),
    Route("POST", "/v1/messages", Api.ANTHROPIC, Front.handle_answer,
          "an answer in the format of Anthropic's Messages, streamed or whole"),
    Route("POST", "/v1/messages/count_tokens", Api.ANTHROPIC, Front.handle_text,
          "how many tokens such a request has"),
    Route("POST", "/api/chat", Api.OLLAMA, Front.handle_answer, "an answer in Ollama's format"),
    Route("POST", "/api/generate", Api.OLLAMA, Front.handle_answer, "an answer in Ollama's format"),
    # behind Ollama's: an unknown route below /api is taken for one of the first row's API
    Route("POST", "/api/v0/chat/completions", Api.OPENAI, Front.handle_answer,
          "as /v1/chat/completions, for clients of LM Studio"),
    Route("POST", "/api/v0/completions", Api.OPENAI, Front.handle_answer,
          "as /v1/completions, for clients of LM Studio"),
    *(Route("POST", path, Api.OPENAI, Front.handle_answer, doc)
      for doc, paths in RETRIEVAL for path in paths.split()),
    Route("POST", "/api/embed", Api.OLLAMA, Front.handle_answer, "embeddings in Ollama's format"),
    Route("POST", "/api/embeddings", Api.OLLAMA, Front.handle_answer, "one embedding, for older clients"),
    Route("POST", "/v1/compare", Api.OPENAI, Front.handle_compare,
          "answers of several models to one question, streamed, and where each diverges from the first"),
    Route("POST", "/tokenize", Api.OPENAI, Front.handle_text, "text to token ids"),
    Route("POST", "/detokenize", Api.OPENAI, Front.handle_text, "token ids to text"),
    Route("POST", "/apply-template", Api.OPENAI, Front.handle_text,
          "a conversation to the text of its prompt"),
    Route("POST", "/v1/cancel/{id}", Api.OPENAI, Front.handle_cancel,
          "stop an answer by the X-Request-Id of its response", query=(ONLY_THINKING,)),
    Route("GET", "/v1/streams/{id}", Api.OPENAI, Front.handle_stream,
          "a resumable stream, from event ?from=N or after Last-Event-ID", query=(FIRST_EVENT,)),
)
STATE_ROUTES: tuple[Route[Front], ...] = (
    Route("GET", "/api/version", Api.OLLAMA, shows(lambda front, bound: ollama_version()),
          "the version of Ollama whose routes this server has, and its own"),
    Route("GET", "/health", Api.NANOCHAT, shows(lambda front, bound: front.catalogue.health()),
          "200 when ready, else 503 with the stage", open=True, polled=True),
    Route("GET", "/livez", Api.NANOCHAT, shows(lambda front, bound: alive_body()),
          "200 as long as the event loop runs", open=True, polled=True),
    Route("GET", "/readyz", Api.NANOCHAT, shows(lambda front, bound: readiness_body(front.catalogue)),
          "200 when a request would be served now, else 503 with the reason", open=True, polled=True),
    Route("GET", "/stats", Api.NANOCHAT,
          shows(lambda front, bound: stats_body(front.catalogue, front.models.visible(bound))),
          "models, workers, KV pages, speed, kernels, queue", polled=True),
    Route("GET", "/stats/history", Api.NANOCHAT,
          shows(lambda front, bound: front.history.body(front.models.visible(bound))),
          "samples of these since the server started"),
    Route("GET", "/metrics", Api.NANOCHAT, Front.handle_metrics, "Prometheus metrics", polled=True),
    Route("GET", "/openapi.json", Api.NANOCHAT,
          shows(lambda front, bound: openapi_document(ROUTES, front.settings)), "this description"),
)


@record
class RoomRoutes(Generic[T]):
    """The routes of one room, and how to find the object whose methods handle them. The type checker refuses
    handlers that are methods of another class."""

    of: Callable[[Front], T]
    rows: tuple[Route[T], ...]

    def handlers(self, front: Front) -> Iterator[tuple[Route[T], Callable]]:
        """Each route, and the function that aiohttp calls for it."""
        room = self.of(front)
        for row in self.rows:
            yield row, partial(row.handler, room)


ROOMS = (
    RoomRoutes(lambda front: front.page, PAGE_ROUTES),
    RoomRoutes(lambda front: front, ANSWER_ROUTES),
    RoomRoutes(lambda front: front.models, MODEL_ROUTES),
    RoomRoutes(lambda front: front.models, DISCOVERY_ROUTES),
    RoomRoutes(lambda front: front.downloads, DOWNLOAD_ROUTES),
    RoomRoutes(lambda front: front.exports, EXPORT_ROUTES),
    RoomRoutes(lambda front: front.tools, TOOL_ROUTES),
    RoomRoutes(lambda front: front.runs, RUN_ROUTES),
    RoomRoutes(lambda front: front.bodies, DOCUMENT_ROUTES),
    RoomRoutes(lambda front: front.batches.files, FILE_ROUTES),
    RoomRoutes(lambda front: front.batches, BATCH_ROUTES),
    RoomRoutes(lambda front: front.kept.routes, CONVERSATION_ROUTES),
    RoomRoutes(lambda front: front.ledger, LEDGER_ROUTES),
    RoomRoutes(lambda front: front, STATE_ROUTES),
)
ROUTES = tuple(row for room in ROOMS for row in room.rows)


def create_app(catalogue: Catalogue, settings: Settings, store: Store | None = None,
               toolbox: Toolbox | None = None) -> web.Application:
    front = Front(catalogue, settings, store, toolbox)
    access_log = AccessLog(RouteTable(ROUTES, settings.prefix), front.is_id_in_use, front.metrics)
    errors = partial(errors_to_responses, home=settings.prefix + "/")
    middlewares: list[Any] = [partial(access_log.log), errors, partial(front.access.guard)]
    app = web.Application(middlewares=list(map(web.middleware, middlewares)))
    app.on_response_prepare.append(front.access.set_headers)
    app.on_startup.extend((front.ledger.open, front.approvals.open, front.history.open, front.tools.start,
                           front.batches.start))
    closing = (front.history, front.batches, front.recordings, front.downloads, front.exports, front.tools,
               front.kept, front.ledger, store)
    for part in filter(None, closing):
        app.on_cleanup.append(lambda app, part=part: part.close())
    for room in ROOMS:
        for route, handler in room.handlers(front):
            paths = [route.path]
            if not route.path.endswith(("/", ":.+}")):
                paths.append(route.path + "/")
            for path in paths:
                if route.method == "GET":
                    app.router.add_get(settings.prefix + path, handler)  # adds HEAD too
                else:
                    app.router.add_route(route.method, settings.prefix + path, handler)
    if settings.prefix:
        app.router.add_get(settings.prefix, front.handle_bare_prefix)
    return app


def announce(catalogue: Catalogue, settings: Settings, port: int):
    """Tell the operator what is served, and where."""
    path = f"{settings.prefix}/" if settings.prefix else ""
    urls = [f"  {url}{path}" for url in server_urls(settings.host, port)]
    for line in catalogue.describe():
        tell(line, file=sys.stdout)
    if not settings.keys and not is_loopback(settings.host):
        tell("Warning: anyone who can reach this port can use the server; --api-key KEY or --host 127.0.0.1 "
             "prevents that", logging.WARNING, sys.stdout)
    for line in ("Application startup complete", *urls):
        tell(line, file=sys.stdout)


async def advise(catalogue: Catalogue):
    """Name a better model than the default one, once nothing is answered: the memory is measured for it."""
    pool = catalogue.pools[0] if catalogue.pools else None
    if pool is None or not only_demonstrates(pool.model_name):
        return
    while pool.dispatcher.running:
        await asyncio.sleep(1.0)
    if all(worker.device.startswith("cpu") for worker in pool.workers):
        await asyncio.to_thread(MEMORY_RATE.measure)
    if advice := advice_of(pool.model_name, free_memory(pool)):
        tell(advice, file=sys.stdout)


def warn_of_another_program():
    """If there are two chatlm packages that differ, log which one runs: each may have half of an edit."""
    with suppress(OSError):
        if other := other_program():
            log.warning("the chatlm in %s runs; the one in %s differs", program_root(), other)


async def serve_forever(settings: Settings, catalogue: Catalogue | None = None) -> int:
    """Listen, load, serve until a signal, drain, and stop. Returns the exit status.

    Raises ConfigError if the server cannot start."""
    toolbox = Toolbox.of(settings)
    with listen_on(settings.host, settings.port) as listener:
        drain, now = stop_signals()
        if settings.serves_many and not catalogue:
            from chatlm.front.evals.step_work import StepWork  # here, because few servers need it
            from chatlm.front.pool.many import ManyModels
            catalogue = ManyModels(settings, step_work=StepWork)
        catalogue = catalogue or Catalogue(settings, make_pool(settings))
        progress = ProgressDisplay()
        catalogue.on_progress = progress
        try:  # the workers start while a thread imports aiohttp (0.1 s)
            await catalogue.start()
            await asyncio.to_thread(import_web)
            store = await open_store(settings)
        except Exception:
            await catalogue.close()
            raise
        room = room_for_connections(settings)
        routes = RouteTable(ROUTES, settings.prefix)
        async with serving(create_app(catalogue, settings, store, toolbox), listener, room, routes.is_polled):
            try:
                catalogue.get_ahead()
                if await first_of(catalogue.wait_ready(), drain.wait()) == 0:
                    progress.close()
                    await asyncio.to_thread(warn_of_another_program)
                    announce(catalogue, settings, listener.getsockname()[1])
                    await asyncio.to_thread(give_memory_back)
                    advising = asyncio.create_task(supervised(
                        "naming a better model", partial(advise, catalogue)))
                    await drain.wait()
                    advising.cancel()
                    tell("Stopping: running answers may finish; a second signal stops now.")
                    await first_of(catalogue.drain(settings.drain_timeout), now.wait())
            finally:
                progress.close()
                await catalogue.close()
    return 2 if store and store.damaged else 0


def run_command(settings: Settings) -> int:
    """Run a command that has Settings. A process that torchrun started as rank 1 or higher computes that rank
    instead. Returns the exit status."""
    check_library("aiohttp", "chat_server")
    if not settings.url:  # a model is loaded here
        check_library("numpy", "chat_server")
    start = torchrun(settings)
    status = 1
    if start and settings.serves_many:
        raise ConfigError("several models under torchrun: its ranks compute one model")
    if start and start.rank:
        return serve_rank(settings, start)
    if (nice := niceness(settings)) is not None:
        check_nice(nice)
    try:
        if settings.command == "serve":
            command = serve_forever
        else:  # import this command's module only
            modules = {"generate": "chat", "compare": "side_by_side", "score": "side_by_side",
                       "eval": "evaluate"}
            functions = {"eval": "evaluate"}
            name = settings.command
            module = importlib.import_module(f"chatlm.terminal.{modules.get(name, name)}")
            command = getattr(module, functions.get(name, name))
        status = asyncio.run(command(settings))
        return status
    finally:
        if start:  # let the other ranks end too; this imports torch
            with suppress(RuntimeError):
                RankStore().put("over", [time.time(), status])


@raised_interrupts()
def main(argv: Seq[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 (no answer), 2 (ConfigError), 130 (Ctrl-C)."""
    if STARTED:
        collect_from_now_on()
    argv = with_kept_words(sys.argv[1:] if argv is None else argv)
    keys_given = any(word.partition("=")[0] == "--api-key" for word in argv)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's own command line shows the keys
    hidden = keys_given and hide_api_keys() and not by_torchrun
    repair_streams()
    try:
        argv = as_quantize(argv)
        lines = None  # of a command that has no Settings
        if argv[:1] == ["bundle"]:
            lines = bundle_lines(argv[1:])
        elif argv[:1] == ["store"]:
            lines = listed_store(*parse_store_words(argv[1:]))
        elif argv[:1] == ["export"]:
            from chatlm.export.command import export_lines  # here, because it imports the worker's loaders
            lines = export_lines(argv[1:])
        elif argv[:1] == ["push"]:
            from chatlm.export.push import push_lines
            lines = push_lines(argv[1:])
        if lines is not None:
            for line in lines:
                print(visible(line))
            return 0
        settings = parse_command_line(argv, os.environ)
        os.environ.pop("CHAT_SERVER_API_KEY", None)  # no process that we start may read it
        start_logging(settings)
        if keys_given:
            log.warning("--api-key: other users of this machine %s read the key in the process list; "
                        "use CHAT_SERVER_API_KEY or --api-key-file instead",
                        "could until now" if hidden else "can")
        if settings.command == "serve":
            tune_gc()
            share_heap()
            never_fail("stdout")
        with output_as_log():
            return run_command(settings)
    except BrokenPipeError:  # as in `generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        error = lack_of_memory(error) or lack_of_space(error) or error
        if not logging.root.handlers and asks_for_json(argv, os.environ):  # the flags were wrong
            start_logging(Settings(log_format="json"))
        logging.shutdown()  # so that the reason is the last line
        if not isinstance(error, ChatServerError):
            if not json_handler():
                raise
            log.critical("unexpected error", exc_info=error)
            return 1
        wrong_use = isinstance(error, ConfigError)
        tell(f"chat_server: {'' if wrong_use else 'error: '}{error}", logging.ERROR)
        return 2 if wrong_use else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
