"""The table of routes: what a row has, and which row a request matches."""

from __future__ import annotations

import os.path
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TYPE_CHECKING, TypeVar

from chatlm.front.api.spoken import fields_of

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.front.api.errors import Api
    from chatlm.front.api.fields import Field


T = TypeVar("T")
# A method of a T, which answers requests
Handler = Callable[[T, "web.Request"], Awaitable["web.StreamResponse"]]


async def answer_nothing(room: object, http: web.Request) -> web.StreamResponse:
    """The handler of requests that match no row: aiohttp has refused them before."""
    raise AssertionError


def no_fields(pattern: str) -> tuple[Field, ...]:
    return ()


@dataclass(frozen=True)
class Route(Generic[T]):
    """One route, whose handler is a method of T. Router, access rules, log, errors and /openapi.json are made
    from its row, which stands beside its handler."""

    method: str
    path: str
    api: Api
    handler: Handler[T]
    doc: str
    query: tuple[Field, ...] = ()   # parameters after the question mark
    body: tuple[Field, ...] = ()    # of a path of no dialect, whose form has them
    returns: Mapping = field(default_factory=dict)  # the schema of the response's body, if described
    open: bool = False              # needs no API key
    operator_act: str = ""          # what only an operator may do here: "load and unload models"; "": anyone
    quiet: bool = False             # successes are logged only at level debug
    polled: bool = False            # likewise, and also served on surplus connections
    added: Callable[[str], tuple[Field, ...]] = no_fields  # by annexes, to the body of its pattern
    also: tuple[Api, ...] = ()      # APIs that have this path too; the header of their clients tells

    def with_added(self, fields: Callable[[str], tuple[Field, ...]]) -> Route[T]:
        """The same route, with fields that annexes add to its body: those of its pattern."""
        return replace(self, added=fields)

    def api_for(self, headers: Mapping[str, str]) -> Api:
        """Whose API a request with these headers asks."""
        return next((api for api in self.also if api.header in headers), self.api)

    @property
    def pattern(self) -> str:
        return re.sub(r":[^}]*", "", self.path)

    @property
    def fields(self) -> tuple[Field, ...]:
        """All fields of the body."""
        if self.method == "GET":  # a list has the path of what makes its rows
            return ()
        return (*(self.body or fields_of(self.pattern)), *self.added(self.pattern))


class RouteTable:
    """Finds the row of a request. Paths of requests begin with `prefix`, paths of rows do not."""

    def __init__(self, rows: Iterable[Route], prefix: str = ""):
        self.prefix = prefix
        self.by_method = {(row.method, row.pattern): row for row in rows}
        self.rows = {row.pattern: row for row in self.by_method.values()}

    def row_of(self, http: web.Request) -> Route:
        """The row whose handler answers. For a request without one, an unnamed row of the API whose path
        shares the longest beginning with the request's."""
        if resource := http.match_info.route.resource:
            pattern = resource.canonical.removeprefix(self.prefix).rstrip("/") or "/"
            method = "GET" if http.method == "HEAD" else http.method
            return self.by_method.get((method, pattern), self.rows[pattern])
        words = http.path.removeprefix(self.prefix).split("/")
        nearest = max(self.rows.values(),
                      key=lambda row: len(os.path.commonprefix([row.path.split("/"), words])))
        return Route("", "", nearest.api, answer_nothing, "no route")

    def is_polled(self, path: str) -> bool:
        """Is the path polled? For requests that have not been matched with a row yet."""
        return any(row.polled and path.rstrip("/") == self.prefix + row.path for row in self.rows.values())
