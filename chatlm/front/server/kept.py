"""What the routes of the store share: pages of lists, small bodies, and the answer without --database."""

from __future__ import annotations

import math
import time
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.front.api.fields import header_words, json_object, parse_fields
from chatlm.front.api.ignored import unread
from chatlm.front.lazy import web
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.streams import read_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from chatlm.front.api.fields import Field
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.store.store import Store


DAY_S = 86400
NO_STORE = "this server keeps nothing of this kind: it was started without --database"


def stored(store: Store | None) -> Store:
    """RequestError 404 without --database."""
    if store is None:
        raise RequestError(NO_STORE, status=404, code="no_database")
    return store


def now_s() -> int:
    return int(time.time())


def asked(http: web.Request, field: Field, default: Any) -> Any:
    """A parameter after the question mark."""
    text = http.query.get(field.name)
    if text is None:
        return default
    return field.read(number_in(text) if field.low > -math.inf else text)


def number_in(text: str) -> int | str:
    """The integer that a text says; any other text as it is, for its field to refuse."""
    # isdigit would include "²", which int refuses
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text


def paged(rows: Seq[dict], limit: int) -> web.Response:
    """A page of a list, of which one row too many was read if there are more."""
    data = rows[:limit]
    return json_response({"object": "list", "data": data, "has_more": len(rows) > limit,
                          "first_id": data[0]["id"] if data else None,
                          "last_id": data[-1]["id"] if data else None})


async def read_small_object(http: web.Request, bodies: Bodies) -> dict:
    """The checked fields of a small body; of none, no fields."""
    record = REQUEST_LOG.get()
    with bodies.holding() as holding:
        raw = await read_bytes(http, holding)
    if len(raw) > LIMITS.inline_bytes:
        raise RequestError(f"the body has more than {LIMITS.inline_bytes:,} bytes", status=413,
                           code="request_entity_too_large")
    body = json_object(raw or b"{}")
    values = parse_fields(body, record.route.fields)
    if ignored := header_words(unread(body, record.route.fields)):
        record.headers["X-Ignored-Fields"] = ", ".join(ignored)[:1000]
    return values
