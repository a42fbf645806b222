"""Is the `val_bpb` that base training wrote beside a checkpoint also what our own forward computes?

Forks of nanochat change softcaps, windows and gates without any trace in the files: such a checkpoint loads,
and answers worse. Only the loss on the same texts tells. `evaluation_of` says how training computed it,
`compare` whether our own agrees; who computes the rows is the caller's affair."""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence as Seq
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import nanochat_base
from chatlm.common.hub.nanochat_checkpoints import (
    checkpoint_at, part_of, read_meta, shard_folders, shard_folders_of, stated_dataset)
from chatlm.common.hub.shards import last_shard, packed_rows
from chatlm.common.hub.recorded_metrics import written_in

MOST_TARGETS = 1 << 17    # tokens that are scored for a comparison, unless LEAST_ROWS have more
LEAST_ROWS = 8            # of fewer rows, which are not all, the spread says nothing
MOST_ROWS = 1024          # each is a request to a worker
PACKING_S = 20.0          # upstream's shards take one or two seconds, and a server that ends waits for it
# how far apart two computations of the same rows may be, relative
BF16 = 1e-3
FLOAT32 = 1e-4
MOST_PACKED = 1 << 22     # tokens of the rows among which some are chosen
DEVIATIONS = 3.5          # standard errors by which some of the rows may differ from all of them
DRIFT = 5e-3              # and the first MOST_PACKED tokens from later ones, relative


