"""Pictures of chats as files: each is kept once for an owner, as long as one of his messages shows it.

A message that shows one has {name, file}, the file's SHA-256, among its `pictures`; small ones may stand
there as {name, picture}, a data URI."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.common.jsontext import dump
from chatlm.front.api.picture_parts import picture_kind
from chatlm.front.store import quota

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts


CHAT_PICTURE_BYTES = 4 << 20
UNSHOWN_S = 86_400  # for so long a picture is kept that no message shows yet


def type_of(data: bytes | bytearray) -> str:
    """Its media type, by its first bytes. Raises RequestError for what is no picture."""
    kind = picture_kind(data)
    if kind is None:
        raise RequestError("the body must be a picture: PNG, JPEG, GIF or WebP", status=415,
                           code="unsupported_type")
    return f"image/{kind}"


def find(connection: sqlite3.Connection, owner: str, name: str) -> int | None:
    """The number of an owner's picture, None if he has none of this name."""
    row = connection.execute("SELECT number FROM chat_pictures WHERE owner = ? AND name = ? LIMIT 1",
                             (owner, name)).fetchone()
    return row and row[0]


def add(connection: sqlite3.Connection, owner: str, client: str, data: bytes, now_s: int) -> str:
    """Keep a picture, unless it is there. Returns its name. Raises RequestError 403 without room for it."""
    name = hashlib.sha256(data).hexdigest()
    number = find(connection, owner, name)
    if number is not None:
        connection.execute("UPDATE chat_unshown SET made = ? WHERE picture = ?", (now_s, number))
        return name
    quota.check(connection, owner, len(data), client=client)
    added = connection.execute("INSERT INTO chat_pictures (owner, name, made, data) VALUES (?, ?, ?, ?)",
                               (owner, name, now_s, data))
    connection.execute("INSERT INTO chat_unshown (picture, made) VALUES (?, ?)", (added.lastrowid, now_s))
    return name


def read(connection: sqlite3.Connection, owner: str, name: str) -> bytes:
    """Raises RequestError 404 if the owner has no such picture."""
    number = find(connection, owner, name)
    if number is None:
        raise RequestError(f"there is no picture {shown(name)}", status=404, code="not_found", param="sha256")
    return connection.execute("SELECT data FROM chat_pictures WHERE number = ?", (number,)).fetchone()[0]


def files_in(shown: Iterable[Mapping]) -> set[str]:
    """The names of the files among the pictures of a record."""
    return {each["file"] for each in shown if "file" in each}


def check_shown(connection: sqlite3.Connection, owner: str, pictures: Iterable[Mapping]):
    """Raises RequestError for a record that shows a picture which is not there."""
    for name in sorted(files_in(pictures)):
        if find(connection, owner, name) is None:
            raise RequestError(f"there is no picture {shown(name)}: send it to /v1/chats/files first",
                               code="not_found", param="pictures")


def note_shown(connection: sqlite3.Connection, owner: str, record: int, pictures: Iterable[Mapping]):
    """Note which pictures a record shows now. A picture that none shows any more goes (chat_shown_ended)."""
    wanted = {find(connection, owner, name) for name in files_in(pictures)}
    there = {picture for picture, in connection.execute(
        "SELECT picture FROM chat_shown WHERE record = ?", (record,))}
    for picture in wanted - there:
        connection.execute("INSERT INTO chat_shown (record, picture) VALUES (?, ?)", (record, picture))
    for picture in there - wanted:
        connection.execute("DELETE FROM chat_shown WHERE record = ? AND picture = ?", (record, picture))


def purge_unshown(connection: sqlite3.Connection, now_s: int) -> Parts[None]:
    """Remove the pictures that no message has shown for long."""
    while row := connection.execute("SELECT picture FROM chat_unshown WHERE made < ? LIMIT 1",
                                    (now_s - UNSHOWN_S,)).fetchone():
        connection.execute("DELETE FROM chat_pictures WHERE number = ?", row)
        yield


def inlined(connection: sqlite3.Connection, owner: str, picture: Mapping) -> bytes:
    """A picture of a message as JSON, with its data in it, as a file of chats has it."""
    if "file" not in picture or find(connection, owner, picture["file"]) is None:
        return dump(picture)
    data = read(connection, owner, picture["file"])
    return b'{"name": %s, "picture": "data:%s;base64,%s"}' % (
        dump(picture["name"]), type_of(data).encode(), base64.b64encode(data))
