"""The ops of CudaBackend in torch. Its kernels are compared with these, and they replace a kernel that
fails."""

from __future__ import annotations


import torch

from chatlm.worker.kernels.cuda_packed_kv import PackedPages, gathered, packed, turned
from chatlm.worker.ops.attention import attend
from chatlm.worker.ops.references import REFERENCES

# most elements of K and V that are gathered at once, and most scores computed at once
SCRATCH = 1 << 26


def mask_of(lengths: torch.Tensor, positions: torch.Tensor, window: int, dtype: torch.dtype) -> torch.Tensor:
    """(n, S): 0 where a row of this length (n,) sees a position (S,), through `window` if it is not 0, and
    -inf elsewhere.

    A row of length 0 sees the first position, so that none has only -inf."""
    ends = lengths[:, None].clamp(min=1)
    hidden = positions >= ends
    if window:
        hidden |= positions < ends - window
    return torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, -torch.inf)


class CudaReferences:
    """The ops over the same cache, with the same padding as the kernels.

    Nothing here waits for the device, so a graph may capture it too.
    """

    def rope_append(self, qkv, cos, sin, positions, slots, cache, out, **options) -> None:
        """As CudaBackend.rope_append, but qkv (T, (H + 2 Hkv) * D) is overwritten."""
        _, _, Hkv, page_size, D = cache.shape
        order = torch.arange(len(slots), device=slots.device)
        rows = torch.empty(len(slots), 2, Hkv, D, dtype=cache.dtype, device=slots.device)
        REFERENCES["rope_append"](qkv, cos, sin, positions, order, rows, out, **options)
        out.mul_(D**-0.5)
        kept = [(cache, rows)]
        if isinstance(cache, PackedPages):
            heads = out.view(len(slots), -1, D)
            heads.copy_(turned(heads))
            kept = list(zip(cache, packed(rows)))
        # padding (slot -1) writes what another row writes; if all rows are padding, it writes back what is
        # there
        source = torch.where(slots < 0, slots.argmax(), order)
        slots = slots[source]
        pages = slots.clamp(min=0) // page_size
        offsets = slots.clamp(min=0) % page_size
        written = (slots >= 0)[:, None, None, None]
        for memory, values in kept:
            before = memory[:, pages, :, offsets]                                            # (T, 2, Hkv, D)
            memory[:, pages, :, offsets] = torch.where(written, values[source], before)

    def attend(self, q, cache, table, lengths, out, window: int, softcap=0.0, sinks=None) -> None:
        """Decode rows: q (N, H, D) float32, scaled -> out (N, H * D). Rows of length 0 get some finite
        values.

        The table may have any ids after a sequence's own pages.
        """
        _, num_pages, Hkv, page_size, D = cache.shape
        keys = torch.arange(table.shape[1] * page_size, device=q.device)            # (S,)
        sinks = sinks if sinks is None else sinks.view(Hkv, -1)
        step = max(1, SCRATCH // (2 * Hkv * D * len(keys)))
        for first in range(0, len(q), step):
            some = slice(first, first + step)
            mask = mask_of(lengths[some], keys, window, cache.dtype)                # (n, S)
            pages = table[some].clamp(0, num_pages - 1).flatten()
            kv = gathered(cache, pages)                                             # (2, Hkv, n * W, 16, D)
            k, v = kv.view(2, Hkv, len(mask), -1, D).transpose(1, 2)                # (n, Hkv, S, D) each
            grouped = q[some].to(cache.dtype).unflatten(1, (Hkv, -1))               # (n, Hkv, H / Hkv, D)
            y = attend(grouped, k, v, mask[:, None, None], 1.0, softcap, sinks)
            out[some].view(y.shape).copy_(turned(y) if isinstance(cache, PackedPages) else y)
