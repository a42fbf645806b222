"""What adapters add to products on CUDA: see csrc/cuda/adapters.cu.

A step brings the address of each row's adapter. So one graph serves all adapters, including those that are
loaded later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TYPE_CHECKING

import torch

from chatlm.worker.kernels import cuda

if TYPE_CHECKING:
    from chatlm.worker.arrays.kinds import AdapterMatrix, Norm

TYPES = torch.float32, torch.float16, torch.bfloat16        # in the order of their codes in cuda.CODES


class PackedAdapter(dict):
    """An adapter's matrices by name, and the table on the device by which kernels find them.

    The table is None if a matrix has more ranks than the kernels take."""

    table: torch.Tensor | None = None


class RowsOfMatrix(NamedTuple):
    """The rows with adapters for a matrix. Only the device knows which rows these are."""

    matrix: int             # number of the matrix
    rows: torch.Tensor      # (T,) int64: for each row the address of its adapter's table, or 0


class StepAdapters:
    """Takes the place of RowAdapters where only the device knows which rows have which
    adapter."""

    def __init__(self, numbers: dict[str, int], tokens: torch.Tensor, logit_rows: torch.Tensor):
        self.numbers = numbers
        self.tokens = tokens
        self.logits = torch.index_select(tokens, 0, logit_rows)

    def of_matrix(self, name: str) -> RowsOfMatrix:
        number = self.numbers.setdefault(name, len(self.numbers))
        return RowsOfMatrix(number, self.logits if name == "head" else self.tokens)


class AdapterOps:
    """Packs adapters, and computes what they add to products. `kernels` is a cuda.CudaOps."""

    def __init__(self, kernels: cuda.CudaOps, stream: Callable[[], int]):
        self.kernels = kernels
        self.stream = stream
        # name of a matrix -> its number, in the order of first use; a table ends with the last matrix that
        # its adapter has
        self.numbers: dict[str, int] = {}

    def pack(self, matrices: Mapping[str, AdapterMatrix], device: Any) -> PackedAdapter:
        adapter = PackedAdapter()
        places = {}
        for name, matrix in matrices.items():
            a = matrix.a
            b = matrix.b
            if a.dtype != b.dtype or a.dtype not in TYPES:
                a = a.float()
                b = b.float()
            a = a.to(device).contiguous()
            turned = b.T.to(device).contiguous()
            scales = matrix.scales.to(device, torch.float32).contiguous()
            adapter[name] = type(matrix)(a, turned.T, scales)
            number = self.numbers.setdefault(name, len(self.numbers))
            places[number] = [a.data_ptr(), turned.data_ptr(), scales.data_ptr(), *a.shape,
                              TYPES.index(a.dtype)]
        if all(place[3] <= cuda.MAX_RANKS for place in places.values()):
            count = max(places, default=-1) + 1
            words = [count]
            for number in range(count):
                words += places.get(number, [0] * 6)
            adapter.table = torch.tensor(words, dtype=torch.int64).to(device)
        return adapter

    def finish(self, x: torch.Tensor, norm: Norm | None, y: torch.Tensor, adapted: RowsOfMatrix,
               out: torch.Tensor, activation: str | None = None,
               residual: torch.Tensor | None = None) -> None:
        """residual + activation(y + what the rows' adapters add for norm(x)) -> out. x (T, >= K); y (T, N)
        float32."""
        x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
        sums = torch.empty(len(x), cuda.MAX_RANKS, device=x.device)
        self.kernels.shrink(adapted.rows, adapted.matrix, x, sums, norm=norm and (norm.weight, norm.eps),
                            stream=self.stream())
        made = out if out.dtype in (torch.float32,
                                    torch.bfloat16) else torch.empty_like(out, dtype=torch.float32)
        self.kernels.expand(adapted.rows, adapted.matrix, sums, y, made, activation=activation,
                            residual=residual, stream=self.stream())
        if made is not out:
            out.copy_(made)
