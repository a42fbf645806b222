"""Random weights as model files have them, for proofs, timings and tests. It needs only numpy."""

from __future__ import annotations

import numpy

from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.tiles import COLUMNS
from chatlm.worker.kernels.weights import file_row_bytes

# kind -> (where in a block its float16 scale is, the factor that makes a minimum of it so that weights lie
# around 0). The minimum
# follows the scale. Kinds that are not named begin with the scale, and have no minimum
SCALES = {"q4_1": (0, -7.5), "q5_1": (0, -15.5), "q4_k": (0, 7.5), "q5_k": (0, 15.5), "q6_k": (208, 0),
          "q2_k": (80, 1.5), "q3_k": (108, 0), "tq1_0": (52, 0), "tq2_0": (64, 0)}


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0, scale: float = 0.01) -> numpy.ndarray:
    """Rows of random blocks as a GGUF file has them, (rows, bytes of a row) uint8. Scales are 1 to 2 times
    `scale`."""
    block = COLUMNS[kind]
    at, times = SCALES.get(kind, (0, 0))
    size = file_row_bytes(kind, block)
    dice = numpy.random.default_rng(seed)
    blocks = dice.integers(0, 256, (rows, columns // block, size), numpy.uint8)
    scales = dice.uniform(scale, 2 * scale, (*blocks.shape[:2], 1)).astype(numpy.float16)
    blocks[:, :, at:at + 2] = scales.view(numpy.uint8)
    if times:
        blocks[:, :, at + 2:at + 4] = (scales * numpy.float16(times)).view(numpy.uint8)
    if kind == "i8_row":
        blocks[:, :, :4] = scales[:, :1].astype(numpy.float32).view(numpy.uint8)        # one for a row
    if kind in cuda.OWN:                    # a zero point, which is one of the codes
        blocks[:, :, 2] %= 16
    if kind == "iq1_m":                     # the scale lies in four nibbles; the last of them is here
        blocks[:, :, 55] = blocks[:, :, 55] & 15 | 0x20
    if kind == "nvfp4":
        blocks[:, :, :4] = dice.integers(8, 24, (*blocks.shape[:2], 4))
    if kind == "mxfp4":                     # the scale is an exponent in the first byte
        blocks[:, :, 0] = dice.integers(118, 122, blocks.shape[:2])
    return blocks.reshape(rows, -1)
