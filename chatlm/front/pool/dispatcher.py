"""The queue in front of the workers. It decides which answer runs where, and passes events to readers."""

from __future__ import annotations

import asyncio
import itertools
import operator
import time
import types
from collections import Counter, deque
from collections.abc import (
    AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence as Seq)
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from chatlm.common.client_words import rate_limited
from chatlm.common.config import LIMITS
from chatlm.common.errors import ChatServerError, EngineFailure, RequestError, without_folders
from chatlm.common.lanes import Lanes
from chatlm.common.log import log
from chatlm.common.messages.protocol import Cancel
from chatlm.common.messages.requests import (
    Accepted, Ended, Event, Failed, Finished, Piece, PromptProgress, PromptScores, Request)
from chatlm.common.request_ids import duplicate_id
from chatlm.front.aio import EventQueue
from chatlm.front.pool.model_use import ModelUse
from chatlm.front.pool.places import Places
from chatlm.front.pool.worker import RECENT_S, Job, Worker

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import AnswerEvent, WorkerEvent
    from chatlm.front.pool.pool_adapters import PoolAdapters


class WaitingQueue:
    """Jobs that wait for a row, by rank: first those whose worker died, then answers, then texts to embed or
    to rank. Jobs in the background come last; among these too, those whose worker died are first.

    Within a rank, the next job is the client's with the fewest rows. Clients that have equally many take
    turns."""

    # ranks
    DIED = 0
    ANSWER = 1
    TEXT = 2
    BACKGROUND_DIED = 3
    BACKGROUND = 4

    def __init__(self):
        self.lanes = Lanes()

    def __len__(self) -> int:
        return len(self.lanes)

    def __iter__(self) -> Iterator[Job]:
        ranked = sorted(self.lanes.by_client, key=operator.itemgetter(0))
        return itertools.chain.from_iterable(map(self.lanes.by_client.__getitem__, ranked))

    def _lane(self, job: Job) -> tuple[int, str]:
        """A job's rank and client. Jobs whose worker died share a lane, whoever their client is."""
        low = job.request.low_priority
        if job.failovers:
            return (self.BACKGROUND_DIED if low else self.DIED), ""
        if low:
            return self.BACKGROUND, job.request.client
        rank = self.TEXT if job.request.params.pooling else self.ANSWER
        return rank, job.request.client

    def append(self, job: Job):
        """Add a job behind its client's others. A later round of an answer goes before those that have not
        begun: its answer holds its place."""
        lane = self._lane(job)
        if job.request.round < 2:
            self.lanes.append(lane, job)
            return
        others = self.lanes.by_client.get(lane, ())
        self.lanes.insert(lane, job, sum(1 for _ in itertools.takewhile(goes_on, others)))

    def append_first(self, job: Job):
        self.lanes.append_first(self._lane(job), job)

    def first(self, rows: Mapping[tuple[bool, str], int] = types.MappingProxyType({})) -> Job | None:
        """The next job. rows: (is it in the background?, client) -> how many rows the client has."""
        def order(lane: tuple[int, str]) -> tuple[int, int]:
            rank, client = lane
            return rank, rows.get((rank >= self.BACKGROUND_DIED, client), 0)

        lanes = self.lanes.by_client
        lane = min(lanes, key=order, default=None)
        return lanes[lane][0] if lane else None

    def take(self, job: Job):
        """Remove the job, which must be the first of its client."""
        self.lanes.take(self._lane(job))

    def remove(self, job: Job):
        self.lanes.remove(self._lane(job), job)

    def discard(self, job: Job):
        """Remove the job from whichever lanes it is in, if any."""
        for lane in [lane for lane, jobs in self.lanes.by_client.items() if job in jobs]:
            self.lanes.remove(lane, job)


def goes_on(job: Job) -> bool:
    """Is it a later round, or was it begun before?"""
    return job.request.round > 1 or job.dispatched_s is not None


TEXTS = 16  # that many texts of a request count as one waiting answer for --max-queue


