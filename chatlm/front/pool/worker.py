"""A worker as the front sees it, and the jobs that it computes."""

from __future__ import annotations

import asyncio
import enum
import subprocess
import time
import typing
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import EngineFailure, Overloaded, RequestError, without_folders
from chatlm.common.log import log
from chatlm.common.messages.protocol import (
    NO_GAUGES, OF_ALL_PROCESSES, WORKER_PIPE, Cancel, EmptyCache, EndOfRequest, EndThinking, NewAnswer,
    NewPrompt, NewRequest, Ping, Stepped, WorkerConfig)
from chatlm.common.messages.requests import (
    Usage, Embedding, Ended, Failed, Finished, PartSays, Piece, PromptProgress, PromptScores,
    ThinkingEnds)
from chatlm.common.processes.start import patient
from chatlm.common.vision.pictures import of_picture
from chatlm.front.admission.sandbox import next_message

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.requests import (
        AnswerEvent, ModelSource, Request, TextSpec, WorkerEvent)
    from chatlm.front.aio import EventQueue


RECENT_S = 5        # seconds over which /stats averages the speed
TIMEABLE_S = 0.001  # report no speed for an answer whose tokens took less time than this


@dataclass(eq=False)
class Job:
    """One answer of a request, as the front has it: the queue to its reader, and all that another worker
    needs to continue it."""

    request: Request
    prompt_ids: tuple[int, ...]
    max_tokens: int
    events: EventQueue[AnswerEvent | ChatServerError]  # shared by all answers of the request
    arrived_s: float
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)  # begins with the request's prefix_token_ids
    scored: int = 0        # prompt tokens whose log-probabilities have arrived or are not wanted
    worker: Worker | None = None
    dispatched_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    failovers: int = 0       # workers that died with it since its last token
    assigned_s: float = 0.0  # when its worker got it
    set_aside: int = 0       # how often it lost its row to another client
    thinking: bool = False            # did its last piece end in reasoning?
    thinking_ends: int | None = None  # the position from ThinkingEnds
    ending: asyncio.Future[bool] | None = None  # of its reasoning: waits for ThinkingEnds
    spent_s: float = 0.0  # like Usage.compute_s, as last reported by its worker
    left_s: float = 0.0   # the same for the workers that it has left

    @property
    def id(self) -> str:
        # no id from a client contains a #
        return f"{self.request.id}#{self.choice}" if self.choice else self.request.id

    @property
    def worker_id(self) -> str:
        """Its id in a worker. It is new after each set-aside, so that late pieces of the old run are
        ignored."""
        return f"{self.id}##{self.set_aside}" if self.set_aside else self.id

    @cached_property
    def prefixes(self) -> dict[int, int]:
        """Hash -> length of the prompt's first 64, 128, 256 ... tokens, to find a worker with them cached."""
        owner = (self.request.params.owner, self.request.params.adapter)
        ids = self.prompt_ids
        return {hash((owner, ids[:64 << n])): 64 << n for n in range(16) if 64 << n <= len(ids)}

    @property
    def prompt(self) -> int:
        """Index of its prompt within the request."""
        return self.choice // self.request.n

    def outstanding_tokens(self) -> int:
        """The most tokens that a worker still has to compute for it."""
        prompt = 0 if self.output_ids else len(self.prompt_ids)
        return self.max_tokens - len(self.output_ids) + prompt

    def messages(self, sent: set[int] | None) -> Iterator[Any]:
        """The messages that a worker still needs. sent: the prompts that it has; None: the request is new to
        it."""
        request = self.request
        if sent is None:
            yield NewRequest(request.id, request.params)
        if sent is None or self.prompt not in sent:
            yield from map(of_picture, request.pictures)
            yield NewPrompt(request.id, self.prompt, self.prompt_ids, len(request.pictures))
        yield NewAnswer(self.worker_id, request.id, self.prompt, self.choice % request.n, self.max_tokens,
                        tuple(self.output_ids), self.scored, self.thinking_ends,
                        resumed_sent=self.first_token_s is not None, background=request.low_priority)

    def end_thinking(self) -> asyncio.Future[bool]:
        """End its reasoning. The future's result says whether it was thinking."""
        if self.ending is None or self.ending.done():
            self.ending = asyncio.get_running_loop().create_future()
            if self.worker:
                self.worker.send(EndThinking(self.worker_id))
            else:
                self.leave_worker()
        return self.ending

    def leave_worker(self):
        """Wait for another worker, which will continue after the last event of this one."""
        self.worker = None
        self.left_s = self.left_s + self.spent_s
        self.spent_s = 0.0
        self.note_thinking_ends(len(self.output_ids) + 1 if self.thinking else None)

    def note_thinking_ends(self, position: int | None):
        """Its reasoning ends at a position, if that was asked for; None: it is not thinking."""
        if self.ending and not self.ending.done():
            self.ending.set_result(position is not None)
            if self.thinking_ends is None:
                self.thinking_ends = position

    def take(self, event: WorkerEvent, gpu: int):
        """Note an event from a worker, and queue what its reader gets."""
        news = self._news(event, gpu)
        if news is not None:
            self.events.put_nowait(news)

    def cut(self, cause: str):
        """End it for its reader, as if it could have no more tokens."""
        gpu = self.worker.gpu if self.worker else 0
        end = self._finished(Ended("length", cause, Usage(compute_s=self.spent_s), 0.0), gpu)
        self.events.put_nowait(replace(end, stop_reason=cause))

    def _news(self, event: WorkerEvent, gpu: int) -> AnswerEvent | ChatServerError | None:
        """Note an event from a worker. Returns what its reader gets; None for nothing."""
        if type(event) is Piece:  # first: there is one for each step of an answer
            return self._piece(event, gpu)
        match event:
            case PromptProgress():
                return event._replace(choice=self.choice)
            case PromptScores(logprobs):
                self.failovers, self.scored = 0, self.scored + len(logprobs)
                return event._replace(choice=self.choice)
            case Embedding():
                self._note_time()
                return event._replace(choice=self.choice)
            case PartSays():
                return event._replace(choice=self.choice)
            case ThinkingEnds(position):
                return self.note_thinking_ends(position)
            case Ended():
                return self._finished(event, gpu)
            case Failed(message, refused=True):
                return RequestError(message, code="invalid_json_schema",
                                    param=self.request.params.grammar_param)
            case Failed(message, unavailable=True):
                return Overloaded(message)
            case Failed(message):
                return EngineFailure(message)

    def _piece(self, piece: Piece, gpu: int) -> Piece:
        """Note a piece. Returns it as its reader gets it."""
        self._note_time()
        self.spent_s = piece.spent_s
        if piece.deltas:
            self.thinking = piece.deltas[-1].kind == "reasoning"
        if self.request.max_tokens == 0:  # scoring only; the worker draws a token all the same
            piece = Piece()
        self.output_ids += piece.tokens
        return Piece(piece.tokens, piece.deltas, piece.logprobs, self.choice, gpu, self.left_s + self.spent_s)

    def _note_time(self):
        self.failovers = 0
        self.last_token_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s

    def _finished(self, end: Ended, gpu: int) -> Finished:
        first_s = self.first_token_s or self.last_token_s
        dispatched_s = self.dispatched_s or self.arrived_s
        count = len(self.output_ids)
        seconds = self.last_token_s - first_s
        drawn = count - len(self.request.prefix_token_ids)
        most = self.request.max_tokens
        reason = end.reason
        cause = end.stop_reason
        usage = replace(end.usage, prompt_tokens=len(self.prompt_ids), completion_tokens=count,
                        compute_s=self.left_s + end.usage.compute_s)
        if most == 0:
            reason = "length"
            cause = "max_tokens"
            usage = replace(usage, reasoning_tokens=0)
        elif reason == "length" and (most is None or most > count):
            cause = "context_length"
        return Finished(reason, cause, usage,
                        queue_ms=(dispatched_s - self.arrived_s + end.queued_s) * 1e3,
                        ttft_ms=(first_s - self.arrived_s) * 1e3,
                        tokens_per_second=(drawn - 1) / seconds if seconds >= TIMEABLE_S else None,
                        gpu=gpu, choice=self.choice, dropped_messages=self.request.dropped_messages)


