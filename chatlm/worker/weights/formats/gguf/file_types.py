"""What a GGUF file's quantization is called where it is read and where it is written: Q4_K_M, for example,
which has tensors of several types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.worker.weights.formats.gguf.header import GgufTensor

# llama.cpp's numbers in general.file_type
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0"}
NUMBERS = {name: number for number, name in FILE_TYPES.items()}


def quantization_of(metadata: Mapping[str, Any], tensors: Iterable[GgufTensor]) -> str:
    """As the file says, or else the type of most of its weights. In a small model this may not be the type of
    the name: where rows are no multiple of 256, Q4_K_M has mostly Q5_0."""
    number = metadata.get("general.file_type")
    if isinstance(number, int) and number in FILE_TYPES:
        return FILE_TYPES[number]
    weights = Counter()
    for tensor in tensors:
        weights[tensor.tensor_type.name] += tensor.n_elements
    return weights.most_common(1)[0][0] if weights else ""
