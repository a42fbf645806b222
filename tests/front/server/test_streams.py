"""Resumable streams: an answer that outlives its connection, over a pool without a model."""

import asyncio
import contextlib
import gc
import json
import random
import weakref
from dataclasses import replace

import aiohttp
import pytest

from aiohttp import web

from chatlm.common import config
from chatlm.common.config import LIMITS, ApiKey, Settings, read_api_keys
from chatlm.common.errors import Overloaded
from chatlm.front.api.dialects.messages import MessagesEncoder
from chatlm.front.api.dialects.native import NativeEncoder
from chatlm.front.api.dialects.ollama import OllamaEncoder
from chatlm.front.api.dialects.openai import OpenAIEncoder
from chatlm.front.api.dialects.responses import ResponsesEncoder
from chatlm.front.server import recordings as server_recordings
from chatlm.front.server.access import Access
from chatlm.front.server.recordings import Recording, Recordings
from fake_pool import FakePool, conversation, serving
from patching import patch

NATIVE, OPENAI = "/chat/completions", "/v1/chat/completions"
WORDS = ["one ", "two ", "three ", "four ", "five"]
RESUMABLE = conversation() | {"resumable": True, "stream": True}
pytestmark = pytest.mark.timeout(60)


class Turnstile(asyncio.Semaphore):
    """A gate of FakePool that passes as many pieces as the test says."""

    def __init__(self):
        super().__init__(0)
        self.wait = self.acquire

    def admit(self, count):
        for _ in range(count):
            self.release()


@pytest.fixture
async def front():
    """(pool, url) of the HTTP side; pool.gate decides how many pieces pass."""
    pool = FakePool(WORDS)
    pool.gate = Turnstile()
    async with serving(pool) as url:
        yield pool, url
        pool.gate.admit(100)


async def read(response, count):
    """The next `count` events of a stream as (id or None, parsed data)."""
    events, number = [], None
    while len(events) < count:
        line = (await response.content.readline()).decode()
        assert line, f"the stream ended after {len(events)} events"
        if line.startswith("id: "):
            number = int(line[4:])
        elif line.startswith("data: "):
            events.append((number, line[6:].strip() if line.startswith("data: [") else json.loads(line[6:])))
            number = None
    return events


async def read_all(response):
    return [(int(frame.split("\n")[0][4:]), frame.split("data: ", 1)[1])
            for frame in (await response.text()).lstrip().split("\n\n")
            if frame.startswith("id: ")]


def words(events):
    return "".join(json.loads(data).get("token", "") for _, data in events if data != "[DONE]")


async def test_events_have_ids_only_when_asked_for(client, front):
    pool, url = front
    pool.gate.admit(15)
    for path in (NATIVE, OPENAI):
        async with client.post(url + path, json=conversation() | {"stream": True}) as response:
            assert b"id:" not in (await response.read()).replace(b'"id":', b"")
    async with client.post(url + NATIVE, json=RESUMABLE) as response:
        events = await read_all(response)
    assert [number for number, _ in events] == list(range(6)) and words(events) == "".join(WORDS)


@pytest.mark.parametrize("path, first", [(NATIVE, 0), (OPENAI, 1)])     # OpenAI's event 0 is the role
@pytest.mark.parametrize("how", ["from", "Last-Event-ID", "both"])
async def test_a_lost_connection_is_taken_up_again(client, front, path, first, how):
    """The reader goes on where it was."""
    pool, url = front
    response = await client.post(url + path, json=RESUMABLE)
    pool.gate.admit(2)
    seen = await read(response, first + 2)
    assert [number for number, _ in seen] == list(range(first + 2))
    response.close()
    name, last = response.headers["X-Request-Id"], seen[-1][0]
    query = {"from": last + 1} if how == "from" else {"from": 0} if how == "both" else {}
    headers = {} if how == "from" else {"Last-Event-ID": str(last)}
    pool.gate.admit(1)
    async with client.get(f"{url}/v1/streams/{name}", params=query, headers=headers) as again:
        assert (again.headers["Content-Type"].startswith("text/event-stream")
                and again.headers["X-Accel-Buffering"] == "no")
        assert (await read(again, 1))[0][0] == last + 1         # it replays
        pool.gate.admit(2)
        rest = await read_all(again)                            # and follows
    assert [number for number, _ in rest] == list(range(last + 2, last + 2 + len(rest)))
    async with client.get(f"{url}/v1/streams/{name}") as whole:
        replayed = await read_all(whole)
    assert [number for number, _ in replayed] == list(range(len(replayed))) and replayed[-len(rest):] == rest
    assert pool.open == 0 and len(pool.requests) == 1
    if path == NATIVE:
        assert words(replayed) == "".join(WORDS) and json.loads(replayed[-1][1])["done"]
    else:
        assert replayed[-1][1] == "[DONE]"


