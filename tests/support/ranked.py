"""Engines of several ranks in this process, whose other ranks are processes that live on from model to model."""

import contextlib
import os
import sys

import torch

import many_ranks
from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.local import no_progress
from chatlm.common.messages.protocol import WorkerConfig
from chatlm.common.processes import start
from chatlm.worker.build import build_engine
from chatlm.worker.ranks.links import ProcessLinks
from chatlm.worker.ranks.ranks import RankZero
from chatlm.worker.ranks.runners import COMPARED_STEPS
from patching import patch


class Group:
    """Ranks that live on from model to model."""

    def __init__(self, monkeypatch, tp, pp=1):
        self.sizes, self.ranks = dict(tensor_parallel_size=tp, pipeline_parallel_size=pp), None
        patch(monkeypatch, start, "PROCESS_COMMAND", (sys.executable, many_ranks.__file__))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    def engine(self, folder, **changes):
        settings = Settings(**{"model": str(folder), "kv_cache_memory": 32 << 20, "max_batch": 4} | self.sizes | changes)
        source, ranks = resolve_model(settings), None
        if max(self.sizes.values()) > 1:
            config = WorkerConfig(settings, source, "cpu", 1)
            self.ranks = self.ranks or RankZero(config, ProcessLinks(config))
            self.ranks.config, ranks = config, self.ranks
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        _, engine = build_engine(source, settings, torch.device("cpu"), ranks=ranks)
        if ranks:
            ranks.wait_ready(no_progress)
            self.runner = engine.runner
        return engine

    def settle(self):
        """Wait until the ranks have said what they drew, which has to be the same.

        A rank finishes its last step when the next one comes, so what it drew in that one is never compared."""
        ours = self.ranks.checksums[0]
        unfinished = self.runner.drawn.steps % COMPARED_STEPS == 0
        while len(ours) > unfinished:
            self.ranks.check()
        ours.clear()

    def close(self):
        for process in self.ranks.links.processes if self.ranks else ():
            process.kill()
            process.wait()
        self.ranks = None
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def group(monkeypatch, tp, pp=1):
    with torch.inference_mode():
        one = Group(monkeypatch, tp, pp)
        try:
            yield one
        finally:
            one.close()
