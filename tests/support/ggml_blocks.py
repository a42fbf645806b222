"""Rows of floats, and the bytes that ggml packs them into: what chatlm.export.gguf.packers must give.

`python tests/support/ggml_blocks.py libggml-base.so llama-quantize` records them anew with llama.cpp's own code."""

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy._core._multiarray_umath import __cpu_features__

RECORD = Path(__file__).parents[1] / "fixtures" / "ggml_blocks.json"
MIX_RECORD = Path(__file__).parents[1] / "fixtures" / "llama_quantize_types.json"
SEARCHED = "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
ON_GRID = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S".split()
NEED_IMPORTANCE = "IQ1_S IQ2_XXS IQ2_XS".split()     # ggml ends the program without it
UNSEARCHED = "MXFP4 TQ1_0 TQ2_0".split()


def cases():
    """(name, rows (R, 512) float32): usual weights, and what makes quantizers stumble."""
    random = np.random.default_rng(7)
    x = random.standard_normal((48, 512)).astype(np.float32)
    yield "usual", x * np.float32(0.02)
    if __cpu_features__["AVX512_SKX"]:  # with it, numpy's powers of float32 have other last bits: recorded so
        yield "heavy tails", x**3 * np.float32(0.01)
    odd = x.copy()
    odd[0] = 0
    odd[1, :256] = 0
    odd[2] *= 1e-9
    odd[3] *= 1e-20
    odd[4] = 1
    odd[5] = -1
    odd[6] = np.abs(odd[6])
    odd[7] = -np.abs(odd[7])
    odd[8] = x[8, 0]
    odd[9, ::2] = 0
    odd[10] *= 1e4
    yield "odd rows", odd
    yield "ties", np.rint(x * 3) / np.float32(4)
    yield "one row", x[:1] * np.float32(0.1)


def importance():
    """(512,): what imatrix files say of columns, some of which were never used."""
    found = np.random.default_rng(8).standard_normal(512).astype(np.float32)**2
    found[100:110] = 0
    found[300] = 1e4
    return found


def digest(blocks):
    return hashlib.sha256(np.ascontiguousarray(blocks).tobytes()).hexdigest()[:16]


def matrices_of(layers=33, width=256, kv=64, ffn=512, experts=0, tied=False, qkv=False):
    """name -> sizes, columns first, of a model like Llama's."""
    found = {"token_embd.weight": (width, 64), "output_norm.weight": (width,)}
    if not tied:
        found["output.weight"] = (width, 64)
    for layer in range(layers):
        own = {"attn_norm": (width,), "attn_output": (width, width), "ffn_norm": (width,)}
        own |= {"attn_qkv": (width, width + 2 * kv)} if qkv else {
            "attn_q": (width, width), "attn_k": (width, kv), "attn_v": (width, kv)}
        if experts:
            own |= {"ffn_gate_inp": (width, experts), "ffn_up_exps": (width, ffn, experts),
                    "ffn_gate_exps": (width, ffn, experts), "ffn_down_exps": (ffn, width, experts)}
        else:
            own |= {"ffn_up": (width, ffn), "ffn_gate": (width, ffn), "ffn_down": (ffn, width)}
        found |= {f"blk.{layer}.{name}.weight": sizes for name, sizes in own.items()}
    return found


# name -> (what matrices_of gets, heads, heads of keys)
MODELS = {"33 layers": (dict(), 4, 1), "tied": (dict(layers=20, tied=True, kv=256), 4, 4),
          "8 experts": (dict(layers=12, experts=8), 4, 2), "4 experts": (dict(layers=9, experts=4, kv=128), 4, 2),
          "no multiple of 256": (dict(layers=17, width=192, kv=64, ffn=512), 3, 1),
          "no multiple of 32": (dict(layers=9, width=48, kv=24, ffn=80, tied=True), 2, 1)}


