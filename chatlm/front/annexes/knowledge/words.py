"""Passages that have the words of a question, by SQLite's FTS5.

Of a question's words only those count that stand in at most a quarter of the passages: the words that all
texts have say nothing, but move ranks. BM25 chooses the passages. Among these, those with the same words are
equal here: BM25 would order them by their lengths, which says less than their vectors do
(bench/knowledge_quality.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.front.annexes.knowledge.tables import words_table

if TYPE_CHECKING:
    import sqlite3


SHARE = 4         # a word counts if at most every fourth passage has it
QUESTION_WORDS = 256  # of a question, that are looked at
RAREST = 32       # that are searched for
# Passages that are not deleted. Where the table of words has no others, that is not asked: it takes several
# times as long
LIVE = ("JOIN knowledge_passages AS p ON p.number = w.rowid JOIN knowledge_files AS f ON f.number = p.file "
        "AND f.deleted = 0 AND f.status = 'completed'")
SEARCHED = LIVE + " JOIN temp.searched AS s ON s.number = f.number"


class QuestionWord(NamedTuple):
    """A word that tells passages apart."""

    text: str
    weight: float  # the rarer, the more


class Ranked(NamedTuple):
    """A passage that has some of the words."""

    passage: int
    score: float   # BM25, higher is better
    weight: float  # of the words that it has


def words_of(question: str) -> list[str]:
    """The words of a question, each once, in their order."""
    words: dict[str, None] = {}
    for match in re.finditer(r"[^\W_]+", question):
        words[match[0].casefold()] = None
        if len(words) == QUESTION_WORDS:
            break
    return [*words]


def telling_words(connection: sqlite3.Connection, store: int, passages: int, words: Iterable[str],
                  stale: bool = False) -> list[QuestionWord]:
    """Those that stand in at most a quarter of a store's passages, the rarest first. passages: how many it
    has; stale: the table has words of deleted passages too."""
    most = max(passages // SHARE, 1)
    found = []
    for word in words:
        (count,) = connection.execute(
            f"SELECT COUNT(*) FROM (SELECT 1 FROM {words_table(store)} AS w {LIVE if stale else ''} "
            f"WHERE {words_table(store)} MATCH ? LIMIT ?)", (phrase(word), most + 1)).fetchone()
        if 0 < count <= most:
            found.append(QuestionWord(word, round(math.log(1 + (passages - count + 0.5) / (count + 0.5)), 6)))
    return sorted(found, key=lambda word: (-word.weight, word.text))[:RAREST]


def ranked(connection: sqlite3.Connection, store: int, words: Seq[QuestionWord], most: int, filtered: bool,
           stale: bool = False) -> list[Ranked]:
    """The passages of a store that BM25 puts first, in its order; of equal ones the earlier. filtered: only
    of the files in the table temp.searched. stale: as in `telling_words`."""
    if not words:
        return []
    table = words_table(store)
    joins = SEARCHED if filtered else LIVE if stale else ""
    found = connection.execute(
        f"SELECT w.rowid, bm25({table}) AS rank FROM {table} AS w {joins} "
        f"WHERE {table} MATCH ? ORDER BY rank, w.rowid LIMIT ?",
        (" OR ".join(phrase(word.text) for word in words), most)).fetchall()
    weights = dict.fromkeys((passage for passage, _ in found), 0.0)
    marks = ", ".join("?" * len(weights))
    for word in words:
        for (passage,) in connection.execute(  # +: FTS5 would look for the word again for each passage
                f"SELECT rowid FROM {table} WHERE {table} MATCH ? AND +rowid IN ({marks})",
                (phrase(word.text), *weights)):
            weights[passage] += word.weight
    return [Ranked(passage, -rank, weights[passage]) for passage, rank in found]


def phrase(word: str) -> str:
    return '"' + word.replace('"', '""') + '"'
