"""Spaces: what clients of a server without keys own. An address answers for those that it has made up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS, SPACE
from chatlm.common.errors import RequestError

if TYPE_CHECKING:
    import sqlite3

FORGOTTEN_S = 86_400  # a space that has nothing is forgotten after a day


def client_of(connection: sqlite3.Connection, space: str) -> str | None:
    """The address that wrote to a space first; None for one that nobody wrote to."""
    row = connection.execute("SELECT client FROM spaces WHERE owner = ?", (space,)).fetchone()
    return row and row[0]


def note(connection: sqlite3.Connection, owner: str, client: str):
    """A client makes something for an owner. If that is a space, it counts for the client's address from then
    on. Raises RequestError if the address has too many."""
    if not owner.startswith(SPACE) or client_of(connection, owner) is not None:
        return
    if count_of(connection, client) >= LIMITS.spaces:
        connection.execute(
            "DELETE FROM spaces WHERE client = ? AND noted < CAST(strftime('%s', 'now') AS INTEGER) - ? "
            "AND NOT EXISTS (SELECT 1 FROM holdings WHERE holdings.owner = spaces.owner AND bytes > 0)",
            (client, FORGOTTEN_S))
    if count_of(connection, client) >= LIMITS.spaces:
        raise RequestError(f"your address has made {LIMITS.spaces:,} spaces (X-Chat-Space): delete what is "
                           "in some of them, or ask again tomorrow", status=403, code="too_many_spaces")
    connection.execute("INSERT INTO spaces (owner, client, noted) VALUES (?, ?, strftime('%s', 'now'))",
                       (owner, client))


def count_of(connection: sqlite3.Connection, client: str) -> int:
    return connection.execute("SELECT COUNT(*) FROM spaces WHERE client = ?", (client,)).fetchone()[0]


def held_bytes(connection: sqlite3.Connection, client: str) -> int:
    """What the spaces of an address have."""
    row = connection.execute("SELECT SUM(bytes) FROM spaces JOIN holdings ON holdings.owner = spaces.owner "
                             "WHERE client = ?", (client,)).fetchone()
    return row[0] or 0
