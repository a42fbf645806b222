"""A table of routes: its rows, and by which of them a request came."""

from __future__ import annotations

import os.path
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from enum import Enum
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.front.api.tables import BODY_FIELDS

if TYPE_CHECKING:
    from aiohttp import web
    from chat_server import Front
    from chatlm.front.api.fields import Field


NO_SCHEMA: Mapping = types.MappingProxyType({})


class Api(Enum):
    """Whose API a route belongs to: its errors have the shape that this API's clients read."""

    NANOCHAT = "nanochat"
    OPENAI = "OpenAI"
    ANTHROPIC = "Anthropic"
    OLLAMA = "Ollama"


class Route(NamedTuple):
    """One route. Router, access rules, log, errors and /openapi.json are made from its row."""

    method: str
    path: str
    api: Api
    handler: str | Callable[[Front, Seq[str]], Any]  # a method, or what makes the JSON (see Front.show)
    doc: str
    query: tuple[Field, ...] = ()   # of the address, after the question mark
    returns: Mapping = NO_SCHEMA    # the schema of the body that it answers with, where one is described
    open: bool = False              # needs no API key
    quiet: bool = False             # logged only at level debug if all is well
    polled: bool = False            # the same, and served on surplus connections too

    @property
    def pattern(self) -> str:
        return re.sub(r":[^}]*", "", self.path)

    @property
    def fields(self) -> tuple[Field, ...]:
        """Of the body, which ANSWER_READERS or TEXT_READERS has a reader for."""
        return BODY_FIELDS.get(self.pattern, ())


class RouteTable:
    """Finds the row of a request. The paths of requests begin with `prefix`, those of rows do not."""

    def __init__(self, rows: Iterable[Route], prefix: str = ""):
        self.prefix, self.rows = prefix, {row.pattern: row for row in rows}

    def row_of(self, http: web.Request) -> Route:
        """The row whose handler answers. For a request without a handler, an unnamed row of the API whose
        path begins most like the request's."""
        if resource := http.match_info.route.resource:
            return self.rows[resource.canonical.removeprefix(self.prefix).rstrip("/") or "/"]
        words = http.path.removeprefix(self.prefix).split("/")
        nearest = max(self.rows.values(),
                      key=lambda row: len(os.path.commonprefix([row.path.split("/"), words])))
        return Route("", "", nearest.api, "", "no route")

    def is_polled(self, path: str) -> bool:
        """For a request that has not been matched with a row yet."""
        return any(row.polled and path.rstrip("/") == self.prefix + row.path for row in self.rows.values())
