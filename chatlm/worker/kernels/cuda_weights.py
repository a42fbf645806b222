"""Weights on a CUDA device, as unchanged blocks of a GGUF file or as floats, and the products with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

import numpy
import torch

from chatlm.worker.arrays.packed import dequantized as dequantized_parts
from chatlm.worker.kernels import cuda, weights
from chatlm.worker.kernels.cuda_adapters import AdapterOps, RowsOfMatrix
from chatlm.worker.ops.basic import adapter_products, finish_linear
from chatlm.worker.ops.references import REFERENCES
from chatlm.worker.ops.tensors import tensor_of

if TYPE_CHECKING:
    from chatlm.worker.arrays.packed import RopePairs

PANEL = 1 << 24         # weights that `many` dequantizes at once


class PackedMatrix:
    """Weights (N, K) on a device, in rows of blocks. Its parts lie one below the other, and may differ in
    type."""

    def __init__(self, parts: Sequence[tuple[str, torch.Tensor]], columns: int):
        self.parts = tuple(parts)               # (kind, blocks (n, bytes of a row) uint8)
        self.shape = sum(len(blocks) for _, blocks in self.parts), columns

    @property
    def kind(self) -> str:
        return " with ".join(sorted({kind for kind, _ in self.parts}))

    @property
    def nbytes(self) -> int:
        return sum(blocks.nbytes for _, blocks in self.parts)


def as_stored(shape: tuple[int, int], parts: Sequence[tuple[Any, RopePairs | None]],
              device: Any) -> numpy.ndarray | PackedMatrix:
    """weights.as_stored, put on the device at once so that the host never holds a whole model. Floats become
    bfloat16."""
    if weights.kinds_of(parts, weights.KEPT_ON_CUDA)[0] in weights.FLOATS:
        return dequantized_parts(shape, parts, "bfloat16")
    kept = weights.as_stored(shape, parts, weights.KEPT_ON_CUDA)
    stored = kept.parts  # pyright: ignore[reportAttributeAccessIssue]  it has no floats
    joined = []             # neighbours of one kind become one part, which a kernel multiplies at once
    for kind, group in itertools.groupby(stored, key=lambda part: part[0]):
        joined.append((kind, torch.cat([torch.from_numpy(rows).to(device) for _, rows in group])))
    return PackedMatrix(joined, shape[1])


def unpacked(matrix: PackedMatrix) -> torch.Tensor:
    """The matrix in bfloat16. The reference makes it, on the host."""
    return torch.cat([dequantized(kind, blocks.cpu()).to(torch.bfloat16).to(blocks.device)
                      for kind, blocks in matrix.parts])


def dequantized(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """The values of blocks (n, bytes of a row) in float32, by the reference.

    Most types need the gguf package: ImportError without it.
    """
    return tensor_of(weights.file_values(kind, rows.numpy()))


def parts_of(matrix: PackedMatrix | torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """(kind, rows as bytes) of each part of a matrix, in order."""
    if isinstance(matrix, PackedMatrix):
        return list(matrix.parts)
    return [(str(matrix.dtype).removeprefix("torch."), matrix.view(torch.uint8))]


def padded(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with columns of zeros up to a multiple of 8, because a kernel loads 8 at once."""
    if matrix.ndim != 2:
        return matrix
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 8))


