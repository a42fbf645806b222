"""Who goes next: turns between clients, the low lane, limits of a client; and over HTTP, 429 and when to come back."""

import json
import random

import aiohttp
import pytest

import chat_server
from chat_server import Job, NewAnswer, Overloaded, Request, Settings, WaitingQueue
from fake_pool import FakePool, conversation, serving
from pools import played_pool


def job(name, client="", low=False, deaths=0):
    return Job(Request(name, prompts=((1,),), client=client, low_priority=low), (1,), 8, None, 0.0, failovers=deaths)


def drained(queue):
    names = []
    while (first := queue.first()):
        queue.take(first)
        names.append(first.request.id)
    return " ".join(names)


def test_clients_take_turns_and_each_is_served_in_order():
    queue = WaitingQueue()
    for name in "a1 a2 a3 b1 c1 b2".split():
        queue.append(job(name, name[0]))
    assert len(queue) == 6
    assert drained(queue) == "a1 b1 c1 a2 b2 a3" and len(queue) == 0


def test_a_pile_of_one_client_delays_another_by_one_job_only():
    queue = WaitingQueue()
    for index in range(1000):
        queue.append(job(f"a{index}", "a"))
    queue.take(queue.first())
    queue.append(job("b", "b"))
    assert drained(queue).split().index("b") == 1


def test_low_priority_waits_until_nothing_else_does_and_takes_turns_too():
    queue = WaitingQueue()
    for name in "l1 l2 a1 m1 a2 b1".split():
        queue.append(job(name, name[0], low=name[0] in "lm"))
    assert drained(queue) == "a1 b1 a2 l1 m1 l2"


def test_jobs_whose_worker_died_go_first_even_if_low():
    queue = WaitingQueue()
    for waiting in (job("a1", "a"), job("l1", "l", low=True, deaths=1), job("b1", "b", deaths=2), job("l2", "l", low=True, deaths=1)):
        queue.append(waiting)
    assert drained(queue) == "l1 b1 l2 a1"


def test_leaving_jobs_leave_no_trace_whatever_the_order():
    generator = random.Random(3)
    queue, waiting = WaitingQueue(), []
    for index in range(2000):
        action = generator.random()
        if action < 0.5:
            waiting.append(job(str(index), generator.choice("abc"), generator.random() < 0.3, deaths=int(action < 0.05)))
            queue.append(waiting[-1])
        elif waiting:
            gone = waiting.pop(generator.randrange(len(waiting)))
            queue.take(gone) if gone is queue.first() else queue.remove(gone)
        assert set(queue) == set(waiting) and len(queue) == len(waiting)
    for gone in waiting:
        queue.remove(gone)
    assert queue.first() is None and not any(queue.lanes)


@pytest.fixture
async def pool():
    """A LocalPool whose one worker has a single row and never answers."""
    return played_pool(max_batch=1, max_queue=3, max_concurrent_per_key=2)


def request(name, client, low=False):
    return Request(name, prompts=((1, 2),), client=client, low_priority=low)


async def test_the_pool_gives_rows_in_turn_and_refuses_above_the_limits(pool):
    streams = {}
    for name, low in (("a1", False), ("l1", True), ("a2", False), ("b1", False)):
        streams[name] = pool.answer(request(name, name[0], low))
        await anext(streams[name])
    with pytest.raises(Overloaded, match="--max-queue") as full:
        await anext(pool.answer(request("c1", "c")))
    assert full.value.status == 429 and full.value.retry_after_s > 0
    await streams.pop("b1").aclose()
    with pytest.raises(Overloaded, match="2 requests of yours.*--max-concurrent-per-key") as refused:
        await anext(pool.answer(request("a3", "a")))
    assert refused.value.status == 429
    streams["b1"] = pool.answer(request("b1", "b"))
    await anext(streams["b1"])
    for name in ("a1", "a2", "b1", "l1"):       # each that leaves gives its row to the next
        await streams[name].aclose()
    assert [each.id for each in pool.workers[0].sent if isinstance(each, NewAnswer)] == ["a1", "a2", "b1", "l1"]
    assert not pool.jobs and not len(pool.pending) and not pool.workers[0].jobs


@pytest.mark.parametrize("priority, low", [("low", True), ("normal", False), (5, True), (0, False), (-1, False), (None, False)])
async def test_a_request_says_its_priority(priority, low):
    pool = FakePool()
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        for path in ("/chat/completions", "/v1/chat/completions"):
            assert (await client.post(url + path, json=conversation() | {"priority": priority})).status == 200
    assert [request.low_priority for request in pool.requests] == [low, low]


@pytest.mark.parametrize("priority", ["urgent", 1.5, True, [], {}])
async def test_a_priority_that_is_none_is_400(priority):
    async with serving(FakePool()) as url, aiohttp.ClientSession() as client:
        async with client.post(url + "/v1/chat/completions", json=conversation() | {"priority": priority}) as response:
            assert response.status == 400 and json.loads(await response.read())["error"]["param"] == "priority"


async def test_without_keys_a_client_is_its_address_and_with_keys_its_key():
    pool = FakePool()
    keys = (chat_server.ApiKey.hashed("secret", "alice"),)
    async with aiohttp.ClientSession() as client:
        for settings in (Settings(), Settings(keys=keys)):
            async with serving(pool, settings) as url:
                await client.post(url + "/chat/completions", json=conversation(), headers={"X-Api-Key": "secret"})
    assert [request.client for request in pool.requests] == ["127.0.0.1", "alice"]
