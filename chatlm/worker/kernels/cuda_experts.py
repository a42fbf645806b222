"""The experts of a layer on CUDA, with weights packed as in the file or floats: see csrc/cuda/experts.cu.

    route > group > multiply by gates and ups > multiply by downs > add

Nothing is read back. So a graph can hold these calls, and a prompt does not wait for its routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.cuda_weights import PackedMatrix, parts_of
from chatlm.worker.ops.basic import finish_linear, routes, sigmoid_routes

# A pair is a row and one of its experts. Up to this many pairs for each expert, all are multiplied in
# float32. This was reckoned,
# not measured: reading W bounds such items, and with more pairs W would be read again for every 4.
FEW_PAIRS = 4


def fits_experts(name: str, matrix: PackedMatrix) -> bool:
    """Can the kernels take this matrix? Its experts are of one type, or all gates are of one and all ups of
    another."""
    if len(matrix.parts) == 1:
        return True
    halves = [len(blocks) for _, blocks in matrix.parts] == [matrix.shape[0] // 2] * 2
    return name.endswith("gate_up") and halves


class ExpertOps:
    """`experts`, with the interface of its reference, also for packed matrices. `kernels` is a
    cuda.CudaOps."""

    def __init__(self, kernels: cuda.CudaOps, stream: Callable[[], int]):
        self.kernels = kernels
        self.stream = stream
        # (T,) int64: slots of the running step; rows with -1 are padding
        self.slots: torch.Tensor | None = None

    def experts(self, x, logits, gate_up, down, out, *, norm, biases, activation, chosen, sum_to_one,
                residual=True, sigmoids=False, correction_bias=None, groups=(1, 1), share_scale=1.0,
                group_best=2) -> None:
        T, E = logits.shape
        C = x.shape[1]
        pairs = T * chosen
        parts = parts_of(gate_up)
        [(down_kind, down_blocks)] = parts_of(down)
        kinds = {down_kind, *(kind for kind, _ in parts)}
        many = pairs > FEW_PAIRS * E and "float32" not in kinds
        if sigmoids:
            ids, shares = self.route_by_torch(sigmoid_routes, logits, chosen, sum_to_one,
                                              correction_bias, groups, share_scale, group_best)
        elif correction_bias is not None or groups != (1, 1) or share_scale != 1:
            ids, shares = self.route_by_torch(routes, logits, chosen, sum_to_one, groups,
                                              share_scale, group_best, correction_bias)
        else:
            ids, shares = self.route(logits, chosen, sum_to_one)
        shares, routed = self.group(ids, shares, E, cuda.MANY_PAIRS if many else cuda.FEW_PAIRS)
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) if norm else x
        y = y.to(torch.bfloat16 if many else torch.float32)         # (T, C)
        hidden = y.new_empty(pairs, down.shape[1])
        added = torch.empty(pairs, C, device=x.device)
        up_bias, down_bias = biases
        if len(parts) == 1 and cuda.GATES.get(activation):
            self.multiply(y, *routed, *parts[0], hidden, gate=activation, bias=up_bias)
        elif len(parts) == 1:                               # without gates
            up = torch.empty(pairs, hidden.shape[1], device=x.device)
            self.multiply(y, *routed, *parts[0], up, bias=up_bias)
            finish_linear(up, hidden, activation, None)
        else:
            both = torch.empty(pairs, 2 * hidden.shape[1], device=x.device)
            halves = [None, None] if up_bias is None else up_bias.chunk(2)
            for part, bias, into in zip(parts, halves, both.chunk(2, 1)):
                self.multiply(y, *routed, *part, into, bias=bias)
            finish_linear(both, hidden, activation, None)
        self.multiply(hidden, *routed, down_kind, down_blocks, added, bias=down_bias, shares=shares)
        total = added.view(T, chosen, C).sum(1)
        if residual:
            torch.add(x, total, out=out)
        else:
            out.copy_(total)

    def route(self, logits, chosen: int, sum_to_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and shares (T, chosen) of each row's experts. Padding has ids of -1."""
        ids = torch.empty(len(logits), chosen, dtype=torch.int32, device=logits.device)
        shares = torch.empty(len(logits), chosen, device=logits.device)
        self.kernels.route(logits, ids, shares, sum_to_one=sum_to_one, slots=self.slots, stream=self.stream())
        return ids, shares

    def route_by_torch(self, routes: Callable, logits, *router: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for routers that no kernel has, of sigmoids, groups or a bias: by a function of the
        references."""
        ids, shares = routes(logits, *router)
        ids = ids.to(torch.int32)
        if self.slots is not None:
            ids = ids.masked_fill((self.slots < 0)[:, None], -1)
        return ids, shares.contiguous()

    def group(self, ids, shares, experts: int,
              item_pairs: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Sort the pairs by their expert -> shares (T * chosen,), and (order, items) as the kernel `group`
        gives them."""
        pairs = ids.numel()
        order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
        items = torch.empty(cuda.most_items(experts, pairs, item_pairs), 3, dtype=torch.int32,
                            device=ids.device)
        self.kernels.group(ids.view(-1), order, items, experts=experts, item_pairs=item_pairs,
                           stream=self.stream())
        return shares.view(-1), (order, items)

    def multiply(self, x, order, items, kind, blocks, out, **options) -> None:
        self.kernels.multiply_experts(x, order, items, blocks, out, kind=kind, stream=self.stream(),
                                      **options)
