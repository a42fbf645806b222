"""Workers on this machine: a process for each device."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.answering import path_of_lease
from chatlm.common.core import device_files, torch_installed
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model, with_draft_model
from chatlm.common.hub.stamps import model_stamp
from chatlm.common.invocation import pip_command
from chatlm.common.messages.protocol import DraftTerms, WorkerConfig
from chatlm.common.processes.start import exit_in_words, process_environment, start_child, threads_per_worker
from chatlm.common.processes.launch import ranks_here
from chatlm.front.pool.worker import Worker, WorkerState

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.stamps import Stamp
    from chatlm.common.messages.requests import ModelSource
    from chatlm.front.pool.prefixes import Prefixes
    from chatlm.front.pool.supervisor import Supervisor


class LocalDevices:
    """The placement on this machine: a worker for each device, connected by a socket pair."""

    def __init__(self, settings: Settings, command: Seq[str], source: ModelSource | None = None,
                 first: int = 0, prefixes: Prefixes | None = None, draft_stamp: Stamp | None = None):
        """source: the model's files, if they are known. first: the number of the first worker. prefixes:
        memory for prefixes that outlive workers. draft_stamp: see DraftTerms."""
        self.settings = settings
        self.command = command
        self.source = source
        self.prefixes = prefixes
        self.renews = source is None  # else changed files get a new pool
        self.draft_stamp = draft_stamp
        self.workers = [Worker(settings, self, gpu, device)
                        for gpu, device in enumerate(choose_devices(settings), first)]

    async def start(self, supervisor: Supervisor):
        """Find or download the model, then start the workers."""
        loop = asyncio.get_running_loop()

        def report(stage: str, fraction: float):
            if supervisor.closing:
                raise InterruptedError  # in the thread: stops a download, which deletes what it has so far
            loop.call_soon_threadsafe(supervisor.progress, stage, fraction)

        if self.renews:  # else both were found before the memory was measured, and may be gone now
            self.source = await asyncio.to_thread(resolve_model, self.settings, report)
            self.settings = await asyncio.to_thread(with_draft_model, self.settings, report)
        for worker in self.workers:
            supervisor.run(f"running worker {worker.gpu}", partial(supervisor.keep_alive, worker))

    async def open(self, worker: Worker) -> tuple[asyncio.StreamReader, WorkerConfig]:
        worker.become(WorkerState.LOADING)
        threads = threads_per_worker(len(self.workers) * ranks_here(self.settings))
        if self.settings.watch is not None:  # leave half to the training
            threads = max(1, threads // 2)
        worker.nice = niceness(self.settings)
        environment = process_environment(threads, worker.nice)
        worker.process, ours = start_child(self.command, "worker", environment)
        reader, worker.writer = await asyncio.open_connection(sock=ours)
        shared = ()
        size = 0
        more = 0
        if self.prefixes:
            shared = self.prefixes.paths
            size = self.prefixes.bytes
            more = self.prefixes.bytes - self.prefixes.used
        secretless = replace(self.settings, keys=(), api_key=(), prefix_memory=more)
        return reader, WorkerConfig(secretless, self.source, worker.device, threads, shared, size,
                                    (self.workers.index(worker), len(self.workers)), path_of_lease(),
                                    draft_terms(worker, self.renews, self.workers, self.draft_stamp))

    def changed_source(self) -> ModelSource | None:
        if not (self.source and self.source.stamp):
            return None
        stamp = model_stamp(self.source.path, self.settings)
        if stamp in ((), self.source.stamp):
            return None
        return replace(self.source, stamp=stamp)

    def is_gone(self) -> bool:
        source = self.source
        return bool(source and source.stamp and not model_stamp(source.path, self.settings))

    def end_in_words(self, worker: Worker) -> str:
        return exit_in_words(getattr(worker.process, "returncode", None))

    def stats(self) -> dict:
        return {}


def draft_terms(worker: Worker, renews: bool, workers: Seq[Worker], stamp: Stamp | None = None) -> DraftTerms:
    """Must a worker have its drafts? Only until the first worker serves. After that, a worker that could not
    start, for an unknown reason, tries it without drafts.

    renews: see Launcher; a pool that does not renew has measured its memory before it starts."""
    needed = renews and not any(other.ready_s for other in workers)
    failed = ""
    if worker.failed_starts and not worker.cannot_start and not needed:
        failed = f"the process before this one could not start ({worker.last_end})"
    return DraftTerms(needed, stamp, failed)


def choose_devices(settings: Settings) -> list[str]:
    """torch's device name for each replica, from the flags and the hardware. Does not import torch.

    Raises ConfigError for several GPU replicas without CUDA."""
    cuda = cuda_device_count() if settings.device_type in ("auto", "cuda") else 0
    wanted = settings.num_gpus or "1"
    ranks = ranks_here(settings)
    if wanted != "auto" and not (re.fullmatch("[0-9]{1,4}", wanted) and 1 <= int(wanted) <= 1024):
        raise ConfigError(f"--num-gpus {wanted}: must be a number from 1, or `auto`")
    if cuda:
        count = max(cuda // ranks, 1) if wanted == "auto" else int(wanted)
        if count * ranks > cuda:
            size = f" of {ranks} ranks each" if ranks > 1 else ""
            most = f"; at most --num-gpus {cuda // ranks}" if cuda >= ranks else ""
            raise ConfigError(f"--num-gpus {count}{size}, but {shown_gpus(cuda)}{most}")
        return [f"cuda:{gpu}" for gpu in range(0, count * ranks, ranks)]
    if settings.device_type == "cuda":
        raise ConfigError(f"--device-type cuda, but {shown_gpus(0)}; --device-type cpu needs none")
    if wanted not in ("auto", "1"):
        raise ConfigError(f"--num-gpus {wanted}, but {shown_gpus(0)}; on CPU use --num-workers {wanted}")
    if settings.device_type == "mps" and ranks > 1:
        raise ConfigError("--device-type mps: several ranks need CUDA devices or the CPU")
    metal = settings.device_type == "mps" or (
        settings.device_type == "auto" and sys.platform == "darwin" and torch_installed())
    workers = max(settings.num_workers, 1)
    return ["mps"] if metal and workers == ranks == 1 else ["cpu"] * workers


def niceness(settings: Settings) -> int | None:
    """The niceness of workers: --nice, or on a CPU 19 beside a training run and for `embed`. None: the
    server's own."""
    yields = settings.watch is not None or settings.command == "embed"
    if settings.nice is None and yields and choose_devices(settings)[0] == "cpu":
        return 19
    return settings.nice


