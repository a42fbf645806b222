"""X-Chat-Space: whoever knows it has all that is in the space, and an address answers for those it makes up."""

import asyncio
import contextlib
import sqlite3
from dataclasses import replace

import pytest

from chatlm.common.config import LIMITS, ApiKey
from chatlm.front.annexes.batches import routes as batches
from chatlm.front.server.access import space_of
from chatlm.front.store import quota, spaces
from fake_pool import FakePool
from left_texts import LINES, asked_over

ONE, OTHER = "A" * 22, "b-_9" * 16


def started(path, *keys, pool=None):
    """A server that is asked from spaces; from none: ""."""
    return asked_over(path, lambda space: {"X-Chat-Space": space} if space else {}, *keys, pool=pool)


async def test_a_space_is_its_owner_from_whatever_address(tmp_path, monkeypatch):
    """Who has another space or none sees nothing of it, though it knows the ids."""
    async with started(tmp_path / "store.db") as ask:
        mine = await ask.leave(ONE)
        theirs = await ask.leave(OTHER)
        assert await ask.seen(ONE, mine) == {200} and await ask.seen(OTHER, theirs) == {200}
        for space, paths in ((OTHER, mine), ("", mine), (ONE, theirs), ("", theirs)):
            assert await ask.seen(space, paths) == {404}
        monkeypatch.setattr("chatlm.front.server.access.client_at", lambda address: "192.0.2.7")
        assert await ask.seen(ONE, mine) == {200} and await ask.seen(OTHER, mine) == {404}
        _, listed = await ask(ONE, "/v1/files?purpose=batch")
        assert [file["id"] for file in listed["data"]] == [mine[2].split("/")[-1]]
        continued = {"input": "More", "previous_response_id": mine[0].split("/")[-1]}
        assert (await ask(ONE, "/v1/responses", continued))[0] == 200
        assert (await ask(OTHER, "/v1/responses", continued))[0] == 404


async def test_a_batch_of_a_space_ends(tmp_path):
    pool = FakePool()
    async with started(tmp_path / "store.db", pool=pool) as ask:
        [*_, batch] = await ask.leave(ONE)
        while (await ask(ONE, batch))[1]["status"] not in ("completed", "failed"):
            pass
        status, found = await ask(ONE, batch)
        assert found["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
        [request] = [request for request in pool.requests if request.low_priority]
        assert request.params.client == "127.0.0.1"


async def test_what_an_address_left_before_stays_its_own(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        paths = await ask.leave("")
        assert await ask.seen("", paths) == {200} and await ask.seen(ONE, paths) == {404}


@pytest.mark.parametrize("space", ["x", "A" * 21, "A" * 65, "A" * 21 + "é", "A" * 21 + " x", "A" * 22 + "/"])
async def test_a_space_that_can_be_guessed_is_refused(tmp_path, space):
    async with started(tmp_path / "store.db") as ask:
        for path, body in (("/v1/conversations", {}), ("/v1/files", None)):
            status, answer = await ask(space, path, body)
            assert (status, answer["error"]["param"]) == (400, "X-Chat-Space"), answer


async def test_keys_own_their_texts_whatever_a_space_says(tmp_path):
    keys = ApiKey.hashed("a", "a"), ApiKey.hashed("b", "b")
    async with started(tmp_path / "store.db", *keys) as ask:
        _, made = await ask(ONE, "/v1/conversations", {}, Authorization="Bearer a")
        path = f"/v1/conversations/{made['id']}"
        for space, key, status in ((ONE, "b", 404), (OTHER, "a", 200), ("x", "a", 200), ("", "a", 200)):
            assert (await ask(space, path, Authorization=f"Bearer {key}"))[0] == status
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        assert connection.execute("SELECT * FROM spaces").fetchall() == []


def limits(monkeypatch, **more):
    for module in (quota, spaces):
        monkeypatch.setattr(module, "LIMITS", replace(LIMITS, **more))


BIG = {"metadata": {"a": "x" * 400}}


async def test_made_up_spaces_have_the_room_of_one_address(tmp_path, monkeypatch):
    """On each path by which texts come; another address has its own room."""
    async with started(tmp_path / "store.db") as ask:
        limits(monkeypatch, kept_bytes=6_000)
        made = []
        for number in range(9):
            status, answer = await ask(f"{number:022}", "/v1/conversations", BIG)
            made += [status]
        assert made[:2] == [200, 200] and made[-1] == 403 and "your address's" in answer["error"]["message"]
        assert answer["error"]["code"] == "storage_full"
        assert (await ask(ONE, "/v1/responses", {"input": "x" * 3000}))[0] == 403
        assert (await ask(ONE, "/v1/responses", {"input": "x" * 3000, "store": False}))[0] == 200
        assert (await ask.upload(OTHER, LINES))[0] == 403
        assert (await ask("", "/v1/conversations", BIG))[0] == 403
        monkeypatch.setattr("chatlm.front.server.access.client_at", lambda address: "192.0.2.7")
        assert (await ask("9" * 22, "/v1/conversations", BIG))[0] == 200
        status, answer = await ask(f"{0:022}", "/v1/conversations", BIG)    # the space of the first address
        assert status == 403


async def test_an_address_makes_so_many_spaces(tmp_path, monkeypatch):
    """Those that have nothing are forgotten after a day."""
    async with started(tmp_path / "store.db") as ask:
        limits(monkeypatch, spaces=3)
        made = [(await ask(f"{number:022}", "/v1/conversations", {}))[1] for number in range(3)]
        status, answer = await ask(ONE, "/v1/conversations", {})
        assert (status, answer["error"]["code"]) == (403, "too_many_spaces")
        assert (await ask(f"{1:022}", "/v1/conversations", {}))[0] == 200
        await ask(f"{0:022}", f"/v1/conversations/{made[0]['id']}", method="DELETE")
        assert (await ask(ONE, "/v1/conversations", {}))[0] == 403
        monkeypatch.setattr(spaces, "FORGOTTEN_S", -5)
        assert (await ask(ONE, "/v1/conversations", {}))[0] == 200
        assert (await ask(OTHER, "/v1/conversations", {}))[0] == 403


async def test_the_whole_database_has_a_limit_without_keys(tmp_path, monkeypatch):
    async with started(tmp_path / "store.db") as ask:
        limits(monkeypatch, open_bytes=1000)
        for space in (ONE, ""):
            status, answer = await ask(space, "/v1/conversations", {})
            assert (status, answer["error"]["code"]) == (403, "storage_full")
            assert "the database of this server is full" in answer["error"]["message"]
        assert (await ask("", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}))[0] == 200
    keys = ApiKey.hashed("a", "a"),
    async with started(tmp_path / "keyed.db", *keys) as ask:
        assert (await ask("", "/v1/conversations", {}, Authorization="Bearer a"))[0] == 200


async def test_unfinished_batches_are_counted_by_address(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "MOST_UNFINISHED", 2)
    pool = FakePool(gate=asyncio.Event())
    async with started(tmp_path / "store.db", pool=pool) as ask:
        statuses = []
        for number in range(3):
            statuses.append((await ask.begin_batch(f"{number:022}"))[0])
        assert statuses == [200, 200, 429]
        pool.gate.set()


def test_a_space_s_owner_does_not_tell_its_header():
    owner = space_of(ONE)
    assert owner.startswith("space ") and ONE not in owner
    assert owner == space_of(ONE) != space_of(OTHER) and space_of("") == ""