class ProductOps:
    """`linear` and `embed`, with the interface of their references, also for packed matrices. `kernels` is a
    cuda.CudaOps.

    Up to MAX_PRODUCT_ROWS rows take one kernel for each type of W, which does all that linear does before and
    after its product. The bits of a row do not depend on the others. More rows take torch's product, with
    packed weights panel by panel.
    """

    def __init__(self, kernels: cuda.CudaOps, stream: Callable[[], int],
                 adapters: AdapterOps | None = None):
        self.kernels = kernels
        self.stream = stream
        self.adapters = adapters or AdapterOps(kernels, stream)

    def embed(self, table, ids, out, part=None) -> None:
        if not isinstance(table, PackedMatrix):
            return REFERENCES["embed"](table, ids, out, part)
        [(kind, blocks)] = table.parts          # there is one, because an embedding is one tensor of a file
        rows = torch.empty(len(ids), table.shape[1], device=ids.device)
        ids = ids.clamp(min=0)
        at = ids if part is None else (ids - part[0]).clamp(0, len(blocks) - 1)
        self.kernels.dequantize(torch.index_select(blocks, 0, at), rows, kind=kind, stream=self.stream())
        if part:
            rows.masked_fill_((at + part[0] != ids)[:, None], -0.0)
        out.copy_(rows)

    def linear(self, x, weight, out, norm=None, bias=None, activation=None, residual=None,
               adapted=()) -> None:
        if adapted:
            return self.adapted(x, weight, out, norm, bias, activation, residual, adapted)
        if len(x) <= cuda.MAX_PRODUCT_ROWS and fits_product(x, weight, out):
            return self.few(x, weight, out, norm, bias, activation, residual)
        if not isinstance(weight, PackedMatrix):
            return REFERENCES["linear"](x, weight, out, norm, bias, activation, residual)
        if norm:
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        y = self.many(x[:, :weight.shape[1]], weight)
        finish_linear(y if bias is None else y + bias.to(y.dtype), out, activation, residual)

    def adapted(self, x, weight, out, norm=None, bias=None, activation=None, residual=None, adapted: Any = (),
                linear=None) -> None:
        """`linear` where adapters add to the products of some rows.

        Which rows these are only the device knows (RowsOfMatrix), or `adapted` lists them."""
        y = torch.empty(len(x), weight.shape[0], device=x.device)
        (linear or self.linear)(x, weight, y, norm, bias)
        if isinstance(adapted, RowsOfMatrix):
            return self.adapters.finish(x, norm, y, adapted, out, activation, residual)
        if norm:
            x = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps)
        for rows, added in adapter_products(x, adapted):
            y[rows] += added
        finish_linear(y, out, activation, residual)

    def few(self, x, weight, out, norm=None, bias=None, activation=None, residual=None) -> None:
        """`linear` of up to MAX_PRODUCT_ROWS rows."""
        parts = parts_of(weight)
        norm_of_kernel = norm and (norm.weight, norm.eps)
        if len(parts) == 1:
            [(kind, blocks)] = parts
            return self.kernels.multiply(x, blocks, out, kind=kind, norm=norm_of_kernel, bias=bias,
                                         activation=activation, residual=residual, stream=self.stream())
        if cuda.GATES.get(activation):          # a gate and its up are in different parts
            both = torch.empty(len(x), weight.shape[0], device=x.device)
            self.few(x, weight, both, norm, bias)
            return finish_linear(both, out, activation, residual)
        begin = 0
        for kind, blocks in parts:
            end = begin + len(blocks)
            own_bias = None if bias is None else bias[begin:end]
            own_residual = None if residual is None else residual[:, begin:end]
            self.kernels.multiply(x, blocks, out[:, begin:end], kind=kind, norm=norm_of_kernel, bias=own_bias,
                                  activation=activation, residual=own_residual, stream=self.stream())
            begin = end

    def many(self, x, weight: PackedMatrix) -> torch.Tensor:
        """x (T, K) W^T in bfloat16."""
        x = x.to(torch.bfloat16)
        y = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
        begin = 0
        for kind, blocks in weight.parts:
            for rows in blocks.split(max(1, PANEL // weight.shape[1])):
                end = begin + len(rows)
                panel = torch.empty(len(rows), weight.shape[1], dtype=torch.bfloat16, device=x.device)
                self.kernels.dequantize(rows, panel, kind=kind, stream=self.stream())
                y[:, begin:end].copy_(torch.nn.functional.linear(x, panel))
                begin = end
        return y


def fits_product(x, weight: PackedMatrix | torch.Tensor, out) -> bool:
    """Can a kernel take these types and addresses? x and out are the first rows of whole buffers."""
    floats = torch.float32, torch.bfloat16
    if isinstance(weight, torch.Tensor):
        if weight.dtype not in (*floats, torch.float16) or weight.shape[1] % 8:
            return False
        if not weight.is_contiguous() or weight.data_ptr() % 16:
            return False
    return x.dtype in floats and out.dtype in floats and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0
