"""Large files and stores of one key cost another key nothing: work goes in parts, clients take turns, rows go with their files."""

import asyncio
import os
import threading

import pytest

from chatlm.common import folder_files
from chatlm.common.config import ApiKey, Settings
from chatlm.common.folder_files import Found, Gone, look, read, stamp_of
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.knowledge import following, ingest, passages, search
from chatlm.front.annexes.knowledge import stores as rows
from chatlm.front.store.store import Store
from embedding_pool import EmbeddingPool, knowing
from in_parts import done
from turns_of_others import StoreParts

A, B = "a" * 20, "b" * 20
KEYS = [ApiKey.hashed(name * 20, name) for name in "ab"]
STORES = "/v1/vector_stores"
LONG = "\n\n".join(f"# Part {number}\n\nIt has {number * 7} cats." for number in range(600))
MOST_WAITED = 3     # parts of others: of the other key, of the server itself


def by_key(key):
    return {"Authorization": f"Bearer {key}"}


def two_keys(tmp_path, pool=None):
    return knowing(tmp_path / "k.db", *KEYS, pool=pool, headers_of=by_key)


@pytest.fixture
def parts(monkeypatch):
    return StoreParts(monkeypatch)


async def test_a_small_file_does_not_wait_for_another_key_s_large_ones(tmp_path):
    """Two large ones have begun; it begins beside them, and each time that the embedder is asked is a turn."""
    pool = EmbeddingPool(gate=asyncio.Event())
    async with two_keys(tmp_path, pool) as ask:
        large = [await ask.file(A, LONG, f"{number}.md") for number in range(3)]
        _, theirs = await ask(A, STORES, {"file_ids": large})
        await pool.until_open(2)
        small = await ask.file(B, "Wombats dig.")
        _, mine = await ask(B, STORES, {"file_ids": [small]})
        while len(ask.ingest.tasks) < 3:
            await asyncio.sleep(0.01)  # until it is under way
        assert sorted(ask.ingest.working.values()) == [1, 2]        # the third large one waits
        pool.gate.set()
        await ask.ended(B, f"{STORES}/{mine['id']}")
        place = pool.texts.index("Wombats dig.")
        assert place <= 3 * 2 * ingest.TEXTS, place      # of the large files, at most what was asked already and one turn of each
        await ask.ended(A, f"{STORES}/{theirs['id']}")
        assert pool.texts.count("Wombats dig.") == 1 and len(pool.texts) > 3 * 600


async def test_what_is_written_of_a_file_is_searched_once_it_is_whole(tmp_path):
    """Neither its vectors nor its words are found before, and a server that dies meanwhile begins it again."""
    pool = EmbeddingPool(gate=asyncio.Event())
    async with two_keys(tmp_path, pool) as ask:
        store, _ = await ask.store(A)
        file = await ask.file(A, LONG)
        await ask(A, f"{STORES}/{store}/files", {"file_id": file})
        await pool.until_open(1)
        pool.gate.set()
        while not (written := (await ask.rows("SELECT written FROM knowledge_files"))[0][0]):
            await asyncio.sleep(0.001)  # until some of it is written
        pool.gate.clear()
        async with asyncio.timeout(20):
            await pool.until_open(1)
        [(written, passages, windows)] = await ask.rows(
            "SELECT written, (SELECT COUNT(*) FROM knowledge_passages), (SELECT COUNT(*) FROM knowledge_windows) FROM knowledge_files")
        assert 0 < written == passages <= windows < 600
        pool.gate.set()
        _, found = await ask(A, f"{STORES}/{store}/search", {"query": "cats"})
        is_whole = (await ask(A, f"{STORES}/{store}/files/{file}"))[1]["status"] == "completed"
        assert found["data"] == [] or is_whole
        await ask.ended(A, f"{STORES}/{store}")
        _, found = await ask(A, f"{STORES}/{store}/search", {"query": "Part 7"})
        assert found["passages"] == 600 and found["data"]


