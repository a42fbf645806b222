"""Makes a MODEL ready for requests before its weights are read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError
from chatlm.common.hub.find import of_draft_model, resolve_model, with_draft_model
from chatlm.common.hub.stamps import model_stamp
from chatlm.common.memory import available_memory
from chatlm.common.messages.protocol import DraftTerms, SurveyConfig
from chatlm.common.processes.torchrun import ranks_here
from chatlm.front.admission.admission import Desk
from chatlm.front.pool.local import LocalDevices, choose_devices, cuda_device_count
from chatlm.front.pool.models import Model
from chatlm.front.pool.pool import WorkerPool
from chatlm.front.pool.prefixes import Prefixes
from chatlm.front.pool.residency import Place
from chatlm.front.pool.survey import Survey

if TYPE_CHECKING:
    from chatlm.common.config import ModelChoice, Settings
    from chatlm.common.hub.stamps import Stamp
    from chatlm.common.messages.protocol import Surveyed
    from chatlm.front.pool.dispatcher import Dispatcher
    from chatlm.front.pool.residency import Residency


class Opener:
    """Makes the pools of several models: each with its own settings and workers, plus what they share."""

    RESERVE = 0.1    # share of the free memory left to other programs, without --models-memory
    # What a worker's process takes in addition to its model: torch and its buffers, on a GPU also CUDA's.
    # Measured on x86-64 Linux with two models of 6 MB, after an answer from each, by
    #     grep -E "^(Rss|Pss|Private_Dirty)" /proc/PID/smaps_rollup    (pid: from workers in /stats)
    # with decode_core 239, 181 and 154 MiB; without it, CHAT_SERVER_KERNELS=reference, 279, 225 and 180. The
    # part that is not private is the libraries' files, which processes share and the system can drop.
    PROCESS_BYTES = 200 << 20
    GPU_PROCESS_BYTES = 600 << 20

    def __init__(self, settings: Settings, command: Seq[str], residency: Residency,
                 started: Callable[[], bool] = lambda: False):
        """started: does the server run? From then on a model is served without drafts that it cannot have."""
        self.settings = settings
        self.command = command
        self.residency = residency
        self.started = started
        self.desk = Desk()
        self.survey = Survey(command)
        self.workers = 0
        self.dispatchers: list[Dispatcher] = []
        self.prefixes = Prefixes(settings)
        budget = settings.models_memory  # None on a GPU: the survey reads how much it has
        if budget is None and not self._on_gpus(settings):
            budget = int(available_memory() * (1 - self.RESERVE))
        if budget is not None:
            residency.budget = max(budget - self.prefixes.bytes, 1)

    @staticmethod
    def _on_gpus(settings: Settings) -> bool:
        return settings.device_type in ("auto", "cuda") and cuda_device_count() > 0

    async def resolve(self, choice: ModelChoice,
                      report: Callable[[str, float], None] = lambda stage, fraction: None) -> Model:
        """ConfigError if the path does not exist; a broken file becomes a failed model."""
        changes = {"adapter": (), **choice.changes}
        if choice.replicas and self._on_gpus(self.settings):
            changes["num_gpus"] = str(choice.replicas)
        elif choice.replicas:
            changes["num_workers"] = choice.replicas
        settings = replace(self.settings, model=choice.path, models=None, several=(),
                           served_model_name=choice.aliases, **changes)
        try:
            source = await asyncio.to_thread(resolve_model, settings, report)
            try:
                settings = await asyncio.to_thread(with_draft_model, settings, report)
            except ConfigError:
                if not self.started():
                    raise
        except ConfigError as error:
            path = Path(choice.path).expanduser()
            if not path.exists():
                raise
            model = Model(settings, None, replace(choice, name=choice.name or path.stem))
            model.reason = str(error)
            model.failed_s = time.monotonic()
            return model
        model = Model(settings, None, replace(choice, name=choice.name or source.name))
        model.source = replace(source, name=model.name)
        return model

    async def open(self, model: Model) -> ChatServerError | None:
        """Read the headers of its files and make its pool, whose workers start when they are wanted. Returns
        the error if that fails."""
        if model.source is None:
            return None
        pool = None
        try:
            stamp = await asyncio.to_thread(model_stamp, model.source.path, model.settings)
            model.source = replace(model.source, stamp=stamp)
            device = choose_devices(model.settings)[0]
            replicas, process_bytes = self._beside(model.settings, device)
            draft = model.settings.draft_model
            draft_stamp = await asyncio.to_thread(
                model_stamp, Path(draft), of_draft_model(model.settings)) if draft else ()
            surveyed = await self.survey.of(SurveyConfig(
                model.settings, model.source, device, self.residency.budget or None, replicas, process_bytes,
                DraftTerms(not self.started(), draft_stamp)))
            if surveyed.card.without:
                draft_stamp = ()  # without it the memory was measured
            self.residency.budget = self.residency.budget or surveyed.budget
            cache = replicas * surveyed.cache
            size = cache + replicas * (surveyed.weights + surveyed.activations + process_bytes)
            pool = await self._pool(model, surveyed, draft_stamp)
            place = Place(model.name, pool, size, cache=cache, pinned=model.choice.pin,
                          idle_s=0.0 if model.choice.pin else model.settings.idle_unload)
            self.residency.admit(place)
            pool.adapters.ask_for_room(partial(self.residency.admit, place))
        except ChatServerError as error:
            if pool:
                await self.close_pool(pool)
            model.pool = None
            model.reason = str(error)
            model.failed_s = time.monotonic()
            return error
        model.pool = pool
        model.place = place
        model.reason = ""
        return None

    async def _pool(self, model: Model, surveyed: Surveyed, draft_stamp: Stamp) -> WorkerPool:
        settings = replace(model.settings, kv_cache_memory=surveyed.kv_cache_memory, idle_unload=0.0)
        placement = LocalDevices(settings, self.command, model.source, self.workers, self.prefixes,
                                 draft_stamp)
        pool = WorkerPool(settings, placement, self.desk, self.dispatchers, self.prefixes,
                          changed=self.residency.changed.set)
        self.workers += len(pool.workers)
        try:
            await pool.supervisor.begin_unloaded(surveyed.card)
        except ChatServerError:
            await self.close_pool(pool)
            raise
        return pool

    def _beside(self, settings: Settings, device: str) -> tuple[int, int]:
        """How many replicas share one memory, and how much of it a replica's processes take in addition to
        the model. Each rank has its own GPU; on CPUs all ranks share the machine's memory."""
        if device.startswith("cuda"):
            return 1, self.GPU_PROCESS_BYTES
        return max(settings.num_workers, 1), ranks_here(settings) * self.PROCESS_BYTES

    async def close_pool(self, pool: WorkerPool):
        await pool.close()
        if pool.dispatcher in self.dispatchers:
            self.dispatchers.remove(pool.dispatcher)
