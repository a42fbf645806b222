"""Fairness: turns between clients, the low lane, limits of a client; over HTTP, 429 with Retry-After."""

import asyncio
import json
import random
import time
from types import SimpleNamespace

import aiohttp
import pytest

from chatlm.common.config import ApiKey, Settings
from chatlm.common.errors import Overloaded
from chatlm.common.messages.protocol import Cancel, NewAnswer
from chatlm.common.messages.requests import Piece, SamplingParams
from chatlm.common.processes.start import patient
from chatlm.front.pool.dispatcher import WaitingQueue, waiting_by_client
from chatlm.front.pool.places import Places
from chatlm.front.pool.worker import Job, WorkerState
from answers import asked, ending, said
from fake_pool import FakePool, conversation, serving
from pools import played_pool


def job(name, client="", low=False, deaths=0):
    return Job(asked(name, prompts=((1,),), client=client, low_priority=low), (1,), 8, None, 0.0, failovers=deaths)


def drained(queue):
    names = []
    while (first := queue.first()):
        queue.take(first)
        names.append(first.request.id)
    return " ".join(names)


def text(name, client=""):
    return Job(asked(name, prompts=((1,),), client=client, pooling="mean"), (1,), 8, None, 0.0)


def test_texts_go_between_answers_and_background():
    """Texts to embed go after answers and before low priority."""
    queue = WaitingQueue()
    for each in (job("low", low=True), text("t1"), text("t2", "other"), job("answer", "late")):
        queue.append(each)
    assert drained(queue) == "answer t1 t2 low"


def test_the_background_hides_no_other_model_s_wait():
    """Answers that wait for another model are seen."""
    models = [SimpleNamespace(pending=WaitingQueue(), places=Places(())) for _ in range(2)]
    models[0].pending.append(job("low", "a", low=True))
    models[1].pending.append(job("answer", "b"))
    assert waiting_by_client(models, low=False) == {"b": 1}
    assert waiting_by_client(models) == {"a": 1, "b": 1}


async def test_a_text_makes_room_for_an_answer():
    """Texts do not fill the queue."""
    pool = played_pool(max_batch=2, max_queue=7)
    [worker] = pool.workers

    def embed(name, count):
        return pool.answer(asked(name, prompts=((1,),) * count, prompt_ids=((1,),) * count, client="a", pooling="mean", max_tokens=0))

    texts = [embed(name, 40) for name in ("x", "y")]
    for stream in texts:
        await anext(stream)
    assert len(worker.jobs) == 2 and len(pool.dispatcher.pending) == 78 and sum(waiting_by_client([pool.dispatcher]).values()) == 6     # of 40: 3
    answers = await submitted(pool, "a1")          # of the same client
    assert told(worker)[-1] == "a1" and [job.request.id for job in worker.jobs.values()] == ["x", "a1"]
    texts.append(embed("z", 40))
    await anext(texts[-1])
    with pytest.raises(Overloaded, match="9 requests are already waiting"):
        await anext(embed("w", 40))
    for stream in (*texts, *answers.values()):
        await stream.aclose()
    assert not pool.dispatcher.jobs and not worker.jobs and not len(pool.dispatcher.pending)


async def test_a_long_text_may_take_long_in_one_step():
    pool = played_pool()
    [worker] = pool.workers
    worker.TEXT_TOKEN_S = 10.0
    stream = pool.answer(asked("long", prompts=((1,),), prompt_ids=((1,) * 60,), client="a", pooling="mean", max_tokens=0))
    await anext(stream)
    worker.awaited_s = time.monotonic() - patient(worker.HANG_S) - 60
    assert worker.jobs and not worker.hung
    await stream.aclose()
    assert not worker.jobs and worker.hung


def test_clients_take_turns():
    """Each is served in order."""
    queue = WaitingQueue()
    for name in "a1 a2 a3 b1 c1 b2".split():
        queue.append(job(name, name[0]))
    assert len(queue) == 6
    assert drained(queue) == "a1 b1 c1 a2 b2 a3" and len(queue) == 0


def test_a_client_s_pile_delays_others_by_one_job():
    """A pile of one client delays another by one job only."""
    queue = WaitingQueue()
    for index in range(1000):
        queue.append(job(f"a{index}", "a"))
    queue.take(queue.first())
    queue.append(job("b", "b"))
    assert drained(queue).split().index("b") == 1


def test_low_priority_waits_and_takes_turns():
    """It waits until nothing else does."""
    queue = WaitingQueue()
    for name in "l1 l2 a1 m1 a2 b1".split():
        queue.append(job(name, name[0], low=name[0] in "lm"))
    assert drained(queue) == "a1 b1 a2 l1 m1 l2"


