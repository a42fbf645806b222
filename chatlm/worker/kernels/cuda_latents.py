"""Latent attention (MLA) on CUDA: csrc/cuda/latents.cu and latent_attention.cu. A prompt's attention is
torch's, over the same pages.

A layer's cache is (P, PAGE_SIZE, D): for each token one key, which all heads share, and whose first numbers
are its value. Pages of the type q8_0 are LatentPages; over them torch computes what reads or writes pages.
`absorb` scales queries by 1 / sqrt(D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TYPE_CHECKING

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.cuda_packed_kv import codes_of, floats_of, turned
from chatlm.worker.kernels.cuda_prompts import PromptAttention
from chatlm.worker.kernels.cuda_references import SCRATCH, mask_of
from chatlm.worker.kernels.cuda_weights import PackedMatrix, parts_of
from chatlm.worker.ops.attention import attend
from chatlm.worker.ops.references import REFERENCES
from chatlm.worker.ops.tensors import zeroed

if TYPE_CHECKING:
    from chatlm.worker.kernels.cuda_prompts import Prompt
    from chatlm.worker.model.blocks.mla import Mla
    from chatlm.worker.model.blocks.model import Model

# Up to so many rows, products by head are a kernel, which reads the weights again for every 8 rows; more are
# one product of torch.
# Reckoned, not measured.
FEW_ROWS = 64
WIDE_SCORES = torch.__version__ >= (2, 8)  # pyright: ignore[reportOperatorIssue]  since when torch.mm takes an out_dtype on CUDA


def latents_of(model: Model) -> Any:
    """How the layers of a model attend to latents; None if they do not."""
    attn = next((attn for attn in model.by_layer if attn), None)
    return attn if getattr(attn, "values_in_keys", False) else None


class LatentPages(NamedTuple):
    """A layer's cache in 8 bits, in place of a tensor (P, PAGE_SIZE, D). Values and what follows them are
    turned apart."""

    codes: torch.Tensor     # (P, PAGE_SIZE, D) int8
    scales: torch.Tensor    # (P, PAGE_SIZE, D / 32) float16
    kept: int               # numbers of a value

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type in which torch attends."""
        return torch.float32

    @classmethod
    def within(cls, memory: torch.Tensor, shape: tuple[int, ...], kept: int) -> LatentPages:
        """Pages in the bytes of `memory`: all codes, then all scales."""
        codes, scales = memory.split([count := torch.Size(shape).numel(), len(memory) - count])
        return cls(codes.view(torch.int8).view(shape), scales.view(torch.float16).view(*shape[:-1], -1), kept)

    def turned(self, rows: torch.Tensor) -> torch.Tensor:
        """Keys or their queries (.., D) times the Hadamard matrices of the two parts."""
        parts = rows.split([self.kept, rows.shape[-1] - self.kept], -1)
        return torch.cat([turned(part) for part in parts], -1)


def gathered(cache: torch.Tensor | LatentPages, pages: torch.Tensor) -> torch.Tensor:
    """The keys in some pages (n,) of a cache -> (n * PAGE_SIZE, D). Packed ones become float32 and stay
    turned."""
    if not isinstance(cache, LatentPages):
        return torch.index_select(cache, 0, pages).flatten(0, 1)
    codes, scales = (torch.index_select(part, 0, pages).flatten(0, 1).float() for part in cache[:2])
    return floats_of(codes, scales)


