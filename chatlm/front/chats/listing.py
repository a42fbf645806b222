"""Chats in the store as they are listed, read whole, exported and deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import dump
from chatlm.front.chats import pictures
from chatlm.front.chats.changes import Changing
from chatlm.front.chats.records import CHAT, PROJECT, PROMPT, Change

if TYPE_CHECKING:
    import sqlite3


PART_BYTES = 1 << 20  # of the nodes of a chat, read at a time
THERE = "owner = ? AND kind = 'chat' AND body <> ''"
NEWEST_FIRST = "ORDER BY updated DESC, name"


class NodesPage(NamedTuple):
    """Some nodes of a chat, as JSON; last: the number of the last one."""

    text: bytes
    last: int
    more: bool


def no_chat(name: str) -> RequestError:
    return RequestError(f"there is no chat {shown(name)}", status=404, code="not_found", param="id")


def chat_names(connection: sqlite3.Connection, owner: str) -> list[str]:
    """The newest first."""
    return [name for name, in connection.execute(
        f"SELECT name FROM chat_records WHERE {THERE} {NEWEST_FIRST}", (owner,))]


def chats_after(connection: sqlite3.Connection, owner: str, after: str,
                limit: int) -> tuple[list[dict], bool]:
    """(the next chats without their nodes, whether there are more)."""
    names = chat_names(connection, owner)
    if after and after not in names:
        raise bad_value("after", after, "the id of a row of the list")
    begin = names.index(after) + 1 if after else 0
    rows = []
    for name in names[begin:begin + limit]:
        text, rev = connection.execute(
            f"SELECT body, rev FROM chat_records WHERE {THERE} AND name = ?", (owner, name)).fetchone()
        (nodes,) = connection.execute(
            "SELECT COUNT(*) FROM chat_records WHERE owner = ? AND chat = ? AND body <> ''",
            (owner, name)).fetchone()
        rows.append({"id": name, "object": "chat", "rev": rev, **json.loads(text), "nodes": nodes})
    return rows, begin + limit < len(names)


def chat_and_tag(connection: sqlite3.Connection, owner: str, name: str) -> tuple[str, bytes]:
    """(a tag that changes with the chat, the chat as JSON). Raises RequestError 404 if there is none."""
    row = connection.execute(f"SELECT body FROM chat_records WHERE {THERE} AND name = ?",
                             (owner, name)).fetchone()
    if row is None:
        raise no_chat(name)
    (rev,) = connection.execute(
        "SELECT MAX(rev) FROM chat_records WHERE owner = ? AND (chat = ? OR kind = 'chat' AND name = ?)",
        (owner, name, name)).fetchone()
    return f"{rev}", b'{"id": %s, %s' % (dump(name), row[0].encode()[1:])


def nodes_after(connection: sqlite3.Connection, owner: str, chat: str, after: int,
                whole: bool = False) -> NodesPage:
    """The next nodes of a chat, after a number. whole: with their pictures."""
    texts = list[bytes]()
    size = 0
    last = after
    for number, name, body in connection.execute(
            "SELECT number, name, body FROM chat_records WHERE owner = ? AND chat = ? AND body <> '' "
            "AND number > ? ORDER BY number", (owner, chat, after)):
        if whole:
            body = pictures.with_pictures(connection, owner, body)
        text = b'{"id": %s, %s' % (dump(name), body.encode()[1:])
        if texts and size + len(text) > PART_BYTES:
            return NodesPage(b", ".join(texts) + b", ", last, True)
        texts.append(text)
        size += len(text)
        last = number
    return NodesPage(b", ".join(texts), last, False)


def others(connection: sqlite3.Connection, owner: str, kind: str) -> list[tuple[str, dict]]:
    """The prompts or projects of an owner: (id, record)."""
    return [(name, json.loads(body)) for name, body in connection.execute(
        "SELECT name, body FROM chat_records WHERE owner = ? AND kind = ? AND body <> ''", (owner, kind))]


def export_begin(connection: sqlite3.Connection, owner: str, now_s: int) -> bytes:
    """A file of chats (format 2, see static/tree.js) up to the first chat."""
    made = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(now_s))
    head = {"format": "chat_server chats", "version": 2, "exported": made}
    prompts = others(connection, owner, PROMPT)
    if prompts:
        head["prompts"] = [{name: prompt[name] for name in ("name", "text", "starter") if name in prompt}
                           for _, prompt in prompts]
    projects = others(connection, owner, PROJECT)
    if projects:
        head["projects"] = [{"id": name, **project} for name, project in projects]
    return dump(head)[:-1] + b', "conversations": ['


def delete_chats(connection: sqlite3.Connection, owner: str, names: Seq[str] | None, count: int, now_s: int):
    """Delete chats; None: all, if they are `count`. Raises RequestError 404 and 409."""
    there = chat_names(connection, owner)
    if names is None and len(there) != count:
        raise RequestError(f"you have {len(there)} chats, not {count}: nothing was deleted", status=409,
                           code="other_count", param="count")
    changing = Changing(connection, owner, now_s)
    for name in there if names is None else names:
        record = changing.found(CHAT, name)
        if record is None or not record.text:
            raise no_chat(name)
        changing.delete(Change(CHAT, name, 0, None), record)
