"""Answers in the store that the server writes itself: how they begin, grow and end there.

`chat_answers` lists those that are being written, so that the server that follows a killed one
finds them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.common.jsontext import as_json
from chatlm.front.annexes.chats.changes import Changing
from chatlm.front.annexes.chats.records import CHAT, NODE, PLACE, change_of
from chatlm.front.store import quota

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.annexes.chats.changes import Record


NO_OTHERS: Mapping[int, Mapping] = {}
CUT = {"stream": None, "note": "interrupted"}  # of an answer that a killed server was writing


class WrittenPlace(NamedTuple):
    """Where an answer is written, and by which request."""

    owner: str
    client: str
    chat: str
    node: str
    parent: str
    stream: str  # the id of the request
    expected_stream: str = ""  # the id under which a device may expect it; "": the same


def check_place(connection: sqlite3.Connection, place: WrittenPlace, now_s: int) -> Record | None:
    """The node of an answer, if a device has made it already. Raises RequestError: 404 if the owner has no
    such chat or question, 409 if the node is another one, or has another answer."""
    changing = Changing(connection, place.owner, now_s)
    for what, kind, name in (("id", CHAT, place.chat), ("parent", NODE, place.parent)):
        found = changing.found(kind, name)
        if found is None or found.deleted or kind == NODE and found.chat != place.chat:
            where = " in this chat" if kind == NODE else ""
            raise RequestError(f"there is no {kind} {shown(name)}{where}",
                               status=404, code="not_found", param=f"chat.{what}")
    node = changing.found(NODE, place.node)
    if node is None:
        return None
    if node.deleted:
        raise RequestError(f"the node {shown(place.node)} is deleted", status=404, code="not_found",
                           param="chat.node")
    body = node.fields
    there = tuple(body.get(name) for name in PLACE if name != "created")
    if there != (place.chat, place.parent, "assistant"):
        raise RequestError(f"the node {shown(place.node)} is elsewhere, or is no answer", status=409,
                           code="other_node", param="chat.node")
    if body.get("stream", {}).get("id") not in (place.stream, place.expected_stream or place.stream):
        raise RequestError(f"the node {shown(place.node)} has another answer: its `stream` is not that of "
                           "this request (X-Request-Id)", status=409, code="other_answer", param="chat.node")
    return node


def begin(connection: sqlite3.Connection, place: WrittenPlace, made: Mapping, now_s: int) -> dict:
    """Begin an answer, with a new node unless a device has made it. made: what a new one has besides. Returns
    the node: one that goes on has the text of its earlier part."""
    stream = {"id": place.stream, "next": 0}
    quota.check(connection, place.owner, len(as_json({**made})), client=place.client)
    changing = Changing(connection, place.owner, now_s)
    if check_place(connection, place, now_s) is None:
        new = {**made, "conversation": place.chat, "parent": place.parent, "role": "assistant", "content": "",
               "stream": stream}
        changing.create(change_of(NODE, place.node, 0, new))
    node = changing.found(NODE, place.node)
    assert node
    if node.fields["stream"]["id"] == place.expected_stream:
        changing.update(change_of(NODE, place.node, node.rev, {"stream": stream}), node)
    connection.execute("INSERT INTO chat_answers (record, stream) VALUES (?, ?) "
                       "ON CONFLICT (record) DO UPDATE SET stream = excluded.stream",
                       (node.number, place.stream))
    return dict(node.fields)


def whole_of(earlier: Mapping, later: Mapping) -> dict:
    """The facts about an answer that went on: what is said of its two parts, together. The later prompt has
    the earlier part in it. `wholeOf` of static/chat.js says the same: tests/fixtures/whole_answers.json is
    for both."""
    whole = {**earlier, **later}
    for name in ("ttft_ms", "queue_ms", "cached_tokens"):
        whole.pop(name, None)
        if name in earlier:
            whole[name] = earlier[name]
    before = earlier.get("completion_tokens") or 0
    count = later.get("completion_tokens") or 0
    whole["completion_tokens"] = before + count
    if later.get("prompt_tokens"):
        whole["prompt_tokens"] = max(1, later["prompt_tokens"] - before)
    for name in ("drafted_tokens", "accepted_tokens", "reasoning_tokens"):
        if name in whole:
            whole[name] = (earlier.get(name) or 0) + (later.get(name) or 0)
    if "ttft_ms" in whole:
        whole["waited_ms"] = (earlier.get("waited_ms") or 0) + (later.get("ttft_ms") or 0)
    else:  # nobody measured the first part
        whole.pop("waited_ms", None)
    for name in SPEEDS:
        whole.pop(name, None)
    first, second = (next((part[name] for name in SPEEDS if part.get(name) is not None), 0)
                     for part in (earlier, later))
    speed = (before + count) / (before / first + count / second) if first and second else first or second
    if speed:
        whole["measured" if is_measured(earlier) or is_measured(later) else "tokens_per_second"] = speed
    return whole


SPEEDS = "tokens_per_second", "predicted_per_second", "measured"


def is_measured(facts: Mapping) -> bool:
    """Did the page measure the speed, because its server says none?"""
    return "measured" in facts and all(facts.get(name) is None for name in SPEEDS[:2])


def choice_name(node: str, index: int) -> str:
    """The id of the node with a further answer (n > 1) beside that of the first one."""
    return hashlib.blake2b(f"{node} {index}".encode(), digest_size=16).hexdigest()


def write(connection: sqlite3.Connection, place: WrittenPlace, patch: Mapping, now_s: int,
          others: Mapping[int, Mapping] = NO_OTHERS) -> bool:
    """Write what an answer has so far, or at its end. False if it is deleted. Raises RequestError if it is
    too large, or if its owner may not keep more. others: the further answers of the request, by their
    numbers, which become its siblings."""
    changing = Changing(connection, place.owner, now_s)
    node = changing.found(NODE, place.node)
    chat = changing.found(CHAT, place.chat)
    if node is None or node.deleted or chat is None or chat.deleted:
        if node:
            forget(connection, node.number)
        return False
    if "content" in patch:  # else it only says why there is no more
        size = sum(len(as_json({**each})) for each in (patch, *others.values()))
        quota.check(connection, place.owner, max(0, size - node.bytes))
    changing.update(change_of(NODE, place.node, node.rev, patch), node)
    if "ended" in patch:
        forget(connection, node.number)
        beside = {name: node.fields[name] for name in (*PLACE, "model") if name in node.fields}
        for index, said in others.items():
            name = choice_name(place.node, index)
            if changing.found(NODE, name) is None:
                changing.create(change_of(NODE, name, 0, {**beside, **said}))
        now = {"updated": max(now_s * 1000, chat.fields.get("updated", 0))}
        changing.update(change_of(CHAT, place.chat, chat.rev, now), chat)
    return True


def forget(connection: sqlite3.Connection, number: int):
    connection.execute("DELETE FROM chat_answers WHERE record = ?", (number,))


def end_cut(connection: sqlite3.Connection, now_s: int):
    """Note of the answers which the last server was writing that they were cut."""
    last = 0
    while row := connection.execute("SELECT record, stream FROM chat_answers WHERE record > ? "
                                    "ORDER BY record LIMIT 1", (last,)).fetchone():
        last, stream = row
        owner, name = connection.execute("SELECT owner, name FROM chat_records WHERE number = ?",
                                         (last,)).fetchone()
        changing = Changing(connection, owner, now_s)
        node = changing.found(NODE, name)
        if node and not node.deleted and node.fields.get("stream", {}).get("id") == stream:
            changing.update(change_of(NODE, name, node.rev, {**CUT, "ended": stream}), node)
        forget(connection, last)
