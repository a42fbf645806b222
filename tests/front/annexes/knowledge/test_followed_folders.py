"""A vector store of --knowledge has the files of a folder: all that come, change and go, and why some are not
read. Clients search it and change nothing."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from chatlm.common.config import LIMITS, ApiKey, Settings
from chatlm.common.errors import ConfigError
from chatlm.front.annexes.knowledge import following
from command_line import parse_command_line
from embedding_pool import knowing

ONE, OTHER = "A" * 22, "b-_9" * 16
STORES = "/v1/vector_stores"


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    """Only the tests look at the folders, after the look at the start."""
    monkeypatch.setattr(following, "LOOKS_S", 1e6)


def followed(tmp_path, **more):
    """Settings of a server that follows tmp_path/docs, and whether that is there."""
    (tmp_path / "docs").mkdir(exist_ok=True)
    return Settings(database=str(tmp_path / "k.db"), knowledge=(f"manuals={tmp_path / 'docs'}",), **more)


async def files_of(ask, client=ONE):
    """(id of the store, its files by name) after a look, once all of them have ended."""
    room = ask.place.front.rooms["knowledge"].following
    for each in room.followed:
        async with room.lock:
            await room.follow(each)
    status, body = await ask(client, STORES)
    [store] = [store for store in body["data"] if store["name"] == "manuals"]
    await ask.ended(client, f"{STORES}/{store['id']}")
    status, body = await ask(client, f"{STORES}/{store['id']}/files?limit=100")
    return store["id"], {file["filename"]: file for file in body["data"]}


async def texts_of(ask, store, file):
    status, body = await ask(ONE, f"{STORES}/{store}/files/{file['id']}/content")
    assert status == 200, body
    return [part["text"] for part in body["data"]]


async def test_files_that_come_change_and_go_are_taken_over(tmp_path):
    settings = followed(tmp_path)
    docs = tmp_path / "docs"
    (docs / "a.txt").write_text("The pump has three valves.")
    (docs / "deep" / "er").mkdir(parents=True)
    (docs / "deep" / "er" / "b.md").write_text("# Cats\n\nThey sleep.")
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        store, files = await files_of(ask)
        assert {name: file["status"] for name, file in files.items()} == {
            "a.txt": "completed", "deep/er/b.md": "completed"}
        status, found = await ask(ONE, f"{STORES}/{store}/search", {"query": "pump valves"})
        assert status == 200 and found["data"][0]["filename"] == "a.txt"
        first = files
        times = os.stat(docs / "a.txt")
        (docs / "a.txt").write_text("The pump has seven valve.")  # as long, and with the same time
        os.utime(docs / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.utime(docs / "deep" / "er" / "b.md")  # another time, the same content
        store, files = await files_of(ask)
        assert await texts_of(ask, store, files["a.txt"]) == ["The pump has seven valve."]
        assert files["deep/er/b.md"] == first["deep/er/b.md"] and files["a.txt"] != first["a.txt"]
        shutil.rmtree(docs / "deep")
        store, files = await files_of(ask)
        assert [*files] == ["a.txt"]
        await ask.swept()
        assert await ask.rows("SELECT COUNT(*) FROM knowledge_passages") == [(1,)]


async def test_what_changed_while_no_server_ran_is_taken_over_and_nothing_else(tmp_path):
    settings = followed(tmp_path)
    docs = tmp_path / "docs"
    for name in "abc":
        (docs / f"{name}.txt").write_text(f"The letter {name}.")
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        store, before = await files_of(ask)
    (docs / "b.txt").write_text("Another letter.")
    (docs / "c.txt").unlink()
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        same, after = await files_of(ask)
        assert same == store and {*after} == {"a.txt", "b.txt"}
        assert after["a.txt"] == before["a.txt"] and after["b.txt"]["id"] != before["b.txt"]["id"]


async def test_what_is_not_read_says_why(tmp_path, monkeypatch):
    settings = followed(tmp_path)
    docs = tmp_path / "docs"
    (tmp_path / "secret.txt").write_text("Nobody may read this secret.")
    (docs / "out.txt").symlink_to(tmp_path / "secret.txt")
    (docs / "up").symlink_to(tmp_path)
    (docs / ".git").mkdir()
    (docs / ".git" / "config").write_text("hidden")
    (docs / ".env").write_text("PASSWORD=hidden")
    os.mkfifo(docs / "pipe")
    (docs / "foreign.bin").write_bytes(bytes(range(256)))
    (docs / "huge.txt").write_text("x" * 2001)
    (docs / "empty.txt").write_text("")
    with open(os.fsencode(docs) + b"/\xff.txt", "w") as file:
        file.write("x")
    (docs / "good.txt").write_text("This one is read.")
    monkeypatch.setattr("chatlm.common.folder_files.LIMITS", replace(LIMITS, document_bytes=2000))
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        _, files = await files_of(ask)
        assert [name for name, file in files.items() if file["status"] == "completed"] == ["good.txt"]
        why = {name: file["last_error"]["message"] for name, file in files.items() if file["last_error"]}
        assert {*why} == {"out.txt", "up", ".git", ".env", "pipe", "foreign.bin", "huge.txt", "empty.txt",
                          "\\udcff.txt"}
        for name, word in {"out.txt": "link", "up": "link", ".git": "hidden", ".env": "hidden",
                           "pipe": "regular", "huge.txt": "2,001 bytes", "empty.txt": "empty",
                           "\\udcff.txt": "UTF-8", "foreign.bin": "of none of the formats"}.items():
            assert word in why[name], (name, why)
        kept = await ask.rows("SELECT 1 FROM lines WHERE instr(text, 'secret') OR instr(text, 'hidden')")
        assert kept == []
        again = await files_of(ask)
        assert again[1] == files
        (docs / "out.txt").unlink()
        (docs / "out.txt").write_text("A file of its own now.")
        assert (await files_of(ask))[1]["out.txt"]["status"] == "completed"


async def test_a_folder_that_vanishes_changes_nothing_and_says_so(tmp_path):
    settings = followed(tmp_path)
    docs = tmp_path / "docs"
    (docs / "a.txt").write_text("The pump has three valves.")
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        store, before = await files_of(ask)
        docs.rename(tmp_path / "away")
        for problem in "cannot be read", "is empty":
            assert (await files_of(ask))[1] == before
            status, body = await ask(ONE, f"{STORES}/{store}")
            assert problem in body["problem"]
            docs.mkdir(exist_ok=True)
        docs.rmdir()
        (tmp_path / "away").rename(docs)
        assert (await files_of(ask))[1] == before
        assert (await ask(ONE, f"{STORES}/{store}"))[1]["problem"] is None


@pytest.mark.parametrize("with_keys", [False, True])
async def test_all_clients_read_it_and_none_changes_it(tmp_path, with_keys):
    keys = (ApiKey.hashed("k1", "one"), ApiKey.hashed("k2", "two"))
    settings = followed(tmp_path, keys=keys if with_keys else ())
    (tmp_path / "docs" / "a.txt").write_text("The pump has three valves.")
    more = {"headers_of": lambda key: {"Authorization": f"Bearer {key}"}} if with_keys else {}
    one, other = ("k1", "k2") if with_keys else (ONE, OTHER)
    async with knowing(tmp_path / "k.db", settings=settings, **more) as ask:
        own, [own_file] = await ask.store(one, "My own text.")
        store, files = await files_of(ask, one)
        for client, ids in (one, [store, own]), (other, [store]):
            status, body = await ask(client, f"{STORES}?order=asc")
            assert [row["id"] for row in body["data"]] == ids
            assert body["data"][0]["read_only"] is True
            status, body = await ask(client, f"{STORES}?order=asc&limit=1&after={store}")
            assert [row["id"] for row in body["data"]] == ids[1:]
            status, found = await ask(client, f"{STORES}/{store}/search", {"query": "pump"})
            assert status == 200 and found["data"]
        file = files["a.txt"]["id"]
        path = f"{STORES}/{store}"
        for method, where, body in (
            ("POST", path, {"name": "mine"}), ("DELETE", path, None),
            ("POST", f"{path}/files", {"file_id": own_file}), ("DELETE", f"{path}/files/{file}", None),
            ("POST", f"{path}/files/{file}", {"attributes": {}}),
            ("POST", f"{path}/file_batches", {"file_ids": [own_file]}),
        ):
            status, answer = await ask(one, where, body, method=method)
            assert status == 403 and answer["error"]["code"] == "read_only", (method, where, answer)
            assert "--knowledge" in answer["error"]["message"]
        assert (await ask(one, f"/v1/files/{file}", method="DELETE"))[0] == 404
        assert await files_of(ask, one) == (store, files)
    settings = replace(settings, knowledge=())
    async with knowing(tmp_path / "k.db", settings=settings, **more) as ask:  # it is not followed any more
        assert (await ask(other, STORES))[1]["data"] == []
        assert (await ask(other, f"{STORES}/{store}"))[0] == 404


@pytest.mark.parametrize("words, message", [
    (["--database=k.db", "--knowledge=a=/nowhere/at/all"], "cannot be read: No such file"),
    (["--database=k.db", "--knowledge=a=."] * 2, "given twice"),
    (["--knowledge=a=."], "--database"),
    (["--database=k.db", "--knowledge=a=/etc/passwd"], "Not a directory"),
])
def test_folders_that_cannot_be_followed_are_errors_at_the_start(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_command_line(["serve", "gpt2", *words], {})


async def test_a_file_that_was_given_up_is_read_again_when_it_is_touched(tmp_path):
    settings = followed(tmp_path)
    (tmp_path / "docs" / "a.txt").write_text("The pump has three valves.")
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        store, files = await files_of(ask)
        await ask.place.front.store.run(lambda connection: connection.execute(
            "UPDATE knowledge_files SET status = 'in_progress', tries = 5"))
        ask.place.front.rooms["knowledge"].wake_up()
        _, files = await files_of(ask)
        assert files["a.txt"]["status"] == "failed"
        assert "change it in its folder, or touch it" in files["a.txt"]["last_error"]["message"]
        os.utime(tmp_path / "docs" / "a.txt", (1, 1))
        _, files = await files_of(ask)
        assert files["a.txt"]["status"] == "completed" and files["a.txt"]["last_error"] is None


async def test_a_file_system_that_hangs_holds_neither_other_folders_nor_the_end(tmp_path, monkeypatch):
    settings = followed(tmp_path)
    (tmp_path / "docs" / "a.txt").write_text("The pump has three valves.")
    look = following.look
    gate = threading.Event()
    async with knowing(tmp_path / "k.db", settings=settings) as ask:
        store, files = await files_of(ask)
        room = ask.place.front.rooms["knowledge"].following
        monkeypatch.setattr(following, "look", lambda folder: gate.wait(60) and look(folder))
        monkeypatch.setattr(following, "PATIENCE_S", 0.01)
        for _ in range(2):                # the second does not ask again
            with pytest.raises(following.Hangs):
                await room.follow(room.followed[0])
        [thread] = [thread for thread in threading.enumerate() if thread.name == "folder manuals"]
        assert thread.daemon and len(room.hung) == 1
        gate.set()
        await asyncio.wait([*room.hung.values()])
        monkeypatch.setattr(following, "PATIENCE_S", 60.0)
        assert (await files_of(ask))[1]["a.txt"]["status"] == "completed" and not room.hung
        gate.clear()
        monkeypatch.setattr(following, "PATIENCE_S", 0.01)
        monkeypatch.setattr(following, "LOOKS_S", 0.01)
        await room.close()
        room.task = asyncio.create_task(room.run())
        while "does not answer" not in str((await ask(ONE, f"{STORES}/{store}"))[1]["problem"]):
            await asyncio.sleep(0.01)     # between two questions to the server
    gate.set()


HUNG = """
import asyncio, threading
from chatlm.front.aio import in_own_thread

async def main():
    await asyncio.wait([in_own_thread("folder", threading.Event().wait)], timeout=0.01)

asyncio.run(main())
print("ended")
"""


def test_a_program_ends_though_a_file_system_hangs():
    done = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\n" and not done.stderr
