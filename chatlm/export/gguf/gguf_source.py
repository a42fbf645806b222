"""A GGUF file's model as a `ExportModel`: its metadata stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.hub.repository import SPLIT_GGUF
from chatlm.export.gguf.encoding import Value
from chatlm.export.gguf.mixes import FLOATS, ModelShape, TensorInfo
from chatlm.export.gguf.export_model import ExportModel, ExportTensor
from chatlm.worker.arrays.gguf_types import WITHOUT_VALUES
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.weights.formats.gguf.file import read_gguf, readable
from chatlm.worker.weights.formats.gguf.header import FileHeader

if TYPE_CHECKING:
    from chatlm.worker.weights.formats.gguf.header import GgufTensor

INTEGERS = "I8", "I16", "I32", "I64", "F64"


def written_gguf(path: Path) -> ExportModel:
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
    is_quantized = any(tensor.matrix.kind not in (*FLOATS, *INTEGERS) for tensor in tensors)
    return ExportModel(pairs, tensors, shape_in(architecture, metadata), tuple(files), is_quantized)


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


def shape_in(architecture: str, metadata: Mapping) -> ModelShape:
    """What a mix looks at. A list with a number for each layer counts by its first."""
    def number(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, list):
            value = value[0] if value else default
        return value if type(value) is int else default

    heads = number("attention.head_count", 1)
    return ModelShape(architecture, number("block_count", 0), heads, number("attention.head_count_kv", heads),
                 number("expert_count", 0))


def written_tensor(tensor: GgufTensor) -> ExportTensor:
    kind = tensor.tensor_type
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    matrix = TensorInfo(tensor.name, tuple(tensor.shape.tolist()), kind.name)

    def rows(begin: int, end: int) -> numpy.ndarray:
        if kind.name in WITHOUT_VALUES:
            raise ConfigError(f"{shown(tensor.name)} is of type {kind.name}, which cannot be unpacked")
        return floats(dequantize(kind, data[begin:end])).reshape(end - begin, -1)

    def raw(begin: int, end: int) -> numpy.ndarray:
        return numpy.ascontiguousarray(data[begin:end]).view(numpy.uint8)

    return ExportTensor(matrix, rows, raw)
