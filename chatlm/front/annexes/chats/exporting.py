"""All chats of an owner as a file that the page and the terminal import (format 2, see static/tree.js). It is
read and sent in parts, of which none has more than a record or a picture."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence as Seq
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import dump
from chatlm.front.annexes.chats import listing, pictures
from chatlm.front.annexes.chats.listing import Place, whole
from chatlm.front.annexes.chats.record_fields import Fields, StoredTexts, text_of
from chatlm.front.annexes.chats.records import PROJECT, PROMPT

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts, Store


PROMPT_FIELDS = "name", "text", "starter"


class ExportedNode(NamedTuple):
    """A node as JSON without its pictures, and these."""

    text: bytes
    pictures: Seq[Mapping]


class Export:
    """The export of an owner, for a client of his."""

    def __init__(self, store: Store, owner: str, client: str):
        self.store = store
        self.owner = owner
        self.client = client

    async def _read(self, function, **arguments):
        return await self.store.run(partial(function, owner=self.owner, **arguments), client=self.client)

    async def parts(self, now_s: int) -> AsyncIterator[bytes]:
        made = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(now_s))
        yield dump({"format": "chat_server chats", "version": 2, "exported": made})[:-1]
        for kind in PROMPT, PROJECT:
            between = b', "%ss": [' % kind.encode()
            async for text in self._others(kind):
                yield between + text
                between = b", "
            if between == b", ":
                yield b"]"
        yield b', "conversations": ['
        between = b""
        for place in await self._read(all_chats):
            try:
                _, chat = await self._read(listing.chat_and_tag, name=place.name)
            except RequestError:  # deleted meanwhile
                continue
            yield between + chat[:-1] + b', "nodes": ['
            between = b", "
            async for part in self._nodes(place.name):
                yield part
            yield b"]}"
        yield b"]}"

    async def _others(self, kind: str) -> AsyncIterator[bytes]:
        """The prompts or projects."""
        after = 0
        while found := await self._read(next_of_kind, kind=kind, after=after):
            after, text = found
            yield text

    async def _nodes(self, chat: str) -> AsyncIterator[bytes]:
        between = b""
        after = 0
        while places := await self._read(listing.nodes_after, chat=chat, after=after):
            after = places[-1].number
            for node in await self._read(exported_nodes, places=places):
                yield between + node.text[:-1]
                between = b", "
                for index, picture in enumerate(node.pictures):
                    yield b", " if index else b', "pictures": ['
                    yield await self._read(pictures.inlined, picture=picture)
                yield b"]}" if node.pictures else b"}"


def all_chats(connection: sqlite3.Connection, owner: str) -> list[Place]:
    return [*listing.places_behind(connection, owner, "")]


def next_of_kind(connection: sqlite3.Connection, owner: str, kind: str,
                 after: int) -> tuple[int, bytes] | None:
    """(the number of the first prompt or project behind a number, itself as JSON); None at the end."""
    row = connection.execute("SELECT number, name FROM chat_records WHERE owner = ? AND kind = ? "
                             "AND chat = '' AND deleted = 0 AND number > ? ORDER BY number LIMIT 1",
                             (owner, kind, after)).fetchone()
    if row is None:
        return None
    number, name = row
    if kind == PROJECT:
        return number, whole(name, text_of(connection, number))
    texts = StoredTexts(connection, number)
    return number, b"{%s}" % b", ".join(
        b'"%s": %s' % (each.encode(), texts[each].encode()) for each in PROMPT_FIELDS if each in texts)


def exported_nodes(connection: sqlite3.Connection, owner: str,
                   places: Seq[Place]) -> Parts[list[ExportedNode]]:
    nodes = list[ExportedNode]()
    for place in places:
        text = text_of(connection, place.number, without="pictures")
        if text == "{}":  # deleted meanwhile
            continue
        shown = Fields(StoredTexts(connection, place.number)).get("pictures") or ()
        nodes.append(ExportedNode(whole(place.name, text), shown))
        yield
    return nodes