def test_the_client_with_fewest_rows_is_next():
    """It is one of those that wait."""
    queue = WaitingQueue()
    for name in "a1 b1 c1 b2".split():
        queue.append(job(name, name[0]))
    rows = {(False, "a"): 3, (False, "c"): 1, (True, "b"): 9}
    order = []
    while first := queue.first(rows):
        queue.take(first)
        order.append(first.request.id)
        rows[False, first.request.client] = rows.get((False, first.request.client), 0) + 1
    assert order == ["b1", "c1", "b2", "a1"]


def test_jobs_of_a_dead_worker_go_first():
    """The background has the same rule."""
    queue = WaitingQueue()
    for waiting in (job("a1", "a"), job("l1", "l", low=True, deaths=1), job("b1", "b", deaths=2), job("l2", "l", low=True, deaths=1)):
        queue.append(waiting)
    queue.append(job("m1", "m", low=True))
    assert drained(queue) == "b1 a1 l1 l2 m1"


def test_jobs_that_leave_leave_no_trace():
    """Their order does not matter."""
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
    """A WorkerPool whose one worker has a single row and never answers."""
    return played_pool(max_batch=1, max_queue=3, max_concurrent_per_key=2)


def request(name, client, low=False):
    return asked(name, prompts=((1, 2),), client=client, low_priority=low)


async def test_rows_are_given_in_turn_within_limits(pool):
    """The pool refuses what is above them."""
    streams = {}
    for name, low in (("a1", False), ("l1", True), ("a2", False), ("b1", False)):
        streams[name] = pool.answer(request(name, name[0], low))
        await anext(streams[name])
    streams["b2"] = pool.answer(request("b2", "b"))     # what is in the background keeps nobody out
    await anext(streams["b2"])
    with pytest.raises(Overloaded, match="--max-queue") as full:
        await anext(pool.answer(request("c1", "c")))
    with pytest.raises(Overloaded, match="4 requests are already waiting"):
        await anext(pool.answer(request("m1", "m", True)))
    assert full.value.status == 429 and full.value.retry_after_s > 0
    await streams.pop("b1").aclose()
    await streams.pop("b2").aclose()
    with pytest.raises(Overloaded, match="at most 2 of your requests .*--max-concurrent-per-key") as refused:
        await anext(pool.answer(request("a3", "a")))
    assert refused.value.status == 429
    streams["b1"] = pool.answer(request("b1", "b"))
    await anext(streams["b1"])
    for name in ("a1", "a2", "b1", "l1"):       # each one that leaves gives its row to the next
        await streams[name].aclose()
    assert [each.id for each in pool.workers[0].sent if isinstance(each, NewAnswer)] == ["a1", "a2", "b1", "l1"]
    assert not pool.dispatcher.jobs and not len(pool.dispatcher.pending) and not pool.workers[0].jobs


def told(worker):
    """What a worker was told about answers, in short."""
    return [f"{'stop ' if isinstance(each, Cancel) else ''}{each.id}" for each in worker.sent if isinstance(each, (Cancel, NewAnswer))]


async def submitted(pool, *names, low=False):
    streams = {name: pool.answer(request(name, name[0], low)) for name in names}
    for stream in streams.values():
        await anext(stream)
    return streams


async def test_a_client_s_pile_leaves_room_in_the_queue():
    """The others have it."""
    pool = played_pool(max_batch=1, max_queue=8)
    pool.workers[0].become(WorkerState.DEAD)          # so all of them wait

    async def asking(name, client, n=1):
        request = asked(name, prompts=((1,),), prompt_ids=((1,),), client=client, n=n, max_tokens=8)
        async for _ in pool.answer(request):
            pass

    tasks = [asyncio.ensure_future(asking(f"a{number}", "a")) for number in range(8)]
    await asyncio.sleep(0)
    assert len(pool.dispatcher.pending) == 8
    with pytest.raises(Overloaded, match="already waiting"):
        await asking("a8", "a")
    for client in "bcde":
        tasks += [asyncio.ensure_future(asking(f"{client}{number}", client)) for number in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="already waiting"):
            await asking(f"{client}2", client)
    assert len(pool.dispatcher.pending) == 16
    with pytest.raises(Overloaded, match="already waiting"):        # twice as many as --max-queue says
        await asking("f", "f")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not len(pool.dispatcher.pending)