def waiting_by_client(models: Iterable[Dispatcher], low: bool = True) -> Counter[str]:
    """How much each client has waiting. A request may have 2,048 texts, so TEXTS of them count as one answer.
    An answer in rounds waits too while its tools run. low: count jobs in the background too; they keep no
    others out."""
    waiting = Counter()
    texts = Counter()
    for model in models:
        waiting += model.places.waiting(low)
        for job in model.pending:
            if job.request.low_priority and not low:
                break  # jobs in the background come last
            if job.request.round:  # `places` has counted its answer
                continue
            if job.request.params.pooling:
                texts[job.request.id, job.request.client] += 1
            else:
                waiting[job.request.client] += 1
    for (_, client), count in texts.items():
        waiting[client] += -(-count // TEXTS)
    return waiting


def rows_by_client(workers: Iterable[Worker]) -> Counter[tuple[bool, str]]:
    """How many rows each client has on these workers: (is it in the background?, client) -> rows."""
    return Counter((job.request.low_priority, job.request.client)
                   for worker in workers for job in worker.jobs.values())


def jobs_for(request: Request, lengths: Seq[int], events: EventQueue[AnswerEvent | ChatServerError],
             arrived_s: float) -> list[Job]:
    """The jobs of a request: n answers to its first prompt, then n to the next, and so on. lengths: for each
    prompt, the most tokens of an answer."""
    jobs: list[Job] = []
    for index, (ids, length) in enumerate(zip(request.prompt_ids or (), lengths)):
        scored = request.score_from[index] if request.score_from else 0
        for _ in range(request.n):
            jobs.append(Job(request, ids, length, events, arrived_s, choice=len(jobs),
                            output_ids=[*request.prefix_token_ids], scored=scored))
    return jobs


class StagedJobs:
    """The jobs of a request, and when each is submitted.

    Answers to one prompt share its pages: the first is submitted, and the others once it has an event. Of a
    request with many prompts, LIMITS.choices are submitted; each further one follows when an answer has
    finished. With `score_from` the prompts begin alike, so the others wait until the first has cached that
    beginning."""

    def __init__(self, request: Request, jobs: Seq[Job], submit: Callable[[Seq[Job]], None]):
        n = request.n
        self.submit = submit
        self.first_jobs = deque(jobs[::n])  # of each prompt, not submitted yet
        self.others: dict[int, Seq[Job]] = {}  # by the choice of the first, where there are some
        if n > 1:
            self.others = {job.choice: jobs[job.choice + 1:job.choice + n] for job in jobs[::n]}
        self.is_first_alone = bool(request.score_from)

    def begin(self):
        self.submit_prompts(1 if self.is_first_alone else LIMITS.choices)

    def submit_prompts(self, most: int):
        """Submit the first job of up to `most` further prompts."""
        count = min(len(self.first_jobs), most)
        if count:
            self.submit([self.first_jobs.popleft() for _ in range(count)])

    def note(self, event: AnswerEvent):
        """Submit the jobs that waited for this event."""
        if isinstance(event, PromptProgress):
            return
        if self.is_first_alone:
            self.is_first_alone = False
            self.submit_prompts(LIMITS.choices - 1)
        if event.choice in self.others and not isinstance(event, PromptScores):
            self.submit(self.others.pop(event.choice))


class Dispatcher:
    """Distributes answers over the workers, which the placement makes and the supervisor keeps alive.

    A job waits in `pending` until a ready worker has a free row. It then goes to the worker with the fewest
    outstanding tokens, unless another one has so much of the prompt cached that it would finish earlier. The
    jobs of a worker that died go to the front of the queue."""

    MAX_FAILOVERS = 3   # fail a request after this many worker deaths without a token in between
    POSITION_S = 0.25   # seconds between updates of a waiting client's position in the queue
    TURN_S = 0.005      # how long one request's events are handled before others get their turn
    PREFIXES = 10_000   # how many prefixes are remembered for each worker
    TOGETHER = 32       # submit so many further prompts at once: each time costs a look at all rows
    STAY_S = 1.0        # a job in the background stays at least this long with a worker that others use

    def __init__(self, settings: Settings, workers: Seq[Worker], adapters: PoolAdapters,
                 all_models: list[Dispatcher] | None = None,
                 changed: Callable[[], None] = lambda: None):
        """all_models: the dispatchers of all models of a server, which share limits and turns; this one is
        added to them. changed: called when a job arrives, ends or is moved."""
        self.settings = settings
        self.workers = workers
        self.adapters = adapters
        self.all_models = [] if all_models is None else all_models
        self.all_models.append(self)
        self.jobs: dict[str, Job] = {}  # waiting and running
        self.requests: set[str] = set()  # the ids of theirs, until all answers to a request have ended
        self.places = Places(workers)
        self.pending = WaitingQueue()
        self.delayed = 0                # answers that outlived their worker
        self.held = False               # True: jobs wait even if workers are ready
        self.use = ModelUse()
        self.gone: ChatServerError | None = None  # why nothing is served here any more
        self.changed = changed

    async def answer(self, request: Request, lengths: Seq[int], arrived_s: float,
                     loading: Callable[[], float | None] = lambda: None) -> AsyncGenerator[Event, None]:
        """Yield Accepted, then pieces, then Finished for each answer to an admitted request. Closing the
        iterator at any point cancels the request.

        lengths: for each of its prompts, the most tokens of an answer. loading: returns which share of the
        model is loaded; None: all.

        Raises EngineFailure (workers died too often), Overloaded (shutdown) and RequestError (cancelled, or
        its id is in use)."""
        self.check_served()
        self.check_id(request.id)
        self.requests.add(request.id)
        events: EventQueue[AnswerEvent | ChatServerError] = EventQueue()
        jobs = jobs_for(request, lengths, events, arrived_s)
        staged = StagedJobs(request, jobs, self._submit)
        try:
            staged.begin()
            prompt_lengths = tuple(map(len, request.prompt_ids or ()))
            yield Accepted(sum(prompt_lengths), prompt_lengths if len(prompt_lengths) > 1 else ())
            turn_s = time.monotonic()
            left = len(jobs)
            ended = 0  # answers, for each of which one more prompt may be submitted
            owes_progress = request.params.progress  # no event has told the length of the prompt yet
            while left:
                waited = events.empty()
                if not waited and time.monotonic() - turn_s > self.TURN_S:
                    waited = await asyncio.sleep(0, True)
                if request.params.progress and jobs[0].worker is None:
                    async for progress in self._positions(jobs[0], events, loading):
                        owes_progress = False
                        yield progress
                event = await events.get()
                if waited:
                    turn_s = time.monotonic()
                if isinstance(event, Exception):
                    raise event
                if owes_progress and not isinstance(event, PromptProgress):  # a short prompt has no other
                    length = len(jobs[0].prompt_ids)
                    yield PromptProgress(0, length, length)
                owes_progress = False
                staged.note(event)
                yield event
                if isinstance(event, Finished):
                    left -= 1
                    ended += 1
                if ended >= self.TOGETHER or ended and events.empty():
                    staged.submit_prompts(ended)
                    ended = 0
        finally:
            event = None  # breaks a cycle: an exception refers to this frame, and the frame to it
            self._abandon(*jobs)
            self.requests.discard(request.id)
            for worker in self.workers:
                worker.end_request(request.id)

    async def _positions(self, job: Job, events: EventQueue[AnswerEvent | ChatServerError],
                         loading: Callable[[], float | None]) -> AsyncIterator[PromptProgress]:
        """Yield a job's position in the queue, and how much of its model is loaded, whenever one of them
        changes, until the job starts or has an event."""
        shown = None
        while events.empty() and job.worker is None:
            position = next((number for number, waiting in enumerate(self.pending, 1) if waiting is job), 0)
            progress = PromptProgress(position, len(job.prompt_ids), loading=loading())
            if position and progress != shown:
                shown = progress
                yield progress
            await asyncio.sleep(self.POSITION_S)

    def _submit(self, jobs: Seq[Job]):
        for job in jobs:
            self.jobs[job.id] = job
            self.pending.append(job)
        self.use.note()
        if not all(job.request.low_priority for job in jobs):
            self.use.note_request()
        self.dispatch()
        self.changed()

    def hold(self, held: bool):
        """With `held`, jobs that do not run yet have to wait, even if workers are ready."""
        self.held = held

    def idle_s(self, now: float) -> float:
        """For how many seconds it has had nothing to do."""
        return 0.0 if self.is_needed else now - self.use.last_s

    @property
    def is_needed(self) -> bool:
        """Has it jobs, or answers that will have some once their tools have run?"""
        return bool(self.jobs or self.places)

    @property
    def in_use(self) -> bool:
        """Has it running or recent requests, other than with low priority?"""
        return self.busy or self.use.was_requested

    @property
    def busy(self) -> bool:
        """Has it jobs other than low-priority ones?"""
        return not all(job.request.low_priority for job in self.jobs.values())

    @property
    def running(self) -> bool:
        return any(worker.jobs for worker in self.workers)

    def check_capacity(self, request_id: str, client: str, preparing: Mapping[str, str], low: bool = False):
        """Raise Overloaded if the queue is full or if the client has reached its limit, RequestError if the
        id is in use.

        preparing: id -> client of the requests that are being read, which count as waiting. low: is the
        request in the background? Such requests keep no others out of the queue."""
        waiting = sum(waiting_by_client(self.all_models, low).values()) + len(preparing)
        free_rows = sum(max(worker.rows - (len(worker.jobs) if low else worker.interactive), 0)
                        for worker in self.workers if worker.takes_jobs)
        if waiting >= self.settings.max_queue + free_rows and not self._may_exceed_queue(
                client, preparing, low, free_rows):
            raise rate_limited(f"{waiting} requests are already waiting (--max-queue)", 5)
        limit = self.settings.max_concurrent_per_key
        if limit and len(self._requests_of(client, preparing)) >= limit:
            raise rate_limited(f"at most {limit} of your requests may run at a time "
                               "(--max-concurrent-per-key)")
        if request_id in preparing or any(request_id in model.places for model in self.all_models):
            raise duplicate_id(request_id)
        self.check_id(request_id)

    def check_id(self, request_id: str):
        """Raise RequestError 409 if a request with this id waits or runs."""
        if any(request_id in model.requests for model in self.all_models):
            raise duplicate_id(request_id)

    def _requests_of(self, client: str, preparing: Mapping[str, str]) -> set[str]:
        """The ids of a client's requests: waiting, running, or being read."""
        ids = {request_id for request_id, owner in preparing.items() if owner == client}
        for model in self.all_models:
            ids |= model.places.of(client)
            ids |= {job.request.id for job in model.jobs.values()
                    if job.request.client == client and not job.request.round}
        return ids

    def _may_exceed_queue(self, client: str, preparing: Mapping[str, str], low: bool,
                          free_rows: int) -> bool:
        """May a client's request wait although the queue is full?

        Yes, while the client itself has less than a quarter of the limit waiting, so that another client's
        backlog cannot keep it out. But in all, at most twice the limit of requests wait, beside those for
        which a row is free (answers whose tools run). For that, a request counts once however many answers
        it has. Else a few requests with a hundred answers each would keep all other clients out."""
        limit = self.settings.max_queue
        mine = waiting_by_client(self.all_models, low)[client] + list(preparing.values()).count(client)
        requests = {job.request.id for model in self.all_models for job in model.pending
                    if not job.request.round and (low or not job.request.low_priority)}
        in_rounds = sum(model.places.waiting(low).total() for model in self.all_models)
        waiting = len(requests) + len(preparing) + in_rounds
        return mine < limit // 4 and waiting < 2 * limit + free_rows

    def dispatch(self):
        """Assign waiting jobs to workers with a free row, or with one that another client can spare."""
        rows: Counter[tuple[bool, str]] | None = None  # None: to be counted
        while self.pending and not self.held:
            if rows is None:
                rows = rows_by_client(worker for model in self.all_models for worker in model.workers)
            job = self.pending.first(rows)
            if job is None:
                return
            free = [worker for worker in self.workers if worker.can_take(job) and self._able(worker, job)]
            if not free:
                free = self._make_room(job)
                rows = None
            if not free:
                return
            with self._keeping(job):
                self.pending.take(job)
                if job.dispatched_s is None:
                    job.dispatched_s = time.monotonic()
                best = min(free, key=operator.methodcaller("cost", job)) if len(free) > 1 else free[0]
                self._assign(job, best)
            if rows is not None:
                rows[job.request.low_priority, job.request.client] += 1
        if len(self.workers) > 1 and not self.held:
            self._spread()

    def _able(self, worker: Worker, job: Job) -> bool:
        """May a worker run a job? That depends on the job's adapter."""
        return self.adapters.may_run(worker, job.request.params.adapter)

    def _assign(self, job: Job, worker: Worker):
        worker.assign(job)
        if not job.request.params.temporary:  # else it leaves no pages there
            worker.prefixes |= job.prefixes
        while len(worker.prefixes) > self.PREFIXES:  # drop the oldest
            del worker.prefixes[next(iter(worker.prefixes))]

    def _spread(self):
        """Move a job in the background from a worker with interactive jobs to one without any, on a device of
        its own. There it has to be computed again, but here it would only get what the others leave."""
        for worker in self.workers:
            if worker.interactive:
                continue
            for other in self.workers:
                if not other.interactive or worker.shares_device(other):
                    continue
                for job in other.jobs.values():
                    if job.request.low_priority and self._may_move(job, worker):
                        other.set_aside(job)
                        self._assign(job, worker)
                        return

    def _may_move(self, job: Job, worker: Worker) -> bool:
        stayed_s = time.monotonic() - job.assigned_s
        return self._able(worker, job) and worker.can_take(job) and stayed_s > self.STAY_S

    def _make_room(self, job: Job) -> list[Worker]:
        """Set aside the youngest answer of the client with the most rows, if that client then still has at
        least as many rows as the job's client. Returns the worker with the freed row, if there is one.

        Without that, one client's long answers could occupy all rows until they end. A text makes room for
        any answer, since texts hardly advance beside answers. Jobs in the background only make room for each
        other."""
        low = job.request.low_priority
        rows = Counter({client: count for (is_low, client), count in rows_by_client(self.workers).items()
                        if is_low == low})
        running: list[Job] = []
        for worker in self.workers:
            is_overfull = low and len(worker.jobs) > worker.rows
            if worker.takes_jobs and self._able(worker, job) and not is_overfull:
                running += [other for other in worker.jobs.values()
                            if not other.failovers and other.request.low_priority == low]
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
        """Pass on the events of a worker's step. Each comes with the id of its answer."""
        now = time.monotonic()
        worker.recent.append((now, sum([len(event.tokens) for _, event in events if type(event) is Piece])))
        while worker.recent[0][0] < now - RECENT_S:
            worker.recent.popleft()
        for answer_id, event in events:
            if job := worker.jobs.get(answer_id):
                with self._keeping(job):
                    self._note(job, event, worker)
        self.dispatch()

    def _note(self, job: Job, event: WorkerEvent, worker: Worker):
        job.take(event, worker.gpu)
        if type(event) is Piece:
            return
        if isinstance(event, (Ended, Failed)):
            self._forget(job)
        if isinstance(event, Ended):
            worker.crashes_in_row = 0

    @contextmanager
    def _keeping(self, job: Job) -> Iterator[None]:
        """What fails for one job is our own fault. It ends this job alone, with an error, never the worker
        that it runs on, nor the answers of others there."""
        try:
            yield
        except Exception as error:
            log.error("the answer %s was lost: %s", job.id, error, exc_info=error)
            job.events.put_nowait(EngineFailure(
                "the server lost this answer by a fault of its own: ask again"))
            self._remove(job)

    def _remove(self, job: Job):
        """Remove a job from wherever it is: what is known of its place may be wrong."""
        for name in [name for name, other in self.jobs.items() if other is job]:
            del self.jobs[name]
        for worker in self.workers:
            for name in [name for name, other in worker.jobs.items() if other is job]:
                del worker.jobs[name]
                with suppress(Exception):
                    worker.send(Cancel(name))
        self.pending.discard(job)
        self.changed()

    def requeue(self, worker: Worker):
        """A worker's process has ended: put its jobs at the front of the queue, to continue elsewhere."""
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
        """End one answer of a request where it is. It has the tokens that are already on their way to its
        reader."""
        for job in [job for job in self.jobs.values()
                    if job.request.id == request_id and job.choice == choice]:
            job.cut(cause)
            self._abandon(job)

    async def end_thinking(self, request_id: str) -> bool:
        """End the reasoning of a request's answers, which then continue. False if none is thinking now."""
        jobs = [job for job in self.jobs.values() if job.request.id == request_id]
        return any(await asyncio.gather(*(job.end_thinking() for job in jobs)))

    def fail(self, error: ChatServerError, *jobs: Job):
        for job in jobs:
            job.events.put_nowait(error)
        self._abandon(*jobs)

    def end(self, reason: ChatServerError):
        """Serve nothing any more. What is here ends with the reason, and so does what still comes, such as
        the next round of an answer whose tools run."""
        self.gone = self.gone or reason
        self.fail(reason, *self.jobs.values())

    def check_served(self):
        """Raise the reason if nothing is served here any more."""
        if self.gone:
            raise self.gone.with_traceback(None)

    def _abandon(self, *jobs: Job):
        """Free the rows and pages of jobs within one step: their reader left, or they failed."""
        for job in jobs:
            if self.jobs.get(job.id) is job:
                if job.worker:
                    job.worker.send(Cancel(job.worker_id))
                self._forget(job)
        self.dispatch()

    def _forget(self, job: Job):
        if self.jobs.get(job.id) is job:
            del self.jobs[job.id]
        self.use.note()
        job.note_thinking_ends(None)
        if job.worker is None:
            self.pending.remove(job)
        elif job.worker.jobs.get(job.worker_id) is job:
            del job.worker.jobs[job.worker_id]
        self.changed()
