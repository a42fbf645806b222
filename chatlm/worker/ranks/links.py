"""How rank 0 reaches the other ranks: processes that it starts or, under torchrun, processes that connect by
TCP.

Both classes have, for ranks 1, 2, ..: `arrivals`, which describe them, and `channels` to them. Both also have
`after`, a socket to the rank with the same shard in the next stage; `pids`, of this worker's processes on
this machine; and `finds_models`: does each rank find the model's files itself?"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import tempfile
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

from chatlm.common.config import ranks_per_replica
from chatlm.common.core import installed_core
from chatlm.common.errors import ConfigError, RanksFailed, shown
from chatlm.common.log import log
from chatlm.common.messages.wire import Channel
from chatlm.common.processes.connect import Listener, dial, has_hung_up, listen
from chatlm.common.processes.launch import ranks_here
from chatlm.common.processes.start import PROCESS_COMMAND, PROGRAM
from chatlm.common.processes.torchrun import ARRIVAL_PIPE, RankArrival, RankStore, same_on_all_nodes
from chatlm.worker.ranks.messages import RANK_PIPE

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress
    from chatlm.common.messages.protocol import WorkerConfig


class ProcessLinks:
    """Links to ranks on this machine: processes that this one starts and that end with it."""

    finds_models = False

    def __init__(self, config: WorkerConfig):
        count = ranks_per_replica(config.settings)
        tp = config.settings.tensor_parallel_size
        between = [socket.socketpair() for _ in range(count - tp)]  # from rank n to rank n + tp
        self.after = between[0][0] if between else None
        self.processes: list[subprocess.Popen] = []
        self.channels: list[Channel] = []
        self.arrivals: list[RankArrival] = []
        for rank in range(1, count):
            ours, theirs = socket.socketpair()
            before = between[rank - tp][1].fileno() if rank >= tp else None
            after = between[rank][0].fileno() if rank < len(between) else None
            self.arrivals.append(RankArrival(rank, "", rank, config.threads, before, after))
            descriptors = [theirs.fileno(), *(end for end in (before, after) if end is not None)]
            with theirs:
                self.processes.append(subprocess.Popen(
                    [*PROCESS_COMMAND, "rank", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[*descriptors, *PROGRAM], stdin=subprocess.DEVNULL))
            self.channels.append(Channel(ours, RANK_PIPE))
        for end in [end for pair in between for end in pair if end is not self.after]:
            end.close()

    @property
    def pids(self) -> tuple[str | int, ...]:
        return "self", *(process.pid for process in self.processes)

    def open_meeting(self) -> tempfile.TemporaryDirectory:
        """Where ranks that use torch.distributed meet. Its `name` is a folder, or a prefix of keys."""
        return tempfile.TemporaryDirectory(prefix="chat_server-")

    def has_ended(self, rank: int) -> bool:
        return self.processes[rank - 1].poll() is not None

    def failure(self, rank: int) -> RanksFailed:
        """The error that says how this rank has ended."""
        process = self.processes[rank - 1]
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
        return RanksFailed(f"rank {rank} has ended (exit status {process.returncode})")


class TcpLinks:
    """Links under torchrun: the other ranks connect by TCP, from this machine or others."""

    finds_models = True
    pids = ("self",)

    def __init__(self, config: WorkerConfig, progress: Progress):
        self.settings = config.settings
        self.progress = progress
        self.count = ranks_per_replica(self.settings)
        self.tp = self.settings.tensor_parallel_size
        self.store, self.secret = RankStore(), secrets.token_bytes(32)
        self.arrived: dict[int, tuple[RankArrival, Channel]] = {}
        self.after: socket.socket | None = None
        if ranks_here(self.settings) < self.count and self.tp > 1 and config.device == "cpu":
            log.warning("A replica on several nodes uses Gloo and the slower reference ops, even between "
                        "ranks of one node: decode_core needs all ranks on one machine")
            os.environ["CHAT_SERVER_KERNELS"] = "reference"
            installed_core.cache_clear()
        self._gather(os.environ["MASTER_ADDR"])
        self.arrivals, self.channels = map(list, zip(*(self.arrived[rank] for rank in range(1, self.count))))

    def _gather(self, host: str):
        """Wait until all ranks have connected. If one leaves, all connect again, to a new life of the
        store."""
        with listen_as_master(host) as server:
            together = False
            while not together:
                for connection in self._connections():
                    connection.close()
                self.arrived, self.after, self.life = {}, None, self.store.begin_life()
                self.store.put(f"{self.life}/0", [host, server.getsockname()[1], self.secret.hex(),
                                                  same_on_all_nodes(self.settings)])
                with Listener(server, self.secret, first=ARRIVAL_PIPE) as listener:
                    admit = partial(self._admit, listener)
                    together = self.store.wait(self.life, admit, self._report_missing)

    def _connections(self) -> list[socket.socket]:
        connections = [channel.connection for _, channel in self.arrived.values()]
        return [*connections, self.after] if self.after else connections

    def _admit(self, listener: Listener) -> bool | None:
        """Admit one more rank. Returns True once all are here, None before that, False if one has left."""
        in_stages = self.count > self.tp
        with suppress(EOFError, OSError):  # it may connect again
            if in_stages and not self.after and (address := self.store.look(f"{self.life}/{self.tp}")):
                self.after = dial(address[0], address[1], self.secret)
            if newcomer := listener.accept(0.2):
                connection, arrival = newcomer
                if arrival.rank in range(1, self.count):
                    self.arrived[arrival.rank] = arrival, Channel(connection, RANK_PIPE)
                else:
                    log.warning("a connection was refused: there is no rank %s", shown(arrival.rank))
                    connection.close()
        if any(map(has_hung_up, self._connections())):
            return False
        all_here = len(self.arrived) == self.count - 1 and (self.after or not in_stages)
        return True if all_here else None

    def _report_missing(self):
        missing = sorted({*range(1, self.count)} - {*self.arrived})
        self.progress(f"waiting for rank {', '.join(map(str, missing))} of torchrun",
                      len(self.arrived) / self.count)

    def open_meeting(self) -> SimpleNamespace:
        return SimpleNamespace(name=f"{self.life}/ranks")

    def has_ended(self, rank: int) -> bool:
        return has_hung_up(self.channels[rank - 1].connection)

    def failure(self, rank: int) -> RanksFailed:
        return RanksFailed(f"rank {rank} on {self.arrivals[rank - 1].host} has ended")


Links = ProcessLinks | TcpLinks


def listen_as_master(host: str) -> socket.socket:
    try:  # a name may resolve to a different address on other machines
        return listen(host if re.fullmatch(r"[0-9.]+|.*:.*", host) else "")
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {host} is not an address of this machine, which has rank 0: "
                          f"{error.strerror or error}") from None
