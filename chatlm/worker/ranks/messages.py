"""The messages between the ranks of a replica."""

from __future__ import annotations

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Loading, Ready, Unusable
from chatlm.common.messages.requests import ModelSource
from chatlm.common.messages.wire import Pipe, wire_message
from chatlm.worker.model.batch import Batch
from chatlm.worker.ops.rows import SampleRow


@wire_message(1 << 20)
class RankConfig:
    """Rank 0 to another, as the first message: load your shard."""

    settings: Settings
    source: ModelSource | None  # None: find it on this machine
    device: str
    threads: int
    rank: int
    address: str                # of decode_core's RankMemory; for torch.distributed a file, or a prefix of
                                # keys in torchrun's store
    environment: dict[str, str]
    before: int | None = None   # descriptor of the socket to the previous stage,
    after: int | None = None    # and to the next one
    place: tuple[int, int] = (0, 1)  # see WorkerConfig


@wire_message(64)
class RankPages:
    """A rank to rank 0: the KV pages it has room for, then states of sequences, then snapshots of them;
    rank 0 replies to each with the minimum over all ranks."""

    count: int


@wire_message(256 << 20)
class RankStep:
    """Rank 0 to another: compute this batch and draw; without `rows`, only rank 0 uses the logits."""

    batch: Batch
    rows: list[SampleRow] | None


@wire_message(1 << 16)
class RankAdapter:
    """Rank 0 to another: load your part of this adapter while steps continue, or forget it."""

    slot: int
    folder: str  # "": forget it
    stamp: tuple[tuple[str, int, int], ...] = ()  # of its files; () on another machine


@wire_message(64)
class RankDrew:
    """A rank to rank 0: a checksum of all tokens drawn so far."""

    checksum: int


@wire_message(64 << 20)
class RankTokens:
    """The last stage to rank 0: the tokens that a step drew."""

    tokens: list[int]


@wire_message(256 << 20)
class RankLogits:
    """The last stage to rank 0, for a step without `rows`: some rows of its logits in float32; after all of
    these, some of its hidden states, if needed."""

    RAW = True
    data: bytes


RANK_PIPE = Pipe(RankConfig, RankPages, RankStep, RankAdapter, RankDrew, RankTokens, RankLogits, Loading,
                 Ready, Unusable)