async def test_several_readers_follow_one_answer(client, front):
    pool, url = front
    first = await client.post(url + NATIVE, json=RESUMABLE)
    others = [await client.get(f"{url}/v1/streams/{first.headers['X-Request-Id']}") for _ in range(3)]
    pool.gate.admit(5)
    read = [await read_all(response) for response in (first, *others)]
    assert words(read[0]) == "".join(WORDS) and read == [read[0]] * 4


async def test_a_reader_at_the_end_learns_of_the_end(client, front):
    pool, url = front
    pool.gate.admit(5)
    async with client.post(url + NATIVE, json=RESUMABLE) as response:
        count = len(await read_all(response))
    address = f"{url}/v1/streams/{response.headers['X-Request-Id']}"
    # EventSource gives up at 204
    assert (await client.get(address, headers={"Last-Event-ID": str(count - 1)})).status == 204
    assert (await client.get(address, params={"from": count})).status == 204


async def test_an_unread_answer_ends_after_the_grace(client, front, monkeypatch):
    """What it had stays."""
    patch(monkeypatch, server_recordings, "GRACE_S", 0.05)
    pool, url = front
    response = await client.post(url + NATIVE, json=RESUMABLE)
    pool.gate.admit(2)
    await read(response, 2)
    response.close()
    await pool.until_open(0)            # the gate admitted no more
    async with client.get(f"{url}/v1/streams/{response.headers['X-Request-Id']}") as again:
        events = await read_all(again)
    assert words(events[:-1]) == "one two " and json.loads(events[-1][1])["error"]["code"] == "cancelled"


async def test_a_reader_back_in_time_keeps_the_answer(client, front, monkeypatch):
    """The answer lives on."""
    patch(monkeypatch, server_recordings, "GRACE_S", 123)
    graces, pool, url = [], *front
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda s, act, *to: graces.append((act, to)) if s == 123 else
                        type(loop).call_later(loop, s, act, *to))
    response = await client.post(url + NATIVE, json=RESUMABLE)
    pool.gate.admit(1)
    await read(response, 1)
    response.close()
    while not graces:
        await asyncio.sleep(0.01)
    async with client.get(f"{url}/v1/streams/{response.headers['X-Request-Id']}") as again:
        await read(again, 1)
        (act, to), = graces
        act(*to)                        # its grace period is over
        pool.gate.admit(4)
        assert words(await read_all(again)) == "".join(WORDS[1:])


async def test_a_plain_stream_ends_with_its_connection(client, front):
    pool, url = front
    response = await client.post(url + NATIVE, json=conversation())
    pool.gate.admit(1)
    await read(response, 1)
    response.close()
    await pool.until_open(0)
    assert (await client.get(f"{url}/v1/streams/{response.headers['X-Request-Id']}")).status == 404


async def test_stop_works_after_the_connection_was_lost(client, front):
    pool, url = front
    response = await client.post(url + OPENAI, json=RESUMABLE)
    pool.gate.admit(1)
    name = json.loads(json.dumps((await read(response, 1))[0][1]))["id"]        # chatcmpl-...
    response.close()
    assert (await client.post(f"{url}/v1/cancel/{name}")).status == 200
    await pool.until_open(0)
    async with client.get(f"{url}/v1/streams/{name}") as again:
        assert "cancelled" in (await read_all(again))[-1][1]
    assert (await client.post(f"{url}/v1/cancel/{name}")).status == 404


