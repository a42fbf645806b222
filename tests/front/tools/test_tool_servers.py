"""Tool servers of two eras, as programs and over HTTP, well-behaved and not."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fake_http_tools
import fake_tools
from chatlm.front.tools import client as clients, server as servers, stdio
from chatlm.front.tools.config import configs_in
from chatlm.front.tools.server import ServerState
from chatlm.front.tools.rules import model_name
from chatlm.front.tools.toolbox import Toolbox

FAKE = str(Path(fake_tools.__file__))
REPOSITORY = Path(__file__).resolve().parents[3]


def toolbox(timeout_s=20, characters=16_384, **table):
    return Toolbox(configs_in({"mcpServers": table}, "test", os.environ), timeout_s, characters)


def program(*faults, **fields):
    return {"command": sys.executable, "args": [FAKE, *faults], **fields}


class Opened:
    """A toolbox in use."""

    def __init__(self, box):
        self.box = box

    async def __aenter__(self):
        self.box.start()
        await self.box.refresh()
        return self.box

    async def __aexit__(self, *error):
        await self.box.close()


def opened(*faults, timeout_s=20, characters=16_384, **fields):
    return Opened(toolbox(timeout_s, characters, fake=program(*faults, **fields)))


async def call(box, tool, client="me", report=None, **arguments):
    return await box.call(box.offered()[f"fake__{tool}"], arguments, client, report)


async def until(condition, seconds=20):
    """Wait for something that happens in another process."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it has not happened"
        await asyncio.sleep(0.01)


