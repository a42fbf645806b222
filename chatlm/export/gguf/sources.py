"""What a GGUF file is made of: the metadata and the tensors of a model, whose values are yet to be read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.hub.huggingface import SPLIT_GGUF
from chatlm.export.gguf.encoding import Value
from chatlm.export.gguf.mixes import Matrix, Shape
from chatlm.worker.arrays.gguf_types import WITHOUT_VALUES
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.weights.gguf_file import read_gguf, readable
from chatlm.worker.weights.gguf_header import FileHeader

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.weights.gguf_header import Tensor

INTEGERS = "I8", "I16", "I32", "I64", "F64"


class WrittenTensor(NamedTuple):
    """A tensor of the model. Its rows are those of all its matrices, one after the other."""

    matrix: Matrix
    rows: Callable[[int, int], numpy.ndarray]             # (begin, end) -> float32 (end - begin, K)
    raw: Callable[[int, int], numpy.ndarray] | None       # the same as bytes of its type, if it has them

    @property
    def columns(self) -> int:
        return self.matrix.sizes[0]

    @property
    def count(self) -> int:
        """How many rows it has."""
        count = 1
        for size in self.matrix.sizes[1:]:
            count *= size
        return count

    @property
    def rows_of_matrix(self) -> int:
        return self.matrix.sizes[1] if len(self.matrix.sizes) > 1 else 1


@dataclass(frozen=True)
class Written:
    """A model, ready to be written as one file."""

    metadata: dict[str, Value]
    tensors: tuple[WrittenTensor, ...]
    shape: Shape
    files: tuple[Path, ...]   # that it is read from
    is_quantized: bool        # is any of its tensors of a quantized type?

    def stamps(self) -> list[tuple]:
        """What tells these files from others of the same names."""
        found = []
        for path in self.files:
            stat = path.stat()
            found.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        return found


def written_model(source: ModelSource) -> Written:
    """ConfigError for models that this program cannot write as a GGUF file."""
    if source.kind == "gguf":
        return written_gguf(source.path)
    if source.kind == "nanochat":
        from chatlm.export.gguf.nanochat import written_nanochat
        return written_nanochat(source)
    raise ConfigError(f"{source.path}: GGUF files and nanochat checkpoints can be written as GGUF files; "
                      "convert a Hugging Face folder with llama.cpp's convert_hf_to_gguf.py first")


def written_gguf(path: Path) -> Written:
    """A GGUF file's model, with its metadata as they are."""
    with readable(path):
        metadata, stored = read_gguf(path)
        if metadata.get("general.type", "model") != "model":
            raise ConfigError(f"{path} is not a model: its general.type is "
                              f"{shown(metadata['general.type'])}")
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ConfigError(f"{path}: general.architecture is missing")
        tensors = tuple(map(written_tensor, stored.values()))
        pairs = pairs_of(path)
    for key in ("split.no", "split.count", "split.tensors.count"):
        pairs.pop(key, None)
    count = metadata.get("split.count", 1)
    files = [path]
    for index in range(2, count + 1):
        files.append(path.with_name(re.sub(SPLIT_GGUF, f"-{index:05}-of-{count:05}", path.name)))
    is_quantized = any(tensor.matrix.kind not in ("F32", "F16", "BF16", *INTEGERS) for tensor in tensors)
    return Written(pairs, tensors, shape_in(architecture, metadata), tuple(files), is_quantized)


def pairs_of(path: Path) -> dict[str, Value]:
    """The keys of a file's header, with their values as the header has them."""
    header = FileHeader(path)
    header.at = 8
    header.number("<Q")
    pairs = {}
    for _ in range(header.number("<Q")):
        name = header.text()
        begin = header.at
        header.value(header.number("<I"))
        pairs[name] = Value(header.buffer[begin:header.at])
    pairs.pop("general.alignment", None)  # the written file has the usual one
    return pairs


def shape_in(architecture: str, metadata: Mapping) -> Shape:
    """What a mix looks at. A list with a number for each layer counts by its first."""
    def number(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, list):
            value = value[0] if value else default
        return value if type(value) is int else default

    heads = number("attention.head_count", 1)
    return Shape(architecture, number("block_count", 0), heads, number("attention.head_count_kv", heads),
                 number("expert_count", 0))


def written_tensor(tensor: Tensor) -> WrittenTensor:
    kind = tensor.tensor_type
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    matrix = Matrix(tensor.name, tuple(tensor.shape.tolist()), kind.name)

    def rows(begin: int, end: int) -> numpy.ndarray:
        if kind.name in WITHOUT_VALUES:
            raise ConfigError(f"{shown(tensor.name)} is of type {kind.name}, which cannot be unpacked")
        return floats(dequantize(kind, data[begin:end])).reshape(end - begin, -1)

    def raw(begin: int, end: int) -> numpy.ndarray:
        return numpy.ascontiguousarray(data[begin:end]).view(numpy.uint8)

    return WrittenTensor(matrix, rows, raw)
