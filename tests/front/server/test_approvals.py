"""An approved call runs once, by whatever path its approval comes, and however the server ended meanwhile."""

import asyncio
import os
import random
import subprocess
import sys
from contextlib import suppress

import aiohttp
import pytest

import approving_server
from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.tool_rounds import ApprovalMark
from chatlm.front.annexes.tools.approvals import NotedUses
from chatlm.front.api.approval_ids import approval_id, digest_in, until_of
from chatlm.front.api.kept_items import AN_ID
from chatlm.front.store import approvals
from chatlm.front.store.approvals import Use
from chatlm.front.store.store import open_store
from tool_rounds import calls, tool_place

TOOL = {"type": "mcp", "server_label": "fake"}
PICK = calls(("fake__pick", {"word": "red"}))
KEPT_PATHS = "items", "reference", "previous", "previous and reference", "reference to both", "conversation"


def yes(request):
    return {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": True}


async def asked(at, path, **more):
    """The approval request that a response ends with, and the body by which its approval comes."""
    body = {"input": "Pick.", "tools": [TOOL], **more}
    if path == "conversation":
        status, _, conversation = await at.post("/v1/conversations", {})
        body["conversation"] = conversation["id"]
    status, _, first = await at.post("/v1/responses", body)
    assert status == 200, first
    request = first["output"][-1]
    assert request["type"] == "mcp_approval_request"
    reference = {"type": "item_reference", "id": request["id"]}
    said = {
        "items": {"input": [request, yes(request)]},
        "reference": {"input": [reference, yes(request)]},
        "previous": {"input": [yes(request)], "previous_response_id": first["id"]},
        "previous and reference": {"input": [reference, yes(request)], "previous_response_id": first["id"]},
        "conversation": {"input": [yes(request)], "conversation": body.get("conversation")},
    }
    if path == "reference to both":  # the answer is an item of a response that was kept, too
        status, _, second = await at.post(
            "/v1/responses", {"input": [request, yes(request)], "tools": [TOOL]}
        )
        assert status == 200, second
        async with at.http.get(f"{at.url}/v1/responses/{second['id']}/input_items") as response:
            items = (await response.json())["data"]
        [answer] = [item for item in items if item["type"] == "mcp_approval_response"]
        said[path] = {"input": [reference, {"type": "item_reference", "id": answer["id"]}]}
    return request, said[path] | {"tools": [TOOL]}


@pytest.mark.parametrize("again", KEPT_PATHS[:4] + KEPT_PATHS[5:])
@pytest.mark.parametrize("path", KEPT_PATHS)
async def test_no_path_makes_a_call_again(tmp_path, path, again):
    """The approval is used by one path, and sent again by the same one and by another."""
    async with tool_place(tmp_path, PICK, "It is red.", allowed=(), database=str(tmp_path / "kept.db")) as at:
        request, body = await asked(at, path)
        if path != "reference to both":
            status, _, response = await at.post("/v1/responses", body)
            assert status == 200, response
        assert at.called == [["pick", {"word": "red"}]]
        bodies = [body]
        if again == "items":
            bodies.append({"input": [request, yes(request)], "tools": [TOOL]})
        elif again == "reference":
            bodies.append(
                {"input": [{"type": "item_reference", "id": request["id"]}, yes(request)], "tools": [TOOL]}
            )
        elif "previous_response_id" in body:
            bodies.append({**body, "input": [request, *body["input"]]})
        for each in bodies:
            for more in {}, {"store": False}, {"stream": True}:
                status, headers, answer = await at.post("/v1/responses", each | more)
                is_twice = (
                    status == 400 and "twice" in answer["error"]["message"]
                )  # it is in the conversation already
                assert is_twice or status == 409 and answer["error"]["code"] == "approval_used", answer
                assert (
                    is_twice
                    or "picked red" in answer["error"]["message"]
                    and headers["X-Should-Retry"] == "false"
                )
        assert len(at.called) == 1


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("path", ["items", "reference", "previous", "previous and reference", "conversation"])
async def test_of_many_at_a_time_one_makes_the_call(tmp_path, path, kept):
    if not kept and path != "items":
        pytest.skip("without --database nothing is kept")
    more = {"database": str(tmp_path / "kept.db")} if kept else {}
    rng = random.Random(3)
    for turn in range(3):
        async with tool_place(tmp_path, PICK, "It is red.", allowed=(), **more) as at:
            _, body = await asked(at, path)
            bodies = [body | rng.choice(({}, {"stream": False}, {"store": False})) for _ in range(12)]
            answers = await asyncio.gather(*(at.post("/v1/responses", each) for each in bodies))
            statuses = sorted(status for status, _, _ in answers)
            assert statuses.count(200) == 1 and set(statuses[1:]) <= {400, 409}, statuses
            assert len(at.called) == 1
        at.log.unlink()


def serve(folder, database):
    (folder / "url").unlink(missing_ok=True)
    search = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, approving_server.__file__, str(folder), database],
        env={**os.environ, "PYTHONPATH": search},
    )


async def posted(folder, process, body):
    """(status, answer) of a request to the server, once it runs."""
    while not (folder / "url").exists():
        assert process.poll() is None
        await asyncio.sleep(0.02)
    async with (
        aiohttp.ClientSession() as http,
        http.post((folder / "url").read_text() + "/v1/responses", json=body) as response,
    ):
        return response.status, await response.json()