def cuda_device_count() -> int:
    """How many GPUs this process may use; 0 without torch. It looks at CUDA_VISIBLE_DEVICES and the device
    files, since asking the driver takes 1 s."""
    files = device_files() if torch_installed() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return files
    # the driver ignores an invalid entry and all after it: -1, an empty one, 9 of 8
    there = itertools.takewhile(lambda entry: int(entry) < files if entry.isdigit() else entry[:1].isalpha(),
                                map(str.strip, visible.split(",")))
    return min(files, len([*there]))


def shown_gpus(count: int) -> str:
    """How many GPUs there are, in words, and whether CUDA_VISIBLE_DEVICES hides others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    files = device_files()
    if not torch_installed():
        return f"GPUs need the Python package torch; install with: {pip_command('torch')}"
    if visible is not None and files > count:
        return f"CUDA_VISIBLE_DEVICES={visible} shows {count} of {files} GPU(s)"
    return f"this machine has {count} CUDA device(s)" if count else "no CUDA device was found (nvidia-smi -L)"


def check_nice(nice: int):
    """Raise ConfigError if our processes may not have this niceness."""
    now = os.getpriority(os.PRIO_PROCESS, 0)
    if nice >= now:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        os.setpriority(os.PRIO_PROCESS, 0, now)
    except OSError as error:
        raise ConfigError(f"--nice {nice}: {error.strerror}; it is {now} now, and only root may lower it"
                          ) from None
