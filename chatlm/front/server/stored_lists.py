"""What the routes of the store share: pages of lists, and the answer without --database."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, TYPE_CHECKING

from aiohttp import web

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.common.jsontext import dump
from chatlm.front.admission.sandbox import WRITE_BYTES
from chatlm.front.intake.budget import BODY_S
from chatlm.front.server.responses import REQUEST_LOG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence as Seq

    from chatlm.front.api.fields import Field
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.intake.budget import Holding
    from chatlm.front.store.pages import Listed, ListPage
    from chatlm.front.store.store import Store


DAY_S = 86400
NO_STORE = "this server keeps nothing of this kind: it was started without --database"


def require_store(store: Store | None) -> Store:
    """The store. Raises RequestError 404 if there is none, because the server runs without --database."""
    if store is None:
        raise RequestError(NO_STORE, status=404, code="no_database")
    return store


def now_s() -> int:
    return int(time.time())


def query_value(http: web.Request, field: Field, default: Any) -> Any:
    """The value of a query parameter, checked by its field."""
    text = http.query.get(field.name)
    if text is None:
        return default
    return field.read(number_in(text) if field.low > -math.inf else text)


def number_in(text: str) -> int | str:
    """The integer that a text is; any other text unchanged, so that its field refuses it."""
    is_integer = text.isascii() and text.isdecimal()  # isdigit would accept "²", which int refuses
    return int(text) if is_integer and len(text) < 10 else text


def shown_item(name: str, body: bytes) -> bytes:
    """A row of a list: its text in the store, to which its id is added."""
    return b'{"id": %s, %s' % (dump(name), body[1:])


async def send_list(http: web.Request, rows: Seq[Listed], more: bool) -> web.StreamResponse:
    """Send a page of a list. If it is large, the caller holds its bytes of the memory budget."""
    first = dump(rows[0].name if rows else None)
    last = dump(rows[-1].name if rows else None)
    parts = [b'{"object": "list", "data": [']
    for index, row in enumerate(rows):
        if index:
            parts.append(b", ")
        parts.append(row.text)
    parts.append(b'], "has_more": %s, "first_id": %s, "last_id": %s}' % (dump(more), first, last))
    return await send_parts(http, parts)


async def send_page(http: web.Request, bodies: Bodies, page: ListPage) -> web.StreamResponse:
    """Send a page of a list, once the memory budget has room for it."""
    with bodies.holding() as holding:
        await take_room(holding, page.bytes)
        return await send_list(http, page.rows, page.more)


async def take_room(holding: Holding, size: int):
    """Wait until the memory budget has room for `size` bytes, if these are many. Takes at most what one
    client may have, because it would wait for more in vain."""
    if size > LIMITS.inline_bytes:
        await holding.wait_for(min(size, holding.budget.per_client - holding.size))


async def send_parts(http: web.Request, parts: Seq[bytes | memoryview]) -> web.StreamResponse:
    """Send JSON that consists of parts. Large parts are sent in pieces, as fast as the client reads."""
    size = sum(map(len, parts))
    if size <= LIMITS.inline_bytes:
        return web.Response(body=b"".join(parts), content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "application/json",
                                           "X-Request-Id": REQUEST_LOG.get().id})
    response.content_length = size
    await response.prepare(http)
    if http.method != "HEAD":
        for part in joined_small(parts):
            await send_part(http, response, part)
    return response


def joined_small(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The parts, with small ones joined, because writing each by itself would take long."""
    small = list[bytes | memoryview]()
    size = 0
    for part in parts:
        if size + len(part) > WRITE_BYTES:
            yield b"".join(small)
            small = []
            size = 0
        if len(part) > WRITE_BYTES:
            yield part
        else:
            small.append(part)
            size += len(part)
    yield b"".join(small)


async def send_part(http: web.Request, response: web.StreamResponse, part: bytes | memoryview):
    """Send a part in pieces. Raises ConnectionAbortedError if the client stops reading."""
    for begin in range(0, len(part), WRITE_BYTES):
        try:
            await asyncio.wait_for(response.write(memoryview(part)[begin:begin + WRITE_BYTES]), BODY_S)
        except asyncio.TimeoutError:
            if http.transport:
                http.transport.abort()
            raise ConnectionAbortedError("the client has stopped reading") from None
