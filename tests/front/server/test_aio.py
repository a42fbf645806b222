"""Tasks end when the server ends, also those that lose a cancellation."""

import asyncio

import pytest

from chatlm.front.aio import end_tasks
from chatlm.front.pool.residency import Residency


@pytest.mark.parametrize("turns", range(6))
async def test_a_loop_that_waits_for_an_event_ends_whenever_it_is_cancelled(turns):
    """wait_for, before Python 3.12, loses a cancellation that comes some turns of the event loop after its event."""
    residency = Residency(1)
    task = asyncio.create_task(residency.run())
    for _ in range(3):
        await asyncio.sleep(0)
    residency.changed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    await asyncio.wait_for(end_tasks([task]), 20)
    assert task.done()


async def test_tasks_end_however_they_take_their_cancellation(recwarn):
    async def loses_two():
        for _ in range(2):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                pass
        await asyncio.sleep(3600)

    async def fails():
        try:
            await asyncio.sleep(3600)
        finally:
            raise RuntimeError("while it ends")

    async def has_ended():
        return 1

    tasks = [asyncio.create_task(work()) for work in (loses_two, fails, has_ended)]
    await asyncio.sleep(0)
    await asyncio.wait_for(end_tasks(tasks), 20)
    assert all(task.done() for task in tasks)
    assert tasks[0].cancelled() and str(tasks[1].exception()) == "while it ends" and tasks[2].result() == 1
    await end_tasks([])
