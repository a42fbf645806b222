"""Files of vector stores are ingested in the background: whole, or failed with a reason."""

import asyncio
import io
import threading
import zipfile
from collections import namedtuple
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from chatlm.common.config import LIMITS, ApiKey, Settings
from chatlm.common.errors import EngineFailure, Overloaded
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.knowledge import ingest, stores
from chatlm.front.annexes.knowledge.tables import words_table
from chatlm.front.documents import texts
from chatlm.front.serve import database_of
from documents import docx, encodings, pdf
from embedding_pool import EmbeddingPool, knowing, vector_of
from fake_pool import FakePool

ONE, OTHER = "A" * 22, "b-_9" * 16
STORES = "/v1/vector_stores"
LONG = "\n\n".join(f"Paragraph {number} says that {number * 7} cats slept." for number in range(60))


async def failure(ask, data, name, client=ONE):
    """last_error of a file in a new store."""
    store, _ = await ask.store(client)
    file = await ask.file(client, data, name)
    await ask(client, f"{STORES}/{store}/files", {"file_id": file})
    await ask.ended(client, f"{STORES}/{store}/files/{file}")
    status, found = await ask(client, f"{STORES}/{store}/files/{file}")
    assert found["status"] == "failed" and found["usage_bytes"] == 0, found
    assert await parts_of(ask) == (0, 0, 0)
    return found["last_error"]


@asynccontextmanager
async def embedding(tmp_path):
    """(a server, its embedder, a file, its new store). The embedder has the file's first texts, and waits
    for its gate."""
    pool = EmbeddingPool(gate=asyncio.Event())
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        file = await ask.file(ONE, LONG)
        _, store = await ask(ONE, STORES, {"file_ids": [file]})
        await pool.until_open(1)
        yield ask, pool, file, store


async def parts_of(ask):
    """(passages, windows, files that are completed) in the database."""
    [row] = await ask.rows(
        "SELECT (SELECT COUNT(*) FROM knowledge_passages), (SELECT COUNT(*) FROM knowledge_windows), "
        "(SELECT COUNT(*) FROM knowledge_files WHERE status = 'completed')"
    )
    return row


async def check_whole(ask):
    """What each completed file says that it has, it has, and no other file has anything."""
    rows = await ask.rows("SELECT number, status, passages, windows FROM knowledge_files WHERE deleted = 0")
    for number, status, passages, windows in rows:
        [(found,)] = await ask.rows("SELECT COUNT(*) FROM knowledge_passages WHERE file = ?", number)
        [(vectors,)] = await ask.rows("SELECT COUNT(*) FROM knowledge_windows WHERE file = ?", number)
        assert (found, vectors) == (passages, windows)
        assert (found > 0) == (status == "completed")


async def test_a_file_has_passages_windows_and_words(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, LONG)
        await check_whole(ask)
        [(number, characters, tokens)] = await ask.rows(
            "SELECT store, characters, tokens FROM knowledge_files"
        )
        assert characters == len(LONG) and tokens > 1000
        passages = await ask.rows("SELECT number, place, start, text FROM knowledge_passages ORDER BY place")
        assert [row[1] for row in passages] == [*range(len(passages))] and len(passages) > 3
        assert all(LONG[start : start + len(text)] == text for _, _, start, text in passages)
        for passage, _, _, text in passages:
            windows = await ask.rows("SELECT vector, scale FROM knowledge_windows WHERE passage = ?", passage)
            assert windows
            for vector, scale in windows:
                length = sum((number - 256 * (number > 127)) ** 2 for number in vector) ** 0.5 * scale
                assert abs(length - 1) < 0.02
        found = await ask.rows(
            f"SELECT rowid FROM {words_table(number)} WHERE {words_table(number)} MATCH 'cats'"
        )
        assert {row[0] for row in found} == {row[0] for row in passages}


async def test_windows_are_embedded_with_their_heading_in_the_background(tmp_path):
    pool = EmbeddingPool()
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        await ask.store(ONE, "# Zoo\n\n## Cats\n\nThey eat fish.")
        assert "Zoo > Cats\n# Zoo\n\n## Cats\n\nThey eat fish." in pool.texts
        assert all(len(text.encode()) <= 64 for text in pool.texts)
        assert all(request.low_priority for request in pool.requests)
        [(vector, scale)] = await ask.rows(
            "SELECT vector, scale FROM knowledge_windows ORDER BY number DESC LIMIT 1"
        )
        expected = vector_of(pool.texts[-1])
        assert all(
            abs((byte - 256 * (byte > 127)) * scale - number) <= scale / 2 + 1e-6
            for byte, number in zip(vector, expected)
        )


