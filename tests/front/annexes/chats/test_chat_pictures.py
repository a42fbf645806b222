"""Pictures of chats as files: kept and counted once, whoever shows them, and gone with the last message that does."""

import asyncio
import base64
import hashlib
import secrets
from contextlib import asynccontextmanager

from chatlm.common.config import ApiKey
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.chats import pictures
from chatlm.front.store import quota
from left_texts import asked_over

SPACE, OTHER = "P" * 22, "Q" * 22
PNG = b"\x89PNG\r\n\x1a\n"


def an_id(number):
    return f"{number:032x}"


def a_picture(size=1000, begin=PNG):
    return begin + secrets.token_bytes(size)


@asynccontextmanager
async def started(path, *keys):
    headers = (lambda key: {"Authorization": f"Bearer {key}"}) if keys else (lambda space: {"X-Chat-Space": space} if space else {})
    async with asked_over(path / "store.db", headers, *keys, annexes=ANNEXES) as ask:
        yield ask


async def sent(ask, data, who=SPACE):
    """(status, answer) of a picture."""
    async with ask.place.client.post(f"{ask.place.url}/v1/chats/files", data=data, headers=ask.headers_of(who)) as response:
        return response.status, await response.json()


async def shown(ask, name, who=SPACE):
    async with ask.place.client.get(f"{ask.place.url}/v1/chats/files/{name}", headers=ask.headers_of(who)) as response:
        return response.status, await response.read(), response.headers


async def changed(ask, *made, who=SPACE):
    status, answer = await ask(who, "/v1/chats/changes", {"changes": made})
    assert status == 200, answer
    return answer["data"]


def chat(number):
    return {"kind": "chat", "id": an_id(number), "patch": {"created": 1, "title": "Cats"}}


def node(number, chat, *names, base=0):
    return {"kind": "node", "id": an_id(number), "base": base, "patch": {
        "created": 1, "conversation": an_id(chat), "role": "user", "content": "See",
        "pictures": [{"name": "cat.png", "file": name} for name in names]}}


def gone(kind, number):
    return {"kind": kind, "id": an_id(number), "patch": None}


async def held(ask):
    return await ask.place.front.store.run(lambda connection: connection.execute("SELECT SUM(bytes) FROM holdings").fetchone()[0])


async def test_a_picture_is_kept_once_and_goes_with_the_last_message(tmp_path):
    async with started(tmp_path) as ask:
        data = a_picture(200_000)
        status, made = await sent(ask, data)
        assert (status, made) == (200, {"id": hashlib.sha256(data).hexdigest(), "object": "chat.file", "bytes": len(data), "type": "image/png"})
        assert (await sent(ask, data))[1] == made
        name = made["id"]
        rows = await changed(ask, chat(1), chat(2), node(3, 1, name), node(4, 2, name), node(5, 2, name))
        assert {row["state"] for row in rows} == {"stored"}
        assert len(data) < await held(ask) < 1.2 * len(data)
        found, body, headers = await shown(ask, name)
        assert (found, body, headers["Content-Type"]) == (200, data, "image/png")
        assert headers["X-Content-Type-Options"] == "nosniff" and "sandbox" in headers["Content-Security-Policy"]
        await changed(ask, gone("chat", 1), gone("node", 4))
        assert (await shown(ask, name))[0] == 200
        await changed(ask, {"kind": "node", "id": an_id(5), "base": 99, "patch": {"pictures": None}})
        store = ask.place.front.store
        while await store.run(lambda connection: connection.execute("SELECT COUNT(*) FROM chat_records WHERE nodes_left").fetchone()[0]):
            pass        # the nodes of the deleted chat go in the background
        assert (await shown(ask, name))[0] == 404
        assert await held(ask) < 10_000
        async with asyncio.timeout(30):
            while any(data[1000:1100] in path.read_bytes() for path in tmp_path.iterdir() if path.name != "store.db-shm"):
                await asyncio.sleep(0.05)  # the -wal is emptied behind it


