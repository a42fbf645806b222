"""Work in the store: clients take turns, and long work pauses so that all others have theirs."""

import asyncio
import sqlite3
import threading

import pytest

from chatlm.common.errors import Overloaded
from chatlm.front.store import store as stores
from chatlm.front.store.store import Store

INSERT = "INSERT INTO files (name, owner, filename, purpose, created) VALUES (?, '', 'x', 'batch', 0)"


@pytest.fixture
async def store(tmp_path):
    made = Store(tmp_path / "a.db")
    made.open()
    yield made
    await made.close()


@pytest.fixture
def short_slices(monkeypatch):
    """A transaction has one work, or one part of a long one."""
    monkeypatch.setattr(stores, "SLICE_S", 0.0)


class Held:
    """Holds the store's thread in a work until all that a test submits waits."""

    def __init__(self, store):
        self.gate = threading.Event()
        self.work = asyncio.ensure_future(store.run(lambda connection: self.gate.wait(30) and None))

    async def __aenter__(self):
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *failure):
        await asyncio.sleep(0)      # what was submitted waits now
        self.gate.set()
        await self.work


def names(store):
    return {name for (name,) in sqlite3.connect(store.path).execute("SELECT name FROM files")}


def noting(order, name):
    return lambda connection: order.append(name)


def long_work(order, name, parts):
    def work(connection):
        for index in range(parts):
            order.append(f"{name}{index}")
            yield
        return name
    return work


async def test_clients_take_turns(store, short_slices):
    order = []
    async with Held(store):
        works = [asyncio.ensure_future(store.run(noting(order, name), client=name[0]))
                 for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    await asyncio.gather(*works)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


async def test_long_work_pauses_for_all_others(store, short_slices):
    """For those of its own client too."""
    order = []
    async with Held(store):
        long = asyncio.ensure_future(store.run(long_work(order, "long", 4), client="a"))
        others = [asyncio.ensure_future(store.run(noting(order, name), client=name[0])) for name in ("b1", "a1", "b2")]
    assert await long == "long"
    await asyncio.gather(*others)
    assert order == ["long0", "b1", "a1", "b2", "long1", "long2", "long3"]


async def test_what_waits_together_is_committed_together(store):
    """As much as a slice allows."""
    commits = []
    store.connection.set_trace_callback(lambda statement: commits.append(statement) if statement == "COMMIT" else None)
    async with Held(store):
        works = [asyncio.ensure_future(store.run(noting([], "x"), client=str(index % 7))) for index in range(50)]
    await asyncio.gather(*works)
    assert len(commits) <= 3        # that of what held it, and if the machine is busy a further one


async def test_what_long_work_did_before_its_last_pause_stays(store, short_slices):
    def work(connection):
        for name in ("kept", "lost"):
            connection.execute(INSERT, (name,))
            if name == "lost":
                raise LookupError("no")
            yield
    with pytest.raises(LookupError):
        await store.run(work)
    assert names(store) == {"kept"}


async def test_long_work_that_nobody_waits_for_ends_at_its_next_pause(store, short_slices):
    begun, ended = [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(connection):
        try:
            for index in range(1_000_000):
                begun.append(index)
                yield
        finally:
            loop.call_soon_threadsafe(ended.set)
    task = asyncio.ensure_future(store.run(work, client="a"))
    while not begun:
        await asyncio.sleep(0.001)
    task.cancel()
    await ended.wait()
    assert len(begun) < 1_000_000
    await store.run(noting([], "x"), client="a")


async def test_a_broken_transaction_begins_long_work_again(store, monkeypatch):
    def breaks(connection):
        connection.execute("ROLLBACK")
        raise sqlite3.OperationalError("database or disk is full")

    def once(name):
        def work(connection):
            connection.execute(INSERT, (name,))
            yield
            connection.execute(INSERT, (f"{name} later",))
        return work
    monkeypatch.setattr(stores, "SLICE_S", 60.0)
    async with Held(store):
        works = [asyncio.ensure_future(store.run(work, client="a")) for work in (once("one"), breaks, once("two"))]
    found = await asyncio.gather(*works, return_exceptions=True)
    assert found[0] is found[2] is None and isinstance(found[1], Overloaded)
    assert names(store) == {"one", "one later", "two", "two later"}


async def test_long_work_that_had_paused_fails_with_its_transaction(store, short_slices):
    """It does not know that its last part is undone."""
    def work(connection):
        connection.execute(INSERT, ("kept",))
        yield
        connection.execute("ROLLBACK")
        raise sqlite3.OperationalError("database or disk is full")
    with pytest.raises(Overloaded, match="its log says why"):
        await store.run(work)
    assert names(store) == {"kept"}


async def test_a_store_that_closes_ends_long_work_first(tmp_path, short_slices):
    store = Store(tmp_path / "b.db")
    store.open()
    order = []
    async with Held(store):
        work = asyncio.ensure_future(store.run(long_work(order, "x", 50), client="a"))
    await store.close()
    assert await work == "x" and len(order) == 50
