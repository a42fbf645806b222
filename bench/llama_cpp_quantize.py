"""llama.cpp's own quantize, from any libllama.so: python bench/llama_cpp_quantize.py LIBRARY SOURCE TARGET TYPE

The library need not be compiled: npm's package @node-llama-cpp/linux-x64 has one, and the ggml libraries beside it.
Only the first fields of the parameters are named, which all releases share; the library fills the others.
"""

import ctypes
import sys
from pathlib import Path

# llama_ftype of llama.h: the types that need no importance
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
         "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq3_s": 26,
         "iq3_m": 27, "iq4_xs": 30, "bf16": 32, "mxfp4_moe": 38}


class Parameters(ctypes.Structure):
    """llama_model_quantize_params, and room for what later releases append."""

    _fields_ = [("threads", ctypes.c_int32), ("kind", ctypes.c_int), ("output_kind", ctypes.c_int),
                ("embedding_kind", ctypes.c_int), ("requantize", ctypes.c_bool), ("rest", ctypes.c_ubyte * 239)]


def quantize(library: str, source: str, target: str, kind: str):
    for name in ("libggml-base.so", "libggml.so", "libggml.*.so"):
        for path in Path(library).parent.glob(name):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters))
    llama.llama_backend_init()
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.kind, parameters.requantize = 2, TYPES[kind], True
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        sys.exit(f"llama.cpp did not quantize {source} to {kind}")


if __name__ == "__main__":
    quantize(*sys.argv[1:])
