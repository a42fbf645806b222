"""The pool of workers on this machine: their devices, routing, the queue, failover."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
import time
import typing
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS, sampling_defaults, with_own_sampling
from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, Overloaded, RequestError
from chatlm.common.hub.find import resolve_model
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.common.messages.protocol import NO_GAUGES, Cancel, Loading, ModelCard, Ready, Stepped, Unusable
from chatlm.common.messages.requests import Accepted, Finished, Piece, PromptProgress, TextSpec
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.processes.torchrun import ranks_here
from chatlm.common.program import program_stamp
from chatlm.common.text.tokenizer import tools_of
from chatlm.front.admission.admission import Admission
from chatlm.front.aio import supervised
from chatlm.front.pool.worker import RECENT_S, Job, WaitingQueue, Worker

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Event, ModelSource, Request
    from chatlm.common.text.tokenizer import Tokenizer


# What is known before a worker has told about its model.
NO_CARD = ModelCard(TextSpec("", b""), "loading", 0, (), {}, False)


def sampling_of(pool, settings: Settings) -> dict[str, tuple[float, str]]:
    return sampling_defaults(with_own_sampling(settings, pool))


class Pool(typing.Protocol):
    """What answers requests: workers here (`LocalPool`) or on Ray (`RayPool`), or a server at --url
    (`RemotePool`)."""

    ready: bool
    model_name: str
    context_length: int | None
    on_progress: Callable[[str, float], None]

    async def start(self): ...

    async def wait_ready(self): ...

    def answer(self, request: Request) -> AsyncIterator[Event]: ...

    async def close(self): ...


class LocalPool:
    """The replicas on this machine behind one `answer`: routing, queueing, supervision, failover.

    A request waits in `pending` until a ready worker has a free row. It then goes to the worker with the
    fewest outstanding tokens, unless another has more of the prompt cached than it has extra to compute."""

    HANG_S = 30.0        # a step or ping hangs if it takes longer than this and 20 x the slowest step;
    LOAD_HANG_S = 300.0  # a load, if it reports no tensor for so long: GBs from a slow disk or network
    ORPHAN_S = 300.0     # requests wait this long, plus twice the load time, when no worker is ready;
    CRASHING_S = 60.0    # this long if a worker is in a crash loop
    STABLE_S = 60.0      # a worker that lives this long is not in a crash loop
    MAX_FAILOVERS = 3    # give up a request after this many worker deaths without a token in between
    PLACE_S = 0.25       # seconds between updates of a waiting client's place in the queue
    TURN_S = 0.005       # one request's events are handled for this long before others get their turn
    PREFIXES = 10_000    # remembered per worker
    continues = True     # can it continue the last message of a conversation?

    def __init__(self, settings: Settings, *, worker_command: Seq[str] = PROCESS_COMMAND):
        self.settings, self.worker_command, self.script = settings, worker_command, program_stamp()
        self.workers = self._workers()
        self.jobs: dict[str, Job] = {}
        self.pending = WaitingQueue()
        self.source: ModelSource | None = None
        self.card = NO_CARD
        self.admission = Admission(self._check_capacity)
        self.draining = self.closing = False
        self.wanted = asyncio.Event()   # cleared: workers stay unloaded until the next request
        self.wanted.set()
        self.asleep = False             # True from unloading until the model is back
        self.used_s = time.monotonic()  # when a request last came or was running
        self.started_s = time.monotonic()
        self.created = int(time.time())
        self.loading = ("starting", 0.0)
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.became_ready = asyncio.Event()  # also set when start-up failed
        self.failure: ChatServerError | None = None
        self.served_s = time.monotonic()     # when a worker was last ready, or nothing waited for one
        self.load_s = 0.0                    # how long the last worker took from start to ready
        self.tasks: list[asyncio.Task] = []

    def _workers(self) -> list[Worker]:
        return [Worker(self, gpu, device) for gpu, device in enumerate(choose_devices(self.settings))]

    # life

    async def start(self):
        self._run("finding the model", self._start_workers)
        self._run("watching the workers", self._watch)

    def _run(self, what: str, work: Callable[[], Any]):
        """Run a part of the pool in the background. A failure before the pool is ready ends start-up; after
        that, the part is run again."""
        def failed(error: Exception) -> bool:
            if not self.became_ready.is_set():
                known = isinstance(error, ChatServerError)
                self._give_up(error if known else EngineFailure(f"{what} failed: {error}"))
            return not self.closing

        self.tasks.append(asyncio.create_task(supervised(what, work, failed)))

    async def _start_workers(self):
        loop = asyncio.get_running_loop()

        def report(stage: str, fraction: float):
            if self.closing:  # raised in the thread: stops a download, which deletes what it has so far
                raise InterruptedError
            loop.call_soon_threadsafe(self.progress, stage, fraction)

        self.source = await asyncio.to_thread(resolve_model, self.settings, report)
        for worker in self.workers:
            self._run(f"running worker {worker.gpu}", partial(self._keep_alive, worker))
        await self.admission.sandboxes["templates"].start()  # while the model loads

    def _give_up(self, error: ChatServerError):
        self.failure, self.closing = self.failure or error, True
        self.became_ready.set()

    async def _keep_alive(self, worker: Worker):
        """Restart the worker whenever it dies, after a longer wait for each crash in a row."""
        while not self.closing and worker in self.workers:
            await self.wanted.wait()
            await worker.live()
            if worker.state == "left out":
                return
            if self.closing or worker.state == "unloaded" or worker not in self.workers:
                continue
            self.asleep = False
            worker.crashes_in_row += 1
            how = worker.end_in_words()
            if self.script != program_stamp():  # another version's messages may be others
                how += "; the program has changed since this server started: restart the server"
            if worker.crashes_in_row >= 3 and not worker.ready_s:
                return self.leave_out(worker, EngineFailure(
                    f"worker {worker.gpu} died {worker.crashes_in_row} times while starting, the last time "
                    f"at {self.loading[0]!r} ({how}; {available_memory() >> 20:,} MiB of memory are free)"))
            delay_s = min(30.0, 0.25 * 2 ** worker.crashes_in_row)
            log.error("%s died (%s); restarting it in %.1f s", worker.where, how, delay_s)
            await asyncio.sleep(delay_s)
            worker.restarts += 1

    def leave_out(self, worker: Worker, error: ChatServerError):
        """A worker cannot start on its device. The others serve; without any, start-up has failed."""
        worker.state, worker.problem = "left out", str(error)
        if all(each.problem for each in self.workers):
            self._give_up(error)
        elif self.became_ready.is_set():
            log.error("%s", worker.left_out)

    def orphan(self, worker: Worker):
        """A worker died: its jobs go to the front of the queue and continue elsewhere."""
        jobs, worker.jobs = list(worker.jobs.values()), {}
        worker.gauges = NO_GAUGES
        worker.prefixes.clear()
        worker.told.clear()
        for job in jobs:
            job.worker, job.failovers = None, job.failovers + 1
            self.pending.append(job)
        for job in jobs:
            if job.failovers >= self.MAX_FAILOVERS:
                self.fail(EngineFailure(f"{job.failovers} workers died while computing this answer"), job)
        self.dispatch()

    async def _watch(self):
        """Once a second: kill hung workers, and fail requests that have waited too long for a worker."""
        while True:
            await asyncio.sleep(1)
            for worker in self.workers:
                worker.check_health()
            self._unload_when_idle()
            crashing = any(worker.crashes_in_row > 1 for worker in self.workers)
            patience_s = 2 * self.load_s + (self.CRASHING_S if crashing else self.ORPHAN_S)
            if self.asleep or self.ready_workers or not self.pending:
                self.served_s = time.monotonic()
            elif time.monotonic() - self.served_s > patience_s:
                self.fail(EngineFailure(f"no worker came back within {patience_s:.0f} s"), *self.pending)

    def _unload_when_idle(self):
        """--idle-unload: end the workers when no request came for that long; /health polls do not count."""
        now, idle_s = time.monotonic(), self.settings.idle_unload
        if self.jobs:
            self.used_s = now
        if idle_s and now - self.used_s > idle_s and self.ready_workers == self._usable_workers():
            log.info("no request for %g s: the model is unloaded until the next one", idle_s)
            self.asleep = True
            self.wanted.clear()
            for worker in self._usable_workers():
                worker.state = "unloaded"
                worker.process.kill()

    async def wait_ready(self):
        """Wait until a request would be served. Raises ConfigError or EngineFailure if start-up failed."""
        await self.became_ready.wait()
        if self.failure:
            raise self.failure

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the admitted ones; False if some still run after `timeout_s`."""
        self.draining = True
        deadline_s = time.monotonic() + timeout_s
        while self.jobs and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        return not self.jobs

    async def close(self):
        """End every request with an error, and make sure every worker has ended."""
        self.closing = self.draining = True
        self.fail(EngineFailure("the server is shutting down"), *self.jobs.values())
        processes = [worker.process for worker in self.workers if worker.process]
        for each in processes:
            each.kill()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, self.admission.close(), return_exceptions=True)
        for each in processes:
            await asyncio.to_thread(each.wait)  # harmless if its task has waited for it already

    # what workers report

    def hear(self, worker: Worker, message):
        match message:
            case Loading(stage, fraction):
                self.progress(stage, fraction)
                if stage.startswith("waiting"):  # for another machine
                    worker.spawned_s = time.monotonic()
            case ModelCard():
                worker.place, self.source = message.place, self.source or message.source
                if self.card is NO_CARD:  # build our tokenizer while the workers warm up
                    self.card = message
                    self._run("opening the tokenizer", partial(self._open_tokenizer, message))
            case Ready(gauges_, faults):
                worker.state, worker.gauges, worker.ready_s = "ready", gauges_, time.monotonic()
                worker.kernel_faults = faults
                if len(self.workers) > 1:
                    log.info("%s is ready: %s", worker.where, worker.place)
                self.asleep, self.used_s, self.load_s = (
                    False, worker.ready_s, worker.ready_s - worker.spawned_s)
                self._check_ready()
                self.dispatch()
            case Stepped(pieces, gauges_):
                worker.gauges = gauges_
                self.deliver(worker, pieces)
            case Unusable(text):
                if worker.ready_s:
                    log.error("worker %d: %s", worker.gpu, text)
                else:
                    self.leave_out(worker, ConfigError(text))
                worker.process.kill()
            case _:
                raise BadMessage(f"unexpected message from a worker: {type(message).__name__}")

    def progress(self, stage: str, fraction: float):
        self.loading = (stage, fraction)
        if not self.ready:
            self.on_progress(stage, fraction)

    async def _open_tokenizer(self, card: ModelCard):
        try:
            await self.admission.open(card, with_own_sampling(self.settings, self))
        except ConfigError as error:
            raise ConfigError(f"{self.source.path}: {error}") from None
        self._check_ready()

    def _check_ready(self):
        if self.ready:
            self.became_ready.set()

    def deliver(self, worker: Worker, pieces: Seq[Piece]):
        now = time.monotonic()
        worker.recent.append((now, sum(len(piece.tokens) for piece in pieces)))
        while worker.recent[0][0] < now - RECENT_S:
            worker.recent.popleft()
        for piece in pieces:
            if job := worker.jobs.get(piece.id):
                job.take(piece, worker.gpu)
                if piece.reason is not None:
                    self.forget(job)
                if piece.reason not in (None, "error"):
                    worker.crashes_in_row = 0
        self.dispatch()

    # requests

    async def answer(self, request: Request) -> AsyncIterator[Event]:
        """Accepted, then pieces, then Finished; closing the iterator at any point cancels the request.

        Raises RequestError (the prompt does not fit, ...), Overloaded (not ready, draining, queue full) and
        EngineFailure (workers died too often, shutdown)."""
        arrived_s, events = time.monotonic(), asyncio.Queue()
        if request.prompt_ids is None:
            request = await self.admission.admit(request)
        self._check_capacity(request.id, request.client)
        prompts, length = request.prompt_ids, self.admission.prompts.answer_length
        jobs = [Job(request, ids, length(request, ids), events, arrived_s, choice)
                for choice, ids in enumerate(ids for ids in prompts for _ in range(request.n))]
        heads = deque(jobs[::request.n])  # no request has more prompts than this in the queue at a time
        try:
            self._submit([heads.popleft() for _ in range(min(len(heads), LIMITS.choices))])
            yield Accepted(sum(map(len, prompts)))
            others = {job.choice: jobs[job.choice + 1:job.choice + request.n] for job in jobs[::request.n]}
            turn_s, left = time.monotonic(), len(jobs)
            while left:
                waited = events.empty()
                if not waited and time.monotonic() - turn_s > self.TURN_S:
                    waited = await asyncio.sleep(0, True)
                if request.progress and jobs[0].worker is None:
                    async for progress in self._places(jobs[0], events):
                        yield progress
                event = await events.get()
                turn_s = time.monotonic() if waited else turn_s
                if isinstance(event, Exception):
                    raise event
                if event.choice in others and not (
                        isinstance(event, PromptProgress)
                        or isinstance(event, Piece) and event.prompt_logprobs):
                    self._submit(others.pop(event.choice))  # they can share the prompt's pages now
                yield event
                left -= isinstance(event, Finished)
                if heads and isinstance(event, Finished):
                    self._submit([heads.popleft()])
        finally:
            event = None  # break the cycle: an exception refers to this frame and the frame to it
            self._abandon(*jobs)
            for worker in self.workers:
                worker.end_request(request.id)

    async def _places(self, job: Job, events: asyncio.Queue) -> AsyncIterator[PromptProgress]:
        """Yield a job's place in the queue whenever it changes, until the job starts or has an event."""
        told = 0
        while events.empty() and job.worker is None:
            place = next((place for place, each in enumerate(self.pending, 1) if each is job), 0)
            if place not in (0, told):
                yield PromptProgress(told := place, len(job.prompt_ids))
            await asyncio.sleep(self.PLACE_S)

    def _submit(self, jobs: Seq[Job]):
        for job in jobs:
            self.jobs[job.id] = job
            self.pending.append(job)
        self.used_s = time.monotonic()
        if not self.wanted.is_set():
            log.info("a request came: loading the model again")
            self.wanted.set()
        self.dispatch()

    def _check_capacity(self, request_id: str, client: str):
        if self.draining:
            raise Overloaded("the server is shutting down", retry_after_s=10)
        if self.tokenizer is None or not self.became_ready.is_set():
            raise Overloaded(f"the model is still loading ({self.loading[0]})", retry_after_s=2)
        preparing = self.admission.preparing  # the id of each request that is being read -> its client
        waiting = len(self.pending) + len(preparing)
        free_rows = sum(self.settings.max_batch - len(worker.jobs) for worker in self._free_workers())
        if waiting >= self.settings.max_queue + free_rows and not self._has_a_place(client, waiting):
            raise Overloaded(f"{waiting} requests are already waiting (--max-queue)",
                             retry_after_s=5, status=429)
        if (limit := self.settings.max_concurrent_per_key) and limit <= len(
                {job.request.id for job in self.jobs.values() if job.request.client == client}
                | {each for each, owner in preparing.items() if owner == client}):
            raise Overloaded(f"at most {limit} of your requests may run at a time (--max-concurrent-per-key)",
                             status=429)
        if request_id in self.jobs or request_id in preparing:
            raise RequestError(f"a request with the id {request_id!r} is already running",
                               status=409, code="duplicate_id")

    def _has_a_place(self, client: str, waiting: int) -> bool:
        """May a client's request wait in a full queue? Yes, while the client holds under a quarter of the
        places, so that no other client's pile keeps it out. The queue never exceeds twice its limit."""
        mine = (sum(job.request.client == client for job in self.pending)
                + list(self.admission.preparing.values()).count(client))
        return mine < self.settings.max_queue // 4 and waiting < 2 * self.settings.max_queue

    def dispatch(self):
        """Hand waiting jobs to workers that have a free row, or a row that another client can spare."""
        while self.pending:
            rows = Counter(job.request.client for worker in self.workers for job in worker.jobs.values())
            job = self.pending.first(rows)
            if not (free := self._free_workers() or self._make_room(job, rows)):
                return
            worker = min(free, key=lambda each: each.cost(job))
            self.pending.take(job)
            job.worker = worker
            if job.dispatched_s is None:
                job.dispatched_s = time.monotonic()
            worker.start(job)
            worker.prefixes |= job.prefixes
            while len(worker.prefixes) > self.PREFIXES:  # drop the oldest
                del worker.prefixes[next(iter(worker.prefixes))]

    def _usable_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.problem]

    def _free_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.can_take]

    def _make_room(self, job: Job, rows: Counter[str]) -> list[Worker]:
        """Set aside the youngest answer of the client with the most rows, if that leaves it at least as many
        as the job's client gets; return the worker whose row is now free.

        Otherwise one client's pile of long answers would keep all rows until they end."""
        [(rich, most)] = rows.most_common(1) or [("", 0)]
        if job.request.low_priority or most < rows[job.request.client] + 2:
            return []
        running = [each for worker in self.workers if worker.takes_jobs for each in worker.jobs.values()
                   if each.request.client == rich and not each.failovers]
        if not running:
            return []
        victim = max(running, key=lambda each: (each.request.low_priority, each.dispatched_s))
        worker = victim.worker
        worker.set_aside(victim)
        self.pending.append_first(victim)
        return [worker]

    def cancel(self, request_id: str) -> bool:
        """Stop a running request; its reader gets RequestError 'cancelled' instead of Finished."""
        jobs = [job for job in self.jobs.values() if job.request.id == request_id]
        self.fail(RequestError("the request was cancelled", status=499, code="cancelled"), *jobs)
        return bool(jobs)

    def fail(self, error: ChatServerError, *jobs: Job):
        for job in jobs:
            job.events.put_nowait(error)
        self._abandon(*jobs)

    def _abandon(self, *jobs: Job):
        """The reader has gone or the jobs failed: free their rows and pages within one step."""
        for job in jobs:
            if self.jobs.get(job.id) is job:
                if job.worker:
                    job.worker.send(Cancel(job.worker_id))
                self.forget(job)
        self.dispatch()

    def forget(self, job: Job):
        del self.jobs[job.id]
        if job.worker:
            del job.worker.jobs[job.worker_id]
        else:
            self.pending.remove(job)

    # what the server shows

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.admission.prompts and self.admission.prompts.tokenizer

    @property
    def ready_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == "ready"]

    @property
    def ready(self) -> bool:
        """Would a request be served now?"""
        return self.tokenizer is not None and not self.draining and bool(self.asleep or self.ready_workers)

    @property
    def model_name(self) -> str:
        return self.source.name if self.source and self.card is NO_CARD else self.card.name

    @property
    def context_length(self) -> int:
        return self.card.context_length

    @property
    def own_sampling(self) -> tuple[dict, str]:
        return self.card.sampling, self.card.sampling_origin

    def describe(self) -> list[str]:
        sampling = ", ".join(f"{name} {value:g} ({origin})"
                             for name, (value, origin) in sampling_of(self, self.settings).items())
        tools = {"native": "Tools: native, as its chat template tells them",
                 "generic": "Tools: generic, told by a system prompt because its chat template knows none"}
        here = any(worker.device == "cuda:0" and not worker.node for worker in self.workers)
        gpus = cuda_device_count() if here else 1
        return [line for line in (self.source.chosen, self.source.alternatives, *self.card.lines,
                                  gpus > 1 and self.settings.num_gpus is None and
                                  f"One of {gpus} GPUs is used; --num-gpus auto uses all",
                                  *(worker.left_out for worker in self.workers if worker.problem),
                                  self.settings.command == "serve" and tools.get(tools_of(self.tokenizer)),
                                  f"Sampling unless a request says otherwise: {sampling}") if line]

    def health(self) -> tuple[int, dict]:
        available = sum(not worker.jobs for worker in self.ready_workers)
        status = ("ok" if self.ready else "draining" if self.draining else
                  "unavailable" if self.became_ready.is_set() else "loading")
        body = {"status": status, "ready": self.ready, "num_gpus": len(self.workers),
                "available_workers": available}
        if status == "loading":
            body["loading"] = {"stage": self.loading[0], "fraction": round(self.loading[1], 3)}
        if looping := [worker for worker in self.workers if worker.crashes_in_row > 1]:
            body["crash_loops"] = [{"gpu_id": each.gpu, "crashes_in_row": each.crashes_in_row}
                                   for each in looping]
            body["status"] = "degraded" if self.ready else status
        return 200 if self.ready else 503, body

    def stats(self) -> dict:
        busy = sum(bool(worker.jobs) for worker in self.ready_workers)
        return {"total_workers": len(self.workers), "available_workers": len(self.ready_workers) - busy,
                "busy_workers": busy, "tensor_parallel_size": self.settings.tensor_parallel_size,
                "pipeline_parallel_size": self.settings.pipeline_parallel_size,
                "workers": [worker.stats() for worker in self.workers], "model": self.model_name,
                "kernels": self.card.kernels, "decode_core": self.card.core,
                "row_invariant": self.card.row_invariant,
                "sampling": {name: {"value": value, "from": origin} for name, (value, origin)
                             in sampling_of(self, self.settings).items()},
                "context_length": self.context_length, "queue_depth": len(self.pending),
                "uptime_s": round(time.monotonic() - self.started_s, 1)}


