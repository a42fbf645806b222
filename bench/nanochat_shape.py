"""Decode and prefill speed of a nanochat-shaped model with random weights, in one process: bfloat16 tiles, q8_0, q4_0.

    python bench/nanochat_shape.py [--depth 12] [--threads 2] [--rounds 5]

Speed does not depend on the weights' values, so they are random. Only the engine runs, without HTTP; settings
alternate; figures are medians. Upstream's own engine gives 38 tok/s for d12 in float32 on two virtual Zen 5 CPUs.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.core import kernels_line
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.kernels import load_kernels
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.model_of import model_of
from chatlm.worker.weights.nanochat import nanochat_spec
from chatlm.worker.weights.recipe import ModelSpec

KINDS = {"bfloat16": None, "q8_0": "q8_0", "q4_0": "q4_0"}


def shape(depth: int) -> ModelSpec:
    """Generation 5 of nanochat at a depth: width 64 * depth, heads of 128, vocabulary 32,768."""
    width = 64 * depth
    config = dict(vocab_size=32768, n_layer=depth, n_head=width // 128, n_kv_head=width // 128, n_embd=width, sequence_len=2048,
                  window_pattern="L", short_seq_len=None)
    return replace(nanochat_spec(config, 5, softcap=15.0), max_positions=2048)


def build(spec: ModelSpec, quantize: str | None) -> Transformer:
    random = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(size, generator=random).mul_(0.02).numpy() for name, size in model_of(spec).shapes().items()}
    kernels = load_kernels("cpu", model_of(spec), max_tokens=264, max_rows=8, quantize=quantize)
    return Transformer(model_of(spec), tensors, kernels, num_pages=130, max_tokens=264, max_rows=8, dtype="bfloat16")


def batch(length: int, new: int) -> Batch:
    ids = [(7 * i) % 32768 for i in range(length)]
    return Batch(ids[length - new:], [ids[length - new - 1] if length > new else -1, *ids[length - new:-1]], [0, new], [length],
                 [list(range(-(-length // PAGE_SIZE)))], [new - 1])


def decode_speed(model: Transformer, tokens: int = 64, context: int = 256) -> float:
    """tok/s of one answer at about `context` tokens."""
    began = time.perf_counter()
    for i in range(tokens):
        model.forward(batch(context + i, 1))
    return tokens / (time.perf_counter() - began)


def first_token_ms(model: Transformer, prompt: int = 256) -> float:
    began = time.perf_counter()
    model.forward(batch(prompt, prompt))
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = shape(arguments.depth)
    models = {kind: build(spec, quantize) for kind, quantize in KINDS.items()}
    parameters = sum(torch.Size(size).numel() for size in model_of(spec).shapes().values())
    print(f"d{arguments.depth}: {parameters / 1e6:.0f} M parameters, {arguments.threads} threads, {kernels_line()}")
    speeds, firsts = {kind: [] for kind in models}, {kind: [] for kind in models}
    for _ in range(arguments.rounds + 1):
        for kind, model in models.items():
            speeds[kind].append(decode_speed(model))
            firsts[kind].append(first_token_ms(model))
    for kind in models:
        print(f"{kind}: {statistics.median(speeds[kind][1:]):.0f} tok/s at context 256, "
              f"first token of 256 {statistics.median(firsts[kind][1:]):.0f} ms")


if __name__ == "__main__":
    main()
