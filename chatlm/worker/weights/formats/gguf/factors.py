"""Factors beside the NVFP4 matrices of a GGUF file. NAME.scale multiplies NAME.weight. NAME.input_scale is
for activations in 4 bits and changes nothing here. (Gemma 4's ffn_gate_inp.scale stands beside floats and
means something else.)"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy

from chatlm.common.errors import ConfigError, require_library
from chatlm.worker.arrays.gguf_types import TYPES
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.weights.formats.gguf.header import GgufTensor

ROWS = 4096  # multiplied at a time


def with_factors(path: Path, stored: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """A file's tensors with each matrix multiplied by its factor, and without the factors. ConfigError for a
    factor that is not one finite number, or one for each expert."""
    found = {name: match for name in stored
             if (match := re.fullmatch(r"(.*)\.(input_)?scale", name))
             and (matrix := stored.get(f"{match[1]}.weight")) and matrix.tensor_type.name == "NVFP4"}
    tensors = {name: tensor for name, tensor in stored.items() if name not in found}
    for name, match in found.items():
        weight = f"{match[1]}.weight"
        if not match[2]:
            tensors[weight] = multiplied(path, stored[weight], stored[name])
    return tensors


def multiplied(path: Path, tensor: GgufTensor, factor: GgufTensor) -> GgufTensor:
    """A matrix times its factor, in Q8_0."""
    factors = numpy.asarray(floats(dequantize(factor.tensor_type, factor.data)), numpy.float32).reshape(-1)
    allowed = {1, int(tensor.shape[2]) if len(tensor.shape) > 2 else 1}
    if len(factors) not in allowed or not numpy.isfinite(factors).all():
        raise ConfigError(f"{path}: {factor.name} has {len(factors)} numbers; it must have "
                          f"{' or '.join(map(str, sorted(allowed)))}, and none may be NaN or infinite")
    if (factors == 1).all():
        return tensor
    columns = int(tensor.shape[0])
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    each = numpy.repeat(factors, len(rows) // len(factors))[:, None]
    gguf = require_library("gguf", "packed weights")
    parts = []
    for begin in range(0, len(rows), ROWS):
        values = floats(dequantize(tensor.tensor_type, rows[begin:begin + ROWS])).reshape(-1, columns)
        parts.append(gguf.quantize(values * each[begin:begin + ROWS], TYPES["Q8_0"]))
    data = numpy.concatenate(parts).reshape(*tensor.data.shape[:-1], -1)
    return tensor._replace(tensor_type=TYPES["Q8_0"], n_bytes=data.nbytes, data=data)
