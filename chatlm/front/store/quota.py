"""How much of the database each owner takes, and may take.

Triggers (chatlm/front/store/schema.py) keep the sums in the table `holdings` while rows of files, batches,
responses and conversations come, change and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError

if TYPE_CHECKING:
    import sqlite3


def held_bytes(connection: sqlite3.Connection, owner: str) -> int:
    """What everything of an owner takes that is not deleted."""
    row = connection.execute("SELECT bytes FROM holdings WHERE owner = ?", (owner,)).fetchone()
    return row[0] if row else 0


def refusal(connection: sqlite3.Connection, owner: str, adds_bytes: int = 0,
            otherwise: str = "") -> RequestError | None:
    """Why an owner may not keep so many more bytes; None if it may. otherwise: what else a client can do."""
    if held_bytes(connection, owner) + adds_bytes <= LIMITS.kept_bytes:
        return None
    return RequestError("your files, batches, responses and conversations would have more than "
                        f"{LIMITS.kept_bytes:,} bytes together: delete some{otherwise}", status=403,
                        code="storage_full")


def check(connection: sqlite3.Connection, owner: str, adds_bytes: int = 0, otherwise: str = ""):
    """RequestError if an owner may not keep so many more bytes."""
    if refused := refusal(connection, owner, adds_bytes, otherwise):
        raise refused
