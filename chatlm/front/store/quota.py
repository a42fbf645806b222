"""How much of the database each owner takes, and may take.

Triggers (chatlm/front/store/schema.py) keep the sums in the table `holdings` while rows of files, batches,
responses and conversations come, change and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.front.store import spaces

if TYPE_CHECKING:
    import sqlite3


def held_bytes(connection: sqlite3.Connection, owner: str) -> int:
    """What everything of an owner takes that is not deleted."""
    row = connection.execute("SELECT bytes FROM holdings WHERE owner = ?", (owner,)).fetchone()
    return row[0] if row else 0


def address_of(connection: sqlite3.Connection, owner: str) -> str | None:
    """The address that answers for an owner without a key; None for the owner of a key."""
    return owner[1:] if owner[:1] == "@" else spaces.client_of(connection, owner)


def used_bytes(connection: sqlite3.Connection) -> int:
    """What the whole database takes, without its free pages."""
    pages, free, size = (connection.execute(f"PRAGMA {what}").fetchone()[0]
                         for what in ("page_count", "freelist_count", "page_size"))
    return (pages - free) * size


def refusal(connection: sqlite3.Connection, owner: str, adds_bytes: int = 0,
            otherwise: str = "") -> RequestError | None:
    """Why an owner may not keep so many more bytes; None if it may. otherwise: what else a client can do.

    A client without a key can make up owners. So its address has the same limit, and the whole database has
    one."""
    held = held_bytes(connection, owner)
    whose = "your"
    address = address_of(connection, owner)
    if address is not None:
        if used_bytes(connection) + adds_bytes > LIMITS.open_bytes:
            return RequestError("the database of this server is full: without API keys it may have "
                                f"{LIMITS.open_bytes:,} bytes", status=403, code="storage_full")
        at_address = held_bytes(connection, f"@{address}") + spaces.held_bytes(connection, address)
        whose = "your address's" if at_address > held else whose
        held = at_address
    if held + adds_bytes <= LIMITS.kept_bytes:
        return None
    return RequestError(f"{whose} files, batches, responses, conversations, chats and vector stores would "
                        f"have more than {LIMITS.kept_bytes:,} bytes together: delete some{otherwise}",
                        status=403, code="storage_full")


def check(connection: sqlite3.Connection, owner: str, adds_bytes: int = 0, otherwise: str = "",
          client: str = ""):
    """RequestError if an owner may not keep so many more bytes. client: who makes something new for it."""
    if client:
        spaces.note(connection, owner, client)
    if refused := refusal(connection, owner, adds_bytes, otherwise):
        raise refused
