"""An answer in rounds holds a place: it counts once, from its begin to its end, and its rounds keep nobody
else out."""

import asyncio
from contextlib import ExitStack

import pytest

from chatlm.common.errors import Overloaded
from chatlm.common.request_ids import id_of_part
from answers import asked, ending, said
from pools import played_pool

LIMIT = 8
ROWS = 2


def request(name, client="a", round=0, **more):
    return asked(name, prompts=((1,),), prompt_ids=((1,),), client=client, max_tokens=8, round=round, **more)


async def begun(pool, name, client="a", round=0, **more):
    stream = pool.answer(request(name, client, round, **more))
    await anext(stream)
    return stream


async def ended(stream):
    async for _ in stream:
        pass


def finish_all(pool):
    """All that the worker computes ends, then what begins in its place."""
    [worker] = pool.workers
    while worker.jobs:
        for name in [*worker.jobs]:
            pool.dispatcher.deliver(worker, ending(name, said("x", tokens=(7,))))


async def test_rounds_that_come_at_once_keep_no_other_out():
    """Of one client as many as fit; then all their tools end at a time. Others are admitted as before."""
    pool = played_pool(max_batch=ROWS, max_queue=LIMIT)
    with ExitStack() as places:
        count = 0
        with pytest.raises(Overloaded, match="already waiting"):
            while True:
                places.enter_context(pool.place_for(request(f"a{count}")))
                count += 1
        assert count == LIMIT + ROWS  # their tools run
        others = [await begun(pool, f"b{number}", "b") for number in range(ROWS)]
        finish_all(pool)
        rounds = [await begun(pool, id_of_part(f"a{number}", 1), round=2) for number in range(count)]
        assert len(pool.dispatcher.pending) == LIMIT
        for client in "bcd":
            others += [await begun(pool, f"{client}-{number}", client) for number in range(LIMIT // 4)]
        finish_all(pool)
        await asyncio.gather(*map(ended, others + rounds))
    with pool.place_for(request("a again")):
        pass
    assert not pool.dispatcher.is_needed


async def test_a_later_round_goes_before_what_has_not_begun():
    """Behind its client's other later rounds, and in its client's turn."""
    pool = played_pool(max_batch=1, max_queue=LIMIT)
    streams = [await begun(pool, "running", "z")]
    for name, client, number in (
        ("a1", "a", 0),
        ("b1", "b", 0),
        ("a2", "a", 0),
        ("first", "a", 1),
        ("x", "a", 2),
        ("y", "a", 5),
    ):
        streams.append(await begun(pool, name, client, number))
    assert [job.id for job in pool.dispatcher.pending if job.request.client == "a"] == [
        "x",
        "y",
        "a1",
        "a2",
        "first",
    ]
    finish_all(pool)
    await asyncio.gather(*map(ended, streams))


async def test_an_answer_in_rounds_counts_once_for_its_key():
    """Whatever it does: it waits for a row, a worker computes it, or its tools run."""
    pool = played_pool(max_batch=ROWS, max_queue=LIMIT, max_concurrent_per_key=2)
    with pool.place_for(request("a1")), pool.place_for(request("a2")):
        for _ in range(2):
            with pytest.raises(Overloaded, match="at most 2 of your requests"):
                await begun(pool, "a3")
            stream = await begun(pool, id_of_part("a1", 0), round=1)
            with pytest.raises(Overloaded, match="at most 2 of your requests"):
                await begun(pool, "a3")
            finish_all(pool)
            await ended(stream)
        with pytest.raises(Overloaded, match="at most 2 of your requests"), pool.place_for(request("a3")):
            pass
        with pool.admission.prepare(
            "a", id_of_part("a1", 1), goes_on=True
        ):  # what is rendered for it counts no more
            assert not pool.admission.preparing
        stream = await begun(pool, "b1", "b")
        finish_all(pool)
        await ended(stream)
    stream = await begun(pool, "a3")
    finish_all(pool)
    await ended(stream)


async def test_a_drain_waits_for_answers_whose_tools_run():
    pool = played_pool()
    with pool.place_for(request("a1")):
        assert not await pool.drain(0.0)
        with pytest.raises(Overloaded), pool.place_for(request("a2")):
            pass
        stream = await begun(pool, id_of_part("a1", 1), round=2)  # it may end what it has begun
        finish_all(pool)
        await ended(stream)
        assert pool.dispatcher.idle_s(1e9) == 0.0
    assert await pool.drain(0.0)


async def test_the_background_holds_places_of_its_own():
    """They keep no chat out."""
    pool = played_pool(max_batch=ROWS, max_queue=LIMIT)
    with ExitStack() as places:
        for number in range(LIMIT + ROWS):
            places.enter_context(pool.place_for(request(f"a{number}", low_priority=True)))
        with pytest.raises(Overloaded), pool.place_for(request("a", low_priority=True)):
            pass
        streams = [await begun(pool, f"b{number}", "b") for number in range(LIMIT + ROWS)]
        finish_all(pool)
        await asyncio.gather(*map(ended, streams))
