"""Tool servers that mean harm, as programs and behind URLs: each can break only itself."""

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import fake_tools
import hostile_tools
from chatlm.common.jsontext import strict_json
from chatlm.front.tools import client as clients, offers, reading, server as servers
from chatlm.front.tools.config import configs_in
from chatlm.front.tools.server import ServerState
from chatlm.front.tools.toolbox import Toolbox

PROGRAM = str(Path(hostile_tools.__file__))
WAYS = ["program", "url"]


def hostile(*attacks):
    return {"command": sys.executable, "args": [PROGRAM, *attacks]}


@asynccontextmanager
async def opened(timeout_s=30, **table):
    box = Toolbox(configs_in({"mcpServers": table}, "test", os.environ), timeout_s, 16_384)
    box.start()
    await box.refresh()
    try:
        yield box
    finally:
        await box.close()


@asynccontextmanager
async def attacked(way, *attacks, timeout_s=30, good=None):
    """A toolbox with a hostile server `bad` and a good one `good`, a program unless it is given."""
    server = hostile_tools.at_url(*attacks) if way == "url" else None
    bad = {"url": server.url} if server else hostile(*attacks)
    try:
        async with opened(timeout_s, bad=bad, good=good or hostile()) as box:
            yield box
    finally:
        if server:
            server.shutdown()


async def call(box, name, **arguments):
    return await box.call(box.offered()[name], arguments, "me")


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def reasons(box, label="bad"):
    return " ".join(box.notices(box.server(label)))


class LoopTurns:
    """The most work that the readers have done in one turn of the event loop."""

    def __init__(self, monkeypatch):
        self.bytes = self.messages = self.most_bytes = self.most_messages = 0
        self.total = 0
        take, read = reading.LineSplitter.take, reading.messages_in

        def counted_take(lines, part):
            self.bytes += len(part)
            self.total += len(part)
            return take(lines, part)

        def counted_read(data, methods, characters):
            self.messages += 1
            self.bytes += len(data)
            return read(data, methods, characters)

        monkeypatch.setattr(reading.LineSplitter, "take", counted_take)
        monkeypatch.setattr(reading, "messages_in", counted_read)

    async def watch(self):
        while True:
            self.most_bytes = max(self.most_bytes, self.bytes)
            self.most_messages = max(self.most_messages, self.messages)
            self.bytes = self.messages = 0
            await asyncio.sleep(0)


# what it writes is read in turns

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attack", hostile_tools.NOISE)
async def test_a_flood_takes_its_turns(way, attack, monkeypatch):
    """The answer after 2 MiB of noise arrives."""
    turns = LoopTurns(monkeypatch)
    watching = asyncio.ensure_future(turns.watch())
    try:
        async with attacked(way, attack, timeout_s=60) as box:
            result = await call(box, "bad__act", x=1)
            assert result.text == '{"x": 1}', result.text
            assert (await call(box, "good__act", y=2)).text == '{"y": 2}'
    finally:
        watching.cancel()
    assert turns.total > hostile_tools.NOISE_BYTES - 65_536
    assert turns.most_bytes <= 3 * reading.TURN_BYTES
    assert turns.most_messages <= 2 * reading.TURN_BYTES // reading.MESSAGE_WORTH


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attack", ["heavy-result", "heavy-text"])
async def test_large_messages_are_read_outside_the_event_loop(way, attack, monkeypatch):
    turns = LoopTurns(monkeypatch)
    watching = asyncio.ensure_future(turns.watch())
    try:
        async with attacked(way, attack) as box:
            result = await call(box, "bad__act")
            assert not result.is_error and len(result.text) < 17_000
    finally:
        watching.cancel()
    assert turns.most_bytes <= 3 * reading.TURN_BYTES


async def test_an_event_that_trickles_in_is_searched_once(monkeypatch):
    """As `notifications` above, but each byte is a chunk of its own."""
    turns = LoopTurns(monkeypatch)
    async with attacked("url", "trickle") as box:
        assert (await call(box, "bad__act", x=1)).text == '{"x": 1}'
    assert turns.total < 2 * hostile_tools.TRICKLE_BYTES


def test_lines_are_cut_wherever_parts_end():
    data = b"a\r\n\r\nbc\rd\n\n\rlong" + b"x" * 100 + b"\n"
    whole = reading.LineSplitter(1000, reading.EVENT_LINE_ENDS).take(data)
    for size in range(1, 20):
        lines = reading.LineSplitter(1000, reading.EVENT_LINE_ENDS)
        parts = [data[begin:begin + size] for begin in range(0, len(data), size)]
        assert [line for part in parts for line in lines.take(part)] == whole
    assert whole[:6] == [b"a", b"", b"bc", b"d", b"", b""]


def test_a_line_that_is_too_long_is_refused_before_it_ends():
    lines = reading.LineSplitter(100)
    assert lines.take(b"x" * 100) == [] and lines.rest == b"x" * 100
    with pytest.raises(reading.LineTooLong):
        lines.take(b"x")
    with pytest.raises(reading.LineTooLong):
        reading.LineSplitter(100).take(b"x" * 101 + b"\n")


