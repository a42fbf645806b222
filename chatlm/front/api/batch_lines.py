"""The lines of a batch, in the form of OpenAI's Batch API: {"custom_id", "method", "url", "body"}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, RequestError, bad_value, shown
from chatlm.common.jsontext import as_json, is_text
from chatlm.common.messages.requests import Picture
from chatlm.front.api.picture_parts import fill_in, lift_pictures
from chatlm.front.api.reading import read_answer
from chatlm.front.api.spoken import paths_of_batches
from chatlm.front.api.spoken import answer_form

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known, ParsedBody


LONGEST_LINE = 16 << 20
EACH = object()  # in a path: each element of a list
# Paths of members that depend on the moment, or on what else was computed. With them, a batch that was
# interrupted would have other results.
PASSING = (("timings",), ("usage", "prompt_tokens_details"),
           ("usage", "completion_tokens_details", "accepted_prediction_tokens"),
           ("usage", "completion_tokens_details", "rejected_prediction_tokens"),
           ("choices", EACH, "logprobs", "content", EACH, "drafted"),
           ("output", EACH, "content", EACH, "logprobs", EACH, "drafted"))


class BatchLine(NamedTuple):
    """One request of a batch."""

    number: int     # from 1
    custom_id: str
    url: str        # one of `paths_of_batches`
    body: dict
    id: str         # of its answer: 32 digits that follow from the line

    @property
    def model(self) -> str:
        """The name of the model in its body; "" if it has none."""
        name = self.body.get("model")
        return storable(name[:1000]) if is_text(name) else ""

    @property
    def seed(self) -> int:
        """The seed of its answer, if its body names none: the same whenever the answer is made."""
        return int(self.id[:12], 16)

    def body_alone(self) -> dict:
        """Its body without what concerns more than its answer: it is not streamed or kept. Raises
        RequestError if it continues another answer."""
        return answer_form(self.url).alone(self.body)

    def read_body(self, known: Known) -> ParsedBody:
        """Read its body as its route does. If the body names no seed, the seed follows from the line."""
        known = replace(known, settings=replace(known.settings, seed=self.seed))
        parsed = read_answer(self.url, self.body_alone(), known)
        request = replace(parsed.request, id=self.id, low_priority=True, resumable=False)
        return replace(parsed, request=request)

    def problem(self, known: Known, refusal: str) -> str:
        """What is wrong with its body; "" if nothing. Its pictures are not decoded before it is run. refusal:
        why its model cannot see pictures; "": it can."""
        try:
            lift = lift_pictures(self.body)
            lift.check(refusal)
            fill_in(self.body, [Picture(1, 1, b"", bytes(16))] * len(lift.files))
            self.read_body(known)
        except ChatServerError as error:
            return str(error)
        return ""

    def result(self, status: int, body: Mapping[str, Any]) -> str:
        """The line of the output file for its answer, or for an error with this status."""
        response = {"status_code": status, "request_id": self.id, "body": body}
        return as_json({"id": f"batch_req_{self.id}", "custom_id": self.custom_id, "response": response,
                        "error": None})


def read_line(number: int, text: bytes) -> BatchLine:
    """Read a line. Raises RequestError that says what is wrong with it, and what is allowed."""
    def refuse(what: str) -> RequestError:
        return RequestError(f"line {number:,}: {what}", code="invalid_line")

    if len(text) > LONGEST_LINE:
        raise refuse(f"has more than {LONGEST_LINE:,} bytes")
    try:
        fields = json.loads(text.decode("utf-8-sig"))  # a file's first line may begin with a mark
    except (ValueError, RecursionError):
        raise refuse("is not JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise refuse(f"must be an object, not {shown(fields)}")
    custom_id = fields.get("custom_id")
    url = fields.get("url")
    body = fields.get("body")
    if not is_text(custom_id) or not 0 < len(custom_id) <= 512 or storable(custom_id) != custom_id:
        raise refuse("custom_id must be a text of at most 512 characters")
    if fields.get("method", "POST") != "POST":
        raise refuse(f"method must be POST, not {shown(fields['method'])}")
    if url not in paths_of_batches():
        raise refuse(f"url must be one of {', '.join(paths_of_batches())}, not {shown(url)}")
    if not isinstance(body, dict):
        raise refuse("body must be an object")
    if body.get("stream"):
        raise refuse(str(bad_value("stream", True, "false in a batch")))
    return BatchLine(number, custom_id, url, body, line_id(number, text))


def storable(text: str) -> str:
    """The text in a form that UTF-8 can hold. JSON can escape halves of characters, which UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def line_id(number: int, text: bytes) -> str:
    return hashlib.sha256(b"%d %s" % (number, text)).hexdigest()[:32]


def bad_line_result(number: int, error: ChatServerError, custom_id: str | None = None) -> str:
    return as_json({"id": f"batch_req_{number}", "custom_id": custom_id, "response": None,
                    "error": {"code": error.code, "message": str(error)}})


def lasting_body(body: dict, created: int) -> dict:
    """The body of an answer without PASSING, as if it had been made at `created`, in seconds since 1970, with
    nothing cached. Responses must say how much was cached, so there it is 0."""
    for *path, name in PASSING:
        for place in objects_at(body, path):
            place.pop(name, None)
    usage = body.get("usage")
    details = usage.get("input_tokens_details") if isinstance(usage, dict) else None
    if isinstance(details, dict):
        details.update(dict.fromkeys(details, 0))
    times = [name for name in ("created", "created_at", "completed_at") if body.get(name) is not None]
    return body | dict.fromkeys(times, created)


def objects_at(body: Any, path: Seq[Any]) -> Iterator[dict]:
    """The objects at a path in a body of any shape."""
    if not path:
        if isinstance(body, dict):
            yield body
    elif path[0] is EACH:
        for each in body if isinstance(body, list) else ():
            yield from objects_at(each, path[1:])
    elif isinstance(body, dict):
        yield from objects_at(body.get(path[0]), path[1:])