async def test_what_the_pool_refuses_is_no_stream(client, front):
    pool, url = front
    pool.refuse = Overloaded("full", status=429)
    async with client.post(url + NATIVE, json=RESUMABLE) as response:
        assert response.status == 429
    assert (await client.get(f"{url}/v1/streams/{response.headers['X-Request-Id']}")).status == 404


@pytest.mark.parametrize("query, headers", [
    ({"from": "-1"}, {}), ({"from": "one"}, {}), ({"from": ""}, {}), ({"from": "9" * 5000}, {}),
    ({"from": "٣"}, {}),
    ({}, {"Last-Event-ID": "x"})])
async def test_a_position_that_is_none_is_400(client, front, query, headers):
    pool, url = front
    pool.gate.admit(5)
    response = await client.post(url + NATIVE, json=RESUMABLE)
    again = await client.get(f"{url}/v1/streams/{response.headers['X-Request-Id']}", params=query,
                             headers=headers)
    assert again.status == 400 and (await again.json())["error"]["code"] == "invalid_value"


@pytest.mark.parametrize("keys", [
    read_api_keys(("key-a", "key-b"), None),
    (ApiKey.hashed("key-a", "a", owner="team"), ApiKey.hashed("key-b", "owner team")),
    (ApiKey.hashed("key-a", "a", owner="team"), ApiKey.hashed("key-b", "team")),
    (ApiKey.hashed("key-a", "team"), ApiKey.hashed("key-b", "b", owner="team")),
    (ApiKey.hashed("key-a", "owner team"), ApiKey.hashed("key-b", "b", owner="team"))])
async def test_only_its_own_key_reads_a_stream(client, keys):
    """Nobody else stops it either."""
    pool = FakePool(WORDS)
    pool.gate = Turnstile()
    a, b = ({"Authorization": f"Bearer {key}"} for key in ("key-a", "key-b"))
    async with serving(pool, Settings(keys=keys)) as url:
        response = await client.post(url + NATIVE, json=RESUMABLE, headers=a)
        address, stop = (f"{url}/v1/{what}/{response.headers['X-Request-Id']}"
                         for what in ("streams", "cancel"))
        assert [(await client.get(address, headers=headers)).status for headers in ({}, b)] == [401, 404]
        assert [(await client.post(stop, headers=headers)).status for headers in ({}, b)] == [401, 404]
        pool.gate.admit(5)
        async with client.get(address, headers=a) as again:
            assert words(await read_all(again)) == "".join(WORDS)
        assert (await client.get(address, headers=b)).status == 404         # nor when it has ended


@pytest.mark.parametrize("name, status", [("ab" * 16, 200), ("my-chat", 404)])
async def test_without_keys_a_stream_s_id_is_enough(client, front, monkeypatch, name, status):
    """One that can be guessed belongs to its address."""
    pool, url = front
    pool.gate.admit(5)
    response = await client.post(url + NATIVE, json=RESUMABLE, headers={"X-Request-Id": name})
    assert response.headers["X-Request-Id"] == name
    monkeypatch.setattr(Access, "client_of", lambda self, http: "192.0.2.7")      # a phone in another network
    assert (await client.get(f"{url}/v1/streams/{name}")).status == status


async def test_a_kept_stream_keeps_its_id(client, front):
    """Its id is not given to another."""
    pool, url = front
    pool.gate.admit(10)
    headers = {"X-Request-Id": "twice"}
    first = await client.post(url + NATIVE, json=RESUMABLE, headers=headers)
    await read_all(first)
    second = await client.post(url + NATIVE, json=RESUMABLE, headers=headers)
    assert first.headers["X-Request-Id"] == "twice" != second.headers["X-Request-Id"]


