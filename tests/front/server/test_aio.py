"""Tasks end when the server ends, also those that lose a cancellation, and run again ever more seldom while they fail."""

import asyncio
import signal

import pytest

from chatlm.front import aio
from chatlm.front.aio import EventQueue, end_tasks, stop_signals, supervised
from chatlm.front.pool.residency import Residency


@pytest.mark.parametrize("turns", range(6))
async def test_wait_for_loses_no_cancellation(turns):
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


async def test_sighup_stays_ignored_behind_nohup():
    """Where it was not ignored, it drains; after it, as after each of these signals, the next one stops."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        drain, now = stop_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        drain, now = stop_signals()
        signal.raise_signal(signal.SIGHUP)
        await asyncio.wait_for(drain.wait(), 20)
        assert not now.is_set()
        signal.raise_signal(signal.SIGHUP)
        await asyncio.wait_for(now.wait(), 20)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(signal.SIGHUP, before)


async def test_tasks_end_however_they_are_cancelled(recwarn):
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


async def test_what_fails_is_run_again_ever_more_seldom(monkeypatch, caplog):
    """What has run for long is run again soon."""
    now_s, pauses, runs = [0.0], [], []

    async def sleep(pause_s):
        pauses.append(pause_s)
        now_s[0] += pause_s
    monkeypatch.setattr(aio.asyncio, "sleep", sleep)
    monkeypatch.setattr(aio.time, "monotonic", lambda: now_s[0])

    async def work():
        runs.append(now_s[0])
        now_s[0] += 61.0 if len(runs) == 10 else 0.5
        if len(runs) < 13:
            raise ValueError(f"failure {len(runs)}")
        return "done"
    assert await supervised("work", work, failed=lambda error: True) == "done"
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1, 2, 4]
    assert "work failed: failure 1" in caplog.text
    assert await supervised("work", lambda: 1 / 0) is None and len(pauses) == 12    # not again: nobody asked for it


async def test_a_reader_that_is_cancelled_loses_no_event():
    """Not even one that arrives in the same turn of the event loop."""
    queue = EventQueue()
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put_nowait("first")
    reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled() and await queue.get() == "first" and queue.empty()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    queue.put_nowait("second")
    queue.put_nowait("third")
    assert [await queue.get(), await queue.get()] == ["second", "third"]


async def test_events_arrive_in_order_while_the_reader_waits():
    queue = EventQueue()
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    for number in range(3):
        queue.put_nowait(number)
    assert await reader == 0 and [await queue.get(), await queue.get()] == [1, 2]
