"""Q1_0 and Q2_0 of GGUF files, a block at a time, as ggml's C code reads and packs them. The gguf package does neither."""

import gguf
import numpy

BITS = {"q1_0": 1, "q2_0": 2, "q2_0_g128": 2}
COLUMNS = {"q1_0": 128, "q2_0": 64, "q2_0_g128": 128}
NUMBERS = {"q1_0": 41, "q2_0": 42, "q2_0_g128": 42}     # GGUF's


def values_of(kind, rows):
    """The values (n, columns) float32 of blocks (n, bytes of a row) of any of GGUF's types."""
    if kind not in BITS:
        return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()])
    size = 2 + COLUMNS[kind] * BITS[kind] // 8
    values = [block_values(kind, block.tobytes()) for block in numpy.ascontiguousarray(rows).reshape(-1, size)]
    return numpy.array(values, numpy.float32).reshape(len(rows), -1)


def block_values(kind, block):
    [scale] = numpy.frombuffer(block[:2], "<f2").astype(numpy.float32)
    packed, bits = int.from_bytes(block[2:], "little"), BITS[kind]
    codes = numpy.array([packed >> bits * k & (1 << bits) - 1 for k in range(COLUMNS[kind])])
    meanings = numpy.array((-1, 1) if bits == 1 else (-1, 0, 1, 2), numpy.float32)
    return meanings[codes] * scale


def packed(kind, values):
    """The blocks (n, bytes of a row) nearest to these values (n, columns)."""
    blocks = values.reshape(-1, COLUMNS[kind])
    size = numpy.abs(blocks)
    scale = (size.mean(1, keepdims=True) if BITS[kind] == 1 else size.max(1, keepdims=True)).astype("<f2")
    if BITS[kind] == 1:
        codes = numpy.packbits(blocks >= 0, axis=1, bitorder="little")
    else:
        each = (numpy.rint(blocks / numpy.maximum(scale.astype(numpy.float32), 1e-12)) + 1).clip(0, 3).astype(numpy.uint8)
        codes = (each.reshape(len(blocks), -1, 4) << numpy.arange(0, 8, 2, dtype=numpy.uint8)).sum(-1, dtype=numpy.uint8)
    return numpy.hstack((scale.view(numpy.uint8), codes)).reshape(len(values), -1)