async def test_what_is_compressed_is_not_inflated():
    async with attacked("url", "bomb") as box:
        result = await call(box, "bad__act")
        assert result.is_error and "compressed" in result.text


async def test_the_log_of_a_program_takes_its_turns():
    async with attacked("program", "stderr-flood") as box:
        assert (await call(box, "bad__act", x=1)).text == '{"x": 1}'


# lists

@pytest.mark.parametrize("way", WAYS)
async def test_a_list_has_one_budget(way):
    """Six pages of 4 MiB with one tool each that is too large, and a good one."""
    async with attacked(way, "heavy-pages") as box:
        await until(lambda: box.server("bad").state is not ServerState.STARTING)
        assert [*box.offered()] == ["bad__act", "good__act"]
        assert "6 tools are left out (heavy0, " in reasons(box) and "65,536 bytes" in reasons(box)


@pytest.mark.parametrize("attack, words", [
    ("deep-schema", "nested more than 100 deep"), ("heavy-schema", "65,536 bytes"),
    ("not-a-number", "a number that JSON does not have"), ("infinite", "a number that JSON does not have"),
    ("long-description", "65,536 bytes"), ("odd-texts", "some that can't be shown")])
async def test_a_tool_that_can_t_be_offered_is_left_out_alone(attack, words):
    async with attacked("program", attack) as box:
        assert {"bad__act", "good__act"} <= {*box.offered()} and words in reasons(box), reasons(box)
        assert (await call(box, "bad__act", x=1)).text == '{"x": 1}'


@pytest.mark.parametrize("attack", ["deep-annotations", "infinite-literal", "infinite-ttl", "huge-ttl",
                                    "odd-ttl", "odd-schemas", "odd-texts"])
async def test_odd_lists_are_read(attack):
    """What is offered can be written as JSON that everybody reads."""
    async with attacked("program", attack) as box:
        assert box.server("bad").state is ServerState.READY
        for tool in box.offered().values():
            strict_json([tool.function, tool.tool.annotations])
            json.loads(tool.with_members({"ask": tool.ask}), parse_constant=pytest.fail)


async def test_a_list_s_pages_have_one_time_limit(monkeypatch):
    monkeypatch.setattr(servers, "OPEN_S", 0.5)
    async with attacked("program", "slow-pages") as box:
        bad = box.server("bad")
        await until(lambda: bad.state is ServerState.FAILED)
        assert "did not answer within 0.5 s" in bad.reason


async def test_a_list_that_nobody_can_read_fails_its_server_alone():
    async with attacked("program", "unreadably-deep-schema") as box:
        assert [*box.offered()] == ["good__act"]
        assert "nested too deeply" in box.server("bad").reason


async def test_a_server_that_never_takes_the_greeting_is_not_starting_for_ever(monkeypatch):
    monkeypatch.setattr(servers, "OPEN_S", 3.0)
    good = hostile_tools.at_url()       # no process, which might start too late
    async with attacked("url", "hangs-at-notifications/initialized", good={"url": good.url}) as box:
        assert box.server("bad").state is ServerState.FAILED and [*box.offered()] == ["good__act"]
    good.shutdown()


async def test_an_error_of_ours_is_not_starting_for_ever(monkeypatch):
    monkeypatch.setattr(clients.Tool, "of", lambda packed: 1 / 0)
    async with attacked("program") as box:
        assert "chat_server failed at it (ZeroDivisionError)" in box.server("bad").reason


async def test_nobody_waits_for_servers_that_are_not_named(monkeypatch):
    async with opened(bad=hostile(), good=hostile()) as box:
        bad = box.server("bad")
        bad.state = ServerState.STARTING
        bad.started_s += 1000
        await asyncio.wait_for(box.refresh({"good"}), 20)
        waiting = asyncio.ensure_future(box.refresh())
        await asyncio.sleep(0)
        await box.refresh({"good"})
        assert not waiting.done()
        bad.state = ServerState.READY
        waiting.cancel()


async def test_a_server_that_starts_slowly_is_waited_for_once():
    """FIRST_LIST_S after its start it is shown as starting at once."""
    async with opened(good=hostile()) as box:
        [server] = box.servers
        server.state = ServerState.STARTING
        server.started_s -= servers.FIRST_LIST_S
        await asyncio.wait_for(server.settled(), 5)
        server.state = ServerState.READY


async def test_calls_that_are_given_up_leave_a_url_usable(monkeypatch):
    """Nothing answers the notifications that say so."""
    monkeypatch.setattr(clients, "NOTIFY_S", 0.2)
    server = hostile_tools.at_url("hangs-at-notifications/cancelled", "mute")
    async with opened(bad={"url": server.url}) as box:
        offered = box.offered()["bad__act"]
        for number in range(1, 71):
            calling = asyncio.ensure_future(box.call(offered, {"mute": True}, "me"))
            await until(lambda: server.seen.count("tools/call") == number)
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
        assert (await call(box, "bad__act", x=1)).text == '{"x": 1}'
    server.shutdown()