async def test_pages_of_a_pdf_are_kept(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        file = await ask.file(
            ONE, pdf(["Cats eat fish.", "Dogs eat meat.", "", "Cows eat grass."]), "zoo.pdf"
        )
        await ask(ONE, f"{STORES}/{store}/files", {"file_id": file})
        found = await ask.ended(ONE, f"{STORES}/{store}/files/{file}")
        assert found["status"] == "completed" and "no text on page 3" in found["cut"]
        assert await ask.rows("SELECT page, text FROM knowledge_passages ORDER BY place") == [
            (1, "Cats eat fish."),
            (2, "Dogs eat meat."),
            (4, "Cows eat grass."),
        ]
        _, results = await ask(ONE, f"{STORES}/{store}/search", {"query": "grass"})
        assert (results["data"][0]["page"], results["data"][0]["content"][0]["text"]) == (
            4,
            "Cows eat grass.",
        )


@pytest.mark.parametrize(
    "data, name",
    [
        ("héllo wörld".encode("utf-16"), "a.txt"),
        ("héllo wörld".encode("utf-8-sig"), "a.txt"),
        (
            b"<html><body><p>h\xc3\xa9llo <b>w\xc3\xb6rld</b></p><script>bad()</script></body></html>",
            "a.html",
        ),
        ("héllo wörld".encode(), "noname"),
        ("héllo wörld".encode("cp1252"), "a.csv"),
        ("héllo wörld".encode("utf-16-le"), "a.txt"),
        ("héllo\r\nwörld".encode(), "a.md"),
    ],
)
async def test_texts_come_in_several_forms(tmp_path, data, name):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        file = await ask.file(ONE, data, name)
        await ask(ONE, f"{STORES}/{store}/files", {"file_id": file})
        assert (await ask.ended(ONE, f"{STORES}/{store}/files/{file}"))["status"] == "completed"
        _, content = await ask(ONE, f"{STORES}/{store}/files/{file}/content")
        text = " ".join(part["text"] for part in content["data"])
        assert "héllo" in text and "wörld" in text and "bad()" not in text


@pytest.mark.parametrize("case", encodings(), ids=lambda case: case["name"])
async def test_a_text_is_what_the_page_reads(tmp_path, case):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        file = await ask.file(ONE, bytes.fromhex(case["hex"]), "a.txt")
        await ask(ONE, f"{STORES}/{store}/files", {"file_id": file})
        found = await ask.ended(ONE, f"{STORES}/{store}/files/{file}")
        if case["text"] is None:
            assert found["last_error"]["code"] == "unsupported_file"
        else:
            _, content = await ask(ONE, f"{STORES}/{store}/files/{file}/content")
            assert "\n".join(part["text"] for part in content["data"]) == case["text"]


def bomb():
    """An archive of an Office document that unpacks to 300 MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", b" " * (300 << 20))
    return out.getvalue()


@pytest.mark.parametrize(
    "make, name, code, words",
    [
        (lambda: b"\0\1\2\3", "x.bin", "unsupported_file", "none of the formats"),
        (lambda: b"\xff\xfe\0", "x.txt", "unsupported_file", "UTF-8"),
        (lambda: b"%PDF-1.4 broken", "x.pdf", "invalid_file", "PDF"),
        (lambda: pdf([""]), "x.pdf", "invalid_file", "no text"),
        (lambda: docx("Hello")[:-40], "x.docx", "invalid_file", "damaged"),
        (lambda: b" \n\t\n ", "x.txt", "invalid_file", "no text"),
        (bomb, "x.docx", "invalid_file", "MiB"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_file_that_cannot_be_read_says_why(tmp_path, make, name, code, words):
    async with knowing(tmp_path / "k.db") as ask:
        error = await failure(ask, make(), name)
        assert error["code"] == code and words in error["message"], error


async def test_a_long_text_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LIMITS", replace(LIMITS, extracted_characters=1000))
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, LONG)
        _, found = await ask(ONE, f"{STORES}/{store}/files/{file}")
        assert found["cut"] == f"only the first 1,000 of {len(LONG):,} characters"


async def test_a_store_has_so_many_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MOST_WINDOWS", 3)
    async with knowing(tmp_path / "k.db") as ask:
        store, [one, long] = await ask.store(ONE, "Cats", LONG)
        _, found = await ask(ONE, f"{STORES}/{store}/files/{long}")
        assert found["status"] == "failed" and "windows" in found["last_error"]["message"]
        assert (await ask(ONE, f"{STORES}/{store}/files/{one}"))[1]["status"] == "completed"
        await check_whole(ask)


async def test_a_full_owner_fails_with_a_reason(tmp_path, monkeypatch):
    async with embedding(tmp_path) as (ask, pool, file, store):
        monkeypatch.setattr("chatlm.front.store.quota.LIMITS", replace(LIMITS, kept_bytes=5000))
        pool.gate.set()
        await ask.ended(ONE, f"{STORES}/{store['id']}")
        _, found = await ask(ONE, f"{STORES}/{store['id']}/files/{file}")
        assert found["status"] == "failed" and "5,000 bytes" in found["last_error"]["message"]
        assert await parts_of(ask) == (0, 0, 0)


async def test_an_embedder_that_dies_is_asked_again(tmp_path):
    pool = EmbeddingPool()
    pool.failures = [EngineFailure("the worker died")] * 2
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        store, [file] = await ask.store(ONE, LONG)
        assert (await ask(ONE, f"{STORES}/{store}/files/{file}"))[1]["status"] == "completed"
        await check_whole(ask)


async def test_an_embedder_that_keeps_dying_fails_the_file(tmp_path):
    pool = EmbeddingPool()
    pool.failures = [EngineFailure("the worker died")] * 3
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        store, [file] = await ask.store(ONE, LONG)
        _, found = await ask(ONE, f"{STORES}/{store}/files/{file}")
        assert found["status"] == "failed" and found["last_error"]["code"] == "server_error"
        assert "died" in found["last_error"]["message"]
        _, again = await ask(ONE, f"{STORES}/{store}/files", {"file_id": file})  # a new try
        assert again["status"] == "in_progress"
        assert (await ask.ended(ONE, f"{STORES}/{store}/files/{file}"))["status"] == "completed"
        await ask.swept()
        await check_whole(ask)


async def test_a_busy_embedder_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "PAUSE_S", 0.01)
    pool = EmbeddingPool()
    pool.failures = [Overloaded("busy", retry_after_s=0)] * 7
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        store, [file] = await ask.store(ONE, LONG)
        assert (await ask(ONE, f"{STORES}/{store}/files/{file}"))[1]["status"] == "completed"
        assert await ask.rows("SELECT tries FROM knowledge_files") == [(0,)]


async def test_an_unexpected_error_fails_one_file(tmp_path, monkeypatch):
    cut = ingest.cut
    monkeypatch.setattr(ingest, "cut", lambda text, *more: 1 / 0 if "boom" in text.text else cut(text, *more))
    async with knowing(tmp_path / "k.db") as ask:
        store, [bad, good] = await ask.store(ONE, "boom", "Cats")
        _, found = await ask(ONE, f"{STORES}/{store}/files/{bad}")
        assert found["last_error"] == {
            "code": "server_error",
            "message": "the server had an error while it read this file",
        }
        assert (await ask(ONE, f"{STORES}/{store}/files/{good}"))[1]["status"] == "completed"


@pytest.mark.parametrize("what", ["from the store", "the upload", "the store"])
async def test_a_file_that_is_deleted_while_it_is_ingested_leaves_nothing(tmp_path, what):
    async with embedding(tmp_path) as (ask, pool, file, store):
        one = f"{STORES}/{store['id']}"
        path = {"from the store": f"{one}/files/{file}", "the upload": f"/v1/files/{file}", "the store": one}[
            what
        ]
        assert (await ask(ONE, path, method="DELETE"))[0] == 200
        assert (await ask(ONE, f"{one}/files/{file}"))[0] == 404
        pool.gate.set()
        await pool.until_open(0)
        while ask.ingest.tasks:
            await asyncio.sleep(0.01)
        await ask.swept()
        assert await parts_of(ask) == (0, 0, 0)
        assert await ask.rows("SELECT COUNT(*) FROM knowledge_files") == [(0,)]


async def test_a_deleted_upload_leaves_all_stores(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        one, [file] = await ask.store(ONE, "Cats eat fish.")
        other, _ = await ask.store(ONE)
        await ask(ONE, f"{STORES}/{other}/files", {"file_id": file})
        await ask.ended(ONE, f"{STORES}/{other}")
        assert (await ask(ONE, f"/v1/files/{file}", method="DELETE"))[0] == 200
        for store in one, other:
            assert (await ask(ONE, f"{STORES}/{store}"))[1]["file_counts"]["total"] == 0
            assert (await ask(ONE, f"{STORES}/{store}/search", {"query": "fish"}))[1]["data"] == []


async def test_a_file_that_is_taken_out_stays_an_upload(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, "Cats eat fish.")
        status, gone = await ask(ONE, f"{STORES}/{store}/files/{file}", method="DELETE")
        assert (status, gone) == (200, {"id": file, "object": "vector_store.file.deleted", "deleted": True})
        assert (await ask(ONE, f"/v1/files/{file}"))[0] == 200
        assert (await ask(ONE, f"{STORES}/{store}/search", {"query": "fish"}))[1]["data"] == []
        await ask.swept()
        assert await parts_of(ask) == (0, 0, 0)


async def test_owners_take_turns(tmp_path):
    """One with many files does not hold up another."""
    pool = EmbeddingPool(gate=asyncio.Event())
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        many = [await ask.file(ONE, f"mine {number}") for number in range(8)]
        one = await ask.file(OTHER, "theirs")
        await ask(ONE, STORES, {"file_ids": many})
        await pool.until_open(2)
        await ask(OTHER, STORES, {"file_ids": [one]})
        pool.gate.set()
        while ask.ingest.tasks or await ask.rows(
            "SELECT 1 FROM knowledge_files WHERE status = 'in_progress' LIMIT 1"
        ):
            await asyncio.sleep(0.01)
        assert pool.texts.index("theirs") <= 3


async def test_ingestion_goes_on_after_a_restart(tmp_path):
    """A stop is no crash."""
    async with embedding(tmp_path) as (_, _, _, store):
        pass
    async with knowing(tmp_path / "k.db") as ask:
        assert (await ask.ended(ONE, f"{STORES}/{store['id']}"))["file_counts"]["completed"] == 1
        assert await ask.rows("SELECT tries FROM knowledge_files") == [(0,)]
        await check_whole(ask)


async def test_a_file_with_which_the_server_crashes_is_given_up(tmp_path):
    async with embedding(tmp_path) as (_, _, file, store):
        pass
    settings = Settings(database=str(tmp_path / "k.db"))
    database = await database_of(settings, ANNEXES)
    await database.run(
        lambda connection: connection.execute("UPDATE knowledge_files SET tries = ?", (ingest.CRASHES,))
    )
    await database.close()
    async with knowing(tmp_path / "k.db") as ask:
        await ask.ended(ONE, f"{STORES}/{store['id']}")
        _, found = await ask(ONE, f"{STORES}/{store['id']}/files/{file}")
        assert found["status"] == "failed" and "5 times" in found["last_error"]["message"]
        assert "add it to the vector store again" in found["last_error"]["message"]
        await ask(ONE, f"{STORES}/{store['id']}/files", {"file_id": file})
        assert (await ask.ended(ONE, f"{STORES}/{store['id']}"))["file_counts"]["completed"] == 1


async def test_a_death_counts_against_the_file_that_is_read_alone(tmp_path, monkeypatch):
    """Not against one that is being embedded, nor against one that waits for its turn to be read."""
    begun, gate = threading.Event(), threading.Event()
    cut = ingest.cut

    def hold(text, *more):
        if "boom" in text.text:
            begun.set()
            gate.wait(20)
        return cut(text, *more)
    monkeypatch.setattr(ingest, "cut", hold)
    pool = EmbeddingPool(gate=asyncio.Event())
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        files = [await ask.file(ONE, text) for text in ("Cats sleep.", "boom", "Dogs bark.")]
        await ask(ONE, STORES, {"file_ids": files})
        await pool.until_open(1)
        await asyncio.to_thread(begun.wait, 20)
        assert await ask.rows("SELECT tries FROM knowledge_files ORDER BY number") == [(0,), (1,), (0,)]
        gate.set()
        pool.gate.set()
        while await ask.rows("SELECT 1 FROM knowledge_files WHERE status = 'in_progress'"):
            await asyncio.sleep(0.01)  # between two looks
        assert await ask.rows("SELECT tries, status FROM knowledge_files") == [(0, "completed")] * 3


async def test_files_without_an_embedder_fail_with_a_reason_and_are_read_once_there_is_one(tmp_path):
    async with embedding(tmp_path) as (_, _, file, store):
        pass
    path = f"{STORES}/{store['id']}"
    async with knowing(tmp_path / "k.db", pool=FakePool()) as ask:
        assert (await ask.ended(ONE, path))["file_counts"]["failed"] == 1
        _, found = await ask(ONE, f"{path}/files/{file}")
        assert found["last_error"]["code"] == "server_error"
        assert "start it with --embedder. The file is read as soon as" in found["last_error"]["message"]
    async with knowing(tmp_path / "k.db") as ask:
        while (await ask(ONE, path))[1]["file_counts"]["completed"] == 0:
            await asyncio.sleep(0.01)  # between two questions
        assert (await ask(ONE, f"{path}/files/{file}"))[1]["last_error"] is None
        await check_whole(ask)


async def test_metrics_show_files_bytes_and_searches(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, files = await ask.store(ONE, LONG, "Cats sleep.")
        await ask(ONE, f"{STORES}/{store}/search", {"query": "cats"})
        [(size,)] = await ask.rows("SELECT SUM(bytes) FROM knowledge_files")

        async def shown():
            ask.ingest.totals = await ask.place.front.store.run(stores.totals)
            return (await ask.place.get("/metrics"))[1]
        text = await shown()
        assert 'chat_server_ingest_files{status="completed"} 2.0' in text
        assert f"chat_server_store_bytes {float(size)}" in text
        assert "chat_server_search_seconds_count 1.0" in text
        await ask.place.client.delete(f"{ask.place.url}{STORES}/{store}/files/{files[1]}",
                                      headers=ask.headers_of(ONE))
        assert 'chat_server_ingest_files{status="completed"} 1.0' in await shown()
        await ask.place.client.delete(f"{ask.place.url}{STORES}/{store}", headers=ask.headers_of(ONE))
        await ask.swept()
        assert "chat_server_store_bytes 0.0" in await shown()


async def test_files_of_a_key_that_is_gone_wait_for_it(tmp_path):
    key = ApiKey.hashed("k1", "one")
    headers = {"one": {"Authorization": "Bearer k1"}}.get
    pool = EmbeddingPool(gate=asyncio.Event())
    async with knowing(tmp_path / "k.db", key, pool=pool, headers_of=headers) as ask:
        file = await ask.file("one", LONG)
        _, store = await ask("one", STORES, {"file_ids": [file]})
        await pool.until_open(1)
    pool = EmbeddingPool()
    async with knowing(tmp_path / "k.db", ApiKey.hashed("k2", "two"), pool=pool, headers_of=headers) as ask:
        await ask.ingest._begin_files()
        assert not ask.ingest.tasks and not pool.texts
    async with knowing(tmp_path / "k.db", key, headers_of=headers) as ask:
        assert (await ask.ended("one", f"{STORES}/{store['id']}"))["status"] == "completed"


async def test_what_is_embedded_is_charged_to_the_key_once(tmp_path):
    key = ApiKey.hashed("k1", "one")
    async with knowing(tmp_path / "k.db", key, headers_of={"one": {"Authorization": "Bearer k1"}}.get) as ask:
        await ask.store("one", LONG)
        [(name, background, requests, tokens)] = await ask.rows(
            "SELECT key, background, requests, prompt_tokens FROM usage"
        )
        [(windows,)] = await ask.rows("SELECT COUNT(*) FROM knowledge_windows")
        assert (name, background, tokens) == ("one", 1, 7 * windows) and requests == -(
            -windows // ingest.TEXTS
        )
        counted = ask.ingest.ledger.totals[True]        # for /metrics
        assert (counted.requests, counted.prompt_tokens) == (requests, tokens)


async def test_a_file_that_is_deleted_while_it_is_embedded_costs_nothing(tmp_path):
    async with embedding(tmp_path) as (ask, pool, _, store):
        await ask.place.client.delete(f"{ask.place.url}{STORES}/{store['id']}", headers=ask.headers_of(ONE))
        pool.gate.set()
        while ask.ingest.tasks:
            await asyncio.wait([*ask.ingest.tasks.values()], timeout=30)
        assert ask.ingest.ledger.totals[True].requests == 0
        assert await ask.rows("SELECT * FROM usage") == []


async def test_on_a_full_disk_ingestion_waits(tmp_path, monkeypatch):
    """Nothing of the file is there until then, deleting works, and then it is there whole."""
    pool = EmbeddingPool(gate=asyncio.Event())
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        file = await ask.file(ONE, LONG)
        spare = await ask.file(ONE, "spare")
        _, store = await ask(ONE, STORES, {"file_ids": [file]})
        await pool.until_open(1)
        free = namedtuple("free", "free")
        monkeypatch.setattr("chatlm.front.store.store.disk_usage", lambda path: free(1 << 20))
        waited = asyncio.Event()

        async def pause(seconds, sleep=asyncio.sleep):
            waited.set()
            await sleep(0)

        monkeypatch.setattr(ingest.asyncio, "sleep", pause)
        pool.gate.set()
        await waited.wait()
        assert await parts_of(ask) == (0, 0, 0)
        status, answer = await ask(ONE, f"{STORES}/{store['id']}/files", {"file_id": spare})
        assert status == 503 and "full" in answer["error"]["message"]
        assert (await ask(ONE, f"/v1/files/{spare}", method="DELETE"))[0] == 200
        monkeypatch.undo()
        await ask.ended(ONE, f"{STORES}/{store['id']}")
        await check_whole(ask)
        assert (await parts_of(ask))[2] == 1


async def test_cutting_a_large_text_leaves_the_loop_free(tmp_path, monkeypatch):
    """It happens in a thread, as decoding does."""
    threads = set()
    for name in "cut", "plain_text":
        plain = getattr(ingest, name)
        monkeypatch.setattr(
            ingest, name, lambda *a, plain=plain: (threads.add(threading.current_thread()), plain(*a))[1]
        )
    async with knowing(tmp_path / "k.db") as ask:
        await ask.store(ONE, LONG)
        assert threads and threading.main_thread() not in threads


async def test_static_chunks_have_so_many_tokens_and_overlap(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        strategy = {"type": "static", "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 100}}
        store, [file] = await ask.store(ONE, LONG, chunking_strategy=strategy)
        _, found = await ask(ONE, f"{STORES}/{store}/files/{file}")
        assert found["chunking_strategy"] == strategy
        places = await ask.rows("SELECT start, LENGTH(text) FROM knowledge_passages ORDER BY place")
        assert all(
            length <= 220 for _, length in places
        )  # a byte is a token; spaces between sentences are none
        assert all(later < start + length for (start, length), (later, _) in zip(places, places[1:]))
        await check_whole(ask)


async def test_without_fts5_there_are_vectors_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "make_words", lambda connection, store: False)
    async with knowing(tmp_path / "k.db") as ask:
        store, [file, _] = await ask.store(ONE, "Cats eat fish.", "Dogs eat meat.")
        assert await ask.rows("SELECT name FROM sqlite_schema WHERE name LIKE 'knowledge_words%'") == []
        await ask(ONE, f"{STORES}/{store}/files/{file}", method="DELETE")
        await ask.swept()
        await check_whole(ask)


async def test_content_comes_in_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("chatlm.front.annexes.knowledge.routes.PAGE_BYTES", 1000)
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, LONG)
        texts, page, path = [], "0", f"{STORES}/{store}/files/{file}/content"
        while page is not None:
            _, content = await ask(ONE, f"{path}?page={page}")
            texts += [part["text"] for part in content["data"]]
            page = content["next_page"]
            assert content["has_more"] == (page is not None)
        assert texts == [
            row[0] for row in await ask.rows("SELECT text FROM knowledge_passages ORDER BY place")
        ]
        assert (await ask(ONE, f"{path}?page=x"))[0] == 400
