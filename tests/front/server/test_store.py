"""The database of --database: what it commits, what it refuses, and who can read it."""

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError, Overloaded
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.batches.file_routes import FileRoutes, Upload
from chatlm.front.intake.opened_body import Caller
from chatlm.front.store import batches, file_rows
from chatlm.front.store import store as stores
from chatlm.front.store.schema import STEPS
from chatlm.front.store.store import NO_TABLES, Store, open_store
from powerless import powerless

ROOT = Path(__file__).resolve().parents[3]
INSERT = "INSERT INTO files (name, owner, filename, purpose, created) VALUES (?, '', 'x', 'batch', 0)"


def opened(path, tables=NO_TABLES):
    store = Store(path, tables)
    store.open()
    return store


def add(name):
    return lambda connection: connection.execute(INSERT, (name,)).lastrowid


def names(path):
    with closing(sqlite3.connect(path)) as reader:
        return [name for (name,) in reader.execute("SELECT name FROM files ORDER BY id")]


async def test_what_run_returned_other_programs_see(tmp_path):
    store = opened(tmp_path / "a.db")
    assert await asyncio.gather(*(store.run(add(f"n{index}")) for index in range(20))) == [*range(1, 21)]
    assert names(tmp_path / "a.db") == [f"n{index}" for index in range(20)]
    await store.close()
    with pytest.raises(Overloaded, match="stopping"):
        await store.run(add("late"))


async def test_failed_work_leaves_nothing(tmp_path):
    """Its neighbours are committed."""
    store = opened(tmp_path / "a.db")

    def broken(connection):
        connection.execute(INSERT, ("half",))
        raise LookupError("no")
    found = await asyncio.gather(store.run(add("one")), store.run(broken), store.run(add("two")), store.run(add("one")), return_exceptions=True)
    assert isinstance(found[1], LookupError) and isinstance(found[3], sqlite3.IntegrityError)
    assert names(tmp_path / "a.db") == ["one", "two"]
    await store.close()


async def test_a_broken_transaction_is_done_in_pieces(tmp_path, caplog):
    """One that breaks as a whole is done again piece by piece."""
    store = opened(tmp_path / "a.db")

    def ends_the_transaction(connection):
        connection.execute("ROLLBACK")
        raise sqlite3.OperationalError("database or disk is full")
    found = await asyncio.gather(store.run(add("one")), store.run(ends_the_transaction), store.run(add("two")), return_exceptions=True)
    assert isinstance(found[1], Overloaded) and "its log says why" in str(found[1]) and "disk is full" in caplog.text
    assert names(tmp_path / "a.db") == ["one", "two"]
    await store.close()


