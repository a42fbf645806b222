"""Weights as GGUF files pack them: blocks, values, and the order of rotary pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy

from chatlm.common.errors import require_library
from chatlm.worker.arrays.kinds import Bits, as_kind, bits_of, empty, floats, of_kind


class Block(NamedTuple):
    """A block of a packed type in a GGUF file: codes, and the scale by which they are multiplied."""

    bytes: int
    scale_bytes: int = 2  # 2: a float16; 4: with a minimum after it; 1: an exponent; 0: none can be infinite
    scale: int = 0        # offset of the scale in the block
    wide: bool = False    # the scale is a float32


BLOCKS = {
    "q4_0": Block(18), "q4_1": Block(20, 4), "q5_0": Block(22), "q5_1": Block(24, 4), "q8_0": Block(34),
    "q4_k": Block(144, 4), "q5_k": Block(176, 4), "q6_k": Block(210, 2, 208), "iq4_nl": Block(18),
    "iq4_xs": Block(136), "mxfp4": Block(17, 1), "u4_g32": Block(19), "u4_g128": Block(67),
    "q2_k": Block(84, 4, 80), "q3_k": Block(110, 2, 108),
    "iq3_s": Block(110), "iq3_xxs": Block(98), "iq2_s": Block(82), "iq2_xs": Block(74), "iq2_xxs": Block(66),
    "iq1_s": Block(50), "iq1_m": Block(56, 2, 53), "tq1_0": Block(54, 2, 52), "tq2_0": Block(66, 2, 64),
    "nvfp4": Block(36, 0), "q1_0": Block(18), "q2_0": Block(18), "q2_0_g128": Block(34),
    "i8_row": Block(260, 4, wide=True)}
MXFP4_DOUBLED = numpy.array(
    (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), numpy.float32)
# Bits of a code, of types that the gguf package cannot unpack
FEW_BITS = {"Q1_0": 1, "Q2_0": 2, "Q2_0_G128": 2}
DEQUANTIZE_ELEMENTS = 1 << 19  # at a time: they fit in the cache, and no second copy of a matrix is needed


class RopePairs(NamedTuple):
    """Rows of heads of `head_size`, where the first `rotated` rows of each are pairs (0, 1), (2, 3), .."""

    head_size: int
    rotated: int


def unpermute_rope(rows: numpy.ndarray, pairs: RopePairs | None) -> numpy.ndarray:
    """Reorder the rows of each head: pairs become (0, rotated / 2), .., and the other rows stay in place."""
    if not pairs:
        return rows
    order = numpy.arange(pairs.head_size)
    order[:pairs.rotated] = order[:pairs.rotated].reshape(-1, 2).T.ravel()
    return rows.reshape(-1, pairs.head_size, *rows.shape[1:])[:, order].reshape(rows.shape)


def joined_nibbles(codes: numpy.ndarray) -> numpy.ndarray:
    """Codes (n, K) as bytes (n, K / 2). Of each 32 columns, the low nibbles have the first 16."""
    words = numpy.ascontiguousarray(codes).view(numpy.uint64).reshape(len(codes), -1, 4)  # 8 codes at once
    made = numpy.empty((*words.shape[:2], 2), numpy.uint64)
    for i in range(2):
        made[..., i] = words[..., i] | words[..., i + 2] << 4
    return made.view(numpy.uint8).reshape(len(codes), -1)


def powers_of_two(exponents: numpy.ndarray) -> numpy.ndarray:
    """2^(e - 128) of MXFP4's uint8 exponents, float32, half of what they mean; of 255 NaN."""
    power = exponents.astype(numpy.uint32)
    bits = numpy.where(power < 2, numpy.uint32(1 << 21) << power, power - 1 << 23)
    bits[power == 255] = 0x7FC00000  # the gguf package returns 2^127
    return bits.astype(numpy.uint32).view(numpy.float32)


