"""Responses and conversations in the store, as the Responses API has them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, shown
from chatlm.front.store.files import owns

if TYPE_CHECKING:
    import sqlite3


MOST_TURNS = 10_000  # of a chain of responses


class Kept(NamedTuple):
    """A row of `responses`. input, output: lists of items, and the whole body, as JSON."""

    name: str
    owner: str
    created: int
    expires: int
    previous: str | None
    conversation: str | None
    input: bytes
    output: bytes
    body: bytes


class Conversation(NamedTuple):
    """A row of `conversations`."""

    id: int
    name: str
    owner: str
    created: int
    expires: int
    metadata: str


def refuse(what: str, name: str, param: str = "id") -> RequestError:
    return RequestError(f"there is no {what} {shown(name)}", status=404, code="not_found", param=param)


def keep(connection: sqlite3.Connection, kept: Kept, items: Seq[bytes]):
    """Note a response; items: what it adds to its conversation, if that is still there."""
    connection.execute(f"INSERT INTO responses ({', '.join(Kept._fields)}) VALUES "
                       f"({', '.join('?' * len(kept))})", kept)
    if kept.conversation:
        row = connection.execute("SELECT id FROM conversations WHERE name = ? AND owner = ?",
                                 (kept.conversation, kept.owner)).fetchone()
        if row:
            add_items(connection, row[0], items, kept.expires)


def found(connection: sqlite3.Connection, name: str, owner: str, param: str = "id") -> Kept:
    row = connection.execute(f"SELECT {', '.join(Kept._fields)} FROM responses WHERE name = ?",
                             (name,)).fetchone()
    if row is None or not owns(owner, row[1]):
        raise refuse("response", name, param)
    return Kept(*row)


def delete(connection: sqlite3.Connection, name: str, owner: str):
    found(connection, name, owner)
    connection.execute("DELETE FROM responses WHERE name = ?", (name,))


def joined(lists: Seq[bytes]) -> bytes:
    """One JSON list of all members of these. RequestError if it is larger than a body may be."""
    if (size := sum(map(len, lists))) > LIMITS.body_bytes:
        raise RequestError(f"what was said before has {size:,} bytes, at most {LIMITS.body_bytes:,} are "
                           "allowed", code="context_length_exceeded")
    return b"[%s]" % b", ".join(filter(None, (each[1:-1] for each in lists)))


def before(connection: sqlite3.Connection, previous: str, conversation: str, owner: str) -> bytes:
    """What was said up to a response, or in a conversation, as a JSON list of items."""
    lists: list[bytes] = []
    if conversation:
        row = conversation_named(connection, conversation, owner, "conversation")
        return joined([b"[%s]" % body for (body,) in connection.execute(
            "SELECT body FROM items WHERE conversation = ? ORDER BY id", (row.id,))])
    name, size = previous, 0
    while name and len(lists) < 2 * MOST_TURNS and size <= LIMITS.body_bytes:
        kept = found(connection, name, owner, "previous_response_id")
        lists += [kept.output, kept.input]
        name, size = kept.previous, size + len(kept.output) + len(kept.input)
    return joined(lists[::-1])


def create_conversation(connection: sqlite3.Connection, owner: str, now: int, expires: int, metadata: str,
                        items: Seq[bytes]) -> Conversation:
    name = f"conv_{secrets.token_hex(24)}"
    row = connection.execute("INSERT INTO conversations (name, owner, created, expires, metadata) VALUES "
                             "(?, ?, ?, ?, ?)", (name, owner, now, expires, metadata))
    assert row.lastrowid
    add_items(connection, row.lastrowid, items, expires)
    return conversation_named(connection, name, owner)


def conversation_named(connection: sqlite3.Connection, name: str, owner: str,
                       param: str = "id") -> Conversation:
    row = connection.execute(f"SELECT {', '.join(Conversation._fields)} FROM conversations WHERE name = ?",
                             (name,)).fetchone()
    if row is None or not owns(owner, row[2]):
        raise refuse("conversation", name, param)
    return Conversation(*row)


def add_items(connection: sqlite3.Connection, conversation: int, items: Seq[bytes], expires: int):
    connection.executemany("INSERT INTO items (conversation, body) VALUES (?, ?)",
                           [(conversation, item) for item in items])
    connection.execute("UPDATE conversations SET expires = ? WHERE id = ?", (expires, conversation))


def items_of(connection: sqlite3.Connection, conversation: int) -> list[bytes]:
    return [body for (body,) in connection.execute(
        "SELECT body FROM items WHERE conversation = ? ORDER BY id", (conversation,))]


def delete_conversation(connection: sqlite3.Connection, name: str, owner: str):
    row = conversation_named(connection, name, owner)
    connection.execute("DELETE FROM items WHERE conversation = ?", (row.id,))
    connection.execute("DELETE FROM conversations WHERE id = ?", (row.id,))


def forget(connection: sqlite3.Connection, now: int):
    """Delete what has expired."""
    connection.execute("DELETE FROM responses WHERE expires < ?", (now,))
    connection.execute("DELETE FROM items WHERE conversation IN (SELECT id FROM conversations WHERE "
                       "expires < ?)", (now,))
    connection.execute("DELETE FROM conversations WHERE expires < ?", (now,))
