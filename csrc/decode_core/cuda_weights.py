"""Weights on a CUDA device, a GGUF file's blocks unchanged, or floats, and the products with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from . import cuda, weights
from .cuda_adapters import AdapterOps, RowsOfMatrix

PANEL = 1 << 24         # weights that are dequantized at once for more rows than a kernel takes


class PackedMatrix:
    """Weights (N, K) on a device, in rows of blocks; its parts, one upon the other, may differ in type."""

    def __init__(self, parts: Sequence[tuple[str, torch.Tensor]], columns: int):
        self.parts = tuple(parts)               # (kind, blocks (n, bytes of a row) uint8)
        self.shape = sum(len(blocks) for _, blocks in self.parts), columns

    @property
    def kind(self) -> str:
        return " with ".join(sorted({kind for kind, _ in self.parts}))

    @property
    def nbytes(self) -> int:
        return sum(blocks.nbytes for _, blocks in self.parts)


def as_stored(shape: tuple[int, int], parts: Sequence[tuple[Any, int]], script: SimpleNamespace,
              device: Any) -> numpy.ndarray | PackedMatrix:
    """weights.as_stored on a device at once, so that the host never holds a whole model; floats are bfloat16."""
    if weights.kinds_of(parts, weights.KEPT_ON_CUDA)[0] in weights.FLOATS:
        return script.dequantized(shape, parts, "bfloat16")
    kept = weights.as_stored(shape, parts, script, weights.KEPT_ON_CUDA)
    joined = [(kind, torch.cat([torch.from_numpy(rows).to(device) for _, rows in group]))      # one kernel for each kind
              for kind, group in itertools.groupby(
                  kept.parts, key=lambda part: part[0])]  # pyright: ignore[reportAttributeAccessIssue]  it has no floats
    return PackedMatrix(joined, shape[1])


def unpacked(matrix: PackedMatrix, script: SimpleNamespace) -> torch.Tensor:
    """The matrix in bfloat16, by chat_server's reference on the host."""
    return torch.cat([dequantized(kind, blocks.cpu(), script).to(torch.bfloat16).to(blocks.device)
                      for kind, blocks in matrix.parts])


def dequantized(kind: str, rows: torch.Tensor, script: SimpleNamespace) -> torch.Tensor:
    """What chat_server's reference makes of blocks (n, bytes of a row), in float32.

    ImportError without the gguf package, for most types.
    """
    return script.tensor_of(weights.file_values(kind, rows.numpy(), script))


def parts_of(matrix: PackedMatrix | torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """(kind, rows of blocks) of a matrix' parts in order; those of floats are their bytes."""
    if isinstance(matrix, PackedMatrix):
        return list(matrix.parts)
    return [(str(matrix.dtype).removeprefix("torch."), matrix.view(torch.uint8))]


def padded(matrix: torch.Tensor) -> torch.Tensor:
    """The same with columns of zeros up to a multiple of 8, which is what a kernel loads at once."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 8)) if matrix.ndim == 2 else matrix


class ProductOps:
    """`linear` and `embed` as their references are, also for packed matrices; `kernels` is a cuda.CudaOps.

    Up to MAX_PRODUCT_ROWS rows are one kernel for each type of W, with all that linear does before and after its product; a
    row's bits do not depend on the others. More are torch's product, of packed weights panel by panel.
    """

    def __init__(self, kernels: Any, script: SimpleNamespace, stream: Callable[[], int], adapters: AdapterOps | None = None):
        self.kernels = kernels
        self.script = script
        self.stream = stream
        self.adapters = adapters or AdapterOps(kernels, stream)

    def embed(self, table, ids, out, part=None) -> None:
        if not isinstance(table, PackedMatrix):
            return self.script.references["embed"](table, ids, out, part)
        [(kind, blocks)] = table.parts          # an embedding is one tensor of a file
        rows = torch.empty(len(ids), table.shape[1], device=ids.device)
        ids = ids.clamp(min=0)
        at = ids if part is None else (ids - part[0]).clamp(0, len(blocks) - 1)
        self.kernels.dequantize(torch.index_select(blocks, 0, at), rows, kind=kind, stream=self.stream())
        if part:
            rows.masked_fill_((at + part[0] != ids)[:, None], -0.0)
        out.copy_(rows)

    def linear(self, x, weight, out, norm=None, bias=None, activation=None, residual=None, adapted=()) -> None:
        if adapted:
            return self.adapted(x, weight, out, norm, bias, activation, residual, adapted)
        if len(x) <= cuda.MAX_PRODUCT_ROWS and fits_product(x, weight, out):
            return self.few(x, weight, out, norm, bias, activation, residual)
        if not isinstance(weight, PackedMatrix):
            return self.script.references["linear"](x, weight, out, norm, bias, activation, residual)
        if norm:
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        y = self.many(x[:, :weight.shape[1]], weight)
        self.script.finish_linear(y if bias is None else y + bias.to(y.dtype), out, activation, residual)

    def adapted(self, x, weight, out, norm=None, bias=None, activation=None, residual=None, adapted: Any = (), linear=None) -> None:
        """The same where adapters add something to the products of some rows, which the device knows or this step."""
        y = torch.empty(len(x), weight.shape[0], device=x.device)
        (linear or self.linear)(x, weight, y, norm, bias)
        if isinstance(adapted, RowsOfMatrix):
            return self.adapters.finish(x, norm, y, adapted, out, activation, residual)
        if norm:
            x = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps)
        for rows, added in self.script.adapter_products(x, adapted):
            y[rows] += added
        self.script.finish_linear(y, out, activation, residual)

    def few(self, x, weight, out, norm=None, bias=None, activation=None, residual=None) -> None:
        parts = parts_of(weight)
        begin = 0
        if len(parts) > 1 and cuda.GATES.get(activation):       # gates and ups of different types
            both = torch.empty(len(x), weight.shape[0], device=x.device)
            self.few(x, weight, both, norm, bias)
            return self.script.finish_linear(both, out, activation, residual)
        alone = len(parts) == 1
        for kind, blocks in parts:
            some = slice(begin, begin := begin + len(blocks))
            self.kernels.multiply(
                x, blocks, out if alone else out[:, some], kind=kind, norm=norm and (norm.weight, norm.eps),
                bias=bias if alone or bias is None else bias[some], activation=activation,
                residual=residual if alone or residual is None else residual[:, some], stream=self.stream())

    def many(self, x, weight: PackedMatrix) -> torch.Tensor:
        """x (T, K) W^T in bfloat16."""
        x = x.to(torch.bfloat16)
        begin = 0
        y = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
        for kind, blocks in weight.parts:
            for rows in blocks.split(max(1, PANEL // weight.shape[1])):
                panel = torch.empty(len(rows), weight.shape[1], dtype=torch.bfloat16, device=x.device)
                self.kernels.dequantize(rows, panel, kind=kind, stream=self.stream())
                y[:, begin:(begin := begin + len(rows))].copy_(torch.nn.functional.linear(x, panel))
        return y


def fits_product(x, weight: PackedMatrix | torch.Tensor, out) -> bool:
    """Whether a kernel can take these types and places; x and out are whole buffers' first rows."""
    floats = torch.float32, torch.bfloat16
    plain = isinstance(weight, torch.Tensor)
    if plain and (weight.dtype not in (*floats, torch.float16) or weight.shape[1] % 8 or not weight.is_contiguous()
                  or weight.data_ptr() % 16):
        return False
    return x.dtype in floats and out.dtype in floats and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0
