"""A search: vectors and words joined, filters before ranking, rerankers, and what is left without vectors."""

import asyncio
import contextlib
import math
import struct

import pytest

import knowledge_rows as rows
from chatlm.common.errors import Overloaded, RequestError
from chatlm.front.annexes.knowledge import search as searching, words
from chatlm.front.annexes.knowledge.asking import Asker
from chatlm.front.annexes.knowledge.filters import read_filter
from chatlm.front.annexes.knowledge.scan import VectorScanner
from chatlm.front.annexes.knowledge.search import Search, Terms
from patching import patch

ME = Asker("me", "")


class Models:
    """Stands in for the models: a question's vector is what the test says. `scores`: of the reranker."""

    def __init__(self, digest="a", vector=(1, 0, 0, 0)):
        self.digest, self.to_embed, self.scores_of, self.asked = digest, vector, None, []
        self.loaded = None

    def embedder(self, digest):
        return self if self.digest in (digest, "") else None

    def reranker(self):
        return self if self.scores_of else None

    async def vector(self, model, question, asker):
        self.asked.append((question, asker))
        self.digest = self.digest or self.loaded
        return struct.pack("<4f", *self.to_embed)

    async def scores(self, model, question, texts, asker):
        self.asked.append((question, len(texts)))
        scores = self.scores_of(question, texts)
        if isinstance(scores, Exception):
            raise scores
        return scores


class Place:
    def __init__(self, path):
        self.path = path
        rows.make_database(path)
        self.embedder = rows.add_embedder(path, "a")
        self.store = rows.add_store(path, self.embedder)
        self.models = Models()
        self.search = Search(path, self.models, VectorScanner(path))

    def add(self, *passages, store=None, **more):
        """A file of passages, each a text with its vector; without one it has no window."""
        texts = [(text, [vector] if vector else []) for text, vector in passages]
        return rows.add_file(self.path, store or self.store, texts, self.embedder, **more)

    async def texts(self, question, stores=None, **terms):
        found = await self.search.find(stores or [self.store], [question], ME, Terms(**terms))
        return [hit.text for hit in found.hits]


@pytest.fixture
async def place(tmp_path):
    place = Place(tmp_path / "kept.db")
    yield place
    await place.search.close()


def near(cosine):
    """A vector with this cosine to the question's."""
    return [cosine, math.sqrt(1 - cosine * cosine), 0, 0]


async def test_vectors_and_words_are_joined_by_their_ranks(place):
    place.add(("alpha", near(0.9)), ("beta", near(0.8)), ("gamma zebra", near(0.1)), ("delta", near(0.7)),
              ("epsilon zebra crossing", near(0.85)))
    by_vectors = ["alpha", "epsilon zebra crossing", "beta", "delta", "gamma zebra"]
    assert await place.texts("where is it?") == by_vectors
    # "zebra" stands in more than a quarter of the passages, "crossing" does not
    assert (await place.texts("a zebra"))[0] == "alpha"
    found = await place.search.find([place.store], ["crossing"], ME)
    assert [hit.text for hit in found.hits][:2] == ["epsilon zebra crossing", "alpha"]
    assert [round(hit.score, 2) for hit in found.hits][:2] == [0.85, 0.9] and not found.words_only
    assert found.passages == 5 and not found.reranked


async def test_a_passage_has_the_score_of_its_vector_however_it_was_found(place, monkeypatch):
    patch(monkeypatch, searching, "LISTED", 2)
    place.add(*((f"text {number}", near(0.9)) for number in range(8)), ("rare pangolin", near(-0.2)))
    found = await place.search.find([place.store], ["pangolin"], ME)
    assert [(hit.text, hit.score) for hit in found.hits if "rare" in hit.text] == [("rare pangolin", 0.0)]


async def test_the_same_search_gives_the_same_answer(place):
    for file in range(4):
        place.add(*((f"copy {number}", near(0.5)) for number in range(6)))
    first = await place.search.find([place.store], ["copy 3"], ME, Terms(limit=50))
    assert [hit.place for hit in first.hits if hit.text != "copy 3"][:5] == [0, 1, 2, 4, 5]
    files = [hit.file for hit in first.hits if hit.text == "copy 3"]
    assert len(set(files)) == 4
    await place.search.scanner.close()
    place.search.scanner = VectorScanner(place.path)
    again = await asyncio.gather(*(place.search.find([place.store], ["copy 3"], ME, Terms(limit=50))
                                   for _ in range(5)))
    assert again == [first] * 5


