"""The ranks of a model in a single process, and ranks whose memory is only estimated."""

from __future__ import annotations

import socket
from typing import Any, TYPE_CHECKING

from chatlm.common.processes.launch import ranks_here
from chatlm.worker.weights.loaded.shards import shard_model, stage_model

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.loaded.model import LoadedModel


class RankAlone:
    """The ranks of a model in a single process: there is one."""

    rank = 0
    tp = 1      # ranks of a stage
    stages = 1
    here = 1    # how many of the ranks are on this machine
    join: Any = None  # makes the ops that communicate with the other ranks of the stage
    before: socket.socket | None = None  # to the same rank of the previous stage,
    after: socket.socket | None = None   # and of the next one

    def min_over_ranks(self, count: int) -> int:
        """The least of all ranks' counts."""
        return count

    def share_of(self, model: LoadedModel, quantize: str | None) -> LoadedModel:
        """This rank's share of a model that is not read yet. ConfigError if it cannot be divided that way."""
        if self.tp == self.stages == 1:
            return model
        stage = stage_model(model, self.rank // self.tp, self.stages)  # the same for all ranks of a stage
        return shard_model(stage, self.rank % self.tp, self.tp, quantize)

    def divide(self, settings: Settings):
        """Take the numbers of ranks from the settings."""
        self.tp = settings.tensor_parallel_size
        self.stages = settings.pipeline_parallel_size
        self.here = ranks_here(settings)


class PlannedRank(RankAlone):
    """A rank that exists only to estimate its memory."""

    def __init__(self, settings: Settings, rank: int):
        self.rank = rank
        self.divide(settings)
