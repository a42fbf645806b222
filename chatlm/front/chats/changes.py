"""Chats in the store: what changes make of them, and what has changed since a revision.

Each change gets the next revision, one number for the whole database, so that a device only has to know the
last one that it has seen."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.common.jsontext import as_json
from chatlm.front.chats import pictures
from chatlm.front.chats.reading import RECORD_BYTES, ReadChange
from chatlm.front.chats.records import (
    CHAT, NODE, PROJECT, PROMPT, Change, goes_as_far, is_late, is_same_end, joined_end, missing_in, moved_in,
    patched, searched_text, sibling_of)
from chatlm.front.store.pages import PAGE_BYTES

if TYPE_CHECKING:
    import sqlite3


MOST_CHATS = 10_000  # of an owner
MOST_NODES = 10_000  # of a chat
MOST_OTHERS = 1_000  # of an owner
MOST = {CHAT: MOST_CHATS, NODE: MOST_NODES, PROJECT: MOST_OTHERS, PROMPT: MOST_OTHERS}
TOLD_S = 180 * 86_400  # for how long a deletion is told of
PAGE_ROWS = 500        # of changes
PURGED_ROWS = 200
# What is there of a chat that is deleted still has to go; nobody sees it
OF_DELETED = ("EXISTS (SELECT 1 FROM chat_records AS chats WHERE chats.owner = found.owner "
              "AND chats.kind = 'chat' AND chats.name = found.chat AND chats.body = '')")


class Record(NamedTuple):
    """A row of `chat_records`."""

    number: int
    chat: str
    rev: int
    said: int
    text: str  # its body

    @property
    def body(self) -> dict:
        return json.loads(self.text)


def revisions(connection: sqlite3.Connection) -> tuple[int, int]:
    """(the last revision, that of the last deletion which nobody is told of any more)."""
    return connection.execute("SELECT rev, forgotten FROM chat_revisions WHERE id = 1").fetchone()


class Outcome(NamedTuple):
    """What became of a change."""

    id: str
    state: str         # stored, sibling, deleted or refused
    rev: int = 0
    record: str = ""   # JSON, if it is not what the device has now
    error: str = ""
    param: str = ""
    sibling: str = ""  # the id of the node that keeps an edit


class Changing:
    """Changes of one owner, in a transaction."""

    def __init__(self, connection: sqlite3.Connection, owner: str, now_s: int):
        self.connection = connection
        self.owner = owner
        self.now_s = now_s

    def found(self, kind: str, name: str) -> Record | None:
        row = self.connection.execute(
            "SELECT number, chat, rev, said, body FROM chat_records WHERE owner = ? AND kind = ? "
            "AND name = ?", (self.owner, kind, name)).fetchone()
        return Record(*row) if row else None

    def next_revision(self) -> int:
        self.connection.execute("UPDATE chat_revisions SET rev = rev + 1 WHERE id = 1")
        return revisions(self.connection)[0]

    def make(self, read: ReadChange) -> Outcome:
        """Do a change that was read. Asked again, it does nothing more."""
        if read.problem:
            return Outcome(read.id, "refused", error=read.problem, param=read.param)
        patch = None if read.patch is None else json.loads(read.patch)
        change = Change(read.kind, read.id, read.base, patch)
        record = self.found(change.kind, change.id)
        try:
            if record and not record.text:
                return Outcome(change.id, "deleted", record.rev)
            if change.patch is None:
                return self.delete(change, record)
            return self.update(change, record) if record else self.create(change, change.patch)
        except RequestError as error:
            return Outcome(change.id, "refused", record.rev if record else 0, record.text if record else "",
                           str(error), error.param or "")

    # new records

    def create(self, change: Change, patch: dict) -> Outcome:
        body = patched({}, patch)
        if missing := missing_in(change.kind, body):
            raise RequestError(f"there is no {change.kind} {shown(change.id)}, and a new one needs {missing}",
                               code="missing_required_parameter", param=missing)
        chat = self.chat_of(body) if change.kind == NODE else ""
        if chat is None:
            return Outcome(change.id, "deleted")
        self.check_count(change.kind, chat)
        pictures.check_shown(self.connection, self.owner, body)
        rev = self.next_revision()
        text = sized(body)
        self.connection.execute(
            "INSERT INTO chat_records (owner, kind, name, chat, parent, rev, said, body, words, updated, "
            "changed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?)",
            (self.owner, change.kind, change.id, chat, body.get("parent", ""), rev, rev, text,
             updated_ms(body), self.now_s))
        record = self.found(change.kind, change.id)
        assert record
        self.note_words(change.kind, change.id, record, body)
        if change.kind == NODE:
            pictures.note_shown(self.connection, self.owner, record.number, body)
        return Outcome(change.id, "stored", rev)

    def chat_of(self, body: dict) -> str | None:
        """The chat of a new node; None if that is deleted, or what the node follows. Raises RequestError if
        there is no such chat, or nothing that it follows."""
        name = body["conversation"]
        chat = self.found(CHAT, name)
        if chat is None:
            raise RequestError(f"there is no chat {shown(name)}", code="not_found", param="conversation")
        if not chat.text:
            return None
        if "parent" not in body:
            return name
        parent = self.found(NODE, body["parent"])
        if parent and not parent.text:
            return None
        if parent is None or parent.chat != name:
            raise RequestError(f"there is no node {shown(body['parent'])} in this chat", code="not_found",
                               param="parent")
        return name

    def check_count(self, kind: str, chat: str):
        """Raises RequestError if there are as many as there may be."""
        (count,) = self.connection.execute(
            "SELECT COUNT(*) FROM chat_records WHERE owner = ? AND chat = ? AND kind = ? AND body <> ''",
            (self.owner, chat, kind)).fetchone()
        if count >= MOST[kind]:
            where = "a chat" if kind == NODE else "an owner"
            raise RequestError(f"{where} may have {MOST[kind]:,} {kind}s", code="too_many")

    # records that are there

    def update(self, change: Change, record: Record) -> Outcome:
        body = record.body
        patch = change.patch or {}
        if change.kind == NODE:
            if moved := moved_in(body, patch):
                raise RequestError(f"a node keeps its {moved}", param=moved)
            if is_late(body, patch):
                return Outcome(change.id, "stored", record.rev, record.text)
            growing = "stream" in body
            if is_same_end(body, patch):
                if goes_as_far(body, patch):
                    patch = joined_end(body, patch)
                growing = goes_as_far({**body, **patch}, body)
            said = patch.get("content", body["content"])
            if said != body["content"] and change.base < record.said and not growing:
                return self.keep_beside(change, body, said)
        changed = patched(body, patch)
        if missing := missing_in(change.kind, changed):
            raise RequestError(f"a {change.kind} keeps its {missing}", param=missing)
        known = change.base >= record.rev
        if changed == body:
            return Outcome(change.id, "stored", record.rev, "" if known else record.text)
        text = sized(changed)
        pictures.check_shown(self.connection, self.owner, changed)
        rev = self.next_revision()
        said_at = rev if changed.get("content") != body.get("content") else record.said
        self.connection.execute(
            "UPDATE chat_records SET rev = ?, said = ?, body = ?, updated = ?, changed = ? WHERE number = ?",
            (rev, said_at, text, updated_ms(changed), self.now_s, record.number))
        self.note_words(change.kind, change.id, record, changed)
        if change.kind == NODE:
            pictures.note_shown(self.connection, self.owner, record.number, changed)
        return Outcome(change.id, "stored", rev, "" if known else text)

    def keep_beside(self, change: Change, body: dict, said: str) -> Outcome:
        """Two devices have edited a node, and neither knew of the other: keep the later edit as its
        sibling."""
        name = sibling_of(change, said)
        if self.found(NODE, name) is None:
            patch = patched(body, {**(change.patch or {}), "stream": None, "ended": None})
            outcome = self.create(Change(NODE, name, 0, patch), patch)
            if outcome.state != "stored":
                return outcome
        record = self.found(NODE, change.id)
        assert record
        return Outcome(change.id, "sibling", record.rev, record.text, sibling=name)

    def note_words(self, kind: str, name: str, record: Record, body: dict):
        folded = searched_text(kind, body)
        chat = name if kind == CHAT else record.chat
        self.connection.execute("DELETE FROM chat_words WHERE record = ?", (record.number,))
        if folded:
            self.connection.execute(
                "INSERT INTO chat_words (record, owner, chat, folded) VALUES (?, ?, ?, ?)",
                (record.number, self.owner, chat, folded))
        self.connection.execute("UPDATE chat_records SET words = ? WHERE number = ?",
                                (len(folded.encode()), record.number))

    # deletions

    def delete(self, change: Change, record: Record | None) -> Outcome:
        """Of a chat all nodes go, of a node all that follow it."""
        if record is None:  # it never came, or its chat is gone; a device that made it may send it yet
            if change.kind == NODE:
                return Outcome(change.id, "deleted")
            rev = self.next_revision()
            self.connection.execute(
                "INSERT INTO chat_records (owner, kind, name, rev, said, body, words, changed) "
                "VALUES (?, ?, ?, ?, ?, '', 0, ?)",
                (self.owner, change.kind, change.id, rev, rev, self.now_s))
            return Outcome(change.id, "deleted", rev)
        rev = self.bury(record.number)
        if change.kind == CHAT:
            self.connection.execute("UPDATE chat_records SET nodes_left = 1 WHERE number = ?",
                                    (record.number,))
        for number, _ in self.nodes_below(change.id, record.chat) if change.kind == NODE else ():
            self.bury(number)
        return Outcome(change.id, "deleted", rev)

    def bury(self, number: int) -> int:
        """Leave nothing of a record but that it is deleted."""
        rev = self.next_revision()
        self.connection.execute("DELETE FROM chat_words WHERE record = ?", (number,))
        self.connection.execute("DELETE FROM chat_shown WHERE record = ?", (number,))
        self.connection.execute(
            "UPDATE chat_records SET rev = ?, body = '', words = 0, changed = ? WHERE number = ?",
            (rev, self.now_s, number))
        return rev

    def nodes_below(self, name: str, chat: str) -> list[tuple[int, str]]:
        children: dict[str, list[tuple[int, str]]] = {}
        for number, child, parent in self.connection.execute(
                "SELECT number, name, parent FROM chat_records WHERE owner = ? AND chat = ? AND body <> ''",
                (self.owner, chat)):
            children.setdefault(parent, []).append((number, child))
        found = children.get(name, [])
        for _, child in found:
            found += children.get(child, [])
        return found


def updated_ms(body: dict) -> float:
    return body.get("updated", body["created"])


def sized(body: dict) -> str:
    """A record's text. Raises RequestError if it is too large."""
    text = as_json(body)
    if len(text.encode()) > RECORD_BYTES:
        raise RequestError(f"a record may have {RECORD_BYTES:,} bytes", code="too_large", param="patch")
    return text