async def test_the_oldest_kept_stream_goes_first(client, front, monkeypatch):
    """What is kept is bounded."""
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, recorded_bytes=20_000))
    pool, url = front
    names = []
    for _ in range(20):
        pool.gate.admit(5)
        async with client.post(url + NATIVE, json=RESUMABLE) as response:
            assert words(await read_all(response)) == "".join(WORDS)
            names.append(response.headers["X-Request-Id"])
    statuses = [(await client.get(f"{url}/v1/streams/{name}")).status for name in names]
    assert statuses == sorted(statuses, reverse=True) and {200, 404} == set(statuses)
    dice = random.Random(1)
    # a single answer that is too long: its beginning is dropped
    pool.pieces = [dice.randbytes(150).hex() for _ in range(140)]
    pool.gate.admit(140)
    async with client.post(url + NATIVE, json=RESUMABLE) as response:
        events = await read_all(response)
        assert len(events) == 141 or "no longer kept" in events[-1][1]
    gone = await client.get(f"{url}/v1/streams/{response.headers['X-Request-Id']}")
    assert gone.status == 410 and (await gone.json())["error"]["code"] == "gone"
    first = int((await gone.json())["error"]["message"].split()[3])
    async with client.get(f"{url}/v1/streams/{response.headers['X-Request-Id']}",
                          params={"from": first}) as rest:
        assert [number for number, _ in await read_all(rest)] == list(range(first, 141))


async def test_a_client_s_streams_push_out_no_others(client, monkeypatch):
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, recorded_bytes=20_000))
    pool, keys = FakePool(WORDS), read_api_keys(("key-a", "key-b"), None)
    a, b = ({"Authorization": f"Bearer {key}"} for key in ("key-a", "key-b"))
    async with serving(pool, Settings(keys=keys)) as url:
        async def record(headers):
            async with client.post(url + NATIVE, json=RESUMABLE, headers=headers) as response:
                await response.read()
                return response.headers["X-Request-Id"]

        async def kept(name, headers):
            return (await client.get(f"{url}/v1/streams/{name}", headers=headers)).status == 200

        mine = [await record(a) for _ in range(3)]
        theirs = [await record(b) for _ in range(30)]
        assert [await kept(name, b) for name in theirs[:10]] == [False] * 10 and await kept(theirs[-1], b)
        dice = random.Random(1)
        # more than may be kept, even of 64 together
        pool.pieces = [dice.randbytes(200).hex() for _ in range(140)]
        await record(b)
        assert [await kept(name, a) for name in mine] == [True] * 3 and not await kept(theirs[-1], b)


async def test_dropped_streams_leave_memory(client, front, monkeypatch):
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, recorded_bytes=8_000))
    pool, url = front
    made, make = [], server_recordings.Recording
    patch(monkeypatch, server_recordings, "Recording",
          lambda *whose: made.append(weakref.ref(recording := make(*whose))) or recording)
    gc.disable()                # and no reference cycles either
    try:
        for _ in range(30):
            pool.gate.admit(5)
            async with client.post(url + NATIVE, json=RESUMABLE) as response:
                await read_all(response)
    finally:
        gc.enable()
    alive = sum(recording() is not None for recording in made)
    assert (len(made) == 30
            and 0 < alive <= 8), f"{alive} recordings of at least 1,000 bytes, where 8,000 may be kept"


async def test_an_ended_answer_is_forgotten_in_time(client, front, monkeypatch):
    pool, url = front
    addresses = []
    for kept_s in (600.0, 0.0):
        patch(monkeypatch, server_recordings, "KEPT_S", kept_s)
        pool.gate.admit(5)
        async with client.post(url + NATIVE, json=RESUMABLE) as response:
            await read_all(response)
        addresses.append(f"{url}/v1/streams/{response.headers['X-Request-Id']}")
    while (await client.get(addresses[1])).status != 404:
        await asyncio.sleep(0.01)
    assert (await client.get(addresses[0])).status == 200


async def test_many_answers_share_what_may_be_kept(client, front, monkeypatch):
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, recorded_bytes=20_000))
    pool, url = front
    responses = [await client.post(url + NATIVE, json=RESUMABLE) for _ in range(30)]
    pool.gate.admit(30 * 5)
    ends = [(await response.text()).split("\n\n")[-2] for response in responses]
    assert all('"done": true' in end or "no longer kept" in end for end in ends)
    await pool.until_open(0)


