"""Chats in the store as they are listed, read whole and deleted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import dump
from chatlm.front.annexes.chats.changes import Changing
from chatlm.front.annexes.chats.record_fields import text_of
from chatlm.front.annexes.chats.records import CHAT, Change
from chatlm.front.store.pages import PAGE_BYTES

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts


PART_BYTES = 1 << 20  # of the nodes of a chat, read at a time
PART_ROWS = 500
CHATS = "SELECT number, name, updated, rev, bytes FROM chat_records"
THERE = "owner = ? AND kind = 'chat' AND deleted = 0"
NEWEST_FIRST = "ORDER BY updated DESC, name"


class Place(NamedTuple):
    """Where a chat, a node, a project or a prompt lies."""

    number: int
    name: str   # its id
    bytes: int


def no_chat(name: str) -> RequestError:
    return RequestError(f"there is no chat {shown(name)}", status=404, code="not_found", param="id")


def places_behind(connection: sqlite3.Connection, owner: str, after: str) -> Iterator[Place]:
    """The chats, the newest first, behind that with the id `after`; that may be deleted. Raises RequestError
    if there never was one."""
    condition = ""
    values = [owner]
    if after:
        row = connection.execute("SELECT updated, name FROM chat_records WHERE owner = ? AND kind = 'chat' "
                                 "AND name = ?", (owner, after)).fetchone()
        if row is None:
            raise bad_value("after", after, "the id of a row of the list")
        condition = "AND (updated < ?2 OR updated = ?2 AND name > ?3)"
        values += row
    return map(Place._make, connection.execute(
        f"SELECT number, name, bytes FROM chat_records WHERE owner = ?1 AND kind = 'chat' AND deleted = 0 "
        f"{condition} {NEWEST_FIRST}", values))


class ChatsPage(NamedTuple):
    """Chats of a list; more: whether others follow."""

    places: Seq[Place]
    more: bool

    @property
    def bytes(self) -> int:
        return sum(place.bytes for place in self.places)


def chats_after(connection: sqlite3.Connection, owner: str, after: str, limit: int) -> ChatsPage:
    """The next chats, as many as a page may have."""
    shown = list[Place]()
    size = 0
    for place in places_behind(connection, owner, after):
        size += place.bytes
        if len(shown) == limit or shown and size > PAGE_BYTES:
            return ChatsPage(shown, True)
        shown.append(place)
    return ChatsPage(shown, False)


def listed_chats(connection: sqlite3.Connection, owner: str, places: Seq[Place]) -> Parts[list[bytes]]:
    """Chats without their nodes, as JSON; those that are still there."""
    texts = list[bytes]()
    for place in places:
        row = connection.execute("SELECT rev FROM chat_records WHERE number = ? AND deleted = 0",
                                 (place.number,)).fetchone()
        if row is None:
            continue
        (nodes,) = connection.execute("SELECT COUNT(*) FROM chat_records WHERE owner = ? AND kind = 'node' "
                                      "AND chat = ? AND deleted = 0", (owner, place.name)).fetchone()
        head = dump({"id": place.name, "object": "chat", "rev": row[0], "nodes": nodes})
        texts.append(b"%s, %s" % (head[:-1], text_of(connection, place.number).encode()[1:]))
        yield
    return texts


def chat_and_tag(connection: sqlite3.Connection, owner: str, name: str) -> tuple[str, bytes]:
    """(a tag that changes with the chat, the chat as JSON). Raises RequestError 404 if there is none."""
    row = connection.execute(f"SELECT number, rev FROM chat_records WHERE {THERE} AND name = ?",
                             (owner, name)).fetchone()
    if row is None:
        raise no_chat(name)
    number, rev = row
    (last,) = connection.execute("SELECT MAX(rev) FROM chat_records WHERE owner = ? AND chat = ?",
                                 (owner, name)).fetchone()
    return f"{max(rev, last or 0)}", whole(name, text_of(connection, number))


def whole(name: str, text: str) -> bytes:
    """A record as JSON, with its id."""
    return b'{"id": %s, %s' % (dump(name), text.encode()[1:])


def nodes_after(connection: sqlite3.Connection, owner: str, chat: str, after: int) -> list[Place]:
    """The next nodes of a chat, after a number: those of a part, none at the end."""
    found = list[Place]()
    size = 0
    for place in map(Place._make, connection.execute(
            "SELECT number, name, bytes FROM chat_records WHERE owner = ? AND kind = 'node' AND chat = ? "
            "AND deleted = 0 AND number > ? ORDER BY number LIMIT ?", (owner, chat, after, PART_ROWS))):
        size += place.bytes
        if found and size > PART_BYTES:
            break
        found.append(place)
    return found


class NodesPart(NamedTuple):
    """Some nodes of a chat, as JSON; last: the number of the last one."""

    texts: Seq[bytes]
    last: int


def nodes_part(connection: sqlite3.Connection, owner: str, chat: str, after: int) -> NodesPart | None:
    """The next nodes of a chat; None at the end."""
    places = nodes_after(connection, owner, chat, after)
    texts = [whole(place.name, text_of(connection, place.number)) for place in places]
    return NodesPart(texts, places[-1].number) if places else None


def delete_chats(connection: sqlite3.Connection, owner: str, names: Seq[str] | None, count: int,
                 now_s: int) -> Parts[None]:
    """Delete chats; None: all, if they are `count`. Raises RequestError 404 and 409."""
    if names is None:
        names = [place.name for place in places_behind(connection, owner, "")]
        if len(names) != count:
            raise RequestError(f"you have {len(names)} chats, not {count}: nothing was deleted", status=409,
                               code="other_count", param="count")
    changing = Changing(connection, owner, now_s)
    for name in names:
        record = changing.found(CHAT, name)
        if record is None or record.deleted:
            raise no_chat(name)
        yield from changing.delete(Change(CHAT, name, 0, None), record)
        yield
