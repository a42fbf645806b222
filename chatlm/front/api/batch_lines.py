"""The lines of a batch, as OpenAI's Batch API has them: {"custom_id", "method", "url", "body"}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from chatlm.common.errors import ChatServerError, RequestError, bad_value, shown
from chatlm.common.jsontext import as_json, is_text

ENDPOINTS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
LONGEST_LINE = 16 << 20
# What depends on the moment or on what else was computed, so that a batch that was interrupted would differ
PASSING = (("timings",), ("usage", "prompt_tokens_details"), ("usage", "input_tokens_details"),
           ("usage", "completion_tokens_details", "accepted_prediction_tokens"),
           ("usage", "completion_tokens_details", "rejected_prediction_tokens"))


class Line(NamedTuple):
    """One request of a batch."""

    number: int     # from 1
    custom_id: str
    url: str        # one of ENDPOINTS
    body: dict
    id: str         # of its answer: 32 digits that follow from the line

    @property
    def seed(self) -> int:
        """Of an answer whose body names none: the same whenever it is made."""
        return int(self.id[:12], 16)


def read_line(number: int, text: bytes) -> Line:
    """RequestError that says what is wrong with the line, and what is allowed."""
    def refuse(what: str) -> RequestError:
        return RequestError(f"line {number:,}: {what}", code="invalid_line")
    if len(text) > LONGEST_LINE:
        raise refuse(f"has more than {LONGEST_LINE:,} bytes")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise refuse("is not JSON") from None
    if not isinstance(fields, dict):
        raise refuse(f"must be an object, not {shown(fields)}")
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not is_text(custom_id) or not 0 < len(custom_id) <= 512:
        raise refuse("custom_id must be a text of at most 512 characters")
    if fields.get("method", "POST") != "POST":
        raise refuse(f"method must be POST, not {shown(fields['method'])}")
    if url not in ENDPOINTS:
        raise refuse(f"url must be one of {', '.join(ENDPOINTS)}, not {shown(url)}")
    if not isinstance(body, dict):
        raise refuse("body must be an object")
    if body.get("stream"):
        raise refuse(str(bad_value("stream", True, "false in a batch")))
    return Line(number, custom_id, url, body, hashlib.sha256(b"%d %s" % (number, text)).hexdigest()[:32])


def result_of(line: Line, status: int, body: Mapping[str, Any]) -> str:
    """The line of the output file for an answer, or for the error with this status."""
    response = {"status_code": status, "request_id": line.id, "body": body}
    return as_json({"id": f"batch_req_{line.id}", "custom_id": line.custom_id, "response": response,
                    "error": None})


def result_of_bad_line(number: int, error: ChatServerError) -> str:
    return as_json({"id": f"batch_req_{number}", "custom_id": None, "response": None,
                    "error": {"code": error.code, "message": str(error)}})


def lasting_body(body: dict, created: int) -> dict:
    """The body of an answer without PASSING, as if it had been made at `created`, in seconds since 1970."""
    for *path, name in PASSING:
        place: Any = body
        for member in path:
            place = place.get(member) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(name, None)
    return body | {name: created for name in ("created", "created_at") if name in body}
