"""Supervision: starts workers again that end, and kills those that hang."""

from __future__ import annotations

import asyncio
import time
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, without_folders
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.common.messages.protocol import (
    AdapterLoaded, CacheEmptied, Crashed, Loading, ModelCard, ModelText, Ready, Stepped, Unusable)
from chatlm.common.messages.wire import BadMessage
from chatlm.common.program import stamp_at_start, why_outdated
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.pool.files_revision import FilesRevision, has_other_files
from chatlm.front.pool.worker import Launcher, Worker, WorkerState

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import TextSpec
    from chatlm.front.pool.pool_adapters import PoolAdapters
    from chatlm.front.pool.dispatcher import Dispatcher


class Placement(Launcher, typing.Protocol):
    """Where workers run: on this machine's devices (`LocalDevices`) or on the nodes of a Ray cluster
    (`RayNodes`). It makes the workers and starts their processes."""

    workers: list[Worker]  # shared with others; only the placement adds and removes some
    settings: Settings     # of the workers; names of models become paths once these have been found

    async def start(self, supervisor: Supervisor):
        """Have the supervisor keep each worker alive, from when it may start."""

    def stats(self) -> dict:
        """Its part of /stats."""
        ...


class Supervisor:
    """Keeps workers alive and handles their messages: progress and the model's card while they load, then the
    steps, which it passes to the dispatcher. It knows whether a request would find a worker."""

    # While no worker is ready, requests wait for twice the load time, and
    ORPHAN_S = 300.0   # this long,
    CRASHING_S = 60.0  # or only this long if a worker is in a crash loop.
    AWAITED_S = 1.0    # pause before a restart, if the worker can start and a request waits for it

    def __init__(self, settings: Settings, workers: Seq[Worker], dispatcher: Dispatcher,
                 adapters: PoolAdapters, *, prepare: Callable[[ModelCard], Awaitable[None]],
                 report: Callable[[str, float], None], expect: Callable[[TextSpec], Awaitable[None]]):
        """prepare: awaited once, with the card of the first worker that has read the model. expect: awaited
        before that, with the text that the card will have. report: called with the stage and the share of
        loading."""
        self.settings = settings
        self.workers = workers
        self.dispatcher = dispatcher
        self.adapters = adapters
        self.prepare = prepare
        self.report = report
        self.expect = expect
        stamp_at_start()  # the first pool notes it
        self.revision = FilesRevision(workers, dispatcher)
        self.closing = False
        self.asleep = False                  # True: unloaded, and not loaded again yet
        self.wanted = asyncio.Event()        # cleared: workers stay unloaded until `load`
        self.wanted.set()
        self.loading = ("starting", 0.0)     # stage, share
        self.became_ready = asyncio.Event()  # also set when start-up failed
        self.failure: ChatServerError | None = None
        self.tell_failure: Callable[[ChatServerError], None] = lambda error: None  # see tell_failure_to
        self.served_s = time.monotonic()     # when a worker was last ready, or no request waited for one
        self.load_s = 0.0                    # seconds from start to ready of the last worker
        self.tasks: set[asyncio.Task] = set()

    def run(self, what: str, work: Callable[[], Any]):
        """Run a part of the pool in the background. If it fails before the pool is ready, start-up fails;
        later, it is run again."""
        def failed(error: Exception) -> bool:
            if not self.became_ready.is_set():
                known = isinstance(error, ChatServerError)
                self.give_up(error if known else EngineFailure(f"{what} failed: {error}"))
            return not self.closing

        task = asyncio.create_task(supervised(what, work, failed))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def tell_failure_to(self, gave_up: Callable[[ChatServerError], None]):
        """Have this called if start-up fails, or if a worker that is needed again later cannot start."""
        self.tell_failure = gave_up

    def give_up(self, error: ChatServerError):
        """Note that start-up has failed."""
        self.failure = self.failure or error
        self.closing = True
        self.revision.close()
        self.became_ready.set()
        self.tell_failure(self.failure)

    @property
    def ready_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state is WorkerState.READY]

    @property
    def ready(self) -> bool:
        """Would a request be served now? An unloaded model is loaded for it."""
        return self.prepared and bool(self.asleep or self.ready_workers)

    def load_fraction(self) -> float | None:
        """Which share of the model is loaded; None: all of it. While it is being unloaded, that is 0."""
        if self.dispatcher.held:
            return 0.0
        return None if self.ready_workers else round(self.loading[1], 3)

    async def keep_alive(self, worker: Worker):
        """Start the worker, and again whenever it dies, after a pause that grows with each crash in a row."""
        last_ending = ""  # of the process before
        while True:
            await self.wanted.wait()
            worker.error = ""
            ready_s = worker.ready_s
            if self.closing or worker not in self.workers:  # its node is gone
                return
            if error := await self.revision.may_read(worker):
                return self.leave_out(worker, error)
            await self._live(worker)
            if worker.state is WorkerState.LEFT_OUT:
                return
            if self.closing or worker.state is WorkerState.UNLOADED or worker not in self.workers:
                continue
            ending = worker.error or worker.placement.end_in_words(worker)
            if worker.ready_s == ready_s:
                worker.failed_starts += 1
            if error := self._note_death(worker, ending, is_same=ending == last_ending):
                return self.leave_out(worker, error)
            last_ending = ending
            self.fail_in_vain()
            delay_s = min(30.0, 0.25 * 2 ** worker.crashes_in_row)
            log.error("%s died (%s); restarting it in %.1f s", worker.where, worker.last_end, delay_s)
            await self._pause(worker, delay_s)
            worker.restarts += 1

    def _note_death(self, worker: Worker, ending: str, is_same: bool) -> EngineFailure | None:
        """Note how a worker's process ended. Returns an error if the worker is given up: it never was ready,
        and has failed to start three times, or twice in the same way. is_same: did the process before end in
        the same way?"""
        self.asleep = False
        worker.crashes_in_row += 1
        worker.last_end = ending
        if why := why_outdated():  # its messages may differ from ours
            worker.last_end += f"; {why}"
        if worker.failed_starts < (2 if is_same else 3):
            return None
        worker.cannot_start = worker.cannot_start or worker.last_end
        if worker.ready_s:
            return None
        return EngineFailure(
            f"worker {worker.gpu} cannot start: it ended {worker.failed_starts} times, the last time at "
            f"{self.loading[0]!r} ({worker.last_end}; {available_memory() >> 20:,} MiB of memory are free)")

    async def _pause(self, worker: Worker, delay_s: float):
        """Wait before a worker is started again. If it can start and a request waits for it, do not wait
        longer than AWAITED_S."""
        now = time.monotonic()
        end_s = now + delay_s
        enough_s = end_s if worker.failed_starts else now + self.AWAITED_S
        while now < end_s and not (self.dispatcher.jobs and now >= enough_s):
            await asyncio.sleep(min(end_s - now, 0.25))
            now = time.monotonic()

    async def _live(self, worker: Worker):
        """Run a worker's process until it ends. Afterwards its jobs are back in the queue."""
        try:
            await worker.listen(self.handle)
        except BadMessage as error:
            log.error("%s: %s", worker.where, error)
            worker.error = str(error)
        finally:
            worker.become(WorkerState.DEAD)
            try:
                self.dispatcher.requeue(worker)  # first: a process that is stuck in its driver ends slowly
            finally:
                await worker.end()

    def leave_out(self, worker: Worker, error: ChatServerError):
        """A worker cannot start on its device. The others serve; without any, start-up has failed."""
        worker.become(WorkerState.LEFT_OUT, str(error))
        if all(other.state is WorkerState.LEFT_OUT for other in self.workers):
            self.give_up(error)
        elif self.became_ready.is_set():
            log.error("%s", worker.left_out)

    @property
    def why_unservable(self) -> str:
        """Why no worker can start, so that no request can be served now; "" while one may start."""
        reasons = [worker.cannot_start for worker in self.workers if worker.state is not WorkerState.LEFT_OUT]
        if self.asleep or not reasons or not all(reasons):
            return ""
        return reasons[0]

    def fail_in_vain(self):
        """If no worker can start, end the requests that wait for one. Workers are tried again nevertheless:
        their files or the memory may come back."""
        reason = self.why_unservable
        if reason:
            failure = EngineFailure(f"the model cannot be loaded again: {without_folders(reason)}")
            self.dispatcher.fail(failure, *self.dispatcher.jobs.values())

    def handle(self, worker: Worker, message):
        """Handle a message from a worker."""
        match message:
            case Stepped(events, gauges):
                worker.gauges = gauges or worker.gauges
                self.dispatcher.deliver(worker, events)
            case AdapterLoaded():
                error = self.adapters.note(worker, message)
                if error:
                    self.give_up(error)
                self._check_ready()
                self.dispatcher.dispatch()
            case CacheEmptied(able):
                worker.note_emptied(able)
                self.dispatcher.changed()
            case Loading(stage, fraction):
                self.progress(stage, fraction)
                if stage.startswith("waiting"):  # for another machine
                    worker.spawned_s = time.monotonic()
            case ModelText(text):
                worker.text = text
                if not self.prepared:  # its faults are reported before the weights are read
                    self.run("opening the tokenizer", partial(self.expect, text))
            case ModelCard():
                self._note_card(worker, message)
            case Ready(gauges, faults):
                self._note_ready(worker, gauges, faults)
            case Unusable(text):
                worker.error = text
                if not worker.ready_s:
                    self.leave_out(worker, ConfigError(text))
                elif worker.state is WorkerState.LOADING:  # the next process would say the same
                    worker.cannot_start = text
                worker.kill()
            case Crashed(error, traceback):
                worker.error = error
                if worker.ready_s:
                    log.error("%s: %s", worker.where, traceback)
                worker.kill()
            case _:
                raise BadMessage(f"unexpected message from a worker: {type(message).__name__}")

    def _note_card(self, worker: Worker, card: ModelCard):
        """A worker has read the model."""
        card = replace(card, text=worker.text or card.text)
        worker.place = card.place
        worker.text = None
        self._note_drafts(worker, card.without)
        known = self.card
        if known.kernels:  # another worker has read the model before
            if has_other_files(card, known):  # on a node of Ray's
                self._refuse(worker)
            return
        self.revision.note_card(card)
        lengths = card.context_length, card.scored_length
        if not self.prepared or lengths != (known.context_length, known.scored_length):
            # build our tokenizer while the workers warm up
            self.run("opening the tokenizer", self._prepare)

    def _note_ready(self, worker: Worker, gauges: Mapping[str, float | None], faults: dict[str, str]):
        worker.become(WorkerState.READY)
        self.adapters.send_all(worker)
        worker.gauges = gauges
        worker.kernel_faults = faults
        if len(self.workers) > 1:
            log.info("%s is ready: %s", worker.where, worker.place)
        self.asleep = False
        self.load_s = worker.ready_s - worker.spawned_s
        self.dispatcher.use.note()
        self._check_ready()
        self.dispatcher.dispatch()

    def _note_drafts(self, worker: Worker, without: tuple[str, ...]):
        """Log, once for all workers, which draft flags they do without."""
        if without and all(other.without != without for other in self.workers):
            log.warning("%s starts without drafts; its answers are the same, and may take longer: %s",
                        worker.where, "; ".join(without))
        worker.without = without

    def progress(self, stage: str, fraction: float):
        self.loading = (stage, fraction)
        if not self.ready:
            self.report(stage, fraction)

    @property
    def card(self) -> ModelCard:
        return self.revision.card

    @property
    def prepared(self) -> bool:
        """Is there a tokenizer for the revision of the files that the workers have or will read?"""
        return self.revision.opened.is_set()

    def _refuse(self, worker: Worker):
        if error := self.revision.refuse(worker):
            self.leave_out(worker, error)
            worker.kill()

    async def _prepare(self):
        try:
            await self.prepare(self.card)
        except ChatServerError as error:
            self.revision.note_unusable(str(error))
            raise
        self.revision.note_opened()
        self._check_ready()

    async def begin_unloaded(self, card: ModelCard):
        """Begin without workers. `card` has what the headers of the files say: enough to admit requests."""
        self.wanted.clear()
        self.revision.note_card(card)
        self.asleep = True
        for worker in self.workers:
            worker.become(WorkerState.UNLOADED)
        await self._prepare()

    def _check_ready(self):
        if self.ready and (self.asleep or self.adapters.settled):
            self.became_ready.set()
            self.adapters.started = True

    async def watch(self):
        """Once a second: kill hung workers, and fail requests that waited too long."""
        while True:
            await asyncio.sleep(1)
            for worker in self.workers:
                worker.check_health()
            self.adapters.drop_unused()
            crashing = any(worker.crashes_in_row > 1 for worker in self.workers)
            patience_s = 2 * self.load_s + (self.CRASHING_S if crashing else self.ORPHAN_S)
            if self.asleep or self.ready_workers or not self.dispatcher.pending:
                self.served_s = time.monotonic()
            elif time.monotonic() - self.served_s > patience_s:
                ends = [worker.last_end for worker in self.workers if worker.last_end]
                ended = f"; the last one ended: {without_folders(ends[0])}" if ends else ""
                self.dispatcher.fail(EngineFailure(f"no worker came back within {patience_s:.0f} s{ended}"),
                                     *self.dispatcher.pending)

    def load(self):
        """Let the workers of an unloaded model start."""
        self.wanted.set()

    def load_for_request(self):
        """Load an unloaded model, since a request waits for it."""
        if not self.wanted.is_set():
            log.info("a request arrived: loading the model again")
            self.load()

    @property
    def unloaded(self) -> bool:
        """Does it stay unloaded until `load`?"""
        return self.asleep and not self.wanted.is_set()

    def unload(self):
        """End the workers until `load`."""
        self.asleep = True
        self.loading = ("unloaded", 0.0)
        self.wanted.clear()
        for worker in self.workers:
            worker.cannot_start = ""  # for the next request it is tried again
            worker.failed_starts = 0
            if worker.state not in (WorkerState.LEFT_OUT, WorkerState.UNLOADED):
                worker.become(WorkerState.UNLOADED)
                worker.kill()

    @property
    def has_ended(self) -> bool:
        """Have all processes of the workers ended, so that they hold no memory?"""
        return not any(worker.process and worker.process.poll() is None for worker in self.workers)

    async def close(self):
        """End every worker, and wait until it has ended."""
        self.closing = True
        self.revision.close()
        processes = [worker.process for worker in self.workers if worker.process]
        for process in processes:
            process.kill()
        await end_tasks(self.tasks)
        for process in processes:
            await asyncio.to_thread(process.wait)  # harmless if another task has waited for it already
