"""Writes tensors as safetensors files, one tensor after the other.

The format: the length of a header, 8 bytes; the header, JSON that says of each tensor its type, its
shape and where its bytes are; the bytes. So sizes are known before the first tensor is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence as Seq
from pathlib import Path
from typing import Any

import numpy

from chatlm.common.errors import ConfigError
from chatlm.common.hub.repository import INDEX, WHOLE
from chatlm.export.hub_model import Weights
from chatlm.worker.arrays.kinds import bits_of, contiguous, item_bytes, kind_of
from chatlm.worker.weights.files.finite import fault_of

TYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ReportBytes = Callable[[str, int], None]  # (the file that is written, bytes written of all files so far)


def bytes_of(weights: Weights) -> int:
    return sum(math.prod(shape) for shape in weights.shapes.values()) * item_bytes(weights.kind)


def shards_of(weights: Iterable[Weights], most: int) -> list[list[Weights]]:
    """In files of at most `most` bytes each. One that is larger gets a file for itself."""
    shards: list[list[Weights]] = []
    left = 0
    for each in weights:
        size = bytes_of(each)
        if not shards or size > left:
            shards.append([])
            left = most
        shards[-1].append(each)
        left -= size
    return shards


def write_weights(folder: Path, weights: Seq[Weights], most: int, report: ReportBytes):
    """Write all weights into a folder: model.safetensors, or numbered files of at most `most` bytes and an
    index.

    ConfigError if a value is NaN or infinite: nobody could use such a model."""
    shards = shards_of(weights, most)
    names = [WHOLE]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    done = 0
    places: dict[str, str] = {}
    for name, shard in zip(names, shards):
        write_shard(folder / name, shard, lambda count: report(name, done + count))
        done += sum(map(bytes_of, shard))
        for each in shard:
            places |= dict.fromkeys(each.shapes, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": done}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_shard(path: Path, shard: Seq[Weights], note: Callable[[int], None]):
    """One file. Types with more bytes come first, so that every number is at a multiple of its size."""
    ordered = sorted(shard, key=lambda each: -item_bytes(each.kind))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in ordered:
        for name, shape in each.shapes.items():
            begin = end
            end += math.prod(shape) * item_bytes(each.kind)
            header[name] = {"dtype": TYPE_NAMES[each.kind], "shape": list(shape),
                            "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in ordered:
            for (name, shape), array in zip(each.shapes.items(), each.read(), strict=True):
                check(name, shape, each.kind, array)
                file.write(bits_of(contiguous(array)).reshape(-1).view(numpy.uint8).data)
                written += array.nbytes
                note(written)
        file.flush()
        os.fsync(file.fileno())


def check(name: str, shape: tuple[int, ...], kind: str, array: numpy.ndarray):
    assert (tuple(array.shape), kind_of(array)) == (shape, kind), (name, shape, kind, array.shape)
    if fault := fault_of(array):
        raise ConfigError(f"{name} has {fault}: nothing was written")
