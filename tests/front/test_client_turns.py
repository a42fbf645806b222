"""Clients take turns for places."""

import asyncio

from chatlm.front.turns import Turns


async def asked(turns, names):
    """The order in which clients, the first letters of names, get a place; "a3" leaves before it has one."""
    order = []

    async def work(name):
        give_back = await turns.take(name[0])
        order.append(name)
        await asyncio.sleep(0)
        give_back()

    tasks = [asyncio.ensure_future(work(name)) for name in names]
    await asyncio.sleep(0)
    [leaving] = [task for task, name in zip(tasks, names) if name == "a3"]
    leaving.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return order


async def test_clients_take_turns():
    turns = Turns()
    assert await asked(turns, ["a1", "a2", "a3", "a4", "b1", "c1"]) == ["a1", "a2", "b1", "c1", "a4"]
    assert turns.free == 1 and not turns.held_by and not turns.lanes


async def test_of_several_places_one_client_never_has_all():
    turns = Turns(3)
    mine = [await turns.take("a"), await turns.take("a")]
    third = asyncio.ensure_future(turns.take("a"))
    await asyncio.sleep(0)
    assert not third.done()
    other = await turns.take("b")       # at once, though another waits
    other()
    await asyncio.sleep(0)
    assert not third.done()
    mine.pop()()
    mine.append(await third)
    for give_back in mine:
        give_back()
    assert turns.free == 3 and not turns.held_by


async def test_a_place_may_be_had_by_one_client_alone():
    turns = Turns(2, most=2)
    first, second = await turns.take("a"), await turns.take("a")
    waiting = [asyncio.ensure_future(turns.take(client)) for client in "ab"]
    await asyncio.sleep(0)
    first()
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, False]
    second()
    (await waiting[1])()
    waiting[0].result()()
    assert turns.free == 2


async def test_a_place_that_comes_as_its_client_leaves_goes_to_the_next():
    turns = Turns()
    first = await turns.take("a")
    leaving, next_one = (asyncio.ensure_future(turns.take(client)) for client in "bc")
    await asyncio.sleep(0)
    first()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    (await next_one)()
    assert turns.free == 1 and not turns.held_by