async def test_filters_are_applied_before_ranking(place):
    for year in range(60):
        place.add((f"of {year}", near(0.9 - year / 100)), attributes={"year": year})
    last = read_filter({"type": "gte", "key": "year", "value": 58})
    assert await place.texts("anything", filter=last) == ["of 58", "of 59"]
    assert await place.texts("59", filter=last) == ["of 59", "of 58"]
    assert await place.texts("57", filter=last) == ["of 58", "of 59"]
    assert await place.texts("59", filter=read_filter({"type": "eq", "key": "x", "value": 1})) == []


async def test_other_stores_and_what_is_deleted_are_not_found(place):
    other = rows.add_store(place.path, place.embedder, owner="you")
    place.add(("secret zebra", near(1)), store=other)
    gone, _ = place.add(("gone zebra", near(1)))
    place.add(("mine", near(0.1)))
    rows.delete_file(place.path, gone)
    assert await place.texts("zebra") == ["mine"]
    assert set(await place.texts("zebra", [place.store, other])) == {"mine", "secret zebra"}
    with rows.connect(place.path) as connection:
        connection.execute("UPDATE knowledge_stores SET expired = 1 WHERE number = ?", (other,))
    assert await place.texts("zebra", [place.store, other]) == ["mine"]


async def test_words_of_what_is_deleted_do_not_crowd_out_others(place):
    """Until a purge, the table of words still has them."""
    gone, _ = place.add(*((f"zebra {number}", None) for number in range(60)))
    place.add(("a zebra of mine", None), *((f"other {number}", None) for number in range(9)))
    rows.delete_file(place.path, gone)
    assert await place.texts("zebra") == ["a zebra of mine"]


@pytest.mark.parametrize("digest", ["another", "not loaded"])
async def test_words_alone_where_the_embedder_is_not_served(place, digest):
    place.add(("alpha wolf", near(0.9)), ("beta bear", near(0.8)), ("gamma crow", near(0.1)),
              ("delta", near(0.7)))
    place.models.digest = "" if digest == "not loaded" else digest
    place.models.loaded = "another"
    found = await place.search.find([place.store], ["a crow?"], ME)
    assert [hit.text for hit in found.hits] == ["gamma crow"] and found.words_only
    assert 0 < found.hits[0].score < 1


async def test_an_embedder_that_is_loaded_for_the_question_is_the_one(place):
    place.add(("alpha", near(0.2)), ("beta", near(0.8)))
    place.models.digest, place.models.loaded = "", "a"
    found = await place.search.find([place.store], ["?"], ME)
    assert [hit.text for hit in found.hits] == ["beta", "alpha"] and not found.words_only


async def test_vectors_alone_where_there_are_no_words(place):
    store = rows.add_store(place.path, place.embedder, with_words=False)
    place.add(("alpha", near(0.2)), ("beta", near(0.8)), store=store)
    assert await place.texts("alpha", [store]) == ["beta", "alpha"]


async def test_the_best_window_of_a_passage_counts(place):
    texts = [("one", [near(0.1), near(0.95), near(0.2)]), ("two", [near(0.9)])]
    rows.add_file(place.path, place.store, texts, place.embedder)
    found = await place.search.find([place.store], ["?"], ME)
    assert [(hit.text, round(hit.score, 2)) for hit in found.hits] == [("one", 0.95), ("two", 0.9)]


async def test_scores_below_the_threshold_are_left_out_and_limits_hold(place):
    place.add(*((f"t{number}", near(number / 10)) for number in range(10)))
    assert await place.texts("?", threshold=0.65) == ["t9", "t8", "t7"]
    assert await place.texts("?", limit=2) == ["t9", "t8"]


async def test_a_reranker_has_the_last_word(place):
    place.add(*((f"t{number}", near(number / 10)) for number in range(10)))
    place.models.scores_of = lambda question, texts: [-float(text[1]) for text in texts]
    found = await place.search.find([place.store], ["?"], ME, Terms(limit=2))
    assert [(hit.text, hit.score) for hit in found.hits] == [("t0", 0.5), ("t1", 1 / (1 + math.e))]
    assert found.reranked
    assert await place.texts("?", limit=1, rerank=False) == ["t9"]


