"""The header of a GGUF file: metadata, and where each tensor lies. It never reads beyond the file's end."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import opened, truncated
from chatlm.common.gguf_values import ARRAY, STRING
from chatlm.worker.arrays.gguf_types import (
    BITNET_TYPE, NUMBERED, OF_FORKS, REPACKED, ROWS, GgufType, block_of)
from chatlm.worker.weights.formats.gguf.layouts import kinds_of
from chatlm.worker.weights.formats.gguf.texts import LENGTH, Texts, ends_of_strings
from chatlm.worker.weights.rules import MOST_TENSORS, MOST_TOKENS

VERSIONS = 2, 3
NUMBERS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
SHORT_LIST = 1000


class GgufTensor(NamedTuple):
    """A tensor of a file."""

    name: str
    tensor_type: GgufType
    shape: numpy.ndarray  # columns first
    n_elements: int
    n_bytes: int          # these two are 0 if only the beginning of the file is here
    data_offset: int      # in the file
    data: numpy.ndarray   # mapped from the file: rows of numbers, or of packed blocks in bytes


class TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    name: str
    sizes: list[int]  # columns first
    number: int       # of its type
    offset: int       # from the beginning of the first tensor

    def check(self, path: Path, architecture: str):
        """ValueError if the tensor is impossible, ConfigError if its type is unknown."""
        name = shown(self.name)
        if not 1 <= len(self.sizes) <= 4 or min(self.sizes) < 1:
            raise ValueError(f"the tensor {name} has the sizes {self.sizes[:8]}; it must have 1 to 4, none "
                             "below 1")
        foreign = OF_FORKS.get(self.number, "")
        if self.number == BITNET_TYPE[0] and architecture.startswith("bitnet"):
            foreign = BITNET_TYPE[1]
        if foreign:
            raise ConfigError(f"{path}: the tensor {name} is of type {foreign}, which this program does not "
                              "read; of the smallest types it reads llama.cpp's Q1_0, Q2_0, TQ1_0, TQ2_0")
        if mixed := REPACKED.get(self.number):
            raise ConfigError(f"{path}: the tensor {name} is of type {mixed}, whose rows are mixed for one "
                              f"kind of CPU; take the file of type {mixed[:-4]}, which every CPU reads")
        if self.number not in NUMBERED:
            raise ConfigError(f"{path}: the tensor {name} is of type {self.number}, which this program does "
                              f"not know; it knows {', '.join([*ROWS, 'Q2_0'])}")

    def bytes_as(self, kind: GgufType) -> int:
        """The tensor's bytes if it is of this type; ValueError if its rows are not whole blocks."""
        block, block_bytes = block_of(kind.name)
        if self.sizes[0] % block:
            raise ValueError(f"the tensor {shown(self.name)} has rows of {self.sizes[0]:,}; its type needs a "
                             f"multiple of {block}")
        return math.prod(self.sizes) // block * block_bytes


class Metadata(dict):
    """A file's metadata. A copy that was changed has no `spelled`."""

    spelled: memoryview | None = None  # all of them in the file, and what is before them


