"""Responses and conversations in the store, as the Responses API has them.

An item is a row, so a page of them is read by index. What is deleted is only marked; `purge` removes it in
small pieces, so that nobody waits for the bytes of a large conversation to be overwritten."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence as Seq
from contextlib import suppress
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.client_words import too_large_to_count
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.messages.protocol import KeptItem
from chatlm.front.store import quota
from chatlm.front.store.file_rows import PART_BYTES, PART_LINES, owns
from chatlm.front.store.gone import forget_gone, place_of_gone
from chatlm.front.store.pages import ListPage, TextPlace, page_of

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts


MOST_TURNS = 10_000           # of a chain of responses
MOST_ALIKE = 20               # items of one owner and name that are looked at, while they are deleted ones
# what a part of a response is
INPUT = 0
OUTPUT = 1
WHOLE = 2
ITEM_BYTES = 256              # that a row takes besides its text
# (a table, the table with its texts, the column there that refers to it)
TABLES = (("responses", "parts", "response"), ("conversations", "items", "conversation"))


class KeptResponse(NamedTuple):
    """A row of `responses`."""

    id: int
    name: str
    owner: str
    created: int
    expires: int
    previous: str | None
    conversation: str | None


class NewResponse(NamedTuple):
    """A response that is to be kept. body: all of it, as JSON."""

    name: str
    owner: str
    created: int
    expires: int
    previous: str | None
    conversation: str | None
    input: Seq[KeptItem]
    output: Seq[KeptItem]
    body: bytes

    @property
    def bytes(self) -> int:
        """The bytes that it takes in the store, with the copies of its items in its conversation."""
        copies = 2 if self.conversation else 1
        items = bytes_of([*self.input, *self.output])
        return copies * items + len(self.body) + ITEM_BYTES


class ConversationRow(NamedTuple):
    """A row of `conversations`."""

    id: int
    name: str
    owner: str
    created: int
    expires: int
    metadata: str


def bytes_of(items: Iterable[KeptItem]) -> int:
    return sum(len(item.body) + ITEM_BYTES for item in items)


def refuse(what: str, name: str, param: str = "id") -> RequestError:
    return RequestError(f"there is no {what} {shown(name)}", status=404, code="not_found", param=param)


# responses

def keep(connection: sqlite3.Connection, new: NewResponse) -> Parts[None]:
    """Write a response, and add its items to its conversation, if that still exists. Nobody finds it before
    all is there."""
    parts = [(INPUT, *item) for item in with_own_names(new.input, [item.name for item in new.output])]
    parts += [(OUTPUT, *item) for item in new.output]
    parts.append((WHOLE, new.name, new.body))
    size = bytes_of(new.input) + bytes_of(new.output) + len(new.body) + ITEM_BYTES
    row = connection.execute(
        "INSERT INTO responses (name, owner, created, expires, previous, conversation, bytes) VALUES "
        "(?, ?, ?, ?, ?, ?, ?)", (another_name(), *new[1:6], size)).lastrowid
    for kind, name, body in parts:
        part = connection.execute("INSERT INTO parts (response, kind, name, body) VALUES (?, ?, ?, ?)",
                                  (row, kind, name, body)).lastrowid
        if kind != WHOLE:
            connection.execute("INSERT INTO part_names (part, owner, name, kind) VALUES (?, ?, ?, ?)",
                               (part, namer(new.owner), name, kind))
        yield
    if new.conversation:
        with suppress(RequestError):  # it was deleted meanwhile
            conversation = conversation_named(connection, new.conversation, new.owner)
            yield from add_items(connection, conversation, [*new.input, *new.output], new.expires)
    connection.execute("UPDATE responses SET name = ? WHERE id = ?", (new.name, row))


def with_own_names(items: Seq[KeptItem], taken: Iterable[str]) -> list[KeptItem]:
    """The items of a response's input, each with a name of its own: an id that a client gave to several is
    that of the first of them."""
    names = set(taken)
    named = []
    for item in items:
        if item.name in names:
            item = item._replace(name=another_name())
        names.add(item.name)
        named.append(item)
    return named


def another_name() -> str:
    """A name for an item whose own is taken."""
    return f"item_{secrets.token_hex(12)}"


def namer(owner: str) -> str:
    """The owner by whom the items of responses are found: all addresses are one, as for `owns`."""
    return "@" if owner[:1] == "@" else owner


def response_named(connection: sqlite3.Connection, name: str, owner: str,
                   param: str = "id") -> KeptResponse:
    """The response with this name. Raises RequestError 404 if this owner has no such response."""
    row = connection.execute(f"SELECT {', '.join(KeptResponse._fields)} FROM responses "
                             "WHERE name = ? AND NOT deleted", (name,)).fetchone()
    if row is None or not owns(owner, row[2]):
        raise refuse("response", name, param)
    return KeptResponse(*row)


def whole_of(connection: sqlite3.Connection, name: str, owner: str) -> TextPlace:
    """The place of a whole response as JSON."""
    kept = response_named(connection, name, owner)
    row, size = connection.execute("SELECT id, LENGTH(body) FROM parts WHERE response = ? AND kind = ?",
                                   (kept.id, WHOLE)).fetchone()
    return TextPlace("parts", row, name, size)


def delete(connection: sqlite3.Connection, name: str, owner: str):
    kept = response_named(connection, name, owner)
    connection.execute("UPDATE responses SET deleted = 1 WHERE id = ?", (kept.id,))


def chain(connection: sqlite3.Connection, name: str, owner: str, param: str = "id") -> list[int]:
    """The row ids of a response and of all responses that it continues, the newest first. Raises RequestError
    404 if one of them is gone."""
    first = response_named(connection, name, owner, param)
    rows = connection.execute(
        "WITH RECURSIVE chain (id, owner, previous, turn) AS ("
        "SELECT id, owner, previous, 1 FROM responses WHERE id = ? UNION ALL "
        "SELECT each.id, each.owner, each.previous, turn + 1 FROM chain JOIN responses AS each "
        "ON each.name = chain.previous WHERE NOT each.deleted AND turn < ?) "
        "SELECT id, owner, previous FROM chain ORDER BY turn", (first.id, MOST_TURNS)).fetchall()
    for (_, _, continues), (_, row_owner, _) in zip(rows, rows[1:]):
        if not owns(owner, row_owner):
            raise refuse("response", continues, "previous_response_id")
    last = rows[-1][2]
    if last and len(rows) < MOST_TURNS:
        raise refuse("response", last, "previous_response_id")
    return [row for row, _, _ in rows]


def inputs(connection: sqlite3.Connection, name: str, owner: str, after: str, ascending: bool,
           limit: int) -> ListPage:
    """A page of the input of a response, after all that was said in the responses which it continues."""
    responses = chain(connection, name, owner)
    own = responses[0]
    order = "ASC" if ascending else "DESC"
    if ascending:
        responses.reverse()
    begin = None
    if after:
        index, begin = _place_in(connection, responses, own, after)
        responses = responses[index:]

    def rows() -> Iterator[TextPlace]:
        for response in responses:
            condition = ""
            values = [response, INPUT, INPUT if response == own else OUTPUT]
            if begin is not None and response == responses[0]:
                condition = "AND id > ?" if ascending else "AND id < ?"
                values.append(begin)
            for row in connection.execute("SELECT id, name, LENGTH(body) FROM parts WHERE response = ? AND "
                                          f"kind IN (?, ?) {condition} ORDER BY id {order}", values):
                yield TextPlace("parts", *row)
    return page_of(rows(), limit)


def _place_in(connection: sqlite3.Connection, responses: Seq[int], own: int, name: str) -> tuple[int, int]:
    """(index in `responses`, row) of the item with this name in the list of `inputs`."""
    for index, response in enumerate(responses):
        for row, kind in connection.execute("SELECT id, kind FROM parts WHERE response = ? AND name = ?",
                                            (response, name)):
            if kind == INPUT or kind == OUTPUT and response != own:
                return index, row
    raise bad_value("after", name, "the id of a row of the list")


# what was said before

def earlier(connection: sqlite3.Connection, columns: str, previous: str, conversation: str,
            owner: str) -> Iterator[list[tuple]]:
    """The id and these columns of each item up to the end of a response, or in a conversation, in order: some
    rows at a time."""
    if conversation:
        row = conversation_named(connection, conversation, owner, "conversation")
        sources = [("items", "conversation", row.id)]
    else:
        responses = reversed(chain(connection, previous, owner, "previous_response_id"))
        sources = [("parts", "response", response) for response in responses]
    for table, column, number in sources:
        condition = f"AND kind <> {WHOLE}" if table == "parts" else ""
        last = 0
        while rows := connection.execute(
                f"SELECT id, {columns} FROM {table} WHERE {column} = ? {condition} AND id > ? "
                "ORDER BY id LIMIT ?", (number, last, PART_LINES)).fetchall():
            last = rows[-1][0]
            yield rows


def size_before(connection: sqlite3.Connection, previous: str, conversation: str, owner: str) -> Parts[int]:
    """How many bytes `before` returns. Raises RequestError if that is more than a body may have."""
    size = 2
    columns = "LENGTH(name) + LENGTH(body)"
    for rows in earlier(connection, columns, previous, conversation, owner):
        size += sum(length + 12 for _, length in rows)
        check_size(size)
        yield
    return size


def check_size(size: int):
    if size > LIMITS.body_bytes:
        raise too_large_to_count(f"what was said before is too large: at most {LIMITS.body_bytes} bytes are "
                                 "allowed")


def before(connection: sqlite3.Connection, previous: str, conversation: str, owner: str) -> Parts[bytes]:
    """All items up to the end of a response, or in a conversation, as a JSON list."""
    items = list[bytes]()
    size = 2
    for rows in earlier(connection, "name", previous, conversation, owner):
        table = "items" if conversation else "parts"
        for row, name in rows:
            found = connection.execute(f"SELECT body FROM {table} WHERE id = ?", (row,)).fetchone()
            if found is None:  # deleted meanwhile
                continue
            items.append(with_id(name, found[0]))
            size += len(items[-1]) + 2
            check_size(size)  # it may have grown
            yield
    return b"[%s]" % b", ".join(items)


def item_places(connection: sqlite3.Connection, names: Iterable[str],
                owner: str) -> Parts[list[TextPlace | None]]:
    """The place of each item of a kept response with one of these names; None where this owner has none."""
    places = list[TextPlace | None]()
    for name in names:
        places.append(_item_place(connection, name, owner))
        yield
    return places


def _item_place(connection: sqlite3.Connection, name: str, owner: str) -> TextPlace | None:
    """Of several with this name, that which the server itself has written."""
    rows = connection.execute(
        "SELECT part, LENGTH(body), deleted FROM part_names JOIN parts ON parts.id = part "
        "JOIN responses ON responses.id = response WHERE part_names.owner = ? AND part_names.name = ? "
        "ORDER BY part_names.kind DESC, part LIMIT ?", (namer(owner), name, MOST_ALIKE))
    for row, size, is_deleted in rows:
        if not is_deleted:
            return TextPlace("parts", row, name, size)
    return None


def with_id(name: str, body: bytes) -> bytes:
    """An item as JSON, with its id."""
    return b'{"id": "%s", %s' % (name.encode(), body[1:])


# conversations

def create_conversation(connection: sqlite3.Connection, owner: str, client: str, now: int, expires: int,
                        metadata: str, items: Seq[KeptItem]) -> Parts[ConversationRow]:
    quota.check(connection, owner, len(metadata) + bytes_of(items), client=client)
    name = f"conv_{secrets.token_hex(24)}"
    connection.execute(
        "INSERT INTO conversations (name, owner, created, expires, metadata, bytes) VALUES "
        "(?, ?, ?, ?, ?, ?)", (name, owner, now, expires, metadata, len(metadata.encode())))
    made = conversation_named(connection, name, owner)
    yield from add_items(connection, made, items, expires)
    return made


def conversation_named(connection: sqlite3.Connection, name: str, owner: str,
                       param: str = "id") -> ConversationRow:
    row = connection.execute(f"SELECT {', '.join(ConversationRow._fields)} FROM conversations "
                             "WHERE name = ? AND NOT deleted", (name,)).fetchone()
    if row is None or not owns(owner, row[2]):
        raise refuse("conversation", name, param)
    return ConversationRow(*row)


def set_metadata(connection: sqlite3.Connection, name: str, owner: str, metadata: str) -> ConversationRow:
    row = conversation_named(connection, name, owner)
    more = len(metadata.encode()) - len(row.metadata.encode())
    if more > 0:
        quota.check(connection, row.owner, more)
    connection.execute("UPDATE conversations SET metadata = ?, bytes = bytes + ? WHERE id = ?",
                       (metadata, more, row.id))
    return row._replace(metadata=metadata)


def add_items(connection: sqlite3.Connection, conversation: ConversationRow, items: Seq[KeptItem],
              expires: int) -> Parts[list[KeptItem]]:
    """Add items to a conversation. Returns them as they were added: an item whose name is taken there gets
    another name."""
    added = []
    for item in items:
        taken = connection.execute("SELECT 1 FROM items WHERE conversation = ? AND name = ?",
                                   (conversation.id, item.name)).fetchone()
        if taken:
            item = item._replace(name=another_name())
        connection.execute("INSERT INTO items (conversation, name, body) VALUES (?, ?, ?)",
                           (conversation.id, *item))
        connection.execute("UPDATE conversations SET bytes = bytes + ? WHERE id = ?",
                           (bytes_of([item]), conversation.id))
        added.append(item)
        yield
    connection.execute("UPDATE conversations SET expires = ? WHERE id = ?", (expires, conversation.id))
    return added


def extend(connection: sqlite3.Connection, name: str, owner: str, items: Seq[KeptItem],
           expires: int) -> Parts[list[KeptItem]]:
    """Add a client's items to a conversation."""
    row = conversation_named(connection, name, owner)
    quota.check(connection, row.owner, bytes_of(items))
    return (yield from add_items(connection, row, items, expires))


