"""Moves chats that earlier versions have kept into the tables of this one, in pieces."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from chatlm.common.jsontext import as_json
from chatlm.front.annexes.chats.record_fields import bytes_of, write_fields, write_words
from chatlm.front.annexes.chats.records import CHAT, searched_pieces
from chatlm.front.store.migrate import MOVED_ROWS, some

if TYPE_CHECKING:
    import sqlite3


def move_records(connection: sqlite3.Connection) -> bool:
    """A piece of: records that were one text become fields. True if there is more."""
    rows = some(connection.execute(
        "SELECT number, owner, kind, name, chat, parent, rev, said, updated, changed, nodes_left, body "
        "FROM old_chat_records ORDER BY number LIMIT ?", (MOVED_ROWS,)), slice(11, 12))
    for row in rows:
        move_record(connection, *row)
    return bool(rows)


def move_record(connection: sqlite3.Connection, number: int, owner: str, kind: str, name: str, chat: str,
                parent: str, rev: int, said: int, updated: float, changed: int, nodes_left: int, body: str):
    connection.execute(
        "INSERT INTO chat_records (number, owner, kind, name, chat, parent, rev, said, updated, changed, "
        "deleted, nodes_left) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (number, owner, kind, name, chat, parent, rev, said, updated, changed, not body, nodes_left))
    if body:
        values = json.loads(body)
        texts = {name: as_json(value) for name, value in values.items()}
        write_fields(connection, number, texts)
        words = write_words(connection, number, owner, name if kind == CHAT else chat,
                            searched_pieces(kind, values))
        connection.execute("UPDATE chat_records SET bytes = ?, words = ? WHERE number = ?",
                           (bytes_of(texts), words, number))
    for table, columns in ("chat_answers", "record, stream"), ("chat_shown", "record, picture"):
        connection.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM old_{table} "
                           "WHERE record = ?", (number,))
    connection.execute("DELETE FROM old_chat_records WHERE number = ?", (number,))
