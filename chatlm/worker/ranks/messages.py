"""The messages between the ranks of a replica."""

from __future__ import annotations

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Loading, Ready, Unusable
from chatlm.common.messages.requests import ModelSource
from chatlm.common.messages.wire import Pipe, wire_message
from chatlm.worker.model.spec import Batch
from chatlm.worker.ops.rows import SampleRow


@wire_message(1 << 20)
class RankConfig:
    """Rank 0 to another, first: load your shard."""

    settings: Settings
    source: ModelSource | None  # None: find it on this machine
    device: str
    threads: int
    rank: int
    address: str                # of decode_core's RankMemory, or a file or keys of torchrun's store, where
                                # torch.distributed meets
    environment: dict[str, str]
    before: int | None = None   # descriptors of the sockets to the stages before and
    after: int | None = None    # after this one


@wire_message(64)
class RankPages:
    """A rank to rank 0: the KV pages it has room for, then states of sequences, then snapshots of them; back,
    each time: how many all have."""

    count: int


@wire_message(256 << 20)
class RankStep:
    """Rank 0 to another: compute this batch and draw; without `rows`, rank 0 alone uses the logits."""

    batch: Batch
    rows: list[SampleRow] | None


@wire_message(1 << 16)
class RankAdapter:
    """Rank 0 to another: load your part of this adapter beside the steps, or forget it."""

    slot: int
    folder: str  # "": forget it
    stamp: tuple[tuple[str, int, int], ...] = ()  # of its files; () on another machine


@wire_message(64)
class RankDrew:
    """A rank to rank 0: a checksum of the tokens that all steps so far have drawn."""

    checksum: int


@wire_message(64 << 20)
class RankTokens:
    """The last stage to rank 0: what a step drew."""

    tokens: list[int]


@wire_message(256 << 20)
class RankLogits:
    """The last stage to rank 0: some rows of the float32 logits of a step without rows, or once they are all
    sent some of its hidden states, if needed."""

    RAW = True
    data: bytes


RANK_PIPE = Pipe(RankConfig, RankPages, RankStep, RankAdapter, RankDrew, RankTokens, RankLogits, Loading,
                 Ready, Unusable)
