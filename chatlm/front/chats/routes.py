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

from aiohttp import web

from chatlm.common.client_words import overloaded
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value
from chatlm.common.jsontext import dump
from chatlm.common.request_ids import is_unguessable
from chatlm.front.admission.sandbox import WRITE_BYTES
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.api.dialects.openai import OpenAIEncoder
from chatlm.front.api.kept_fields import AFTER, CHAT_PLACE, COUNT, LIMIT, SINCE, WAIT, WORDS
from chatlm.front.chats import changes, growing, listing, pictures, search
from chatlm.front.chats.changes import Outcome, Told
from chatlm.front.chats.exporting import Export
from chatlm.front.chats.growing import WrittenPlace
from chatlm.front.chats.reading import ReadChange, read_changes, unpacked
from chatlm.front.chats.writing import Running, WrittenAnswer
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.stored_lists import (
    DAY_S, now_s, query_value, require_store, send_part, send_parts, take_room)
from chatlm.front.server.streams import read_bytes
from chatlm.front.store.readers import Readers

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Accepted, Event
    from chatlm.front.front import Front
    from chatlm.front.intake.budget import Holding
    from chatlm.front.server.answering import Ask, Begin
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.store.store import Store


WAITS = 4     # of an owner: a device needs one
PAUSE_S = 1.0    # between two times that what was deleted is removed
LOOK_S = 3600.0  # between two looks for chats that are too old
PART_BYTES = 6 << 20  # of what is sent in parts: a picture as text is the largest
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
        self.forgetting = set[str]()  # owners who have deleted something
        self.readers = Readers(store.path, "chat search") if store else None
        self.task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, front: Front) -> ChatRoutes:
        return cls(front.store, front.bodies, front.settings,
                   Running(front.recordings, front.cancel, front.cancel_unread))

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
        if self.readers:
            self.readers.close()
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
        await store.run(partial(growing.check_place, place=place, now_s=now_s()), client=place.client)
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
        self.forgetting.add(owner)
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
            await take_room(holding, 2 * len(body))  # the patches, and what is found by them
            read = await self.read(body)
            changed = await store.run(
                partial(changes.change_all, owner=owner, client=client, read=read, now_s=now_s()),
                adds_bytes=sum(each.bytes for each in read), client=client)
            if any(outcome.state in ("stored", "sibling", "deleted") for outcome in changed.outcomes):
                self.tell(owner)
            if any(each.change.patch is None or each.change.base for each in read):
                self.notice_deletion(owner)  # perhaps of a text that was replaced
            bases = [each.change.base for each in read]
            del body, read
            holding.give_back_beyond(0)
            records = await self._texts(store, client, holding, changed.told)
            rows = shown_outcomes(changed.outcomes, bases, records)
            return await send_parts(http, [b'{"rev": %d, "data": [' % changed.rev, *separated(rows), b"]}"])

    async def read(self, body: bytes | bytearray) -> list[ReadChange]:
        if len(body) <= LIMITS.inline_bytes:
            return read_changes(body)
        return [*map(unpacked, await self.bodies.intake.in_sandbox(self.bodies.caller(), IN_SANDBOX, body))]

    async def _texts(self, store: Store, client: str, holding: Holding,
                     rows: Seq[Told]) -> list[tuple[Told, bytes]]:
        """Records, once the memory budget has room for them; as `changes.texts_of`."""
        if not rows:
            return []
        await take_room(holding, sum(row.bytes for row in rows))
        return await store.run(partial(changes.texts_of, rows=rows), client=client)

    async def handle_changes(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/changes: those after a revision, as soon as there are any."""
        store = self.kept()
        owner = self.owner
        client = REQUEST_LOG.get().client
        after = query_value(http, SINCE, 0)
        until_s = time.monotonic() + query_value(http, WAIT, 0)
        read = partial(changes.changed_after, owner=owner, after=after)
        with self.listening(owner) as news:
            page = await store.run(read, client=client)
            while not page.rows and (left_s := until_s - time.monotonic()) > 0:
                try:
                    await asyncio.wait_for(news.wait(), left_s)
                except asyncio.TimeoutError:
                    break
                news.clear()
                page = await store.run(read, client=client)
        with self.bodies.holding() as holding:
            rows = [b'{"kind": %s, "id": %s, "rev": %d, "record": %s}'
                    % (dump(row.kind), dump(row.id), row.rev, text or b"null")
                    for row, text in await self._texts(store, client, holding, page.rows)]
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
            if days := self.settings.chats_keep_days:
                before_s = now_s() - days * DAY_S
                for owner in await store.run(partial(changes.expire, before_s=before_s, now_s=now_s())):
                    self.tell(owner)
            await store.run(partial(changes.purge, now_s=now_s()))
            while self.forgetting:
                await store.run(partial(changes.forget_most, owner=self.forgetting.pop()))
            await store.run(partial(pictures.purge_unshown, now_s=now_s()))
            await store.clear_log()
            await asyncio.sleep(PAUSE_S)

    # chats

    async def handle_list(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats"""
        store = self.kept()
        owner = self.owner
        client = REQUEST_LOG.get().client
        limit = query_value(http, LIMIT, 20)
        after = query_value(http, AFTER, "")
        page = await store.run(partial(listing.chats_after, owner=owner, after=after, limit=limit),
                               client=client)
        with self.bodies.holding() as holding:
            await take_room(holding, page.bytes)
            rows = await store.run(partial(listing.listed_chats, owner=owner, places=page.places),
                                   client=client)
            return await send_parts(http, [b'{"object": "list", "data": [', *separated(rows),
                                           b'], "has_more": %s}' % dump(page.more)])

    async def handle_chat(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/{id}: the chat with its nodes; 304 if it has the revision of If-None-Match."""
        store = self.kept()
        owner = self.owner
        client = REQUEST_LOG.get().client
        name = http.match_info["id"]
        tag, chat = await store.run(partial(listing.chat_and_tag, owner=owner, name=name), client=client)
        headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
        if headers["ETag"] in http.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)

        async def parts() -> AsyncIterator[bytes]:
            between = chat[:-1] + b', "nodes": ['
            last = 0
            while part := await store.run(partial(listing.nodes_part, owner=owner, chat=name, after=last),
                                          client=client):
                last = part.last
                for text in part.texts:
                    yield between + text
                    between = b", "
            yield (b"" if last else between) + b"]}"
        return await self.send(http, headers, parts())

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
        await store.run(partial(listing.delete_chats, owner=owner, names=names, count=count, now_s=now_s()),
                        client=REQUEST_LOG.get().client)
        self.tell(owner)
        self.notice_deletion(owner)

    async def handle_search(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/search: chats with all of the words, the newest first."""
        self.kept()
        owner = self.owner
        question = query_value(http, WORDS, "")
        if not search.words_of(question):
            raise bad_value("q", question, "the words to find")
        after = query_value(http, AFTER, "")
        assert self.readers
        page = await self.readers.run(partial(search.search, owner=owner, question=question, after=after),
                                      REQUEST_LOG.get().client, search.CHAT_SEARCH_S)
        return json_response({
            "object": "list", "after": page.after, "has_more": page.after is not None, "data": [
                {"id": found.id, "title": found.title, "updated": found.updated, "node": found.node,
                 "snippet": found.snippet} for found in page.found]})

    async def handle_export(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/chats/export: all chats as a file that the page and the terminal import."""
        export = Export(self.kept(), self.owner, REQUEST_LOG.get().client)
        headers = {"Content-Disposition": 'attachment; filename="chats.json"'}
        return await self.send(http, headers, export.parts(now_s()))

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
            name = await store.run(keep, adds_bytes=len(data), client=client)
        return json_response({"id": name, "object": "chat.file", "bytes": len(data), "type": kind})

    async def handle_show(self, http: web.Request) -> web.Response:
        """GET /v1/chats/files/{sha256}"""
        store = self.kept()
        owner = self.owner
        client = REQUEST_LOG.get().client
        with self.bodies.holding() as holding:
            await take_room(holding, pictures.CHAT_PICTURE_BYTES)
            data = await store.run(partial(pictures.read, owner=owner, name=http.match_info["sha256"]),
                                   client=client)
            return web.Response(body=data, headers={
                "Content-Type": pictures.type_of(data), "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "default-src 'none'; sandbox"})

    async def send(self, http: web.Request, headers: dict, parts: AsyncIterator[bytes]) -> web.StreamResponse:
        """Send what is read from the store part by part, once the memory budget has room for a part."""
        with self.bodies.holding() as holding:
            await take_room(holding, PART_BYTES)
            response = web.StreamResponse(headers={**headers, "Content-Type": "application/json",
                                                   "X-Request-Id": REQUEST_LOG.get().id})
            if http.version < (1, 1):
                response.force_close()
            await response.prepare(http)
            if http.method != "HEAD":
                async for part in joined(parts):
                    await send_part(http, response, part)
            return response


async def joined(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Parts, with small ones joined, because writing each by itself would take long."""
    small = bytearray()
    async for part in parts:
        small += part
        if len(small) > WRITE_BYTES:
            yield bytes(small)
            small.clear()
    yield bytes(small)


def separated(parts: Iterable[bytes]) -> Iterable[bytes]:
    for index, part in enumerate(parts):
        yield (b", " if index else b"") + part


def shown_outcomes(outcomes: Seq[Outcome], bases: Seq[int],
                   records: Seq[tuple[Told, bytes]]) -> Iterable[bytes]:
    """Outcomes as the answer has them. A record goes with the last one that is about it. Where it is left
    out, because the answer would be too large, `rev` stays what the device has: it reads the record from the
    list of changes. bases: the revisions that the device knew."""
    left = {row.number: (row.rev, text) for row, text in records}
    shown = list[bytes]()
    for outcome, base in reversed([*zip(outcomes, bases)]):
        rev, record = left.pop(outcome.told, (base if outcome.told else outcome.rev, b""))
        more = {"sibling": outcome.sibling} if outcome.sibling else {}
        if outcome.error:
            more = {"error": {"message": outcome.error, "param": outcome.param or None}}
        head = dump({"id": outcome.id, "state": outcome.state, "rev": rev, **more})
        shown.append(b'%s, "record": %s}' % (head[:-1], record) if record else head)
    return reversed(shown)