class ChangedRow(NamedTuple):
    """A record that has changed. text: "" if it is deleted."""

    kind: str
    id: str
    rev: int
    text: str


class ChangedPage(NamedTuple):
    """What has changed after a revision; rev: up to which this page goes."""

    rev: int
    rows: Seq[ChangedRow]
    more: bool


def changed_after(connection: sqlite3.Connection, owner: str, after: int) -> ChangedPage:
    """The next changes of an owner. Raises RequestError 410 if deletions since are not known any more."""
    last, forgotten = revisions(connection)
    if after > last or 0 < after < forgotten:
        raise RequestError("what has changed since this revision is not known any more: list all chats anew "
                           "(after=0), and drop those that were synchronized and are not listed",
                           status=410, code="revision_gone", param="after")
    rows = list[ChangedRow]()
    size = 0
    hidden = "" if after else " AND body <> ''"  # a new device need not know what was deleted
    for row in connection.execute(
            "SELECT kind, name, rev, body FROM chat_records AS found WHERE owner = ? AND rev > ? "
            f"AND NOT {OF_DELETED}{hidden} ORDER BY rev LIMIT ?", (owner, after, PAGE_ROWS + 1)):
        if len(rows) == PAGE_ROWS or size > PAGE_BYTES:
            return ChangedPage(rows[-1].rev, rows, True)
        rows.append(ChangedRow(*row))
        size += len(rows[-1].text)
    return ChangedPage(rows[-1].rev if rows else after or 0, rows, False)