async def test_a_file_that_a_dead_server_has_begun_has_each_passage_once(tmp_path):
    async with two_keys(tmp_path) as ask:
        store, [file] = await ask.store(A, LONG)
        before = await ask.rows("SELECT COUNT(*), SUM(LENGTH(text)) FROM knowledge_passages")
        # as it was when the server died in the middle of it
        await ask.place.front.store.run(lambda connection: connection.execute(
            "UPDATE knowledge_files SET status = 'in_progress', written = 600"))
        ask.ingest.wake_up()
        await ask.ended(A, f"{STORES}/{store}")
        assert await ask.rows("SELECT COUNT(*), SUM(LENGTH(text)) FROM knowledge_passages") == before
        assert await ask.rows("SELECT written FROM knowledge_files") == [(0,)]
        _, found = await ask(A, f"{STORES}/{store}/search", {"query": "Part 77", "max_num_results": 50})
        texts = [each["content"][0]["text"] for each in found["data"]]
        assert len(texts) == len(set(texts)) > 1


async def test_a_batch_of_many_files_is_added_in_parts(tmp_path, parts):
    async with two_keys(tmp_path) as ask:
        _, store = await ask(A, STORES, {})
        _, own = await ask(B, STORES, {})
        files = [await ask.file(A, "Cats") for _ in range(200)]
        async with parts.beside(lambda: ask(B, f"{STORES}/{own['id']}")):
            status, batch = await ask(A, f"{STORES}/{store['id']}/file_batches", {"file_ids": files})
        assert status == 200 and batch["file_counts"]["total"] == 200
        assert parts.most_steps("a") <= 10 and parts.most_waited("b") <= MOST_WAITED
        await ask.ended(A, f"{STORES}/{store['id']}")
        async with parts.beside(lambda: ask(B, f"{STORES}/{own['id']}")):
            assert (await ask(A, f"{STORES}/{store['id']}", method="DELETE"))[0] == 200
            await ask.swept()
        assert max(part.steps for part in parts.parts) <= 20 and parts.most_waited("b") <= MOST_WAITED
        for table in "files", "batches", "batch_files", "passages", "windows":
            assert await ask.rows(f"SELECT COUNT(*) FROM knowledge_{table}") == [(0,)]


async def test_of_a_batch_all_files_are_added_or_none(tmp_path):
    async with two_keys(tmp_path) as ask:
        _, store = await ask(A, STORES, {})
        files = [await ask.file(A, "Cats") for _ in range(3)]
        for wrong in ("file-nowhere", await ask.file(B, "Dogs")):
            status, error = await ask(A, f"{STORES}/{store['id']}/file_batches", {"file_ids": [*files, wrong]})
            assert status == 404 and error["error"]["param"] == "file_ids[3]"
            assert (await ask(A, STORES, {"file_ids": [*files, wrong]}))[0] == 404
        assert (await ask(A, f"{STORES}/{store['id']}"))[1]["file_counts"]["total"] == 0
        assert len((await ask(A, STORES))[1]["data"]) == 1


async def test_a_batch_goes_with_the_last_of_its_files(tmp_path):
    async with two_keys(tmp_path) as ask:
        _, store = await ask(A, STORES, {})
        place = f"{STORES}/{store['id']}"
        files = [await ask.file(A, "Cats") for _ in range(2)]
        _, batch = await ask(A, f"{place}/file_batches", {"file_ids": files})
        await ask.ended(A, place)
        assert (await ask(A, f"{place}/files/{files[0]}", method="DELETE"))[0] == 200
        await ask.swept()
        assert (await ask(A, f"{place}/file_batches/{batch['id']}"))[1]["file_counts"]["total"] == 1
        assert (await ask(A, f"{place}/files/{files[1]}", method="DELETE"))[0] == 200
        await ask.swept()
        assert (await ask(A, f"{place}/file_batches/{batch['id']}"))[0] == 404
        assert await ask.rows("SELECT COUNT(*) FROM knowledge_batches") == [(0,)]


