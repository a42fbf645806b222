"""What the server did since it started: samples of /stats, for the charts of the page."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple, TYPE_CHECKING

from chatlm.front.aio import end_tasks, supervised

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.models import ModelOrAdapter
    from chatlm.front.server.metrics import Metrics

FIRST_INTERVAL_S = 2.0
MOST_SAMPLES = 720   # when there are more, two become one, and the time between two doubles
SHARES = (0.5, 0.95)  # the percentiles of times

Buckets = list[tuple[float, float]]  # (upper bound in seconds, how many were at most that)


class Sample(NamedTuple):
    """The state of the server at one time. A time is None if there was nothing to measure since the last
    sample."""

    at: float  # in seconds since 1970
    running: float
    queued: float
    tokens_per_second: float
    kv_pages_used: float
    memory_used: float
    ttft_ms: float | None  # median time to first token
    ttft_ms_p95: float | None
    itl_ms: float | None  # median time between two tokens
    itl_ms_p95: float | None


def percentiles(now: Buckets, before: Buckets) -> list[float | None]:
    """The percentiles SHARES, in milliseconds, of what a histogram has counted between two moments."""
    earlier = [count for _, count in before] or [0.0 for _ in now]
    counts = [(bound, count - less) for (bound, count), less in zip(now, earlier)]
    whole = counts[-1][1] if counts else 0
    return [milliseconds_at(counts, share * whole) if whole else None for share in SHARES]


def milliseconds_at(counts: Buckets, wanted: float) -> float:
    """The time below which `wanted` measurements are, interpolated within its bucket."""
    low = 0.0
    below = 0.0
    for bound, count in counts:
        if count >= wanted:
            part = (wanted - below) / max(1.0, count - below)
            return 1e3 * (low if bound == float("inf") else low + (bound - low) * part)
        low = bound
        below = count
    return 1e3 * low


def mean_of(first: Sample, second: Sample) -> Sample:
    """The mean of two samples, at the time of the first, so that the oldest sample stays at the start."""
    values = []
    for one, other in zip(first[1:], second[1:]):
        known = [value for value in (one, other) if value is not None]
        values.append(sum(known) / len(known) if known else None)
    return Sample(first.at, *values)


class History:
    """Samples of the server's state since its start, in bounded memory: when there are too many, two become
    one.

    A task takes them from what /stats and /metrics count anyway, so they cost no request anything."""

    def __init__(self, catalogue: Catalogue, metrics: Metrics):
        self.catalogue = catalogue
        self.metrics = metrics
        self.began_s = time.time()
        self.interval_s = FIRST_INTERVAL_S
        self.samples: list[Sample] = []
        self._before: dict[str, Buckets] = {}  # the histograms at the last sample
        self._task: asyncio.Task | None = None

    async def open(self, app=None):
        self._task = asyncio.create_task(supervised("the history of /stats", self._watch))

    async def close(self):
        await end_tasks([self._task] if self._task else [])

    async def _watch(self):
        while True:
            await asyncio.sleep(self.interval_s)
            self.add(self.sample())

    def sample(self) -> Sample:
        stats = self.catalogue.stats(self.catalogue.registry.served_models())
        workers = stats.get("workers", ())

        def total(name: str) -> float:
            return sum(worker.get(name) or 0 for worker in workers)
        return Sample(
            round(time.time(), 1), total("running"), stats.get("queue_depth", 0), total("tokens_per_second"),
            total("kv_pages_used"), total("memory_used"), *self._times("ttft"), *self._times("itl"))

    def _times(self, name: str) -> list[float | None]:
        buckets = self.metrics.buckets(name)
        before = self._before.get(name, [])
        self._before[name] = buckets
        return percentiles(buckets, before)

    def add(self, sample: Sample):
        self.samples.append(sample)
        if len(self.samples) > MOST_SAMPLES:
            pairs = zip(self.samples[::2], self.samples[1::2])
            odd = self.samples[-1:] if len(self.samples) % 2 else []
            self.samples = [mean_of(first, second) for first, second in pairs] + odd
            self.interval_s *= 2

    def body(self, seen: Seq[ModelOrAdapter]) -> dict:
        """The response of /stats/history. The samples count all models, so a key that may see only some
        models gets no samples."""
        everything = len(seen) == len(self.catalogue.registry.served_models())
        return {"since": round(self.began_s, 1), "interval_s": self.interval_s, "fields": Sample._fields,
                "samples": [*self.samples] if everything else []}