async def test_a_full_database_is_an_overload(tmp_path):
    """It cannot grow; it works again later."""
    store = opened(tmp_path / "a.db")
    (pages,) = await store.run(lambda connection: connection.execute("PRAGMA page_count").fetchone())
    await store.run(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    found = await asyncio.gather(*(store.run(add("x" * 3000 + str(index))) for index in range(10)), return_exceptions=True)
    assert any(isinstance(each, Overloaded) for each in found)
    kept = [index + 1 for index, each in enumerate(found) if not isinstance(each, Exception)]
    assert len(names(tmp_path / "a.db")) == len(kept)
    await store.run(lambda connection: connection.execute("PRAGMA max_page_count = 1000000").fetchone())
    await store.run(add("later"))
    assert names(tmp_path / "a.db")[-1] == "later"
    await store.close()


async def test_a_locked_database_fails_what_waits(tmp_path, monkeypatch, caplog):
    """While another program writes, all that waits fails together and works again later."""
    monkeypatch.setattr(stores, "BUSY_S", 0.5)
    store, begun = opened(tmp_path / "a.db"), []
    store.connection.set_trace_callback(lambda statement: begun.append(statement) if statement.startswith("BEGIN") else None)
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        found = await asyncio.gather(*(store.run(add(f"n{index}")) for index in range(20)), return_exceptions=True)
        assert all(isinstance(each, Overloaded) for each in found) and "database is locked" in caplog.text
        assert len(begun) <= 2      # each would have waited for it as long again
    await store.run(add("later"))
    assert names(tmp_path / "a.db") == ["later"]
    await store.close()


async def test_a_removed_file_gets_no_commits(tmp_path, monkeypatch, caplog):
    """Nor does one that was replaced."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = opened(Path("a.db"))
    await store.run(add("one"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "here" / "a.db"
    path.rename(tmp_path / "away.db")
    for change in (lambda: None, lambda: path.write_bytes(b"another"), lambda: path.unlink()):
        change()
        caplog.clear()
        with pytest.raises(Overloaded, match="its log says why"):
            await store.run(add("lost"))
        assert "removed or replaced" in caplog.text
    (tmp_path / "away.db").rename(path)
    await store.run(add("two"))
    assert names(path) == ["one", "two"]
    path.rename(tmp_path / "away.db")
    path.write_bytes(b"another")
    await store.close()
    assert path.read_bytes() == b"another"
    (tmp_path / "away.db").rename(path)
    assert names(path) == ["one", "two"]


@pytest.mark.parametrize("change", ["removed", "replaced by an earlier one", "moved away"])
@pytest.mark.parametrize("endings", [("-wal",), ("-shm",), ("-wal", "-shm")])
async def test_nothing_is_lost_with_the_files_beside(tmp_path, monkeypatch, change, endings):
    """A crash right after the next commit included: what was committed before it was in a file without a name."""
    store = opened(tmp_path / "a.db")
    beside = [tmp_path / f"a.db{ending}" for ending in endings]
    await store.run(add("one"))
    earlier = [path.read_bytes() for path in beside]
    await store.run(add("two"))
    for path, data in zip(beside, earlier):
        if change == "moved away":
            path.rename(path.with_name(path.name + ".away"))
        else:
            path.unlink()
        if change.startswith("replaced"):
            path.write_bytes(data)
    monkeypatch.chdir("/")
    await store.run(add("three"))
    (tmp_path / "copy").mkdir()
    for ending in ("", "-wal"):      # as a crash would leave it
        (tmp_path / "copy" / f"a.db{ending}").write_bytes((tmp_path / f"a.db{ending}").read_bytes())
    assert names(tmp_path / "copy" / "a.db") == names(tmp_path / "a.db") == ["one", "two", "three"]
    await asyncio.gather(*(store.run(add(f"n{index}")) for index in range(20)))
    await store.close()
    assert not [path for path in tmp_path.iterdir() if path.name in ("a.db-wal", "a.db-shm")]
    assert len(names(tmp_path / "a.db")) == 23


async def test_a_store_recovers_the_files_beside_it(tmp_path, monkeypatch):
    """One that cannot open them again works once it can."""
    store, refused = opened(tmp_path / "a.db"), []
    await store.run(add("one"))
    writer = store._writer

    def broken():
        refused.append(1)
        raise sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr(store, "_writer", broken)
    (tmp_path / "a.db-wal").unlink()
    for _ in range(3):
        with pytest.raises(Overloaded, match="its log says why"):
            await store.run(add("lost"))
    monkeypatch.setattr(store, "_writer", writer)
    await store.run(add("two"))
    assert len(refused) == 3 and names(tmp_path / "a.db") == ["one", "two"]
    await store.close()


async def test_a_removed_lock_is_taken_again(tmp_path, caplog):
    """It is not while another server has it."""
    store = opened(tmp_path / "a.db")
    (tmp_path / "a.db-lock").unlink()
    await store.run(add("one"))
    assert "another server uses it" in await refusal(tmp_path / "a.db")
    (tmp_path / "a.db-lock").unlink()
    other = opened(tmp_path / "a.db")
    with pytest.raises(Overloaded, match="its log says why"):
        await store.run(add("mine"))
    assert "another server uses it" in caplog.text
    await other.run(add("theirs"))
    await other.close()
    await store.run(add("two"))
    await store.close()
    assert names(tmp_path / "a.db") == ["one", "theirs", "two"]


async def test_clients_leave_a_reserve_in_the_store(tmp_path, monkeypatch):
    """All other work may use it."""
    free = {"bytes": stores.RESERVE_BYTES + 10_000}
    monkeypatch.setattr(stores, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    store = opened(tmp_path / "a.db")
    # what runs in one transaction counts together, twice: in the -wal and in the file; what is refused takes nothing
    found = await asyncio.gather(*(store.run(add(f"n{index}"), 2000) for index in range(4)), store.run(add("large"), 6000), store.run(add("small"), 500),
                                 return_exceptions=True)
    kept = [index for index, each in enumerate(found) if not isinstance(each, Exception)]
    assert all(isinstance(each, Overloaded) and "almost full" in str(each) and each.retry_after_s == 60 for each in found if isinstance(each, Exception))
    assert "large" not in names(tmp_path / "a.db") and "small" in names(tmp_path / "a.db") and len(kept) == len(names(tmp_path / "a.db"))
    free["bytes"] = 0
    with pytest.raises(Overloaded, match="almost full"):
        await store.run(add("more"), 1)
    await store.run(add("the ledger"))
    free["bytes"] = stores.RESERVE_BYTES + 10_000
    await store.run(add("more"), 1)
    await store.close()


async def test_only_its_user_can_read_the_store(tmp_path):
    """Nobody else can read what lies beside it either."""
    before = os.umask(0)
    try:
        store = opened(tmp_path / "new" / "a.db")
        await store.run(add("one"))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == dict.fromkeys(("a.db", "a.db-wal", "a.db-shm", "a.db-lock"), 0o600)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    await store.close()
    (tmp_path / "new" / "a.db").chmod(0o644)
    store = opened(tmp_path / "new" / "a.db")
    assert stat.S_IMODE((tmp_path / "new" / "a.db").stat().st_mode) == 0o600
    await store.close()


async def refusal(path):
    with pytest.raises(ConfigError) as found:
        await open_store(Settings(database=str(path)))
    assert "\n" not in str(found.value) and str(path) in str(found.value)
    return str(found.value)


async def test_a_store_of_another_server_is_refused(tmp_path):
    store = opened(tmp_path / "a.db")
    assert "another server uses it" in await refusal(tmp_path / "a.db")
    await store.run(add("still mine"))
    await store.close()
    await (opened(tmp_path / "a.db")).close()


def closed_store(path, tables=NO_TABLES):
    async def make():
        store = opened(path, tables)
        for index in range(200):
            await store.run(add("x" * 500 + str(index)))
        await store.close()
    asyncio.run(make())


@pytest.mark.parametrize("what", ["newer", "damaged", "foreign", "no database", "cut", "folder", "pipe"])
def test_an_unusable_store_is_refused_in_one_line(tmp_path, what):
    """It is left as it is."""
    path = tmp_path / "a.db"
    if what in ("newer", "damaged", "cut"):
        closed_store(path)
    if what == "newer":
        with sqlite3.connect(path) as other:
            other.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    elif what == "damaged":
        data = bytearray(path.read_bytes())
        data[8192:8192 * 3] = os.urandom(8192 * 2)
        path.write_bytes(data)
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-10_000])
    elif what == "foreign":
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE history (url TEXT)")
        other.close()
    elif what == "no database":
        path.write_bytes(b"GGUF" + bytes(5000))
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    regular = path.is_file()
    before = path.read_bytes() if regular else None
    said = asyncio.run(refusal(path))
    assert {"newer": "newer chat_server", "damaged": "damaged", "cut": "malformed", "foreign": "another program", "no database": "not a database",
            "folder": "directory", "pipe": "regular file"}[what] in said, said
    assert (path.read_bytes() if regular else None) == before


@pytest.mark.parametrize("ending", ["-lock", "-wal", "-shm"])
@pytest.mark.parametrize("target", ["there", "missing"])
async def test_a_link_beside_a_store_changes_no_other_file(tmp_path, ending, target):
    """Whoever may make files beside it makes the server neither lock, open nor create a file elsewhere."""
    other = tmp_path / target
    if target == "there":
        other.write_bytes(b"precious")
        other.chmod(0o644)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"a.db{ending}").symlink_to(other)
    assert f"its {ending} is a link" in await refusal(folder / "a.db")
    assert [each.name for each in folder.iterdir()] == [f"a.db{ending}"]
    assert other.exists() == (target == "there")
    if other.exists():
        assert other.read_bytes() == b"precious" and stat.S_IMODE(other.stat().st_mode) == 0o644


@pytest.mark.parametrize("ending", ["-lock", "-wal", "-shm"])
async def test_a_link_put_beside_an_open_store_is_not_followed(tmp_path, ending, caplog):
    """Nothing is committed until it has gone; then the store goes on."""
    other, beside = tmp_path / "other", tmp_path / f"a.db{ending}"
    other.write_bytes(b"precious")
    store = opened(tmp_path / "a.db")
    await store.run(add("one"))
    beside.unlink()
    beside.symlink_to(other)
    with pytest.raises(Overloaded):
        await store.run(add("two"))
    assert "replaced by a link" in caplog.text
    assert other.read_bytes() == b"precious"
    beside.unlink()
    await store.run(add("three"))
    await store.close()
    assert names(tmp_path / "a.db") == ["one", "three"]


def test_a_damaged_large_store_ends_the_server(tmp_path, nanochat_fixtures):
    """A large store is checked while the server runs."""
    path = tmp_path / "a.db"
    closed_store(path, {annex.name: annex.tables() for annex in ANNEXES if annex.tables})
    data = bytearray(path.read_bytes())
    data[8192:8192 * 3] = os.urandom(8192 * 2)
    path.write_bytes(data)
    code = ("import sys, chat_server; from chatlm.front.store import store; store.CHECKED_BYTES = 0; "
            f"sys.exit(chat_server.main([{str(nanochat_fixtures / 'gen5')!r}, '--port', '0', '--host', '127.0.0.1', '--database={path}']))")
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and len([line for line in ended.stderr.splitlines() if "it is damaged" in line]) == 1, ended


async def test_a_locked_store_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BUSY_S", 0.1)
    await opened(tmp_path / "a.db").close()
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert "locked" in await refusal(tmp_path / "a.db")
    other.close()


def test_a_folder_without_write_access_is_refused(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    found = []

    with powerless():
        try:
            Store(folder / "a.db").open()
        except ConfigError as error:
            found.append(str(error))
    assert len(found) == 1 and "Permission denied" in found[0] and not [*folder.iterdir()]


WRITER = """
import asyncio, sys
from pathlib import Path
from chatlm.front.store.store import Store
async def main():
    store = Store(Path(sys.argv[1]))
    store.open()
    print("open", flush=True)
    for index in range(100_000):
        await store.run(lambda connection: connection.execute(
            "INSERT INTO files (name, owner, filename, purpose, created) VALUES (?, '', 'x', 'batch', 0)", (f"n{index}",)))
        print(index, flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 2, 30])
