"""JSON and error responses, and the record of each request."""

from __future__ import annotations

import contextvars
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TYPE_CHECKING, TypeVar

from aiohttp import web

from chatlm.common.errors import ChatServerError, Overloaded, RequestError
from chatlm.common.jsontext import dump
from chatlm.front.admission.sandbox import WRITE_BYTES
from chatlm.front.api.errors import native_error, public_error
from chatlm.front.server.inflate import READ
from chatlm.front.server.page import POLICY, missing_page

if TYPE_CHECKING:
    from chatlm.front.api.errors import Api
    from chatlm.front.server.routes import Handler, Route


T = TypeVar("T")


def json_response(value, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=dump(value), status=status, headers=headers, content_type="application/json")


def shows(body: Callable[[T, Sequence[str]], Any]) -> Handler[T]:
    """The handler of a route that depends only on the limits of the key. `body` makes the JSON, or a status
    and the JSON, of an object and the models that the key is limited to."""
    async def show(room: T, http: web.Request) -> web.StreamResponse:
        value = body(room, REQUEST_LOG.get().bound)
        status, value = value if isinstance(value, tuple) else (200, value)
        return json_response(value, status)
    return show


async def send_whole(http: web.Request, body: bytes) -> web.Response:
    """Send up to 20 MB of JSON; aiohttp sends a BytesIO in parts, between which other tasks run.

    It has been sent when this returns: the caller holds the body's bytes of a budget, and the ledger counts
    what a client got."""
    response = web.Response(body=body if len(body) <= WRITE_BYTES else io.BytesIO(body),
                            content_type="application/json", headers={"X-Request-Id": REQUEST_LOG.get().id})
    await response.prepare(http)
    await response.write_eof()
    return response


SECURITY_HEADERS = {
    POLICY:
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src *; "
        "object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "chat_server",
}


@dataclass
class RequestLog:
    """What the front knows about an HTTP request beyond what aiohttp does."""

    id: str         # X-Request-Id of the response: the request's own, unless that is taken or the answer kept
    client: str     # its address (see client_at), or the name of its API key once that was checked
    route: Route    # its row of ROUTES
    api: Api        # of that row, but OpenAI's for a body of OpenAI on nanochat's route
    note: str = ""  # goes into the access log line
    headers: dict[str, str] = field(default_factory=dict)  # more headers of the response
    counts: dict = field(default_factory=dict)  # goes into its JSON form
    bound: tuple[str, ...] = ()  # models that its API key is limited to; () = all
    role: str = ""               # of that key
    tools: tuple[str, ...] = ()  # tool servers, or SERVER.TOOL, that it may use; "*": all
    space: str = ""              # of X-Chat-Space, on a server without keys: who owns its texts
    sent_id: str = ""            # X-Request-Id of the request, if `id` is another one


REQUEST_LOG: contextvars.ContextVar[RequestLog] = contextvars.ContextVar("REQUEST_LOG")  # of this task


async def errors_to_responses(http: web.Request, handler: Callable, home: str = "/") -> web.StreamResponse:
    """The one place where an exception becomes a response, in the shape of the API that was called. A browser
    that asks for what is not there gets a page with a link to `home`."""
    try:
        return await handler(http)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        if error.status == 404 and (page := missing_page(http, home)):
            return page
        text = {404: f"there is no {http.path}", 405: f"{http.path} does not accept {http.method}"}.get(
            error.status, error.reason)
        failure = RequestError(text, status=error.status, code=error.reason.lower().replace(" ", "_"))
        return error_response(failure, {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {})
    except ConnectionError as error:  # the client has left: this response only sets the access log's status
        return error_response(RequestError(str(error), status=499))
    except Exception as error:        # keep it in no variable: its traceback holds this frame
        return error_response(public_error(error))


def error_response(failure: ChatServerError, headers: Mapping[str, str] | None = None) -> web.Response:
    challenge = {"WWW-Authenticate": "Bearer"} if failure.status == 401 else {}
    readable = {"Accept-Encoding": READ} if failure.code == "unsupported_encoding" else {}
    headers = {**(headers or {}), **challenge, **readable, **retry_header(failure)}
    return json_response(error_shape(failure), failure.status, headers)


def error_shape(failure: ChatServerError) -> dict:
    """The body of an error, as clients of the API that was called read it."""
    record = REQUEST_LOG.get()
    return record.api.error(failure, record.id)


def retry_header(failure: ChatServerError) -> dict[str, str]:
    return {"Retry-After": str(failure.retry_after_s)} if isinstance(failure, Overloaded) else {}


def early_response(failure: ChatServerError) -> web.Response:
    """Answer a request that never reaches the application, in two APIs' shapes, and close the connection."""
    headers = SECURITY_HEADERS | retry_header(failure)
    response = json_response(native_error(failure), failure.status, headers)
    response.force_close()
    return response
