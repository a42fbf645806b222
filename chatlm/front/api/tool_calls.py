"""The body of POST /v1/tools/call. Its arguments are for a tool server: nobody here needs more of them than
that they are JSON, so they stay a text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import strict_json
from chatlm.common.messages.protocol import SandboxResult
from chatlm.front.api.field_types import OBJECT, SWITCH, TEXT
from chatlm.front.api.fields import Field, header_words, json_object, parse_fields
from chatlm.front.api.ignored import unread
from chatlm.front.tools.transport import CallArguments

CALL_FIELDS = (
    Field("name", TEXT, "of a tool, as in GET /v1/tools", required=True),
    Field("arguments", OBJECT, "an object, as the tool's parameters say", required=True),
    Field("digest", TEXT, "of the tool, as it was when a person approved of it: with another one, 409"),
    Field("stream", SWITCH, "server-sent events: the progress, and at the end the result"))


def read_call(raw: bytes | bytearray) -> tuple[dict[str, Any], str]:
    """The checked fields of a body, with its arguments as CallArguments, and the names of fields without
    effect. Raises RequestError."""
    body = json_object(raw or b"{}")
    values = parse_fields(body, CALL_FIELDS)
    try:
        strict_json(values["arguments"])
    except ValueError:
        raise RequestError("arguments has NaN or Infinity, which JSON does not have",
                           param="arguments") from None
    except RecursionError:
        raise RequestError("arguments is nested too deeply", param="arguments") from None
    values["arguments"] = CallArguments.of(values["arguments"])
    return values, ", ".join(header_words(unread(body, CALL_FIELDS)))


class CallTasks:
    """The sandbox's task for large bodies."""

    def prepare(self, name: str, arguments: Sequence):
        """Nothing has to be prepared."""

    def read_call(self, raw: bytes) -> SandboxResult:
        values, ignored = read_call(raw)
        arguments = values.pop("arguments")
        return SandboxResult([values, ignored, base64.b64encode(arguments.text).decode(), arguments.scalars])


def unpacked_call(packed: list) -> tuple[dict[str, Any], str]:
    """What `read_call` returns, from the result of the task."""
    values, ignored, text, scalars = packed
    return {**values, "arguments": CallArguments(base64.b64decode(text), scalars)}, ignored
