"""Reference ops: rotary embedding and attention over paged keys and values.

A layer's KV cache is (P * PAGE_SIZE, 2, Hkv, D): a slot's keys and values are adjacent. If they
differ in width, it is a pair, of keys (P * PAGE_SIZE, Hkv, D) and values (P * PAGE_SIZE, Hkv, Dv); where they
are packed, a pair of PackedKv."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any, NamedTuple

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.ops.packed_kv import PackedKv, turned


def rope_append_reference(qkv, cos, sin, positions, slots, cache, out, *, norm="none", q_norm=None,
                          k_norm=None, eps=1e-5, post_scale=1.0, q_scale=1.0, value_embed=None, gate=None,
                          gate_scale=1.0, value_norm=False):
    """All work between the qkv product and attention: q -> out (T, H * D), k and v -> the cache.

    qkv (T, H * D + Hkv * (D + Dv)) is overwritten. Without the columns of v, v is made from k's; without
    those of k and v, nothing goes into the cache, which is another layer's. q and k are normalized
    (`norm` says when: "before_rope", "after_rope", or "none"), rotated by the rows `positions` (T,) of cos
    and sin, and scaled, q also by `q_scale`. v is normalized without weights if `value_norm`.
    `gate_scale * sigmoid(gate) * value_embed` is added to v; gate is (T, Hkv), value_embed (T, Hkv * Dv). k
    and v then go into one layer's `cache` at `slots` (T,)."""
    keys, values = slots_of(cache)
    (Hkv, D), Dv = keys.shape[1:], values.shape[2]
    T = len(qkv)
    queries = out.shape[1]
    H = queries // D
    appends = qkv.shape[1] > queries
    # (T, 1, rot / 2) each
    cos, sin = (torch.index_select(table, 0, positions).unsqueeze(1) for table in (cos, sin))
    heads = qkv[:, :queries + Hkv * D * appends].unflatten(1, (-1, D))
    # (T, H + Hkv, D), (T, Hkv * Dv)
    qk = heads.float()
    v = qkv[:, queries + Hkv * D:]
    if appends:
        v = (v if v.shape[1] else qkv[:, queries:].clone()).unflatten(1, (Hkv, Dv))
    if value_norm and appends:
        v.copy_(torch.nn.functional.rms_norm(v.float(), (Dv,), None, eps))
    if norm == "before_rope":
        qk = norm_heads(qk, H, q_norm, k_norm, eps)
    rotate(qk, cos, sin)
    if norm == "after_rope":
        qk = norm_heads(qk, H, q_norm, k_norm, eps)
    heads.copy_(qk * post_scale)
    if value_embed is not None and gate is not None:
        strength = gate_scale * torch.sigmoid(gate.float()).unsqueeze(-1)  # (T, Hkv, 1)
        v += strength * value_embed.view(T, Hkv, Dv)
    out.copy_(qkv[:, :queries])
    if q_scale != 1:
        out.mul_(q_scale)
    if appends:
        for part, rows in ((keys, heads[:, H:]), (values, v)):
            if isinstance(part, PackedKv):
                part.put(slots, rows)
            else:
                part.index_copy_(0, slots, rows.to(part.dtype))


def slots_of(cache) -> tuple[torch.Tensor | PackedKv, torch.Tensor | PackedKv]:
    """A layer's keys (slots, Hkv, D) and values (slots, Hkv, Dv)."""
    return cache if isinstance(cache, tuple) else cache.unbind(1)


def keys_and_values(cache, pages, count: int, dtype):
    """The keys and values in some pages of each of `count` sequences, (count, Hkv, S, D) and
    (count, Hkv, S, Dv), as `dtype`; packed ones stay turned."""
    def taken(part):
        return torch.index_select(part.unflatten(0, (-1, PAGE_SIZE)), 0, pages).flatten(0, 1)

    parts = [PackedKv(*map(taken, part)).floats() if isinstance(part, PackedKv) else taken(part)
             for part in (cache if isinstance(cache, tuple) else (cache,))]
    parts = [part.to(dtype).view(count, -1, *part.shape[1:]) for part in parts]
    k, v = parts if len(parts) == 2 else parts[0].unbind(2)
    return k.transpose(1, 2), v.transpose(1, 2)


