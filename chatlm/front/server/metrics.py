"""What the front counts and times, for /metrics and the charts of the page."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator
from itertools import accumulate
from typing import TYPE_CHECKING

from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.messages.requests import Finished, Piece

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Event
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.server.ledger import Ledger


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


class Metrics:
    """What the front counts and times itself: `watch` sees the events of every answer.

    These are plain numbers, because each token adds to them: an observation by prometheus_client takes four
    times as long. `MetricFamilies` shows them."""

    REASONS = ("stop", "length", "cancelled", "refused", "error")

    def __init__(self, catalogue: Catalogue, ledger: Ledger):
        self.catalogue = catalogue
        self.ledger = ledger
        self.ttft = Durations()
        self.itl = Durations()
        self.queue = Durations()
        self.whole: dict[str, Durations] = defaultdict(Durations)  # by the reason of the end
        self.requests = Counter[str](dict.fromkeys(self.REASONS, 0))  # by the reason of the end
        self.tokens = Counter[str]()                               # by their kind
        self.responses = Counter[tuple[str, int]]()                # by route and status

    def buckets(self, name: str) -> list[tuple[float, float]]:
        """The buckets of the histogram `ttft` or `itl`."""
        return {"ttft": self.ttft, "itl": self.itl}[name].buckets()

    async def watch(self, events: AsyncGenerator[Event, None], n: int) -> AsyncGenerator[Event, None]:
        """Pass an answer's events on, and count and time them. n: answers to each prompt."""
        began_s = time.monotonic()
        reason = "cancelled"
        last_s: dict[int, float] = {}  # by choice
        try:
            async for event in events:
                if isinstance(event, Piece) and event.tokens:
                    now = time.monotonic()
                    if event.choice not in last_s:
                        self.ttft.observe(now - began_s)
                    else:
                        count = len(event.tokens)
                        self.itl.observe((now - last_s[event.choice]) / count, count)
                    last_s[event.choice] = now
                elif isinstance(event, Finished):
                    reason = event.reason
                    self.queue.observe(event.queue_ms / 1e3)
                    self.tokens["generated"] += event.usage.completion_tokens
                    if event.choice % n == 0:  # as in `usage`, a prompt counts once
                        self.tokens["prompt"] += event.usage.prompt_tokens - event.usage.cached_tokens
                        self.tokens["prompt_cached"] += event.usage.cached_tokens
                yield event
        except Exception as error:
            if not isinstance(error, (Overloaded, RequestError)):
                reason = "error"
            elif error.code != "cancelled":
                reason = "refused"
            raise
        finally:
            await events.aclose()
            self.requests[reason] += 1
            self.whole[reason].observe(time.monotonic() - began_s)
