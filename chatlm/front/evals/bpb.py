"""Computes nanochat's validation loss in bits per byte: rows of packed documents, each scored from its
beginning.

As upstream's dataloader.py and loss_eval.py at 92d63d4 on one GPU. `score` reads a text in overlapping
windows, which is another quantity."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence as Seq
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, cannot_read
from chatlm.common.files import check_regular, read_small
from chatlm.common.hub.find import nanochat_base
from chatlm.common.hub.local import sha256_of
from chatlm.common.hub.nanochat_checkpoints import shard_folders
from chatlm.common.hub.shards import BUFFERED, Packer, documents_of, last_shard
from chatlm.common.hub.val_bpb import validation_shards
from chatlm.front.aio import all_of

if TYPE_CHECKING:
    from chatlm.front.evals.answers_file import AnswersFile
    from chatlm.front.evals.scores import Scorer

FETCHES = "python -m nanochat.dataset -n 1"  # what upstream fetches the validation shard with
SPLIT_TOKENS = 40 * 524_288                  # that upstream's base_eval scores
MOST_TARGETS = 2048                          # of a row, for a model that does not say for how many it is made
TASK = "bpb"
AT_ONCE = 4                                  # rows


class Texts(NamedTuple):
    """Documents to score."""

    name: str
    path: Path
    digest: str
    metric: str                   # the name of the result

    @property
    def is_plain(self) -> bool:
        """Is it one running text?"""
        return self.path.suffix not in (".parquet", ".jsonl")

    def documents(self) -> Iterator[list[str]]:
        """All texts, at most TOGETHER at a time. ConfigError if there are none."""
        return documents_of(self.path)


class BpbResult(NamedTuple):
    texts: Texts
    targets: int      # of a row
    rows: int
    nats: float
    bytes: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.inf

    def as_json(self) -> dict[str, Any]:
        return {self.texts.metric: round(self.bits_per_byte, 6), "nats": round(self.nats, 3),
                "bytes": self.bytes, "rows": self.rows, "tokens_per_row": self.targets,
                "seconds": round(self.seconds, 1)}


def read_texts(path: str | None, model: Path | None = None) -> Texts:
    """nanochat's validation shard, or the text, the JSON lines or the parquet file that --text names.
    ConfigError if it is not there. model: a checkpoint, whose own shard it is if there is one."""
    file, metric = (validation_shard(model), "val_bpb") if path is None else (Path(path).expanduser(), "bpb")
    check_regular(file)
    try:
        return Texts(file.name, file, sha256_of(file), metric)
    except OSError as error:
        raise cannot_read(file, error) from None


def validation_shard(model: Path | None = None) -> Path:
    """The last shard, which nanochat does not train on: of a checkpoint's own base folder, as `check` finds
    it, else of this user's."""
    if model and (own := validation_shards(model)):
        return own[0]
    folders = shard_folders(nanochat_base())
    if shard := next(filter(None, map(last_shard, folders)), None):
        return shard
    raise ConfigError(f"--suite bpb: no shard is in {', '.join(map(str, folders))}; in nanochat's checkout, "
                      f"`{FETCHES}` fetches it, NANOCHAT_BASE_DIR names another base folder, or --text FILE "
                      "other texts")


async def packed_rows(texts: Texts, scorer: Scorer, targets: int) -> AsyncGenerator[list[int], None]:
    """Rows of targets + 1 tokens, without end: after the last document comes the first."""
    packer = Packer()
    batches = itertools.chain.from_iterable(texts.documents() for _ in itertools.count())
    if not next(texts.documents(), None):
        raise ConfigError(f"{texts.path} has no texts")
    while True:
        row: list[int] = []
        while len(row) <= targets:
            while len(packer.waiting) < BUFFERED:
                for document in await scorer.encode(next(batches)):
                    packer.add(document)
            row += packer.take(targets + 1 - len(row))
        yield row


async def plain_rows(texts: Texts, scorer: Scorer, targets: int) -> AsyncGenerator[list[int], None]:
    """The rows of one running text: each begins afresh, and every token is scored once."""
    try:
        text = read_small(texts.path).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {texts.path}: not UTF-8 text") from None
    begin, whole = await scorer.encode(["", text])
    if not begin:
        raise ConfigError("--suite bpb: the model has no token that begins a text; see the command score")
    ids = whole[len(begin):]
    for first in range(0, len(ids), targets):
        yield begin + ids[first:first + targets]


def targets_of(scorer: Scorer) -> int:
    """How many tokens a row has that are scored: nanochat's sequence_len."""
    if scorer.longest > scorer.room:
        return scorer.room
    return min(MOST_TARGETS, scorer.room - 1)


async def run_bpb(scorer: Scorer, texts: Texts, most: int | None, kept: AnswersFile,
                  progress: Callable[[str, float], None]) -> BpbResult:
    """Score the rows that are not among `kept`: `most` of them, or as many as upstream does."""
    began_s = time.monotonic()
    targets = targets_of(scorer)
    done = 0
    if texts.is_plain:
        rows = plain_rows(texts, scorer, targets)
        count = most
    else:
        rows = packed_rows(texts, scorer, targets)
        count = most or max(SPLIT_TOKENS // targets, 1)
    places = set[int]()

    async def score_some(numbered: AsyncGenerator[tuple[int, list[int]], None]):
        nonlocal done
        async for place, row in numbered:
            places.add(place)
            if kept.find(TASK, place) is None:
                kept.add(await scored_row(scorer, place, row))
            done += 1
            progress(f"{texts.name}, {targets:,} tokens a row", done / count if count else 0.0)

    async with aclosing(rows):
        shared = Shared(rows, count)
        await all_of(*(score_some(shared.numbered()) for _ in range(AT_ONCE)))
    found = [item for item in (kept.find(TASK, place) for place in places) if item is not None]
    if not found:
        raise ConfigError(f"{texts.path} has no text")
    return BpbResult(texts, targets, len(found), math.fsum(item["nats"] for item in found),
                     sum(item["bytes"] for item in found), time.monotonic() - began_s)


async def scored_row(scorer: Scorer, place: int, row: Seq[int]) -> dict[str, Any]:
    [scores] = await scorer.score([row], [1], 0)
    sizes = await scorer.sizes(row[1:])
    nats = -math.fsum(one.logprob or 0.0 for one, size in zip(scores, sizes, strict=True) if size)
    return {"task": TASK, "item": place, "nats": nats, "bytes": sum(sizes)}


class Shared:
    """One stream of rows for several readers."""

    def __init__(self, rows: AsyncGenerator[list[int], None], most: int | None):
        self.rows = rows
        self.most = most
        self.place = 0
        self.turn = asyncio.Lock()

    async def numbered(self) -> AsyncGenerator[tuple[int, list[int]], None]:
        while True:
            async with self.turn:
                if self.most is not None and self.place >= self.most:
                    return
                row = await anext(self.rows, None)
                if row is None:
                    return
                place = self.place
                self.place = self.place + 1
            yield place, row
