"""The routes of vector stores, as OpenAI has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, bad_value, invalid
from chatlm.common.jsontext import dump
from chatlm.front.annexes.knowledge import stores
from chatlm.front.annexes.knowledge.asking import Asker
from chatlm.front.annexes.knowledge.embedding import Embedders
from chatlm.front.annexes.knowledge.fields import BEFORE, PAGE, STATUS
from chatlm.front.annexes.knowledge.file_search import FileSearch
from chatlm.front.annexes.knowledge.filters import read_filter
from chatlm.front.annexes.knowledge.following import Following
from chatlm.front.annexes.knowledge.ingest import Ingest
from chatlm.front.annexes.knowledge.prompting import Prompting
from chatlm.front.annexes.knowledge.search import Search, Terms
from chatlm.front.annexes.knowledge.stores import VectorStore, Wanted
from chatlm.front.api.fields import as_list
from chatlm.front.api.list_fields import AFTER, LIMIT, ORDER
from chatlm.front.server.metrics import histogram
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.stored_lists import (
    now_s, number_in, query_value, require_store, send_page, send_parts, take_room)
from chatlm.front.store import quota
from chatlm.front.store.pages import PAGE_BYTES, Listed, ListPage, page_of

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.front.api.additions import ToolCall
    from chatlm.front.front import Front
    from chatlm.front.intake.opened_body import Caller
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.access import Owners
    from chatlm.front.server.answering import Answers
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.server.ledger import Ledger
    from chatlm.front.store.store import Parts, Store
    from chatlm.front.tools.results import ToolResult


POLL_MS = 500            # until a poller asks again
BATCH_BODY_BYTES = 1 << 20
ROW_BYTES = 1024         # that a new row takes at most besides its texts
AUTO = {"type": "auto"}


class ListQuery(NamedTuple):
    """What the query of a list says."""

    limit: int
    after: str
    before: str
    ascending: bool

    @classmethod
    def of(cls, http: web.Request) -> ListQuery:
        return cls(query_value(http, LIMIT, 20), query_value(http, AFTER, ""), query_value(http, BEFORE, ""),
                   query_value(http, ORDER, "desc") == "asc")

    def page(self, rows) -> ListPage:
        """The first rows; those that were read backwards in their order."""
        page = page_of(rows, self.limit)
        return ListPage(page.rows[::-1], page.more) if self.before and not self.after else page


class KnowledgeRoutes:
    """The handlers, and the task that ingests files while the server runs."""

    def __init__(self, store: Store | None, catalogue: Catalogue, bodies: Bodies, owners: Owners,
                 answers: Answers, ledger: Ledger, search: Search | None):
        """search: None without a database."""
        self.store = store
        self.search = search
        self.prompting = Prompting(store, search) if store and search else None
        self.file_search = FileSearch(
            store, search, catalogue.settings.tool_result) if store and search else None
        self.bodies = bodies
        self.embedders = Embedders(catalogue, owners, answers, ledger)
        self.ingest = Ingest(store, catalogue, bodies.intake, owners, self.embedders,
                             ledger) if store else None
        folders = catalogue.settings.knowledge
        self.following = Following(store, folders, self.wake_up) if store else None

    @classmethod
    def of(cls, front: Front) -> KnowledgeRoutes:
        return cls(front.store, front.catalogue, front.bodies, front.owners, front.answers, front.ledger,
                   Search.of(front) if front.store else None)

    async def start(self):
        if self.ingest:
            self.ingest.start()
        if self.following:
            await self.following.start()

    async def close(self):
        if self.following:
            await self.following.close()
        if self.ingest:
            await self.ingest.close()
        if self.search:
            await self.search.close()

    def wake_up(self):
        """There is work."""
        if self.ingest:
            self.ingest.wake_up()

    def metric_families(self, families: Any) -> Iterator[Any]:
        """What stores have, and how long searches took. families: the module
        prometheus_client.metrics_core."""
        if not (self.ingest and self.search):
            return
        gauge = families.GaugeMetricFamily
        files = gauge("chat_server_ingest_files", "files of vector stores by their status", labels=["status"])
        for status in stores.STATUSES:
            files.add_metric([status], self.ingest.totals.get(status, 0))
        yield files
        yield gauge("chat_server_store_bytes", "bytes of the passages and vectors of vector stores",
                    self.ingest.totals.get("bytes", 0))
        yield histogram(families, "search", "time that a search of vector stores took, with the question's "
                        "vector and a reranker", [([], self.search.durations)])

    # stores

    async def handle_create(self, http: web.Request) -> web.Response:
        store = require_store(self.store)
        owner = self.bodies.owner
        client = REQUEST_LOG.get().client
        values = await self.bodies.small(http)
        chunking = checked_strategy(values.get("chunking_strategy") or AUTO)
        model = values.get("embedding_model", "")
        self._check_embedder(model)
        wanted = [Wanted(file, {}, chunking, f"file_ids[{index}]")
                  for index, file in enumerate(unique(values.get("file_ids", ()), "file_ids"))]
        size = len(dump(values))

        def create(connection) -> Parts[dict]:
            quota.check(connection, owner, size + ROW_BYTES * (1 + len(wanted)), client=client)
            yield from stores.check_files(connection, wanted, owner)
            now = now_s()
            made = stores.create_store(connection, owner, client, values, model, now)
            yield from stores.add_files(connection, made, wanted, client, now)
            return stores.store_of_owner(connection, made.id, owner).body(now)
        body = await store.run(create, adds_bytes=size + ROW_BYTES * (1 + len(wanted)), client=client)
        self.wake_up()
        return json_response(body)

    def _check_embedder(self, model: str):
        """Raise RequestError if nothing here embeds texts, or not this model."""
        self.embedders.choose(model, REQUEST_LOG.get().bound)

    async def handle_list(self, http: web.Request) -> web.StreamResponse:
        query = ListQuery.of(http)
        owner = self.bodies.owner
        now = now_s()

        def read(connection) -> ListPage:
            rows = stores.stores_of_owner(connection, owner, query.after, query.before, query.ascending)
            return query.page(Listed(row.id, dump(row.body(now))) for row in rows)
        return await send_page(http, self.bodies, await self._stored(read))

    async def _stored(self, work: Callable[[Any], Any], adds_bytes: int = 0) -> Any:
        """Do some work in the database, in the turn of this request's client."""
        return await require_store(self.store).run(work, adds_bytes, REQUEST_LOG.get().client)

    async def _on_store(self, http: web.Request, work: Callable[[Any, VectorStore, int], Any],
                        usable: bool = False, adds_bytes: int = 0, changes: bool = True) -> Any:
        """Do some work on the store that a path names, of this owner. usable: one that has expired is
        refused; changes: one that follows a folder. `work` may be long, as for `Store.run`."""
        name = http.match_info["id"]
        owner = self.bodies.owner
        client = REQUEST_LOG.get().client

        def run(connection):
            now = now_s()
            find = partial(stores.usable_store, now=now) if usable else stores.store_of_owner
            found = find(connection, name, owner)
            if changes:
                found.check_open()
            if adds_bytes:
                quota.check(connection, found.owner, adds_bytes, client=client)
            return work(connection, found, now)
        return await self._stored(run, adds_bytes)

    async def handle_store(self, http: web.Request) -> web.Response:
        return polled(await self._on_store(http, lambda connection, store, now: store.body(now),
                                            changes=False))

    async def handle_update(self, http: web.Request) -> web.Response:
        require_store(self.store)
        values = await self.bodies.small(http)

        def update(connection, store: VectorStore, now: int) -> dict:
            stores.update_store(connection, store, values, now)
            return stores.store_of_owner(connection, store.id, store.owner).body(now)
        return json_response(await self._on_store(http, update, usable=True, adds_bytes=len(dump(values))))

    async def handle_delete(self, http: web.Request) -> web.Response:
        def delete(connection, store: VectorStore, now: int) -> str:
            stores.delete_store(connection, store)
            return store.id
        name = await self._on_store(http, delete)
        self.wake_up()
        return json_response({"id": name, "object": "vector_store.deleted", "deleted": True})

    # files

    async def handle_add(self, http: web.Request) -> web.Response:
        require_store(self.store)
        values = await self.bodies.small(http)
        strategy = values.get("chunking_strategy")
        chunking = strategy and checked_strategy(strategy)
        client = REQUEST_LOG.get().client

        def add(connection, store: VectorStore, now: int) -> dict:
            wanted = Wanted(values["file_id"], values.get("attributes", {}),
                            chunking or stores.read_json(store.chunking), "file_id")
            file = stores.add_file(connection, store, wanted, client, now)
            stores.note_use(connection, store, now)
            return file.body(store.id)
        self._check_embedder((await self._found(http)).model)
        body = await self._on_store(http, add, usable=True, adds_bytes=ROW_BYTES + len(dump(values)))
        self.wake_up()
        return polled(body)

    async def _found(self, http: web.Request) -> VectorStore:
        return await self._on_store(http, lambda connection, store, now: store, usable=True)

    async def handle_files(self, http: web.Request) -> web.StreamResponse:
        query = ListQuery.of(http)
        status = query_value(http, STATUS, "")

        def read(connection, store: VectorStore, now: int) -> ListPage:
            return self._files(connection, store, query, status)
        return await send_page(http, self.bodies, await self._on_store(http, read, changes=False))

    @staticmethod
    def _files(connection, store: VectorStore, query: ListQuery, status: str,
               batch: int | None = None) -> ListPage:
        rows = stores.files_of_store(connection, store, query.after, query.before, query.ascending, status,
                                     batch)
        return query.page(Listed(row.file, dump(row.body(store.id))) for row in rows)

    async def handle_file(self, http: web.Request) -> web.Response:
        name = http.match_info["file"]
        return polled(await self._on_store(http, lambda connection, store, now: stores.file_of_store(
            connection, store, name).body(store.id), changes=False))

    async def handle_change(self, http: web.Request) -> web.Response:
        require_store(self.store)
        name = http.match_info["file"]
        values = await self.bodies.small(http)

        def change(connection, store: VectorStore, now: int) -> dict:
            file = stores.file_of_store(connection, store, name)
            stores.set_attributes(connection, file, values["attributes"])
            return stores.file_of_store(connection, store, name).body(store.id)
        return json_response(await self._on_store(http, change, usable=True, adds_bytes=len(dump(values))))

    async def handle_remove(self, http: web.Request) -> web.Response:
        name = http.match_info["file"]

        def remove(connection, store: VectorStore, now: int):
            stores.remove_file(connection, stores.file_of_store(connection, store, name))
        await self._on_store(http, remove)
        self.wake_up()
        return json_response({"id": name, "object": "vector_store.file.deleted", "deleted": True})

    async def handle_content(self, http: web.Request) -> web.StreamResponse:
        """The passages of a file, as texts. A page has a few megabytes at most."""
        name = http.match_info["file"]
        token = query_value(http, PAGE, "0")
        begin = number_in(token)
        if not isinstance(begin, int):
            raise bad_value("page", token, "next_page of the page before")

        def read(connection, store: VectorStore, now: int) -> tuple[dict, list[bytes], int | None]:
            file = stores.file_of_store(connection, store, name)
            parts = list[bytes]()
            size = 0
            for place, text, start, page, heading in stores.passages_after(connection, file, begin):
                parts.append(dump({"type": "text", "text": text, "start": start, "page": page,
                                   "heading": heading}))
                size += len(parts[-1])
                if size > PAGE_BYTES:
                    return file.body(store.id), parts, place + 1 if place + 1 < file.passages else None
            return file.body(store.id), parts, None
        file, parts, following = await self._on_store(http, read, changes=False)
        head = dump({"object": "vector_store.file_content.page", "file_id": file["id"],
                     "filename": file["filename"], "attributes": file["attributes"],
                     "has_more": following is not None,
                     "next_page": None if following is None else str(following)})
        with self.bodies.holding() as holding:
            await take_room(holding, sum(map(len, parts)))
            between = [piece for part in parts for piece in (b", ", part)][1:]
            return await send_parts(http, [head[:-1] + b', "data": [', *between, b"]}"])

    # searching

    async def handle_search(self, http: web.Request) -> web.Response:
        require_store(self.store)
        values = await self.bodies.small(http)
        query = values["query"]
        ranking = values.get("ranking_options", {})
        filters = values.get("filters")
        terms = Terms(values.get("max_num_results", 10), read_filter(filters) if filters else None,
                      ranking.get("score_threshold", 0.0), ranking.get("ranker") != "none")
        store = await self._on_store(http, noted, usable=True, changes=False)
        record = REQUEST_LOG.get()
        asker = Asker(record.client, self.bodies.owners.of_pages(record.client))
        assert self.search
        found = await self.search.find([store], as_list(query), asker, terms)
        if found.words_only:
            record.headers["X-Search"] = "words"
        if values.get("rewrite_query"):
            others = record.headers.get("X-Ignored-Fields")
            record.headers["X-Ignored-Fields"] = f"{others}, rewrite_query" if others else "rewrite_query"
        data = [{"file_id": hit.file, "filename": hit.filename, "score": hit.score,
                 "attributes": hit.attributes, "content": [{"type": "text", "text": hit.text}],
                 "heading": hit.heading, "page": hit.page, "start": hit.start} for hit in found.hits]
        return json_response({"object": "vector_store.search_results.page", "search_query": as_list(query),
                              "data": data, "has_more": False, "next_page": None,
                              "passages": found.passages})

    async def prompted(self, parsed: ParsedBody, caller: Caller, pool: WorkerPool) -> ParsedBody:
        """A body with the passages that it asks to be read, or whose stores the model may search."""
        assert self.prompting and self.file_search  # without a database such a body is refused
        parsed = await self.file_search.checked(parsed, caller)
        return await self.prompting.prompted(parsed, caller, pool)

    async def searched(self, call: ToolCall) -> ToolResult:
        """The result of a call of file_search."""
        assert self.file_search
        return await self.file_search.call(call)

    # batches of files

    async def handle_begin_batch(self, http: web.Request) -> web.Response:
        require_store(self.store)
        with self.bodies.holding() as holding:
            values = await self.bodies.fields(http, holding, BATCH_BODY_BYTES)
        self._check_embedder((await self._found(http)).model)
        client = REQUEST_LOG.get().client

        def begin(connection, store: VectorStore, now: int) -> Parts[dict]:
            wanted = wanted_of(values, stores.read_json(store.chunking))
            batch = yield from stores.create_batch(connection, store, wanted, client, now)
            stores.note_use(connection, store, now)
            return stores.shown_batch(connection, store, batch)
        count = len(values.get("file_ids") or values.get("files") or ())
        body = await self._on_store(http, begin, usable=True,
                                    adds_bytes=ROW_BYTES * (count + 1) + len(dump(values)))
        self.wake_up()
        return polled(body)

    async def handle_batch(self, http: web.Request) -> web.Response:
        name = http.match_info["batch"]
        return polled(await self._on_store(http, lambda connection, store, now: stores.shown_batch(
            connection, store, stores.batch_of_store(connection, store, name)), changes=False))

    async def handle_cancel(self, http: web.Request) -> web.Response:
        name = http.match_info["batch"]

        def cancel(connection, store: VectorStore, now: int) -> Parts[dict]:
            yield from stores.cancel_batch(connection, stores.batch_of_store(connection, store, name))
            return stores.shown_batch(connection, store, stores.batch_of_store(connection, store, name))
        body = await self._on_store(http, cancel)
        self.wake_up()
        return polled(body)

    async def handle_batch_files(self, http: web.Request) -> web.StreamResponse:
        name = http.match_info["batch"]
        query = ListQuery.of(http)
        status = query_value(http, STATUS, "")

        def read(connection, store: VectorStore, now: int) -> ListPage:
            batch = stores.batch_of_store(connection, store, name)
            return self._files(connection, store, query, status, batch.number)
        return await send_page(http, self.bodies, await self._on_store(http, read, changes=False))


