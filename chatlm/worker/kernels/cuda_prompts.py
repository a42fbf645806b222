"""Attention of prompts on CUDA: torch computes it over keys and values that are gathered from the pages.

With a chunk of 2,048 tokens and a context of 131,072, a mask would have 268 million elements. So the fused
ways use none: varlen_attn is flash for half precision and knows windows; causal_lower_right serves where
there is no window. Everything else computes a bounded number of scores at a time, with a mask for these
alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, TYPE_CHECKING

import torch

from chatlm.worker.kernels.cuda_references import SCRATCH
from chatlm.worker.ops.attention import attend_prompt

if TYPE_CHECKING:
    from chatlm.worker.model.batch import Batch

HALVES = (torch.float16, torch.bfloat16)
# causal(rows, keys) holds no mask. It is imported when it is first used, because it brings torch's compiler:
# three seconds
causal = functools.lru_cache(64)(lambda rows, keys: import_module("torch.nn.attention.bias").
                                 causal_lower_right(rows, keys))


class Prompt(NamedTuple):
    """The new tokens of a sequence, and where their keys are."""

    rows: slice         # of the T rows
    pages: Any          # (n,) int32 page ids
    first: int          # position of the first key of those pages
    start: int          # position of the first new token
    end: int            # position after the last new token, and so the number of keys of the sequence


def prompts_of(batch: Batch, first: int, table: torch.Tensor, window: int, page_size: int) -> list[Prompt]:
    """A Prompt for each sequence from number `first` on. With a window it has only the pages that the window
    overlaps."""
    prompts = []
    for i in range(first, len(batch.lengths)):
        rows = slice(batch.starts[i], batch.starts[i + 1])
        end = batch.lengths[i]
        start = end - (rows.stop - rows.start)
        page = max(0, start + 1 - window) // page_size if window else 0
        prompts.append(Prompt(rows, table[i, page:-(-end // page_size)], page * page_size, start, end))
    return prompts


def flash() -> Callable | None:
    """torch's varlen_attn; None where torch has none, or one without the options that are used here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if options <= inspect.signature(varlen_attn).parameters.keys() else None


class PromptAttention:
    """softmax(q k) v of one prompt.

    fused       False once a proof has failed: then neither fused way is used
    varlen      varlen_attn; None where torch lacks it, and on a CPU, which has no such kernel"""

    def __init__(self, device: Any):
        self.fused = True
        self.varlen = flash() if torch.device(device).type == "cuda" else None

    def attend(self, q, kv, prompt: Prompt, out, window: int, softcap=0.0, sinks=None) -> None:
        """q (t, H, D) in the cache's type, scaled -> out (t, H * D).

        kv          (2, Hkv, S, D): keys and values from position prompt.first on
        sinks       None, or (Hkv, H / Hkv)
        """
        plain = self.fused and not softcap and sinks is None
        if plain and self.varlen and q.dtype in HALVES:
            out.copy_(self.by_varlen(q, kv, window).flatten(1))
        elif plain and not window:
            self.by_parts(q, kv, out, lambda some: causal(len(q), kv.shape[2]), len(q))
        else:
            step = max(1, SCRATCH // (q.shape[1] * kv.shape[2]))
            self.by_parts(q, kv, out, lambda some: self.mask(prompt, some, window, q), step, softcap, sinks)

    def by_varlen(self, q, kv, window: int):
        """Attend by flash, which counts only the keys before a token's own: our window w is its (w - 1,
        0)."""
        k, v = kv.transpose(1, 2)                                               # (S, Hkv, D) each
        ends = [torch.arange(0, len(x) + 1, len(x), dtype=torch.int32, device=x.device) for x in (q, k)]
        return self.varlen(  # pyright: ignore[reportOptionalCall]  `attend` has looked
            q, k, v, *ends, len(q), len(k), scale=1.0, window_size=(window - 1, 0) if window else (-1, 0),
                           enable_gqa=q.shape[1] != k.shape[1])

    def by_parts(self, q, kv, out, mask_of, step: int, softcap=0.0, sinks=None) -> None:
        grouped = q.unflatten(1, (kv.shape[1], -1))                             # (t, Hkv, H / Hkv, D)
        for begin in range(0, len(q), step):
            some = slice(begin, min(begin + step, len(q)))
            y = attend_prompt(grouped[some], kv[0], kv[1], mask_of(some), 1.0, softcap, sinks)
            out[some].view(y.shape).copy_(y)

    @staticmethod
    def mask(prompt: Prompt, some: slice, window: int, like):
        """The additive mask (1, 1, queries, S) of some of the new tokens."""
        integers: dict[str, Any] = dict(dtype=torch.int32, device=like.device)
        keys = torch.arange(prompt.first, prompt.end, **integers)
        queries = torch.arange(prompt.start + some.start, prompt.start + some.stop, **integers)
        age = queries[:, None] - keys                   # of each key, for each query; below 0: it comes later
        hidden = age < 0
        if window:
            hidden |= age >= window
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill_(hidden, -torch.inf)[None, None]
