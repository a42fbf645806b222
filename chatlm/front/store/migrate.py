"""Moves what earlier versions have kept into the tables of this one, in pieces."""

from __future__ import annotations

import json
import re
import secrets
from typing import TYPE_CHECKING

from chatlm.common.jsontext import dump, is_text

if TYPE_CHECKING:
    import sqlite3


# at once
MOVED_ROWS = 500
MOVED_BYTES = 4 << 20
ITEM_BYTES = 256
PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_"}


def move_kept(connection: sqlite3.Connection) -> bool:
    """A piece of: the items of responses, which were lists in one row, and those of conversations, whose ids
    were in their texts alone, become rows. Several items may have had one id. True if there is more."""
    if _move_responses(connection) or _move_items(connection):
        return True
    connection.execute("DROP TABLE old_responses")
    connection.execute("DROP TABLE old_items")
    return False


def name_kept(connection: sqlite3.Connection) -> bool:
    """A piece of: the items of responses are found by owner and name. True if there is more."""
    (last,) = connection.execute("SELECT IFNULL(MAX(part), 0) FROM part_names").fetchone()
    named = connection.execute(
        "INSERT INTO part_names (part, owner, name, kind) "
        "SELECT parts.id, CASE WHEN owner LIKE '@%' THEN '@' ELSE owner END, parts.name, kind "
        "FROM parts JOIN responses ON responses.id = response WHERE parts.id > ? AND kind <> 2 "
        "ORDER BY parts.id LIMIT ?", (last, MOVED_ROWS))
    return named.rowcount == MOVED_ROWS


def some(cursor: sqlite3.Cursor, texts: slice) -> list[tuple]:
    """The next rows, as many as are moved at once."""
    rows = []
    size = 0
    for row in cursor:
        rows.append(row)
        size += sum(map(len, row[texts]))
        if size > MOVED_BYTES:
            break
    return rows


def _move_responses(connection: sqlite3.Connection) -> bool:
    rows = some(connection.execute(
        "SELECT rowid, name, owner, created, expires, previous, conversation, input, output, body "
        "FROM old_responses ORDER BY rowid LIMIT ?", (MOVED_ROWS,)), slice(7, 10))
    for place, *values, asked, answered, body in rows:
        parts = [(0, *_named(item, False)) for item in json.loads(asked)]
        parts += [(1, *_named(item, True)) for item in json.loads(answered)]
        parts.append((2, values[0], body))
        size = sum(len(text) + ITEM_BYTES for _, _, text in parts)
        new = connection.execute(
            "INSERT INTO responses (name, owner, created, expires, previous, conversation, bytes) VALUES "
            "(?, ?, ?, ?, ?, ?, ?)", (*values, size)).lastrowid
        connection.executemany("INSERT INTO parts (response, kind, name, body) VALUES (?, ?, ?, ?)",
                               [(new, *part) for part in parts])
        connection.execute("DELETE FROM old_responses WHERE rowid = ?", (place,))
    return bool(rows)


def _move_items(connection: sqlite3.Connection) -> bool:
    rows = some(connection.execute("SELECT id, conversation, body FROM old_items ORDER BY id LIMIT ?",
                                   (MOVED_ROWS,)), slice(2, 3))
    for place, conversation, text in rows:
        item = json.loads(text)
        name, body = _named(item, True)
        if connection.execute("SELECT 1 FROM items WHERE conversation = ? AND name = ?",
                              (conversation, name)).fetchone():
            name, body = _named(item, False)
        connection.execute("INSERT INTO items (id, conversation, name, body) VALUES (?, ?, ?, ?)",
                           (place, conversation, name, body))
        connection.execute("UPDATE conversations SET bytes = bytes + ? WHERE id = ?",
                           (len(body) + ITEM_BYTES, conversation))
        connection.execute("DELETE FROM old_items WHERE id = ?", (place,))
    return bool(rows)


def _named(item: dict, own: bool) -> tuple[str, bytes]:
    """An item's id and its text without it, completed as items are shown. own: it has one of its own."""
    kind = item.get("type") or "message"
    name = item.get("id") if own else None
    if not is_text(name) or not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
        name = PREFIXES.get(kind, "item_") + secrets.token_hex(12)
    whole = {"type": kind, "status": "completed"}
    whole |= {key: value for key, value in item.items() if value is not None and key != "id"}
    if kind == "message" and is_text(whole.get("content")):
        answered = whole.get("role") == "assistant"
        part = {"type": "output_text" if answered else "input_text", "text": whole["content"]}
        whole["content"] = [part | ({"annotations": []} if answered else {})]
    return name, dump(whole)
