"""Weights in FP8, and the scales that multiply them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from pathlib import Path

import numpy

from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.weights.packed.quantization import check_quantization, ct_groups
from chatlm.worker.weights.rules import MOST_CHANNELS, Rule, checked

FP8 = "float8_e4m3fn", "float8_e5m2"
USUAL_BLOCK = (128, 128)


def fp8_block(path: Path, config: Mapping) -> list[int]:
    """The rows and columns that share a scale where FP8 weights are scaled by blocks. ConfigError if
    config.json specifies a quantization that is not read."""
    quantization = check_quantization(path, config)
    if quantization is None:
        return [*USUAL_BLOCK]
    structures = [group.weights.get("block_structure") for group in ct_groups(quantization)]
    block = (quantization.stated.get("weight_block_size")
             or next(filter(None, structures), [*USUAL_BLOCK]))
    return checked(quantization.path, f"{quantization.key}.weight_block_size", block,
                   Rule(int, 1, MOST_CHANNELS, many=True), 2)


def unscaled(path: Path, scales: Mapping[str, numpy.ndarray], block: Seq[int], name: str,
             weight: numpy.ndarray) -> numpy.ndarray:
    """FP8 weights (N, K) times their scales: one for all, one for each row, or one for each block. A vector
    (N,) has one for all, or one for each value."""
    values = floats(weight)
    scale = floats(scales[name])
    if scale.size == 1:
        return values * scale.reshape(())
    if weight.ndim == 1 and scale.shape == weight.shape:
        return values * scale
    if weight.ndim != 2:
        raise ConfigError(f"{path.parent}: the scales of {name} {tuple(weight.shape)} are "
                          f"{tuple(scale.shape)}; there must be 1")
    N, K = weight.shape
    if scale.shape in ((N,), (N, 1)):
        return values * scale.reshape(N, 1)
    if scale.shape != (-(-N // block[0]), -(-K // block[1])):
        raise ConfigError(f"{path.parent}: the scales of {name} {(N, K)} are {tuple(scale.shape)}; there "
                          f"must be 1, one for each row, or one for each block of {block[0]} x {block[1]}")
    for first in range(0, N, block[0]):  # in place, band by band, to avoid a second float32 matrix
        band = scale[first // block[0]].repeat(block[1])[:K]
        values[first:first + block[0]] *= band
    return values
