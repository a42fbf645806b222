"""Pages of lists in the store: what of a table is shown at once, and never more than fits in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts


PAGE_BYTES = 4 << 20  # a page ends before the row with which it would have more, unless that is its first


class TextPlace(NamedTuple):
    """Where a JSON text lies, and its size: so it is read only once there is memory for it."""

    table: str
    row: int
    name: str   # the id of what it is the text of, which is not in it
    bytes: int


class Listed(NamedTuple):
    """A row as the API shows it."""

    name: str
    text: bytes  # JSON

    @property
    def bytes(self) -> int:
        return len(self.text)


class ListPage(NamedTuple):
    """Rows of a list; more: whether others follow."""

    rows: Seq
    more: bool

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)


def page_of(rows: Iterable[TextPlace] | Iterable[Listed], limit: int) -> ListPage:
    """The first `limit` of `rows`, or those before the page is too large."""
    shown = []
    size = 0
    for row in rows:
        size += row.bytes
        if len(shown) == limit or shown and size > PAGE_BYTES:
            return ListPage(shown, True)
        shown.append(row)
    return ListPage(shown, False)


def texts(connection: sqlite3.Connection, places: Iterable[TextPlace]) -> Parts[list[bytes | None]]:
    """What lies there; None where it was deleted meanwhile."""
    found = list[bytes | None]()
    for place in places:
        row = connection.execute(f"SELECT body FROM {place.table} WHERE id = ?", (place.row,)).fetchone()
        found.append(row and row[0])
        yield
    return found
