"""Ctrl-C while the program starts and ends, when nothing has to be cleaned up.

Whatever starts the program gives SIGINT its default action before it imports anything: Ctrl-C then ends the
process at once. Python's own handler would show where the imports were."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
    """In this block of the main thread, Ctrl-C waits for its end. So nothing is half made or half removed."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


# The first lines of a process: Ctrl-C, which a terminal sends to all its processes, ends this one without a
# traceback, also if it came before, while `masked_interrupts` held it
ENDS_ON_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
"""


@contextmanager
def masked_interrupts() -> Iterator[None]:
    """In this block Ctrl-C waits, and in processes that it starts until their ENDS_ON_CTRL_C: a terminal
    sends it to all, and before a new one has code of ours Python would show where its imports were."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