async def test_a_file_of_chats_has_its_pictures(tmp_path):
    async with started(tmp_path) as ask:
        data = a_picture(5000, b"\xff\xd8\xff\xe0")
        name = (await sent(ask, data))[1]["id"]
        small = {"name": "dot.png", "picture": "data:image/png;base64,AAAA"}
        both = node(2, 1, name)
        both["patch"]["pictures"].append(small)
        await changed(ask, chat(1), both)
        assert (await ask(SPACE, f"/v1/chats/{an_id(1)}"))[1]["nodes"][0]["pictures"] == [{"name": "cat.png", "file": name}, small]
        _, file = await ask(SPACE, "/v1/chats/export")
        assert file["conversations"][0]["nodes"][0]["pictures"] == [
            {"name": "cat.png", "picture": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}, small]


async def test_what_is_no_picture_or_not_there_is_refused(tmp_path):
    async with started(tmp_path) as ask:
        assert (await sent(ask, b"<svg xmlns='http://www.w3.org/2000/svg'/>"))[0] == 415
        assert (await sent(ask, b""))[0] == 415
        assert (await sent(ask, PNG + bytes(pictures.CHAT_PICTURE_BYTES)))[0] == 413
        assert (await sent(ask, a_picture(), who=""))[1]["error"]["code"] == "missing_space"
        await changed(ask, chat(1))
        for wrong in ("f" * 64, "F" * 64, "../x", 7, None):
            [row] = await changed(ask, node(2, 1, wrong))
            assert (row["state"], row["error"]["param"]) == ("refused", "pictures"), wrong
        assert (await ask(SPACE, f"/v1/chats/{an_id(1)}"))[1]["nodes"] == []
        name = (await sent(ask, a_picture()))[1]["id"]
        twice = node(2, 1, name)
        twice["patch"]["pictures"][0]["picture"] = "data:image/png;base64,AAAA"
        assert (await changed(ask, twice))[0]["error"]["param"] == "pictures"
        await changed(ask, node(3, 1))
        [row] = await changed(ask, {"kind": "node", "id": an_id(3), "base": 99, "patch": {
            "content": "Edit", "pictures": [{"name": "x", "file": "e" * 64}]}})
        assert row["state"] == "refused" and row["record"]["content"] == "See"
        assert (await shown(ask, "0" * 64))[0] == 404


async def test_pictures_are_their_owner_s_alone(tmp_path):
    async with started(tmp_path, ApiKey.hashed("key-one", "one"), ApiKey.hashed("key-two", "two")) as ask:
        data = a_picture()
        name = (await sent(ask, data, "key-one"))[1]["id"]
        assert (await shown(ask, name, "key-two"))[0] == 404
        await changed(ask, chat(1), who="key-two")
        [row] = await changed(ask, node(2, 1, name), who="key-two")
        assert row["state"] == "refused"
        assert (await sent(ask, data, "key-two"))[1]["id"] == name         # nothing says that another has it
        await changed(ask, chat(1), node(2, 1, name), who="key-one")
        await changed(ask, gone("node", 2), who="key-one")
        assert (await shown(ask, name, "key-one"))[0] == 404
        assert (await shown(ask, name, "key-two"))[1] == data


async def test_a_picture_that_nobody_shows_goes_after_a_day(tmp_path):
    async with started(tmp_path) as ask:
        idle, used = [(await sent(ask, a_picture()))[1]["id"] for _ in range(2)]
        await changed(ask, chat(1), node(2, 1, used))
        store = ask.place.front.store
        soon, late = [await store.run(lambda connection: connection.execute("SELECT MAX(made) FROM chat_pictures").fetchone()[0]) + more
                      for more in (pictures.UNSHOWN_S - 5, pictures.UNSHOWN_S + 5)]
        await store.run(lambda connection: pictures.purge_unshown(connection, soon))
        assert (await shown(ask, idle))[0] == 200
        await store.run(lambda connection: pictures.purge_unshown(connection, late))
        assert [(await shown(ask, name))[0] for name in (idle, used)] == [404, 200]


async def test_pictures_count_for_the_quota(tmp_path, monkeypatch):
    async with started(tmp_path, ApiKey.hashed("key-one", "one")) as ask:
        monkeypatch.setattr(quota, "LIMITS", type("Small", (), {"kept_bytes": 50_000}))
        statuses = [(await sent(ask, a_picture(20_000), "key-one"))[0] for _ in range(4)]
        assert statuses == [200, 200, 403, 403]
