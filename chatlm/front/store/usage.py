"""The table of what was used: a row for each day, key, model and lane."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Seq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


KEYS = ("day", "key", "model", "background")
AMOUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "compute_s")
UPSERT = (f"INSERT INTO usage ({', '.join((*KEYS, *AMOUNTS))}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
          f"ON CONFLICT DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in AMOUNTS)}")


def add(connection: sqlite3.Connection, rows: Iterable[Seq]):
    """Add amounts to rows. Each: the KEYS, then the AMOUNTS."""
    connection.executemany(UPSERT, rows)


def tokens_since(connection: sqlite3.Connection, day: str) -> dict[tuple[str, str], int]:
    """(day, key) -> the tokens that were used, from a day on."""
    return {(day, key): tokens for day, key, tokens in connection.execute(
        "SELECT day, key, SUM(prompt_tokens + completion_tokens) FROM usage WHERE day >= ? "
        "GROUP BY day, key", (day,))}


def newest(connection: sqlite3.Connection, first: str, last: str, own: str | None, most: int) -> list[Seq]:
    """The newest rows of these days, KEYS and AMOUNTS of each. own: of this key only."""
    return connection.execute(
        f"SELECT {', '.join((*KEYS, *AMOUNTS))} FROM usage "
        "WHERE day BETWEEN ? AND ? AND key = IFNULL(?, key) "
        "ORDER BY day DESC, key, model, background LIMIT ?", (first, last, own, most)).fetchall()
