"""The owners of what the store has: texts go along when a key is given an owner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


def rename_owners(connection: sqlite3.Connection, renamed: Iterable[tuple[str, str]]):
    """Give what some owners have to others, in all tables with a column `owner`, those of annexes included.
    Reads them whole, but only once for each owner: what it had goes along.

    renamed: pairs of the former and the new owner."""
    tables = [name for name, in connection.execute(
        "SELECT tables.name FROM sqlite_schema AS tables JOIN pragma_table_info(tables.name) AS columns "
        "WHERE tables.type = 'table' AND columns.name = 'owner' AND tables.name <> 'holdings'").fetchall()]
    for former, owner in renamed:
        if not connection.execute("SELECT 1 FROM holdings WHERE owner = ?", (former,)).fetchone():
            continue
        for table in tables:  # OR IGNORE: of approvals, which both owners may have used
            connection.execute(f'UPDATE OR IGNORE "{table}" SET owner = ? WHERE owner = ?', (owner, former))
        connection.execute(
            "INSERT INTO holdings (owner, bytes) SELECT ?, bytes FROM holdings WHERE owner = ? "
            "ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes", (owner, former))
        connection.execute("DELETE FROM holdings WHERE owner = ?", (former,))
