"""A worker as the front sees it, the jobs it computes, and the queue before it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import operator
import subprocess
import time
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import EngineFailure, RequestError
from chatlm.common.lanes import Lanes
from chatlm.common.log import log
from chatlm.common.messages.protocol import (
    NO_GAUGES, WORKER_PIPE, Cancel, EndOfRequest, NewAnswer, NewPrompt, NewRequest, Ping, Stepped,
    WorkerConfig)
from chatlm.common.messages.requests import AnswerParams, Finished, PromptProgress
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import exit_in_words, process_environment, start_child, threads_per_worker
from chatlm.common.processes.torchrun import ranks_here
from chatlm.front.admission.admission import next_message

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Piece, Request
    from chatlm.front.pool.local import LocalPool


RECENT_S = 5        # seconds over which /stats averages the speed
TIMEABLE_S = 0.001  # report no speed for an answer whose tokens took less time than this


@dataclass(eq=False)
class Job:
    """One answer of a request, as the front keeps it: its reader's queue, and what another worker needs to
    continue it."""

    request: Request
    prompt_ids: tuple[int, ...]
    max_tokens: int
    events: asyncio.Queue  # shared by all answers of the request
    arrived_s: float
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)
    scored: int = 0        # prompt tokens whose log-probabilities have arrived
    worker: Worker | None = None
    dispatched_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    failovers: int = 0  # how many workers died with it since its last token
    set_aside: int = 0  # how often it gave up its row to another client

    @property
    def id(self) -> str:
        # no id from a client contains a #
        return f"{self.request.id}#{self.choice}" if self.choice else self.request.id

    @property
    def worker_id(self) -> str:
        """Its name in a worker: new after each set-aside, so that late pieces of the old run do not match."""
        return f"{self.id}##{self.set_aside}" if self.set_aside else self.id

    @cached_property
    def prefixes(self) -> dict[int, int]:
        """hash -> length of the prompt's first 64, 128, 256 .. tokens, to find a worker that caches them."""
        owner, ids = self.request.owner, self.prompt_ids
        return {hash((owner, ids[:64 << n])): 64 << n for n in range(16) if 64 << n <= len(ids)}

    @property
    def prompt(self) -> int:
        """Index of its prompt within the request."""
        return self.choice // self.request.n

    def messages(self, told: set[int] | None) -> Iterator[Any]:
        """The messages a worker still needs; `told`: the prompts it has, None if the request is new to it."""
        request = self.request
        if told is None:
            params = AnswerParams(
                **{each.name: getattr(request, each.name) for each in dataclasses.fields(AnswerParams)})
            yield NewRequest(request.id, params)
        if told is None or self.prompt not in told:
            yield NewPrompt(request.id, self.prompt, self.prompt_ids)
        yield NewAnswer(self.worker_id, request.id, self.prompt, self.choice % request.n, self.max_tokens,
                        tuple(self.output_ids), self.scored)

    def take(self, piece: Piece, gpu: int):
        if piece.reason in ("error", "refused"):
            failure = EngineFailure(piece.stop_reason) if piece.reason == "error" else \
                RequestError(piece.stop_reason, code="invalid_json_schema", param=self.request.grammar_param)
            self.events.put_nowait(failure)
            return
        if piece.prompt_done:
            self.events.put_nowait(PromptProgress(
                0, len(self.prompt_ids), min(piece.prompt_done, len(self.prompt_ids)), self.choice))
            return
        piece = piece._replace(gpu=gpu, choice=self.choice)
        if piece.prompt_logprobs:
            self.failovers, self.scored = 0, self.scored + len(piece.prompt_logprobs)
            self.events.put_nowait(piece)
            return
        if self.request.max_tokens == 0:  # only the prompt is wanted, but the worker draws a token
            piece = piece._replace(tokens=(), text="", logprobs=(), calls=(), reasoning="",
                                   reasoning_tokens=0, reason="length", stop_reason="max_tokens")
        self.last_token_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        self.failovers = 0
        self.output_ids += piece.tokens
        self.events.put_nowait(piece)
        if piece.reason is not None:
            self.events.put_nowait(self._finished(piece))

    def _finished(self, piece: Piece) -> Finished:
        count, seconds = len(self.output_ids), self.last_token_s - self.first_token_s
        wanted, cause = self.request.max_tokens, piece.stop_reason
        if piece.reason == "length" and (wanted is None or wanted > count):
            cause = "context_length"
        return Finished(piece.reason, cause, len(self.prompt_ids), count, piece.cached_tokens,
                        queue_ms=(self.dispatched_s - self.arrived_s + piece.queued_s) * 1e3,
                        ttft_ms=(self.first_token_s - self.arrived_s) * 1e3,
                        tokens_per_second=(count - 1) / seconds if seconds >= TIMEABLE_S else None,
                        gpu=piece.gpu, choice=self.choice,
                        drafted_tokens=piece.drafted_tokens, accepted_tokens=piece.accepted_tokens,
                        dropped_messages=self.request.dropped_messages,
                        reasoning_tokens=piece.reasoning_tokens)


