"""The queue in front of the workers: which answer runs where, and which events its reader gets."""

from __future__ import annotations

import asyncio
import itertools
import operator
import time
import types
from collections import Counter, deque
from collections.abc import (
    AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence as Seq)
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.client_words import rate_limited
from chatlm.common.config import LIMITS
from chatlm.common.errors import ChatServerError, EngineFailure, RequestError, without_folders
from chatlm.common.lanes import Lanes
from chatlm.common.messages.protocol import Cancel
from chatlm.common.messages.requests import (
    Accepted, Ended, Event, Failed, Finished, Piece, PromptProgress, PromptScores, Request)
from chatlm.front.pool.use import ModelUse
from chatlm.front.pool.worker import RECENT_S, Job, Worker, batch_of, cost_of, share_device

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import WorkerEvent
    from chatlm.front.pool.adapters import PoolAdapters


class WaitingQueue:
    """Jobs that wait for a row. Jobs whose worker died come first; then those of the client with the fewest
    rows, with clients that have equally many taking turns; then in the same order texts to embed or to rank,
    and jobs in the background last, among which the order is the same."""

    BACKGROUND = 3  # the first rank of jobs with low priority

    def __init__(self):
        self.lanes = Lanes()

    def __len__(self) -> int:
        return len(self.lanes)

    def __iter__(self) -> Iterator[Job]:
        ranked = sorted(self.lanes.by_client, key=operator.itemgetter(0))
        return itertools.chain.from_iterable(map(self.lanes.by_client.__getitem__, ranked))

    @staticmethod
    def _lane_of(job: Job) -> tuple[int, str]:
        """A job's rank and client; jobs whose worker died share one lane, or two."""
        rank = 4 if job.request.low_priority else 2 if job.request.params.pooling else 1
        died = WaitingQueue.BACKGROUND if job.request.low_priority else 0
        return (died, "") if job.failovers else (rank, job.request.client)

    def append(self, job: Job):
        self.lanes.append(self._lane_of(job), job)

    def append_first(self, job: Job):
        self.lanes.append_first(self._lane_of(job), job)

    def first(self, rows: Mapping[tuple[bool, str], int] = types.MappingProxyType({})) -> Job | None:
        """rows: how many each client has, in the background (True) and before it."""
        lanes = self.lanes.by_client
        lane = min(lanes, key=lambda lane: (lane[0], rows.get((lane[0] >= self.BACKGROUND, lane[1]), 0)),
                   default=None)
        return lanes[lane][0] if lane else None

    def take(self, job: Job):
        """Remove the job, which must be the first of its client."""
        self.lanes.take(self._lane_of(job))

    def remove(self, job: Job):
        self.lanes.remove(self._lane_of(job), job)


TEXTS = 16  # of a request that waits count as one answer for --max-queue


