"""Keys and values of the type q8_0 on CUDA: turned by a Hadamard matrix, then rounded to 8 bits, with a scale
for each 32."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from chatlm.worker.kernels.cuda import PACKED_BLOCK


class PackedPages(NamedTuple):
    """A layer's cache, in place of a tensor (2, P, Hkv, PAGE_SIZE, D) of floats."""

    codes: torch.Tensor     # (2, P, Hkv, PAGE_SIZE, D) int8
    scales: torch.Tensor    # (2, P, Hkv, PAGE_SIZE, D / 32) float16

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type in which torch attends. It is more exact than what the cache holds."""
        return torch.float32

    @classmethod
    def within(cls, memory: torch.Tensor, shape: tuple[int, ...]) -> PackedPages:
        """Pages in the bytes of `memory`: all codes, then all scales."""
        count = len(memory) * PACKED_BLOCK // (PACKED_BLOCK + 2)
        codes = memory[:count].view(torch.int8)
        scales = memory[count:].view(torch.float16)
        return cls(codes.view(shape), scales.view(*shape[:-1], shape[-1] // PACKED_BLOCK))


def packable(head_size: int) -> bool:
    return head_size >= PACKED_BLOCK and head_size & (head_size - 1) == 0


def halves(cache: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """(pages of keys, pages of values), and their scales as options of the kernels."""
    if not isinstance(cache, PackedPages):
        return (cache[0], cache[1]), {}
    return (cache.codes[0], cache.codes[1]), {"k_scales": cache.scales[0], "v_scales": cache.scales[1]}


def gathered(cache: Any, pages: torch.Tensor) -> torch.Tensor:
    """Some pages (n,) of a cache -> (2, Hkv, n, PAGE_SIZE, D). Packed ones become float32 and stay turned."""
    if not isinstance(cache, PackedPages):
        return torch.index_select(cache.transpose(1, 2), 2, pages)
    codes, scales = (torch.index_select(part.transpose(1, 2), 2, pages).float() for part in cache)
    return floats_of(codes, scales)


def floats_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers (..., D) that codes (..., D) and scales (..., D / 32) stand for, still turned."""
    return (codes.unflatten(-1, (-1, PACKED_BLOCK)) * scales.unsqueeze(-1)).flatten(-2)


@functools.lru_cache(maxsize=16)
def hadamard(size: int, device: Any) -> torch.Tensor:
    """Sylvester's Hadamard matrix (size, size), normalized, so that it is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (matrix * size**-0.5).to(device)


def turned(heads: torch.Tensor) -> torch.Tensor:
    """Heads (..., D) in float32 times the Hadamard matrix. This is the reference of the kernel `turn`."""
    return heads.float() @ hadamard(heads.shape[-1], heads.device)


def packed(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (..., D) int8 and scales (..., D / 32) float16 of heads (..., D)."""
    return codes_of(turned(heads))


def codes_of(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of numbers that are turned already."""
    blocks = numbers.unflatten(-1, (-1, PACKED_BLOCK))
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    codes = (blocks * inverse).round().clamp(-127, 127).to(torch.int8)
    return codes.flatten(-2), scales.squeeze(-1)
