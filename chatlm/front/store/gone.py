"""Where rows of lists stood that are gone: the next page of a list goes on behind a row that was deleted, as
by a client that deletes what it lists. Triggers note them; the newest of an owner are kept for a day."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


MOST_GONE = 1000      # of an owner
DAY_S = 86400
GONE = f"""
CREATE TABLE gone (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    list TEXT NOT NULL,             -- which list the row was in
    name TEXT NOT NULL,             -- its id there
    place INTEGER NOT NULL,         -- what the list is ordered by
    noted INTEGER NOT NULL
);
CREATE INDEX gone_by_name ON gone (list, name, id);
CREATE INDEX gone_of_owner ON gone (owner, id);
CREATE INDEX gone_by_time ON gone (noted);
CREATE TRIGGER gone_added AFTER INSERT ON gone BEGIN
    DELETE FROM gone WHERE owner = NEW.owner AND id <= (SELECT id FROM gone WHERE owner = NEW.owner
        ORDER BY id DESC LIMIT 1 OFFSET {MOST_GONE});
END;
"""


def noting(table: str, event: str, list_name: str, name: str, place: str, source: str = "") -> str:
    """The trigger that notes rows of a table. event: what removes one from its list; list_name, name, place:
    SQL about it, as OLD; source: where its `owner` is found, if not in it."""
    owner = "owner" if source else "OLD.owner"
    return f"""
CREATE TRIGGER {table}_gone AFTER {event} BEGIN
    INSERT INTO gone (owner, list, name, place, noted)
        SELECT {owner}, {list_name}, {name}, {place}, CAST(strftime('%s', 'now') AS INTEGER) {source};
END;
"""


def place_of_gone(connection: sqlite3.Connection, list_name: str, name: str) -> tuple[int, str] | None:
    """(where a row stood in a list, its owner); None if no such row is known to have gone."""
    return connection.execute("SELECT place, owner FROM gone WHERE list = ? AND name = ? ORDER BY id DESC "
                              "LIMIT 1", (list_name, name)).fetchone()


def forget_gone(connection: sqlite3.Connection, now_s: int, most: int) -> bool:
    """Forget some that have been gone for a day. True if there may be more."""
    forgotten = connection.execute(
        "DELETE FROM gone WHERE id IN (SELECT id FROM gone WHERE noted < ? LIMIT ?)", (now_s - DAY_S, most))
    return forgotten.rowcount == most