class WorkerState(str, enum.Enum):
    """The state of a worker's process. /stats shows the words."""

    AWAITING_NODE = "waiting for Ray"
    LOADING = "loading"    # also before its first process
    READY = "ready"
    DEAD = "dead"          # its process crashed or hung; another is started
    UNLOADED = "unloaded"  # ended to free memory; the next request starts another
    LEFT_OUT = "left out"  # it cannot start on its device and is not tried again


NEXT_STATES = {
    WorkerState.AWAITING_NODE: {WorkerState.LOADING, WorkerState.DEAD},
    WorkerState.LOADING: {WorkerState.AWAITING_NODE, WorkerState.LOADING, WorkerState.READY, WorkerState.DEAD,
                          WorkerState.UNLOADED, WorkerState.LEFT_OUT},
    WorkerState.READY: {WorkerState.DEAD, WorkerState.UNLOADED},
    WorkerState.DEAD: {WorkerState.AWAITING_NODE, WorkerState.LOADING, WorkerState.UNLOADED,
                       WorkerState.LEFT_OUT},
    # left out if its model's files have changed
    WorkerState.UNLOADED: {WorkerState.AWAITING_NODE, WorkerState.LOADING, WorkerState.LEFT_OUT},
    WorkerState.LEFT_OUT: set()}


