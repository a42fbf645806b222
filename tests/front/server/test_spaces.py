"""X-Chat-Space: whoever knows it has all that is in the space, and an address answers for those it makes up."""

import asyncio
import contextlib
import json
import sqlite3
from dataclasses import replace

import aiohttp
import pytest

from annex_place import Place
from chatlm.common.config import LIMITS, ApiKey, Settings
from chatlm.front.annexes import database_of
from chatlm.front.server import batches
from chatlm.front.server.access import space_of
from chatlm.front.store import quota, spaces
from fake_pool import FakePool

ONE, OTHER = "A" * 22, "b-_9" * 16
LINE = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}}


@contextlib.asynccontextmanager
async def started(path, *keys, pool=None):
    """A server over the database at a path, and a function that asks it from a space."""
    settings = Settings(keys=keys, database=str(path))
    async with Place(pool=pool or FakePool(), settings=settings, store=await database_of(settings, ())) as place:
        async def ask(space, path, body=None, method=None, **headers):
            headers |= {"X-Chat-Space": space} if space else {}
            method = method or ("GET" if body is None else "POST")
            async with place.client.request(method, place.url + path, json=body, headers=headers) as response:
                return response.status, await response.json()

        async def upload(space, text):
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", text, filename="lines.jsonl")
            headers = {"X-Chat-Space": space} if space else {}
            async with place.client.post(f"{place.url}/v1/files", data=form, headers=headers) as response:
                return response.status, await response.json()

        ask.upload = upload
        ask.place = place
        yield ask


def batch_of(file):
    return {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}


async def leave(ask, space):
    """Something of each kind that a client can leave; the paths where it is found."""
    _, response = await ask(space, "/v1/responses", {"input": "Hi"})
    _, conversation = await ask(space, "/v1/conversations", {"metadata": {"a": "b"}})
    _, file = await ask.upload(space, json.dumps(LINE) + "\n")
    file = file["id"]
    _, batch = await ask(space, "/v1/batches", batch_of(file))
    return [f"/v1/responses/{response['id']}", f"/v1/conversations/{conversation['id']}",
            f"/v1/files/{file}", f"/v1/batches/{batch['id']}"]


async def seen(ask, space, paths):
    return {(await ask(space, path))[0] for path in paths}


async def test_a_space_is_its_owner_from_whatever_address(tmp_path, monkeypatch):
    """Who has another space or none sees nothing of it, though it knows the ids."""
    async with started(tmp_path / "store.db") as ask:
        mine = await leave(ask, ONE)
        theirs = await leave(ask, OTHER)
        assert await seen(ask, ONE, mine) == {200} and await seen(ask, OTHER, theirs) == {200}
        for space, paths in ((OTHER, mine), ("", mine), (ONE, theirs), ("", theirs)):
            assert await seen(ask, space, paths) == {404}
        monkeypatch.setattr("chatlm.front.server.access.client_at", lambda address: "192.0.2.7")
        assert await seen(ask, ONE, mine) == {200} and await seen(ask, OTHER, mine) == {404}
        _, listed = await ask(ONE, "/v1/files?purpose=batch")
        assert [file["id"] for file in listed["data"]] == [mine[2].split("/")[-1]]
        continued = {"input": "More", "previous_response_id": mine[0].split("/")[-1]}
        assert (await ask(ONE, "/v1/responses", continued))[0] == 200
        assert (await ask(OTHER, "/v1/responses", continued))[0] == 404


async def test_a_batch_of_a_space_ends(tmp_path):
    pool = FakePool()
    async with started(tmp_path / "store.db", pool=pool) as ask:
        [*_, batch] = await leave(ask, ONE)
        while (await ask(ONE, batch))[1]["status"] not in ("completed", "failed"):
            pass
        status, found = await ask(ONE, batch)
        assert found["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
        [request] = [request for request in pool.requests if request.low_priority]
        assert request.params.client == "127.0.0.1"


async def test_what_an_address_left_before_stays_its_own(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        paths = await leave(ask, "")
        assert await seen(ask, "", paths) == {200} and await seen(ask, ONE, paths) == {404}


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
        assert (await ask.upload(OTHER, json.dumps(LINE) + "\n"))[0] == 403
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
    monkeypatch.setattr(batches, "LIMITS", replace(LIMITS, unfinished_batches=2))
    pool = FakePool(gate=asyncio.Event())
    async with started(tmp_path / "store.db", pool=pool) as ask:
        statuses = []
        for number in range(3):
            space = f"{number:022}"
            _, file = await ask.upload(space, json.dumps(LINE) + "\n")
            statuses.append((await ask(space, "/v1/batches", batch_of(file["id"])))[0])
        assert statuses == [200, 200, 429]
        pool.gate.set()


def test_a_space_s_owner_does_not_tell_its_header():
    owner = space_of(ONE)
    assert owner.startswith("space ") and ONE not in owner
    assert owner == space_of(ONE) != space_of(OTHER) and space_of("") == ""