def noted(connection, store: VectorStore, now: int) -> int:
    """The number of a store that is used now."""
    stores.note_use(connection, store, now)
    return store.number


def polled(body: dict) -> web.Response:
    """A response that says when to ask again, while its object is not ready."""
    response = json_response(body)
    if body["status"] == "in_progress":
        response.headers["openai-poll-after-ms"] = str(POLL_MS)
    return response


def checked_strategy(strategy: Mapping[str, Any], param: str = "chunking_strategy") -> dict[str, Any]:
    """A strategy as it is stored. Raises RequestError if more than half overlaps."""
    if strategy["type"] == "auto":
        return {"type": "auto"}
    tokens = int(strategy["static"]["max_chunk_size_tokens"])
    overlap = int(strategy["static"]["chunk_overlap_tokens"])
    if overlap > tokens // 2:
        raise invalid(param, f"{param}: chunk_overlap_tokens is {overlap}, more than half of "
                             f"max_chunk_size_tokens, which is {tokens}")
    return {"type": "static", "static": {"max_chunk_size_tokens": tokens, "chunk_overlap_tokens": overlap}}


def unique(names: Seq[str], param: str) -> Seq[str]:
    if len(set(names)) < len(names):
        raise invalid(param, f"{param} has a file twice")
    return names


def wanted_of(values: Mapping[str, Any], usual: dict[str, Any]) -> list[Wanted]:
    """The files of a batch. usual: the strategy of its store."""
    if ("file_ids" in values) == ("files" in values):
        raise RequestError("a batch has either file_ids or files", code="invalid_value", param="file_ids")
    if "files" in values:
        found = list[Wanted]()
        unique([file["file_id"] for file in values["files"]], "files")
        for index, file in enumerate(values["files"]):
            param = f"files[{index}]"
            strategy = file.get("chunking_strategy")
            found.append(Wanted(
                file["file_id"], file.get("attributes") or {},
                checked_strategy(strategy, f"{param}.chunking_strategy") if strategy else usual,
                f"{param}.file_id"))
        return found
    strategy = values.get("chunking_strategy")
    chunking = checked_strategy(strategy) if strategy else usual
    return [Wanted(file, values.get("attributes", {}), chunking, f"file_ids[{index}]")
            for index, file in enumerate(unique(values["file_ids"], "file_ids"))]


