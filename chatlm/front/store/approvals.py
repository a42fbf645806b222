"""The calls that clients have approved of, as the store keeps them: a row is there before its call begins."""

from __future__ import annotations

import secrets
from typing import NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

PURGED = 500  # rows at once
SECRET = "approvals"
ROW_BYTES = 300  # that a row takes besides its result


class Use(NamedTuple):
    """What is known of the call of an approval. Times are in seconds since 1970."""

    began: int
    response: str             # the name of the response that made it, if that is kept; else ""
    ended: int | None = None  # None: nothing is known of its end
    failed: bool = False
    result: str = ""


def secret(connection: sqlite3.Connection) -> bytes:
    """What the ids of approval requests are signed with, made at the first start."""
    connection.execute("INSERT OR IGNORE INTO secrets (name, value) VALUES (?, ?)",
                       (SECRET, secrets.token_bytes(32)))
    return connection.execute("SELECT value FROM secrets WHERE name = ?", (SECRET,)).fetchone()[0]


def use_of(connection: sqlite3.Connection, owner: str, name: str) -> Use | None:
    """What is known of the call of an owner's approval; None: it has not begun."""
    row = connection.execute("SELECT began, response, ended, failed, result FROM approvals "
                             "WHERE owner = ? AND name = ?", (owner, name)).fetchone()
    return row and Use(row[0], row[1], row[2], bool(row[3]), row[4])


def begin(connection: sqlite3.Connection, owner: str, name: str, use: Use, expires: int) -> Use | None:
    """Note that the call of an approval begins. Returns what is known of it if it has begun before; then it
    must not begin again."""
    added = connection.execute(
        "INSERT OR IGNORE INTO approvals (owner, name, began, response, expires) VALUES (?, ?, ?, ?, ?)",
        (owner, name, use.began, use.response, expires))
    return None if added.rowcount else use_of(connection, owner, name)


def end(connection: sqlite3.Connection, owner: str, name: str, use: Use):
    connection.execute("UPDATE approvals SET ended = ?, failed = ?, result = ? WHERE owner = ? AND name = ?",
                       (use.ended, use.failed, use.result, owner, name))


def purge(connection: sqlite3.Connection, now: int) -> bool:
    """Remove some rows of approvals that can be used no more. Returns whether there are more."""
    gone = connection.execute(
        "DELETE FROM approvals WHERE (owner, name) IN "
        "(SELECT owner, name FROM approvals WHERE expires < ? LIMIT ?)", (now, PURGED))
    return gone.rowcount == PURGED
