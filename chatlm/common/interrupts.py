"""Ctrl-C while the program starts and ends, when nothing has to be cleaned up.

Whatever starts the program gives SIGINT its default action before it imports anything: Ctrl-C then ends the
process at once. Python's own handler would show where the imports were."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


@contextmanager
def raised_interrupts() -> Iterator[None]:
    """In this block, Ctrl-C raises KeyboardInterrupt, if outside of it it ends the process. It stays as it is
    where it is ignored, as behind `nohup ... &`, or where Python's handler is there already."""
    ends = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """In this block, Ctrl-C waits for `with_interrupts` or the block's end. So nothing is half made when it
    comes: asyncio's loop, or a coroutine that nobody awaits yet."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


async def with_interrupts(work: Awaitable[Result]) -> Result:
    """Await what `held_interrupts` made. From now on Ctrl-C comes, and one that waited comes at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return await work