def test_what_run_returned_survives_kill(tmp_path, lines):
    path = tmp_path / "a.db"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(lines)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    said = [line for line in said if line.endswith("\n")]
    kept = [f"n{int(line)}" for line in said[1:]]
    closed = opened(path)
    assert names(path)[:len(kept)] == kept and len(names(path)) <= len(kept) + 1
    asyncio.run(closed.close())


def test_sqlite_is_imported_only_with_the_flag(tmp_path):
    code = ("import asyncio, sys; from chatlm.common.config import Settings; import chat_server; from chatlm.front.store.store import open_store\n"
            "print(asyncio.run(open_store(Settings())), 'sqlite3' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "None False\n"


async def test_without_a_path_the_store_is_user_state(tmp_path, monkeypatch):
    """It is among the user's state."""
    from command_line import parse_command_line
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    settings = parse_command_line(["serve", "model.gguf", "--database"], {})
    assert settings.model == "model.gguf"
    store = await open_store(settings)
    assert store.path == tmp_path / "chat_server/store.db" and store.path.exists()
    await store.close()


def test_a_beginning_upload_is_not_an_ended_one(tmp_path):
    async def run():
        store, states = opened(tmp_path / "a.db"), []
        routes = FileRoutes(store, None, 1, lambda: None)
        upload = Upload(store, None, Caller("/v1/files", "me", ""))

        async def forget():
            def work(connection):
                batches.forget(connection, 0, 1, routes.uploads_under_way())
                states.append([state for (state,) in connection.execute("SELECT state FROM files")])
            await store.run(work)
        # the file is made before the other work begins, and its maker has not been told yet
        routes.uploads.add(upload)
        await asyncio.gather(upload.begin(), forget())
        await forget()
        routes.uploads.remove(upload)
        await forget()
        await store.close()
        return states
    assert asyncio.run(run()) == [[file_rows.WRITTEN], [file_rows.WRITTEN], [file_rows.DELETED]]