async def test_one_request_s_answers_leave_queue_room():
    """There are many of them."""
    pool = played_pool(max_batch=1, max_queue=8)
    pool.workers[0].become(WorkerState.DEAD)

    async def asking(name, prompts=1):
        ids = ((1,),) * prompts
        async for _ in pool.answer(asked(name, prompts=ids, prompt_ids=ids, client=name[0], max_tokens=8)):
            pass

    tasks = [asyncio.ensure_future(asking("a1", 40))]
    await asyncio.sleep(0)
    assert len(pool.dispatcher.pending) == 40       # more than twice --max-queue
    tasks.append(asyncio.ensure_future(asking("b1")))
    await asyncio.sleep(0)
    assert len(pool.dispatcher.pending) == 41
    with pytest.raises(Overloaded, match="already waiting"):
        await asking("a2")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_client_with_all_rows_gives_some_up():
    """The youngest go to another until they have as many."""
    pool = played_pool(max_batch=4)
    [worker] = pool.workers
    streams = await submitted(pool, "a1", "a2", "a3", "a4", "a5")
    streams |= await submitted(pool, "b1", "b2", "b3")
    assert told(worker) == ["a1", "a2", "a3", "a4", "stop a4", "b1", "stop a3", "b2"] and len(worker.jobs) == 4
    pool.dispatcher.deliver(worker, [("a3", said("late", tokens=(7,))), ("a2", said("x", tokens=(7,))), *ending("b1", said("y", tokens=(7,)))])
    assert told(worker)[-1] == "b3"                 # as many rows as a: in turn
    pool.dispatcher.deliver(worker, [*ending("b2", said(tokens=(7,))), *ending("b3", said(tokens=(7,)))])
    assert told(worker)[-2:] == ["a3##1", "a4##1"]  # before a5, and not as if the late word had come
    assert pool.dispatcher.jobs["a3"].output_ids == [] and pool.dispatcher.jobs["a2"].output_ids == [7]
    pool.dispatcher.deliver(worker, ending("a3##1", said("z", tokens=(8,))))
    assert [event.text async for event in streams["a3"] if isinstance(event, Piece)] == ["z"]
    for stream in streams.values():
        await stream.aclose()
    assert not pool.dispatcher.jobs and not worker.jobs and not len(pool.dispatcher.pending)


@pytest.mark.parametrize("holder, newcomer", [("a", "a"), ("ab", "c"), ("aab", "b")])
async def test_nobody_gives_up_a_row_for_nothing(holder, newcomer):
    """It is not given for its own client, nor to have fewer than another."""
    pool = played_pool(max_batch=len(holder))
    await submitted(pool, *(f"{client}{number}" for number, client in enumerate(holder)))
    await submitted(pool, f"{newcomer}9")
    assert len(told(pool.workers[0])) == len(holder)


async def test_low_priority_takes_nobodys_row():
    """It takes not even its own client's, and stays with its worker."""
    pool = played_pool(max_batch=2)
    [worker] = pool.workers
    await submitted(pool, "a1", "l1", "l2", low=True)
    await submitted(pool, "a2", "a3", "a4")
    await submitted(pool, "l3", low=True)
    assert told(worker) == ["a1", "l1", "a2", "a3"] and worker.interactive == 2
    sent = {each.id: each.background for each in worker.sent if isinstance(each, NewAnswer)}
    assert sent == {"a1": True, "l1": True, "a2": False, "a3": False}
    pool.dispatcher.deliver(worker, ending("a2", said(tokens=(7,))))
    assert told(worker)[-1] == "a4"
    pool.dispatcher.deliver(worker, [*ending("a3", said(tokens=(7,))), *ending("a4", said(tokens=(7,)))])
    assert told(worker)[-1] == "a4"              # two are in the background already
    pool.dispatcher.deliver(worker, ending("a1", said(tokens=(7,))))
    assert told(worker)[-1] == "l2"


async def test_background_answers_share_rows():
    """Else the batch of one key would wait until lines of another end, maybe for an hour. Chats keep their rows."""
    pool = played_pool(max_batch=4)
    [worker] = pool.workers
    await submitted(pool, *(f"a{number}" for number in range(6)), low=True)
    await submitted(pool, "b1", "b2", "b3", low=True)
    assert told(worker) == ["a0", "a1", "a2", "a3", "stop a3", "b1", "stop a2", "b2"]       # and then each has two
    pool.dispatcher.deliver(worker, ending("b1", said(tokens=(7,))))
    assert told(worker)[-1] == "b3"
    await submitted(pool, "c1", "c2", "c3", "c4", "c5")
    before = told(worker)
    assert before[-4:] == ["c1", "c2", "c3", "c4"]
    await submitted(pool, "l1", "l2", low=True)
    assert told(worker) == before       # beside chats nothing changes places that would not run


