"""Keys and values of the type q8_0: turned by a Hadamard matrix, then 8 bits each and a scale for each 32.

Once turned, a head has no number far above the others, which would leave them few steps of the scale."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from chatlm.common.config import PACKED_BLOCK


@functools.lru_cache(maxsize=16)
def hadamard(size: int, device) -> torch.Tensor:
    """The normalized Hadamard matrix (size, size) of Sylvester, float32, which is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * size**-0.5).to(device)


def turned(heads: torch.Tensor) -> torch.Tensor:
    """Heads (..., D) times the Hadamard matrix, float32; applied twice it is the identity."""
    return heads.float() @ hadamard(heads.shape[-1], heads.device)


class PackedKv(NamedTuple):
    """The keys, or the values, of a layer: turned, then divided by their scales and rounded."""

    codes: torch.Tensor   # (slots, Hkv, D) int8
    scales: torch.Tensor  # (slots, Hkv, D / 32) float16

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @classmethod
    def within(cls, memory: torch.Tensor, slots: int, heads: int, size: int, begin: int, stride: int):
        """The view of some bytes of a cache, its slots `stride` apart, and where the next one begins."""
        blocks = size // PACKED_BLOCK
        end = begin + heads * size
        codes = memory.view(torch.int8).as_strided((slots, heads, size), (stride, size, 1), begin)
        scales = memory.view(torch.float16).as_strided(
            (slots, heads, blocks), (stride // 2, blocks, 1), end // 2)
        return cls(codes, scales), end + 2 * heads * blocks

    def put(self, slots, heads):
        """Pack heads (T, Hkv, D) into these slots (T,)."""
        blocks = turned(heads).unflatten(-1, (-1, PACKED_BLOCK))
        scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
        inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
        codes = (blocks * inverse).round().clamp(-127, 127).to(torch.int8)
        self.codes.index_copy_(0, slots, codes.flatten(-2))
        self.scales.index_copy_(0, slots, scales.squeeze(-1))

    def floats(self) -> torch.Tensor:
        """(slots, Hkv, D) float32, still turned."""
        blocks = self.codes.unflatten(-1, (-1, PACKED_BLOCK)).float()
        return (blocks * self.scales.float().unsqueeze(-1)).flatten(-2)


PACKED = {"q8_0": PackedKv}  # of pages.py's KV_BLOCKS, those that are no floats