def mean_squares_reference(qkv, q_norm, k_norm, sizes, out):
    """The squares of all q and of all k of each row of qkv (T, (H + 2 Hkv) * D), over `sizes` -> the
    first two columns of out.

    `sizes` are the whole widths (H * D, Hkv * D) of all ranks; each rank has some of the heads and their part
    of the weights, so the sums over all ranks are the means."""
    parts = qkv[:, :len(q_norm)], qkv[:, len(q_norm):len(q_norm) + len(k_norm)]
    for column, (part, size) in enumerate(zip(parts, sizes)):
        out[:, column] = part.float().square().sum(1) / size


def norm_qk_reference(qkv, q_norm, k_norm, means, eps, out):
    """RMS norm of all q of each row of qkv, and of all k -> out, which may be qkv; means as above."""
    out.copy_(qkv)
    parts = out[:, :len(q_norm)], out[:, len(q_norm):len(q_norm) + len(k_norm)]
    for part, weight, mean in zip(parts, (q_norm, k_norm), means.unbind(1)):
        part.copy_(part.float() * torch.rsqrt(mean + eps).unsqueeze(1) * weight)


def scale_rows_reference(x, scales, positions, out):
    """Each row of x (T, C) times the scale of its position, of scales (max_positions,)."""
    torch.mul(x, scales[positions].unsqueeze(1), out=out)


def norm_heads(qk, H, q_norm, k_norm, eps):
    """RMS norm of each head (T, heads, D); q and k have their own weights, or none."""
    qk = torch.nn.functional.rms_norm(qk, qk.shape[-1:], None, eps)
    if q_norm is not None:
        qk[:, :H] *= q_norm
    if k_norm is not None:
        qk[:, H:] *= k_norm
    return qk


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + rot / 2]) of x (T, heads, D) in place; cos, sin (T, 1, rot / 2)."""
    half = cos.shape[-1]
    a = x[..., :half]
    b = x[..., half:2 * half]
    x[..., :2 * half] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


SCRATCH_SCORES = 1 << 22  # attention scores of a prompt chunk computed at once


class Span(NamedTuple):
    """Some query rows and where their keys are: B decode rows together, or one chunk of a prompt (B = 1)."""

    rows: slice  # of the T rows
    pages: Any   # page ids (B * n,), the same number n for each of the B
    mask: Any    # additive (B, 1, queries, S): the first S keys of those pages are read


def decode_rows(batch) -> int:
    """How many sequences have exactly one new token; the batch lists them first."""
    return next((i for i, (start, end) in enumerate(itertools.pairwise(batch.starts)) if end - start != 1),
                len(batch.lengths))


def page_table(batch, dtype, device):
    """(N, W) page ids of each sequence; ids past a sequence's own pages are never read, or are masked."""
    width = max(map(len, batch.tables))
    return torch.tensor([pages + [0] * (width - len(pages)) for pages in batch.tables],
                        dtype=dtype, device=device)


def plan_attention_reference(batch, positions, windows, dtype) -> dict:
    """Work out once per step which pages and masks attention needs in all layers: {window: [Span, ...]}, and
    where the batch has an `ahead` {~window: [Span, ...]} for layers that are two-sided."""
    decode = decode_rows(batch)
    table = page_table(batch, torch.int64, positions.device)
    groups = [range(i, i + 1) for i in range(decode, len(batch.lengths))]
    if decode:
        groups.insert(0, range(decode))
    made = {window: [make_span(batch, positions, table, group, window, dtype) for group in groups]
            for window in set(windows)}
    ahead = torch.tensor(batch.ahead, device=positions.device) if batch.ahead else None
    return made | {~window: [make_span(batch, positions, table, group, window, dtype, ahead)
                             for group in groups] for window in made if ahead is not None}