def items(connection: sqlite3.Connection, name: str, owner: str, after: str, ascending: bool,
          limit: int) -> ListPage:
    """A page of a conversation's items."""
    row = conversation_named(connection, name, owner)
    condition = ""
    begin = ()
    if after:
        found = (connection.execute("SELECT id FROM items WHERE conversation = ? AND name = ?",
                                    (row.id, after)).fetchone()
                 or place_of_gone(connection, f"items {row.id}", after))
        if found is None:
            raise bad_value("after", after, "the id of a row of the list")
        begin = found[:1]
        condition = "AND id > ?" if ascending else "AND id < ?"
    order = "ASC" if ascending else "DESC"
    rows = connection.execute(
        f"SELECT id, name, LENGTH(body) FROM items WHERE conversation = ? {condition} ORDER BY id {order}",
        (row.id, *begin))
    return page_of((TextPlace("items", *each) for each in rows), limit)


def item_named(connection: sqlite3.Connection, conversation: str, name: str, owner: str) -> TextPlace:
    """The place of an item of a conversation."""
    row = conversation_named(connection, conversation, owner)
    place = connection.execute("SELECT id, name, LENGTH(body) FROM items WHERE conversation = ? AND name = ?",
                               (row.id, name)).fetchone()
    if place is None:
        raise refuse("item", name, "item")
    return TextPlace("items", *place)


