"""Finds chats by words: all words must be somewhere in a chat, each as a part of any word, as in the page.

A full-text index would keep the words of deleted messages, so a search looks through all texts: chat by chat,
the newest first, until a page of results is full."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.front.chats.listing import chat_names

if TYPE_CHECKING:
    import sqlite3


MOST_WORDS = 16
MOST_FOUND = 50
LOOKED_BYTES = 64 << 20  # after so many a page of results ends
LEAST_CHATS = 8          # looked through at once, then twice as many,
BATCH_CHATS = 256        # up to these
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
    names = chat_names(connection, owner)
    begin = names.index(after) + 1 if after in names else 0
    size = LEAST_CHATS
    while begin < len(names):
        batch = names[begin:begin + size]
        looked_now, having = chats_having(connection, owner, batch, words)
        looked += looked_now
        for name in batch:
            if name in having:
                found.append(shown_chat(connection, owner, name, words))
            if len(found) == MOST_FOUND:
                return FoundPage(found, name)
        if looked > LOOKED_BYTES:
            return FoundPage(found, batch[-1])
        begin += size
        size = min(2 * size, BATCH_CHATS)
    return FoundPage(found, None)


def chats_having(connection: sqlite3.Connection, owner: str, names: Seq[str],
                 words: Seq[str]) -> tuple[int, set[str]]:
    """(bytes of the texts of these chats, those that have all words). Each word is looked for only where the
    ones before are, the longest first: it is probably the rarest."""
    looked = 0
    left = set(names)
    for word in sorted(words, key=len, reverse=True):
        if not left:
            break
        places = ", ".join("?" * len(left))
        # GLOB takes a quarter of the time of instr
        rows = connection.execute(
            "SELECT chat, SUM(length(CAST(folded AS BLOB))), MAX(folded GLOB ?) FROM chat_words "
            f"WHERE owner = ? AND chat IN ({places}) GROUP BY chat",
            (pattern_of(word), owner, *left)).fetchall()
        looked = looked or sum(size for _, size, _ in rows)
        left = {chat for chat, _, has in rows if has}
    return looked, left


def shown_chat(connection: sqlite3.Connection, owner: str, name: str, words: Seq[str]) -> FoundChat:
    """A found chat, with the text around the first word that its title lacks: of the first message that has
    the most of the words."""
    number, text = connection.execute(
        "SELECT number, body FROM chat_records WHERE owner = ? AND kind = 'chat' AND name = ?",
        (owner, name)).fetchone()
    chat = json.loads(text)
    title = chat.get("title", "").lower()
    missing = [word for word in words if word not in title]
    best, most = 0, 0
    for record, folded in connection.execute(
            "SELECT record, folded FROM chat_words WHERE owner = ? AND chat = ? ORDER BY record",
            (owner, name)):
        count = sum(word in folded for word in words)
        if record != number and count > most and any(word in folded for word in missing or words):
            best, most = record, count
    if not best:
        return FoundChat(name, chat, None, "")
    node, body = connection.execute("SELECT name, body FROM chat_records WHERE number = ?",
                                    (best,)).fetchone()
    content = json.loads(body)["content"]
    return FoundChat(name, chat, node, snippet_of(content, missing or words))


def snippet_of(content: str, words: Seq[str]) -> str:
    """The text around the first of these words that it has."""
    folded = content.lower()
    at = next((place for word in words if (place := folded.find(word)) >= 0), 0)
    begin = max(0, at - AROUND)
    text = " ".join(content[begin:begin + SNIPPET].split())
    return ("…" if begin else "") + text + ("…" if begin + SNIPPET < len(content) else "")
