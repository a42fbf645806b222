"""A store whose embedder is no longer served gets vectors of the one that is, beside those that it has."""

import asyncio

from chatlm.common.errors import EngineFailure
from chatlm.common.messages.requests import Embedder
from embedding_pool import SIZE, EmbeddingPool, knowing

ONE = "A" * 22
STORES = "/v1/vector_stores"
LONG = "\n\n".join(f"Paragraph {number} says that {number * 7} cats slept." for number in range(40))


def other_pool(longest=48, **more):
    """Another embedder, which reads fewer tokens at once."""
    pool = EmbeddingPool(longest, **more)
    card = pool.supervisor.card
    pool.supervisor.card = type(card)(facts=card.facts._replace(digest="another digest"), longest=longest)
    assert pool.tokenizer.spec.embedder == Embedder("mean", SIZE, longest)
    return pool


async def embedders(ask):
    """Digests of the embedders that windows have, and of that with which the store is searched."""
    rows = await ask.rows(
        "SELECT DISTINCT digest FROM knowledge_windows JOIN knowledge_embedders AS e ON e.number = embedder"
    )
    [(searched,)] = await ask.rows(
        "SELECT digest FROM knowledge_stores JOIN knowledge_embedders AS e ON e.number = embedder"
    )
    return {digest for digest, in rows}, searched


async def rebuilt(ask):
    while (await embedders(ask)) != ({"another digest"}, "another digest"):
        ask.ingest.wake.set()
        await asyncio.sleep(0.01)  # between two looks at the database


async def check_counts(ask):
    for number, windows, size in await ask.rows("SELECT number, windows, bytes FROM knowledge_files"):
        [(count,)] = await ask.rows("SELECT COUNT(*) FROM knowledge_windows WHERE file = ?", number)
        [(text,)] = await ask.rows(
            "SELECT SUM(LENGTH(text) + LENGTH(heading)) FROM knowledge_passages WHERE file = ?", number
        )
        assert count == windows and size == text + windows * (SIZE + 8)


async def test_its_windows_are_made_beside_and_swapped(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, files = await ask.store(ONE, LONG, "# Zoo\n\nCats eat fish.")
        [(before,)] = await ask.rows("SELECT SUM(windows) FROM knowledge_files")
    pool = other_pool()
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        await rebuilt(ask)
        await check_counts(ask)
        [(after,)] = await ask.rows("SELECT windows FROM knowledge_stores")
        assert after > before and all(len(text.encode()) <= 48 for text in pool.texts)
        _, found = await ask(
            ONE, f"{STORES}/{store}/search", {"query": "cats eat fish", "max_num_results": 1}
        )
        assert found["data"][0]["file_id"] == files[1]
        asked = len(pool.texts)
        for _ in range(3):
            await ask.ingest.rebuilding.step()
        assert len(pool.texts) == asked


async def test_a_file_that_comes_meanwhile_has_the_new_ones(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE, LONG)
    pool = other_pool()
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        file = await ask.file(ONE, "Dogs eat meat.")
        await ask(ONE, f"{STORES}/{store}/files", {"file_id": file})
        await ask.ended(ONE, f"{STORES}/{store}")
        await rebuilt(ask)
        await check_counts(ask)


async def test_a_file_that_is_deleted_meanwhile_gets_none(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, LONG)
    pool = other_pool(gate=asyncio.Event())
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        ask.ingest.wake.set()
        await pool.until_open(1)
        await ask(ONE, f"{STORES}/{store}/files/{file}", method="DELETE")
        pool.gate.set()
        while await ask.rows("SELECT 1 FROM knowledge_files LIMIT 1"):
            ask.ingest.wake.set()
            await asyncio.sleep(0.01)  # between two looks at the database
        assert await ask.rows("SELECT COUNT(*) FROM knowledge_windows") == [(0,)]


async def test_a_restart_in_the_middle_makes_none_twice(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        await ask.store(ONE, *(f"text {number} of cats" for number in range(6)))
    pool = other_pool()
    pool.failures = [EngineFailure("the worker died")]
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        while len(pool.texts) < 3:
            ask.ingest.wake.set()
            await asyncio.sleep(0)
    async with knowing(tmp_path / "k.db", pool=other_pool()) as ask:
        await rebuilt(ask)
        await check_counts(ask)


async def test_the_first_embedder_again_changes_nothing(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        await ask.store(ONE, LONG)
    async with knowing(tmp_path / "k.db", pool=EmbeddingPool()) as ask:
        assert not await ask.ingest.rebuilding.step()
        assert await embedders(ask) == ({"digest of the toy"}, "digest of the toy")
