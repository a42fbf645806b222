"""Files of torch.save, read without torch: a zip archive, and a pickle that may call nothing."""

from __future__ import annotations

import functools
import io
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from chatlm.common.errors import ConfigError, cannot_read, lack_of_memory, error_text
from chatlm.common.files import opened
from chatlm.common.hub.archives import archive_in
from chatlm.worker.arrays.kinds import address_of, item_bytes, of_kind
from chatlm.worker.weights.files.weight_files import refuse_cut_checkpoint


class PlainUnpickler(pickle._Unpickler):
    """Loads no global, so a hostile pickle can call nothing.

    It extends pickle's Python class. The C one allocates room for any memo index: six bytes took 4 GB and 12
    s."""

    owner = ""
    dispatch = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # it, too, allocates any length it is given

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it would load {module}.{name}, which no {self.owner} needs")


class Storage(NamedTuple):
    """A class of storages, by the type of its numbers."""

    kind: str


STORAGES = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
            "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32",
            "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}


def rebuilt(storage: numpy.ndarray, offset: int, size: tuple, stride: tuple, *_) -> numpy.ndarray:
    """A tensor of its storage, as torch._utils._rebuild_tensor_v2 makes it."""
    numbers = offset, *size, *stride
    if not (len(size) == len(stride) and all(type(number) is int and number >= 0 for number in numbers)):
        raise pickle.UnpicklingError("the sizes of a tensor are not numbers")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride))
    if math.prod(size) and last >= len(storage):
        raise pickle.UnpicklingError(f"a tensor goes on to number {last:,} of the {len(storage):,} stored")
    return numpy.lib.stride_tricks.as_strided(
        storage[offset:], size, tuple(step * storage.itemsize for step in stride), subok=True)


CALLED = {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): rebuilt,
          ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data}


class StandIn:
    """Stands for an object whose class is not loaded. It keeps the attributes that the pickle sets."""

    attributes: Mapping = {}

    def __new__(cls, *arguments, **named_arguments):
        return super().__new__(cls)

    def __setitem__(self, key, value):
        """Items are not kept."""

    def append(self, item):
        """Items are not kept."""


def set_attributes(unpickler: Any):
    """A state dict has the attribute _metadata, which nothing needs. Of other objects only stand-ins have
    attributes."""
    state = unpickler.stack.pop()
    owner = unpickler.stack[-1]
    if isinstance(owner, StandIn):
        owner.attributes = state if isinstance(state, dict) else {}
    elif type(owner) is not OrderedDict:
        raise pickle.UnpicklingError(f"it sets attributes of {type(owner).__name__}")


class CheckpointUnpickler(PlainUnpickler):
    """Loads tensors, as arrays, and Python's own objects. Other objects are errors, or with `stand_ins`
    StandIns."""

    owner = "checkpoint"

    def __init__(self, data: bytes, storage_of: Callable[[str, str, int], numpy.ndarray],
                 stand_ins: bool = False):
        super().__init__(io.BytesIO(data))
        self.storage_of = storage_of
        self.stand_ins = stand_ins

    dispatch = PlainUnpickler.dispatch | {pickle.BUILD[0]: set_attributes}

    def find_class(self, module: str, name: str):
        if module == "torch" and name in STORAGES:
            return Storage(STORAGES[name])
        if known := CALLED.get((module, name)):
            return known
        return StandIn if self.stand_ins else super().find_class(module, name)

    def persistent_load(self, pid):
        what, storage, key, _, count = pid
        if what != "storage" or type(storage) is not Storage or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"it refers to {what}, which is no storage of numbers")
        return self.storage_of(storage.kind, key, count)


def load_checkpoint(path: Path, stand_ins: bool = False) -> dict:
    """What a file of torch.save holds, its tensors as arrays mapped from the file. No code in it runs.

    `stand_ins`: it may hold objects of the trainer's own classes, such as a config. They are not loaded."""
    try:
        with opened(path) as file:
            is_archive = zipfile.is_zipfile(file)
        if not is_archive:
            raise ValueError("it is no zip archive, as torch.save has written since 2020")
        state = unpickled(path, stand_ins)
    except Exception as error:  # a hostile or truncated file can raise nearly anything
        refuse_cut_checkpoint(path)
        if isinstance(error, OSError):
            raise cannot_read(path, error) from None
        raise lack_of_memory(error) or ConfigError(
            f"{path} is not a checkpoint, or not only tensors: {error_text(error)}") from None
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds {type(state).__name__} instead of a state dict")
    return state


def unpickled(path: Path, stand_ins: bool) -> Any:
    with opened(path) as file, archive_in(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        [pickled] = (name for name in members if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        # copied on write, because torch does not accept read-only memory
        whole = numpy.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), numpy.uint8)

        def stored(name: str) -> numpy.ndarray:
            """A member's bytes."""
            member = members[name]
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            header = whole[member.header_offset:member.header_offset + 30].tobytes()
            begin = member.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
            if header[:4] != b"PK\3\4" or begin + member.file_size > len(whole):
                raise ValueError(f"{name} is not where the table of contents says")
            return whole[begin:begin + member.file_size]

        @functools.cache
        def storage_of(kind: str, key: str, count: int) -> numpy.ndarray:
            data = stored(f"{root}data/{key}")[:count * item_bytes(kind)]
            if len(data) < count * item_bytes(kind):
                raise ValueError(f"data/{key} has {len(data):,} bytes for {count:,} numbers of type {kind}")
            aligned = address_of(data) % item_bytes(kind) == 0
            return of_kind(data if aligned else data.copy(), kind)

        if f"{root}byteorder" in members and stored(f"{root}byteorder").tobytes() != b"little":
            raise ValueError("its byte order differs from this machine's")
        return CheckpointUnpickler(stored(pickled).tobytes(), storage_of, stand_ins).load()
