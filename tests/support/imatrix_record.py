"""A tiny mixture of experts, and what llama-imatrix says of it: what chatlm.export.gguf.measure must find too.

`python tests/support/imatrix_record.py llama-imatrix` records it anew with llama.cpp's own program."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RECORD = Path(__file__).parents[1] / "fixtures" / "llama_imatrix_mixture.gguf"
TEXT = "It was the best of times, it was the worst of times, and 1859 was near. " * 20
CHUNK = 64
EXPERTS = 4
WIDTH = 64
FFN = 32
NUMBERS = {"llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": WIDTH,
           "llama.feed_forward_length": FFN, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
           "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
           "llama.expert_count": EXPERTS, "llama.expert_used_count": 2}


def write_mixture(path, seed=5, same_experts=False):
    """A mixtral of two layers in float32."""
    from tiny_gguf import llama_shapes, small_gguf_metadata, write_gguf
    dice = np.random.default_rng(seed)
    shapes = llama_shapes(len(small_gguf_metadata("gpt-2")["tokenizer.ggml.tokens"]), NUMBERS)
    for layer in range(NUMBERS["llama.block_count"]):
        own = f"blk.{layer}.ffn_"
        rows = {part: shapes.pop(f"{own}{part}.weight") for part in ("gate", "up", "down")}
        shapes |= {f"{own}{part}_exps.weight": (EXPERTS, *shape) for part, shape in rows.items()}
        shapes[f"{own}gate_inp.weight"] = EXPERTS, WIDTH
    tensors = {name: (dice.standard_normal(shape) / 6).astype(np.float32) for name, shape in shapes.items()}
    if same_experts:
        for name, tensor in tensors.items():
            if "_exps" in name:
                tensor[:] = tensor[0]
    return write_gguf(path, tensors, NUMBERS), tensors


def record(program):
    with tempfile.TemporaryDirectory() as folder:
        write_mixture(Path(folder, "mixture.gguf"))
        Path(folder, "text.txt").write_text(TEXT)
        subprocess.run([program, "-m", "mixture.gguf", "-f", "text.txt", "-o", str(RECORD), "-c", str(CHUNK),
                        "-b", str(CHUNK), "-ngl", "0", "--no-ppl"], cwd=folder, check=True,
                       env=os.environ | {"LD_LIBRARY_PATH": str(Path(program).parent)})


if __name__ == "__main__":
    record(sys.argv[1])