@pytest.mark.parametrize("fails", ["late", "busy"])
async def test_without_an_answer_of_the_reranker_the_order_is_that_of_ranks(place, monkeypatch, fails):
    place.add(("a", near(0.2)), ("b", near(0.8)))
    patch(monkeypatch, searching, "RERANK_S", 0.01)

    async def never(*asked):
        await asyncio.Event().wait()

    if fails == "late":
        place.models.scores = never
    place.models.scores_of = lambda question, texts: Overloaded("busy")
    found = await place.search.find([place.store], ["?"], ME)
    assert [hit.text for hit in found.hits] == ["b", "a"] and not found.reranked


async def test_several_questions_are_one_search(place):
    place.add(("alpha", near(0.9)), ("beta", near(0.8)), ("rare wombat", near(0.1)), ("rare numbat", near(0)))
    found = await place.search.find([place.store], ["wombat", "numbat"], ME)
    assert {hit.text for hit in found.hits[:3]} >= {"rare wombat", "alpha"}
    assert [question for question, _ in place.models.asked] == ["wombat", "numbat"]


@pytest.mark.parametrize("question", [
    '"', '" OR text', "NEAR(a b)", "a* OR (", "heading:x", "-", "___", "\x00zebra",
    "' ; DROP TABLE x", "日本語 の"])
async def test_no_question_is_taken_as_a_query_language(place, question):
    place.add(("alpha zebra", near(0.9)), ("beta", near(0.1)))
    assert len(await place.texts(question)) == 2


async def test_an_empty_question_is_refused(place):
    with pytest.raises(RequestError, match="the query is empty"):
        await place.texts(" \n")


async def test_a_database_that_cannot_be_read_now_is_said(place, monkeypatch):
    place.add(*((f"word{number} zebra", near(0.9)) for number in range(2000)))
    patch(monkeypatch, searching, "SEARCH_READ_S", 0.0)
    with pytest.raises(Overloaded, match="too long to be searched now"):
        await place.texts("zebra")
    monkeypatch.undo()
    assert await place.texts("word77", limit=2) == ["word0 zebra", "word77 zebra"]


async def test_the_whole_of_what_fits(place):
    place.add(("one two three", near(0.1)), ("four five", near(0.2)), filename="a.txt")
    place.add(("six", near(0.9)), attributes={"draft": True})
    hits = await place.search.whole([place.store], 6, "")
    assert [hit.text for hit in hits] == ["one two three", "four five", "six"] and hits[1].filename == "a.txt"
    assert await place.search.whole([place.store], 5, "") is None
    final = Terms(filter=read_filter({"type": "ne", "key": "draft", "value": True}))
    assert len(await place.search.whole([place.store], 5, "", final)) == 2


def steps_of(path, work):
    """What SQLite's machine does for `work(connection)`, in steps."""
    counted = []
    with contextlib.closing(rows.connect(path)) as connection:
        connection.set_progress_handler(lambda: counted.append(1), 1)
        work(connection)
    return len(counted)


def test_other_texts_make_reading_passages_no_slower(tmp_path):
    """Only those that were found are read, however many others the database has."""
    path = tmp_path / "k.db"
    rows.make_database(path)
    own, other = rows.add_store(path), rows.add_store(path, owner="other")
    _, found = rows.add_file(path, own, [(f"text {number}", []) for number in range(100)])
    few = steps_of(path, lambda connection: searching.rows_of(connection, found))
    for store in own, other:
        for _ in range(5):
            rows.add_file(path, store, [(f"other {number}", []) for number in range(40)])
    assert steps_of(path, lambda connection: searching.rows_of(connection, found)) == few


def test_a_word_is_looked_for_once_for_all_passages(tmp_path):
    """Which passages have a word is read from its list, not word by word for each passage."""
    path = tmp_path / "k.db"
    rows.make_database(path)
    store = rows.add_store(path)
    rows.add_file(path, store, [("water" if number % 8 else "wine", []) for number in range(400)])
    asked = []
    with contextlib.closing(rows.connect(path)) as connection:
        connection.set_trace_callback(asked.append)
        telling = [words.QuestionWord("wine", 1.0), words.QuestionWord("water", 0.5)]
        found = words.ranked(connection, store, telling, 50, False)
        plans = [connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
                 for statement in asked if " IN (" in statement]
    assert {each.weight for each in found} == {1.0} and len(plans) == 2
    assert not any("=" in step[3].rpartition("INDEX")[2] for plan in plans for step in plan), plans
