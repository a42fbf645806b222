"""Files of the Files API in the store: what a client uploads for a batch, and what a batch writes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, NamedTuple

from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.front.store.gone import place_of_gone

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts


WRITTEN = 0
THERE = 1
DELETED = 2
PART_BYTES = 1 << 20    # of a file, read or written at a time
PART_LINES = 500


class File(NamedTuple):
    """A row of `files`."""

    id: int
    name: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    requests: int
    created: int
    expires: int | None
    state: int
    note: str | None

    @property
    def body(self) -> dict:
        """As the API shows it."""
        return {"id": self.name, "object": "file", "bytes": self.bytes, "created_at": self.created,
                "expires_at": self.expires, "filename": self.filename, "purpose": self.purpose,
                "status": "processed", "status_details": self.note}


class LineRow(NamedTuple):
    """A line of a file that a client uploads. One without a request is blank."""

    number: int
    text: bytes
    custom_id: str | None = None
    url: str | None = None
    model: str | None = None
    problem: str | None = None

    @property
    def asks(self) -> bool:
        return bool(self.text.strip())


def owns(owner: str, row_owner: str) -> bool:
    """May this owner see what that one made? Without keys whoever knows the name, which cannot be
    guessed."""
    return owner == row_owner or owner[:1] == row_owner[:1] == "@"


def create(connection: sqlite3.Connection, owner: str, filename: str, purpose: str, now: int,
           expires: int | None = None) -> File:
    """A file that is still to be written."""
    name = f"file-{secrets.token_hex(12)}"
    connection.execute("INSERT INTO files (name, owner, filename, purpose, created, expires) VALUES "
                       "(?, ?, ?, ?, ?, ?)", (name, owner, filename, purpose, now, expires))
    return file_named(connection, name)


def file_named(connection: sqlite3.Connection, name: str) -> File:
    """The file with this name. LookupError if there is none."""
    row = connection.execute(f"SELECT {', '.join(File._fields)} FROM files WHERE name = ?",
                             (name,)).fetchone()
    if row is None:
        raise LookupError(name)
    return File(*row)


def file_of_owner(connection: sqlite3.Connection, name: str, owner: str, param: str = "id") -> File:
    """The file with this name that this owner may see; RequestError 404 if there is none."""
    try:
        file = file_named(connection, name)
        if file.state == THERE and owns(owner, file.owner):
            return file
    except LookupError:
        pass
    raise RequestError(f"there is no file {shown(name)}", status=404, code="not_found", param=param)


def add_lines(connection: sqlite3.Connection, file: int, rows: Seq[LineRow]):
    connection.executemany("INSERT INTO lines (file, number, text, custom_id, url, model, problem) "
                           "VALUES (?, ?, ?, ?, ?, ?, ?)", [(file, *row) for row in rows])
    connection.execute(
        "UPDATE files SET bytes = bytes + ?, requests = requests + ?, line_count = line_count + ? "
        "WHERE id = ?",
        (sum(len(row.text) for row in rows), sum(row.asks for row in rows), len(rows), file))


def longest_line(connection: sqlite3.Connection, file: int) -> Parts[int]:
    """How many bytes the longest line of a file has."""
    longest = 0
    last = -1
    while rows := connection.execute("SELECT LENGTH(text), number FROM lines WHERE file = ? AND number > ? "
                                     "ORDER BY number LIMIT ?", (file, last, PART_LINES)).fetchall():
        longest = max(longest, *(length for length, _ in rows))
        last = rows[-1][1]
        yield
    return longest


def content(connection: sqlite3.Connection, file: int, after: int) -> tuple[bytes, int]:
    """(the next part of its content, the number of the last line of that): those after line `after`."""
    parts = list[bytes]()
    size = 0
    for number, text in connection.execute(
            "SELECT number, text FROM lines WHERE file = ? AND number > ? ORDER BY number", (file, after)):
        parts.append(text)
        after = number
        size = size + len(text)
        if size >= PART_BYTES:
            break
    return b"".join(parts), after


def list_rows(connection: sqlite3.Connection, table: str, fields: Seq[str], owner: str, after: str,
              limit: int, ascending: bool = False, more: str = "") -> Parts[list[tuple]]:
    """The rows of an owner after the one called `after`: at most one more than `limit`. RequestError for an
    unknown `after`. fields: the first is the number of a row. more: a condition on rows."""
    place = 0 if ascending else 1 << 62
    if after:
        row = (connection.execute(f"SELECT id, owner FROM {table} WHERE name = ?", (after,)).fetchone()
               or place_of_gone(connection, table, after))
        if row is None or not owns(owner, row[1]):
            raise bad_value("after", after, "the id of a row of the list")
        place = row[0]
    found = list[tuple]()
    rows = [()]
    while rows and len(found) <= limit:
        rows = connection.execute(
            f"SELECT {', '.join(fields)} FROM {table} WHERE owner = ?{more} "
            f"AND id {'> ? ORDER BY id' if ascending else '< ? ORDER BY id DESC'} LIMIT ?",
            (owner, place, min(PART_LINES, limit + 1 - len(found)))).fetchall()
        found += rows
        place = found[-1][0] if rows else place
        yield
    return found


def delete(connection: sqlite3.Connection, file: File):
    """Nobody sees it from now on; `purge` removes its lines."""
    connection.execute("UPDATE files SET state = ? WHERE id = ?", (DELETED, file.id))


def purge(connection: sqlite3.Connection) -> bool:
    """Remove some lines of what was deleted, and the file with the last of them. True if there are more."""
    row = connection.execute("SELECT id FROM files WHERE state = ? LIMIT 1", (DELETED,)).fetchone()
    if row is None:
        return False
    last = None
    size = 0
    for last, length in connection.execute(
            "SELECT number, LENGTH(text) FROM lines WHERE file = ? ORDER BY number LIMIT ?",
            (*row, PART_LINES)):
        size += length
        if size > PART_BYTES:
            break
    if last is None:
        connection.execute("DELETE FROM files WHERE id = ?", row)
    else:
        connection.execute("DELETE FROM lines WHERE file = ? AND number <= ?", (*row, last))
    return True
