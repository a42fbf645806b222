"""What the front counts and times, for /metrics and the charts of the page."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.messages.requests import Finished, Piece
from chatlm.front.held import Durations
from chatlm.front.server.watching import Watcher

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Event
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.intake.budget import Budget
    from chatlm.front.server.ledger import Ledger


def histogram(families: Any, name: str, doc: str, rows: Seq[tuple[Seq[str], Durations]],
              labels: Seq[str] = ()) -> Any:
    """A histogram as a scrape shows it. families: the module prometheus_client.metrics_core."""
    family = families.HistogramMetricFamily(f"chat_server_{name}_seconds", doc, labels=labels, unit="seconds")
    for values, durations in rows:
        buckets = [("+Inf" if bound_s == math.inf else str(float(bound_s)), count)  # as prometheus_client
                   for bound_s, count in durations.buckets()]
        family.add_metric(values, buckets, durations.sum_s)
    return family


class Metrics:
    """What the front counts and times itself. `AnswerTimes` adds what each answer took.

    These are plain numbers, because each token adds to them: an observation by prometheus_client takes four
    times as long. `MetricFamilies` shows them."""

    REASONS = ("stop", "length", "cancelled", "refused", "error")

    def __init__(self, catalogue: Catalogue, ledger: Ledger, budget: Budget):
        self.catalogue = catalogue
        self.ledger = ledger
        self.budget = budget
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


class AnswerTimes(Watcher):
    """Counts and times one answer. n: answers to each prompt."""

    def __init__(self, metrics: Metrics, n: int):
        self.metrics = metrics
        self.n = n
        self.began_s = time.monotonic()
        self.reason = "cancelled"
        self.last_s: dict[int, float] = {}  # by choice

    def comes(self, event: Event):
        if isinstance(event, Piece):
            if event.tokens:
                self._note_tokens(event)
        elif isinstance(event, Finished):
            self.reason = event.reason
            self._note_finished(event)

    def _note_tokens(self, piece: Piece):
        now = time.monotonic()
        if piece.choice not in self.last_s:
            self.metrics.ttft.observe(now - self.began_s)
        else:
            count = len(piece.tokens)
            self.metrics.itl.observe((now - self.last_s[piece.choice]) / count, count)
        self.last_s[piece.choice] = now

    def _note_finished(self, end: Finished):
        self.metrics.queue.observe(end.queue_ms / 1e3)
        tokens = self.metrics.tokens
        tokens["generated"] += end.usage.completion_tokens
        if end.choice % self.n == 0:  # as in `usage`, a prompt counts once
            tokens["prompt"] += end.usage.prompt_tokens - end.usage.cached_tokens
            tokens["prompt_cached"] += end.usage.cached_tokens

    def fails(self, error: Exception):
        if not isinstance(error, (Overloaded, RequestError)):
            self.reason = "error"
        elif error.code != "cancelled":
            self.reason = "refused"

    def ends(self):
        self.metrics.requests[self.reason] += 1
        self.metrics.whole[self.reason].observe(time.monotonic() - self.began_s)