async def test_a_slow_follower_gets_everything(client, front, monkeypatch):
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, outbox_bytes=1 << 16))
    pool, url = front
    pool.pieces = ["x" * 10_000] * 1_000            # 10 MB: more than any socket buffer
    pool.gate.admit(1000)
    response = await client.post(url + NATIVE, json=RESUMABLE)
    # the answer is complete, and hardly any of it has been read
    await pool.until_open(0)
    assert len(await read_all(response)) == 1001


async def test_a_client_leaving_in_its_body_is_no_error(front, caplog, monkeypatch):
    """The log has no error."""
    met = asyncio.Event()

    async def lost(self):
        if met.is_set():            # aiohttp reads on for 10 s, unless the body ends
            self.feed_eof()
            return b""
        met.set()
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(aiohttp.StreamReader, "readany", lost)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(front[1].rsplit(":", 1)[1]))
    writer.write(b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    await met.wait()
    await reader.readline()
    writer.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_leaving_at_the_end_is_no_error(client, front, caplog, monkeypatch):
    """The log has no error."""
    async def gone(self, data=b""):
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(web.StreamResponse, "write_eof", gone)
    pool, url = front
    pool.gate.admit(10)
    for body in (RESUMABLE, conversation()):
        with pytest.raises(aiohttp.ClientError):
            await (await client.post(url + NATIVE, json=body)).read()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("encoder, members", [
    (NativeEncoder, {"error"}), (OpenAIEncoder, {"error"}), (MessagesEncoder, {"type", "error"}),
    (ResponsesEncoder, {"type", "code", "message", "param"})])
async def test_a_recording_ends_after_an_error(encoder, members):
    """Streams of its API end so too."""
    async def frames():
        yield b'data: {"token": "one"}\n\n'
        raise ZeroDivisionError("a fault")

    recording = Recordings().start(Recording("some-id", "", "", encoder), frames(),
                                   contextlib.AsyncExitStack())
    _, last = b"".join([part async for part in recording.follow(0)]).decode().split("\n\n")[:2]
    body = json.loads(last.partition("data: ")[2])
    assert body.keys() == members and "the recording failed" in str(body) and "fault" not in last
    assert ("event: error" in last) == ("type" in members)
    gone = Recording("some-id", "", "", encoder)
    gone.dropped = 1        # its oldest part is no longer kept
    [late] = [part async for part in gone.follow(0)]
    assert json.loads(late.decode().partition("data: ")[2]).keys() == members


async def test_a_recording_of_lines_is_read_by_lines_and_so_ends_after_an_error():
    async def frames():
        yield b'{"response": "one"}\n{"response": "\\n\\n"}\n'
        raise ZeroDivisionError("a fault")

    recording = Recordings().start(Recording("some-id", "", "", OllamaEncoder), frames(), contextlib.AsyncExitStack())
    lines = b"".join([part async for part in recording.follow(1)]).splitlines()
    assert [json.loads(line) for line in lines] == [{"response": "\n\n"}, {"error": "the recording failed"}] and recording.length == 3


async def test_a_cut_recording_says_so(caplog):
    """It says so to its reader and in the log."""
    async def frames():
        yield b'data: {"token": "one"}\n\n'
        raise ZeroDivisionError("a fault")

    recordings = Recordings()
    recording = recordings.start(Recording("some-id", "", "", NativeEncoder), frames(),
                                 contextlib.AsyncExitStack())
    text = b"".join([part async for part in recording.follow(0)]).decode()
    assert text.startswith('id: 0\ndata: {"token": "one"}\n\nid: 1\ndata: {"error": ')
    assert "the recording failed" in text
    await recordings.close()
    assert recordings.all == {"some-id": recording} and recording.ended
    assert [(record.getMessage(), bool(record.exc_info)) for record in caplog.records] == [
        ("recording some-id failed: a fault", True)]
