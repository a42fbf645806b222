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
