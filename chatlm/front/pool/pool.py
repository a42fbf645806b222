"""The pool: the workers of a model, wherever they run, behind one method `answer`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence as Seq
from contextlib import aclosing, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.client_words import shutting_down
from chatlm.common.config import with_own_sampling
from chatlm.common.errors import ChatServerError, ConfigError, Overloaded, without_folders
from chatlm.common.hub.better import warning_of
from chatlm.common.hub.nanochat_checkpoints import checkpoint_at
from chatlm.common.memory import available_memory
from chatlm.common.messages.requests import sampling_defaults
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.text.tokenizer import tools_of
from chatlm.front.admission.admission import Admission
from chatlm.front.admission.known import known_with
from chatlm.front.pool.pool_adapters import PoolAdapters
from chatlm.front.pool.ray_nodes import RayNodes
from chatlm.front.pool.shared_resources import SharedResources
from chatlm.front.pool.dispatcher import Dispatcher
from chatlm.front.pool.local_devices import LocalDevices, cuda_device_count
from chatlm.front.pool.memory import OwnMemory
from chatlm.front.pool.names import accepted_names
from chatlm.front.pool.places import QueuePlace
from chatlm.front.pool.prefixes import Prefixes
from chatlm.front.pool.served_revision import ServedRevision
from chatlm.front.pool.supervisor import Supervisor
from chatlm.front.pool.files_revision import NO_CARD

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import Known, ModelCard
    from chatlm.common.messages.requests import Event, ModelSource, Request, TextSpec
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.pool.memory import Memory
    from chatlm.front.pool.supervisor import Placement


def default_sampling(pool, settings: Settings) -> dict[str, tuple[float, str]]:
    """Parameter -> its default for the pool's model, and where that comes from."""
    return sampling_defaults(with_own_sampling(settings, pool))


@lru_cache(maxsize=4096)  # the list of models asks for each
def checkpoint_facts(source: ModelSource) -> tuple[tuple[str, str | int], ...]:
    """What the path of a nanochat checkpoint says about it; () for other models."""
    checkpoint = checkpoint_at(source.path) if source.kind == "nanochat" else None
    if checkpoint is None:
        return ()
    return ("tag", checkpoint.place.tag), ("stage", checkpoint.place.stage), ("step", checkpoint.step)


def known_about(pool, settings: Settings) -> Known:
    """All that readers of bodies need to know of a pool's model. Every command and route gets it here, so
    that all of them read a body alike."""
    return known_with(with_own_sampling(settings, pool), pool.tokenizer, pool.supervisor.card.facts)


def free_memory(pool: WorkerPool) -> float:
    """How many bytes another model could take: on the first worker's GPU, else on this machine."""
    for worker in pool.workers:
        if worker.device.startswith("cuda"):
            return (worker.gauges["memory_total"] or 0) - (worker.gauges["memory_used"] or 0)
    return available_memory()