def choose_devices(settings: Settings) -> list[str]:
    """torch's device name for each replica, from the flags and the hardware, without importing torch.

    Raises ConfigError for more than one GPU replica without CUDA."""
    cuda = cuda_device_count() if settings.device_type in ("auto", "cuda") else 0
    wanted, ranks = settings.num_gpus or "1", ranks_here(settings)
    if wanted != "auto" and not (re.fullmatch("[0-9]{1,4}", wanted) and 1 <= int(wanted) <= 1024):
        raise ConfigError(f"--num-gpus {wanted}: must be a number from 1, or `auto`")
    if cuda:
        count = max(cuda // ranks, 1) if wanted == "auto" else int(wanted)
        if count * ranks > cuda:
            each = f" of {ranks} ranks each" * (ranks > 1)
            most = f"; at most --num-gpus {cuda // ranks}" * (cuda >= ranks)
            raise ConfigError(f"--num-gpus {count}{each}, but {shown_gpus(cuda)}{most}")
        return [f"cuda:{gpu}" for gpu in range(0, count * ranks, ranks)]
    if settings.device_type == "cuda":
        raise ConfigError(f"--device-type cuda, but {shown_gpus(0)}; --device-type cpu needs none")
    if wanted not in ("auto", "1"):
        raise ConfigError(f"--num-gpus {wanted}, but {shown_gpus(0)}; on CPU use --num-workers {wanted}")
    if settings.device_type == "mps" and ranks > 1:
        raise ConfigError("--device-type mps: several ranks need CUDA devices or the CPU")
    metal = settings.device_type == "mps" or settings.device_type == "auto" and sys.platform == "darwin"
    workers = max(settings.num_workers, 1)
    return ["mps"] if metal and workers == ranks == 1 else ["cpu"] * workers


def device_files() -> int:
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia*"))


def cuda_device_count() -> int:
    """How many GPUs this process may use: CUDA_VISIBLE_DEVICES, else device files (the driver takes 1 s)."""
    files, visible = device_files(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return files
    # the driver shows those before the first that is not there: -1, nothing, 9 where there are 8
    there = itertools.takewhile(lambda entry: int(entry) < files if entry.isdigit() else entry[:1].isalpha(),
                                map(str.strip, visible.split(",")))
    return min(files, len([*there]))


def shown_gpus(count: int) -> str:
    """For errors: how many GPUs there are, and whether it is CUDA_VISIBLE_DEVICES that hides the others."""
    visible, files = os.environ.get("CUDA_VISIBLE_DEVICES"), device_files()
    if visible is not None and files > count:
        return f"CUDA_VISIBLE_DEVICES={visible} shows {count} of {files} GPU(s)"
    return f"this machine has {count} CUDA device(s)" if count else "no CUDA device was found (nvidia-smi -L)"
