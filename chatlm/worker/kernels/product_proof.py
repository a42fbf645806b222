"""Proves the products of every weight type where there is no torch: numpy multiplies the same weights in
float64.

cpu_proof.py compares all ops with their references, but needs torch.
"""

from __future__ import annotations


import numpy

from chatlm.worker.arrays.kinds import as_kind
from chatlm.worker.kernels.random_blocks import random_blocks
from chatlm.worker.kernels.tiles import COLUMNS, SOURCES, Arena, Matrix, multiply
from chatlm.worker.kernels.weights import file_values

N = 80                          # rows of the weights
K = 768                         # columns of the weights
T = 32                          # rows of x
PACKED_TOLERANCE = 3e-2         # of the largest value. x becomes int8, so 1e-2 is the usual error
FLOAT_TOLERANCE = 1e-3


class Unproved(str):
    """Why an op could not be compared with its reference."""


NO_GGUF = Unproved("the gguf package is missing")


def prove_products() -> dict[str, str]:
    """op -> what is wrong with the product of each weight type; "" if nothing is."""
    return {f"linear {kind}": prove_product(kind) for kind in COLUMNS}


def prove_product(kind: str) -> str:
    """The same for one type, with one row of x and with many, which other kernels compute."""
    try:
        source, weights = random_weights(kind)
    except ImportError:
        return NO_GGUF
    matrix = Matrix(Arena(1 << 20), kind, N, K)
    matrix.fill(source, kind)
    x = numpy.random.default_rng(1).standard_normal((T, K), numpy.float32)
    want = x.astype(numpy.float64) @ weights.astype(numpy.float64).T
    tolerance = FLOAT_TOLERANCE if kind in SOURCES else PACKED_TOLERANCE
    for rows in (1, T):
        out = numpy.zeros((rows, N), numpy.float32)
        multiply(x[:rows], matrix, out=out)
        scale = numpy.abs(want[:rows]).max()
        error = numpy.abs(out - want[:rows]).max() / scale
        if not error <= tolerance:      # so that NaN is wrong too
            return f"the output differs by {error:.1e} of the largest value"
    return ""


def random_weights(kind: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(rows as a model file has them, their values (N, K) float32). Most types need the gguf package:
    ImportError without it."""
    if kind in SOURCES:
        rows = numpy.random.default_rng(N).standard_normal((N, K), numpy.float32)
        rounded = as_kind(rows, SOURCES[kind][0])
        return rounded, as_kind(rounded, "float32")
    blocks = random_blocks(kind, N, K, seed=N)
    return blocks, file_values(kind, blocks)
