"""Reads the body of POST /v1/chats/changes: in the front if it is small, else in a sandbox, since a client
chooses what it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple

from chatlm.common.errors import RequestError, bad_value
from chatlm.common.jsontext import as_json, whole_unicode
from chatlm.front.api.fields import json_object
from chatlm.front.chats.records import read_change

MOST_CHANGES = 500
RECORD_BYTES = 4 << 20      # of a patch, and of a record
DETAILS_BYTES = 512 << 10   # of all but its texts: the store's thread parses it, and others wait for that
LONG = "content", "reasoning", "pictures", "system", "prompt", "text", "files", "knowledge"


class ReadChange(NamedTuple):
    """A change as the store gets it, or why it is refused."""

    kind: str
    id: str
    base: int
    patch: str | None  # JSON; None: delete the record
    problem: str = ""
    param: str = ""


def read_changes(body: bytes | bytearray) -> list[ReadChange]:
    """The changes of a body. One that cannot be done is refused by itself. Raises RequestError for a body
    without a list of changes."""
    changes = json_object(body).get("changes")
    if not isinstance(changes, list) or not 1 <= len(changes) <= MOST_CHANGES:
        raise bad_value("changes", changes, f"a list of 1 to {MOST_CHANGES} changes")
    return [read_one(change) for change in changes]


def read_one(value) -> ReadChange:
    try:
        change = read_change(value)
        patch = None if change.patch is None else whole_unicode(as_json(change.patch))
        check_size(change.patch or {}, patch or "")
    except RequestError as error:
        kind, name = (value.get("kind"), value.get("id")) if isinstance(value, dict) else ("", "")
        shown = [each if isinstance(each, str) and len(each) <= 64 else "" for each in (kind, name)]
        return ReadChange(shown[0], shown[1], 0, None, str(error), error.param or "")
    return ReadChange(change.kind, change.id, change.base, patch)


def check_size(patch: Mapping, text: str):
    """Raises RequestError for a patch that is too large. text: the patch as JSON."""
    if len(text.encode()) > RECORD_BYTES:
        raise RequestError(f"a record may have {RECORD_BYTES:,} bytes", code="too_large", param="patch")
    if len(text) > DETAILS_BYTES:
        for name, value in patch.items():
            if name not in LONG and len(as_json(value)) > DETAILS_BYTES:
                raise RequestError(f"{name} may have {DETAILS_BYTES:,} bytes", code="too_large", param=name)


def read_in_sandbox(body: bytes) -> Seq[Seq]:
    """A task of a sandbox: `read_changes`, as lists."""
    return [list(change) for change in read_changes(body)]
