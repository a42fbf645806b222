"""Tools under attack: keys against each other, many calls at once, servers that die or change under calls, a file that is replaced."""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

import fake_tools
import real_server
from chatlm.front.tools.config import configs_in
from chatlm.front.tools.server import ServerState
from chatlm.front.tools.toolbox import CALLS_OF_A_CLIENT, Toolbox

PROGRAM = {"command": sys.executable, "args": [fake_tools.__file__]}


@asynccontextmanager
async def opened(program=PROGRAM):
    box = Toolbox(configs_in({"mcpServers": {"fake": program}}, "test", os.environ), 20, 16_384)
    box.start()
    await box.refresh()
    try:
        yield box
    finally:
        await box.close()


def begun(box, tool, client="me", **arguments):
    return asyncio.ensure_future(box.call(box.offered()[f"fake__{tool}"], arguments, client))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def all_running(box, path):
    """As many calls as a client may have at once, all waiting for a file."""
    calls = [begun(box, "slow", path=str(path)) for _ in range(CALLS_OF_A_CLIENT)]
    await until(lambda: box.limits.running["me"] == CALLS_OF_A_CLIENT)
    return calls


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


async def test_a_call_that_was_given_up_while_it_waited_never_runs(tmp_path):
    async with opened() as box:
        slow = await all_running(box, tmp_path / "there")
        waiting = [begun(box, "count", path=str(tmp_path / "calls")) for _ in range(20)]
        await asyncio.sleep(0)
        for call in waiting[:15]:
            call.cancel()
        (tmp_path / "there").touch()
        await asyncio.gather(*slow, *waiting, return_exceptions=True)
        assert lines(tmp_path / "calls") == 5 and not box.limits.running and not len(box.limits.waiting)


async def test_a_server_that_dies_fails_each_of_its_calls_once(tmp_path):
    """Those under way have an unknown outcome. Those that waited run at most once, and say whether they did."""
    async with opened() as box:
        [server] = box.servers
        slow = await all_running(box, tmp_path / "never")
        waiting = [begun(box, "count", path=str(tmp_path / "calls")) for _ in range(12)]
        server.client.transport.process.send_signal(signal.SIGKILL)
        assert all("the outcome is unknown" in result.text for result in await asyncio.gather(*slow))
        texts = [result.text for result in await asyncio.gather(*waiting)]
        assert {text for text in texts if text != "counted"} <= {text for text in texts if "not running" in text or "outcome is unknown" in text}
        assert texts.count("counted") <= lines(tmp_path / "calls") <= sum("not running" not in text for text in texts)
        await until(lambda: server.state is ServerState.READY)
        assert (await begun(box, "add", a=1, b=1)).text == "2" and not box.limits.running


async def test_a_tool_that_changes_while_its_call_waits_is_not_run(tmp_path):
    """The reader approved of another description."""
    faults = tmp_path / "faults"
    faults.write_text("[]")
    start = f"import json, sys; sys.path.insert(0, {str(Path(fake_tools.__file__).parent)!r}); import fake_tools; fake_tools.by_stdio(json.load(open({str(faults)!r})))"
    async with opened({"command": sys.executable, "args": ["-c", start]}) as box:
        [server] = box.servers
        approved = box.offered()["fake__count"]
        slow = await all_running(box, tmp_path / "there")
        faults.write_text('["changed"]')
        server.client.transport.process.send_signal(signal.SIGKILL)
        await asyncio.gather(*slow)
        await until(lambda: server.state is ServerState.READY)
        result = await box.call(approved, {"path": str(tmp_path / "calls")}, "me")
        assert result.is_error and "describes count differently now" in result.text and not lines(tmp_path / "calls")
        assert (await begun(box, "count", path=str(tmp_path / "calls"))).text == "counted"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture(scope="module")
def url(place, nanochat_fixtures):
    config = place / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"fake": PROGRAM, "other": PROGRAM}}))
    keys = place / "keys.txt"
    keys.write_text("ann: key-ann tools=*\nben: key-ben tools=fake\n")
    flags = "--mcp-config", config, "--api-key-file", keys, "--kv-cache-memory", "4M", "--max-batch", "2"
    with real_server.server(nanochat_fixtures / "gen5", *flags) as (_, url):
        yield url


def by(key):
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer key-{key}"})


async def call(client, url, name, arguments, stream=False, **headers):
    async with client.post(url + "/v1/tools/call", json={"name": name, "arguments": arguments, "stream": stream}, headers=headers) as response:
        assert response.status == 200, await response.text()
        if not stream:
            return (await response.json())["text"]
        return json.loads((await response.text()).strip().rpartition("data: ")[2])["text"]


async def test_a_hundred_calls_at_once_get_their_own_results(url):
    """Of two keys, whole and streamed."""
    async with by("ann") as ann, by("ben") as ben:
        await ann.get(url + "/v1/tools")
        numbers = range(100)
        found = await asyncio.gather(*(call((ann, ben)[number % 2], url, "fake__add", {"a": number, "b": 1000 * number}, number % 3 == 0) for number in numbers))
        assert found == [str(1001 * number) for number in numbers]


async def test_a_key_neither_stops_nor_holds_up_nor_reads_another_s_calls(url, place):
    path = place / "there"
    async with by("ann") as ann, by("ben") as ben:
        async with ann.post(url + "/v1/tools/call", json={"name": "fake__slow", "arguments": {"path": str(path)}, "stream": True}, headers={"X-Request-Id": "anns"}) as running:
            await running.content.readany()
            more = [asyncio.ensure_future(call(ann, url, "other__slow", {"path": str(path)})) for _ in range(30)]
            for method, route in (("POST", "/v1/cancel/anns"), ("GET", "/v1/streams/anns"), ("POST", f"/v1/cancel/{running.headers['X-Request-Id']}")):
                async with ben.request(method, url + route) as response:
                    assert response.status in (403, 404), (route, await response.text())
            assert await call(ben, url, "fake__add", {"a": 1, "b": 2}) == "3" and not any(one.done() for one in more)
            async with ben.post(url + "/v1/tools/call", json={"name": "other__add", "arguments": {"a": 1, "b": 2}}) as response:
                assert response.status == 403
            path.touch()
            assert "it is there" in (await running.text()) and {*await asyncio.gather(*more)} == {"it is there"}


async def test_a_replaced_file_counts_at_the_next_start(url, place):
    """Running calls go on, and the tools stay those of the start, whatever the file says now."""
    config, path = place / "mcp.json", place / "replaced"
    async with by("ann") as ann:
        before = await (await ann.get(url + "/v1/tools")).json()
        async with ann.post(url + "/v1/tools/call", json={"name": "fake__slow", "arguments": {"path": str(path)}, "stream": True}) as running:
            await running.content.readany()
            for text in ("{not json", json.dumps({"mcpServers": {"evil": {"command": "sh"}}}), None):
                config.write_text(text) if text else config.unlink()
                assert await (await ann.get(url + "/v1/tools")).json() == before
            path.touch()
            assert "it is there" in await running.text()
