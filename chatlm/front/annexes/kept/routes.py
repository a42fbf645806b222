"""Responses that are kept and can be continued, and conversations: with --database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence as Seq
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING

from aiohttp import web

from chatlm.common.client_words import too_large_to_count
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.common.messages.protocol import KeptItem
from chatlm.common.messages.requests import Finished
from chatlm.front.aio import supervised
from chatlm.front.annexes.kept.fields import STARTING_AFTER
from chatlm.front.annexes.kept.row import KEPT
from chatlm.front.api.errors import public_error
from chatlm.front.api.kept_items import AN_ID, MADE, kept_items
from chatlm.front.api.list_fields import AFTER, LIMIT, ORDER
from chatlm.front.api.message_readers import chat_messages, other_types, without_others
from chatlm.front.api.response_items import OTHER_ITEMS, response_messages
from chatlm.front.api.spoken import answer_form
from chatlm.front.intake.intake import KeptBefore
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.stored_lists import (
    DAY_S, now_s, query_value, require_store, send_list, send_parts, shown_item, take_room)
from chatlm.front.store import quota, responses
from chatlm.front.store.file_rows import owns
from chatlm.front.store.pages import Listed, texts
from chatlm.front.store.responses import NewResponse

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Accepted, Event
    from chatlm.front.api.dialect import KeptAnswer, Reference
    from chatlm.front.api.encode import Encoder
    from chatlm.front.front import Front
    from chatlm.front.intake.budget import Holding
    from chatlm.front.intake.opened_body import Caller, OpenedBody
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.server.recordings import Recording
    from chatlm.front.store.pages import ListPage, TextPlace
    from chatlm.front.store.responses import ConversationRow
    from chatlm.front.store.store import Store


class KeptResponse(NamedTuple):
    """A response that will be kept."""

    encoder: Encoder
    owner: str

    @property
    def parsed(self) -> ParsedBody:
        return self.encoder.parsed

    @property
    def id(self) -> str:
        return self.parsed.response_id

    def render(self, status: str = "", error: ChatServerError | None = None) -> KeptAnswer:
        """As it is kept. status: of one that has not ended. error: why it failed."""
        keep = answer_form(self.parsed.form).keep
        assert keep
        return keep(self.encoder, status, error)


class RunningResponse(NamedTuple):
    """A response in the background: GET shows it before it is kept."""

    response: KeptResponse
    recording: Recording
    kept: asyncio.Task[None]  # ends once it is kept


class ResponseKeeper:
    """Keeps the answers of /v1/responses in the store, and finds what was said before a request."""

    def __init__(self, store: Store | None, bodies: Bodies, keep_days: int,
                 removed: Callable[[], None], cancel: Callable[[str], bool],
                 follow: Callable[[web.Request, Recording, int], Awaitable[web.StreamResponse]]):
        """removed: called when something was deleted. cancel: cancels a running answer. follow: sends a
        recording from an event on."""
        self.store = store
        self.bodies = bodies
        self.keep_s = keep_days * DAY_S
        self.routes = ConversationRoutes(self)
        self.removed = removed
        self.saving: set[asyncio.Task[None]] = set()  # tasks that keep answers whose clients have left
        self.running: dict[str, RunningResponse] = {}  # by their ids
        self.cancel = cancel
        self.follow = follow

    @classmethod
    def of(cls, front: Front) -> ResponseKeeper:
        return cls(front.store, front.bodies, front.settings.keep_days, front.removed, front.cancel,
                   front.follow)

    async def close(self):
        if self.saving:
            await asyncio.wait(self.saving, timeout=5.0)

    async def earlier(self, opened_body: OpenedBody, reading: Holding) -> KeptBefore:
        """The items that a body continues, and those that its input refers to. If they are large, `reading`
        then accounts for them.

        Raises RequestError 404 if there is nothing that the body could continue, and 400 for a reference to
        an unknown item."""
        chained = opened_body.envelope.chained
        owner = opened_body.caller.texts
        client = opened_body.caller.client
        store = require_store(self.store)
        sent_bytes = sum(map(len, opened_body.parts))
        before = KeptBefore()
        if chained.response or chained.conversation:
            what = {"previous": chained.response, "conversation": chained.conversation, "owner": owner}
            size = await store.run(partial(responses.size_before, **what), client=client)
            if size > LIMITS.inline_bytes:  # wait until there is memory for it
                await take_room(reading, sent_bytes + 2 * size)
            before = KeptBefore(await store.run(partial(responses.before, **what), client=client))
        if chained.items:
            referenced = await self._referenced(chained.items, opened_body.caller, sent_bytes, reading)
            before = before._replace(referenced=referenced)
        return before

    async def _referenced(self, references: Seq[Reference], caller: Caller, sent_bytes: int,
                          reading: Holding) -> bytes:
        """The items that an input refers to, as a JSON object. sent_bytes: of its body."""
        store = require_store(self.store)
        names = [reference.id if AN_ID.fullmatch(reference.id) else "" for reference in references]
        found = await store.run(partial(responses.item_places, names=names, owner=caller.texts),
                                client=caller.client)
        places = []
        for reference, place in zip(references, found):
            if place is None:
                raise refuse_reference(reference)
            places.append(place)
        size = sum(place.bytes for place in places)
        if size > LIMITS.body_bytes:
            raise too_large_to_count("the items that the input refers to are too large: at most "
                                     f"{LIMITS.body_bytes} bytes are allowed")
        if size > LIMITS.inline_bytes:
            await take_room(reading, sent_bytes + 2 * size)
        items = []
        kept = await store.run(partial(texts, places=places), client=caller.client)
        for reference, text in zip(references, kept):
            if text is None:  # deleted meanwhile
                raise refuse_reference(reference)
            items.append(b'"%s": %s' % (reference.id.encode(), responses.with_id(reference.id, text)))
        return b"{%s}" % b", ".join(items)

    def answering(self, answering: AbstractAsyncContextManager,
                  encoder: Encoder) -> AbstractAsyncContextManager:
        """Wrap an answer so that it is kept when it ends, however it ends."""
        return self._keeping(answering, KeptResponse(encoder, self.bodies.owner))

    def show_running(self, encoder: Encoder, recording: Recording) -> bytes:
        """Show a response that has begun in the background, until it is kept. Returns it as it is now."""
        assert recording.task
        response = KeptResponse(encoder, self.bodies.owner)
        kept = asyncio.create_task(supervised(f"showing {response.id}", partial(
            self._show, response.id, recording.task)))
        self.running[response.id] = RunningResponse(response, recording, kept)
        return response.render("in_progress").body

    async def _show(self, name: str, work: asyncio.Task):
        try:
            await asyncio.wait([work])
            if self.saving:  # it has failed, or was cancelled
                await asyncio.wait({*self.saving})
        finally:
            del self.running[name]

    @asynccontextmanager
    async def _keeping(self, answering: AbstractAsyncContextManager, response: KeptResponse) -> AsyncIterator[
            tuple[Accepted, AsyncGenerator[Event, None]]]:
        parsed = response.parsed
        copies = 2 if parsed.details.get("conversation") else 1
        size = copies * responses.bytes_of(parsed.kept) + len(parsed.repeated) + responses.ITEM_BYTES
        await require_store(self.store).run(partial(
            quota.check, owner=response.owner, adds_bytes=size, otherwise=', or send "store": false',
            client=parsed.request.client), adds_bytes=size, client=parsed.request.client)
        async with answering as (accepted, events):
            watched = self._watched(events, response)
            try:
                yield accepted, watched
            finally:
                await watched.aclose()

    async def _watched(self, events: AsyncGenerator[Event, None],
                       response: KeptResponse) -> AsyncGenerator[Event, None]:
        """Keep the response before its client has the end: what a client has seen is kept."""
        kept = False
        try:
            async for event in events:
                if isinstance(event, Finished):
                    await self._keep(response, response.render())
                    kept = True
                yield event
        except Exception as error:
            if not kept:
                is_cancelled = getattr(error, "code", None) == "cancelled"
                self._keep_later(response, response.render("cancelled") if is_cancelled else
                                 response.render("failed", public_error(error)))
            raise
        except (GeneratorExit, asyncio.CancelledError):  # the client has left
            if not kept:
                self._keep_later(response, response.render("cancelled"))
            raise

    def _keep_later(self, response: KeptResponse, rendered: KeptAnswer):
        task = asyncio.create_task(supervised(
            f"keeping {response.id}", partial(self._keep, response, rendered),
            failed=lambda error: log.warning("%s is not kept: %s", response.id, error) or False))
        self.saving.add(task)
        task.add_done_callback(self.saving.discard)

    async def _keep(self, response: KeptResponse, rendered: KeptAnswer):
        parsed = response.parsed
        now = now_s()
        new = NewResponse(
            response.id, response.owner, now, now + self.keep_s, parsed.details.get("previous_response_id"),
            parsed.details.get("conversation"), parsed.kept, rendered.items, rendered.body)
        await require_store(self.store).run(partial(responses.keep, new=new), adds_bytes=new.bytes,
                                            client=parsed.request.client)


def refuse_reference(reference: Reference) -> RequestError:
    name = f"input[{reference.index}]"
    return RequestError(f"{name}, an item_reference: there is no item {shown(reference.id)} in a response "
                        'that is kept here (with "store": false none is, and kept ones expire); send the '
                        "item itself", code="item_not_found", param=name)


class ConversationRoutes:
    """The handlers of kept responses and of conversations."""

    def __init__(self, keeper: ResponseKeeper):
        self.keeper = keeper
        self.store = keeper.store
        self.bodies = keeper.bodies
        self.keep_s = keeper.keep_s

    # responses

    def _store_of(self, name: str) -> Store:
        if self.store is None:
            raise RequestError(f"there is no response {shown(name)}: this server keeps none, since it was "
                               "started without --database", status=404, code="not_found", param="id")
        return self.store

    async def handle_response(self, http: web.Request) -> web.StreamResponse:
        name = http.match_info["id"]
        owner = self.bodies.owner
        store = self._store_of(name)
        running = self._running(name, owner)
        if http.query.get("stream", "false") != "false":
            if running is None:
                raise bad_value("stream", http.query["stream"], "false: a response is kept once it has ended "
                                "(one that runs in the background can be streamed)")
            start = query_value(http, STARTING_AFTER, -1) + 1
            running.recording.check_kept(start)
            return await self.keeper.follow(http, running.recording, start)
        if running:
            return web.Response(body=running.response.render("in_progress").body,
                                content_type="application/json")
        place = await store.run(partial(responses.whole_of, name=name, owner=owner),
                                client=REQUEST_LOG.get().client)
        with self.bodies.holding() as holding:
            return await send_parts(http, [await self._read(place, holding)])

    def _running(self, name: str, owner: str) -> RunningResponse | None:
        running = self.keeper.running.get(name)
        return running if running and owns(owner, running.response.owner) else None

    async def handle_cancel(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/responses/{id}/cancel: stop a response that runs in the background. The answer is the
        response; one that has ended stays as it is."""
        name = http.match_info["id"]
        owner = self.bodies.owner
        store = self._store_of(name)
        running = self._running(name, owner)
        if running:
            self.keeper.cancel(running.recording.id)
            await asyncio.wait([running.kept])
        place = await store.run(partial(responses.whole_of, name=name, owner=owner),
                                client=REQUEST_LOG.get().client)
        with self.bodies.holding() as holding:
            return await send_parts(http, [await self._read(place, holding)])

    async def handle_delete(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        owner = self.bodies.owner
        await self._store_of(name).run(partial(responses.delete, name=name, owner=owner),
                                       client=REQUEST_LOG.get().client)
        self.keeper.removed()
        return json_response({"id": name, "object": "response", "deleted": True})

    async def handle_inputs(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/responses/{id}/input_items: the items of the request, and those of all that it
        continues."""
        self._store_of(http.match_info["id"])
        return await self._send_items(http, responses.inputs)

    # lists and their rows

    async def _stored(self, work: Callable[[Any], Any], adds_bytes: int = 0) -> Any:
        """Do some work in the database, in the turn of this request's client."""
        return await require_store(self.store).run(work, adds_bytes, REQUEST_LOG.get().client)

    async def _read(self, place: TextPlace, holding: Holding) -> bytes:
        """The text at a place in the store. Raises RequestError 404 if it was deleted meanwhile."""
        await take_room(holding, place.bytes)
        [text] = await self._stored(partial(texts, places=[place]))
        if text is None:
            raise responses.refuse("item", place.name)
        return text

    async def _send_items(self, http: web.Request, find: Callable[..., ListPage]) -> web.StreamResponse:
        """A page of the items that `find` finds in the store."""
        limit = query_value(http, LIMIT, 20)
        after = query_value(http, AFTER, "")
        ascending = query_value(http, ORDER, "desc") == "asc"
        page = await self._stored(partial(find, name=http.match_info["id"], owner=self.bodies.owner,
                                          after=after, ascending=ascending, limit=limit))
        with self.bodies.holding() as holding:
            await take_room(holding, 2 * page.bytes)  # as they are stored, and with their ids
            found = await self._stored(partial(texts, places=page.rows))
            rows = [Listed(place.name, shown_item(place.name, text)) for place, text in
                    zip(page.rows, found) if text is not None]
            return await send_list(http, rows, page.more)

    # conversations

    @staticmethod
    def _body(row: ConversationRow) -> dict:
        return {"id": row.name, "object": "conversation", "created_at": row.created,
                "metadata": json.loads(row.metadata)}

    def _items(self, values: dict) -> tuple[KeptItem, ...]:
        """The items in a body. Raises RequestError for items that no response could read."""
        items = values.get("items", [])
        if any(message.pictures for message in chat_messages(response_messages({"input": items}), True)):
            raise RequestError("items: a conversation gets its pictures from responses",
                               code="unsupported_content", param="items")
        if others := other_types(items, OTHER_ITEMS - MADE):
            REQUEST_LOG.get().headers["X-Ignored-Tools"] = ", ".join(others)
        return kept_items(without_others(items, OTHER_ITEMS - MADE), own_ids=True)

    async def handle_create(self, http: web.Request) -> web.Response:
        require_store(self.store)
        owner = self.bodies.owner
        client = REQUEST_LOG.get().client
        values = await self.bodies.small(http)
        items = self._items(values)
        now = now_s()
        metadata = json.dumps(values.get("metadata", {}))
        return json_response(self._body(await self._stored(
            lambda connection: responses.create_conversation(
                connection, owner, client, now, now + self.keep_s, metadata, items),
            adds_bytes=responses.ITEM_BYTES + len(metadata) + responses.bytes_of(items))))

    async def handle_conversation(self, http: web.Request) -> web.Response:
        return json_response(self._body(await self._stored(partial(
            responses.conversation_named, name=http.match_info["id"], owner=self.bodies.owner))))

    async def handle_update(self, http: web.Request) -> web.Response:
        require_store(self.store)
        name = http.match_info["id"]
        owner = self.bodies.owner
        metadata = json.dumps((await self.bodies.small(http))["metadata"])
        return json_response(self._body(await self._stored(
            partial(responses.set_metadata, name=name, owner=owner, metadata=metadata),
            adds_bytes=len(metadata))))

    async def handle_forget(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        delete = partial(responses.delete_conversation, name=name, owner=self.bodies.owner)
        await self._stored(delete)
        self.keeper.removed()
        return json_response({"id": name, "object": "conversation.deleted", "deleted": True})

    async def handle_items(self, http: web.Request) -> web.StreamResponse:
        return await self._send_items(http, responses.items)

    async def handle_add(self, http: web.Request) -> web.StreamResponse:
        require_store(self.store)
        name = http.match_info["id"]
        owner = self.bodies.owner
        items = self._items(await self.bodies.small(http))
        added = await self._stored(
            partial(responses.extend, name=name, owner=owner, items=items, expires=now_s() + self.keep_s),
            adds_bytes=responses.bytes_of(items))
        return await send_list(http, [Listed(item.name, shown_item(*item)) for item in added], False)

    async def handle_item(self, http: web.Request) -> web.StreamResponse:
        place = await self._stored(partial(
            responses.item_named, conversation=http.match_info["id"], name=http.match_info["item"],
            owner=self.bodies.owner))
        with self.bodies.holding() as holding:
            text = await self._read(place, holding)
            return await send_parts(http, [b'{"id": %s, ' % dump(place.name), memoryview(text)[1:]])

    async def handle_drop(self, http: web.Request) -> web.Response:
        """DELETE of an item; the answer is the conversation."""
        return json_response(self._body(await self._stored(partial(
            responses.drop_item, conversation=http.match_info["id"], name=http.match_info["item"],
            owner=self.bodies.owner))))


def conversations_of(front: Front) -> ConversationRoutes:
    return front.room(KEPT).routes
