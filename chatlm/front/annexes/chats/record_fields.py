"""The fields of records as JSON texts: each is a row of the store, and is parsed only when it is asked for.

So the time that a change takes grows with the change, and not with the record that it changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence as Seq
from functools import cached_property
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


NULL = "null"      # the text of a field that is not there
FIELD_BYTES = 24   # that a field takes besides its text


class Fields(Mapping[str, Any]):
    """The values of fields, from their texts."""

    def __init__(self, texts: Mapping[str, str]):
        self.texts = texts
        self.parsed: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.parsed:
            self.parsed[name] = json.loads(self.texts[name])
        return self.parsed[name]

    def __contains__(self, name: object) -> bool:
        return name in self.texts

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


class StoredTexts(Mapping[str, str]):
    """The texts of a record in the store."""

    def __init__(self, connection: sqlite3.Connection, record: int):
        self.connection = connection
        self.record = record
        self.read: dict[str, str] = {}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of each text."""
        return dict(self.connection.execute("SELECT name, LENGTH(CAST(value AS BLOB)) FROM chat_fields "
                                            "WHERE record = ?", (self.record,)))

    def __getitem__(self, name: str) -> str:
        if name not in self.read:
            row = self.connection.execute("SELECT value FROM chat_fields WHERE record = ? AND name = ?",
                                          (self.record, name)).fetchone()
            if row is None:
                raise KeyError(name)
            self.read[name] = row[0]
        return self.read[name]

    def __contains__(self, name: object) -> bool:
        return name in self.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def bytes_of(texts: Mapping[str, str]) -> int:
    """What fields take."""
    return sum(len(text.encode()) + FIELD_BYTES for text in texts.values())


def write_fields(connection: sqlite3.Connection, record: int, texts: Mapping[str, str]):
    """Give a record these fields; those that are null go."""
    connection.executemany("DELETE FROM chat_fields WHERE record = ? AND name = ?",
                           [(record, name) for name, text in texts.items() if text == NULL])
    connection.executemany("INSERT INTO chat_fields (record, name, value) VALUES (?, ?, ?) "
                           "ON CONFLICT (record, name) DO UPDATE SET value = excluded.value",
                           [(record, name, text) for name, text in texts.items() if text != NULL])


def write_words(connection: sqlite3.Connection, record: int, owner: str, chat: str, pieces: Seq[str]) -> int:
    """What a search finds a record by, in place of what there was; the bytes that it takes."""
    connection.execute("DELETE FROM chat_words WHERE record = ?", (record,))
    connection.executemany("INSERT INTO chat_words (record, owner, chat, folded) VALUES (?, ?, ?, ?)",
                           [(record, owner, chat, piece) for piece in pieces])
    return sum(len(piece.encode()) for piece in pieces)


def text_of(connection: sqlite3.Connection, record: int, without: str = "") -> str:
    """A record as JSON. without: the name of a field that it is to lack."""
    rows = connection.execute("SELECT name, value FROM chat_fields WHERE record = ? AND name <> ? "
                              "ORDER BY name", (record, without))
    return "{%s}" % ", ".join(f'"{name}": {value}' for name, value in rows)
