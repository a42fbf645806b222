"""What is deleted leaves no words in the database: not in its file, nor in the -wal beside it."""

import asyncio
import random

import pytest

from chatlm.front.annexes.knowledge import stores
from chatlm.front.annexes.knowledge.tables import words_table
from embedding_pool import knowing

ONE, OTHER = "A" * 22, "b-_9" * 16
STORES = "/v1/vector_stores"
SECRET = b"zyxophon"  # of the text that is deleted, and in its words' index
KEPT = b"quaverly"


def texts(count, word):
    """Each has `word` somewhere, and words that all have."""
    random.seed(5)
    common = "the cat and dog slept in house near river while rain fell on old roof again".split()
    return [
        " ".join([*random.choices(common, k=120), f"{word}{number}", word, *random.choices(common, k=40)])
        for number in range(count)
    ]


def bytes_of(path):
    beside = path.with_name(path.name + "-wal")
    return path.read_bytes() + (beside.read_bytes() if beside.exists() else b"")


async def cleaned(ask, path, word):
    """Wait until the background work has removed a word, which takes it as many rounds as it has pieces."""
    ask.ingest.wake.set()
    for _ in range(600):
        if word not in bytes_of(path).lower():
            return True
        await asyncio.sleep(0.05)  # between two looks at the files of the server
    return False


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(stores, "PURGED_ROWS", 2)
    monkeypatch.setattr(stores, "MERGED_PAGES", 4)


async def filled(ask):
    """(the store, its files with the word, those without) after they came one by one, in turns."""
    store, _ = await ask.store(ONE)
    gone, kept = [], []
    for secret, other in zip(texts(6, SECRET.decode()), texts(6, KEPT.decode())):
        for text, ids in (secret, gone), (other, kept):
            ids.append(await ask.file(ONE, text))
            await ask(ONE, f"{STORES}/{store}/files", {"file_id": ids[-1]})
            await ask.ended(ONE, f"{STORES}/{store}")
    return store, gone, kept


@pytest.mark.parametrize("how", ["the uploads", "the store", "the store and the uploads of its owner"])
async def test_nothing_is_left_of_what_was_deleted(tmp_path, small_pieces, how):
    path = tmp_path / "k.db"
    async with knowing(path) as ask:
        store, gone, kept = await filled(ask)
        assert SECRET in bytes_of(path) and KEPT in bytes_of(path)
        if how != "the uploads":
            assert (await ask(ONE, f"{STORES}/{store}", method="DELETE"))[0] == 200
        for file in gone if how != "the store and the uploads of its owner" else gone + kept:
            assert (await ask(ONE, f"/v1/files/{file}", method="DELETE"))[0] == 200
        assert await cleaned(ask, path, SECRET)
        if how == "the uploads":
            [(number, stale)] = await ask.rows("SELECT number, stale_words FROM knowledge_stores")
            assert stale == 0
            found = await ask.rows(
                f"SELECT rowid FROM {words_table(number)} WHERE {words_table(number)} MATCH ?", KEPT.decode()
            )
            passages = await ask.rows(
                "SELECT number FROM knowledge_passages WHERE text LIKE ?", f"%{KEPT.decode()}%"
            )
            assert {*found} & {*passages} and len(found) >= len(kept)
            _, results = await ask(
                ONE, f"{STORES}/{store}/search", {"query": KEPT.decode(), "max_num_results": 50}
            )
            assert {hit["file_id"] for hit in results["data"]} == {*kept}
        if how == "the store and the uploads of its owner":
            assert await cleaned(ask, path, KEPT)


async def test_a_file_that_is_taken_out_leaves_no_words_in_the_index(tmp_path, small_pieces):
    """Its upload, of which its owner has not spoken, stays."""
    path = tmp_path / "k.db"
    async with knowing(path) as ask:
        store, gone, kept = await filled(ask)
        for file in gone:
            await ask(ONE, f"{STORES}/{store}/files/{file}", method="DELETE")
        ask.ingest.wake.set()
        while (await ask.rows("SELECT MAX(stale_words) FROM knowledge_stores")) != [(0,)] or await ask.rows(
            "SELECT 1 FROM knowledge_files WHERE deleted = 1 LIMIT 1"
        ):
            await asyncio.sleep(0.01)
        [(number,)] = await ask.rows("SELECT number FROM knowledge_stores")
        blocks = await ask.rows(f"SELECT block FROM {words_table(number)}_data")
        assert not any(b"zyxo" in block for block, in blocks) and any(b"quav" in block for block, in blocks)


async def test_words_of_others_stay(tmp_path, small_pieces):
    path = tmp_path / "k.db"
    async with knowing(path) as ask:
        store, gone, _ = await filled(ask)
        other, _ = await ask.store(OTHER, *texts(2, "marmolat"))
        await ask(ONE, f"{STORES}/{store}", method="DELETE")
        for file in gone:
            await ask(ONE, f"/v1/files/{file}", method="DELETE")
        assert await cleaned(ask, path, SECRET)
        _, results = await ask(OTHER, f"{STORES}/{other}/search", {"query": "marmolat"})
        assert len(results["data"]) >= 2