class Worker:
    """The front's handle on one worker process: its pipe, its state, and the jobs it holds."""

    OUTBOX_BYTES = 4 << 20  # a worker with this many unread bytes gets no more answers for now
    EXIT_S = 2.0            # a process that has closed its pipe is killed if it has not exited by then
    BROKEN = asyncio.IncompleteReadError, ConnectionError
    node = ""               # the machine it is on, if it is on Ray

    def __init__(self, pool: LocalPool, gpu: int, device: str = "cpu"):
        self.pool, self.gpu, self.device = pool, gpu, device
        self.state = "loading"  # loading, ready, dead, unloaded (killed on purpose) or left out
        self.place = self.problem = ""       # in words: its device and what it holds; why it is left out
        self.jobs: dict[str, Job] = {}
        self.process: subprocess.Popen | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.gauges = NO_GAUGES
        self.kernel_faults: dict[str, str] = {}
        self.restarts = 0
        self.crashes_in_row = 0              # 0 again after a finished answer or a minute of life
        self.spawned_s = self.ready_s = self.slowest_step_s = 0.0
        self.awaited_s: float | None = None  # when the wait for its next message began; None: no wait
        self.recent: deque[tuple[float, int]] = deque()  # (time, tokens) of the last seconds
        self.prefixes: dict[int, int] = {}   # Job.prefixes of the jobs it was given
        self.told: dict[str, set[int]] = {}  # the requests it knows, and which of their prompts

    async def open(self) -> tuple[asyncio.StreamReader, WorkerConfig]:
        """Start the process and connect; returns what it says, and what it must be told first."""
        self.state = "loading"
        threads = threads_per_worker(len(self.pool.workers) * ranks_here(self.pool.settings))
        self.process, ours = start_child(self.pool.worker_command, "worker", process_environment(threads))
        self.spawned_s = self.awaited_s = time.monotonic()
        reader, self.writer = await asyncio.open_connection(sock=ours)
        secretless = replace(self.pool.settings, keys=(), api_key=())
        return reader, WorkerConfig(secretless, self.pool.source, self.device, threads)

    async def live(self):
        """One life of the process: start it, listen until it is gone, and make sure it has ended."""
        try:
            with suppress(*self.BROKEN):
                reader, config = await self.open()
                self.send(config)
                while True:
                    self.hear(await next_message(reader, WORKER_PIPE))
        except BadMessage as error:
            log.error("%s: %s", self.where, error)
        finally:
            self.awaited_s = None
            if self.state not in ("unloaded", "left out"):
                self.state = "dead"
            try:
                self.pool.orphan(self)  # first, because a process stuck in its driver takes long to end
                with suppress(subprocess.TimeoutExpired, AttributeError):  # its own status tells more
                    await asyncio.to_thread(self.process.wait, self.EXIT_S)
            finally:
                if self.process:
                    self.process.kill()
                    await asyncio.to_thread(self.process.wait)
                if self.writer:
                    self.writer.close()

    @property
    def where(self) -> str:
        return f"worker {self.gpu} ({self.device}{self.node and ' on '}{self.node})"

    @property
    def left_out(self) -> str:
        return f"{self.where} is left out: {self.problem}"

    def end_in_words(self) -> str:
        return exit_in_words(self.process.returncode)

    def send(self, message):
        """Queue a message, for which the worker owes at least one back; never blocks."""
        if self.awaited_s is None:
            self.awaited_s = time.monotonic()
        self.writer.write(WORKER_PIPE.packed(message))

    def start(self, job: Job):
        """Have it compute an answer; send only what it does not know about the request yet."""
        self.jobs[job.worker_id] = job
        for message in job.messages(self.told.get(job.request.id)):
            self.send(message)
        self.told.setdefault(job.request.id, set()).add(job.prompt)

    def end_request(self, request_id: str):
        if self.told.pop(request_id, None):
            self.send(EndOfRequest(request_id))

    @property
    def takes_jobs(self) -> bool:
        """Is it ready, and has it read its messages? (If not, we ask again after its next step.)

        A job with which two workers in a row died may be the cause: until it advances, none joins it."""
        unread = self.writer.transport.get_write_buffer_size() if self.writer else 0
        return (self.state == "ready" and unread < self.OUTBOX_BYTES
                and not any(job.failovers > 1 for job in self.jobs.values()))

    @property
    def can_take(self) -> bool:
        return len(self.jobs) < self.pool.settings.max_batch and self.takes_jobs

    def set_aside(self, job: Job):
        """Stop computing a job; it continues later."""
        self.send(Cancel(job.worker_id))
        del self.jobs[job.worker_id]
        job.worker, job.set_aside = None, job.set_aside + 1

    def hear(self, message):
        """Pass a message on to the pool and restart the clock for the next one."""
        now = time.monotonic()
        if isinstance(message, Stepped) and self.jobs:
            self.slowest_step_s = max(self.slowest_step_s, min(now - self.awaited_s, 30.0))
        self.awaited_s = now
        self.pool.hear(self, message)
        if self.state == "ready" and not self.jobs:
            self.awaited_s = None

    def cost(self, job: Job) -> int:
        """Most tokens it still has to compute, minus those of the job's prompt that its cache may hold."""
        spared = max((length for key, length in job.prefixes.items() if key in self.prefixes), default=0)
        return sum(each.max_tokens - len(each.output_ids) + (0 if each.output_ids else len(each.prompt_ids))
                   for each in self.jobs.values()) - spared

    @property
    def hung(self) -> bool:
        """Is a message overdue: a step, the answer to a ping or, while it loads, a progress report?"""
        patience_s = (self.pool.LOAD_HANG_S if self.state == "loading" else
                      max(self.pool.HANG_S, 20 * self.slowest_step_s))
        return self.awaited_s is not None and time.monotonic() - self.awaited_s > patience_s

    def check_health(self):
        """Once a second: kill it if it hangs, ping it if it is idle, forget crashes that are long past."""
        if self.hung:
            log.error("worker %d has made no progress while %s; killing it", self.gpu,
                      "loading" if self.state == "loading" else "answering" if self.jobs else "idle")
            self.process.kill()
        elif self.state == "ready":
            if self.awaited_s is None:
                self.send(Ping())
            if time.monotonic() - self.ready_s > self.pool.STABLE_S:
                self.crashes_in_row = 0

    def stats(self) -> dict:
        since = time.monotonic() - RECENT_S
        tokens_per_second = sum(tokens for at, tokens in self.recent if at > since) / RECENT_S
        return {"gpu_id": self.gpu, "device": self.device, "node": self.node,
                "pid": self.process and self.process.pid,
                "state": self.state, "place": self.place, "problem": self.problem, **self.gauges,
                "running": len(self.jobs), "restarts": self.restarts, "kernel_faults": self.kernel_faults,
                "crashes_in_row": self.crashes_in_row, "tokens_per_second": round(tokens_per_second, 1),
                "batch_fill": round(len(self.jobs) / self.pool.settings.max_batch, 3)}


