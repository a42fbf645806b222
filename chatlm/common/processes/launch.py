"""How this process was started: by torchrun, as a rank of a replica, or not."""

from __future__ import annotations

import os
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import ranks_per_replica
from chatlm.common.errors import ConfigError

if TYPE_CHECKING:
    from chatlm.common.config import Settings


class Torchrun(NamedTuple):
    """What torchrun passes to a process: its rank in the replica, and the address where all ranks meet."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int


def torchrun(settings: Settings) -> Torchrun | None:
    """torchrun's variables, if it started this process as one rank of a replica; else None."""
    ranks = ranks_per_replica(settings)
    count = os.environ.get("WORLD_SIZE", "1")
    elastic = "TORCHELASTIC_RUN_ID"
    wanted = [name.upper() for name in Torchrun._fields]
    if settings.url or count == "1" or ranks == 1 and elastic not in os.environ:
        return None
    if missing := [name for name in (*wanted, elastic) if not os.environ.get(name)]:
        raise ConfigError(f"WORLD_SIZE is {count}, but torchrun did not start this process: "
                          f"{', '.join(missing)} missing. Start it with torchrun, or unset WORLD_SIZE")
    if count != str(ranks):
        raise ConfigError(f"torchrun starts {count} processes (--nnodes times --nproc-per-node), but "
                          f"--tp {settings.tensor_parallel_size} --pp {settings.pipeline_parallel_size} "
                          f"are {ranks} rank(s)")
    if settings.ray_address or settings.num_workers != 1 or settings.num_gpus not in (None, "1"):
        raise ConfigError("torchrun starts the ranks of one replica: leave out --num-gpus, --num-workers "
                          "and --ray-address")
    return Torchrun._make(os.environ[name] if name == "MASTER_ADDR" else int(os.environ[name])
                          for name in wanted)


def ranks_here(settings: Settings) -> int:
    """How many ranks of a replica are on this machine."""
    started = torchrun(settings)
    return started.local_world_size if started else ranks_per_replica(settings)
