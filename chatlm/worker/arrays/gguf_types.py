"""The types of tensors in GGUF files: their numbers, and the sizes of their blocks.

They are those of the `gguf` package. The package itself is imported only to unpack rare types, because that
takes 25 ms."""

from __future__ import annotations

# name -> (number, weights in a block, bytes of a block)
ROWS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 40), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136), "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "F64": (28, 1, 8), "IQ1_M": (29, 256, 56), "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18)}
WITHOUT_VALUES = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}  # nothing here dequantizes them

# Types that the package does not have yet. Q2_0's number has two layouts: llama.cpp's with a scale for 64
# weights, and that of PrismML's fork until June 2026, for 128. `gguf_layouts.py` tells them apart
NEWER = {"Q2_0": (42, 64, 18), "Q2_0_G128": (42, 128, 34)}
OF_FILES = ROWS | NEWER

# Types of old files: the rows of another type, mixed for one kind of CPU. Today programs mix rows at load
REPACKED = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
            36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}

# Types of forks of llama.cpp, which nothing here reads
OF_FORKS = {142: "PQ2_0 of PrismML's fork of llama.cpp (IQ2_TN of ik_llama.cpp)",
            143: "PTQ1_0 of PrismML's fork of llama.cpp (IQ1_TN of ik_llama.cpp)"}
BITNET_TYPE = 36, "I2_S of Microsoft's fork of llama.cpp"  # the number is IQ4_NL_4_4's in other files


class GgufType(int):
    """The number of a type. The package accepts it as its own."""

    name = ""


# Types of tiles that no GGUF file has, but packed safetensors: 4-bit codes with a zero point, and bytes with
# a float32 scale for a row
OWN = {"U4_G32": (32, 19), "U4_G128": (128, 67), "I8_ROW": (256, 260)}


def named_type(name: str) -> GgufType:
    found = GgufType(-1 if name in OWN else OF_FILES[name][0])
    found.name = name
    return found


TYPES = {name: named_type(name) for name in (*ROWS, *NEWER, *OWN)}
NUMBERED = {int(TYPES[name]): TYPES[name] for name in (*ROWS, "Q2_0")}


def block_of(name: str) -> tuple[int, int]:
    """(weights, bytes) of a block of the type with this name."""
    return OWN.get(name) or OF_FILES[name][1:]