def is_running(process):
    """Whether a process runs, and is not only waiting to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("faults", [[], ["legacy"], ["banner"], ["wrong-ids"], ["twice"], ["two-pages"], ["legacy", "silent-to-discover"], ["stderr-flood"],
                                    ["legacy", "dies-at-discover"], ["odd-tools"], ["legacy", "changing"],
                                    ["modern", "slow-start"], ["legacy", "slow-start"]], ids="+".join)
async def test_tools_of_a_program_run(faults, monkeypatch):
    monkeypatch.setattr(clients, "PROBE_S", 1.0)
    async with opened(*faults) as box:
        await until(lambda: box.servers[0].state is ServerState.READY)
        assert (await call(box, "add", a=2, b=3)).text == "5"
        wrong = await call(box, "wrong")
        assert wrong.is_error and wrong.text == "it went wrong"
        assert box.servers[0].client.is_modern is ("legacy" not in faults)
        assert box.outcomes["fake", "ok"] == 1 and box.outcomes["fake", "error"] == 1


@pytest.mark.parametrize("faults, reason", [
    (["dies"], "no licence found"), (["endless-pages"], "more than 100 pages"), (["no-list"], "no list of tools")])
async def test_a_server_that_fails_says_why(faults, reason):
    async with opened(*faults) as box:
        assert box.servers[0].state is ServerState.FAILED and reason in box.servers[0].reason
        assert box.offered() == {}


async def test_a_cursor_that_comes_again_ends_the_list_and_is_told():
    async with opened("one-cursor") as box:
        [server] = box.servers
        assert [*box.offered()] == ["fake__add"] and server.state is ServerState.READY
        assert box.notices(server) == ["its list of tools has no end: a cursor came twice"]


async def test_a_server_that_says_nothing_fails(monkeypatch):
    monkeypatch.setattr(servers, "OPEN_S", 0.5)
    async with opened("silent") as box:
        assert box.servers[0].state is ServerState.FAILED and "did not answer within 0.5 s" in box.servers[0].reason


async def test_a_program_that_is_not_there_is_named():
    async with Opened(toolbox(fake={"command": "no-such-program"}, lost={"command": sys.executable, "cwd": "/nonexistent"})) as box:
        assert "no-such-program: No such file" in box.servers[0].reason and "/nonexistent: No such file" in box.servers[1].reason


async def test_a_dead_server_starts_again(tmp_path):
    async with opened() as box:
        [server] = box.servers
        server.client.transport.process.send_signal(signal.SIGKILL)
        await until(lambda: server.state is ServerState.FAILED)
        failed = await call_of_failed(box)
        assert failed.is_error and "not running" in failed.text
        await until(lambda: server.state is ServerState.READY)
        assert (await call(box, "add", a=1, b=1)).text == "2" and server.restarts == 1


async def call_of_failed(box):
    """A call of a tool that was offered before its server failed."""
    [server] = box.servers
    offered = next(iter(toolbox_names(box, server)))
    return await box.call(offered, {}, "me")


def toolbox_names(box, server):
    state, server.state = server.state, ServerState.READY
    offered = [*box.offered().values()]
    server.state = state
    return offered


async def test_a_server_that_dies_in_a_call_repeats_none(tmp_path):
    """Nobody knows whether the call was carried out, so the model is told so; only a tool that reads is asked again."""
    async with opened("dies-in-call") as box:
        result = await call(box, "count", path=str(tmp_path / "calls"))
        assert result.is_error and "the outcome is unknown" in result.text
        await until(lambda: box.servers[0].state is ServerState.READY)
        again = await call(box, "add", a=1, b=2)  # may be repeated, and dies again
        assert again.is_error and box.servers[0].restarts >= 1


async def test_a_call_has_a_time_limit():
    async with opened("no-answer", timeout_s=0.3) as box:
        result = await call(box, "count", path="/dev/null")
        assert result.is_error and "no answer within 0.3 s" in result.text and "unknown" in result.text


async def test_a_server_s_own_time_limit_counts():
    async with opened("no-answer", timeout_ms=200) as box:
        assert "within 0.2 s" in (await call(box, "add", a=1, b=2)).text


async def test_a_huge_line_fails_its_callers_at_once():
    async with opened("huge-line") as box:
        results = await asyncio.gather(*(call(box, "count", path="/dev/null") for _ in range(3)))
        assert all(result.is_error and "4,194,304 bytes" in result.text for result in results)


async def test_progress_is_reported_and_a_call_can_be_cancelled(tmp_path):
    heard = []
    async with opened() as box:
        path = tmp_path / "there"
        running = asyncio.ensure_future(call(box, "slow", report=lambda *news: heard.append(news), path=str(path)))
        await until(lambda: len(heard) > 2)
        running.cancel()
        await until(lambda: Path(f"{path}.cancelled").exists())
        assert heard[0][1:] == (None, "still waiting") and box.outcomes["fake", "cancelled"] == 1
        path.touch()
        assert (await call(box, "slow", path=str(path))).text == "it is there"


async def test_a_server_that_asks_back_is_refused():
    """It may ping us, ask our model or our user: it gets answers, and its result is an error."""
    async with opened("asks") as box:
        result = await call(box, "add", a=1, b=2)
        assert result.is_error and "wants to ask the user" in result.text


async def test_long_results_are_cut_in_the_middle():
    async with opened(characters=1000) as box:
        result = await call(box, "long", size=5000)
        assert result.cut == 5008 - 1000 and result.text.startswith("beginx") and result.text.endswith("xend")
        assert "4,008 characters are missing" in result.text
        assert (await call(box, "long", size=10)).cut == 0


async def test_pictures_are_kept_beside_the_text():
    async with opened() as box:
        result = await call(box, "picture")
        assert [picture.data for picture in result.pictures] == [fake_tools.PIXEL] and "one pixel" in result.text


async def test_a_program_gets_few_variables_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    monkeypatch.setenv("CHAT_SERVER_API_KEY", "key-secret")
    monkeypatch.setenv("MINE", "for the tool")
    async with opened(env={"GIVEN": "${MINE}"}) as box:
        variables = json.loads((await call(box, "show")).text)
        assert variables["GIVEN"] == "for the tool" and not {"HF_TOKEN", "CHAT_SERVER_API_KEY", "MINE"} & variables.keys()
        assert {*variables} - {"LC_CTYPE"} <= {*stdio.KEPT_VARIABLES, "GIVEN"}


async def test_no_secret_is_in_the_process_list():
    async with opened(env={"GIVEN": "very-secret"}):
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
        assert not [line for line in lines if b"very-secret" in line]


@pytest.mark.parametrize("faults", [[], ["stubborn"], ["grandchild"], ["stubborn", "grandchild"]], ids="+".join)
async def test_closing_ends_the_program_and_its_children(faults, tmp_path):
    """Also a child in a session of its own, and programs that ignore SIGTERM."""
    note = tmp_path / "grandchild"
    async with opened(*faults, str(note)) as box:
        guard = box.servers[0].client.transport.process.pid
        program_id = int(Path(f"/proc/{guard}/task/{guard}/children").read_text())
        if "grandchild" in faults:
            await until(lambda: note.exists() and note.read_text())
        started = [guard, program_id, *([int(note.read_text())] if note.exists() else [])]
    assert not [process for process in started if is_running(process)]


SERVED = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from chatlm.front.tools.config import configs_in
from chatlm.front.tools.toolbox import Toolbox

async def main():
    box = Toolbox(configs_in({"mcpServers": {"fake": {"command": sys.executable, "args": sys.argv[2:]}}}, "", os.environ), 20, 1000)
    box.start()
    await box.refresh()
    print(box.servers[0].client.transport.process.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("faults", [["grandchild"], ["stubborn", "grandchild"]], ids="+".join)
async def test_a_killed_front_leaves_no_process(faults, tmp_path):
    note = tmp_path / "grandchild"
    front = subprocess.Popen([sys.executable, "-c", SERVED, str(REPOSITORY), FAKE, *faults, str(note)], stdout=subprocess.PIPE, text=True)
    guard = int(front.stdout.readline())
    program_id = int(Path(f"/proc/{guard}/task/{guard}/children").read_text())
    await until(lambda: note.exists() and note.read_text())
    started = [guard, program_id, int(note.read_text())]
    assert all(map(is_running, started))
    front.kill()
    front.wait()
    front.stdout.close()
    await until(lambda: not any(map(is_running, started)))


async def test_a_killed_guard_takes_its_program_along(tmp_path):
    async with opened() as box:
        guard = box.servers[0].client.transport.process.pid
        program_id = int(Path(f"/proc/{guard}/task/{guard}/children").read_text())
        os.kill(guard, signal.SIGKILL)
        await until(lambda: not is_running(program_id))


async def test_calls_of_one_client_do_not_stop_others(tmp_path):
    """8 of a client run at once, the ninth waits; another client's call runs at once."""
    path = tmp_path / "there"
    async with opened() as box:
        slow = [asyncio.ensure_future(call(box, "slow", "greedy", path=str(path))) for _ in range(10)]
        await until(lambda: box.limits.running["greedy"] == 8)
        assert (await call(box, "add", "other", a=1, b=2)).text == "3"
        assert box.limits.running["greedy"] == 8 and not any(one.done() for one in slow)
        slow.pop().cancel()
        path.touch()
        assert {result.text for result in await asyncio.gather(*slow)} == {"it is there"}
        assert not box.limits.running


