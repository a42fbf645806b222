"""Finds chats by words: all words must be somewhere in a chat, each as a part of any word, as in the page.

A full-text index would keep the words of deleted messages, so a search looks through all texts: chat by chat,
the newest first, until a page of results is full, or has taken its time."""

from __future__ import annotations

import json
import re
import sqlite3
import time
import unicodedata
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.front.annexes.chats.listing import Place, places_behind
from chatlm.front.annexes.chats.record_fields import Fields, StoredTexts
from chatlm.front.annexes.chats.records import LONGEST_WORD, folded

if TYPE_CHECKING:
    from chatlm.front.store.readers import Reading


MOST_WORDS = 16
MOST_FOUND = 50
LOOKED_S = 0.5           # after so long a page of results ends
CHAT_SEARCH_S = 5.0           # and so long one chat may take
AROUND = 40              # characters before the word in a snippet
SNIPPET = 160
GLOB_SIGNS = re.compile(r"[*?[]")


class FoundChat(NamedTuple):
    """A chat with all words. node: the first message with most of them; None: only the title has any."""

    id: str
    title: str
    updated: float | None
    node: str | None
    snippet: str


class FoundPage(NamedTuple):
    """after: the chat with which the next page goes on, None at the end."""

    found: Seq[FoundChat]
    after: str | None


def words_of(question: str) -> list[str]:
    """The words of a question, as texts are searched for them."""
    words = (word[:LONGEST_WORD] for word in folded(question).split())
    return [*dict.fromkeys(words)][:MOST_WORDS]


def pattern_of(word: str) -> str:
    """What GLOB finds a word with, wherever it stands in a text. It takes a quarter of the time of instr."""
    return f"*{GLOB_SIGNS.sub(lambda sign: f'[{sign[0]}]', word)}*"


def search(reading: Reading, owner: str, question: str, after: str = "") -> FoundPage:
    """The next chats with these words. after: the last chat of the page before."""
    words = words_of(question)
    until_s = time.monotonic() + LOOKED_S
    found = list[FoundChat]()
    last = after
    try:
        for place in places_behind(reading.connection, owner, after):
            if has_all(reading.connection, owner, place.name, words):
                found.append(shown_chat(reading.connection, owner, place, words))
            last = place.name
            if len(found) == MOST_FOUND or time.monotonic() > until_s:
                return FoundPage(found, last)
        return FoundPage(found, None)
    except sqlite3.OperationalError:  # the time is over in the middle of a chat
        if last == after:
            raise
        return FoundPage(found, last)


def has_all(connection: sqlite3.Connection, owner: str, chat: str, words: Seq[str]) -> bool:
    """Has a chat all words? The longest is looked for first: it is probably the rarest."""
    return all(connection.execute(
        "SELECT 1 FROM chat_words WHERE owner = ? AND chat = ? AND folded GLOB ? LIMIT 1",
        (owner, chat, pattern_of(word))).fetchone() for word in sorted(words, key=len, reverse=True))


def shown_chat(connection: sqlite3.Connection, owner: str, place: Place, words: Seq[str]) -> FoundChat:
    """A found chat, with the text around the first word that its title lacks: of the first message that has
    the most of the words."""
    fields = Fields(StoredTexts(connection, place.number))
    title = fields.get("title", "")
    missing = [word for word in words if word not in folded(title)] or words
    node = best_node(connection, owner, place, words, missing)
    if node is None:
        return FoundChat(place.name, title, fields.get("updated"), None, "")
    number, name = node
    (content,) = connection.execute("SELECT value FROM chat_fields WHERE record = ? AND name = 'content'",
                                    (number,)).fetchone()
    return FoundChat(place.name, title, fields.get("updated"), name, snippet_of(json.loads(content), missing))


def best_node(connection: sqlite3.Connection, owner: str, place: Place, words: Seq[str],
              wanted: Seq[str]) -> tuple[int, str] | None:
    """(number, id) of the first message that has the most of the words, and one of those that are wanted;
    None if none has."""
    has = [f"MAX(folded GLOB ?{index})" for index, _ in enumerate(words, 4)]
    has_wanted = [each for each, word in zip(has, words) if word in wanted]
    row = connection.execute(
        f"SELECT record, {' + '.join(has)} AS count FROM chat_words WHERE owner = ?1 AND chat = ?2 "
        f"AND record <> ?3 GROUP BY record HAVING {' OR '.join(has_wanted)} ORDER BY count DESC, record "
        "LIMIT 1", (owner, place.name, place.number, *map(pattern_of, words))).fetchone()
    return row and connection.execute("SELECT number, name FROM chat_records WHERE number = ?",
                                      row[:1]).fetchone()


def snippet_of(content: str, words: Seq[str]) -> str:
    """The text around the first of these words that it has."""
    content = unicodedata.normalize("NFC", content)
    text = folded(content)
    at = next((place for word in words if (place := text.find(word)) >= 0), 0)
    begin = max(0, at - AROUND)
    shown = " ".join(content[begin:begin + SNIPPET].split())
    return ("…" if begin else "") + shown + ("…" if begin + SNIPPET < len(content) else "")