UNSEEN = "\u200b" * 4000     # zero-width spaces: no token of BERT's


def test_a_text_has_tokens_for_its_characters():
    """Whatever a tokenizer says: files of none were read whole by every chat that asked their store."""
    cut = [*passages.passages_of(UNSEEN, lambda text: 0, 256)]
    assert sum(passage.tokens for passage in cut) >= len(UNSEEN) // passages.TOKEN_CHARACTERS
    assert all(len(passage.text) <= passages.TOKEN_CHARACTERS * passages.PASSAGE_TOKENS for passage in cut)
    assert all(len(window) <= passages.TOKEN_CHARACTERS * passages.WINDOW_TOKENS for passage in cut for window in passage.windows)
    words = passages.windows_of_passage(UNSEEN, "", lambda text: 0, 256)
    assert all(len(window) <= passages.TOKEN_CHARACTERS * passages.WINDOW_TOKENS for window in words)


def test_a_text_of_headings_alone_is_refused():
    text = "# a\nb\n" * (passages.MOST_PIECES + 1)
    with pytest.raises(passages.TooManyPieces):
        [*passages.passages_of(text, len, 256)]
    with pytest.raises(ingest.Failed, match="50,000 sentences and headings"):
        ingest.cut(ingest.Text(text), EmbedderOfLetters(), passages.Strategy())


class EmbedderOfLetters:
    longest, special = 256, 2

    @staticmethod
    def count(text):
        return len(text)