# shares

@pytest.mark.parametrize("attack", ["many-small", "long-description"])
async def test_no_server_takes_the_tools_of_later_ones_away(attack):
    async with opened(a=hostile(attack), b=hostile(), c=hostile(attack), d=hostile()) as box:
        names = [*box.offered()]
        assert {"a__act", "b__act", "c__act", "d__act"} <= {*names}
        if attack == "many-small":
            assert len(names) == 128
            assert sum(name.startswith("a__") for name in names) == 63
            assert "936 tools are left out" in reasons(box, "a") and "at most 128" in reasons(box, "a")
        assert not box.notices(box.server("b"))


def test_shares_go_to_those_who_want_less_first():
    assert offers.shares([999, 3, 999, 0], 128) == [62, 3, 63, 0]
    assert offers.shares([1, 2, 3], 128) == [1, 2, 3]
    assert offers.shares([], 5) == [] and offers.shares([9, 9], 3) == [1, 2]


async def test_what_is_offered_is_computed_when_a_list_changes(monkeypatch):
    async with opened(good=hostile("many-small")) as box:
        before = box.offered()
        monkeypatch.setattr(offers, "as_json", pytest.fail)
        monkeypatch.setattr(offers, "dump", pytest.fail)
        after = box.offered()
        assert [*before] == [*after] and all(after[name] is before[name] for name in before)
        assert {tool.digest for tool in after.values()}


# results

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attack, words", [
    ("deep-result", "nested too deeply"),
    ("nan-result", "NaN or Infinity"), ("infinite-result", "NaN or Infinity"), ("digits", "too long")])
async def test_results_that_are_no_json_are_refused(way, attack, words):
    """At once: nobody waits for the time limit of a call."""
    async with attacked(way, attack) as box:
        result = await call(box, "bad__act")
        assert result.is_error and words in result.text, result.text
        assert (await call(box, "good__act", y=2)).text == '{"y": 2}'


# texts of exceptions

@pytest.mark.parametrize("attack", ["no-http", "bad-length", "bad-chunks", "breaks-off", "redirects-away",
                                    "redirects-for-ever", "nobody", "no-host", "no-tls", "echoes",
                                    "echoes-calls"])
async def test_a_token_in_a_url_is_never_shown(attack, caplog, monkeypatch):
    """A server without TLS waits for the end of a line, which not each greeting of TLS has."""
    monkeypatch.setattr(servers, "OPEN_S", 3.0)
    caplog.set_level("DEBUG", "chat_server")
    server = hostile_tools.at_url(attack)
    url = server.url + "/t0ken-in-path-of-it?key=t0ken%20x"
    if attack == "nobody":
        server.shutdown()
        server.server_close()
    elif attack == "no-host":
        url = "http://no-such-host.invalid/t0ken"
    elif attack == "no-tls":
        url = url.replace("http:", "https:")
    async with opened(bad={"url": url, "headers": {"X-Key": "Bearer t0ken-in-header"}}) as box:
        [bad] = box.servers
        said = bad.reason
        if bad.state is ServerState.READY:
            said += (await call(box, "bad__act")).text
        assert said, "it says why"
        for text in (said, caplog.text):
            assert "t0ken" not in text and "theirs" not in text and "pw" not in text.split(), text
    server.shutdown()


async def test_secrets_of_variables_are_not_shown():
    program = hostile("echoes") | {"env": {"MY_API_KEY": "t0ken-of-it", "PLACE": "/data/projects"}}
    async with opened(bad=program) as box:
        reason = box.servers[0].reason
        assert "t0ken" not in reason and "***" in reason and "/data/projects" in reason


async def test_a_list_that_is_asked_for_again_is_not_waited_for_long(monkeypatch):
    """The old one is offered meanwhile, and only who named the server waits at all."""
    monkeypatch.setattr(servers, "LEAST_LIST_S", 0.0)
    monkeypatch.setattr(servers, "RELIST_S", 0.05)
    program = {"command": sys.executable, "args": [fake_tools.__file__]}  # of the revision that lists again
    async with opened(fake=program, good=hostile()) as box:
        server = box.server("fake")
        assert server.client.is_modern
        asked = asyncio.Event()

        async def never(timeout_s):
            asked.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(server.client, "list_tools", never)
        before = server.relisting
        await box.refresh({"good"})
        assert server.relisting is before and not asked.is_set()
        await asyncio.wait_for(box.refresh(), 20)
        await asked.wait()
        assert "fake__add" in box.offered()
        assert (await call(box, "fake__add", a=1, b=2)).text == "3"


async def test_a_list_that_has_changed_is_offered(monkeypatch):
    monkeypatch.setattr(servers, "LEAST_LIST_S", 0.0)
    async with opened(fake={"command": sys.executable, "args": [fake_tools.__file__]}) as box:
        server = box.server("fake")
        before, lists = box.offered(), server.lists
        await box.refresh()
        await server.relisting
        assert server.lists == lists and box.offered()["fake__add"] is before["fake__add"]