@contextmanager
def naming(source: ModelSource | None) -> Iterator[None]:
    """Put the model's path in front of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source and source.path}: {error}") from None


TOOL_LINES = {
    "native": "Tools: native, described by its chat template",
    "generic": "Tools: described in a system prompt, since the chat template has no place for them"}


class WorkerPool:
    """The replicas of a model behind one `answer`. A placement decides where they run, the supervisor keeps
    them alive, and the dispatcher distributes requests to them. This class admits requests, starts and ends
    the other parts in order, and knows what /health, /stats and the start-up lines show."""

    continues = True         # can it continue the last message of a conversation?
    ends_thinking = True     # can it end reasoning on request?
    chats = True             # does the model have a chat template?
    continues_texts = False  # is it for texts even if it has a template? See Tokenizer.continues_texts
    sees = False             # does it see pictures?

    def __init__(self, settings: Settings, placement: Placement, shared: SharedResources,
                 memory: Callable[[WorkerPool], Memory] = OwnMemory):
        """shared: of all models of its server. memory: makes what decides when the model is loaded."""
        self.shared = shared
        shared.join(self)
        self.prefixes = shared.prefixes
        self.settings = settings
        self.placement = placement
        self.workers = placement.workers
        self.admission = Admission(self._check_capacity, shared.admission)
        self.memory = memory(self)
        self.adapters = PoolAdapters(settings, self.workers, self._own_names)
        self.dispatcher = Dispatcher(settings, self.workers, self.adapters, shared.dispatchers,
                                     self.memory.note_jobs)
        self.supervisor = Supervisor(
            settings, self.workers, self.dispatcher, self.adapters, prepare=self._open_tokenizer,
            expect=self._expect,
            report=lambda stage, fraction: self.on_progress(stage, fraction))
        self.revision = ServedRevision(self.supervisor)
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.draining = False
        self.started_s = time.monotonic()
        self.created = int(time.time())

    def join(self, names_in_use: Callable[[], Seq[str]], gave_up: Callable[[ChatServerError], None],
             draining: bool):
        """From now on, serve beside the other models of a server. names_in_use: returns the names that no
        adapter may have. gave_up: called with the error if a worker cannot start. draining: is the server
        about to end?"""
        self.adapters.avoid_names(names_in_use)
        self.supervisor.tell_failure_to(gave_up)
        self.draining = draining

    def _own_names(self) -> list[str]:
        return accepted_names([self.model_name, *self.settings.served_model_name], self.settings.model)

    async def start(self):
        self.shared.start()
        self.supervisor.run("finding the model", partial(self.placement.start, self.supervisor))
        self.supervisor.run("watching the workers", self.supervisor.watch)
        if self.adapters.folders:
            self.supervisor.run("watching the adapters", self.adapters.watch.run)
        self.memory.start()

    def get_ahead(self):
        """Start what the model's text will need, while the workers read the model."""
        self.supervisor.run("starting a sandbox", self.admission.start_ahead)

    async def _expect(self, text: TextSpec):
        try:
            with naming(self.source):
                await self.admission.expect(text, self.settings)
        except ChatServerError:
            if not self.supervisor.became_ready.is_set():
                raise
            # else the files have changed, and `_open_tokenizer` will report it

    async def _open_tokenizer(self, card: ModelCard):
        self.adapters.refuse_names()
        with naming(self.source):
            await self.admission.open(card, with_own_sampling(self.settings, self))
            self.chats = self.tokenizer is None or self.tokenizer.has_chat_template
            self.continues_texts = self.tokenizer is not None and self.tokenizer.continues_texts
            self.sees = self.tokenizer is not None and self.tokenizer.spec.vision is not None

    async def wait_ready(self):
        """Wait until a request would be served. Raises ConfigError or EngineFailure if start-up failed."""
        await self.supervisor.became_ready.wait()
        if self.supervisor.failure:
            raise self.supervisor.failure

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the admitted ones; False if some still run after `timeout_s`."""
        self.draining = True
        deadline_s = time.monotonic() + timeout_s
        while self.dispatcher.is_needed and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        return not self.dispatcher.is_needed

    async def close(self):
        """End every request with an error that allows to send it again, and make sure that every worker has
        ended."""
        self.draining = True
        self.dispatcher.end(shutting_down())
        await self.supervisor.close()
        self.admission.close()
        with suppress(ValueError):  # it was closed before
            self.shared.dispatchers.remove(self.dispatcher)
        await self.shared.leave(self)

    async def answer(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield Accepted, then pieces, then Finished. Closing the iterator at any point cancels the request.

        Raises RequestError (the prompt does not fit, ...), Overloaded (not ready, draining, queue full,
        shutdown) and EngineFailure (workers died too often)."""
        arrived_s = time.monotonic()
        revision = self.revision.number if request.revision is None else request.revision
        with self.adapters.holding(request.params.adapter):
            goes_on = request.round > 0
            is_new = request.prompt_ids is None
            if is_new:  # it holds its place in the queue meanwhile
                request = await self.admission.admit(request)
            if revision != self.revision.number:
                raise Overloaded("the model's files have changed while this request was read",
                                 retry_after_s=2)
            if is_new:
                self._check_open(goes_on)
            else:
                self._check_capacity(request.id, request.client, request.low_priority, goes_on)
            prompts = self.admission.prompts
            lengths = [prompts.answer_length(request, ids) for ids in request.prompt_ids or () if prompts]
            async with aclosing(self.dispatcher.answer(
                    request, lengths, arrived_s, self.supervisor.load_fraction)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def place_for(self, request: Request) -> Iterator[None]:
        """Hold a place for an answer in rounds, from its begin to its end. Raises Overloaded and RequestError
        as for any other request."""
        self._check_capacity(request.id, request.client, request.low_priority)
        with self.dispatcher.places.holding(request.id, QueuePlace(request.client, request.low_priority)):
            try:
                yield
            finally:
                self.dispatcher.use.note()

    def rename(self, name: str, source: ModelSource | None):
        self.memory.rename(name)
        self.placement.source = source
        self.supervisor.revision.rename(name)

    def cancel(self, request_id: str) -> bool:
        """Stop a running request. Its reader gets RequestError 'cancelled' instead of Finished."""
        return self.dispatcher.cancel(request_id)

    def cut(self, request_id: str, choice: int, cause: str):
        """End one answer of a running request where it is, and give this as its cause."""
        self.dispatcher.cut(request_id, choice, cause)

    async def end_thinking(self, request_id: str) -> bool:
        """End the reasoning of a running request, which then continues. False if it is not thinking now."""
        return await self.dispatcher.end_thinking(request_id)

    def _check_capacity(self, request_id: str, client: str, low: bool = False, goes_on: bool = False):
        """Raise Overloaded if there is no place for a request, RequestError if its id is in use. goes_on: it
        is a round of an answer that holds a place."""
        self._check_open(goes_on)
        if not goes_on:
            self.dispatcher.check_capacity(request_id, client, self.admission.preparing, low)

    def _check_open(self, goes_on: bool):
        """Raise Overloaded if nothing is served now. A drain lets answers go on that have begun."""
        self.dispatcher.check_served()
        if self.draining and not goes_on:
            raise shutting_down()
        opened = self.supervisor.became_ready.is_set() and self.supervisor.prepared
        if self.tokenizer is None or not opened:
            raise Overloaded(f"the model is still loading ({self.supervisor.loading[0]})", retry_after_s=2)
        reason = self.supervisor.why_unservable
        if reason:
            raise Overloaded(f"the model cannot be loaded again: {without_folders(reason)}", retry_after_s=10)

    # what the server shows

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.admission.prompts and self.admission.prompts.tokenizer

    @property
    def ready(self) -> bool:
        """Would a request be served now?"""
        opened = self.supervisor.became_ready.is_set() and not self.supervisor.failure
        return opened and self.supervisor.ready and not self.draining

    @property
    def source(self) -> ModelSource | None:
        return self.placement.source or self.supervisor.card.source

    @property
    def checkpoint(self) -> dict[str, str | int]:
        """The tag, the stage (base, mid, sft, rl or chat) and the step of nanochat's checkpoint; {} for other
        models."""
        return dict(checkpoint_facts(self.source)) if self.source else {}

    @property
    def other_files(self) -> list[Path]:
        """What its workers read in addition to the model's files, when they start or later."""
        settings = self.placement.settings
        flags = [settings.draft_model, settings.mmproj, *settings.draft_text, *settings.lora]
        adapters = [adapter.files.path for adapter in self.adapters.all.values()]
        return [*(Path(name).expanduser() for name in flags if name), *adapters, *self.adapters.folders]

    @property
    def model_name(self) -> str:
        card = self.supervisor.card
        return self.source.name if self.source and card is NO_CARD else card.name

    @property
    def context_length(self) -> int:
        return self.supervisor.card.context_length

    @property
    def prompt_token_s(self) -> float:
        """How long a token of a prompt takes to read, on the slowest worker; 0.0 before any was measured."""
        return max(worker.gauges["prompt_token_s"] or 0.0 for worker in self.workers)

    @property
    def own_sampling(self) -> tuple[dict, str]:
        return self.supervisor.card.sampling, self.supervisor.card.sampling_origin

    def describe(self) -> list[str]:
        """Lines for the start-up log; the last ones only with --verbose."""
        lines = []
        if self.source:
            lines += [self.source.chosen, self.source.alternatives]
        lines += self.supervisor.card.lines
        is_on_first_gpu = any(worker.device == "cuda:0" and not worker.node for worker in self.workers)
        gpus = cuda_device_count() if is_on_first_gpu else 1
        if gpus > 1 and self.settings.num_gpus is None:
            lines.append(f"One of {gpus} GPUs is used; --num-gpus auto uses all")
        lines += [worker.left_out for worker in self.workers if worker.problem]
        lines.append(warning_of(self.model_name))
        if self.settings.verbose:
            lines += self._details()
        return [line for line in lines if line]

    def _details(self) -> list[str]:
        lines = []
        if self.prefixes:
            lines.append(self.prefixes.line)
        if self.settings.command == "serve" and self.tokenizer:
            lines.append(TOOL_LINES.get(tools_of(self.tokenizer) or "", ""))
        if self.tokenizer is None or not self.tokenizer.spec.embedder:
            sampling = ", ".join(f"{name} {value:g} ({origin})" for name, (value, origin)
                                 in default_sampling(self, self.settings).items())
            lines.append(f"Sampling unless a request says otherwise: {sampling}")
        return lines

    @property
    def status(self) -> str:
        """The word for it in /health."""
        if self.ready:
            return "ok"
        if self.draining:
            return "draining"
        return "unavailable" if self.supervisor.became_ready.is_set() else "loading"

    def health(self) -> tuple[int, dict]:
        """(HTTP status, body) of /health."""
        supervisor = self.supervisor
        available = sum(not worker.jobs for worker in supervisor.ready_workers)
        status = self.status
        body = {"status": status, "ready": self.ready, "num_gpus": len(self.workers),
                "available_workers": available}
        if status == "loading":
            stage, fraction = supervisor.loading
            body["loading"] = {"stage": stage, "fraction": round(fraction, 3)}
        looping = [worker for worker in self.workers if worker.crashes_in_row > 1]
        if looping:
            body["crash_loops"] = [{"gpu_id": worker.gpu, "crashes_in_row": worker.crashes_in_row}
                                   for worker in looping]
            body["status"] = "degraded" if self.ready else status
        return 200 if self.ready else 503, body

    def stats(self) -> dict:
        ready = self.supervisor.ready_workers
        card = self.supervisor.card
        busy = sum(bool(worker.jobs) for worker in ready)
        return {"total_workers": len(self.workers), "available_workers": len(ready) - busy,
                "busy_workers": busy, "tensor_parallel_size": self.settings.tensor_parallel_size,
                "pipeline_parallel_size": self.settings.pipeline_parallel_size,
                "workers": [worker.stats() for worker in self.workers], "model": self.model_name,
                "kernels": card.kernels, "decode_core": card.core, "row_invariant": card.row_invariant,
                "sampling": {name: {"value": value, "from": origin} for name, (value, origin)
                             in default_sampling(self, self.settings).items()},
                "system_prompt": self.tokenizer.spec.system if self.tokenizer else None,
                "prefixes": self.prefixes.stats() if self.prefixes else {},
                "context_length": card.context_length, "queue_depth": len(self.dispatcher.pending),
                "delayed_answers": self.dispatcher.delayed,
                "uptime_s": round(time.monotonic() - self.started_s, 1), **self.placement.stats()}


def make_pool(settings: Settings, worker_command: Seq[str] = PROCESS_COMMAND) -> WorkerPool:
    """The pool of a model that has what models have in common for itself."""
    if settings.ray_address:
        return WorkerPool(settings, RayNodes(settings, worker_command), SharedResources())
    shared = SharedResources(Prefixes(settings))
    return WorkerPool(settings, LocalDevices(settings, worker_command, prefixes=shared.prefixes), shared)
