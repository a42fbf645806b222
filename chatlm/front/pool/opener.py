"""Makes models ready for requests before their weights are read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError
from chatlm.common.hub.default_model import EMBEDDERS
from chatlm.common.hub.find import of_draft_model, resolve_model, with_draft_model, with_embedder
from chatlm.common.hub.stamps import model_stamp
from chatlm.common.memory import available_memory
from chatlm.common.messages.protocol import DraftTerms, SurveyConfig
from chatlm.common.processes.launch import ranks_here
from chatlm.front.pool.shared_resources import SharedResources
from chatlm.front.pool.local_devices import LocalDevices, choose_devices, cuda_device_count
from chatlm.front.pool.models import ServedModel
from chatlm.front.pool.pool import WorkerPool
from chatlm.front.pool.prefixes import Prefixes
from chatlm.front.pool.residency import MemoryShare
from chatlm.front.pool.survey import Survey

if TYPE_CHECKING:
    from chatlm.common.config import ModelEntry, Settings
    from chatlm.common.hub.stamps import Stamp
    from chatlm.common.messages.protocol import Surveyed
    from chatlm.front.pool.residency import Residency


class Opener:
    """Makes the pools of several models. Each has its own settings and workers; the rest is shared."""

    RESERVE = 0.1  # without --models-memory, this share of the free memory is left to other programs
    # What a worker's process takes in addition to its model: torch and its buffers, on a GPU also CUDA's.
    # Measured on x86-64 Linux with two models of 6 MB, after an answer from each, by
    #     grep -E "^(Rss|Pss|Private_Dirty)" /proc/PID/smaps_rollup    (PID: of a worker, from /stats)
    # That gave 239, 181 and 154 MiB with decode_core, and 279, 225 and 180 MiB without it
    # (CHAT_SERVER_KERNELS=reference). What is not private are the libraries' files, which processes share and
    # the system can drop.
    PROCESS_BYTES = 200 << 20
    GPU_PROCESS_BYTES = 600 << 20

    def __init__(self, settings: Settings, command: Seq[str], residency: Residency,
                 started: Callable[[], bool] = lambda: False):
        """started: has the server started? From then on, a model is served even if its drafts are broken."""
        self.settings = settings
        self.command = command
        self.residency = residency
        self.started = started
        self.survey = Survey(command)
        self.workers = 0  # so far
        self.prefixes = Prefixes(settings)
        self.shared = SharedResources(self.prefixes)
        self.shared.join(self)
        budget = settings.models_memory  # None on a GPU: the survey reads how much it has
        if budget is None and not self._on_gpus(settings):
            budget = int(available_memory() * (1 - self.RESERVE))
        if budget is not None:
            residency.budget = max(budget - self.prefixes.bytes, 1)

    @staticmethod
    def _on_gpus(settings: Settings) -> bool:
        return settings.device_type in ("auto", "cuda") and cuda_device_count() > 0

    async def resolve(self, entry: ModelEntry,
                      report: Callable[[str, float], None] = lambda stage, fraction: None) -> ServedModel:
        """Find a model's files. Raises ConfigError if the path does not exist. A broken file gives a failed
        model."""
        changes = {"adapter": (), **entry.changes}
        if entry.replicas and self._on_gpus(self.settings):
            changes["num_gpus"] = str(entry.replicas)
        elif entry.replicas:
            changes["num_workers"] = entry.replicas
        settings = replace(self.settings, model=entry.path or None, models=None, several=(),
                           served_model_name=entry.aliases, **changes)
        try:
            if entry.path in EMBEDDERS:
                settings = await asyncio.to_thread(with_embedder, settings, report)
            source = await asyncio.to_thread(resolve_model, settings, report)
            try:
                settings = await asyncio.to_thread(with_draft_model, settings, report)
            except ConfigError:
                if not self.started():
                    raise
        except ConfigError as error:
            path = Path(entry.path).expanduser()
            if not entry.path or not path.exists():
                raise
            model = ServedModel(settings, None, replace(entry, name=entry.name or path.stem))
            model.reason = str(error)
            model.failed_s = time.monotonic()
            return model
        model = ServedModel(settings, None, replace(entry, name=entry.name or source.name))
        model.source = replace(source, name=model.name)
        return model

    async def open(self, model: ServedModel) -> ChatServerError | None:
        """Read the headers of a model's files and make its pool. The workers start later, when they are
        needed. Returns the error if that fails."""
        if model.source is None:
            return None
        pool = None
        try:
            stamp = await asyncio.to_thread(model_stamp, model.source.path, model.settings)
            model.source = replace(model.source, stamp=stamp)
            device = choose_devices(model.settings)[0]
            replicas, process_bytes = self._replica_costs(model.settings, device)
            draft_stamp = ()
            if model.settings.draft_model:
                draft_stamp = await asyncio.to_thread(
                    model_stamp, Path(model.settings.draft_model), of_draft_model(model.settings))
            surveyed = await self.survey.of(SurveyConfig(
                model.settings, model.source, device, self.residency.budget or None, replicas, process_bytes,
                DraftTerms(not self.started(), draft_stamp)))
            if surveyed.card.without:
                draft_stamp = ()  # the memory was measured without it
            self.residency.budget = self.residency.budget or surveyed.budget
            cache = replicas * surveyed.cache
            size = cache + replicas * (surveyed.weights + surveyed.activations + process_bytes)
            pool = await self._pool(model, surveyed, draft_stamp, lambda pool: MemoryShare(
                model.name, pool, size, cache=cache, pinned=model.entry.pin,
                idle_s=0.0 if model.entry.pin else model.settings.idle_unload,
                note_jobs=self.residency.changed.set))
            share = pool.memory
            assert isinstance(share, MemoryShare)
            self.residency.admit(share)
            pool.adapters.ask_for_room(partial(self.residency.admit, share))
        except ChatServerError as error:
            if pool:
                await pool.close()
            model.pool = None
            model.reason = str(error)
            model.failed_s = time.monotonic()
            return error
        model.pool = pool
        model.reason = ""
        return None

    async def _pool(self, model: ServedModel, surveyed: Surveyed, draft_stamp: Stamp,
                    share_of: Callable[[WorkerPool], MemoryShare]) -> WorkerPool:
        settings = replace(model.settings, kv_cache_memory=surveyed.kv_cache_memory, idle_unload=0.0,
                           models=self.settings.models)  # adapters may come from there
        placement = LocalDevices(settings, self.command, model.source, self.workers, self.prefixes,
                                 draft_stamp)
        pool = WorkerPool(settings, placement, self.shared, share_of)
        self.workers += len(pool.workers)
        try:
            await pool.supervisor.begin_unloaded(surveyed.card)
        except ChatServerError:
            await pool.close()
            raise
        return pool

    def _replica_costs(self, settings: Settings, device: str) -> tuple[int, int]:
        """How many replicas share one memory, and how many bytes the processes of a replica take in addition
        to the model. Each rank has its own GPU. On CPUs, all ranks share the machine's memory."""
        if device.startswith("cuda"):
            return 1, self.GPU_PROCESS_BYTES
        return max(settings.num_workers, 1), ranks_here(settings) * self.PROCESS_BYTES

    async def close(self):
        """Make no more pools, and close those that are open: who would have closed them may be gone."""
        await self.survey.close()
        await asyncio.gather(*(user.close() for user in self.shared.users if user is not self))
        await self.shared.leave(self)
