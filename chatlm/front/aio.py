"""Running an event loop; tasks that are watched, awaiting the first of several, and ending them; a queue with
one reader."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from chatlm.common.errors import ChatServerError, lack_of_memory
from chatlm.common.interrupts import masked_interrupts
from chatlm.common.log import log

T = TypeVar("T")

# before work that failed is run again
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


async def supervised(what: str, work: Callable[[], Any],
                     failed: Callable[[Exception], bool] = lambda error: False):
    """Run background work. Log what it raises and pass it to `failed`, which returns True to run it again.

    Nobody would see an exception left in its task, and the server would wait forever for the work. What fails
    again and again is run ever more seldom."""
    pause_s = FIRST_PAUSE_S
    while True:
        began_s = time.monotonic()
        try:
            return await work()
        except Exception as error:
            error = lack_of_memory(error) or error
            again = failed(error)
            known = isinstance(error, ChatServerError)
            if again or not known:  # otherwise the program ends with this error and prints it
                log.error("%s failed: %s", what, error, exc_info=None if known else error)
            if not again:
                return
        pause_s = FIRST_PAUSE_S if time.monotonic() - began_s > LONGEST_PAUSE_S else pause_s
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def in_own_thread(name: str, work: Callable[[], T]) -> asyncio.Future[T]:
    """Run work that may hang, such as that of a file system, in a thread of its own, for which nobody waits
    at the program's end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(setter: Callable[[Any], None], value: Any):
        if not future.done():
            setter(value)

    def run():
        setter, value = future.set_result, None
        try:
            value = work()
        except BaseException as error:
            setter, value = future.set_exception, error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(tell, setter, value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def end_tasks(tasks: Iterable[asyncio.Future]):
    """Cancel tasks, and wait until all have ended, however they do.

    Before Python 3.12 asyncio.wait_for loses a cancellation that arrives just as its own work ends. Such a
    task would run on, and be awaited for ever: it is cancelled again."""
    running = {*tasks}
    while running:
        for task in running:
            task.cancel()
        ended, running = await asyncio.wait(running, timeout=1.0)
        for task in ended:
            task.cancelled() or task.exception()  # else Python would log it as never retrieved


async def first_of(*works) -> int:
    """Run awaitables until the first ends, then cancel the others; return its index or raise its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = next(index for index, task in enumerate(tasks) if task.done())
        tasks[first].result()
        return first
    finally:
        await end_tasks(tasks)


async def all_of(*works):
    """Run awaitables until all have ended; an error of one, which is raised, or leaving ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end_tasks(tasks)


async def interruptible(work):
    """The result of an awaitable, or None if Ctrl-C cancelled it. Nothing else is cancelled."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, lambda: (stopped.set(), task.cancel()))
    try:
        return await task
    except asyncio.CancelledError:
        if not stopped.is_set():
            raise
        return None
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """(drain, now): the first SIGINT, SIGTERM or SIGHUP sets drain, the next one sets now. SIGHUP, which a
    terminal sends when it is closed, stays ignored behind `nohup`."""
    drain = asyncio.Event()
    now = asyncio.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (now if drain.is_set() else drain).set())
    return drain, now


class EventQueue(Generic[T]):
    """A queue without a limit that one task reads. asyncio.Queue serves any number of readers and writers,
    which takes three times as long for each event of a stream."""

    def __init__(self):
        self.events: deque[T] = deque()
        self.reader: asyncio.Future[None] | None = None  # what the reader awaits while there is nothing

    def put_nowait(self, event: T):
        self.events.append(event)
        reader = self.reader
        if reader is not None:
            self.reader = None
            if not reader.done():  # else the reader was cancelled
                reader.set_result(None)

    def empty(self) -> bool:
        return not self.events

    async def get(self) -> T:
        while not self.events:
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        return self.events.popleft()


def run_loop(make: Callable[[], Awaitable[T]], new_loop: Callable[[], asyncio.AbstractEventLoop]) -> T:
    """Run what `make` returns in an event loop (before Python 3.11 in Python's own). Until the loop runs,
    Ctrl-C waits: it would come where the loop is half made, or where nobody awaits what was made. No thread
    may run yet, for it would get it."""
    with masked_interrupts():
        if sys.version_info < (3, 11):
            return asyncio.run(with_interrupts(make()))
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(with_interrupts(make()))


async def with_interrupts(made: Awaitable[T]) -> T:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return await made
