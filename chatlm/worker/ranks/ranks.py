"""One model in several processes.

Rank 0 is the worker process: it alone has the engine, the text and the pipe to the front. It starts the
others and tells them each step just before it starts the step itself. Every rank computes the step on its
shard, exchanges sums and logits with the others, and draws the tokens for itself: a draw depends on the
logits, the request and the position alone. A rank that ends or hangs takes the whole replica with it; the
front starts another.

With stages, rank s * tp + t has shard t of the layers of stage s. A batch passes through the stages one
after the other, from each rank to the same one of the next stage; the last stage draws and tells rank 0.
Batches of different sequences follow each other, so that all stages are busy.

Under torchrun, which starts a process for each rank on one or several nodes, the process of rank 0 is the
front, and its worker starts no ranks: those of the other processes come by TCP (`RankZeroOfNodes`,
`serve_rank`)."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.core import decode_core, installed_core
from chatlm.common.errors import ConfigError, RanksFailed, shown
from chatlm.common.hub.local import no_progress
from chatlm.common.log import log
from chatlm.common.messages.protocol import Ready, Unusable
from chatlm.common.messages.wire import Channel
from chatlm.common.processes.connect import Door, dial, has_hung_up, listen
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.processes.torchrun import (
    ARRIVAL_PIPE, RankPlace, RankStore, ranks_here, same_on_all_nodes, torchrun)
from chatlm.worker.ranks.messages import RANK_PIPE, RankConfig, RankPages
from chatlm.worker.ranks.steps import RankSteps, Stage, StagedSteps, join_ranks, rank_device

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.local import Progress
    from chatlm.common.messages.protocol import WorkerConfig
    from chatlm.worker.model.kernels import Steps
    from chatlm.worker.model.transformer import Transformer


class RankAlone:
    """The ranks of a model that one process computes."""

    rank, tp, stages, here, pids = 0, 1, 1, 1, ("self",)  # here: of them on this machine
    join: Any = None  # makes the ops that exchange with other ranks of the stage
    before: socket.socket | None = None
    after: socket.socket | None = None

    def least(self, pages: int) -> int:
        return pages

    def wait_ready(self, progress: Progress):
        """Wait until all ranks have loaded their shards."""

    def check(self):
        """RanksFailed if a rank has ended or draws other tokens."""

    def divide(self, settings: Settings):
        self.tp, self.stages = settings.tensor_parallel_size, settings.pipeline_parallel_size
        self.here = ranks_here(settings)


class OtherRank(RankAlone):
    """The ranks as one sees them that is not rank 0."""

    def __init__(self, channel: Channel, config: RankConfig):
        self.channel, self.config, self.rank = channel, config, config.rank
        self.divide(config.settings)
        self.before, self.after = (
            None if each is None else socket.socket(fileno=each) for each in (config.before, config.after))

    def join(self, backend, part_bytes: int) -> dict[str, Callable]:
        return join_ranks(backend, self.config.address, self.rank % self.tp, self.tp, self.config.device)

    def least(self, pages: int) -> int:
        self.channel.send(RankPages(pages))
        [least] = self.channel.receive(wait=True, most=1)
        return least.count


class RankZero(RankAlone):
    """The ranks as rank 0 sees them: it starts the others, which die with it."""

    def __init__(self, config: WorkerConfig, progress: Progress = no_progress):
        self.config, self.progress = config, progress
        self.divide(config.settings)
        self.checksums: list[deque[int]] = [deque() for _ in range(self.tp)]  # of the ranks that draw
        self.processes: list[subprocess.Popen] = []
        self.channels: list[Channel] = []
        self.places: list[RankPlace] = []
        self.gather(self.tp * self.stages)

    def gather(self, count: int):
        links = [socket.socketpair() for _ in range(count - self.tp)]  # from rank n to rank n + tp
        self.after = links[0][0] if links else None
        for rank in range(1, count):
            ours, theirs = socket.socketpair()
            before = links[rank - self.tp][1].fileno() if rank >= self.tp else None
            after = links[rank][0].fileno() if rank < len(links) else None
            self.places.append(RankPlace(rank, "", rank, self.config.threads, before, after))
            passed = [theirs.fileno(), *(each for each in (before, after) if each is not None)]
            with theirs:
                self.processes.append(subprocess.Popen(
                    [*PROCESS_COMMAND, "rank", str(theirs.fileno()), str(os.getpid())], pass_fds=passed,
                    stdin=subprocess.DEVNULL))
            self.channels.append(Channel(ours, RANK_PIPE))
        for end in [end for link in links for end in link if end is not self.after]:
            end.close()

    @property
    def pids(self) -> tuple:
        return "self", *(process.pid for process in self.processes)

    def join(self, backend, part_bytes: int) -> dict[str, Callable]:
        """Prepare where the ranks of each stage meet, and tell them what to load."""
        config, environment = self.config, {"CHAT_SERVER_KERNELS": os.environ.get("CHAT_SERVER_KERNELS", "")}
        if core := decode_core():
            environment["DECODE_CORE_ISA"] = core.info()["isa"]
        if self.tp == 1:
            addresses = [""] * self.stages
        elif backend.join:
            self.meeting = [core.RankMemory(self.tp, part_bytes) for _ in range(self.stages)]
            addresses = [memory.path for memory in self.meeting]
        else:
            folder = self.meet_in()
            addresses = [f"{folder}/{stage}" for stage in range(self.stages)]
        for rank, (channel, at) in enumerate(zip(self.channels, self.places), 1):
            source = None if at.host else config.source
            channel.send(RankConfig(config.settings, source, rank_device(config.device, at.local_rank),
                                    at.threads, rank, addresses[rank // self.tp], environment,
                                    at.before, at.after))
        if self.places[0].host:  # a download may take longer than ranks wait for each other
            self._hear_all(Ready, self.progress)
            self.tell(Ready({}))
        return join_ranks(backend, addresses[0], 0, self.tp, config.device)

    def meet_in(self) -> str:
        self.meeting = tempfile.TemporaryDirectory(prefix="chat_server-")
        return self.meeting.name

    def least(self, pages: int) -> int:
        least = min(pages, *(message.count for message in self._hear_all(RankPages)))
        self.tell(RankPages(least))
        return least

    def wait_ready(self, progress: Progress):
        self._hear_all(Ready, progress)
        self.meeting = None  # memory stays while a rank has it

    def tell(self, message):
        frame = RANK_PIPE.packed(message)
        for rank, channel in enumerate(self.channels, 1):
            try:
                channel.connection.sendall(frame)
            except OSError:
                raise self._ended(rank) from None

    def _hear_all(self, kind: type, progress: Progress = no_progress) -> list:
        """The next message of this kind of each other rank."""
        heard = []
        for rank in range(1, len(self.channels) + 1):
            while not isinstance(message := self._hear(rank, wait=True)[0], kind):
                if isinstance(message, Unusable):
                    at = self.places[rank - 1].host
                    raise ConfigError(f"rank {rank} on {at}: " * bool(at) + message.message)
                progress(f"{message.stage}, rank {rank}", message.fraction)
            heard.append(message)
        return heard

    def _hear(self, rank: int, wait: bool) -> list:
        try:
            return self.channels[rank - 1].receive(wait, most=1)
        except (EOFError, OSError):  # also a timeout, where a machine is gone
            raise self._ended(rank) from None

    def has_ended(self, rank: int) -> bool:
        return self.processes[rank - 1].poll() is not None

    def _ended(self, rank: int) -> RanksFailed:
        with suppress(subprocess.TimeoutExpired):
            self.processes[rank - 1].wait(2)
        return RanksFailed(f"rank {rank} has ended (exit status {self.processes[rank - 1].returncode})")

    def note(self, rank: int, checksum: int):
        """Compare what the ranks drew, once all have told."""
        self.checksums[rank].append(checksum)
        if all(self.checksums) and len({theirs.popleft() for theirs in self.checksums}) > 1:
            raise RanksFailed("the ranks drew different tokens from the same logits")

    def check(self):
        for rank in range(1, len(self.channels) + 1):
            if self.has_ended(rank):
                raise self._ended(rank)
            if rank != self.last:  # which speaks when it is asked
                for message in self._hear(rank, wait=False):
                    self.note(rank % self.tp, message.checksum)

    @property
    def last(self) -> int:
        """The rank that tells rank 0 what the last stage found."""
        return self.tp * (self.stages - 1)

    def steps(self, steps: Steps, transformer: Transformer):
        note = partial(self.note, 0)
        return (RankSteps(steps, transformer, self.tell, note) if self.stages == 1 else
                StagedSteps(Stage(steps, transformer, self), self, note))

    def found(self, kind: type):
        """What the last stage says of the oldest step under way."""
        [message] = self._hear(self.last, wait=True)
        if not isinstance(message, kind):
            raise RanksFailed(f"rank {self.last} said {type(message).__name__} instead of {kind.__name__}")
        return message


class RankZeroOfNodes(RankZero):
    """Rank 0 under torchrun: the other ranks come by TCP, from this machine or others."""

    pids = ("self",)

    def gather(self, count: int):
        start, store, secret = torchrun(self.config.settings), RankStore(), secrets.token_bytes(32)
        if self.here < count and self.tp > 1 and self.config.device == "cpu":
            log.warning("A replica on several nodes sums through Gloo, with slower reference ops, also among "
                        "the ranks of one node: decode_core needs all ranks on one machine")
            os.environ["CHAT_SERVER_KERNELS"] = "reference"
            installed_core.cache_clear()
        places: dict[int, RankPlace] = {}
        channels: dict[int, Channel] = {}

        def come(door: Door) -> bool | None:
            """Whether all are here; False if one of them has left."""
            with suppress(EOFError, OSError):  # it may come again
                if self.stages > 1 and not self.after and (at := store.look(f"{self.life}/{self.tp}")):
                    self.after = dial(*at, secret)
                if came := door.admit(0.2):
                    connection, place = came
                    if place.rank in range(1, count):
                        places[place.rank] = place
                        channels[place.rank] = Channel(connection, RANK_PIPE)
                    else:
                        log.warning("a connection was refused: there is no rank %s", shown(place.rank))
                        connection.close()
            if any(map(has_hung_up, connections())):
                return False
            return len(places) == count - 1 and bool(self.after or self.stages == 1) or None

        def connections() -> list[socket.socket]:
            return [channel.connection for channel in channels.values()] + [self.after] * bool(self.after)

        def say():
            missing = sorted({*range(1, count)} - {*places})
            self.progress(f"waiting for rank {', '.join(map(str, missing))} of torchrun", len(places) / count)

        with listen_as_master(start.master_addr) as listener:
            together = False
            while not together:  # who has left comes again, and meets the others in a new life
                for connection in connections():
                    connection.close()
                places.clear(), channels.clear()
                self.after, self.life = None, store.begin_life()
                store.put(f"{self.life}/0", [start.master_addr, listener.getsockname()[1], secret.hex(),
                                             same_on_all_nodes(self.config.settings)])
                with Door(listener, secret, first=ARRIVAL_PIPE) as door:
                    together = store.wait(self.life, partial(come, door), say)
        self.places, self.channels = ([each[rank] for rank in range(1, count)] for each in (places, channels))

    def meet_in(self) -> str:
        return f"{self.life}/ranks"

    def has_ended(self, rank: int) -> bool:
        return has_hung_up(self.channels[rank - 1].connection)

    def _ended(self, rank: int) -> RanksFailed:
        return RanksFailed(f"rank {rank} on {self.places[rank - 1].host} has ended")


def listen_as_master(host: str) -> socket.socket:
    try:  # a name may mean another address to other machines
        return listen(host if re.fullmatch(r"[0-9.]+|.*:.*", host) else "")
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {host} is no address of this machine, which has rank 0: "
                          f"{error.strerror or error}") from None
