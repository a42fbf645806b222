"""Responses that are kept and can be continued, and conversations: with --database."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence as Seq
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import dump, is_text
from chatlm.common.log import log
from chatlm.common.messages.requests import Finished, Piece
from chatlm.front.aio import supervised
from chatlm.front.api.conversation import chained_of, chat_messages, response_messages
from chatlm.front.api.encoders import ResponsesEncoder
from chatlm.front.api.fields import json_object
from chatlm.front.api.tables import BEFORE, CONTINUED
from chatlm.front.lazy import web
from chatlm.front.server.kept import DAY_S, asked, now_s, paged, read_small_object, stored
from chatlm.front.server.responses import REQUEST_LOG, json_response, public_error
from chatlm.front.server.routes import AFTER, LIMIT, ORDER
from chatlm.front.store import responses
from chatlm.front.store.responses import Conversation, Kept

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Accepted, Event
    from chatlm.front.api.encode import Encoder
    from chatlm.front.server.access import Owners
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.server.streams import Holding
    from chatlm.front.store.store import Store


KEPT_ROUTE = "/v1/responses"
PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_"}


async def plain(text: bytes) -> Any:
    """What JSON says; of much in a thread."""
    return await asyncio.to_thread(json.loads, text) if len(text) > LIMITS.inline_bytes else json.loads(text)


def with_id(item: dict, origin: str) -> dict:
    """An item as it is shown: it has an id, a status, and parts of content. Its id follows from `origin`
    unless it has one."""
    kind = item.get("type", "message")
    name = PREFIXES.get(kind, "item_") + hashlib.sha256(origin.encode()).hexdigest()[:24]
    item = {"id": name, "type": kind, "status": "completed"} | {
        key: value for key, value in item.items() if value is not None}
    if kind == "message" and is_text(item.get("content")):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": part, "text": item["content"]} | (
            {"annotations": []} if part == "output_text" else {})]
    return item


class Keeper:
    """Completes bodies that continue something, and keeps answers."""

    def __init__(self, store: Store | None, bodies: Bodies, owners: Owners, keep_days: int):
        self.store, self.bodies, self.owners, self.keep_s = store, bodies, owners, keep_days * DAY_S
        self.routes = ConversationRoutes(self)
        self.saving: set[asyncio.Task[None]] = set()  # answers whose clients have left
        if store:
            bodies.complete = self.completed

    async def close(self):
        if self.saving:
            await asyncio.wait(self.saving, timeout=5.0)

    @property
    def owner(self) -> str:
        return self.owners.of_texts(REQUEST_LOG.get().client)

    async def completed(self, body: bytearray, holding: Holding) -> tuple[bytes | bytearray, str]:
        """A body, and the route whose reader reads it. One of POST /v1/responses that continues something
        gets what was said before in the field BEFORE, and is read as CONTINUED. RequestError 404 if that is
        not there."""
        route = REQUEST_LOG.get().route.pattern
        if not self.store or route != KEPT_ROUTE or (
                b'"previous_response_id"' not in body and b'"conversation"' not in body):
            return body, route
        if len(body) <= LIMITS.inline_bytes:
            previous, conversation = chained_of(json_object(body))
        else:
            admission = self.bodies.catalogue.find("", ()).pool.admission
            previous, conversation = await admission.told("chained", REQUEST_LOG.get().client, body)
        if not (previous or conversation):
            return body, route
        before = await self.store.run(partial(responses.before, previous=previous, conversation=conversation,
                                              owner=self.owner))
        if len(before) > LIMITS.inline_bytes and not holding.size:
            await holding.room(len(body) + len(before))
        whole = bytes(body).rstrip()
        # the last of two members with one name counts
        return b'%s, "%s": %s}' % (whole[:-1], BEFORE.encode(), before), CONTINUED

    def answering(self, answering: AbstractAsyncContextManager,
                  encoder: Encoder) -> AbstractAsyncContextManager:
        """An answer that is kept once it ends, however that is; others stay as they are."""
        if not self.store or not encoder.parsed.kept or not isinstance(encoder, ResponsesEncoder):
            return answering
        return self._keeping(answering, encoder, self.owner)

    @asynccontextmanager
    async def _keeping(self, answering: AbstractAsyncContextManager, encoder: ResponsesEncoder,
                       owner: str) -> AsyncIterator[tuple[Accepted, AsyncGenerator[Event, None]]]:
        # a second encoder has its end before the client has: what a client knows of is kept
        twin = ResponsesEncoder(encoder.parsed, encoder.model, encoder.tokenizer)
        twin.head = encoder.head
        for each in (encoder, twin):
            each.derive_ids()
        async with answering as (accepted, events):
            watched = self._watched(events, twin, owner)
            try:
                yield accepted, watched
            finally:
                await watched.aclose()

    async def _watched(self, events: AsyncGenerator[Event, None], twin: ResponsesEncoder,
                       owner: str) -> AsyncGenerator[Event, None]:
        kept = False
        try:
            async for event in events:
                if isinstance(event, (Piece, Finished)):
                    twin.collect(event)
                if isinstance(event, Finished):
                    await self._keep(twin, owner, twin.whole()[1])
                    kept = True
                yield event
        except Exception as error:
            if not kept:
                code = getattr(error, "code", None)
                problem = public_error(error)
                body = twin.response("cancelled") if code == "cancelled" else twin.response(
                    "failed", error={"code": problem.code or problem.type, "message": str(problem)})
                self._keep_later(twin, owner, body)
            raise
        except (GeneratorExit, asyncio.CancelledError):  # the client has left
            if not kept:
                self._keep_later(twin, owner, twin.response("cancelled"))
            raise

    def _keep_later(self, twin: ResponsesEncoder, owner: str, body: bytes):
        task = asyncio.create_task(supervised(
            f"keeping {twin.head['id']}", partial(self._keep, twin, owner, body),
            failed=lambda error: log.warning("%s is not kept: %s", twin.head["id"], error) or False))
        self.saving.add(task)
        task.add_done_callback(self.saving.discard)

    async def _keep(self, twin: ResponsesEncoder, owner: str, body: bytes):
        name, details, now = twin.head["id"], twin.parsed.details, now_s()
        output = [twin.item(block) for block in twin.blocks]
        conversation, items = details.get("conversation"), []
        if conversation:
            asked_items = await plain(twin.parsed.kept)
            items = [dump(with_id(item, f"{name}/{index}")) for index, item in
                     enumerate([*asked_items, *output])]
        kept = Kept(name, owner, now, now + self.keep_s, details.get("previous_response_id"), conversation,
                    twin.parsed.kept, dump(output), body)
        await stored(self.store).run(partial(responses.keep, kept=kept, items=items))


class ConversationRoutes:
    """The handlers of kept responses and of conversations."""

    def __init__(self, keeper: Keeper):
        self.keeper, self.store, self.bodies, self.keep_s = keeper, keeper.store, keeper.bodies, keeper.keep_s

    @property
    def owner(self) -> str:
        return self.keeper.owner

    async def _found(self, http: web.Request) -> Kept:
        name, owner = http.match_info["id"], self.owner
        if self.store is None:
            raise RequestError(f"there is no response {shown(name)}: this server keeps none, since it was "
                               "started without --database", status=404, code="not_found", param="id")
        return await self.store.run(partial(responses.found, name=name, owner=owner))

    async def handle_response(self, http: web.Request) -> web.Response:
        if http.query.get("stream", "false") != "false":
            raise bad_value("stream", http.query["stream"], "false: a response is kept once it has ended")
        return web.Response(body=(await self._found(http)).body, content_type="application/json")

    async def handle_delete(self, http: web.Request) -> web.Response:
        kept = await self._found(http)
        await stored(self.store).run(partial(responses.delete, name=kept.name, owner=self.owner))
        return json_response({"id": kept.name, "object": "response", "deleted": True})

    async def handle_inputs(self, http: web.Request) -> web.Response:
        """GET /v1/responses/{id}/input_items: what was asked, also by what it continues."""
        kept, owner = await self._found(http), self.owner
        before = await stored(self.store).run(partial(
            responses.before, previous=kept.previous or "", conversation="", owner=owner))
        items = [*await plain(before), *await plain(kept.input)]
        return self._page(http, [with_id(item, f"{kept.name}/{index - len(items)}") for index, item in
                                 enumerate(items)])

    @staticmethod
    def _page(http: web.Request, items: Seq[dict]) -> web.Response:
        """A page of items, which are in order."""
        limit, after = asked(http, LIMIT, 20), asked(http, AFTER, "")
        items = items if asked(http, ORDER, "desc") == "asc" else items[::-1]
        if after:
            place = next((index for index, item in enumerate(items) if item["id"] == after), None)
            if place is None:
                raise bad_value("after", after, "the id of a row of the list")
            items = items[place + 1:]
        return paged(items[:limit + 1], limit)

    @staticmethod
    def _body(row: Conversation) -> dict:
        return {"id": row.name, "object": "conversation", "created_at": row.created,
                "metadata": json.loads(row.metadata)}

    async def _conversation(self, http: web.Request) -> Conversation:
        return await stored(self.store).run(partial(
            responses.conversation_named, name=http.match_info["id"], owner=self.owner))

    def _items(self, values: dict) -> list[dict]:
        """The items of a body, each with an id; RequestError for those that no response could read."""
        items = values.get("items", [])
        list(chat_messages(response_messages({"input": items}), True))
        return [with_id(item, secrets.token_hex(16)) for item in items]

    async def handle_create(self, http: web.Request) -> web.Response:
        store, owner = stored(self.store), self.owner
        values = await read_small_object(http, self.bodies)
        items, now = [dump(item) for item in self._items(values)], now_s()
        return json_response(self._body(await store.run(lambda connection: responses.create_conversation(
            connection, owner, now, now + self.keep_s, json.dumps(values.get("metadata", {})), items))))

    async def handle_conversation(self, http: web.Request) -> web.Response:
        return json_response(self._body(await self._conversation(http)))

    async def handle_update(self, http: web.Request) -> web.Response:
        row, metadata = await self._conversation(http), (
            await read_small_object(http, self.bodies))["metadata"]
        await stored(self.store).run(lambda connection: connection.execute(
            "UPDATE conversations SET metadata = ? WHERE id = ?", (json.dumps(metadata), row.id)))
        return json_response(self._body(row._replace(metadata=json.dumps(metadata))))

    async def handle_forget(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        await stored(self.store).run(partial(responses.delete_conversation, name=name, owner=self.owner))
        return json_response({"id": name, "object": "conversation.deleted", "deleted": True})

    async def _all_items(self, http: web.Request) -> tuple[Conversation, list[dict]]:
        row = await self._conversation(http)
        bodies = await stored(self.store).run(partial(responses.items_of, conversation=row.id))
        return row, [await plain(body) for body in bodies]

    async def handle_items(self, http: web.Request) -> web.Response:
        return self._page(http, (await self._all_items(http))[1])

    async def handle_add(self, http: web.Request) -> web.Response:
        row = await self._conversation(http)
        items = self._items(await read_small_object(http, self.bodies))
        await stored(self.store).run(partial(
            responses.add_items, conversation=row.id, items=[dump(item) for item in items],
            expires=now_s() + self.keep_s))
        return paged(items, len(items))

    async def _item(self, http: web.Request) -> tuple[Conversation, dict]:
        row, items = await self._all_items(http)
        for item in items:
            if item["id"] == http.match_info["item"]:
                return row, item
        raise responses.refuse("item", http.match_info["item"], "item")

    async def handle_item(self, http: web.Request) -> web.Response:
        return json_response((await self._item(http))[1])

    async def handle_drop(self, http: web.Request) -> web.Response:
        """DELETE of an item; the answer is the conversation."""
        row, item = await self._item(http)
        await stored(self.store).run(lambda connection: connection.execute(
            "DELETE FROM items WHERE conversation = ? AND body = ?", (row.id, dump(item))))
        return json_response(self._body(row))
