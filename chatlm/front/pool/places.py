"""The places of answers in rounds: each counts as one request from its begin to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence as Seq
from contextlib import contextmanager
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.request_ids import id_of_whole

if TYPE_CHECKING:
    from chatlm.front.pool.worker import Worker


class QueuePlace(NamedTuple):
    """Who holds it, and whether in the background."""

    client: str
    low: bool


class Places:
    """The places that answers in rounds hold at one model, by the ids of these answers.

    Such an answer was admitted once, as any request is. Then it keeps its place: while a worker computes one
    of its rounds, while a round waits for a row, and while its tools run. So its rounds are neither refused
    nor counted, but the answer itself is, once: in the queue unless a worker computes it, and for its
    client's limit. Else answers whose tools all end at a time would fill the queue, and others would be
    refused."""

    def __init__(self, workers: Seq[Worker]):
        self.workers = workers
        self.held: dict[str, QueuePlace] = {}

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.held

    @contextmanager
    def holding(self, request_id: str, place: QueuePlace) -> Iterator[None]:
        self.held[request_id] = place
        try:
            yield
        finally:
            del self.held[request_id]

    def waiting(self, low: bool = True) -> Counter[str]:
        """How many answers of each client no worker computes now. low: count those in the background too."""
        computed = set[str]()
        for worker in self.workers:
            rounds = (job.request.id for job in worker.jobs.values() if job.request.round)
            computed.update(map(id_of_whole, rounds))
        return Counter(place.client for request_id, place in self.held.items()
                       if request_id not in computed and (low or not place.low))

    def of(self, client: str) -> set[str]:
        """The ids of a client's answers."""
        return {request_id for request_id, place in self.held.items() if place.client == client}