async def test_too_many_tools_are_left_out():
    async with opened("many") as box:
        assert 80 < len(box.offered()) <= 128
        assert sum(len(json.dumps(tool.function)) for tool in box.offered().values()) <= 256 << 10


async def test_names_suit_models_and_stay_distinct():
    async with opened("odd-tools") as box:
        names = [*box.offered()]
        assert names == sorted(names) and all(len(name) <= 64 and name.replace("_", "").replace("-", "").isalnum() for name in names)
        assert "fake__add" in names and "fake__schemaless" in names and "fake__bad-header" not in names
    assert model_name("a.b", "c") != model_name("a_b", "c") == "a_b__c"
    assert len(model_name("x" * 64, "y" * 200)) == 64 != len({model_name("x" * 64, "y" * 200), model_name("x" * 64, "y" * 199)})


async def test_another_description_is_another_digest():
    async with opened() as box, opened("changed") as changed:
        before = box.offered()["fake__add"].digest
        assert before != changed.offered()["fake__add"].digest and len(before) == 16


@pytest.mark.parametrize("fields, asked", [
    ({}, True), ({"alwaysAllow": ["add"]}, False), ({"autoApprove": ["*"]}, False), ({"alwaysAllow": ["other"]}, True), ({"trustReadOnly": True}, False)])
