"""While a tool runs, in every API: who ends its call, and what tells a client that it waits."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from chatlm.front.server import streams
from tool_rounds import calls, tool_place

QUESTION = "2 + 3?"


@dataclass(frozen=True)
class Api:
    path: str
    body: dict
    called: bytes       # of a stream, once its tool runs
    pings: bytes        # two in a row
    end: bytes          # of a stream
    failure: str        # type of a stream's last event, after an error


RESPONSES = Api(
    "/v1/responses",
    {"input": QUESTION, "tools": [{"type": "mcp", "server_label": "fake", "require_approval": "never"}]},
    b"mcp_call_arguments.done", b": ping\n\n: ping", b"response.completed", "response.failed")
MESSAGES = Api(
    "/v1/messages",
    {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 100,
     "mcp_servers": [{"type": "url", "name": "fake", "url": ""}]},
    b"content_block_stop", b'"ping"}\n\nevent: ping', b"message_stop", "error")
every_api = pytest.mark.parametrize("api", [RESPONSES, MESSAGES], ids=lambda api: api.path)
streamed_or_not = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture
def gate(tmp_path):
    """The file that the tool waits for."""
    return tmp_path / "gate"


def waiting_place(gate):
    return tool_place(gate.parent, calls(("fake__slow", {"path": str(gate)})), "Done.")


async def asked(at, api, stream, **headers):
    """(status, text) of an answer."""
    body = api.body | {"stream": stream}
    async with at.http.post(at.url + api.path, json=body, headers=headers) as response:
        return response.status, await response.text()


async def until_cancelled(at, gate):
    while not Path(f"{gate}.cancelled").exists():
        await at.http.get(at.url + "/v1/models")


@every_api
@streamed_or_not
async def test_cancelling_ends_a_call(api, stream, gate):
    mine = {"X-Request-Id": "mine"}
    async with waiting_place(gate) as at:
        asking = asyncio.ensure_future(asked(at, api, stream, **mine))
        await at.until_called(1)
        _, headers, _ = await at.post("/v1/responses", {"input": "x"}, **mine)
        assert headers["X-Request-Id"] != "mine"    # its id is in use while the tool runs
        assert (await at.post("/v1/cancel/mine", {}))[2] == {"id": "mine", "cancelled": True}
        status, text = await asking
        await until_cancelled(at, gate)
        assert (await at.post("/v1/cancel/mine", {}))[0] == 404
    if stream:
        text = text.rpartition("data: ")[2]
        assert status == 200 and json.loads(text)["type"] == api.failure
    else:
        assert status >= 400
    assert "cancelled" in text
    assert [request.messages[-1].content for request in at.pool.requests] == [QUESTION, "x"]


@every_api
@streamed_or_not
async def test_a_client_that_leaves_ends_its_calls(api, stream, gate):
    async with waiting_place(gate) as at:
        asking = asyncio.ensure_future(asked(at, api, stream))
        await at.until_called(1)
        asking.cancel()
        await until_cancelled(at, gate)
        await at.pool.until_open(0)
    assert len(at.pool.requests) == 1 and at.pool.in_rounds == 0


@every_api
async def test_pings_come_while_a_tool_runs(api, gate, monkeypatch):
    monkeypatch.setattr(streams, "PING_S", 0.01)
    async with waiting_place(gate) as at:
        async with at.http.post(at.url + api.path, json=api.body | {"stream": True}) as response:
            await response.content.readuntil(api.called)
            await response.content.readuntil(api.pings)
            gate.touch()
            assert api.end in await response.read()


@pytest.mark.parametrize("path, body", [
    (RESPONSES.path, RESPONSES.body), (MESSAGES.path, MESSAGES.body),
    (MESSAGES.path + "/count_tokens", MESSAGES.body)])
async def test_pages_of_others_can_use_no_tool(path, body, tmp_path):
    async with tool_place(tmp_path, "Hello.", cors_origin=("*",)) as at:
        status, _, answer = await at.post(path, body, Origin="https://elsewhere.example")
    assert status == 403 and "another origin" in answer["error"]["message"]
