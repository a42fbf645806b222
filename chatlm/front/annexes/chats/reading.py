"""Reads the body of POST /v1/chats/changes: in the front if it is small, else in a sandbox, since a client
chooses what it is made of."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from chatlm.common.errors import RequestError, bad_value
from chatlm.front.annexes.chats.record_fields import Fields
from chatlm.front.annexes.chats.records import Change, is_text, read_change
from chatlm.front.api.fields import json_object

MOST_CHANGES = 500


class ReadChange(NamedTuple):
    """A change as the store gets it; or why it is refused, and its id."""

    change: Change
    problem: str = ""
    param: str = ""

    @property
    def bytes(self) -> int:
        """About what it adds."""
        patch = self.change.patch
        texts = 0 if patch is None else sum(map(len, patch.texts.values()))
        return texts + sum(map(len, self.change.words))


def read_changes(body: bytes | bytearray) -> list[ReadChange]:
    """The changes of a body. One that cannot be done is refused by itself. Raises RequestError for a body
    without a list of changes."""
    changes = json_object(body).get("changes")
    if not isinstance(changes, list) or not 1 <= len(changes) <= MOST_CHANGES:
        raise bad_value("changes", changes, f"a list of 1 to {MOST_CHANGES} changes")
    return [read_one(change) for change in changes]


def read_one(value) -> ReadChange:
    try:
        return ReadChange(read_change(value))
    except RequestError as error:
        name = value.get("id") if isinstance(value, dict) else ""
        shown = name if is_text(name) and len(name) <= 64 else ""
        return ReadChange(Change("", shown, 0, None), str(error), error.param or "")


def read_in_sandbox(body: bytes) -> Seq[Seq]:
    """A task of a sandbox: `read_changes`, as `unpacked` takes them."""
    return [[read.change.kind, read.change.id, read.change.base,
             None if read.change.patch is None else dict(read.change.patch.texts), read.change.words,
             read.problem, read.param] for read in read_changes(body)]


def unpacked(values: Seq) -> ReadChange:
    kind, name, base, texts, words, problem, param = values
    patch = None if texts is None else Fields(texts)
    return ReadChange(Change(kind, name, base, patch, words), problem, param)
