"""GET /v1/tools and POST /v1/tools/call while tool servers and clients mean harm."""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import pytest

import fake_tools
import hostile_tools
from chatlm.common.config import LIMITS, Settings
from chatlm.front.annexes.tools import routes as tooling
from chatlm.front.annexes.tools.limits import MOST_CALL_BYTES
from fake_pool import FakePool, serving
from patching import patch


def program(*attacks, file=hostile_tools.__file__):
    return {"command": sys.executable, "args": [str(Path(file)), *attacks]}


def settings(folder, **servers):
    path = folder / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    return Settings(mcp_config=str(path))


async def get(client, url):
    async with client.get(url) as response:
        assert response.status == 200, await response.text()
        return json.loads(await response.read(), parse_constant=pytest.fail)


@pytest.mark.parametrize("attack", [attack for attack in hostile_tools.LISTS
                                    if attack not in ("heavy-pages", "slow-pages")])
async def test_the_list_is_whole_whatever_one_server_lists(attack, tmp_path):
    """The good server's tool is there, can be called, and the other one's state says what is missing."""
    configured = settings(tmp_path, bad=program(attack), good=program())
    async with serving(FakePool(), configured) as url, aiohttp.ClientSession() as client:
        found = await get(client, url + "/v1/tools")
        tools = {tool["name"]: tool for tool in found["data"]}
        assert "good__act" in tools and tools["good__act"]["parameters"] == {"type": "object"}
        states = {server["label"]: server for server in found["servers"]}
        assert states["good"]["state"] == "ready" and states["good"]["notices"] == []
        body = {"name": "good__act", "arguments": {"x": 1}, "digest": tools["good__act"]["digest"]}
        async with client.post(url + "/v1/tools/call", json=body) as response:
            assert (await response.json())["text"] == '{"x": 1}'


async def test_what_is_left_out_is_listed(tmp_path):
    configured = settings(tmp_path, bad=program("many-small"), deep=program("deep-schema"))
    async with serving(FakePool(), configured) as url, aiohttp.ClientSession() as client:
        found = await get(client, url + "/v1/tools")
        states = {server["label"]: server for server in found["servers"]}
        [many], [deep] = states["bad"]["notices"], states["deep"]["notices"]
        assert many.startswith("872 tools are left out (t126, ") and "at most 128" in many
        assert deep == "1 tool is left out (deep): its schema is nested more than 100 deep"


async def test_a_schema_that_breaks_its_check_is_marked_alone(tmp_path, monkeypatch):
    """Whatever it raises: an error of ours is said of that tool."""
    async def why_unenforced(function, tool_format, admission, lane=""):
        if function["name"] == "bad__act":
            raise TypeError("unhashable type: 'dict'")
        return ""

    patch(monkeypatch, tooling, "why_unenforced", why_unenforced)
    configured = settings(tmp_path, bad=program(), good=program())
    async with serving(FakePool(), configured) as url, aiohttp.ClientSession() as client:
        enforced = {tool["name"]: tool["enforced"] for tool in (await get(client, url + "/v1/tools"))["data"]}
        assert enforced == {"bad__act": "its schema can't be read", "good__act": True}


@pytest.mark.parametrize("item", ["[],", "{},", '"\\u00e9",', "1,"])
async def test_large_arguments_are_read_outside_the_event_loop(item, tmp_path, monkeypatch):
    """They reach the tool as they are."""
    patch(monkeypatch, tooling, "read_call", lambda raw: pytest.fail("it was read in the event loop"))
    items = (item * ((MOST_CALL_BYTES - 200) // len(item)))[:-1]
    path = tmp_path / "calls"
    body = f'{{"name": "fake__count", "arguments": {{"path": "{path}", "x": [{items}]}}, "extra": 1}}'
    configured = settings(tmp_path, fake=program("log", str(path), file=fake_tools.__file__))
    async with serving(FakePool(), configured) as url, aiohttp.ClientSession() as client:
        await get(client, url + "/v1/tools")
        headers = {"Content-Type": "application/json"}
        async with client.post(url + "/v1/tools/call", data=body, headers=headers) as response:
            assert (await response.json())["text"] == "counted"
            assert response.headers["X-Ignored-Fields"] == "extra"
        [_, arguments] = json.loads(path.read_text().splitlines()[0])
        assert arguments["x"] == json.loads(f"[{items}]")


@pytest.mark.parametrize("size", [10, LIMITS.inline_bytes + 10])
@pytest.mark.parametrize("arguments, words", [
    ('{"x": NaN}', "NaN"), ('{"x": [-Infinity]}', "NaN"), ('{"x": 1e999}', "NaN"), ("[]", "arguments"),
    ('{"x": %s}' % ("[" * 5000 + "]" * 5000), "nested too deeply"), ("{", "not valid JSON")])
async def test_arguments_that_are_no_json_are_refused(arguments, words, size, tmp_path):
    body = f'{{"name": "good__act", "pad": "{"x" * size}", "arguments": {arguments}}}'
    async with serving(FakePool(), settings(tmp_path, good=program())) as url, aiohttp.ClientSession() as client:
        await get(client, url + "/v1/tools")
        headers = {"Content-Type": "application/json"}
        async with client.post(url + "/v1/tools/call", data=body, headers=headers) as response:
            error = (await response.json())["error"]
            assert response.status == 400 and words in error["message"], error


async def test_a_list_does_not_wait_for_slow_checks(tmp_path, monkeypatch):
    """Of one server's schemas; others' are checked beside them."""
    async def why_unenforced(function, tool_format, admission, lane=""):
        if lane == "bad":
            await asyncio.Event().wait()
        return ""

    patch(monkeypatch, tooling, "why_unenforced", why_unenforced)
    patch(monkeypatch, tooling, "CHECK_S", 0.2)
    configured = settings(tmp_path, bad=program(), good=program())
    async with serving(FakePool(), configured) as url, aiohttp.ClientSession() as client:
        enforced = {tool["name"]: tool["enforced"] for tool in (await get(client, url + "/v1/tools"))["data"]}
        assert enforced == {"bad__act": "it has not been checked yet", "good__act": True}
