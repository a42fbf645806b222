"""Searching stores: passages that are near to a question, joined with those that have its words.

Two lists of 50 passages each are joined by their ranks alone (RRF): vectors find what is meant, words find
names and numbers. Passages with the same words of the question are ordered by their vectors. A reranker, if
one is served, then reads the best of them. Which files are searched (the caller's stores, filters) is decided
before anything is ranked."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.log import log
from chatlm.common.messages.vectors import Scan
from chatlm.front.held import Durations
from chatlm.front.knowledge.asking import Asker, Asking
from chatlm.front.knowledge.embedding import Embedders
from chatlm.front.knowledge.scan import VectorScanner
from chatlm.front.knowledge.words import Ranked, ranked, telling_words, words_of
from chatlm.front.store.readers import Readers

if TYPE_CHECKING:
    import sqlite3
    from chatlm.common.messages.vectors import Scanned
    from chatlm.front.front import Front
    from chatlm.front.knowledge.embedding import Chosen
    from chatlm.front.knowledge.filters import Filter
    from chatlm.front.store.readers import Reading


T = TypeVar("T")
LISTED = 50       # passages of each list that is joined
RRF = 60          # a passage gets 1 / (RRF + its rank) of each list
RERANKED = 30     # passages that a reranker reads
RERANK_S = 5.0    # and the longest that it is waited for
SEARCH_READ_S = 5.0  # the longest that the database is read at a time
MOST_WHOLE = 2_000   # passages that are given to read as a whole
FEW = 8           # of so few passages none is left out
CHECKED_FILES = 64   # between two looks at the time, while files are filtered
LISTED_CHARACTERS = 4 << 20  # of attributes, as JSON, that are kept in memory: they take five times as much
ROW_CHARACTERS = 40          # that a file counts besides these


class Hit(NamedTuple):
    """A passage that was found."""

    passage: int  # its number
    store: int    # that of its store
    file: str     # file-...
    filename: str
    attributes: Mapping[str, str | float | bool]
    place: int    # 0, 1, ... within the file
    heading: str
    start: int    # its first character within the text of the file
    page: int | None
    text: str
    score: float  # 0 to 1: the cosine, or what the reranker says


class Found(NamedTuple):
    """What a search has found, the best first."""

    hits: Seq[Hit]
    words_only: bool  # vectors were not compared, of some store at least
    reranked: bool
    passages: int     # of the files that were searched


class Terms(NamedTuple):
    """How a search is done."""

    limit: int = 10
    filter: Filter | None = None
    threshold: float | None = 0.0  # hits have at least this score; None: those that are worth reading
    rerank: bool = True
    vector_weight: float = 1.0   # of the two lists, when they are joined
    words_weight: float = 1.0


class SearchedStore(NamedTuple):
    """A store, as it is searched."""

    number: int
    embedder: int | None  # the number of the embedder whose windows it has
    digest: str | None    # of that
    has_words: bool
    is_purged: bool       # its words are those of completed files alone
    passages: int         # of its files
    tokens: int           # of these, as the embedder counts
    revision: int         # another one after any change of its files


class InWords(NamedTuple):
    """What the database says before vectors are compared."""

    places: Seq[SearchedStore]
    files: tuple[int, ...] | None    # those that fit the filter; None: all
    passages: int
    lists: Seq[Seq[Ranked]]          # of each store


class Row(NamedTuple):
    """A passage in the database, with its file."""

    passage: int
    store: int
    file_number: int
    place: int
    heading: str
    start: int
    page: int | None
    text: str
    file: str
    filename: str
    attributes: str

    def hit(self, score: float) -> Hit:
        attributes = json.loads(self.attributes)
        return Hit(self.passage, self.store, self.file, self.filename, attributes, self.place, self.heading,
                   self.start, self.page, self.text, min(max(score, 0.0), 1.0))


# CROSS JOIN: from the passages on. SQLite would go through all stores, and read each passage of the database
ROWS = ("SELECT p.number, p.store, p.file, p.place, p.heading, p.start, p.page, p.text, f.file, f.filename, "
        "f.attributes FROM knowledge_passages AS p CROSS JOIN knowledge_files AS f ON f.number = p.file "
        "CROSS JOIN knowledge_stores AS s ON s.number = f.store AND s.deleted = 0 AND s.expired = 0 "
        "WHERE f.deleted = 0 AND f.status = 'completed'")
PLACES = ("SELECT s.number, s.embedder, e.digest, s.has_words, NOT EXISTS (SELECT 1 FROM "
          "knowledge_files AS f WHERE f.store = s.number AND f.deleted = 1) AND NOT EXISTS (SELECT 1 FROM "
          "knowledge_files AS f WHERE f.store = s.number AND f.written > 0), s.passages, s.tokens, "
          "s.revision FROM knowledge_stores AS s "
          "LEFT JOIN knowledge_embedders AS e ON e.number = s.embedder "
          "WHERE s.number = ? AND s.deleted = 0 AND s.expired = 0")
FILES = ("SELECT number, attributes, passages, tokens FROM knowledge_files "
         "WHERE store = ? AND deleted = 0 AND status = 'completed' ORDER BY number")


class Listed(NamedTuple):
    """A file, as filters see it."""

    number: int
    attributes: Mapping[str, str | float | bool]
    passages: int
    tokens: int


class FileLists:
    """The files of stores that were filtered last, so that a search need not read thousands of rows again. A
    list holds for one revision of its store. Several threads ask it."""

    def __init__(self, most_characters: int = LISTED_CHARACTERS):
        """most_characters: of the attributes, as JSON, of all lists; a longer one is not kept."""
        self.most_characters = most_characters
        self.lists: OrderedDict[int, tuple[int, int, Seq[Listed]]] = OrderedDict()  # revision, characters
        self.lock = threading.Lock()

    def of(self, connection: sqlite3.Connection, place: SearchedStore) -> Seq[Listed]:
        """The files of a store that can be searched."""
        with self.lock:
            kept = self.lists.get(place.number)
            if kept and kept[0] == place.revision:
                self.lists.move_to_end(place.number)
                return kept[2]
        rows = connection.execute(FILES, (place.number,)).fetchall()
        size = sum(len(attributes) + ROW_CHARACTERS for _, attributes, *_ in rows)
        files = [Listed(number, json.loads(attributes), *counts) for number, attributes, *counts in rows]
        with self.lock:
            self.lists.pop(place.number, None)
            self.lists[place.number] = place.revision, size, files
            while self.lists and sum(each[1] for each in self.lists.values()) > self.most_characters:
                self.lists.popitem(last=False)
        return files


class Search:
    """Searches stores, whose numbers a caller has from `Stores.of_owner`, so that they are its own."""

    def __init__(self, database: Path, asking: Asking, scanner: VectorScanner):
        self.asking = asking
        self.scanner = scanner
        self.readers = Readers(database, "search")
        self.durations = Durations()  # of searches, those that failed too
        self.lists = FileLists()

    @classmethod
    def of(cls, front: Front) -> Search:
        """That of a server with --database."""
        assert front.store
        embedders = Embedders(front.catalogue, front.owners, front.answers, front.ledger)
        return cls(front.store.path, Asking(embedders), VectorScanner(front.store.path))

    async def close(self):
        self.readers.close()
        await self.scanner.close()

    async def find(self, stores: Seq[int], questions: Seq[str], asker: Asker,
                   terms: Terms = Terms()) -> Found:
        """The passages that fit one of the questions. Raises Overloaded if they cannot be searched now."""
        began_s = time.monotonic()
        try:
            return await self._find(stores, questions, asker, terms)
        finally:
            self.durations.observe(time.monotonic() - began_s)

    async def _find(self, stores: Seq[int], questions: Seq[str], asker: Asker, terms: Terms) -> Found:
        lists = [await self._lists(stores, question, asker, terms) for question in questions]
        before = lists[0][0]
        words_only = any(part[2] for part in lists)
        joined, scores = join([ranks for part in lists for ranks in part[1]],
                              [part[3] for part in lists])
        rows = await self._read(lambda reading: rows_of(reading.connection, [*joined]), asker.client)
        order = sorted(rows.values(), key=lambda row: (-joined[row.passage], row.file_number, row.place))
        reranker = self.asking.reranker() if terms.rerank else None
        reranked = None
        if reranker and order:
            reranked = await self._reranked(order[:max(RERANKED, terms.limit)], questions, asker)
        hits = reranked or [row.hit(scores[row.passage]) for row in order]
        if terms.threshold is None:
            hits = hits[:terms.limit] if words_only else worth_reading(hits, terms.limit)
        else:
            hits = [hit for hit in hits if hit.score >= terms.threshold][:terms.limit]
        return Found(hits, words_only, reranked is not None, before.passages)

    async def whole(self, stores: Seq[int], most_tokens: int, client: str,
                    terms: Terms = Terms()) -> list[Hit] | None:
        """All passages of the stores, in their order, if these have at most so many tokens (as the embedder
        counted); else None."""
        return await self._read(lambda reading: whole_of(
            reading, stores, most_tokens, terms.filter, self.lists), client)

    async def _lists(self, stores: Seq[int], question: str, asker: Asker, terms: Terms) -> tuple[
            InWords, list[tuple[float, list[int]]], bool, dict[int, float]]:
        """(what was searched; ranked lists with their weights; whether words alone were; the scores)"""
        if not question.strip():
            raise RequestError("the query is empty", param="query", code="invalid_value")
        before = await self._read(lambda reading: in_words(
            reading, stores, question, terms.filter, self.lists), asker.client)
        weighted = list[tuple[float, list[int]]]()
        scores = {each.passage: each.score / (1 + each.score) for ranks in before.lists for each in ranks}
        cosines = dict[int, float]()
        compared = 0
        for digest in sorted({place.digest for place in before.places if place.digest}):
            places = [place for place in before.places if place.digest == digest]
            scanned = await self._scanned(before, places, digest, question, asker)
            if scanned:
                compared += len(places)
                weighted.append((terms.vector_weight, [each.passage for each in scanned.nearest]))
                cosines |= {each.passage: each.score for each in (*scanned.others, *scanned.nearest)}
        for ranks in before.lists:  # BM25's order stays where there is no cosine
            order = sorted(ranks, key=lambda each: (-each.weight, -cosines.get(each.passage, -math.inf)))
            weighted.append((terms.words_weight, [each.passage for each in order]))
        return before, weighted, compared < len(before.places), scores | cosines

    async def _scanned(self, before: InWords, places: Seq[SearchedStore], digest: str, question: str,
                       asker: Asker) -> Scanned | None:
        """What is nearest in stores of one embedder; None if that is not served."""
        chosen = self.asking.embedder(digest)
        embedder = places[0].embedder
        if chosen is None or embedder is None:
            return None
        vector = await self.asking.vector(chosen, question, asker)
        if chosen.digest != digest:  # it was loaded for this question, and is another one
            return None
        others = tuple(each.passage for ranks in before.lists for each in ranks)
        stores = tuple(place.number for place in places)
        return await self.scanner.nearest(Scan(stores, embedder, vector, LISTED, before.files, others),
                                          asker.client)

    async def _reranked(self, rows: Seq[Row], questions: Seq[str], asker: Asker) -> list[Hit] | None:
        """The passages by what the reranker says of them; None if it takes too long, or cannot answer now."""
        model = self.asking.reranker()
        assert model
        texts = [f"{row.heading}\n{row.text}" if row.heading else row.text for row in rows]
        try:
            lists = await asyncio.wait_for(self._scores(model, questions, texts, asker), RERANK_S)
        except (asyncio.TimeoutError, Overloaded) as error:
            why = str(error) or f"it took more than {RERANK_S:g} s"
            log.warning("passages were not reranked: %s", why)
            return None
        best = [max(scores) for scores in zip(*lists)]
        order = sorted(range(len(rows)), key=lambda index: (-best[index], rows[index].file_number,
                                                            rows[index].place))
        return [rows[index].hit(sigmoid(best[index])) for index in order]

    async def _scores(self, model: Chosen, questions: Seq[str], texts: Seq[str],
                      asker: Asker) -> list[list[float]]:
        """The raw scores of texts, for each question."""
        return [await self.asking.scores(model, question, texts, asker) for question in questions]

    async def _read(self, work: Callable[[Reading], T], client: str) -> T:
        return await self.readers.run(work, client, SEARCH_READ_S)


def places_of(connection: sqlite3.Connection, stores: Seq[int]) -> list[SearchedStore]:
    return [SearchedStore(*row) for store in stores for row in connection.execute(PLACES, (store,))]


def fitting(reading: Reading, places: Seq[SearchedStore], wanted: Filter | None,
            lists: FileLists) -> Iterator[Listed]:
    """The files of stores that fit a filter."""
    for place in places:
        for index, file in enumerate(lists.of(reading.connection, place)):
            if index % CHECKED_FILES == 0:
                reading.check()
            if wanted is None or wanted(file.attributes):
                yield file


def in_words(reading: Reading, stores: Seq[int], question: str, wanted: Filter | None,
             lists: FileLists) -> InWords:
    """What a search reads first: the stores, their files that fit a filter, the passages with its words."""
    connection = reading.connection
    places = places_of(connection, stores)
    files: list[int] = []
    passages = sum(place.passages for place in places)
    if wanted is not None:
        left = [*fitting(reading, places, wanted, lists)]
        files = [file.number for file in left]
        passages = sum(file.passages for file in left)
        connection.execute("CREATE TEMP TABLE searched (number INTEGER PRIMARY KEY)")
        connection.executemany("INSERT INTO searched VALUES (?)", [(number,) for number in files])
    words = words_of(question)
    found = []
    for place in places:
        if place.has_words and passages:
            stale = not place.is_purged
            telling = telling_words(connection, place.number, place.passages, words, stale)
            found.append(ranked(connection, place.number, telling, LISTED, wanted is not None, stale))
    return InWords(places, None if wanted is None else tuple(files), passages, found)


def rows_of(connection: sqlite3.Connection, passages: Seq[int]) -> dict[int, Row]:
    """Passages by their numbers, without those that have gone meanwhile."""
    marks = ", ".join("?" * len(passages))
    return {row[0]: Row(*row) for row in connection.execute(f"{ROWS} AND p.number IN ({marks})", passages)}


def whole_of(reading: Reading, stores: Seq[int], most_tokens: int, wanted: Filter | None,
             lists: FileLists) -> list[Hit] | None:
    connection = reading.connection
    places = places_of(connection, stores)
    if wanted is None and sum(place.tokens for place in places) > most_tokens:
        return None
    left = MOST_WHOLE
    hits = []
    for file in fitting(reading, places, wanted, lists):
        most_tokens -= file.tokens
        left -= file.passages
        if most_tokens < 0 or left < 0:
            return None
        hits += [Row(*row).hit(1.0) for row in connection.execute(
            f"{ROWS} AND p.file = ? ORDER BY p.place", (file.number,))]
    return hits


def worth_reading(hits: Seq[Hit], limit: int) -> list[Hit]:
    """Of so many hits the first, and those whose score is at least half way from a common one to the best:
    from the middle one of the LISTED first hits, which hardly fits the question. So models read nothing that
    is far less near, whatever an embedder's scores are like (bench/figures/knowledge.json)."""
    scores = sorted(hit.score for hit in hits[:LISTED])
    if len(scores) <= FEW:
        return [*hits[:limit]]
    best = max(hit.score for hit in hits[:limit])
    least = (scores[len(scores) // 2] + best) / 2
    return [hit for index, hit in enumerate(hits[:limit]) if index == 0 or hit.score >= least]


def join(lists: Seq[tuple[float, Seq[int]]],
         scores: Seq[Mapping[int, float]]) -> tuple[dict[int, float], dict[int, float]]:
    """Ranked lists of passages, each with its weight, as one value of each passage, by which they are
    ordered; and the best score of each."""
    joined: dict[int, float] = {}
    for weight, passages in lists:
        for rank, passage in enumerate(passages, 1):
            if weight:
                joined[passage] = joined.get(passage, 0.0) + weight / (RRF + rank)
    best: dict[int, float] = {}
    for each in scores:
        for passage, score in each.items():
            best[passage] = max(score, best.get(passage, -math.inf))
    return joined, best


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(min(score, 700)))
