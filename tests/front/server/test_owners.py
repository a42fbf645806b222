"""What keys with owner=NAME leave in the database: it stays when keys rotate, and other keys do not see it."""

import contextlib
import sqlite3

from chatlm.common.config import ApiKey, read_api_keys
from chatlm.front.store import quota
from chatlm.front.store.schema import HELD
from fake_pool import FakePool
from left_texts import asked_over
from toy_annex import TOY


def key(secret, name="", owner=""):
    return ApiKey.hashed(secret, name or secret, owner=owner)


def started(path, *keys, pool=None):
    """A server that is asked with these keys."""
    return asked_over(path, lambda secret: {"Authorization": f"Bearer {secret}"}, *keys, pool=pool,
                      annexes=(TOY,))


def counted(path):
    """What the database counts for each owner, and what its rows amount to."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        held = dict(connection.execute("SELECT owner, bytes FROM holdings"))
        rows = {}
        for table, size in HELD.items():
            for owner, total in connection.execute(
                    f"SELECT owner, SUM({size.format(row=table)}) FROM {table} GROUP BY owner"):
                rows[owner] = rows.get(owner, 0) + total
        return held, rows


async def test_texts_stay_when_a_key_gets_an_owner_and_then_rotates(tmp_path):
    path = tmp_path / "store.db"
    async with started(path, key("old"), key("other")) as ask:
        mine = await ask.leave("old")
        theirs = await ask.leave("other")
    async with started(path, key("old", owner="ann"), key("other")) as ask:
        assert await ask.seen("old", mine) == {200} and await ask.seen("old", theirs) == {404}
        assert await ask.seen("other", theirs) == {200} and await ask.seen("other", mine) == {404}
    async with started(path, key("new", owner="ann"), key("phone", owner="ann"), key("other")) as ask:
        for secret in ("new", "phone"):
            assert await ask.seen(secret, mine) == {200} and await ask.seen(secret, theirs) == {404}
        _, listed = await ask("new", "/v1/batches")
        assert [batch["id"] for batch in listed["data"]] == [mine[3].split("/")[-1]]
        assert (await ask("phone", mine[0], method="DELETE"))[0] == 200 and (await ask("new", mine[0]))[0] == 404
    held, rows = counted(path)
    assert held == rows and "owner ann" in held and len(held) == 2


async def test_a_key_is_not_its_owner_s_name(tmp_path):
    """A key that is called as an owner, or whose owner is called as a key, sees nothing of that one."""
    path = tmp_path / "store.db"
    async with started(path, key("a", owner="ann"), key("b", "ann"), key("c", "c", owner="a")) as ask:
        paths = await ask.leave("a")
        assert await ask.seen("b", paths) == {404} and await ask.seen("c", paths) == {404}


async def test_an_owner_that_is_taken_away_leaves_the_texts_where_they_are(tmp_path):
    path = tmp_path / "store.db"
    async with started(path, key("a", owner="ann")) as ask:
        paths = await ask.leave("a")
    async with started(path, key("a")) as ask:
        assert await ask.seen("a", paths) == {404}
    async with started(path, key("b", owner="ann")) as ask:
        assert await ask.seen("b", paths) == {200}


async def test_two_keys_of_one_owner_share_its_room(tmp_path, monkeypatch):
    path = tmp_path / "store.db"
    async with started(path, key("a", owner="ann"), key("b", owner="ann"), key("c")) as ask:
        await ask.leave("a")
        monkeypatch.setattr(quota, "LIMITS", type("Small", (), {"kept_bytes": 2_000}))
        status, body = await ask("b", "/v1/conversations", {"metadata": {"a": "x" * 400}})
        assert (status, body["error"]["code"]) == (403, "storage_full"), body
        assert (await ask("c", "/v1/conversations", {}))[0] == 200


async def test_a_batch_runs_as_the_key_that_made_it_while_that_is_there(tmp_path):
    """And then as another key of its owner, with that one's rights."""
    path = tmp_path / "store.db"
    pool = FakePool()
    async with started(path, key("first", owner="ann"), key("maker", owner="ann"), pool=pool) as ask:
        await ask.leave("maker")
        while not (asked := [request for request in pool.requests if request.low_priority]):
            await ask("maker", "/v1/batches")
        assert asked[0].params.client == "maker"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT client, owner FROM batches").fetchall() == [("maker", "owner ann")]


async def test_tables_of_annexes_go_along(tmp_path):
    path = tmp_path / "store.db"
    async with started(path, key("old")) as ask:
        owner = ask.place.front.owners.of_texts("old")
        await ask.place.front.store.run(
            lambda connection: connection.execute("INSERT INTO toys (owner, text) VALUES (?, 'Hi')", (owner,)))
    async with started(path, key("old", owner="ann")):
        pass
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT owner, text FROM toys").fetchall() == [("owner ann", "Hi")]
        assert [owner for owner, in connection.execute("SELECT owner FROM holdings")] == ["owner ann"]


def keys_of(tmp_path, *lines):
    file = tmp_path / "keys"
    file.write_text("\n".join(lines))
    return read_api_keys([], str(file))


def test_an_owner_is_a_name_in_the_file_of_keys(tmp_path):
    found = keys_of(tmp_path, "a: 1  owner=ann tokens-per-day=5", "b: 2 owner=ann@example.org", "c: 3")
    assert [each.owner for each in found] == ["ann", "ann@example.org", ""]
