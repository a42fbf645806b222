"""One model in several processes.

Rank 0 is the worker process: only it has the engine, the text and the pipe to the front. It starts the other
ranks, and sends them each step just before it starts the step itself. Every rank computes the step on its
shard, exchanges sums and logits with the others, and draws the tokens itself: a draw depends only on the
logits, the request and the position. A rank that ends or hangs takes the whole replica with it; the front
starts another one.

With stages, rank s * tp + t has shard t of the layers of stage s. A batch passes through the stages in order,
from each rank to the rank with the same shard in the next stage. The last stage draws, and sends the tokens
to rank 0. Batches of different sequences follow each other, so that all stages are busy.

torchrun starts a process for each rank, on one or several nodes. The process of rank 0 is then the front, and
its worker starts no ranks: the other processes connect by TCP (`TcpLinks`, `serve_rank`)."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError, RanksFailed
from chatlm.common.hub.local import no_progress
from chatlm.common.messages.protocol import Ready, Unusable
from chatlm.common.processes.launch import torchrun
from chatlm.worker.ranks.alone import RankAlone
from chatlm.worker.ranks.links import ProcessLinks, TcpLinks
from chatlm.worker.ranks.messages import RANK_PIPE, RankAdapter, RankConfig, RankPages
from chatlm.worker.ranks.runners import RankRunner, Stage, StagedRunner, join_ranks, rank_device

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress
    from chatlm.common.hub.stamps import Stamp
    from chatlm.common.messages.protocol import WorkerConfig
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.kernels.kernels import StepRunner
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.links import Links


class OtherRank(RankAlone):
    """The ranks as seen by one other than rank 0."""

    def __init__(self, channel: Channel, config: RankConfig):
        self.channel = channel
        self.config = config
        self.rank = config.rank
        self.divide(config.settings)
        self.before, self.after = (
            None if end is None else socket.socket(fileno=end) for end in (config.before, config.after))

    def join(self, backend, part_bytes: int) -> dict[str, Callable]:
        return join_ranks(backend, self.config.address, self.rank % self.tp, self.tp, self.config.device)

    def min_over_ranks(self, count: int) -> int:
        self.channel.send(RankPages(count))
        [fewest] = self.channel.receive(wait=True, most=1)
        return fewest.count


class RankZero(RankAlone):
    """The ranks as seen by rank 0."""

    def __init__(self, config: WorkerConfig, links: Links, progress: Progress = no_progress):
        self.config = config
        self.links = links
        self.progress = progress
        self.divide(config.settings)
        self.checksums: list[deque[int]] = [deque() for _ in range(self.tp)]  # of the ranks that draw
        self.channels = links.channels
        self.after = links.after
        self.meeting: Any = None  # where the ranks of each stage meet: in memory, a folder or keys

    def join(self, backend, part_bytes: int) -> dict[str, Callable]:
        """Open the meetings of each stage's ranks, and send the other ranks their RankConfig."""
        config = self.config
        environment = {"CHAT_SERVER_KERNELS": os.environ.get("CHAT_SERVER_KERNELS", "")}
        if core := decode_core():
            isa = core.isa()
            # another machine may lack amx
            environment["DECODE_CORE_ISA"] = "amx,avx512" if isa == "amx" else isa
        addresses = self._open_meetings(bool(core and backend.join), part_bytes)
        source = None if self.links.finds_models else config.source
        for arrival, channel in zip(self.links.arrivals, self.channels):
            channel.send(RankConfig(
                config.settings, source, rank_device(config.device, arrival.local_rank), arrival.threads,
                arrival.rank, addresses[arrival.rank // self.tp], environment, arrival.before, arrival.after,
                config.place))
        if self.links.finds_models:  # a download may take longer than ranks wait for each other
            self._receive_from_all(Ready, self.progress)
            self.broadcast(Ready({}))
        return join_ranks(backend, addresses[0], 0, self.tp, config.device)

    def _open_meetings(self, in_memory: bool, part_bytes: int) -> list[str]:
        """The addresses at which the ranks of each stage meet: in memory if decode_core computes, else where
        torch.distributed does."""
        if self.tp == 1:
            return [""] * self.stages
        if in_memory:
            from chatlm.worker.kernels.ranks import RankMemory
            self.meeting = [RankMemory(self.tp, part_bytes) for _ in range(self.stages)]
            return [memory.path for memory in self.meeting]
        self.meeting = self.links.open_meeting()
        return [f"{self.meeting.name}/{stage}" for stage in range(self.stages)]

    def min_over_ranks(self, count: int) -> int:
        fewest = min(count, *(message.count for message in self._receive_from_all(RankPages)))
        self.broadcast(RankPages(fewest))
        return fewest

    def wait_ready(self, progress: Progress):
        """Wait until all other ranks have loaded their shards."""
        self._receive_from_all(Ready, progress)
        self.meeting = None  # its memory stays as long as a rank has it

    def broadcast(self, message):
        frame = RANK_PIPE.packed(message)
        for rank, channel in enumerate(self.channels, 1):
            try:
                channel.connection.sendall(frame)
            except OSError:
                raise self.links.failure(rank) from None

    def tell_adapter(self, slot: int, folder: str, stamp: Stamp = ()):
        """Have the other ranks load an adapter, or forget it ("")."""
        self.broadcast(RankAdapter(slot, folder, () if self.links.finds_models else stamp))

    def _receive_from_all(self, expected: type, progress: Progress = no_progress) -> list:
        """The next message of this type from each other rank; reports the progress of others meanwhile."""
        messages = []
        for rank, arrival in enumerate(self.links.arrivals, 1):
            while not isinstance(message := self._receive(rank, wait=True)[0], expected):
                if isinstance(message, Unusable):
                    origin = f"rank {rank} on {arrival.host}: " if arrival.host else ""
                    raise ConfigError(origin + message.message)
                progress(f"{message.stage}, rank {rank}", message.fraction)
            messages.append(message)
        return messages

    def _receive(self, rank: int, wait: bool) -> list:
        try:
            return self.channels[rank - 1].receive(wait, most=1)
        except (EOFError, OSError):  # including a timeout, if a machine is gone
            raise self.links.failure(rank) from None

    def note(self, rank: int, checksum: int):
        """Note the checksum of what a rank of the last stage drew. Once all have reported, compare them."""
        self.checksums[rank].append(checksum)
        if not all(self.checksums):
            return
        drawn = {checksums.popleft() for checksums in self.checksums}
        if len(drawn) > 1:
            raise RanksFailed("the ranks drew different tokens from the same logits")

    def check(self):
        """RanksFailed if a rank has ended or draws other tokens."""
        for rank in range(1, len(self.channels) + 1):
            if self.links.has_ended(rank):
                raise self.links.failure(rank)
            if rank != self.speaker:  # its messages are read by from_last_stage
                for message in self._receive(rank, wait=False):
                    self.note(rank % self.tp, message.checksum)

    @property
    def speaker(self) -> int:
        """The rank that sends rank 0 the results of the last stage."""
        return self.tp * (self.stages - 1)

    def runner(self, own: StepRunner, transformer: Transformer) -> RankRunner | StagedRunner:
        """Steps that all ranks compute."""
        note = partial(self.note, 0)
        if self.stages == 1:
            return RankRunner(own, transformer, self.broadcast, note)
        return StagedRunner(Stage(own, transformer, self), self, note)

    def from_last_stage(self, expected: type):
        """The last stage's next message about the oldest step under way."""
        [message] = self._receive(self.speaker, wait=True)
        if not isinstance(message, expected):
            raise RanksFailed(f"rank {self.speaker} sent {type(message).__name__} instead of "
                              f"{expected.__name__}")
        return message


def gather_ranks(config: WorkerConfig, progress: Progress) -> RankZero:
    """Start the other ranks of a replica, or under torchrun wait for them."""
    links = TcpLinks(config, progress) if torchrun(config.settings) else ProcessLinks(config)
    return RankZero(config, links, progress)
