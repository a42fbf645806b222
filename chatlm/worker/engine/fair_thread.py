"""A thread that serves clients in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from chatlm.common.lanes import Lanes


class FairThread:
    """A thread that serves clients in turn. It is as urgent as others: somebody waits for what it does, and
    while it holds Python's lock, which llguidance does for half a second, everybody does."""

    def __init__(self, name: str):
        self.thread = ThreadPoolExecutor(1, name)
        self.lock = threading.Lock()
        self.lanes = Lanes()
        self.mean_s = 0.0  # moving average of the time a task takes

    def submit(self, client: str, work: Callable, *arguments) -> Future:
        """Queue work(*arguments); the future can be cancelled until its turn comes."""
        future: Future = Future()
        with self.lock:
            self.lanes.append(client, (future, work, arguments))
        self.thread.submit(self._work)
        return future

    @property
    def behind_s(self) -> float:
        with self.lock:
            return self.mean_s * len(self.lanes)

    def _work(self):
        with self.lock:
            future, work, arguments = self.lanes.pop()
        if not future.set_running_or_notify_cancel():
            return
        began_s = time.monotonic()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # whatever it is: somebody waits for the future
            future.set_exception(error)
        self.mean_s += 0.1 * (time.monotonic() - began_s - self.mean_s)