async def of_two(kinds="cuda"):
    """A pool of two played workers, on devices of their own or on one machine's processors."""
    pool = played_pool(max_batch=2)
    pool.workers.append(type(pool.workers[0])(pool))
    for number, worker in enumerate(pool.workers):
        worker.gpu, worker.device = number, f"cuda:{number}" if kinds == "cuda" else "cpu"
    return pool, *pool.workers


async def test_the_background_avoids_chats():
    """It goes to a worker without any; a chat goes to the one with least of it."""
    pool, first, second = await of_two()
    await submitted(pool, "a1")
    await submitted(pool, "l1", "l2", low=True)
    assert (told(first), told(second)) == (["a1"], ["l1", "l2"])
    await submitted(pool, "b1")
    assert (told(first), told(second)) == (["a1"], ["l1", "l2", "b1"])    # the one with less to write for others
    pool, first, second = await of_two()
    await submitted(pool, "l1", low=True)
    await submitted(pool, "b1")
    assert (told(first), told(second)) == (["l1"], ["b1"])


@pytest.mark.parametrize("kinds", ["cuda", "cpu"])
async def test_the_background_moves_away_from_chats(kinds):
    """It goes to another device, but not at once."""
    pool, first, second = await of_two(kinds)
    await submitted(pool, "l1", "l2", low=True)
    await submitted(pool, "b1", "b2")
    assert (told(first), told(second)) == (["l1", "b2"], ["l2", "b1"]) or (told(first), told(second)) == (["l1", "b1"], ["l2", "b2"])
    b2 = next(job for job in pool.dispatcher.jobs.values() if job.worker is second and not job.request.low_priority)
    pool.dispatcher.deliver(second, ending(b2.id, said(tokens=(7,))))
    assert "stop l1" not in told(first)                     # it has just come
    pool.dispatcher.jobs["l1"].assigned_s -= pool.dispatcher.STAY_S
    pool.dispatcher.dispatch()
    assert ("stop l1" in told(first)) == ("l1##1" in told(second)) == (kinds == "cuda")


async def test_a_killing_background_answer_runs_alone():
    """It has killed two workers."""
    pool, first, second = await of_two()
    await submitted(pool, "b1", "c1")
    await submitted(pool, "l1", low=True)
    job = pool.dispatcher.jobs["l1"]
    job.failovers = 2
    job.worker.set_aside(job)
    pool.dispatcher.pending.append(job)
    pool.dispatcher.dispatch()
    assert job.worker is None
    pool.dispatcher.deliver(second, ending("c1", said(tokens=(7,))))
    assert job.worker is second


async def test_an_answer_set_aside_is_the_same(start_pool):
    """Not a word differs."""
    async def said(pool, name, client, tokens):
        wanted = asked(name, prompts=("The sea is",), max_tokens=tokens, client=client, ignore_eos=True,
                         sampling=SamplingParams(seed=5, temperature=1.0))
        return "".join([event.text async for event in pool.answer(wanted) if isinstance(event, Piece)])

    pool = await start_pool(max_batch=2)
    alone = await said(pool, "alone", "a", 300)
    for attempt in range(50):           # until b comes while both are under way: a busy machine may let them end before
        tasks = [asyncio.ensure_future(said(pool, f"a{number} {attempt}", "a", 300)) for number in (1, 2)]
        while not any(task.done() for task in tasks) and [bool(job.output_ids) for job in pool.dispatcher.jobs.values()] != [True, True]:
            await asyncio.sleep(0)
        jobs = list(pool.dispatcher.jobs.values())
        assert len(await said(pool, f"b {attempt}", "b", 5)) > 0
        assert await asyncio.gather(*tasks) == [alone, alone]
        if any(job.set_aside and job.output_ids for job in jobs):
            break
    else:
        pytest.fail("no answer was set aside")


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


async def test_a_client_is_its_key_or_its_address():
    """With keys it is its key."""
    pool = FakePool()
    keys = (ApiKey.hashed("secret", "alice"),)
    async with aiohttp.ClientSession() as client:
        for settings in (Settings(), Settings(keys=keys)):
            async with serving(pool, settings) as url:
                await client.post(url + "/chat/completions", json=conversation(), headers={"X-Api-Key": "secret"})
    assert [request.client for request in pool.requests] == ["127.0.0.1", "alice"]
