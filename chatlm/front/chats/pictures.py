"""Pictures of chats as files: each is kept once for an owner, as long as one of his messages shows it.

A message that shows one has {name, file}, the file's SHA-256, among its `pictures`; small ones may stand
there as {name, picture}, a data URI."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.common.jsontext import as_json
from chatlm.front.api.picture_parts import picture_kind
from chatlm.front.store import quota

if TYPE_CHECKING:
    import sqlite3


CHAT_PICTURE_BYTES = 4 << 20
UNSHOWN_S = 86_400  # for so long a picture is kept that no message shows yet
AT_ONCE = 50        # of these are removed


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
        connection.execute("UPDATE chat_pictures SET made = ? WHERE number = ?", (now_s, number))
        return name
    quota.check(connection, owner, len(data), client=client)
    connection.execute("INSERT INTO chat_pictures (owner, name, made, data) VALUES (?, ?, ?, ?)",
                       (owner, name, now_s, data))
    return name


def read(connection: sqlite3.Connection, owner: str, name: str) -> bytes:
    """Raises RequestError 404 if the owner has no such picture."""
    number = find(connection, owner, name)
    if number is None:
        raise RequestError(f"there is no picture {shown(name)}", status=404, code="not_found", param="sha256")
    return connection.execute("SELECT data FROM chat_pictures WHERE number = ?", (number,)).fetchone()[0]


def files_in(body: Mapping) -> set[str]:
    """The names of the pictures that a record shows."""
    return {each["file"] for each in body.get("pictures", ()) if "file" in each}


def check_shown(connection: sqlite3.Connection, owner: str, body: Mapping):
    """Raises RequestError for a record that shows a picture which is not there."""
    for name in sorted(files_in(body)):
        if find(connection, owner, name) is None:
            raise RequestError(f"there is no picture {shown(name)}: send it to /v1/chats/files first",
                               code="not_found", param="pictures")


def note_shown(connection: sqlite3.Connection, owner: str, record: int, body: Mapping):
    """Note which pictures a record shows now. A picture that none shows any more goes (chat_shown_ended)."""
    wanted = {find(connection, owner, name) for name in files_in(body)}
    there = {picture for picture, in connection.execute(
        "SELECT picture FROM chat_shown WHERE record = ?", (record,))}
    for picture in wanted - there:
        connection.execute("INSERT INTO chat_shown (record, picture) VALUES (?, ?)", (record, picture))
    for picture in there - wanted:
        connection.execute("DELETE FROM chat_shown WHERE record = ? AND picture = ?", (record, picture))


def purge_unshown(connection: sqlite3.Connection, now_s: int) -> bool:
    """Remove some pictures that no message has shown for long. True if there may be more."""
    numbers = connection.execute(
        "SELECT number FROM chat_pictures WHERE made < ? AND NOT EXISTS "
        "(SELECT 1 FROM chat_shown WHERE picture = number) LIMIT ?", (now_s - UNSHOWN_S, AT_ONCE)).fetchall()
    connection.executemany("DELETE FROM chat_pictures WHERE number = ?", numbers)
    return len(numbers) == AT_ONCE


def with_pictures(connection: sqlite3.Connection, owner: str, text: str) -> str:
    """A record's JSON with its pictures in it, as a file of chats has them."""
    body = json.loads(text) if '"file"' in text else {}
    if not files_in(body):
        return text
    body["pictures"] = [inlined(connection, owner, each) for each in body["pictures"]]
    return as_json(body)


def inlined(connection: sqlite3.Connection, owner: str, picture: Mapping) -> Mapping:
    if "file" not in picture or find(connection, owner, picture["file"]) is None:
        return picture
    data = read(connection, owner, picture["file"])
    text = base64.b64encode(data).decode()
    return {"name": picture["name"], "picture": f"data:{type_of(data)};base64,{text}"}
