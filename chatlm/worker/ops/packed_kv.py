"""Keys and values of the type q8_0: turned by a Hadamard matrix, then rounded to 8 bits, with a scale for 32.

A turned head has no number far above the others. Such a number would leave few steps for the others."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from chatlm.common.config import PACKED_BLOCK


@functools.lru_cache(maxsize=16)
def hadamard(size: int, device) -> torch.Tensor:
    """Sylvester's Hadamard matrix (size, size), float32, normalized, so that it is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * size**-0.5).to(device)


def turned(heads: torch.Tensor, parts: tuple[int, ...] = ()) -> torch.Tensor:
    """Heads (..., D) times the Hadamard matrix, float32. Turning twice gives them back.

    With `parts`, so many numbers after so many others are turned, each by themselves."""
    if not parts:
        return heads.float() @ hadamard(heads.shape[-1], heads.device)
    return torch.cat([turned(part) for part in heads.split(parts, -1)], -1)


class PackedKv(NamedTuple):
    """The keys, or the values, of a layer: turned, then divided by their scales and rounded."""

    codes: torch.Tensor   # (slots, Hkv, D) int8
    scales: torch.Tensor  # (slots, Hkv, D / 32) float16
    parts: tuple[int, ...] = ()  # latents: how many of the D numbers are a value, and how many follow

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @classmethod
    def within(cls, memory: torch.Tensor, slots: int, heads: int, size: int, begin: int, stride: int):
        """(a view of bytes of a cache, where the next one begins). Slots are `stride` bytes apart."""
        blocks = size // PACKED_BLOCK
        end = begin + heads * size
        codes = memory.view(torch.int8).as_strided((slots, heads, size), (stride, size, 1), begin)
        scales = memory.view(torch.float16).as_strided(
            (slots, heads, blocks), (stride // 2, blocks, 1), end // 2)
        return cls(codes, scales), end + 2 * heads * blocks

    def divided(self, first: int) -> tuple[PackedKv, PackedKv]:
        """Keys of latents, and the values in them: the first numbers, which are turned by themselves."""
        keys = self._replace(parts=(first, self.codes.shape[-1] - first))
        return keys, PackedKv(self.codes[..., :first], self.scales[..., :first // PACKED_BLOCK])

    def put(self, slots, heads):
        """Pack heads (T, Hkv, D) into these slots (T,)."""
        blocks = turned(heads, self.parts).unflatten(-1, (-1, PACKED_BLOCK))
        scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
        inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
        codes = (blocks * inverse).round().clamp(-127, 127).to(torch.int8)
        self.codes.index_copy_(0, slots, codes.flatten(-2))
        self.scales.index_copy_(0, slots, scales.squeeze(-1))

    def floats(self) -> torch.Tensor:
        """The numbers (slots, Hkv, D) float32. They stay turned."""
        blocks = self.codes.unflatten(-1, (-1, PACKED_BLOCK)).float()
        return (blocks * self.scales.float().unsqueeze(-1)).flatten(-2)


PACKED = {"q8_0": PackedKv}  # the types of KV_BLOCKS in pages.py that are no floats