async def test_what_the_config_allows_is_not_asked_about(fields, asked):
    async with opened(**fields) as box:
        assert box.offered()["fake__add"].ask is asked
        assert box.offered()["fake__count"].ask is (fields != {"autoApprove": ["*"]})


async def test_hidden_tools_are_not_offered():
    async with opened(disabledTools=["add"]) as box:
        assert "fake__add" not in box.offered() and "fake__slow" in box.offered()


@pytest.mark.parametrize("faults", [[], ["legacy"], ["two-pages"]], ids="+".join)
async def test_tools_behind_a_url_run(faults):
    server, handler = fake_http_tools.http_server(*faults)
    async with Opened(toolbox(fake={"url": f"http://127.0.0.1:{server.server_port}/mcp", "headers": {"X-Mine": "yes"}})) as box:
        assert box.servers[0].state is ServerState.READY, box.servers[0].reason
        assert (await call(box, "add", a=2, b=3)).text == "5"
        method, headers = handler.seen[-1]
        assert method == "tools/call" and headers["X-Mine"] == "yes"
        if "legacy" in faults:
            assert headers["Mcp-Session-Id"] == "session-1" and headers["MCP-Protocol-Version"] == "2025-06-18"
        else:
            assert headers["MCP-Protocol-Version"] == "2026-07-28" and headers["Mcp-Method"] == "tools/call" and headers["Mcp-Name"] == "add"
    assert not handler.sessions
    server.shutdown()


async def test_a_lost_session_begins_again():
    server, handler = fake_http_tools.http_server("legacy")
    async with Opened(toolbox(fake={"url": f"http://127.0.0.1:{server.server_port}/mcp"})) as box:
        handler.sessions.clear()
        assert (await call(box, "count", path="/dev/null")).text == "counted"
        assert handler.begun == 2
    server.shutdown()


@pytest.mark.parametrize("faults, reason", [(["redirects"], "a redirect to http://127.0.0.1:9, which is not followed"), (["unauthorized"], "it wants a token")])
async def test_a_url_that_refuses_is_explained(faults, reason):
    server, handler = fake_http_tools.http_server(*faults)
    async with Opened(toolbox(fake={"url": f"http://127.0.0.1:{server.server_port}/mcp"})) as box:
        assert box.servers[0].state is ServerState.FAILED and reason in box.servers[0].reason
    server.shutdown()


async def test_endless_events_end():
    server, handler = fake_http_tools.http_server("endless-events")
    async with Opened(toolbox(timeout_s=2, fake={"url": f"http://127.0.0.1:{server.server_port}/mcp"})) as box:
        result = await call(box, "add", a=1, b=2)
        assert result.is_error and ("events have more than" in result.text or "no answer within" in result.text)
    server.shutdown()


async def test_a_url_that_is_not_there_comes_back():
    server, handler = fake_http_tools.http_server()
    port = server.server_port
    async with Opened(toolbox(fake={"url": f"http://127.0.0.1:{port}/mcp"})) as box:
        server.shutdown()
        server.server_close()
        handler.faults = ("gone",)  # for the connection that is still open
        assert "unknown" in (await call(box, "count", path="/dev/null")).text
        assert (await call(box, "count", path="/dev/null")).is_error
        await until(lambda: box.servers[0].state is ServerState.FAILED)
        handler.faults = ()
        again = fake_http_tools.ThreadingHTTPServer(("127.0.0.1", port), handler)
        fake_tools.threading.Thread(target=again.serve_forever, daemon=True).start()
        await until(lambda: box.servers[0].state is ServerState.READY)
        assert (await call(box, "add", a=1, b=2)).text == "3"
        again.shutdown()