def make_span(batch, positions, table, group, window, dtype, ahead=None) -> Span:
    """The Span of the sequences `group`: decode rows, or one sequence with any number of new tokens. ahead
    (T,): as in Batch.

    Never waits for the device."""
    rows = slice(batch.starts[group.start], batch.starts[group.stop])
    count = (rows.stop - rows.start) // len(group)  # new tokens per sequence
    lengths = batch.lengths[group.start:group.stop]
    # with a window, read only the pages it overlaps
    first = max(0, min(lengths) - count + 1 - window) // PAGE_SIZE if window else 0
    last = -(-max(lengths) // PAGE_SIZE)
    keys = torch.arange(first * PAGE_SIZE, max(lengths), device=positions.device)  # (S,) positions
    age = positions[rows].view(len(group), 1, count, 1) - keys  # < 0: future
    hidden = age < 0
    if ahead is not None:
        hidden &= keys >= ahead[rows].view(len(group), 1, count, 1)
    if window:
        hidden |= age >= window
    mask = torch.zeros(hidden.shape, dtype=getattr(torch, dtype), device=keys.device)
    mask.masked_fill_(hidden, -math.inf)
    return Span(rows, table[group.start:group.stop, first:last].flatten(), mask)


def paged_attention_reference(q, cache, plan, window, out, softcap=0.0, sinks=None, two_sided=False):
    """softmax(q k / sqrt(D)) v over each row's own pages: q (T, H * D), one layer's cache -> out (T, H * Dv).
    `two_sided`: rows see what the batch's `ahead` says, too.

    With a `softcap` c, scores become c * tanh(scores / c). `sinks` (H) are more scores, one for each query
    head, whose value is 0. Keys are never repeated in memory: query heads that share a kv head are rows of
    one product in decode, and broadcast over its keys in prefill."""
    keys, _ = slots_of(cache)
    (Hkv, D), packed = keys.shape[1:], isinstance(keys, PackedKv)
    # (T, H, D)
    q = q.unflatten(1, (-1, D))
    scale = D**-0.5
    q = turned(q) if packed else q
    sinks = sinks if sinks is None else sinks.view(Hkv, -1)
    for rows, pages, mask in plan.get(~window, plan[window]) if two_sided else plan[window]:
        k, v = (part[:, :, :mask.shape[-1]] for part in keys_and_values(cache, pages, len(mask), mask.dtype))
        if isinstance(cache, tuple) and len(mask) > 1:  # another type's bytes in padding may be NaN
            unseen = torch.isneginf(mask).all(2).unsqueeze(-1)
            k = k.masked_fill(unseen, 0.0)
            v = v.masked_fill(unseen, 0.0)
        grouped = q[rows].to(k.dtype).unflatten(1, (Hkv, -1))    # (rows, Hkv, H / Hkv, D)
        if len(grouped) == len(mask):
            y = attend(grouped, k, v, mask, scale, softcap, sinks)
        elif q.device.type == "cpu":
            y = attend_chunk(grouped, k[0], v[0], mask, scale, softcap, sinks)
        else:
            y = attend_prompt(grouped, k[0], v[0], mask, scale, softcap, sinks)
        out[rows].view(y.shape).copy_(turned(y) if packed else y)


def text_attention_reference(q, cache, plan, window, out, distances=None):
    """softmax(q k / sqrt(D) + distances) v of each row over all positions of its text, or those up to
    `window` away from it.

    q, cache and out as in paged_attention_reference. `distances` (H, 2 * reach) are added to the scores of
    each head, at reach + (the key's position - the row's). Of the plan, which is for rows that see what is
    before them, only rows and pages count: each sequence is a whole text."""
    D = slots_of(cache)[0].shape[2]
    q, out = q.unflatten(1, (-1, D)), out.unflatten(1, (q.shape[1] // D, -1))  # (T, H, D)
    for rows, pages, causal in plan[window]:
        # texts of one token, or one text
        count = len(causal)
        S = causal.shape[-1]
        positions = torch.arange(S, device=q.device)
        # (count, Hkv, S, D) each
        k, v = (part[:, :, :S] for part in keys_and_values(cache, pages, count, q.dtype))
        for h, i in itertools.product(range(q.shape[1]), range(count)):
            kv = h // (q.shape[1] // k.shape[1])
            first = rows.start + i * S
            for block in positions.split(max(1, SCRATCH_SCORES // S)):
                distance = positions - block[:, None]  # (rows, S)
                scores = q[first + block, h] @ k[i, kv].T * D**-0.5
                if distances is not None:
                    scores += distances[h, distance + distances.shape[1] // 2]
                if window:
                    scores.masked_fill_(distance.abs() > window, -math.inf)
                out[first + block, h] = (torch.softmax(scores, -1) @ v[i, kv]).to(out.dtype)


def attend(q, k, v, mask, scale, softcap, sinks=None, product=operator.matmul):
    """torch's scaled_dot_product_attention, whose scores are capped if softcap is not 0.

    `sinks`: more scores, broadcast over all but the last axis of the others; their value is 0."""
    if not softcap and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = product(q * (scale / (softcap or 1)), k.transpose(-1, -2))
    scores = (softcap * torch.tanh(scores) if softcap else scores) + mask
    y = product(torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype), v)
    return y if sinks is None else y * kept_share(scores, sinks).unsqueeze(-1).to(y.dtype)


def kept_share(scores, sinks):
    """The values' share of each row of scores: the sum of exp(scores) / (that sum + exp(sinks))."""
    return torch.sigmoid(torch.logsumexp(scores.float(), -1) - sinks)


def attend_prompt(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """Rows of one sequence: q (t, Hkv, G, D), k and v (Hkv, S, D), mask (1, 1, t, S) -> (t, Hkv, G, D).

    sinks: (Hkv, G) or None."""
    q = q.permute(1, 2, 0, 3)
    if not softcap and sinks is None:  # with a stride of 0 all query heads of a kv head share its keys
        k, v = (x.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    sinks = sinks if sinks is None else sinks.unsqueeze(-1)
    return attend(q, k, v, mask, scale, softcap, sinks, shared_product).permute(2, 0, 1, 3)


def shared_product(x, shared):
    """x (Hkv, G, t, I) @ shared (Hkv, I, O) -> (Hkv, G, t, O); `@` of an expanded one copies it G times."""
    return (x.flatten(1, 2) @ shared).unflatten(1, x.shape[1:3])


@functools.lru_cache(maxsize=1)
def scores_scratch(dtype, size):
    """Memory for `size` attention scores, reused by every step so that its pages stay mapped."""
    return torch.empty(size, dtype=dtype)


def attend_chunk(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """attend_prompt on CPU, with two products per kv head.

    The scores have the cache's dtype and go to scratch memory; one pass takes as many queries as fit there.
    This is 2.5 to 3 times faster than torch's fused attention (256 queries over 256 to 7168 keys, bfloat16,
    2 threads), but only in memory already mapped: faulting in fresh pages takes longer than the products."""
    T, Hkv, G, D = q.shape
    S = k.shape[1]
    y = q.new_empty(T, Hkv, G, v.shape[-1])
    step = max(1, SCRATCH_SCORES // (G * S))
    scratch = scores_scratch(q.dtype, max(SCRATCH_SCORES, G * S))
    for h in range(Hkv):
        for first in range(0, T, step):
            block = slice(first, first + step)
            queries = q[block, h] * (scale / (softcap or 1))
            queries = queries.transpose(0, 1).reshape(-1, D)                                  # (G * t, D)
            scores = torch.mm(queries, k[h].t(), out=scratch[:len(queries) * S].view(-1, S))  # (G * t, S)
            if softcap:
                scores.tanh_().mul_(softcap)
            scores.view(G, -1, S).add_(mask[0, :, block])
            kept = None if sinks is None else kept_share(scores.view(G, -1, S), sinks[h, :, None])
            torch.softmax(scores, -1, out=scores)
            values = torch.mm(scores, v[h]).view(G, -1, v.shape[-1])
            y[block, h] = (values if kept is None else values * kept.unsqueeze(-1)).transpose(0, 1)
    return y