def exceptions(types, main):
    """type -> the names of its tensors, of those of a model that have another than `main`, in a few words."""
    found = {}
    for name, kind in types.items():
        if kind not in (main, "F32"):
            layer, _, rest = name.removeprefix("blk.").partition(".")
            part = rest.removesuffix(".weight") if name.startswith("blk.") else name
            found.setdefault(kind, {}).setdefault(part, []).append(int(layer) if name.startswith("blk.") else 0)
    return {kind: {part: sorted(layers) for part, layers in sorted(parts.items())}
            for kind, parts in sorted(found.items())}


def oracle(library, kind, rows, weights):
    from chatlm.worker.arrays.gguf_types import TYPES, block_of
    ggml = ctypes.CDLL(library)
    ggml.ggml_quantize_init(int(TYPES[kind]))   # makes the grids
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                                         *[ctypes.c_int64] * 3, ctypes.c_void_p]
    block, size = block_of(kind)
    rows = np.ascontiguousarray(rows)
    out = np.zeros((len(rows), rows.shape[1] // block * size), np.uint8)
    ggml.ggml_quantize_chunk(int(TYPES[kind]), rows.ctypes.data, out.ctypes.data, 0, *rows.shape,
                             None if weights is None else weights.ctypes.data)
    return out


def theirs(program, path, kind, imatrix=None):
    """The types that llama-quantize would give a file's tensors."""
    words = [program, "--allow-requantize", "--dry-run"]
    if imatrix:
        words += ["--imatrix", str(imatrix)]
    done = subprocess.run([*words, str(path), kind], capture_output=True, text=True,
                          env=os.environ | {"LD_LIBRARY_PATH": str(Path(program).parent)})
    found = {}
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.match(r"\[\s*\d+/\s*\d+\]\s+(\S+)\s+-.*type =\s+(\S+), size.*?(\((\w+)\))?$", line):
            found[match[1]] = (match[4] or match[2]).upper()
    assert found, done.stderr[-500:]
    return found


def record(library, program):
    from chatlm.export.gguf.importance import Importance, SquareSums, write_importance
    from chatlm.export.gguf.mixes import MIXES
    from tiny_gguf import small_gguf_metadata
    import gguf
    blocks = {}
    for kind in (*SEARCHED, *ON_GRID, *UNSEARCHED):
        for name, rows in cases():
            if kind not in NEED_IMPORTANCE:
                blocks[f"{kind}, {name}"] = digest(oracle(library, kind, rows, None))
            if kind not in UNSEARCHED:
                blocks[f"{kind}, {name}, important"] = digest(oracle(library, kind, rows, importance()))
    RECORD.write_text(json.dumps(blocks, indent=0) + "\n")
    mixes = {}
    for name, (changes, heads, kv_heads) in MODELS.items():
        sizes = matrices_of(**changes)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            writer = gguf.GGUFWriter(path, "llama")
            layers = changes.get("layers", 33)
            experts = changes.get("experts", 0)
            for key, value in dict(context_length=64, block_count=layers, embedding_length=sizes["token_embd.weight"][0],
                                   feed_forward_length=512, head_count=heads, head_count_kv=kv_heads).items():
                getattr(writer, f"add_{key}")(value)
            writer.add_layer_norm_rms_eps(1e-5)
            if experts:
                writer.add_expert_count(experts)
                writer.add_expert_used_count(2)
            for tensor, shape in sizes.items():
                writer.add_tensor(tensor, np.ones(shape[::-1], np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            used = {tensor: SquareSums(np.ones((shape[2] if len(shape) > 2 else 1, shape[0]), np.float32), np.ones(shape[2] if len(shape) > 2 else 1, np.float32))
                    for tensor, shape in sizes.items() if len(shape) > 1}
            imatrix = Path(folder, "imatrix.gguf")
            write_importance(Importance(used, ("text",), 1, 512), imatrix)
            for kind, mix in MIXES.items():
                if not mix.needs_importance:
                    mixes.setdefault(name, {})[kind] = exceptions(theirs(program, path, kind), mix.main)
                mixes.setdefault(name, {})[f"{kind}, important"] = exceptions(
                    theirs(program, path, kind, imatrix), mix.main)
    text = json.dumps(mixes, separators=(",", ":"))
    MIX_RECORD.write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    record(*sys.argv[1:])