class LatentReferences:
    """The ops in torch, over the same caches and with the same padding. They replace a kernel that fails, and
    compute pages of q8_0.

    Nothing here waits for the device, so a graph may capture it too."""

    def __init__(self, floats: Callable[[Any], torch.Tensor]):
        self.floats = floats

    def append_latents(self, x, weight, eps, cos, sin, positions, slots, cache, adjacent=False) -> None:
        T, D = x.shape
        order = torch.arange(T, device=x.device)
        rows = torch.empty(T, 1, D, device=x.device)
        REFERENCES["append_latents"](x, weight, eps, cos, sin, positions, order, (rows, rows),
                                                 adjacent)
        kept = [(cache, rows[:, 0])]
        if isinstance(cache, LatentPages):
            kept = list(zip((cache.codes, cache.scales), codes_of(cache.turned(rows[:, 0]))))
        # padding (slot -1) writes what another row writes; if all rows are padding, it writes back what is
        # there
        source = torch.where(slots < 0, slots.argmax(), order)
        slots = slots[source]
        places = slots.clamp(min=0)
        for memory, values in kept:
            flat = memory.view(-1, memory.shape[-1])
            written = (slots >= 0)[:, None]
            flat[places] = torch.where(written, values[source].to(flat.dtype), flat[places])

    def absorb(self, x, k_up, cos, sin, positions, scale, cache, out, adjacent=False) -> None:
        D = cache.shape[-1]
        REFERENCES["absorb"](x, self.floats(k_up), cos, sin, positions, scale * D**-0.5,
                                         (out, out), out, adjacent)
        if isinstance(cache, LatentPages):
            heads = out.unflatten(1, (-1, D))
            heads.copy_(cache.turned(heads))

    def by_head(self, x, up, out) -> None:
        REFERENCES["by_head"](x, self.floats(up), out)

    def attend(self, q, cache, table, lengths, out, window: int = 0) -> None:
        """Decode rows: q (N, H, D) float32, scaled -> out (N, H * Dv). Rows of length 0 get some finite
        values."""
        P, size, D = cache.shape
        H = q.shape[1]
        Dv = out.shape[1] // H
        places = torch.arange(table.shape[1] * size, device=q.device)               # (S,)
        step = max(1, SCRATCH // (D * len(places)))
        for first in range(0, len(q), step):
            some = slice(first, first + step)
            mask = mask_of(lengths[some], places, window, cache.dtype)
            keys = gathered(cache, table[some].clamp(0, P - 1).flatten()).view(len(mask), 1, -1, D)
            grouped = q[some, None].to(keys.dtype)                                  # (n, 1, H, D)
            y = attend(grouped, keys, keys[..., :Dv], mask[:, None, None], 1.0, 0.0)
            out[some].view(y.shape).copy_(turned(y) if isinstance(cache, LatentPages) else y)


class LatentOps:
    """The ops of latent attention of a model, with the interface of their references. `kernels` is a
    cuda.CudaOps.

    faults      CudaBackend.faults: the ops named there are computed by torch"""

    def __init__(self, attn: Mla, kernels: cuda.CudaOps, stream: Callable[[], int],
                 faults: Mapping[str, str], device: Any):
        self.attn = attn
        self.kernels = kernels
        self.stream = stream
        self.faults = faults
        self.packed = False                     # are the pages of q8_0?
        self.wide_scores = WIDE_SCORES and torch.device(device).type == "cuda"
        self.references = LatentReferences(self.floats)

    @property
    def few_rows_invariant(self) -> bool:
        """Do kernels of ours compute all of it for few rows, each row by itself?"""
        attn = self.attn
        # eight columns at once
        loaded = (attn.plain, attn.kept, attn.query_width, attn.heads * attn.head_values)
        return not self.packed and not any(size % 8 for size in loaded) and attn.turned % 4 == 0

    def make_cache(self, model, layout, num_pages, device) -> tuple[Any, list[Any]]:
        """As CudaBackend.make_cache."""
        layers = layout.size // max(layout.own, 1)
        shape = num_pages, PAGE_SIZE, self.attn.head_size
        dtype = next(filter(None, layout.types), "bfloat16")
        self.packed = dtype == "q8_0"
        if self.packed:
            memory = zeroed((layers, num_pages * PAGE_SIZE * layout.own), torch.uint8,
                                        device)
            parts = [LatentPages.within(own, shape, self.attn.value_size) for own in memory]
        else:
            memory = parts = zeroed((layers, *shape), getattr(torch, dtype), device)
        return memory, [
            attends and parts[offset // layout.own] for attends, offset in zip(model.by_layer, layout.offset)
        ]

    def workspace(self, rows: int, width: int) -> tuple[int, int]:
        return cuda.latent_workspace(rows, self.attn.heads, self.attn.value_size, width)

    def append_latents(self, x, weight, eps, cos, sin, positions, slots, cache, adjacent=False) -> None:
        """As its reference, but rows with slot -1 (padding) are left alone."""
        if isinstance(cache, LatentPages) or "append_latents" in self.faults:
            return self.references.append_latents(x, weight, eps, cos, sin, positions, slots, cache, adjacent)
        self.kernels.append_latents(x, weight, cos, sin, positions, slots, cache, eps=eps, adjacent=adjacent,
                                    stream=self.stream())

    def absorb(self, x, k_up, cos, sin, positions, scale, cache, out, adjacent=False) -> None:
        """As its reference, but out is scaled by 1 / sqrt(D) too."""
        if isinstance(cache, LatentPages) or "absorb" in self.faults:
            return self.references.absorb(x, k_up, cos, sin, positions, scale, cache, out, adjacent)
        plain = k_up.shape[1]
        D = cache.shape[-1]
        kept = D - 2 * cos.shape[1]
        factor = scale * D**-0.5
        options: dict[str, Any] = dict(kept=kept, plain=plain, scale=factor, adjacent=adjacent,
                                       stream=self.stream())
        if self.fits(x, k_up, plain + 2 * cos.shape[1]):
            [(kind, blocks)] = parts_of(k_up)
            return self.kernels.absorb(x, blocks, cos, sin, positions, out, kind=kind, **options)
        heads = x.unflatten(1, (-1, plain + 2 * cos.shape[1]))
        out.unflatten(1, (-1, D))[..., :kept].copy_(self.many(heads[..., :plain], k_up) * factor)
        self.kernels.absorb(x, None, cos, sin, positions, out, kind="float32", **options)

    def by_head(self, x, up, out) -> None:
        if "by_head" in self.faults:
            return self.references.by_head(x, up, out)
        if not self.fits(x, up, up.shape[1]):
            return out.copy_(self.many(x.unflatten(1, (-1, up.shape[1])), up).flatten(1))
        [(kind, blocks)] = parts_of(up)
        self.kernels.by_head(x, blocks, out, kind=kind, columns=up.shape[1], stream=self.stream())

    @staticmethod
    def fits(x, matrix: torch.Tensor | PackedMatrix, width: int) -> bool:
        """Does a kernel multiply heads of this width of x by this matrix?"""
        if len(x) > FEW_ROWS or x.dtype != torch.float32 or x.data_ptr() % 16 or width % 4:
            return False
        if isinstance(matrix, PackedMatrix):
            return len(matrix.parts) == 1
        return matrix.is_contiguous() and matrix.shape[1] % 8 == 0 and matrix.data_ptr() % 16 == 0

    def many(self, x, matrix) -> torch.Tensor:
        """x (T, H, K) times each head's matrix of (H * N, K), in the type of its floats -> (T, H, N)."""
        own = self.floats(matrix).unflatten(0, (x.shape[1], -1))
        return torch.bmm(x.to(own.dtype).transpose(0, 1), own.transpose(1, 2)).transpose(0, 1)

    def floats(self, matrix: torch.Tensor | PackedMatrix) -> torch.Tensor:
        """The matrix as floats: packed ones in bfloat16."""
        if not isinstance(matrix, PackedMatrix):
            return matrix
        rows = []
        for kind, blocks in matrix.parts:
            panel = torch.empty(len(blocks), matrix.shape[1], dtype=torch.bfloat16, device=blocks.device)
            self.kernels.dequantize(blocks, panel, kind=kind, stream=self.stream())
            rows.append(panel)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def paged_attention(self, q, cache, plan, window, out) -> None:
        """softmax(q k) v of each row over the pages of its sequence: q (T, H * D) float32, scaled -> out (T,
        H * Dv)."""
        heads = q.unflatten(1, (-1, cache.shape[-1]))                               # (T, H, D)
        if plan.decode:
            first = slice(plan.decode)
            self.attend(heads[first], cache, plan.table[first], plan.lengths[first], plan.states,
                        plan.tickets, out[first], window)
        for prompt in plan.prompts[window]:
            keys = gathered(cache, prompt.pages)[:prompt.end - prompt.first]
            self.attend_prompt(heads[prompt.rows].to(keys.dtype), keys, prompt, out[prompt.rows], window,
                               isinstance(cache, LatentPages))

    def attend(self, q, cache, table, lengths, states, tickets, out, window: int = 0) -> None:
        """Decode rows: q (N, H, D) float32, scaled -> out (N, H * Dv)."""
        if isinstance(cache, LatentPages) or "paged_attention" in self.faults:
            return self.references.attend(q, cache, table, lengths, out, window)
        self.kernels.latent_attention(q, cache, table, lengths, states, tickets, out, window=window,
                                      stream=self.stream())

    def attend_prompt(self, q, keys, prompt: Prompt, out, window: int = 0, packed: bool = False) -> None:
        """The new tokens of a sequence: q (t, H, D) in the type of keys (S, D), scaled -> out (t, H * Dv).

        torch's fused attention takes no heads of this size. So scores are computed for as many tokens as fit
        a bounded memory."""
        t, H, _ = q.shape
        S = len(keys)
        Dv = out.shape[1] // H
        step = max(1, SCRATCH // 4 // (H * S))              # there are several such arrays at once
        for begin in range(0, t, step):
            some = slice(begin, min(begin + step, t))
            scores = self.scores(q[some].flatten(0, 1), keys).view(-1, H, S)        # float32
            scores += PromptAttention.mask(prompt, some, window, scores)[0, 0][:, None]
            weights = torch.softmax(scores, -1).to(keys.dtype)
            y = (weights.flatten(0, 1) @ keys[:, :Dv]).view(-1, H, Dv)
            out[some].view(y.shape).copy_(turned(y) if packed else y)

    def scores(self, q, keys) -> torch.Tensor:
        """q (n, D) times keys (S, D) -> (n, S) float32, not rounded to a shorter type before."""
        if self.wide_scores and keys.dtype != torch.float32:
            return torch.mm(q, keys.T, out_dtype=torch.float32)
        return q.float() @ keys.float().T
