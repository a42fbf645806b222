"""Passages that have the words of a question: BM25, by SQLite's FTS5.

Of a question's words only those count that stand in at most a quarter of the passages. With all of them,
plain RRF finds less: the words that all texts have say nothing, but move ranks (bench/knowledge_quality.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.front.knowledge.tables import words_table

if TYPE_CHECKING:
    import sqlite3


SHARE = 4         # a word counts if at most every fourth passage has it
MOST_WORDS = 256  # of a question, that are looked at
RAREST = 32       # that are searched for
# Those that are not deleted, of files that are searched
LIVE = ("JOIN knowledge_passages AS p ON p.number = w.rowid JOIN knowledge_files AS f ON f.number = p.file "
        "AND f.deleted = 0 AND f.status = 'completed'")
SEARCHED = " JOIN temp.searched AS s ON s.number = f.number"


class Ranked(NamedTuple):
    """A passage that has some of the words."""

    passage: int
    score: float  # BM25, higher is better


def words_of(question: str) -> list[str]:
    """The words of a question, each once, in their order."""
    words: dict[str, None] = {}
    for match in re.finditer(r"[^\W_]+", question):
        words[match[0].casefold()] = None
        if len(words) == MOST_WORDS:
            break
    return [*words]


def telling_words(connection: sqlite3.Connection, store: int, words: Iterable[str]) -> list[str]:
    """Those that stand in at most a quarter of a store's passages, the rarest first."""
    (passages,) = connection.execute(
        "SELECT IFNULL(SUM(passages), 0) FROM knowledge_files WHERE store = ? AND deleted = 0 "
        "AND status = 'completed'", (store,)).fetchone()
    most = max(passages // SHARE, 1)
    found = []
    for word in words:
        (count,) = connection.execute(
            f"SELECT COUNT(*) FROM (SELECT 1 FROM {words_table(store)} AS w {LIVE} "
            f"WHERE {words_table(store)} MATCH ? LIMIT ?)", (phrase(word), most + 1)).fetchone()
        if 0 < count <= most:
            found.append((count, word))
    return [word for _, word in sorted(found)[:RAREST]]


def ranked(connection: sqlite3.Connection, store: int, words: Seq[str], most: int,
           filtered: bool) -> list[Ranked]:
    """The passages of a store that have some of the words, the best first; of equal ones the earlier file,
    then the earlier passage. filtered: only of the files in the table temp.searched."""
    if not words:
        return []
    table = words_table(store)
    return [Ranked(passage, -rank) for passage, rank in connection.execute(
        f"SELECT p.number, bm25({table}) AS rank FROM {table} AS w {LIVE}{SEARCHED if filtered else ''} "
        f"WHERE {table} MATCH ? ORDER BY rank, p.file, p.place LIMIT ?",
        (" OR ".join(map(phrase, words)), most))]


def phrase(word: str) -> str:
    return '"' + word.replace('"', '""') + '"'