class CacheState(enum.Enum):
    """Whether a worker has released the memory of its KV pages."""

    HELD = enum.auto()    # no: it was not asked to, or may use the pages again
    ASKED = enum.auto()   # it was asked to, and has not answered yet
    EMPTY = enum.auto()   # yes
    UNABLE = enum.auto()  # it cannot


class Process(typing.Protocol):
    """A worker's process: on this machine (`Popen`) or on a node of Ray's (`RayActor`)."""

    @property
    def pid(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def kill(self): ...
    def wait(self, timeout: float | None = None) -> int | None: ...


class Launcher(typing.Protocol):
    """Starts the processes of workers, and knows the model files that these read."""

    source: ModelSource | None  # the model's files, once they have been found
    renews: bool                # True: the pool switches to changed files; False: it ends if files change

    async def open(self, worker: Worker) -> tuple[asyncio.StreamReader, WorkerConfig]:
        """Start a process and connect to it; sets the worker's process and writer. Returns the stream of its
        messages, and the first message to send to it. Raises ConnectionError if it ended meanwhile."""
        ...

    def changed_source(self) -> ModelSource | None:
        """The source with the current revision of its files; None if unchanged, or if they cannot be read."""

    def is_gone(self) -> bool:
        """Do the files of its source no longer exist?"""
        ...

    def end_in_words(self, worker: Worker) -> str:
        """Why its last process ended."""
        ...


class Worker:
    """The front's handle on one worker process: its pipe, its state, and the jobs that it holds."""

    HANG_S = 30.0           # a step or ping hangs if it takes longer than this, and than 20 slowest steps;
    TEXT_TOKEN_S = 0.03     # plus this for each token of the longest text to embed: one step may have it all
    LOAD_HANG_S = 300.0     # loading hangs if there is no new tensor for this long (slow disk or network)
    STABLE_S = 60.0         # a worker that lives this long is not in a crash loop
    OUTBOX_BYTES = 4 << 20  # a worker with this many unread bytes gets no more answers for now
    EXIT_S = 2.0            # a process that has closed its pipe is killed if it has not exited by then

    def __init__(self, settings: Settings, placement: Launcher, gpu: int, device: str = "cpu",
                 node: str = ""):
        self.settings = settings
        self.placement = placement
        self.gpu = gpu
        self.device = device
        self.node = node                     # its machine, if it runs on Ray; else ""
        self.state = WorkerState.LOADING
        self.problem = ""                    # why it is left out
        self.text: TextSpec | None = None    # of the card that will come
        self.place = ""                      # in words: its device, and what it holds there
        self.jobs: dict[str, Job] = {}
        self.process: Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.gauges: Mapping[str, float | None] = NO_GAUGES
        self.counted = Counter[str]()        # of earlier processes: see OF_ALL_PROCESSES
        self.kernel_faults: dict[str, str] = {}
        self.restarts = 0
        self.error = ""                      # why its process ended, if the process or the front knows
        self.last_end = ""                   # how the process before this one ended
        self.crashes_in_row = 0              # reset by a finished answer or a minute of life
        self.failed_starts = 0               # processes in a row that ended before they were ready
        self.cannot_start = ""               # why the next process will not get ready either; "": it may
        self.without: tuple[str, ...] = ()   # the draft flags that it does without, each with the reason
        self.nice: int | None = None         # its niceness; None: the front's
        self.spawned_s = 0.0
        self.ready_s = 0.0
        self.slowest_step_s = 0.0
        self.awaited_s: float | None = None  # when the wait for its next message began; None: no wait
        self.recent: deque[tuple[float, int]] = deque()  # (time, tokens) of the last seconds
        self.prefixes: dict[int, int] = {}   # Job.prefixes of the jobs assigned to it
        self.sent_prompts: dict[str, set[int]] = {}  # request id -> which of its prompts were sent to it
        self.cache = CacheState.HELD

    def kill(self):
        if self.process:
            self.process.kill()

    def become(self, state: WorkerState, problem: str = ""):
        """Every transition goes through here. A worker that was ended on purpose does not become DEAD."""
        if state is WorkerState.DEAD and self.state in (WorkerState.UNLOADED, WorkerState.LEFT_OUT):
            return
        assert state in NEXT_STATES[self.state], f"{self.where}: {self.state.value} -> {state.value}"
        self.state = state
        self.problem = problem
        now = time.monotonic()
        if state is WorkerState.LOADING:
            self.spawned_s = self.awaited_s = now
        elif state is WorkerState.READY:
            self.ready_s = now
            self.failed_starts = 0
            self.cannot_start = ""

    async def listen(self, handle: Callable[[Worker, Any], None]):
        """Start its process and pass on its messages until its pipe breaks."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            reader, config = await self.placement.open(self)
            self.send(config)
            with suppress(OSError):  # there are many ways for a node to become unreachable
                while True:
                    self.hear(await next_message(reader, WORKER_PIPE), handle)

    def hear(self, message, handle: Callable[[Worker, Any], None]):
        """Pass a message on, and restart the clock for the next one."""
        now = time.monotonic()
        if isinstance(message, Stepped) and self.jobs:
            self.slowest_step_s = max(self.slowest_step_s, min(now - (self.awaited_s or now), 30.0))
        self.awaited_s = now
        handle(self, message)
        if self.state is WorkerState.READY and not self.jobs:
            self.awaited_s = None

    async def end(self):
        """Make sure that its process has ended."""
        if self.process is None:
            return
        try:
            with suppress(subprocess.TimeoutExpired):  # its own exit status is worth a wait
                await asyncio.to_thread(self.process.wait, self.EXIT_S)
        finally:
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

    def send(self, message):
        """Queue a message; never blocks. The worker answers every message with at least one of its own."""
        if self.awaited_s is None:
            self.awaited_s = time.monotonic()
        assert self.writer
        self.writer.write(WORKER_PIPE.packed(message))

    def assign(self, job: Job):
        """Have it compute an answer; send only the parts of the request that it does not have yet."""
        self.jobs[job.worker_id] = job
        job.worker = self
        job.assigned_s = time.monotonic()
        for message in job.messages(self.sent_prompts.get(job.request.id)):
            self.send(message)
        self.sent_prompts.setdefault(job.request.id, set()).add(job.prompt)

    def set_aside(self, job: Job):
        """Stop computing a job; it continues later."""
        self.send(Cancel(job.worker_id))
        del self.jobs[job.worker_id]
        job.set_aside += 1
        job.leave_worker()

    def empty_cache(self):
        """Have it release the memory of its KV pages, unless it was asked already. It has no jobs now."""
        if self.state is WorkerState.READY and self.cache is CacheState.HELD:
            self.cache = CacheState.ASKED
            self.prefixes.clear()
            self.send(EmptyCache())

    def note_emptied(self, able: bool):
        """It has released that memory, or has said that it cannot."""
        if self.cache is CacheState.ASKED:  # else it may use the pages again
            self.cache = CacheState.EMPTY if able else CacheState.UNABLE

    def use_cache(self):
        """It may use its KV pages again."""
        self.cache = CacheState.HELD

    def end_request(self, request_id: str):
        if self.sent_prompts.pop(request_id, None):
            self.send(EndOfRequest(request_id))

    def forget_process(self) -> list[Job]:
        """Reset everything that its process knew, once it has ended. Returns the jobs that it held."""
        jobs = list(self.jobs.values())
        self.jobs = {}
        self.counted += self._counts()
        self.gauges = NO_GAUGES
        self.awaited_s = None
        self.cache = CacheState.HELD
        self.prefixes.clear()
        self.sent_prompts.clear()
        return jobs

    @property
    def rows(self) -> int:
        """How many jobs it runs at once: --max-batch, or fewer if its memory holds fewer states."""
        return int(self.gauges.get("max_batch") or self.settings.max_batch)

    @property
    def takes_jobs(self) -> bool:
        """Is it ready, and has it read its messages? (If not, this is checked again after its next step.)

        If two workers in a row died with a job, that job may be the cause. So until it advances, no other job
        joins it."""
        unread = self.writer.transport.get_write_buffer_size() if self.writer else 0
        return (self.state is WorkerState.READY and unread < self.OUTBOX_BYTES
                and not any(job.failovers > 1 for job in self.jobs.values()))

    def can_take(self, job: Job) -> bool:
        """Has it a free row for this job? Jobs in the background take no rows from others: it sets them
        aside."""
        used = len(self.jobs) if job.request.low_priority else self.interactive
        suspect = job.request.low_priority and job.failovers > 1  # see `takes_jobs`
        return used < self.rows and self.takes_jobs and not (suspect and self.jobs)

    def cost(self, job: Job) -> tuple[int, int]:
        """A sort key; lower is better for this job. Outstanding tokens minus cached ones come first, then the
        number of background jobs that it would displace. For a job in the background, the number of
        interactive jobs that it would wait for comes first, then the tokens."""
        cached = max((length for key, length in job.prefixes.items() if key in self.prefixes), default=0)
        low = job.request.low_priority
        ahead = [other for other in self.jobs.values() if low or not other.request.low_priority]
        tokens = sum(map(Job.outstanding_tokens, ahead)) - cached
        return (self.interactive, tokens) if low else (tokens, len(self.jobs) - self.interactive)

    def shares_device(self, other: Worker) -> bool:
        """Do both compute on one machine's processors?"""
        return self.device == other.device == "cpu" and self.node == other.node

    @property
    def interactive(self) -> int:
        """How many of its jobs are interactive, not in the background."""
        return sum(not job.request.low_priority for job in self.jobs.values())

    @property
    def hung(self) -> bool:
        """Is a message overdue: a step, the answer to a ping or, while loading, a progress report?"""
        if self.awaited_s is None:
            return False
        if self.state is WorkerState.LOADING:
            patience_s = patient(self.LOAD_HANG_S, self.nice)
        else:
            texts = (len(job.prompt_ids) for job in self.jobs.values() if job.request.params.pooling)
            hang_s = self.HANG_S + self.TEXT_TOKEN_S * max(texts, default=0)
            patience_s = max(patient(hang_s, self.nice), 20 * self.slowest_step_s)
        return time.monotonic() - self.awaited_s > patience_s

    def check_health(self):
        """Once a second: kill it if it hangs, ping it if it is idle, forget old crashes."""
        if self.hung:
            doing = "answering" if self.jobs else "idle"
            if self.state is WorkerState.LOADING:
                doing = "loading"
            log.error("worker %d has made no progress while %s; killing it", self.gpu, doing)
            self.error = f"it made no progress while {doing}, and was killed for that"
            self.kill()
        elif self.state is WorkerState.READY:
            if self.awaited_s is None:
                self.send(Ping())
            if time.monotonic() - self.ready_s > self.STABLE_S:
                self.crashes_in_row = 0

    def _counts(self) -> Counter[str]:
        """What this process has counted of what is counted for all processes together."""
        return Counter({name: int(self.gauges.get(name) or 0) for name in OF_ALL_PROCESSES})

    def stats(self) -> dict:
        since = time.monotonic() - RECENT_S
        tokens_per_second = sum(tokens for at, tokens in self.recent if at > since) / RECENT_S
        return {"gpu_id": self.gpu, "device": self.device, "node": self.node,
                "pid": self.process and self.process.pid,
                "state": self.state.value, "place": self.place,
                "problem": self.problem or without_folders(self.cannot_start),
                "without": [*map(without_folders, self.without)], **self.gauges,
                **{name: self.counted[name] + count for name, count in self._counts().items()},
                "running": len(self.jobs), "restarts": self.restarts, "kernel_faults": self.kernel_faults,
                "crashes_in_row": self.crashes_in_row, "tokens_per_second": round(tokens_per_second, 1),
                "batch_fill": min(round(len(self.jobs) / self.rows, 3), 1.0)}