def expire(connection: sqlite3.Connection, before_s: int, now_s: int) -> tuple[set[str], bool]:
    """Delete some of the chats in which nothing has changed since then; those with newer messages are dated
    anew. (the owners of deleted chats, whether there may be more to do)"""
    owners = set[str]()
    found = connection.execute(
        "SELECT number, owner, name FROM chat_records WHERE kind = 'chat' AND body <> '' AND changed < ? "
        "LIMIT ?", (before_s, PURGED_ROWS)).fetchall()
    for number, owner, name in found:
        [last] = connection.execute("SELECT MAX(changed) FROM chat_records WHERE owner = ? AND chat = ?",
                                    (owner, name)).fetchone()
        if last is not None and last >= before_s:
            connection.execute("UPDATE chat_records SET changed = ? WHERE number = ?", (last, number))
        else:
            changing = Changing(connection, owner, now_s)
            changing.delete(Change(CHAT, name, 0, None), changing.found(CHAT, name))
            owners.add(owner)
    return owners, bool(found)


def purge(connection: sqlite3.Connection, now_s: int) -> bool:
    """Remove some nodes of deleted chats, and deletions that nobody is told of any more. True if there are
    more."""
    numbers = list[int]()
    chat = connection.execute(
        "SELECT number, owner, name FROM chat_records WHERE nodes_left = 1 LIMIT 1").fetchone()
    if chat:
        numbers += [number for number, in connection.execute(
            "SELECT number FROM chat_records WHERE owner = ? AND chat = ? LIMIT ?", (*chat[1:], PURGED_ROWS))]
        if len(numbers) < PURGED_ROWS:
            connection.execute("UPDATE chat_records SET nodes_left = 0 WHERE number = ?", chat[:1])
    old = connection.execute(
        "SELECT number, rev FROM chat_records WHERE body = '' AND changed < ? LIMIT ?",
        (now_s - TOLD_S, PURGED_ROWS)).fetchall()
    if old:
        last = max(rev for _, rev in old)
        connection.execute("UPDATE chat_revisions SET forgotten = MAX(forgotten, ?) WHERE id = 1", (last,))
    connection.executemany("DELETE FROM chat_records WHERE number = ?",
                           [(number,) for number in (*numbers, *(number for number, _ in old))])
    return bool(chat) or len(old) == PURGED_ROWS
