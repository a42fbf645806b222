"""Norm, residual and activation: checked calls of the compiled kernels, for numpy arrays and torch CPU tensors.

Matrices (T, C) with C a multiple of 16, contiguous within each row; float32 or bfloat16. A wrong argument is a ValueError
that names it. A row's bits depend on that row alone.
"""

from . import _core
from .attention import BFLOAT16, FLOAT32, _pointer, _vector

EITHER = (FLOAT32, BFLOAT16)


def _rows(name: str, array, codes: tuple, shape: tuple | None = None, writable: bool = False) -> tuple:
    """(address, is bfloat16, shape, elements between rows) of a matrix, which must have `shape` when that is given."""
    address, code, actual, stride = _pointer(name, array, codes, rows_only=True, writable=writable)
    if len(actual) != 2 or actual[1] % 16:
        raise ValueError(f"{name}: must be a matrix with a multiple of 16 columns, not {tuple(actual)}")
    if shape is not None and tuple(actual) != shape:
        raise ValueError(f"{name}: must be {shape}, not {tuple(actual)}")
    return address, code == BFLOAT16, actual, stride


def rms_norm(x, weight, eps, out):
    """x (T, C) / its root mean square (* weight (C,) float32, or None) -> out (T, C)."""
    x_at, x_bf16, shape, x_stride = _rows("x", x, EITHER)
    out_at, out_bf16, _, out_stride = _rows("out", out, EITHER, tuple(shape), writable=True)
    weight_at = 0 if weight is None else _vector("weight", weight, FLOAT32, shape[1])
    _core.rms_norm(x_at, weight_at, out_at, shape[0], shape[1], x_stride, 0, out_stride, x_bf16, False, out_bf16, eps)


def add(x, y, out):
    """x (T, C) float32 + y (T, C) -> out (T, C) float32; out may be x."""
    x_at, _, shape, x_stride = _rows("x", x, (FLOAT32,))
    y_at, y_bf16, _, y_stride = _rows("y", y, EITHER, tuple(shape))
    out_at, _, _, out_stride = _rows("out", out, (FLOAT32,), tuple(shape), writable=True)
    _core.add(x_at, y_at, out_at, shape[0], shape[1], x_stride, y_stride, out_stride, False, y_bf16, False, 0.0)


def swiglu(gate_up, out):
    """gate_up (T, 2 C), gates first -> silu(gate) * up in out (T, C), of the same type."""
    out_at, out_bf16, shape, out_stride = _rows("out", out, EITHER, writable=True)
    x_at, x_bf16, _, x_stride = _rows("gate_up", gate_up, EITHER, (shape[0], 2 * shape[1]))
    if x_bf16 != out_bf16:
        raise ValueError("out: must have the type of gate_up")
    _core.swiglu(x_at, 0, out_at, shape[0], shape[1], x_stride, 0, out_stride, x_bf16, False, out_bf16, 0.0)


def relu2(x, out):
    """relu(x) squared -> out (T, C), of the same type; out may be x."""
    x_at, x_bf16, shape, x_stride = _rows("x", x, EITHER)
    out_at, out_bf16, _, out_stride = _rows("out", out, EITHER, tuple(shape), writable=True)
    if x_bf16 != out_bf16:
        raise ValueError("out: must have the type of x")
    _core.relu2(x_at, 0, out_at, shape[0], shape[1], x_stride, 0, out_stride, x_bf16, False, out_bf16, 0.0)
