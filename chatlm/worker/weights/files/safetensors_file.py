"""safetensors files: their arrays, mapped."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy

from chatlm.common.errors import ConfigError, cannot_read, lack_of_memory, error_text, require_library
from chatlm.common.files import check_regular, opened
from chatlm.worker.arrays.kinds import address_of, item_bytes, of_kind
from chatlm.worker.weights.files.weight_files import refuse_cut_safetensors

KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
         "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool",
         **{f"{letter}{bits}": f"{word}{bits}" for letter, word in (("I", "int"), ("U", "uint"))
            for bits in (8, 16, 32, 64)}}


def read_safetensors_file(path: Path) -> dict[str, numpy.ndarray]:
    """The arrays of one file, mapped. Its library checks the header, but has no arrays of bfloat16."""
    safetensors = require_library("safetensors", "a Hugging Face folder or a LoRA adapter")
    check_regular(path)
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with opened(path) as file:
            # copied on write, because torch does not accept read-only memory
            mapped = numpy.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), numpy.uint8)
        begin = 8 + int(mapped[:8].view("<u8")[0])
        header = json.loads(mapped[8:begin].tobytes())
        header.pop("__metadata__", None)
        return {name: array_of(mapped[begin:], its["dtype"], its["shape"], its["data_offsets"])
                for name, its in header.items()}
    except (OSError, safetensors.SafetensorError, ValueError, LookupError, RuntimeError) as error:
        refuse_cut_safetensors(path)
        if isinstance(error, OSError):
            raise cannot_read(path, error) from None
        raise lack_of_memory(error) or ConfigError(
            f"{path} is not a readable safetensors file: {error_text(error)}") from None


def array_of(data: numpy.ndarray, dtype: str, shape: list[int], offsets: list[int]) -> numpy.ndarray:
    kind = KINDS.get(dtype)
    part = data[slice(*offsets)]
    if kind is None:
        raise ValueError(f"arrays of type {dtype} are not supported")
    if address_of(part) % item_bytes(kind):
        part = part.copy()  # kernels read numbers at their addresses
    return of_kind(part, kind).reshape(shape)
