"""What rounding x costs before a product of quantized weights: the KL from float32's next tokens on the default model's own weights.

    python bench/rounding_of_x.py [MODEL] [--chunks 3]

Only x is rounded, in every product, by torch, in the ways that csrc/cpu/tiles/tiles.h describes and in that of other engines:
blocks, 32 columns with a scale and outliers with 16 bits; steps, 256 columns with a step and outliers of two bytes;
blocks without 16 bits; and a scale for 256 columns alone, as llama.cpp's Q8_K has it.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import quality    # noqa: E402
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402

FINE_ABOVE = 1.5        # as tiles.h


def in_blocks(blocks, two):
    """(T, K / 32, 32) -> the same, rounded; two (T, K / 32): which have 16 bits."""
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    exact = blocks / scale
    rest = ((exact - exact.round()) * 256).round().clamp(-127, 127) * two[..., None]
    return (exact.round() + rest / 256) * scale


def in_steps(blocks, two):
    """As in_blocks."""
    rounded, size = torch.empty_like(blocks), blocks.abs().amax(-1)
    for first in range(0, blocks.shape[1], 8):
        part = slice(first, first + 8)
        above = torch.where(two[:, part], size[:, part], 0).amax(1) / 256
        step = (torch.maximum(torch.where(two[:, part], 0, size[:, part]).amax(1), above) / 127).clamp_min(1e-30)[:, None, None]
        whole = (blocks[:, part] / step).round()
        high = (whole / 256).round() * two[:, part, None]
        rounded[:, part] = (torch.where(two[:, part, None], (whole - 256 * high).clamp(-127, 127), whole) + 256 * high) * step
    return rounded


def outliers(blocks):
    size = blocks.abs().amax(-1)
    return size > FINE_ABOVE * size.mean(1, keepdim=True)


WAYS = {"blocks": (in_blocks, outliers), "steps": (in_steps, outliers),
        "blocks of one byte": (in_blocks, lambda blocks: torch.zeros(blocks.shape[:2], dtype=torch.bool)),
        "256 columns of one byte": (in_steps, lambda blocks: torch.zeros(blocks.shape[:2], dtype=torch.bool))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a GGUF file (default: the server's default model)")
    parser.add_argument("--chunks", type=int, default=3, help="of 512 tokens each")
    arguments = parser.parse_args()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in quality.DOCUMENTS)
    exact_linear = torch.nn.functional.linear
    with torch.inference_mode():
        ours = quality.Ours(arguments.model or str(fetch_default_model()), [], 32)
        pieces = quality.cut(ours.engine.tokenizer, text, arguments.chunks)
        judge = quality.on_own_weights(ours.engine.transformer)
        exact = [judge.logprobs(i, piece) for i, piece in enumerate(pieces)]
        for name, (rounded, two_of) in WAYS.items():
            def linear(x, weight, bias=None):
                blocks = x.float().reshape(len(x), -1, 32)
                return exact_linear(rounded(blocks, two_of(blocks)).reshape(x.shape).to(x.dtype), weight, bias)     # noqa: B023
            torch.nn.functional.linear = linear
            found = torch.cat([(p.exp() * (p - judge.logprobs(i, piece))).sum(1) for i, (p, piece) in enumerate(zip(exact, pieces))])
            torch.nn.functional.linear = exact_linear
            print(f"{name}: mean KL {found.mean():.1e} +- {found.std() / len(found)**.5:.0e}", flush=True)


if __name__ == "__main__":
    main()