async def test_a_chat_reads_no_whole_store_of_very_many_passages(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MOST_WHOLE", 5)
    async with two_keys(tmp_path) as ask:
        store, _ = await ask.store(A, "# A\n\nCats", "# B\n\nDogs")
        [(number,)] = await ask.rows("SELECT number FROM knowledge_stores")
        found = ask.place.front.rooms["knowledge"].search
        assert len(await found.whole([number], 1000, "a")) == 2
        monkeypatch.setattr(search, "MOST_WHOLE", 1)
        assert await found.whole([number], 1000, "a") is None


async def test_a_dear_filter_keeps_no_other_key_s_search(tmp_path, monkeypatch):
    """It has one thread, and gives that back."""
    monkeypatch.setattr(search, "CHECKED_FILES", 1)
    async with two_keys(tmp_path) as ask:
        theirs, _ = await ask.store(A, "Cats sleep.")
        mine, _ = await ask.store(B, "Dogs dig.")
        begun, gate = threading.Event(), threading.Event()
        plain = search.FileLists.of

        def held(self, connection, place):
            files = plain(self, connection, place)
            begun.set()
            gate.wait(30)
            return files
        monkeypatch.setattr(search.FileLists, "of", held)
        dear = {"query": "cats", "filters": {"type": "eq", "key": "x", "value": "y"}}
        waiting = [asyncio.ensure_future(ask(A, f"{STORES}/{theirs}/search", dear)) for _ in range(3)]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        _, found = await ask(B, f"{STORES}/{mine}/search", {"query": "dogs"})
        assert found["data"] and not any(task.done() for task in waiting)
        gate.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 3
        assert ask.place.front.rooms["knowledge"].search.readers.turns.free == 2


@pytest.mark.parametrize("filters", [{}, None])
async def test_no_filter_is_none(tmp_path, filters):
    async with two_keys(tmp_path) as ask:
        store, _ = await ask.store(A, "Cats sleep.")
        status, found = await ask(A, f"{STORES}/{store}/search", {"query": "cats", "filters": filters})
        assert status == 200 and len(found["data"]) == 1


# followed folders

def test_no_part_of_a_path_is_a_link(tmp_path):
    """A folder that becomes one, at whatever moment, shows nothing from outside."""
    docs, outside = tmp_path / "docs", tmp_path / "outside"
    for folder in docs / "a" / "b", outside / "b":
        folder.mkdir(parents=True)
    (docs / "a" / "b" / "c.txt").write_text("inside")
    (outside / "b" / "c.txt").write_text("secret")
    [found] = look(docs).found
    assert read(docs, found) == b"inside"
    # the same stamp, as if it had been looked at after the change
    secret = Found("a/b/c.txt", stamp_of((outside / "b" / "c.txt").stat()))
    (docs / "a").rename(docs / "was")
    (docs / "a").symlink_to(outside)
    for wanted in found, secret:
        with pytest.raises(Gone):
            read(docs, wanted)
    assert [each.path for each in look(docs).found if not each.reason] == ["was/b/c.txt"]
    (docs / "a").unlink()
    (docs / "a").mkdir()
    (docs / "a" / "b").symlink_to(outside / "b")
    with pytest.raises(Gone):
        read(docs, secret)
    (docs / "a" / "b").unlink()
    (docs / "a" / "b").mkdir()
    (docs / "a" / "b" / "c.txt").symlink_to(outside / "b" / "c.txt")
    with pytest.raises(Gone):
        read(docs, secret)


def test_a_folder_that_is_swapped_with_a_link_while_it_is_read(tmp_path):
    docs, outside = tmp_path / "docs", tmp_path / "outside"
    for folder, text in (docs / "a", "inside"), (docs / "b", "inside"), (outside, "secret"):
        folder.mkdir(parents=True)
        (folder / "c.txt").write_text(text)
    (docs / "link").symlink_to(outside)
    over = threading.Event()

    def swap():
        while not over.is_set():
            os.rename(docs / "a", docs / "x")
            os.rename(docs / "link", docs / "a")
            os.rename(docs / "a", docs / "link")
            os.rename(docs / "x", docs / "a")
    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        for _ in range(300):
            for found in look(docs).found:
                try:
                    seen |= {read(docs, found)} if not found.reason else set()
                except Gone:
                    pass
    finally:
        over.set()
        thread.join()
    assert seen == {b"inside"}


def test_what_may_be_in_unread_folders_stays(tmp_path):
    """Each path is looked at once, not beside each unread folder."""
    known = {f"folder{number}/deep/a.txt": following.Known("", "") for number in range(9000)}
    unread = [f"folder{number}" for number in range(0, 9000, 2)] + [f"other{number}" for number in range(6000)]
    seen = folder_files.Look([Found("folder1/deep/a.txt", "")], unread, "")
    gone = following.missing(known, seen)
    assert len(gone) == 4499 and "folder1/deep/a.txt" not in gone and "folder3/deep/a.txt" in gone


def test_of_very_many_folders_some_are_read(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "a.txt").write_text("x")
    monkeypatch.setattr(folder_files, "MOST_FOLDERS", 11)
    found = look(tmp_path)
    assert len(found.found) == 10 and "more than 11 folders" in found.problem
    monkeypatch.setattr(folder_files, "MOST_FOLDERS", 100)
    monkeypatch.setattr(folder_files, "DEEPEST", 2)
    (tmp_path / "00" / "1" / "2" / "3").mkdir(parents=True)
    found = look(tmp_path)
    assert len(found.found) == 30 and found.unread == ["00/1/2"] and "00/1/2" in found.problem


async def test_looks_rest_as_long_as_they_take(tmp_path):
    settings = Settings(database=str(tmp_path / "k.db"), knowledge=(f"manuals={tmp_path}",))
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        room = ask.place.front.rooms["knowledge"].following
        room.looking_s = 0.0
        await room.follow(room.followed[0])
        assert 0 < room.looking_s < 30 and room.rest_s >= following.LOOKS_S
        room.looking_s = 30.0
        assert room.rest_s == following.RESTS * 30.0


async def test_a_large_file_of_a_folder_comes_in_parts(tmp_path, parts):
    """And what a killed server had begun of one goes."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("Cats sleep. " * 300_000)
    settings = Settings(database=str(tmp_path / "k.db"), knowledge=(f"manuals={tmp_path / 'docs'}",))
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        await ask(A, f"{STORES}?limit=1")
        [store] = (await ask("", STORES))[1]["data"]
        while not await ask.rows("SELECT 1 FROM knowledge_folder_files"):
            await asyncio.sleep(0.01)  # until it was taken over
        assert len([part for part in parts.parts if part.work == "take"]) >= 4
        await ask.place.front.store.run(lambda connection: connection.execute(
            "INSERT INTO files (name, owner, filename, purpose, created, state) SELECT 'file-left', owner, 'x', 'assistants', 1, 0 FROM files LIMIT 1"))
        await ask.place.front.store.run(lambda connection: following.activate(connection, ["manuals"], 1) and None)
        assert await ask.rows("SELECT state FROM files WHERE name = 'file-left'") == [(2,)]


def test_the_next_turn_goes_round_stores_and_clients(tmp_path):
    """However many stores one of them has."""
    store = Store(tmp_path / "k.db", {annex.name: annex.tables() for annex in ANNEXES if annex.tables})
    store.open()
    connection = store.connection
    for client, count in ("a", 3), ("b", 1):
        for number in range(count):
            made = rows.create_store(connection, f"key {client}", client, {}, "", 1)
            connection.execute("INSERT INTO knowledge_files (store, file, filename, chunking, client, created) VALUES (?, 'f', 'f', '{}', ?, 1)", (made.number, client))
    assert rows.waiting_clients(connection, "") == ["a", "b"] and rows.waiting_clients(connection, "a") == ["b"]
    seen, last = [], 0
    for _ in range(5):
        last = done(rows.next_pending(connection, "a", last)).store
        seen.append(last)
    assert seen == [1, 2, 3, 1, 2]
    assert done(rows.next_pending(connection, "nobody", 0)) is None
    connection.execute("UPDATE knowledge_stores SET expired = 1 WHERE number = 2")
    connection.execute("UPDATE knowledge_stores SET deleted = 1 WHERE number = 4")
    assert [done(rows.next_pending(connection, "a", after)).store for after in (0, 1, 2, 3)] == [1, 3, 3, 1] and done(rows.next_pending(connection, "b", 0)) is None
    done(rows.expire(connection, 10**12))
    asyncio.run(store.close())


async def test_who_adds_a_file_pays_for_it(tmp_path):
    """Whoever of the same owner has made the store. The files of one who has used up its day do not keep the others' in that store waiting."""
    keys = [ApiKey.hashed(A, "a", owner="team"), ApiKey.hashed(B, "b", owner="team", tokens_per_day=21, refused=True)]
    async with knowing(tmp_path / "k.db", *keys, headers_of=by_key) as ask:
        async def used():
            return dict(await ask.rows("SELECT key, SUM(prompt_tokens) FROM usage GROUP BY key"))

        store, _ = await ask.store(A, "Cats purr.")
        assert await used() == {"a": 7}      # 7 for each window
        await ask(B, f"{STORES}/{store}/files", {"file_id": await ask.file(B, "Wombats dig.")})
        await ask.ended(A, f"{STORES}/{store}")
        assert await used() == {"a": 7, "b": 7}
        await ask(B, f"{STORES}/{store}/file_batches", {"file_ids": [await ask.file(B, "Newts swim.")]})
        await ask.ended(A, f"{STORES}/{store}")
        assert await used() == {"a": 7, "b": 14}
        late, mine = await ask.file(B, "Moles dig."), await ask.file(A, "Owls hoot.")
        for key, file in ((B, late), (A, mine)):
            assert (await ask(key, f"{STORES}/{store}/files", {"file_id": file}))[0] == 200
        assert (await ask.ended(A, f"{STORES}/{store}/files/{mine}"))["status"] == "completed"
        assert (await ask(A, f"{STORES}/{store}/files/{late}"))[1]["status"] != "completed"
        assert await used() == {"a": 14, "b": 14}
