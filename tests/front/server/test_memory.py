"""Requests share a budget of the front's memory: large bodies while they are read, and answers that are sent
whole."""

import asyncio
import json
from dataclasses import replace

import aiohttp
import pytest

from chatlm.common import config
from chatlm.common.config import Settings
from chatlm.common.errors import Overloaded
from chatlm.common.messages.requests import TokenLogprob
from chatlm.front.server import streams
from chatlm.front.intake import budget as budgets
from chatlm.front.intake.budget import Budget, Holding
from answers import said
from fake_pool import FakePool, conversation, serving
from patching import patch

KB = 1024


@pytest.fixture
def limits(monkeypatch):
    """A function that changes LIMITS for a test."""
    return lambda **changes: patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, **changes))


async def unfinished(url, size, sent):
    """A connection that has sent `sent` of the `size` bytes of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size + b" " * sent)
    return reader, writer


async def test_bodies_beyond_the_budget_wait(limits, monkeypatch):
    """Small ones do not."""
    limits(held_bytes=4 * 400 * KB)
    budget = Budget(config.LIMITS.held_bytes)
    patch(monkeypatch, budgets, "Budget", lambda total, share=4: budget)
    async with serving(FakePool()) as url, aiohttp.ClientSession() as client:
        held = [await unfinished(url, 200 * KB, 100 * KB) for _ in range(2)]
        while budget.used < 400 * KB:
            await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(client.post(url + "/v1/chat/completions", json=conversation() | {"padding": "x" * 190 * KB}))
        assert (await client.post(url + "/v1/chat/completions", json=conversation("x" * 20 * KB))).status == 200
        assert not waiting.done()
        held[0][1].close()
        assert (await waiting).status == 200
        held[1][1].close()
        while budget.used:
            await asyncio.sleep(0.01)


async def test_a_body_without_room_is_503(limits, monkeypatch):
    """It says when to come back."""
    limits(held_bytes=4 * 300 * KB)
    budget = Budget(config.LIMITS.held_bytes)
    patch(monkeypatch, budgets, "Budget", lambda total, share=4: budget)
    async with serving(FakePool()) as url, aiohttp.ClientSession() as client:
        _, writer = await unfinished(url, 200 * KB, 100 * KB)
        while not budget.used:
            await asyncio.sleep(0.01)
        patch(monkeypatch, budgets, "BODY_S", 0.3)
        async with client.post(url + "/v1/chat/completions", json=conversation("x" * 200 * KB)) as response:
            assert response.status == 503 and int(response.headers["Retry-After"]) > 0
            assert "large bodies" in (await response.json())["error"]["message"]
        writer.close()


async def test_a_body_that_comes_too_slowly_is_408(limits, monkeypatch):
    patch(monkeypatch, budgets, "BODY_S", 0.2)
    patch(monkeypatch, streams, "BODY_BYTES_PER_S", 1e9)
    async with serving(FakePool()) as url:
        reader, writer = await unfinished(url, 60 * KB, 10)
        status = asyncio.ensure_future(reader.readline())
        while not status.done():            # never silent for long, and never done
            writer.write(b" ")
            await asyncio.sleep(0.02)
        assert b" 408 " in await status
        writer.close()


async def test_one_client_holds_a_quarter_of_memory(limits, monkeypatch):
    """Everything is given back."""
    patch(monkeypatch, budgets, "BODY_S", 0.01)
    limits(inline_bytes=0)
    budget = Budget(400)
    with Holding(budget, "a") as mine:
        mine.grow(90)
        with pytest.raises(Overloaded, match="stream them"):
            mine.grow(20)
        with pytest.raises(Overloaded):
            await mine.wait_for(20)
        with Holding(budget, "b") as other:
            await other.wait_for(100)
            assert budget.used == 190
    assert budget.used == 0 and not budget.used_by


def test_a_budget_s_share_is_open_to_a_client():
    """A client may hold the share that a budget gives it."""
    for share, most in ((4, 100), (2, 200)):
        budget = Budget(400, share)
        with Holding(budget, "a") as mine:
            mine.keep(most)
            with pytest.raises(Overloaded, match="requests with images hold too much memory"):
                mine.keep(1, "requests with images")
        assert budget.used == 0


async def test_waiting_bodies_never_take_too_much():
    """Bodies that wait for the same room never take more than there is."""
    budget, most = Budget(400), 0
    budget.take("first", 100)
    budget.take("second", 100)

    async def read(client):
        nonlocal most
        with Holding(budget, client) as holding:
            await holding.wait_for(100)
            most = max(most, budget.used)
            await asyncio.sleep(0)

    waiting = [asyncio.ensure_future(read(f"client {number}")) for number in range(20)]
    await asyncio.sleep(0)
    budget.give_back("first", 100)
    budget.give_back("second", 100)
    await asyncio.gather(*waiting)
    assert most == 400 and budget.used == 0


@pytest.mark.parametrize("route, more", [("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}),
                                         ("/v1/completions", {"logprobs": 2, "prompt": "x"})])
async def test_a_whole_answer_beyond_memory_is_an_error(limits, route, more):
    """A streamed one goes on."""
    limits(held_bytes=4 * 20 * KB, inline_bytes=KB)
    top = ((72, -0.5), (73, -1.25))
    pool = FakePool([said("H", tokens=(72,), logprobs=(TokenLogprob(72, -0.5, top),))] * 200)
    async with serving(pool, Settings()) as url, aiohttp.ClientSession() as client:
        async with client.post(url + route, json=conversation() | more) as response:
            assert response.status == 503 and "stream" in (await response.json())["error"]["message"]
        async with client.post(url + route, json=conversation() | more | {"stream": True}) as response:
            assert response.status == 200 and (await response.text()).count("-1.25") == 200
        pool.pieces = pool.pieces[:5]
        async with client.post(url + route, json=conversation() | more) as response:
            choice = json.loads(await response.text())["choices"][0]
            assert len(choice["logprobs"].get("content") or choice["logprobs"]["tokens"]) == 5
        assert pool.open == 0


async def test_a_whole_answer_counts_until_it_is_sent(monkeypatch):
    budget = Budget(config.LIMITS.held_bytes)
    patch(monkeypatch, budgets, "Budget", lambda total, share=4: budget)
    question = json.dumps(conversation("Hi")).encode()
    async with serving(FakePool(["x" * 500_000] * 60)) as url:         # more than sockets hold
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(question) + question)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200") and "X-Request-Id: " in head and budget.used > 29_000_000
        body = await reader.readexactly(int(head.partition("Content-Length: ")[2].split("\r\n")[0]))
        assert len(json.loads(body)["choices"][0]["message"]["content"]) == 30_000_000
        while budget.used:
            await asyncio.sleep(0.01)
        writer.close()
