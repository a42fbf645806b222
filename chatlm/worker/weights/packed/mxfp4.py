"""`Mxfp4`: the experts of a gpt-oss folder, as a GGUF file would have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy


class Mxfp4:
    """A safetensors file's experts (experts, rows, columns) presented as a GGUF tensor of type MXFP4.

    `blocks` (experts, rows, columns / 32, 16) holds the codes of two adjacent columns in each byte, where
    GGUF has columns i and i + 16; `scales` (experts, rows, columns / 32) are exponents + 127."""

    tensor_type = SimpleNamespace(name="MXFP4")

    def __init__(self, blocks: numpy.ndarray, scales: numpy.ndarray):
        self.blocks = blocks
        self.scales = scales
        self.shape = *scales.shape[:2], 32 * scales.shape[2]

    def __getitem__(self, index) -> Mxfp4:
        return Mxfp4(self.blocks[index], self.scales[index])

    @property
    def data(self) -> numpy.ndarray:
        """(experts * rows, columns / 32 * 17) uint8: for each block its scale, then the codes."""
        made: Any = numpy.empty((*self.scales.shape, 17), numpy.uint8)
        made[..., 0] = self.scales
        for blocks, to in zip(self.blocks, made):  # one expert at a time avoids large temporaries
            first = blocks[..., :8]   # columns 0 to 15
            second = blocks[..., 8:]  # columns 16 to 31
            to[..., 1::2] = first & 15 | second << 4
            to[..., 2::2] = first >> 4 | second & 240
        return made.reshape(-1, made.shape[2] * 17)
