"""The routes of chats that are kept on the server, so that all devices of their owner have them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence as Seq
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.client_words import overloaded
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value
from chatlm.common.jsontext import dump
from chatlm.common.request_ids import is_unguessable
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.api.kept_fields import AFTER, CHAT_PLACE, COUNT, LIMIT, SINCE, WAIT, WORDS
from chatlm.front.chats import changes, growing, listing, pictures, search
from chatlm.front.chats.changes import Changing, Outcome
from chatlm.front.chats.growing import WrittenPlace
from chatlm.front.chats.reading import ReadChange, read_changes
from chatlm.front.chats.writing import WrittenAnswer
from chatlm.front.lazy import web
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.stored_lists import (
    DAY_S, now_s, query_value, require_store, send_part, send_parts, take_room)
from chatlm.front.server.streams import read_bytes
from chatlm.front.store import quota

if TYPE_CHECKING:
    import sqlite3
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Accepted, Event
    from chatlm.front.chats.writing import Running
    from chatlm.front.server.answering import Ask, Begin
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.store.store import Store


WAITS = 4     # of an owner: a device needs one
SEARCHES = 2  # at a time
LOOK_S = 3600.0  # between two looks for chats that are too old
IN_SANDBOX = "chatlm.front.chats.reading:read_in_sandbox"


class ChatRoutes:
    """The handlers, and who waits for changes."""

    def __init__(self, store: Store | None, bodies: Bodies, settings: Settings, running: Running):
        self.store = store
        self.bodies = bodies
        self.settings = settings
        self.has_keys = bool(settings.keys)
        self.running = running
        self.answers: set[WrittenAnswer] = set()    # that are being written
        self.ending: set[asyncio.Task[None]] = set()  # write the ends of those that were cancelled
        self.waiting: dict[str, set[asyncio.Event]] = defaultdict(set)  # by owner
        self.deleted = asyncio.Event()
        self.searches = asyncio.Semaphore(SEARCHES)
        self.task: asyncio.Task[None] | None = None

    async def start(self):
        if self.store:
            self.deleted.set()  # what the last server left
            await self.store.run(partial(growing.end_cut, now_s=now_s()))
            self.task = asyncio.create_task(supervised(
                "deleting chats", self.purge, failed=lambda error: True))

    def kept(self) -> Store:
        """Where chats are kept. Raises RequestError 404 if this server keeps none."""
        if not self.settings.chats:
            raise RequestError("this server keeps no chats: it was started with --no-chats", status=404,
                               code="no_chats")
        return require_store(self.store)

    async def close(self):
        if self.task:
            await end_tasks([self.task])
        writing = {answer.task for answer in self.answers if answer.task} | self.ending
        if writing:
            await asyncio.wait(writing, timeout=5.0)

    @property
    def owner(self) -> str:
        """Whose chats a request is about. Raises RequestError if it does not say: an address is no person."""
        if not self.has_keys and not REQUEST_LOG.get().space:
            raise RequestError("chats on a server without API keys need the header X-Chat-Space: 22 to 64 "
                               "letters and digits that nobody can guess, the same on all your devices",
                               code="missing_space", param="X-Chat-Space")
        return self.bodies.owner

    # answers

    def prepared(self, parsed: ParsedBody) -> ParsedBody:
        """A body whose answer is written into a chat: the answer is recorded, and goes on without a
        reader."""
        request = parsed.request
        if not parsed.stream:
            raise RequestError("an answer that goes into a chat is streamed (stream: true)",
                               code="invalid_value", param="chat")
        if request.params.temporary:
            raise RequestError("an answer that goes into a chat is kept there: leave out chat, or "
                               "prompt_cache_retention", code="invalid_value", param="chat")
        if not self.has_keys and not is_unguessable(request.id):
            raise RequestError("with chat, X-Request-Id must be 32 hexadecimal digits that nobody can guess, "
                               "or be left out: all devices of the owner read the answer by it",
                               code="invalid_value", param="X-Request-Id")
        return replace(parsed, goes_on=True, request=replace(request, resumable=True))

    @asynccontextmanager
    async def written(self, begin: Begin, ask: Ask) -> AsyncIterator[
            tuple[Accepted, AsyncGenerator[Event, None]]]:
        """Begin an answer, and write it into its chat."""
        store = self.kept()
        asked = ask.parsed.added[CHAT_PLACE.name]
        place = WrittenPlace(self.owner, ask.parsed.request.client, asked["id"], asked["node"],
                             asked["parent"], ask.parsed.request.id)
        await store.run(partial(growing.check_place, place=place, now_s=now_s()))
        from chatlm.front.api.dialects.openai import OpenAIEncoder  # loaded: it has read the body
        assert isinstance(ask.encoder, OpenAIEncoder)
        answer = WrittenAnswer(store, place, ask.encoder, self.running, self.tell)
        async with begin(ask) as (accepted, events):
            await answer.begin()
            self.answers.add(answer)
            watched = answer.watched(events, self.end_later)
            try:
                yield accepted, watched
            finally:
                await watched.aclose()
                self.answers.discard(answer)

    def end_later(self, work: Callable[[], Awaitable[None]]):
        task = asyncio.create_task(supervised("ending an answer in a chat", work, failed=lambda error: False))
        self.ending.add(task)
        task.add_done_callback(self.ending.discard)

    def notice_deletion(self, owner: str):
        """Answers in chats that are deleted need not go on."""
        self.deleted.set()
        for answer in self.answers:
            if answer.place.owner == owner:
                answer.look_again()

    # changes

    async def handle_change(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/chats/changes"""
        store = self.kept()
        owner = self.owner
        client = REQUEST_LOG.get().client
        with self.bodies.holding() as holding:
            body = await read_bytes(http, holding, LIMITS.body_bytes)
            read = await self.read(body)
            size = sum(len(each.patch or "") for each in read)
            outcomes, rev = await store.run(partial(change_all, owner=owner, client=client, read=read),
                                            adds_bytes=size)
        if any(outcome.state in ("stored", "sibling", "deleted") for outcome in outcomes):
            self.tell(owner)
        if any(change.patch is None or '"pictures"' in change.patch for change in read):
            self.notice_deletion(owner)  # perhaps no message shows a picture any more
        rows = separated(map(shown_outcome, outcomes))
        return await send_parts(http, [b'{"rev": %d, "data": [' % rev, *rows, b"]}"])

    async def read(self, body: bytes | bytearray) -> list[ReadChange]:
        if len(body) <= LIMITS.inline_bytes:
            return read_changes(body)
        found = await self.bodies.intake.in_sandbox(self.bodies.caller(), IN_SANDBOX, body)
        return [ReadChange(*values) for values in found]

    async def handle_changes(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/changes: those after a revision, as soon as there are any."""
        store = self.kept()
        owner = self.owner
        after = query_value(http, SINCE, 0)
        until_s = time.monotonic() + query_value(http, WAIT, 0)
        read = partial(changes.changed_after, owner=owner, after=after)
        with self.listening(owner) as news:
            page = await store.run(read)
            while not page.rows and (left_s := until_s - time.monotonic()) > 0:
                try:
                    await asyncio.wait_for(news.wait(), left_s)
                except asyncio.TimeoutError:
                    break
                news.clear()
                page = await store.run(read)
        rows = [b'{"kind": %s, "id": %s, "rev": %d, "record": %s}'
                % (dump(row.kind), dump(row.id), row.rev, row.text.encode() or b"null") for row in page.rows]
        with self.bodies.holding() as holding:
            await take_room(holding, sum(map(len, rows)))
            return await send_parts(http, [b'{"rev": %d, "data": [' % page.rev, *separated(rows),
                                           b'], "has_more": %s}' % dump(page.more)])

    @contextmanager
    def listening(self, owner: str):
        """An event that is set when something of an owner changes. RequestError if too many wait."""
        if len(self.waiting[owner]) >= WAITS:
            raise overloaded(f"{WAITS} requests wait for your changes already", 5)
        news = asyncio.Event()
        self.waiting[owner].add(news)
        try:
            yield news
        finally:
            self.waiting[owner].discard(news)
            if not self.waiting[owner]:
                del self.waiting[owner]

    def tell(self, owner: str):
        for news in self.waiting.get(owner, ()):
            news.set()

    async def purge(self):
        """Remove what was deleted, whenever something was, and what is older than chats are kept."""
        store = self.kept()
        while True:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self.deleted.wait(), LOOK_S)
            self.deleted.clear()
            more = True
            while more:
                owners, more = await store.run(partial(self.expire, now_s=now_s()))
                for owner in owners:
                    self.tell(owner)
            while await store.run(partial(changes.purge, now_s=now_s())):
                pass
            while await store.run(partial(pictures.purge_unshown, now_s=now_s())):
                pass
            await store.clear_log()

    def expire(self, connection: sqlite3.Connection, now_s: int) -> tuple[set[str], bool]:
        """Delete some chats that are too old: (whose they were, whether there may be more)."""
        days = self.settings.chats_keep_days
        return changes.expire(connection, now_s - days * DAY_S, now_s) if days else (set(), False)

    # chats

    async def handle_list(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats"""
        limit = query_value(http, LIMIT, 20)
        after = query_value(http, AFTER, "")
        rows, more = await self.kept().run(
            partial(listing.chats_after, owner=self.owner, after=after, limit=limit))
        return json_response({"object": "list", "data": rows, "has_more": more})

    async def handle_chat(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/{id}: the chat with its nodes; 304 if it has the revision of If-None-Match."""
        store = self.kept()
        owner = self.owner
        name = http.match_info["id"]
        tag, chat = await store.run(partial(listing.chat_and_tag, owner=owner, name=name))
        headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
        if headers["ETag"] in http.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        parts = self.parts(store, partial(listing.nodes_after, owner=owner, chat=name))
        return await self.send(http, headers, enclosed(chat[:-1] + b', "nodes": [', parts, b"]}"))

    async def handle_delete(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        await self.delete([name])
        return json_response({"id": name, "object": "chat", "deleted": True})

    async def handle_delete_all(self, http: web.Request) -> web.Response:
        """DELETE /v1/chats?count=N: all chats, if they are as many as the client thinks."""
        self.kept()
        count = query_value(http, COUNT, None)
        if count is None:
            raise RequestError("count is missing: how many chats you mean to delete",
                               code="missing_required_parameter", param="count")
        await self.delete(None, count)
        return json_response({"object": "list", "deleted": count})

    async def delete(self, names: Seq[str] | None, count: int = 0):
        store = self.kept()
        owner = self.owner
        await store.run(
            partial(listing.delete_chats, owner=owner, names=names, count=count, now_s=now_s()))
        self.tell(owner)
        self.notice_deletion(owner)

    async def handle_search(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/search: chats with all of the words, the newest first."""
        store = self.kept()
        owner = self.owner
        question = query_value(http, WORDS, "")
        if not search.words_of(question):
            raise bad_value("q", question, "the words to find")
        after = query_value(http, AFTER, "")

        def look() -> search.FoundPage:
            with store.reading() as connection:
                return search.search(connection, owner, question, after)
        async with self.searches:
            page = await asyncio.to_thread(look)
        return json_response({
            "object": "list", "after": page.after, "has_more": page.after is not None, "data": [
                {"id": found.id, "title": found.chat.get("title", ""), "updated": found.chat.get("updated"),
                 "node": found.node, "snippet": found.snippet} for found in page.found]})

    async def handle_export(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/export: all chats as a file that the page and the terminal import."""
        store = self.kept()
        owner = self.owner
        begin = await store.run(partial(listing.export_begin, owner=owner, now_s=now_s()))
        headers = {"Content-Disposition": 'attachment; filename="chats.json"'}
        return await self.send(http, headers, enclosed(begin, self.exported(store, owner), b"]}"))

    # pictures

    async def handle_picture(self, http: web.Request) -> web.Response:
        """POST /v1/chats/files: keep a picture, the body, which messages then name."""
        store = self.kept()
        owner = self.owner
        client = REQUEST_LOG.get().client
        with self.bodies.holding() as holding:
            body = await read_bytes(http, holding, pictures.CHAT_PICTURE_BYTES)
            kind = pictures.type_of(body)
            data = bytes(body)
            keep = partial(pictures.add, owner=owner, client=client, data=data, now_s=now_s())
            name = await store.run(keep, adds_bytes=len(data))
        return json_response({"id": name, "object": "chat.file", "bytes": len(data), "type": kind})

    async def handle_show(self, http: web.Request) -> web.Response:
        """GET /v1/chats/files/{sha256}"""
        store = self.kept()
        owner = self.owner
        with self.bodies.holding() as holding:
            await take_room(holding, pictures.CHAT_PICTURE_BYTES)
            data = await store.run(partial(pictures.read, owner=owner, name=http.match_info["sha256"]))
            return web.Response(body=data, headers={
                "Content-Type": pictures.type_of(data), "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "default-src 'none'; sandbox"})

    async def exported(self, store: Store, owner: str) -> AsyncIterator[bytes]:
        names = await store.run(partial(listing.chat_names, owner=owner))
        first = True
        for name in names:
            try:
                _, chat = await store.run(partial(listing.chat_and_tag, owner=owner, name=name))
            except RequestError:  # deleted meanwhile
                continue
            parts = self.parts(store, partial(listing.nodes_after, owner=owner, chat=name, whole=True))
            yield b"" if first else b", "
            first = False
            async for part in enclosed(chat[:-1] + b', "nodes": [', parts, b"]}"):
                yield part

    async def parts(self, store: Store, read: Callable[..., listing.NodesPage]) -> AsyncIterator[bytes]:
        """The nodes of a chat, a few at a time."""
        part = listing.NodesPage(b"", 0, True)
        while part.more:
            part = await store.run(partial(read, after=part.last))
            yield part.text

    async def send(self, http: web.Request, headers: dict, parts: AsyncIterator[bytes]) -> web.StreamResponse:
        response = web.StreamResponse(headers={**headers, "Content-Type": "application/json",
                                               "X-Request-Id": REQUEST_LOG.get().id})
        if http.version < (1, 1):
            response.force_close()
        await response.prepare(http)
        if http.method == "GET":
            async for part in parts:
                await send_part(http, response, part)
        return response


async def enclosed(begin: bytes, parts: AsyncIterator[bytes], end: bytes) -> AsyncIterator[bytes]:
    yield begin
    async for part in parts:
        yield part
    yield end


def separated(parts: Iterable[bytes]) -> Iterable[bytes]:
    for index, part in enumerate(parts):
        yield (b", " if index else b"") + part


def change_all(connection, owner: str, client: str, read: Seq[ReadChange]) -> tuple[list[Outcome], int]:
    """Do all changes; (what became of them, the last revision)."""
    changing = Changing(connection, owner, now_s())
    outcomes = []
    for change in read:
        if change.patch is not None:
            try:
                quota.check(connection, owner, len(change.patch), client=client)
            except RequestError as error:
                outcomes.append(Outcome(change.id, "refused", error=str(error), param=error.param or ""))
                continue
        outcomes.append(changing.make(change))
    return outcomes, changes.revisions(connection)[0]


def shown_outcome(outcome: Outcome) -> bytes:
    more = {"sibling": outcome.sibling} if outcome.sibling else {}
    if outcome.error:
        more = {"error": {"message": outcome.error, "param": outcome.param or None}}
    head = dump({"id": outcome.id, "state": outcome.state, "rev": outcome.rev, **more})
    return head if not outcome.record else b'%s, "record": %s}' % (head[:-1], outcome.record.encode())
