"""How long what all clients share is held without a break: the event loop, and threads that wait for nobody.

Times are those of the processor, so that what else the machine does is not counted. /metrics shows them: a
request of one client that holds the others is seen there, whatever room it is in."""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import Any


class Durations:
    """A histogram: how many durations were at most as long as each bound, and their sum."""

    BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300,
                math.inf)

    def __init__(self):
        self.counts = [0] * len(self.BOUNDS_S)
        self.sum_s = 0.0

    def observe(self, duration_s: float, count: int = 1):
        """Note that something took this long, `count` times."""
        self.counts[bisect_left(self.BOUNDS_S, duration_s)] += count
        self.sum_s += duration_s * count

    def buckets(self) -> list[tuple[float, float]]:
        """(Upper bound in seconds, how many were at most that), for each bound."""
        return [*zip(self.BOUNDS_S, map(float, accumulate(self.counts)))]


class Holds:
    """How long what is shared was held each time, by its name. All threads note theirs here."""

    def __init__(self):
        self.lock = threading.Lock()
        self.times: dict[str, Durations] = {}
        self.busy = Counter[str]()  # threads that work now

    def observe(self, name: str, seconds: float):
        with self.lock:
            if name not in self.times:
                self.times[name] = Durations()
            self.times[name].observe(seconds)

    @contextmanager
    def by(self, name: str) -> Iterator[None]:
        """This thread holds it in this block."""
        self._add_busy(name, 1)
        began_s = time.thread_time()
        try:
            yield
        finally:
            self._add_busy(name, -1)
            self.observe(name, time.thread_time() - began_s)

    def _add_busy(self, name: str, change: int):
        with self.lock:
            self.busy[name] += change

    def rows(self) -> list[tuple[Seq[str], Durations]]:
        with self.lock:
            return [([name], times) for name, times in sorted(self.times.items())]

    def busy_rows(self) -> list[tuple[Seq[str], int]]:
        with self.lock:
            return [([name], count) for name, count in sorted(self.busy.items())]


HOLDS = Holds()  # of this process


class LoopSelector(selectors.DefaultSelector):
    """Notes how long the loop does other things between two looks at its sockets and its clock."""

    began_s: float | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.began_s is not None:
            HOLDS.observe("loop", time.thread_time() - self.began_s)
        try:
            return super().select(timeout)
        finally:
            self.began_s = time.thread_time()


def measured_loop() -> asyncio.AbstractEventLoop:
    """An event loop with a LoopSelector."""
    return asyncio.SelectorEventLoop(LoopSelector())


class MeasuredThreads(ThreadPoolExecutor):
    """Threads whose work counts under a name."""

    def __init__(self, threads: int | None, name: str):
        super().__init__(threads, name)
        self.name = name

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def measured() -> Any:
            with HOLDS.by(self.name):
                return fn(*args, **kwargs)
        return super().submit(measured)