@pytest.mark.parametrize("kept", [False, True])
async def test_a_killed_server_makes_no_call_again(tmp_path, kept):
    """It is killed while the call runs. Without --database the approval is unknown to the next one."""
    database = str(tmp_path / "kept.db") if kept else ""
    log = tmp_path / "calls"
    process = serve(tmp_path, database)
    try:
        _, first = await posted(tmp_path, process, {"input": "Go.", "tools": [TOOL]})
        request = first["output"][-1]
        body = {"input": [request, yes(request)], "tools": [TOOL]}
        running = asyncio.ensure_future(posted(tmp_path, process, body))
        while not log.exists():
            await asyncio.sleep(0.02)
        process.kill()
        process.wait()
        with suppress(aiohttp.ClientError):
            await running
        (tmp_path / "gate").touch()
        process = serve(tmp_path, database)
        bodies = [body] + [
            {"input": [yes(request)], "previous_response_id": first["id"], "tools": [TOOL]}
        ] * kept
        for each in bodies:
            status, answer = await posted(tmp_path, process, each)
            if kept:
                assert (
                    status == 409 and "nothing is known of its result" in answer["error"]["message"]
                ), answer
            else:
                assert (status, answer["error"]["code"]) == (400, "unknown_approval")
        assert len(log.read_text().splitlines()) == 1
    finally:
        process.kill()
        process.wait()


async def test_without_a_row_no_call_begins(tmp_path, monkeypatch):
    async with tool_place(tmp_path, PICK, "It is red.", allowed=(), database=str(tmp_path / "kept.db")) as at:
        _, body = await asked(at, "items")

        def full(*arguments, **named):
            raise RequestError("the disk is full", status=507, code="no_room")

        with monkeypatch.context() as patch:
            patch.setattr(approvals, "begin", full)
            status, _, answer = await at.post("/v1/responses", body)
        assert status == 507 and not at.called, answer
        status, _, answer = await at.post("/v1/responses", body)
        assert status == 200 and len(at.called) == 1


async def test_only_ids_that_the_server_made_are_known(tmp_path):
    """Another digit anywhere, another server's, or one that was made up."""
    rng = random.Random(5)
    async with tool_place(tmp_path, PICK, "It is red.", allowed=()) as at:
        request, body = await asked(at, "items")
        name = request["id"]
        assert AN_ID.fullmatch(name)
        names = [
            "mcpr_x",
            "x",
            name + "0",
            name[:-1],
            name.upper(),
            name.replace("mcpr_", "mcp_"),
            "mcpr_" + "0" * 53,
        ]
        for _ in range(40):
            place = rng.randrange(5, len(name))
            names.append(
                name[:place]
                + rng.choice([c for c in "0123456789abcdef" if c != name[place]])
                + name[place + 1 :]
            )
        for each in names:
            made_up = {**request, "id": each}
            status, headers, answer = await at.post(
                "/v1/responses", {"input": [made_up, yes(made_up)], "tools": [TOOL]}
            )
            assert (status, answer["error"]["code"]) == (400, "unknown_approval"), (each, answer)
        assert not at.called
        assert (await at.post("/v1/responses", body))[0] == 200


def test_an_id_says_until_when_it_counts():
    key, other = "0a" * 32, "0b" * 32
    name = approval_id(ApprovalMark(key, 1_800_000_000), "f" * 24, "0123456789abcdef")
    assert (
        until_of(name, key) == 1_800_000_000
        and until_of(name, other) is None
        and digest_in(name) == "0123456789abcdef"
    )


async def test_old_approvals_are_unknown(tmp_path, monkeypatch):
    async with tool_place(tmp_path, PICK, "It is red.", allowed=()) as at:
        monkeypatch.setattr("chatlm.front.annexes.tools.approvals.now_s", lambda: 1_000_000_000)
        _, body = await asked(at, "items")
        status, _, answer = await at.post("/v1/responses", body)
        assert (status, answer["error"]["code"]) == (400, "unknown_approval") and not at.called


async def test_what_is_forgotten_is_unknown():
    """Memory holds only so many uses."""
    uses = NotedUses(most=100)
    rng = random.Random(9)
    untils = [*range(1000, 1400)]
    rng.shuffle(untils)
    for until in untils:
        assert await uses.begin("a", "", str(until), Use(500, ""), until) is None
        for each in untils[: untils.index(until) + 1]:
            assert await uses.find("a", "", str(each)) or not uses.may_be_known(each)
        assert len(uses.noted) <= 100
    assert uses.may_be_known(1399 + 1)


async def test_rows_go_once_their_approvals_are_refused_anyway(tmp_path):
    store = await open_store(Settings(database=str(tmp_path / "kept.db")))
    try:
        for number in range(5):
            assert (
                await store.run(
                    lambda connection: approvals.begin(
                        connection, "me", str(number), Use(1, ""), 100 + number
                    )
                )
                is None
            )
        assert await store.run(
            lambda connection: approvals.begin(connection, "me", "3", Use(2, ""), 103)
        ) == Use(1, "")
        assert (
            await store.run(lambda connection: approvals.begin(connection, "you", "3", Use(2, ""), 103))
            is None
        )
        await store.run(lambda connection: approvals.end(connection, "me", "3", Use(1, "", 7, True, "x")))
        await store.run(lambda connection: approvals.purge(connection, 103))
        names = await store.run(
            lambda connection: connection.execute(
                "SELECT owner, name FROM approvals ORDER BY 1, 2"
            ).fetchall()
        )
        assert names == [("me", "3"), ("me", "4"), ("you", "3")]
        assert await store.run(lambda connection: approvals.use_of(connection, "me", "3")) == Use(
            1, "", 7, True, "x"
        )
        assert await store.run(approvals.secret) == await store.run(approvals.secret)
    finally:
        await store.close()
