"""The served models as Anthropic's API lists them.

Its clients and OpenAI's ask the same routes, and tell by the header `anthropic-version` which they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import invalid, shown
from chatlm.common.log import utc
from chatlm.front.api.errors import ANTHROPIC
from chatlm.front.api.field_types import INTEGER, TEXT
from chatlm.front.api.fields import A_TEXT, Field
from chatlm.front.server.stored_lists import query_value

if TYPE_CHECKING:
    from aiohttp import web


PAGE_LIMIT = Field("limit", INTEGER, "with anthropic-version: models of a page (20)", 1, 1000)
AFTER_ID = Field("after_id", TEXT, "with anthropic-version: the id of the last model of the page before")
BEFORE_ID = Field("before_id", TEXT, "with anthropic-version: the id of the first model of the page after")
PAGE_QUERY = PAGE_LIMIT, AFTER_ID, BEFORE_ID
A_PAGE = {"description": "with anthropic-version", "type": "object", "properties": {
    "data": {"type": "array", "items": {"type": "object", "properties": {
        "type": {"enum": ["model"]}, "id": A_TEXT, "display_name": A_TEXT, "created_at": A_TEXT}}},
    "has_more": {"type": "boolean"}, "first_id": {"type": ["string", "null"]},
    "last_id": {"type": ["string", "null"]}}}


def asks_as_anthropic(http: web.Request) -> bool:
    """Whether the request comes from a client of Anthropic's API."""
    return ANTHROPIC.header in http.headers


def anthropic_model(body: Mapping[str, Any]) -> dict:
    """A model in Anthropic's format, made of its body in OpenAI's format."""
    return {"type": "model", "id": body["id"], "display_name": body["id"],
            "created_at": utc(body["created"]), "max_input_tokens": body.get("context_length"),
            "max_tokens": body.get("context_length"), "lifecycle": "active", "deprecated_at": None,
            "retires_at": None, "line": None, "capabilities": None}


def anthropic_page(http: web.Request, models: Seq[Mapping[str, Any]]) -> dict:
    """The page of models that a request asks for. Raises RequestError for a page that does not exist."""
    names = [model["id"] for model in models]
    limit = query_value(http, PAGE_LIMIT, 20)
    after = query_value(http, AFTER_ID, None)
    before = query_value(http, BEFORE_ID, None)
    if after is not None and before is not None:
        raise invalid("after_id", "after_id and before_id exclude each other")
    if before is not None:
        end = place_of(before, names, "before_id")
        begin = max(0, end - limit)
        has_more = begin > 0
    else:
        begin = 0 if after is None else place_of(after, names, "after_id") + 1
        end = begin + limit
        has_more = end < len(models)
    page = [anthropic_model(model) for model in models[begin:end]]
    return {"data": page, "has_more": has_more, "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None}


def place_of(name: str, names: Seq[str], param: str) -> int:
    if name not in names:
        raise invalid(param, f"{param} must be the id of one of the served models, not {shown(name)}")
    return names.index(name)
