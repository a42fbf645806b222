"""Errors on their way to a client: one conversion, and the body of each API.

Errors are raised deep. Only `public_error` turns an exception into what a client may see. Three sinks send
that: a response (`errors_to_responses`), the last frame of a stream (`Encoder.failed`), and the result of a
line of a batch (`failed_answer`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chatlm.common import client_words
from chatlm.common.client_words import SERVER_ERROR, TOO_LONG
from chatlm.common.errors import ChatServerError, EngineFailure, lack_of_memory
from chatlm.common.log import log


def public_error(error: BaseException | None) -> ChatServerError:
    """What a client may see of an exception. Our own errors stay as they are. Others are logged with their
    details, and a client only learns whether memory was short."""
    if isinstance(error, ChatServerError):
        return error
    lack = error and lack_of_memory(error)
    if lack:
        log.error("%s", lack, exc_info=error)
        return EngineFailure(f"{SERVER_ERROR} It has too little memory; its log has the details")
    log.error("unexpected error", exc_info=error)
    return EngineFailure(f"{SERVER_ERROR} Its log has the details")


def openai_error(error: ChatServerError) -> dict:
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}


def native_error(error: ChatServerError) -> dict:
    """nanochat's body, and OpenAI's too, for an OpenAI client whose base URL lacks /v1."""
    return {"detail": str(error), **openai_error(error)}


ANTHROPIC_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
                    500: "api_error", 503: "overloaded_error"}


ANTHROPIC_CODES = ("tool_reference_unresolved",)  # codes of ours that its clients know


def anthropic_error(error: ChatServerError) -> dict:
    kind = ANTHROPIC_ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    details = {"details": {"error_code": error.code}} if error.code in ANTHROPIC_CODES else {}
    return {"type": "error", "error": {
        "type": kind, "message": error.said_to(client_words.ANTHROPIC), **details}}


def ollama_error(error: ChatServerError) -> dict:
    return {"error": error.said_to(client_words.OLLAMA)}


def response_error(error: ChatServerError) -> dict:
    """The member `error` of a response of OpenAI's Responses that has failed."""
    return {"code": error.code or error.type, "message": str(error)}


def is_plain(error: ChatServerError) -> bool:
    """Is nanochat's `detail` enough as the body of an error? Not if the prompt is too long: `chat --url`
    reads the code of that error."""
    return error.status == 400 and error.code != TOO_LONG


@dataclass(frozen=True)
class Api:
    """Whose API a route belongs to. Its words of errors are here and not with its dialect: a wrong path or a
    missing key is refused before any dialect is loaded, and several dialects are of one API."""

    name: str
    error: Callable[[ChatServerError, str], dict]  # its body of an error; the text is the request's id
    header: str = ""  # by which its clients are known at paths that another API has too


NANOCHAT = Api(
    "nanochat", lambda error, _: {"detail": str(error)} if is_plain(error) else native_error(error))
OPENAI = Api("OpenAI", lambda error, _: openai_error(error))
ANTHROPIC = Api("Anthropic", lambda error, request_id: anthropic_error(error) | {"request_id": request_id},
                "anthropic-version")
OLLAMA = Api("Ollama", lambda error, _: ollama_error(error))


def failed_answer(error: BaseException) -> tuple[int, dict]:
    """(status, body) for a line of a batch that has no answer. Batches only have OpenAI's endpoints."""
    public = public_error(error)
    return public.status, openai_error(public)
