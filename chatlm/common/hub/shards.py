"""The texts of nanochat's training and validation: shards in parquet, read and packed as upstream does.

As dataset.py and dataloader.py at 92d63d4 on one GPU."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence as Seq
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, error_text, require_library, shown
from chatlm.common.files import check_regular, read_small

# documents to choose from; encoded at once
BUFFERED = 1000
TOGETHER = 128
MOST_GROUP_BYTES = 1 << 30      # a row group, which is read as a whole; upstream's have some megabytes


def last_shard(folder: Path) -> Path | None:
    """The shard of a data set that nanochat does not train on; None without any."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".parquet")]
    except OSError:
        return None
    return folder / max(names) if names else None


def documents_of(path: Path) -> Iterator[list[str]]:
    """The documents of a shard, or of a file of JSON lines, at most TOGETHER at a time. ConfigError if it
    cannot be read, or if one is no text."""
    for rows in read_parts(path, ("text",)):
        if path.suffix == ".parquet" and rows and "text" not in rows[0]:
            raise ConfigError(f"{path} has no column `text`")
        texts: list[Any] = [row.get("text") if isinstance(row, dict) else row for row in rows]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ConfigError(f"{path}: {shown(wrong[0])} is not a text")
        for begin in range(0, len(texts), TOGETHER):
            yield texts[begin:begin + TOGETHER]


def read_parts(path: Path, columns: Seq[str]) -> Iterator[list[dict]]:
    """The rows of a file, part after part: the row groups of parquet."""
    if path.suffix in (".jsonl", ".json"):
        yield read_lines(path)
        return
    check_regular(path)
    pyarrow = require_library("pyarrow", f"reading {path.name}")
    opened = require_library("pyarrow.parquet", f"reading {path.name}").ParquetFile if (
        path.suffix == ".parquet") else None
    try:
        if opened is None:
            with pyarrow.memory_map(str(path)) as source:
                yield require_library("pyarrow.ipc", f"reading {path.name}").open_stream(
                    source).read_all().select([*columns]).to_pylist()
            return
        with opened(path) as file:
            for group in range(file.num_row_groups):
                if (size := file.metadata.row_group(group).total_byte_size) > MOST_GROUP_BYTES:
                    raise ConfigError(f"{path} has {size:,} bytes in a row group; the limit is "
                                      f"{MOST_GROUP_BYTES:,}")
                yield file.read_row_group(group, columns=[*columns]).to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or reason}") from None


def read_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(read_small(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: line {number} is not JSON: {error_text(error)}") from None
    return rows


class Packer:
    """Makes rows of documents: the longest that fits, the earlier one of two; where none does, the beginning
    of the shortest."""

    def __init__(self):
        self.waiting = list[tuple[int, int, list[int]]]()  # (tokens, number, document), in order
        self.numbers = itertools.count()

    def add(self, document: list[int]):
        bisect.insort(self.waiting, (len(document), next(self.numbers), document))

    def take(self, room: int) -> list[int]:
        """The next part of a row that has so much room."""
        fitting = bisect.bisect_left(self.waiting, (room + 1,))
        if fitting:
            fitting = bisect.bisect_left(self.waiting, (self.waiting[fitting - 1][0],))
        return self.waiting.pop(fitting)[2][:room]


def packed_rows(path: Path, encode: Callable[[str], list[int]], targets: int) -> Iterator[list[int]]:
    """Rows of targets + 1 tokens of a shard's documents, without end: after the last document comes the
    first. ConfigError if it has none or cannot be read."""
    if not next(documents_of(path), None):
        raise ConfigError(f"{path} has no texts")
    packer = Packer()
    batches = itertools.chain.from_iterable(documents_of(path) for _ in itertools.count())
    while True:
        row: list[int] = []
        while len(row) <= targets:
            while len(packer.waiting) < BUFFERED:
                for text in next(batches):
                    packer.add(encode(text))
            row += packer.take(targets + 1 - len(row))
        yield row
