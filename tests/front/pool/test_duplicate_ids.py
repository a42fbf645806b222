"""One id, one request: a second one is refused wherever it enters. A lost job takes no other with it."""

import asyncio
import random
import string

import pytest

from chatlm.common.errors import EngineFailure, RequestError
from chatlm.common.messages.protocol import NewRequest
from chatlm.common.messages.requests import Finished
from chatlm.common.request_ids import id_of_client, id_of_part, id_of_whole, is_unguessable
from answers import asked, ending, said
from pools import played_pool


def request(name, client="a", **more):
    return asked(name, prompts=((1,),), prompt_ids=((1,),), client=client, max_tokens=8, **more)


def test_no_client_spells_the_id_of_a_part():
    rng = random.Random(116)
    for _ in range(5000):
        sent = "".join(rng.choices(string.printable + "~#~#-é\u2028", k=rng.randrange(1, 90)))
        mine = id_of_client(sent)
        assert id_of_whole(mine) == mine and len(mine) <= 64 and "#" not in mine
    assert id_of_client("evil~1") == "evil1" and id_of_part("evil", 1) == "evil~1"
    assert id_of_whole(id_of_part("evil-1", 12)) == "evil-1"
    assert is_unguessable(id_of_part("0" * 32, 3)) and not is_unguessable("0" * 32 + "-3")


async def test_an_id_is_in_use_until_all_its_answers_have_ended():
    """The first of two has ended; the worker would take the second request's prompt for the first one's."""
    pool = played_pool(max_batch=4)
    [worker] = pool.workers
    first = pool.answer(request("x", n=2))
    await anext(first)
    pool.dispatcher.deliver(worker, [("x", said("A", tokens=(65,)))])
    await anext(first)  # now its second answer is submitted too
    pool.dispatcher.deliver(worker, ending("x", said("B", tokens=(66,))))
    assert [*worker.jobs] == ["x#1"] and "x" not in pool.dispatcher.jobs
    with pytest.raises(RequestError, match='the id "x" is already running') as refused:
        await anext(pool.answer(request("x", client="b")))
    assert (
        refused.value.status == 409 and len([one for one in worker.sent if isinstance(one, NewRequest)]) == 1
    )
    await first.aclose()
    again = pool.answer(request("x", client="b"))
    await anext(again)
    await again.aclose()
    assert not pool.dispatcher.requests and not worker.jobs


async def test_a_round_s_id_is_refused_like_any_other():
    """Nothing that holds a place may enter an id twice."""
    pool = played_pool(max_batch=4)
    running = pool.answer(request("x", round=1))
    await anext(running)
    for number in 0, 1, 7:
        with pytest.raises(RequestError, match="already running"):
            await anext(pool.answer(request("x", round=number)))
    with pool.place_for(request("y")), pytest.raises(RequestError, match="already running"):
        await anext(pool.answer(request("y", client="b")))
    assert len(pool.dispatcher.jobs) == 1
    await running.aclose()


async def test_a_request_is_prepared_once():
    pool = played_pool()
    for goes_on in False, True:
        with pool.admission.prepare("a", "x"):
            with (
                pytest.raises(RequestError, match="already running"),
                pool.admission.prepare("b", "x", goes_on=goes_on),
            ):
                pass
            assert pool.admission.preparing == {"x": "a"}
    assert not pool.admission.preparing


@pytest.mark.parametrize("broken", ["take", "messages", "id", "lane"])
async def test_a_lost_job_takes_no_other_with_it(broken, monkeypatch):
    """Whatever is wrong with what is kept of it."""
    pool = played_pool(max_batch=2 if broken == "lane" else 3)
    [worker] = pool.workers
    streams = [pool.answer(request(name, client=name)) for name in "abc"]
    for stream in streams:
        await anext(stream)
    jobs = pool.dispatcher.jobs
    if broken == "take":
        monkeypatch.setattr(jobs["b"], "take", lambda event, gpu: 1 / 0)
    elif broken == "messages":  # its worker dies, and no other can be told of it
        monkeypatch.setattr(jobs["b"], "messages", lambda sent: 1 / 0)
        pool.dispatcher.requeue(worker)
    elif broken == "id":  # another with its id has ended
        del jobs["b"]
    else:  # it waits, in a lane that is not its own
        jobs["c"].failovers = 1
    pool.dispatcher.deliver(
        worker, [each for name in "abc" for each in ending(name, said(name, tokens=(7,)))]
    )
    ends = await asyncio.wait_for(asyncio.gather(*(collected(stream) for stream in streams)), 20)
    assert isinstance(ends[0], Finished)
    if broken in ("take", "messages"):
        assert isinstance(ends[1], EngineFailure) and "lost this answer" in str(ends[1])
        assert isinstance(ends[2], Finished)
    assert not jobs and not worker.jobs and not len(pool.dispatcher.pending)


async def collected(stream):
    last = None
    try:
        async for last in stream:
            pass
    except (EngineFailure, RequestError) as error:
        return error
    return last