def dequantize(gguf_type, data: numpy.ndarray) -> numpy.ndarray:
    """The values of some rows of the data of a tensor of `formats.gguf.header`.

    Float types stay as they are. All others become float32."""
    if gguf_type.name in ("F32", "F16", "BF16"):
        return of_kind(data, "bfloat16") if gguf_type.name == "BF16" and not isinstance(data, Bits) else data
    if gguf_type.name.startswith("U4_"):
        return dequantize_u4(data.reshape(-1, BLOCKS[gguf_type.name.lower()].bytes))
    if gguf_type.name == "I8_ROW":
        scales, codes = parts_of_i8(data)
        return (codes * scales).reshape(-1, 256)
    if gguf_type.name in FEW_BITS:
        blocks = data.reshape(-1, BLOCKS[gguf_type.name.lower()].bytes)
        return dequantize_few_bits(blocks, FEW_BITS[gguf_type.name])
    if gguf_type.name not in ("MXFP4", "Q8_0", "Q4_0", "Q4_1"):
        return require_library("gguf", "packed weights").dequantize(data, gguf_type)
    blocks = data.reshape(-1, BLOCKS[gguf_type.name.lower()].bytes)
    if gguf_type.name != "MXFP4":
        scale, minimum = numpy.split(floats(blocks[:, :4].copy().view(numpy.float16)), 2, 1)  # (B, 1) each
        if gguf_type.name == "Q8_0":
            return blocks[:, 2:].view(numpy.int8) * scale
        packed = blocks[:, -16:]
        values = numpy.hstack((packed & 15, packed >> 4)).astype(numpy.float32)               # (B, 32)
        return values * scale + minimum if gguf_type.name == "Q4_1" else (values - 8) * scale
    codes = numpy.hstack((blocks[:, 1:] & 15, blocks[:, 1:] >> 4))
    return MXFP4_DOUBLED[codes] * powers_of_two(blocks[:, :1])


def dequantize_u4(blocks: numpy.ndarray) -> numpy.ndarray:
    """scale * (code - zero) of blocks (B, 3 + 16 n): a float16, a byte, and nibbles of n * 32 columns."""
    scale = floats(blocks[:, :2].copy().view(numpy.float16))
    packed = blocks[:, 3:].reshape(len(blocks), -1, 16)
    codes = numpy.concatenate((packed & 15, packed >> 4), axis=2).reshape(len(blocks), -1)
    return (codes.astype(numpy.float32) - blocks[:, 2:3]) * scale


def parts_of_i8(data: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The scales (B, 1) float32 and the codes (B, 256) int8 of blocks of I8_ROW."""
    blocks = data.reshape(-1, BLOCKS["i8_row"].bytes)
    return blocks[:, :4].copy().view(numpy.float32), blocks[:, 4:].view(numpy.int8)


def i8_as_q8_0(rows: numpy.ndarray) -> numpy.ndarray | None:
    """Rows of I8_ROW as rows of Q8_0 with the same codes. Scales become float16, which rounds them by at most
    2^-11; None if one is too large or too small for that."""
    scales, codes = parts_of_i8(rows)
    halves = as_kind(scales, "float16")
    size = numpy.abs(scales)
    if not (((size >= 2.0**-14) & (size < 65_504)) | (size == 0) | (floats(halves) == scales)).all():
        return None
    made = numpy.empty((len(codes), 8, BLOCKS["q8_0"].bytes), numpy.uint8)
    made[..., :2] = halves.view(numpy.uint8)[:, None]
    made[..., 2:] = codes.view(numpy.uint8).reshape(len(codes), 8, 32)
    return made.reshape(len(rows), -1)


def dequantize_few_bits(blocks: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Values of blocks (B, 2 + bytes of codes): a float16, and codes from the low end of each byte.

    Of 2 bits: scale * (code - 1). Of 1 bit: scale where it is set, -scale where it is not."""
    scale = floats(blocks[:, :2].copy().view(numpy.float16))
    if bits == 1:
        codes = 2 * numpy.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    else:
        shifts = numpy.arange(0, 8, 2, dtype=numpy.uint8)
        codes = (blocks[:, 2:, None] >> shifts & 3).reshape(len(blocks), -1)
    return (codes.astype(numpy.float32) - 1) * scale


def dequantized(shape: tuple[int, ...], parts: Seq[tuple[Any, RopePairs | None]], kind: str) -> numpy.ndarray:
    """Stack parts, each (tensor, pairs to reorder or None), into one matrix of the float type `kind`.

    The values have the bits of gguf.dequantize, rounded to the type."""
    out = empty(shape, kind)
    row = 0
    step = max(1, DEQUANTIZE_ELEMENTS // math.prod(shape[1:]))
    for tensor, pairs in parts:
        data = unpermute_rope(numpy.asarray(tensor.data), pairs)
        for begin in range(0, len(data), step):
            chunk = data[begin:begin + step]
            values = dequantize(tensor.tensor_type, chunk).reshape(len(chunk), *shape[1:])
            bits_of(out)[row:row + len(chunk)] = bits_of(as_kind(values, kind))
            row += len(chunk)
    return out