class FileHeader:
    """Reads a file from its beginning. `size`: how long the file is, if only its beginning is here."""

    def __init__(self, path: Path, size: int = 0):
        # copy on write, because torch does not accept read-only memory
        self.path = path
        with opened(path) as file:
            self.file = numpy.memmap(file, numpy.uint8, "c")
        self.partial, self.size = bool(size), size or len(self.file)
        self.buffer = memoryview(self.file.data)
        self.at = 0
        self.metadata = Metadata()
        self.tensors: dict[str, GgufTensor] = {}
        self.read()

    def read(self):
        if bytes(self.take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise ValueError("its byte order differs from this machine's")
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}; {' and '.join(map(str, VERSIONS))} are known")
        count = self.number("<Q")
        keys = self.number("<Q")
        self.metadata |= {"GGUF.version": version, "GGUF.tensor_count": count, "GGUF.kv_count": keys}
        for _ in range(keys):
            name = self.text()
            if name in self.metadata:
                raise ValueError(f"the key {shown(name)} is there twice")
            self.metadata[name] = self.value(self.number("<I"))
        self.metadata.spelled = self.buffer[:self.at]
        refuse_rotations(self.path, self.metadata)
        if count > MOST_TENSORS:
            raise ValueError(f"it has {count:,} tensors; at most {MOST_TENSORS:,} are allowed")
        self.map_tensors([self.tensor_info() for _ in range(count)])

    def take(self, size: int) -> memoryview:
        check_end(self.path, len(self.buffer), end := self.at + size)
        part = self.buffer[self.at:end]
        self.at = end
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(self.form_of(kind))
        kind = self.number("<I")
        count = self.number("<Q")
        if count > MOST_TOKENS or kind == ARRAY:
            raise ValueError(f"an array has {count:,} values of type {kind}; at most {MOST_TOKENS:,} are "
                             "allowed, and no nested arrays")
        if kind == STRING:
            texts = self.texts(count)
            return list(texts) if count < SHORT_LIST else texts
        dtype = numpy.dtype(self.form_of(kind))
        return numpy.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def form_of(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"a value has the unknown type {kind}")
        return NUMBERS[kind]

    def texts(self, count: int) -> Texts:
        begin = self.at
        size = len(self.buffer)
        check_end(self.path, size, begin + LENGTH.size * count)
        ends = ends_of_strings(self.buffer, begin, count)
        check_end(self.path, size, begin + ends[-1])
        return Texts(bytes(self.take(ends[-1])), ends)

    def tensor_info(self) -> TensorInfo:
        name = self.take(self.number("<Q"))
        dimensions = self.number("<I")
        sizes = numpy.frombuffer(self.take(LENGTH.size * dimensions), "<u8").tolist()
        number = self.number("<I")
        offset = self.number("<Q")
        return TensorInfo(str(name, "utf-8"), sizes, number, offset)

    def map_tensors(self, infos: list[TensorInfo]):
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & alignment - 1:
            raise ValueError(f"general.alignment is {shown(alignment)}; it must be a power of two")
        start = -(-self.at // alignment) * alignment
        for info in infos:
            info.check(self.path, str(self.metadata.get("general.architecture")))
        kinds = kinds_of(self.path, infos, self.size - start, alignment)
        sizes = [info.bytes_as(kind) for info, kind in zip(infos, kinds)]
        ends = [start + info.offset + size for info, size in zip(infos, sizes)]
        if (end := max(ends, default=0)) > self.size:
            name = infos[ends.index(end)].name
            check_end(self.path, self.size, end, f"the tensor {shown(name)} ends at")
        for info, kind, size, end in zip(infos, kinds, sizes, ends):
            if info.name in self.tensors:
                raise ValueError(f"the tensor {shown(info.name)} is there twice")
            shape = numpy.array(info.sizes, numpy.uint64)
            begin = end - size
            data = numpy.empty(0)
            if self.partial:
                begin = 0
                size = 0
            else:
                data = rows_of(self.file[begin:end], kind.name, info.sizes)
            count = math.prod(info.sizes)
            self.tensors[info.name] = GgufTensor(info.name, kind, shape, count, size, begin, data)


def refuse_rotations(path: Path, metadata: dict[str, Any]):
    """ConfigError for a file whose activations must be turned by Hadamard matrices before each product."""
    if rotations := [key for key in metadata if key.startswith("prism.hadamard.")]:
        raise ConfigError(f"{path}: it has the key {shown(rotations[0])}: its weights need the Hadamard "
                          "rotations of PrismML's fork of llama.cpp, which this program does not compute; "
                          "take a file of the model without them, such as Q1_0 or Q2_0")


def rows_of(data: numpy.ndarray, kind: str, sizes: list[int]) -> numpy.ndarray:
    """A tensor's bytes as numbers; those of a packed type as rows of bytes."""
    if kind in DTYPES:
        return data.view(DTYPES[kind]).reshape(sizes[::-1])
    block, block_bytes = block_of(kind)
    return data.reshape(*sizes[:0:-1], sizes[0] // block * block_bytes)


def check_end(path: Path, size: int, end: int, what: str = "its header goes on to"):
    """ConfigError if something would end beyond the `size` bytes of a file."""
    if end > 1 << 50:  # a petabyte: no real file is that long
        raise ValueError(f"{what} byte {end:,}")
    if end > size:
        raise truncated(path, size, f"and {what} byte {end:,}")
