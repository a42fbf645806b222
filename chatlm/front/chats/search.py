"""Finds chats by words: all words must be somewhere in a chat, each as a part of any word, as in the page.

A full-text index would keep the words of deleted messages, so a search looks through all texts: chat by chat,
the newest first, until a page of results is full."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.front.chats.listing import NEWEST_FIRST

if TYPE_CHECKING:
    import sqlite3


MOST_WORDS = 16
MOST_FOUND = 50
LOOKED_BYTES = 64 << 20  # after so many a page of results ends
AROUND = 40              # characters before the word in a snippet
SNIPPET = 160
GLOB_SIGNS = re.compile(r"[*?[]")


class FoundChat(NamedTuple):
    """A chat with all words. node: the first message with one of them; None: only the title has any."""

    id: str
    chat: dict
    node: str | None
    snippet: str


class FoundPage(NamedTuple):
    """after: the chat with which the next page goes on, None at the end."""

    found: Seq[FoundChat]
    after: str | None


def words_of(question: str) -> list[str]:
    return [*dict.fromkeys(question.lower().split())][:MOST_WORDS]


def pattern_of(word: str) -> str:
    """What GLOB finds a word with, wherever it stands in a text."""
    return f"*{GLOB_SIGNS.sub(lambda sign: f'[{sign[0]}]', word)}*"


def search(connection: sqlite3.Connection, owner: str, question: str, after: str = "") -> FoundPage:
    """The next chats with these words. after: the last chat of the page before."""
    words = words_of(question)
    found = list[FoundChat]()
    looked = 0
    chats = connection.execute(
        "SELECT name, body, number FROM chat_records WHERE owner = ? AND kind = 'chat' AND body <> '' "
        f"{NEWEST_FIRST}", (owner,)).fetchall()
    begin = next((index + 1 for index, row in enumerate(chats) if row[0] == after), 0)
    for name, body, number in chats[begin:]:
        size, missing, places = look_through(connection, owner, name, words)
        looked += size
        if not missing:
            found.append(shown_chat(connection, name, json.loads(body), number, places, words))
        if len(found) == MOST_FOUND or looked > LOOKED_BYTES:
            return FoundPage(found, name)
    return FoundPage(found, None)


def look_through(connection: sqlite3.Connection, owner: str, chat: str,
                 words: Seq[str]) -> tuple[int, set[str], list[int]]:
    """(bytes of a chat's texts, words that none of them has, records that have some)."""
    has = ", ".join("folded GLOB ?" for _ in words)  # a quarter of the time of instr
    missing = set(words)
    places = []
    size = 0
    for number, length, *hits in connection.execute(
            f"SELECT record, length(CAST(folded AS BLOB)), {has} FROM chat_words "
            "WHERE owner = ? AND chat = ? ORDER BY record", (*map(pattern_of, words), owner, chat)):
        size += length
        if any(hits):
            places.append(number)
            missing -= {word for word, hit in zip(words, hits) if hit}
    return size, missing, places


def shown_chat(connection: sqlite3.Connection, name: str, chat: dict, number: int, places: Seq[int],
               words: Seq[str]) -> FoundChat:
    """A found chat with the text around the first word that is not only in its title."""
    in_nodes = [place for place in places if place != number]
    if not in_nodes:
        return FoundChat(name, chat, None, "")
    node, body = connection.execute("SELECT name, body FROM chat_records WHERE number = ?",
                                    in_nodes[:1]).fetchone()
    content = json.loads(body)["content"]
    folded = content.lower()
    at = min(place for word in words if (place := folded.find(word)) >= 0)
    begin = max(0, at - AROUND)
    text = " ".join(content[begin:begin + SNIPPET].split())
    return FoundChat(name, chat, node, ("…" if begin else "") + text)