class Evaluation(NamedTuple):
    """How base training computed the val_bpb of a step."""

    val_bpb: float
    targets: int   # tokens of a row that are scored
    rows: int      # of all processes
    ranks: int     # processes, each with other rows; 0: unknown
    precise: bool  # in float32?

    @property
    def wanted(self) -> int:
        """The rows that we compute."""
        return min(self.rows, max(MOST_TARGETS // self.targets, LEAST_ROWS), MOST_ROWS)


class RowScore(NamedTuple):
    """What a row's tokens cost, and their bytes: as they are counted now, and as upstream counted them until
    July 2026, when the bytes of a token that is no whole text became those of U+FFFD."""

    nats: float
    bytes: int
    former_bytes: int


class LossComparison(NamedTuple):
    theirs: float
    ours: float
    tolerance: float  # how far apart they may be
    rows: int
    of_rows: int
    shard: str

    @property
    def agrees(self) -> bool:
        return abs(self.ours - self.theirs) <= self.tolerance  # not if ours is NaN

    @property
    def numbers(self) -> str:
        digits = 4 if abs(self.ours - self.theirs) >= 1e-3 else 6
        rows = f"{self.rows:,} of {self.of_rows:,}" if self.rows < self.of_rows else f"{self.rows:,}"
        return (f"val_bpb {self.theirs:.{digits}f} there, {self.ours:.{digits}f} here "
                f"({rows} rows of {self.shard})")

    @property
    def agreement(self) -> str:
        apart, allowed = abs(self.ours - self.theirs) / self.theirs, self.tolerance / self.theirs
        return (f"our forward agrees with the one that trained it: {self.numbers}, {apart:.2%} apart, where "
                f"{allowed:.2%} is chance")

    @property
    def sentence(self) -> str:
        return f"this checkpoint was trained with another forward: {self.numbers}"


def evaluation_of(model: Path) -> Evaluation | None:
    """Of a checkpoint of base training; None if its val_bpb is missing, of an earlier step, or of rows that
    were made otherwise, as before January 2026."""
    checkpoint = checkpoint_at(model)
    if checkpoint is None or checkpoint.place.stage != "base":
        return None
    meta = read_meta(model)
    written = written_in(meta, checkpoint.step)
    val_bpb = written.metrics.get("val_bpb", 0.0)
    if written.stale or val_bpb <= 0:
        return None
    config = part_of(meta, "user_config")
    batch, targets, tokens = (count_of(value) for value in (
        meta.get("device_batch_size"), meta.get("max_seq_len"), config.get("eval_tokens")))
    if not (batch and targets and tokens) or "epoch" not in part_of(meta, "dataloader_state_dict"):
        return None
    ranks = ranks_of(model.parent)
    of_a_batch = batch * max(ranks, 1)
    rows = tokens // (of_a_batch * targets) * of_a_batch
    if not rows or ranks != 1 and rows < LEAST_ROWS:
        return None
    return Evaluation(val_bpb, targets, rows, ranks, config.get("device_type") == "cpu")


def count_of(value: Any) -> int:
    """A positive number of a file; 0 for anything else."""
    return value if type(value) is int and 0 < value < 1 << 40 else 0


def ranks_of(folder: Path) -> int:
    """On how many GPUs a run is trained: each process saves a part of the optimizer. 0 if none is there."""
    try:
        matches = [re.fullmatch(r"optim_\d{1,15}_rank(\d{1,5})\.pt", name) for name in os.listdir(folder)]
    except OSError:
        return 0
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def is_of_known_texts(model: Path) -> bool:
    """Does a checkpoint lie in a base folder, beside the texts of its training? Published weights do not."""
    checkpoint = checkpoint_at(model)
    return checkpoint is not None and not checkpoint.place.alone


def validation_shards(model: Path) -> list[Path]:
    """The shards that a checkpoint may have been evaluated on, the likeliest first: of each data set of its
    base folder the last one, which is not trained on."""
    checkpoint = checkpoint_at(model)
    if checkpoint is None:
        return []
    if checkpoint.place.experiment:
        home = checkpoint.tag_folder.parent
        folders = shard_folders_of(home)
        if name := stated_dataset(home):
            folders = [folder for folder in folders if folder.name == name]
    else:
        known = is_of_known_texts(model)
        folders = shard_folders(checkpoint.tag_folder.parent.parent if known else nanochat_base())
    return [shard for folder in folders if (shard := last_shard(folder)) and shard.is_file()]


def chosen_rows(evaluation: Evaluation, shard: Path,
                encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The rows of a shard that we compute, in an order of which each beginning is a sample of all.

    Rows that follow each other are alike, since the packing sorts documents by their length: of all rows, or
    of those of the first MOST_PACKED tokens, each so many-th is taken. encode: a document's tokens, after the
    one that begins a text. ConfigError if the shard cannot be read."""
    wanted = evaluation.wanted
    stride = max(min(evaluation.rows, MOST_PACKED // evaluation.targets) // wanted, 1)
    first = stride // 2
    packed = packed_rows(shard, encode, evaluation.targets)
    rows = list[list[int]]()
    ends_s = time.monotonic() + PACKING_S
    for number, row in enumerate(islice(packed, first + wanted * stride)):
        if number % stride == first and len(rows) < wanted:
            rows.append(row)
        if time.monotonic() > ends_s:
            raise ConfigError(f"packing the documents of {shard} takes more than {PACKING_S:g} s")
    random.Random(0).shuffle(rows)
    return rows


def compare(evaluation: Evaluation, scores: Seq[RowScore], shard: Path, precise: bool) -> LossComparison:
    """Our own scores of a shard's first rows against what training wrote. precise: are ours in float32?"""
    bits = math.fsum(row.nats for row in scores) / math.log(2)
    sizes = sum(row.bytes for row in scores), sum(row.former_bytes for row in scores)
    now, former = (bits / size if size else math.nan for size in sizes)
    relative = FLOAT32 if precise and evaluation.precise else BF16
    tolerance = relative * evaluation.val_bpb
    if evaluation.ranks != 1 or len(scores) < evaluation.rows:
        tolerance += DRIFT * evaluation.val_bpb + DEVIATIONS * standard_error(scores, evaluation)
    ours = former if abs(former - evaluation.val_bpb) <= tolerance < abs(now - evaluation.val_bpb) else now
    return LossComparison(evaluation.val_bpb, ours, tolerance, len(scores), evaluation.rows, shard.name)


def standard_error(scores: Seq[RowScore], evaluation: Evaluation) -> float:
    """Of bits per byte over these rows, as an estimate of those of training: a part of the same rows, or
    others of the same texts."""
    count = len(scores)
    size = sum(row.bytes for row in scores)
    if count < 2 or not size:
        return math.inf
    bits = [row.nats / math.log(2) for row in scores]
    ratio = math.fsum(bits) / size
    spread = math.fsum((one - ratio * row.bytes) ** 2 for one, row in zip(bits, scores))
    share = min(count / evaluation.rows, 1.0)
    factor = 1 - share if evaluation.ranks == 1 else 1 + share
    return math.sqrt(factor * count / (count - 1) * spread) / size


def former_size(token: bytes) -> int:
    """The bytes of a token as upstream counted them until July 2026."""
    return len(token.decode(errors="replace").encode())
