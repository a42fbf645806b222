"""Importance: how much each column of a matrix is used, in llama.cpp's two formats of imatrix files.

A column's importance is the mean square of the values that it is multiplied by, over all tokens of a text."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from chatlm.common.errors import ConfigError, shown, visible
from chatlm.common.files import opened, read_small
from chatlm.export.gguf import encoding
from chatlm.export.gguf.unfinished import UnfinishedFile, digest_of
from chatlm.worker.weights.formats.gguf.file import read_gguf_file, readable
from chatlm.worker.weights.formats.gguf.texts import Texts
from chatlm.worker.weights.rules import MOST_TENSORS, Rule, checked

COUNT = Rule(int, 0, 2**31 - 1, optional=True)
KEYS = {"imatrix.datasets": Rule(str, many=True, optional=True), "imatrix.chunk_count": COUNT,
        "imatrix.chunk_size": COUNT}
SUMS = ".in_sum2"
COUNTS = ".counts"
LONGEST_NAME = 4096
MOST_OLD = 2 << 30  # bytes of a .dat; that of a model of 1,000 B weights has 0.4 GB


@dataclass
class SquareSums:
    """Of one tensor: the sums of squares (E, K) float32, and the tokens that each matrix has seen (E,). A
    tensor without experts has one matrix."""

    squares: numpy.ndarray
    counts: numpy.ndarray

    @property
    def means(self) -> numpy.ndarray:
        """(E, K): 1 where a matrix has seen no token."""
        counts = self.counts[:, None]
        return numpy.where(counts > 0, self.squares / numpy.maximum(counts, 1), 1).astype(numpy.float32)


@dataclass(frozen=True)
class Importance:
    """What an imatrix file says."""

    tensors: Mapping[str, SquareSums]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_tokens: int = 0
    path: Path | None = field(default=None, compare=False)

    def of(self, name: str, sizes: Seq[int]) -> numpy.ndarray | None:
        """(E, K) of the tensor with these sizes (columns first); None if the file says nothing of it.
        ConfigError if it is of another model."""
        sums = self.tensors.get(name)
        if sums is None:
            return None
        experts = sizes[2] if len(sizes) > 2 else 1
        if sums.squares.shape[1] == sizes[0] and len(sums.squares) == experts:
            return sums.means
        if sums.squares.size == sizes[0] * experts:  # .dat files have one list for all experts
            return sums.means.reshape(experts, sizes[0])
        raise ConfigError(f"--imatrix {self._shown}: it is of another model: {shown(name)} has "
                          f"{sums.squares.shape[1]:,} columns there and {sizes[0]:,} in this one")

    @property
    def _shown(self) -> str:
        return visible(str(self.path or "file"))


def read_importance(path: Path) -> Importance:
    """ConfigError if the file is none of importance."""
    with opened(path) as file:
        start = file.read(4)
    importance = read_gguf_importance(path) if start == b"GGUF" else read_old_importance(path)
    for name, sums in importance.tensors.items():
        if not (numpy.isfinite(sums.squares).all() and numpy.isfinite(sums.counts).all()):
            raise ConfigError(f"--imatrix {visible(str(path))}: {shown(name)} has values that are not "
                              "finite; make the file again")
        if (sums.squares < 0).any():
            raise ConfigError(f"--imatrix {visible(str(path))}: {shown(name)} has negative sums of squares")
    return importance


def read_gguf_importance(path: Path) -> Importance:
    with readable(path):
        metadata, stored = read_gguf_file(path)
        if metadata.get("general.type") != "imatrix":
            raise ConfigError(f"--imatrix {visible(str(path))} is no file of importance: its general.type is "
                              f"{shown(metadata.get('general.type', 'model'))}, not imatrix")
        tensors = {}
        for name, tensor in stored.items():
            if not name.endswith(SUMS):
                continue
            counts = stored.get(name.removesuffix(SUMS) + COUNTS)
            if counts is None or {tensor.tensor_type.name, counts.tensor_type.name} != {"F32"}:
                raise ConfigError(f"--imatrix {visible(str(path))}: {shown(name)} has no {COUNTS} beside it, "
                                  "or is not F32")
            matrices = counts.n_elements
            squares = numpy.array(tensor.data, numpy.float32).reshape(matrices, -1)
            tensors[name.removesuffix(SUMS)] = SquareSums(squares, numpy.rint(counts.data).reshape(-1))
    if not tensors:
        raise ConfigError(f"--imatrix {visible(str(path))} has no tensors")
    stated = {}
    for key, rule in KEYS.items():
        value = metadata.get(key)
        stated[key] = checked(path, key, [*value] if isinstance(value, Texts) else value, rule)
    datasets, chunks, chunk_tokens = stated.values()
    return Importance(tensors, tuple(datasets or ()), chunks or 0, chunk_tokens or 0, path)


def read_old_importance(path: Path) -> Importance:
    """llama.cpp's format before GGUF (.dat), which has neither a name nor a version."""
    refused = ConfigError(f"--imatrix {visible(str(path))} is no file of importance: neither a GGUF file nor "
                          "llama.cpp's older .dat")
    tensors = {}
    datasets = ()
    chunks = 0
    data = read_small(path, MOST_OLD)
    try:
        [count] = struct.unpack_from("<i", data)
        at = 4
        if not 0 < count <= MOST_TENSORS:
            raise refused
        for _ in range(count):
            [length] = struct.unpack_from("<i", data, at)
            if not 0 < length <= LONGEST_NAME:
                raise refused
            name = data[at + 4:at + 4 + length].decode()
            at += 4 + length
            calls, size = struct.unpack_from("<ii", data, at)
            at += 8
            if size < 1 or at + 4 * size > len(data):
                raise refused
            squares = numpy.frombuffer(data, "<f4", size, at).reshape(1, -1).astype(numpy.float32)
            at += 4 * size
            tensors[name] = SquareSums(squares, numpy.array([max(calls, 1)], numpy.float32))
        if at + 8 <= len(data):
            chunks, length = struct.unpack_from("<ii", data, at)
            datasets = (data[at + 8:at + 8 + max(length, 0)].decode("utf-8", "replace"),)
    except (struct.error, UnicodeDecodeError):
        raise refused from None
    return Importance(tensors, datasets, max(chunks, 0), 0, path)


def write_importance(importance: Importance, output: Path):
    """Write llama.cpp's GGUF format; the file appears once it is complete."""
    metadata = {
        "general.type": encoding.of_text("imatrix"),
        "imatrix.datasets": encoding.of_texts(importance.datasets),
        "imatrix.chunk_count": encoding.of_number(importance.chunks),
        "imatrix.chunk_size": encoding.of_number(importance.chunk_tokens)}
    arrays = {}
    for name in sorted(importance.tensors):
        sums = importance.tensors[name]
        arrays[name + SUMS] = numpy.ascontiguousarray(sums.squares, "<f4")
        arrays[name + COUNTS] = numpy.ascontiguousarray(sums.counts[:, None], "<f4")
    layout = encoding.layout_of(
        metadata, [(name, tuple(reversed(array.shape)), "F32") for name, array in arrays.items()])
    file = UnfinishedFile(output, digest_of("importance"))
    try:
        file.write(layout.header)
        for place in layout.places:
            file.write(bytes(layout.begin_of(place) - file.at))
            file.write(arrays[place.name].tobytes())
        file.write(bytes(layout.size - file.at))
        file.finish()
    finally:
        file.close()
