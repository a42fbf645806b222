"""Reading a server's event streams, from a server that plays what others and networks do."""

import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chatlm.common.config import Settings
from chatlm.common.errors import EngineFailure
from chatlm.common.messages.requests import Finished, Message, Piece, Request
from chatlm.terminal.remote import RemotePool
from chatlm.terminal.remote_streams import RemoteStream, compared_at

REQUEST = Request(id="r1", messages=(Message("user", "hello"),))


@asynccontextmanager
async def server_of(*connections, breaks=()):
    """A pool at a server whose connections write these parts in turn; those of `breaks` are then torn. And what was asked."""
    asked, begun = [], []

    async def handle(http):
        asked.append(http.path_qs)
        if "cancel" in http.path:
            return web.json_response({})
        begun.append(http)
        number, response = len(begun) - 1, web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        for part in connections[number]:
            await response.write(part)
        if number in breaks:
            http.transport.abort()
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as server:
        pool = RemotePool(Settings(url=str(server.make_url("/"))))
        await pool.start()
        try:
            yield pool, asked
        finally:
            await pool.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(RemoteStream, "RESUME_S", (0, 0))


def event(body, number=None):
    return (b"" if number is None else b"id: %d\n" % number) + b"data: " + json.dumps(body).encode() + b"\n\n"


def word(text, number=None):
    return event({"choices": [{"index": 0, "delta": {"content": text}}]}, number)


def end(number=None):
    return event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, number)


def usage(count, number=None):
    return event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}}, number)


async def answered(pool):
    events = [event async for event in pool.answer(REQUEST)]
    return "".join(event.text for event in events if isinstance(event, Piece)), events[-1]


async def test_event_streams_follow_the_standard():
    """Events are read as the standard says, however they are cut."""
    long = "x" * 300_000                    # more than aiohttp reads as one line
    whole = b": ping\r\n\r\n" + word("a").replace(b"\n", b"\r\n") + b'event: x\ndata:{"choices": [{"delta":\ndata: {"content": "b"}}]}\n\n' \
        + b"retry: 5\n\n" + word(long) + end() + b"data: [DONE]\n\n" + word("after the end")
    for size in (7, len(whole)):
        parts = [whole[at:at + size] for at in range(0, len(whole), size)] if size > 7 else [whole[:400][at:at + 7] for at in range(0, 400, 7)] + [whole[400:]]
        async with server_of(parts) as (pool, asked):
            text, last = await answered(pool)
            assert text == "ab" + long and isinstance(last, Finished) and asked == ["/v1/chat/completions"]


async def test_an_answer_cut_before_its_figures_resumes():
    """An answer whose connection breaks before its figures is resumed for them."""
    async with server_of([word("a", 0), end(1)], [usage(7, 2), b"data: [DONE]\n\n"], breaks=[0]) as (pool, asked):
        text, last = await answered(pool)
        assert (text, last.reason, last.usage.completion_tokens) == ("a", "stop", 7)
        assert asked == ["/v1/chat/completions", "/v1/streams/r1?from=2"]


async def test_an_answer_without_figures_is_no_failure():
    """An answer that is whole but for its figures is no failure."""
    async with server_of([word("a", 0), end(1)], [], [], breaks=[0, 1, 2]) as (pool, asked):
        text, last = await answered(pool)
        assert (text, last.reason) == ("a", "stop") and not any("cancel" in path for path in asked)


async def test_a_resumed_answer_that_stalls_is_given_up():
    """A server that takes up an answer and never goes on with it is given up."""
    async with server_of([word("a", 0)], *[[]] * 9, breaks=[0]) as (pool, asked):
        with pytest.raises(EngineFailure, match="it ended early"):
            await answered(pool)
        assert asked == ["/v1/chat/completions", *["/v1/streams/r1?from=1"] * 2, "/v1/cancel/r1"]


async def test_a_stream_cut_within_an_event_resumes():
    """A stream that ends in the middle of an event is resumed there."""
    async with server_of([word("a", 0), word("b", 1)[:-9]], [word("b", 1), end(2), b"data: [DONE]\n\n"]) as (pool, asked):
        assert (await answered(pool))[0] == "ab"
        assert asked[1:] == ["/v1/streams/r1?from=1"]


async def test_an_unnumbered_stream_cut_early_fails():
    """A stream without numbers that ends early is an error and cancelled."""
    async with server_of([word("a")]) as (pool, asked):
        with pytest.raises(EngineFailure, match="it ended early"):
            await answered(pool)
        assert asked == ["/v1/chat/completions", "/v1/cancel/r1"]


async def test_an_event_must_be_an_object():
    """An event that is no object does not come from a chat server."""
    async with server_of([b"data: [1]\n\n"]) as (pool, _):
        with pytest.raises(EngineFailure, match="does not answer like a chat server"):
            await answered(pool)


async def test_a_comparison_cut_early_is_an_error():
    token = event({"index": 0, "token": "a"})
    async with server_of([token], [token, event({"error": {"message": "no memory", "type": "server_error"}})],
                         [token, event({"index": 0, "error": {"message": "its own"}}), event({"done": True})]) as (pool, _):
        for wrong in ("it ended early", "no memory"):
            with pytest.raises(EngineFailure, match=wrong):
                async for _ in compared_at(pool, {}):
                    pass
        assert [*(await _all(compared_at(pool, {})))[-1]] == ["done"]


async def _all(events):
    return [event async for event in events]