def waiting_of(models: Iterable[Dispatcher], low: bool = True) -> Counter[str]:
    """What each client has waiting: answers and, since a request may have 2,048 texts, TEXTS of these as
    one. low: with jobs in the background, which keep no others out."""
    waiting = Counter()
    texts = Counter()
    for job in (job for model in models for job in model.pending):
        if job.request.low_priority and not low:
            break  # they come last
        if job.request.params.pooling:
            texts[job.request.id, job.request.client] += 1
        else:
            waiting[job.request.client] += 1
    for (_, client), count in texts.items():
        waiting[client] += -(-count // TEXTS)
    return waiting


def rows_of(workers: Iterable[Worker]) -> Counter[tuple[bool, str]]:
    """How many rows each client has on these workers, in the background and before it."""
    return Counter((job.request.low_priority, job.request.client)
                   for worker in workers for job in worker.jobs.values())


class Dispatcher:
    """Distributes answers over a list of workers, which the placement fills and the supervisor keeps alive.

    A job waits in `pending` until a ready worker has a free row. It then goes to the worker with the fewest
    outstanding tokens, unless another one has so much of the prompt cached that it would finish earlier. The
    jobs of a worker that died go to the front of the queue."""

    MAX_FAILOVERS = 3   # fail a request after this many worker deaths without a token in between
    POSITION_S = 0.25   # seconds between updates of a waiting client's position in the queue
    TURN_S = 0.005      # how long one request's events are handled before others get their turn
    PREFIXES = 10_000   # remembered for each worker
    STAY_S = 1.0        # that a job in the background stays at least with a worker that others use

    def __init__(self, settings: Settings, workers: Seq[Worker], adapters: PoolAdapters,
                 all_models: list[Dispatcher] | None = None,
                 changed: Callable[[], None] = lambda: None):
        """all_models: the dispatchers of a server's models, to which this one is added; they share limits
        and turns. changed: called when a job arrives, ends or is moved."""
        self.settings = settings
        self.workers = workers
        self.adapters = adapters
        self.all_models = [] if all_models is None else all_models
        self.all_models.append(self)
        self.jobs: dict[str, Job] = {}  # waiting and running
        self.pending = WaitingQueue()
        self.delayed = 0                # answers that outlived their worker
        self.held = False               # do jobs wait even if workers are ready?
        self.use = ModelUse()
        self.changed = changed

    async def answer(self, request: Request, lengths: Seq[int], arrived_s: float,
                     loading: Callable[[], float | None] = lambda: None) -> AsyncGenerator[Event, None]:
        """Accepted, then pieces, then Finished of each answer to an admitted request; closing the iterator at
        any point cancels it. lengths: the most tokens for an answer to each of its prompts. loading: which
        share of the model is loaded; None: all.

        Raises EngineFailure (workers died too often), Overloaded (shutdown) and RequestError (cancelled)."""
        events = asyncio.Queue()
        prompts = request.prompt_ids or ()
        jobs = [Job(request, ids, length, events, arrived_s, choice, [*request.prefix_token_ids])
                for choice, (ids, length) in
                enumerate(pair for pair in zip(prompts, lengths) for _ in range(request.n))]
        for job, first in zip(jobs, (first for first in request.score_from for _ in range(request.n))):
            job.scored = first
        heads = deque(jobs[::request.n])  # the first job of each prompt
        follow = bool(request.score_from)  # do others wait until the first has cached what they share?
        try:
            self._submit([heads.popleft() for _ in range(min(len(heads), 1 if follow else LIMITS.choices))])
            lengths_of_prompts = tuple(map(len, prompts))
            yield Accepted(sum(lengths_of_prompts), lengths_of_prompts if len(prompts) > 1 else ())
            others = {job.choice: jobs[job.choice + 1:job.choice + request.n] for job in jobs[::request.n]}
            turn_s = time.monotonic()
            left = len(jobs)
            untold = request.params.progress  # the length of the prompt
            while left:
                waited = events.empty()
                if not waited and time.monotonic() - turn_s > self.TURN_S:
                    waited = await asyncio.sleep(0, True)
                if request.params.progress and jobs[0].worker is None:
                    async for progress in self._positions(jobs[0], events, loading):
                        untold = False
                        yield progress
                event = await events.get() if events.empty() else events.get_nowait()
                turn_s = time.monotonic() if waited else turn_s
                if isinstance(event, Exception):
                    raise event
                if untold and not isinstance(event, PromptProgress):  # a short prompt is computed at once
                    length = len(jobs[0].prompt_ids)
                    yield PromptProgress(0, length, length)
                untold = False
                if follow and not isinstance(event, PromptProgress):
                    follow = False
                    self._submit([heads.popleft() for _ in range(min(len(heads), LIMITS.choices - 1))])
                if event.choice in others and not isinstance(event, (PromptProgress, PromptScores)):
                    self._submit(others.pop(event.choice))  # now they can share the prompt's pages
                yield event
                if isinstance(event, Finished):
                    left -= 1
                    if heads:
                        self._submit([heads.popleft()])
        finally:
            event = None  # breaks a cycle: an exception refers to this frame, and the frame to it
            self._abandon(*jobs)
            for worker in self.workers:
                worker.end_request(request.id)

    async def _positions(self, job: Job, events: asyncio.Queue,
                         loading: Callable[[], float | None]) -> AsyncIterator[PromptProgress]:
        """Yield a job's position in the queue and how far its model is loaded, whenever one of them changes,
        until the job starts or has an event."""
        shown = None
        while events.empty() and job.worker is None:
            position = next((number for number, waiting in enumerate(self.pending, 1) if waiting is job), 0)
            progress = PromptProgress(position, len(job.prompt_ids), loading=loading())
            if position and progress != shown:
                yield (shown := progress)
            await asyncio.sleep(self.POSITION_S)

    def _submit(self, jobs: Seq[Job]):
        for job in jobs:
            self.jobs[job.id] = job
            self.pending.append(job)
        self.use.note()
        if not all(job.request.low_priority for job in jobs):
            self.use.note_asked()
        self.dispatch()
        self.changed()

    def hold(self, held: bool):
        """Have all jobs wait that do not run, or no longer."""
        self.held = held

    def idle_s(self, now: float) -> float:
        """For how long it has had nothing to do."""
        return 0.0 if self.jobs else now - self.use.last_s

    @property
    def in_use(self) -> bool:
        """Has it running or recent requests, other than with low priority?"""
        return self.busy or self.use.was_asked

    @property
    def busy(self) -> bool:
        """Are there jobs other than low-priority ones?"""
        return not all(job.request.low_priority for job in self.jobs.values())

    @property
    def running(self) -> bool:
        return any(worker.jobs for worker in self.workers)

    def check_capacity(self, request_id: str, client: str, preparing: Mapping[str, str], low: bool = False):
        """Raise Overloaded if the queue is full or the client has reached its limit, RequestError if the id
        is in use. preparing: id -> client of the requests being read, which count as waiting. low: is it for
        the background, which keeps no other request out of the queue?"""
        waiting = sum(waiting_of(self.all_models, low).values()) + len(preparing)
        free_rows = sum(max(batch_of(worker) - (len(worker.jobs) if low else worker.interactive), 0)
                        for worker in self.workers if worker.takes_jobs)
        if waiting >= self.settings.max_queue + free_rows and not self._may_exceed_queue(
                client, preparing, low):
            raise rate_limited(f"{waiting} requests are already waiting (--max-queue)", 5)
        if (limit := self.settings.max_concurrent_per_key) and limit <= len(
                {job.request.id for model in self.all_models for job in model.jobs.values()
                 if job.request.client == client}
                | {other for other, owner in preparing.items() if owner == client}):
            raise rate_limited(f"at most {limit} of your requests may run at a time "
                               "(--max-concurrent-per-key)")
        if request_id in preparing or any(request_id in model.jobs for model in self.all_models):
            raise RequestError(f"a request with the id {request_id!r} is already running",
                               status=409, code="duplicate_id")

    def _may_exceed_queue(self, client: str, preparing: Mapping[str, str], low: bool) -> bool:
        """May a client's request wait although the queue is full? Yes, while the client itself has less than
        a quarter of the limit waiting, so that another client's backlog cannot keep it out. Never more than
        twice as many requests as the limit wait; here one with a hundred answers counts once, or a few of
        these would keep all other clients out."""
        limit = self.settings.max_queue
        mine = waiting_of(self.all_models, low)[client] + list(preparing.values()).count(client)
        requests = {job.request.id for model in self.all_models for job in model.pending
                    if low or not job.request.low_priority}
        return mine < limit // 4 and len(requests) + len(preparing) < 2 * limit

    def dispatch(self):
        """Assign waiting jobs to workers with a free row, or with one that another client can spare."""
        while self.pending and not self.held:
            rows = rows_of(worker for model in self.all_models for worker in model.workers)
            if (job := self.pending.first(rows)) is None:
                return
            free = [worker for worker in self.workers if worker.can_take(job) and self._able(worker, job)]
            if not (free := free or self._make_room(job)):
                return
            self.pending.take(job)
            if job.dispatched_s is None:
                job.dispatched_s = time.monotonic()
            self._assign(job, min(free, key=partial(cost_of, job=job)))
        if len(self.workers) > 1 and not self.held:
            self._spread()

    def _able(self, worker: Worker, job: Job) -> bool:
        """May a worker run a job?"""
        return self.adapters.able(worker, job.request.params.adapter)

    def _assign(self, job: Job, worker: Worker):
        worker.assign(job)
        worker.prefixes |= job.prefixes
        while len(worker.prefixes) > self.PREFIXES:  # drop the oldest
            del worker.prefixes[next(iter(worker.prefixes))]

    def _spread(self):
        """Move a job in the background from a worker that has others to one that has none, on a device of its
        own: it has to be computed again there, but here it would get only what the others leave."""
        for worker in self.workers:
            if worker.interactive:
                continue
            for job in (job for other in self.workers if other.interactive and not share_device(worker, other)
                        for job in other.jobs.values()):
                if (job.worker and job.request.low_priority and self._able(worker, job)
                        and worker.can_take(job) and time.monotonic() - job.assigned_s > self.STAY_S):
                    job.worker.set_aside(job)
                    return self._assign(job, worker)

    def _make_room(self, job: Job) -> list[Worker]:
        """Set aside the youngest answer of the client with the most rows, if that client keeps at least as
        many rows as the job's client then has. Returns the worker with the freed row.

        Otherwise one client's long answers could occupy all rows until they end. A text makes room for any
        answer, since texts hardly go on beside answers. What is in the background makes room for, and takes
        it from, others in the background alone."""
        mine = job.request.low_priority
        rows = Counter({client: count for (low, client), count in rows_of(self.workers).items()
                        if low == mine})
        running = [other for worker in self.workers if worker.takes_jobs and self._able(worker, job)
                   and not (mine and len(worker.jobs) > batch_of(worker))
                   for other in worker.jobs.values()
                   if not other.failovers and other.request.low_priority == mine]
        texts = [other for other in running
                 if other.request.params.pooling and not job.request.params.pooling]
        [(rich, most)] = rows.most_common(1) or [("", 0)]
        if not texts and most < rows[job.request.client] + 2:
            return []
        running = texts or [other for other in running if other.request.client == rich]
        if not running:
            return []
        victim = max(running, key=operator.attrgetter("dispatched_s"))
        worker = victim.worker
        if worker:
            worker.set_aside(victim)
            self.pending.append_first(victim)
        return [worker] if worker else []

    def deliver(self, worker: Worker, events: Seq[tuple[str, WorkerEvent]]):
        """Pass on the events of a worker's step, each with the id of its answer."""
        now = time.monotonic()
        worker.recent.append((now, sum(len(event.tokens) for _, event in events if isinstance(event, Piece))))
        while worker.recent[0][0] < now - RECENT_S:
            worker.recent.popleft()
        for answer_id, event in events:
            if job := worker.jobs.get(answer_id):
                job.take(event, worker.gpu)
                if isinstance(event, (Ended, Failed)):
                    self._forget(job)
                if isinstance(event, Ended):
                    worker.crashes_in_row = 0
        self.dispatch()

    def requeue(self, worker: Worker):
        """A worker's process has ended: its jobs go to the front of the queue and continue elsewhere."""
        jobs = worker.forget_process()
        self.delayed += len(jobs)
        for job in jobs:
            job.failovers += 1
            job.leave_worker()
            self.pending.append(job)
        for job in jobs:
            if job.failovers >= self.MAX_FAILOVERS:
                reason = f": {without_folders(worker.error)}" if worker.error else ""
                self.fail(EngineFailure(
                    f"{job.failovers} workers died while computing this answer{reason}"), job)
        self.dispatch()
        self.changed()

    def cancel(self, request_id: str) -> bool:
        """Stop a running request; its reader gets RequestError 'cancelled' instead of Finished."""
        jobs = [job for job in self.jobs.values() if job.request.id == request_id]
        self.fail(RequestError("the request was cancelled", status=499, code="cancelled"), *jobs)
        return bool(jobs)

    def cut(self, request_id: str, choice: int, cause: str):
        """End one answer of a request where it is: it has the tokens that its reader has got, or will."""
        for job in [job for job in self.jobs.values()
                    if job.request.id == request_id and job.choice == choice]:
            job.cut(cause)
            self._abandon(job)

    async def end_thinking(self, request_id: str) -> bool:
        """End the reasoning of a request's answers, which then continue; False if none is thinking now."""
        jobs = [job for job in self.jobs.values() if job.request.id == request_id]
        return any(await asyncio.gather(*(job.end_thinking() for job in jobs)))

    def fail(self, error: ChatServerError, *jobs: Job):
        for job in jobs:
            job.events.put_nowait(error)
        self._abandon(*jobs)

    def _abandon(self, *jobs: Job):
        """The reader left or the jobs failed: free their rows and pages within one step."""
        for job in jobs:
            if self.jobs.get(job.id) is job:
                if job.worker:
                    job.worker.send(Cancel(job.worker_id))
                self._forget(job)
        self.dispatch()

    def _forget(self, job: Job):
        del self.jobs[job.id]
        self.use.note()
        job.note_thinking_ends(None)
        if job.worker:
            del job.worker.jobs[job.worker_id]
        else:
            self.pending.remove(job)
        self.changed()