class WaitingQueue:
    """Jobs that wait for a row. First come those whose worker died; then those of the client with the fewest
    rows, where clients with equally many take turns; last, in the same order, those of low priority."""

    def __init__(self):
        self.lanes = Lanes()

    def __len__(self) -> int:
        return len(self.lanes)

    def __iter__(self) -> Iterator[Job]:
        ranked = sorted(self.lanes.by_client, key=operator.itemgetter(0))
        return itertools.chain.from_iterable(map(self.lanes.by_client.get, ranked))

    @staticmethod
    def _lane_of(job: Job) -> tuple[int, str]:
        """A job's rank and client; jobs whose worker died share one line."""
        return (0, "") if job.failovers else (1 + job.request.low_priority, job.request.client)

    def append(self, job: Job):
        self.lanes.append(self._lane_of(job), job)

    def append_first(self, job: Job):
        self.lanes.append_first(self._lane_of(job), job)

    def first(self, rows: Mapping[str, int] = types.MappingProxyType({})) -> Job | None:
        lanes = self.lanes.by_client
        lane = min(lanes, key=lambda lane: (lane[0], rows.get(lane[1], 0)), default=None)
        return lanes[lane][0] if lane else None

    def take(self, job: Job):
        """Remove the job, which must be the first of its client."""
        self.lanes.take(self._lane_of(job))

    def remove(self, job: Job):
        self.lanes.remove(self._lane_of(job), job)