def drop_item(connection: sqlite3.Connection, conversation: str, name: str, owner: str) -> ConversationRow:
    place = item_named(connection, conversation, name, owner)
    row = conversation_named(connection, conversation, owner)
    connection.execute("DELETE FROM items WHERE id = ?", (place.row,))
    connection.execute("UPDATE conversations SET bytes = bytes - ? WHERE id = ?",
                       (place.bytes + ITEM_BYTES, row.id))
    return row


def delete_conversation(connection: sqlite3.Connection, name: str, owner: str):
    row = conversation_named(connection, name, owner)
    connection.execute("UPDATE conversations SET deleted = 1 WHERE id = ?", (row.id,))


# what has expired

def forget(connection: sqlite3.Connection, now: int) -> bool:
    """Mark some rows that have expired as deleted. Returns whether there are more."""
    more = False
    for table, _, _ in TABLES:
        marked = connection.execute(
            f"UPDATE {table} SET deleted = 1 WHERE id IN (SELECT id FROM {table} WHERE deleted = 0 AND "
            "expires < ? LIMIT ?)", (now, PART_LINES))
        more = more or marked.rowcount == PART_LINES
    return forget_gone(connection, now, PART_LINES) or more


def purge(connection: sqlite3.Connection) -> bool:
    """Remove some rows that are marked as deleted. Returns whether there are more."""
    left = PART_LINES  # rows that may still be removed now
    for table, parts, column in TABLES:
        while left > 0:
            row = connection.execute(f"SELECT id FROM {table} WHERE deleted = 1 LIMIT 1").fetchone()
            if row is None:
                break
            gone = _purge_parts(connection, parts, column, row[0], left)
            if gone is None:
                connection.execute(f"DELETE FROM {table} WHERE id = ?", row)
                left -= 1
            else:
                left -= gone
    return left <= 0


def _purge_parts(connection: sqlite3.Connection, parts: str, column: str, owner: int,
                 most: int) -> int | None:
    """Remove some texts of a row. Returns how many rows the work was worth, at most about `most`; PART_BYTES
    are worth as much as PART_LINES rows. None if the row has no texts left."""
    last = None
    size = 0
    count = 0
    for last, length in connection.execute(
            f"SELECT id, LENGTH(body) FROM {parts} WHERE {column} = ? ORDER BY id LIMIT ?", (owner, most)):
        size += length
        count += 1
        if size > most * PART_BYTES // PART_LINES:
            break
    if last is None:
        return None
    connection.execute(f"DELETE FROM {parts} WHERE {column} = ? AND id <= ?", (owner, last))
    return max(count, size * PART_LINES // PART_BYTES)
