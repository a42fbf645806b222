"""Reference ops: rotary embedding and attention over paged keys and values.

A layer's KV cache is (P * PAGE_SIZE, 2, Hkv, D): the keys and values of a slot are adjacent. If their widths
differ, it is a pair of keys (P * PAGE_SIZE, Hkv, D) and values (P * PAGE_SIZE, Hkv, Dv). If they are packed,
it is a pair of PackedKv."""

from __future__ import annotations

import itertools
import math
import operator
import threading
from typing import Any, NamedTuple

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.ops.packed_kv import PackedKv, turned


def rope_append_reference(qkv, cos, sin, positions, slots, cache, out, *, norm="none", q_norm=None,
                          k_norm=None, eps=1e-5, post_scale=1.0, q_scale=1.0, value_embed=None, gate=None,
                          gate_scale=1.0, value_norm=False):
    """All work between the qkv product and attention: q -> out (T, H * D), k and v -> the cache at `slots`.

    qkv         (T, H * D + Hkv * (D + Dv)), which is overwritten. Without columns for v, v is what k is
                before its norm. Without columns for k and v, nothing goes into the cache of another layer
    norm        when q and k get norms: "before_rope", "after_rope" or "none"; with q_norm and k_norm (D,)
    cos, sin    tables by which q and k turn, at the rows `positions` (T,)
    post_scale  a factor of q and k after that; q_scale another factor of q
    value_norm  does v get a norm, without weights?
    gate        (T, Hkv), and value_embed (T, Hkv * Dv), or None: gate_scale * sigmoid(gate) * value_embed is
                added to v"""
    keys, values = slots_of(cache)
    Hkv, D = keys.shape[1:]
    Dv = values.shape[2]
    T = len(qkv)
    queries = out.shape[1]
    H = queries // D
    appends = qkv.shape[1] > queries
    # (T, 1, rot / 2) each
    cos, sin = (torch.index_select(table, 0, positions).unsqueeze(1) for table in (cos, sin))
    heads = qkv[:, :queries + Hkv * D * appends].unflatten(1, (-1, D))  # (T, H + Hkv, D), or (T, H, D)
    qk = heads.float()
    v = qkv[:, queries + Hkv * D:]                                      # (T, Hkv * Dv), or no columns
    if appends:
        if not v.shape[1]:
            v = qkv[:, queries:].clone()
        v = v.unflatten(1, (Hkv, Dv))
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
    """(keys (slots, Hkv, D), values (slots, Hkv, Dv)) of a layer's cache."""
    return cache if isinstance(cache, tuple) else cache.unbind(1)


def keys_and_values(cache, pages, count: int, dtype):
    """The keys and values in some pages of each of `count` sequences, as `dtype`.

    They are (count, Hkv, S, D) and (count, Hkv, S, Dv). Packed ones stay turned."""
    def in_pages(part):
        return torch.index_select(part.unflatten(0, (-1, PAGE_SIZE)), 0, pages).flatten(0, 1)

    parts = []
    for part in cache if isinstance(cache, tuple) else (cache,):
        if isinstance(part, PackedKv):
            rows = PackedKv(in_pages(part.codes), in_pages(part.scales)).floats()
        else:
            rows = in_pages(part)
        parts.append(rows.to(dtype).view(count, -1, *rows.shape[1:]))
    k, v = parts if len(parts) == 2 else parts[0].unbind(2)
    return k.transpose(1, 2), v.transpose(1, 2)


def mean_squares_reference(qkv, q_norm, k_norm, sizes, out):
    """The sum of the squares of q, and of k, of each row of qkv (T, (H + 2 Hkv) * D), over `sizes` -> out.

    The two are the first columns of out. `sizes` are the widths of q and k in all ranks together. Each rank
    has some of the heads, with their part of the weights, so the sums over all ranks are the means."""
    parts = qkv[:, :len(q_norm)], qkv[:, len(q_norm):len(q_norm) + len(k_norm)]
    for column, (part, size) in enumerate(zip(parts, sizes)):
        out[:, column] = part.float().square().sum(1) / size


def norm_qk_reference(qkv, q_norm, k_norm, means, eps, out):
    """RMS norm of q, and of k, of each row of qkv, over all heads -> out, which may be qkv.

    means: what mean_squares gives, summed over the ranks."""
    out.copy_(qkv)
    parts = out[:, :len(q_norm)], out[:, len(q_norm):len(q_norm) + len(k_norm)]
    for part, weight, mean in zip(parts, (q_norm, k_norm), means.unbind(1)):
        part.copy_(part.float() * torch.rsqrt(mean + eps).unsqueeze(1) * weight)


def norm_heads_reference(qkv, q_norm, k_norm, head_size, eps, out, count=0):
    """LayerNorm of each head of q, and of k, of each row of qkv -> out, which may be qkv.

    q_norm (H * D) and k_norm (Hkv * D) have each head's own weights. With `count` only the first `count`
    columns of a head count, and the others become zeros."""
    weights = torch.cat([q_norm, k_norm])
    heads = qkv[:, :len(weights)].float().unflatten(1, (-1, head_size))  # (T, H + Hkv, D)
    own = heads[..., :count or head_size]
    normed = torch.zeros_like(heads)
    normed[..., :own.shape[-1]] = torch.nn.functional.layer_norm(own, own.shape[-1:], eps=eps)
    out.copy_(qkv)
    out[:, :len(weights)].copy_(normed.flatten(1) * weights)


def scale_rows_reference(x, scales, positions, out):
    """Each row of x (T, C) times the scale of its position -> out. scales (max_positions,)."""
    torch.mul(x, scales[positions].unsqueeze(1), out=out)


def norm_heads(qk, H, q_norm, k_norm, eps):
    """RMS norm of each head of qk (T, H + Hkv, D). q and k have weights of their own, or none."""
    qk = torch.nn.functional.rms_norm(qk, qk.shape[-1:], None, eps)
    if q_norm is not None:
        qk[:, :H] *= q_norm
    if k_norm is not None:
        qk[:, H:] *= k_norm
    return qk


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + rot / 2]) of x (T, heads, D) in place. cos, sin (T, 1, rot / 2)."""
    half = cos.shape[-1]
    a = x[..., :half]
    b = x[..., half:2 * half]
    x[..., :2 * half] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


SCRATCH_SCORES = 1 << 22  # most scores of a prompt's chunk that are computed at once


class Span(NamedTuple):
    """Some query rows, and where their keys are: B decode rows, or one chunk of a prompt (B = 1)."""

    rows: slice  # of the T rows
    pages: Any   # (B * n,) page ids, n for each of the B
    mask: Any    # (B, 1, queries, S), additive, for the first S keys of these pages


def decode_rows(batch) -> int:
    """How many sequences at the beginning of the batch have exactly one new token: all that do."""
    for i, (start, end) in enumerate(itertools.pairwise(batch.starts)):
        if end - start != 1:
            return i
    return len(batch.lengths)


def page_table(batch, dtype, device):
    """(N, W) page ids of each sequence. Ids after a sequence's own pages are not read, or masked."""
    width = max(map(len, batch.tables))
    return torch.tensor([pages + [0] * (width - len(pages)) for pages in batch.tables],
                        dtype=dtype, device=device)


def plan_attention_reference(batch, positions, windows, dtype) -> dict:
    """The pages and masks that attention needs in all layers, computed once a step: {window: [Span, ...]}.

    If the batch has an `ahead`, {~window: [Span, ...]} are those of two-sided layers."""
    decode = decode_rows(batch)
    table = page_table(batch, torch.int64, positions.device)
    groups = [range(i, i + 1) for i in range(decode, len(batch.lengths))]
    if decode:
        groups.insert(0, range(decode))
    ahead = torch.tensor(batch.ahead, device=positions.device) if batch.ahead else None
    plan = {}
    for window in set(windows):
        plan[window] = [make_span(batch, positions, table, group, window, dtype) for group in groups]
        if ahead is not None:
            plan[~window] = [make_span(batch, positions, table, group, window, dtype, ahead)
                             for group in groups]
    return plan


def make_span(batch, positions, table, group, window, dtype, ahead=None) -> Span:
    """The Span of the sequences `group`: decode rows, or one sequence with any number of new tokens.

    ahead: None, or (T,) as in Batch. This never waits for the device."""
    rows = slice(batch.starts[group.start], batch.starts[group.stop])
    count = (rows.stop - rows.start) // len(group)  # new tokens of each sequence
    lengths = batch.lengths[group.start:group.stop]
    # with a window, only the pages that it overlaps
    first = max(0, min(lengths) - count + 1 - window) // PAGE_SIZE if window else 0
    last = -(-max(lengths) // PAGE_SIZE)
    keys = torch.arange(first * PAGE_SIZE, max(lengths), device=positions.device)  # (S,) positions
    age = positions[rows].view(len(group), 1, count, 1) - keys  # below 0: the key comes later
    hidden = age < 0
    if ahead is not None:
        hidden &= keys >= ahead[rows].view(len(group), 1, count, 1)
    if window:
        hidden |= age >= window
    mask = torch.zeros(hidden.shape, dtype=getattr(torch, dtype), device=keys.device)
    mask.masked_fill_(hidden, -math.inf)
    return Span(rows, table[group.start:group.stop, first:last].flatten(), mask)


def paged_attention_reference(q, cache, plan, window, out, softcap=0.0, sinks=None, two_sided=False):
    """softmax(q k / sqrt(D)) v of each row over the pages of its sequence: q (T, H * D) -> out (T, H * Dv).

    cache       of one layer. Queries of packed latents are turned already
    softcap     c > 0: scores become c * tanh(scores / c)
    sinks       None, or (H): one more score for each query head, whose value is 0
    two_sided   rows also see later positions, as the batch's `ahead` says

    Keys are never repeated in memory. Query heads that share a kv head are rows of one product in decode, and
    broadcast over its keys in prefill."""
    keys, _ = slots_of(cache)
    Hkv, D = keys.shape[1:]
    packed = isinstance(keys, PackedKv)
    q = q.unflatten(1, (-1, D))  # (T, H, D)
    scale = D**-0.5
    if isinstance(keys, PackedKv) and not keys.parts:
        q = turned(q)
    if sinks is not None:
        sinks = sinks.view(Hkv, -1)
    spans = plan.get(~window, plan[window]) if two_sided else plan[window]
    for rows, pages, mask in spans:
        S = mask.shape[-1]
        k, v = (part[:, :, :S] for part in keys_and_values(cache, pages, len(mask), mask.dtype))
        if isinstance(cache, tuple) and len(mask) > 1:  # in padding, bytes of another type may be NaN
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
    """softmax(q k / sqrt(D) + distances) v of each row over the positions of its text -> out (T, H * Dv).

    q, cache    as in paged_attention_reference
    window      positions farther away are not seen; 0: all are
    distances   None, or (H, 2 * reach): a score gets the number at reach + (the key's position - the row's)

    The plan is for rows that see only what is before them. Its masks are not used: each sequence is a whole
    text, and only its rows and pages count."""
    D = slots_of(cache)[0].shape[2]
    out = out.unflatten(1, (q.shape[1] // D, -1))  # (T, H, Dv)
    q = q.unflatten(1, (-1, D))                    # (T, H, D)
    for rows, pages, causal in plan[window]:
        count = len(causal)  # texts of one token, or one text
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
    """torch's scaled_dot_product_attention, with a cap of scores if softcap is not 0.

    sinks: None, or more scores whose value is 0. They have no last axis, and broadcast over the others."""
    if not softcap and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = product(q * (scale / (softcap or 1)), k.transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores)
    scores = scores + mask
    y = product(torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype), v)
    return y if sinks is None else y * kept_share(scores, sinks).unsqueeze(-1).to(y.dtype)


def kept_share(scores, sinks):
    """The share of each row that sinks leave to its values: s / (s + exp(sinks)), s = sum(exp(scores))."""
    return torch.sigmoid(torch.logsumexp(scores.float(), -1) - sinks)


def attend_prompt(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """Attend for rows of one sequence: q (t, Hkv, G, D), k and v (Hkv, S, D) -> (t, Hkv, G, D).

    mask: (1, 1, t, S). sinks: None, or (Hkv, G)."""
    q = q.permute(1, 2, 0, 3)
    if not softcap and sinks is None:  # with a stride of 0, all query heads of a kv head share its keys
        k, v = (x.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if sinks is not None:
        sinks = sinks.unsqueeze(-1)
    return attend(q, k, v, mask, scale, softcap, sinks, shared_product).permute(2, 0, 1, 3)


def shared_product(x, shared):
    """x (Hkv, G, t, I) @ shared (Hkv, I, O) -> (Hkv, G, t, O). `@` would copy an expanded matrix G times."""
    return (x.flatten(1, 2) @ shared).unflatten(1, x.shape[1:3])


scratch_of_thread = threading.local()


def scores_scratch(dtype, size):
    """Memory for `size` scores. Every step of a thread uses the same, so that its pages stay mapped."""
    scores = getattr(scratch_of_thread, "scores", None)
    if scores is None or scores.dtype != dtype or len(scores) != size:
        scores = scratch_of_thread.scores = torch.empty(size, dtype=dtype)
    return scores


def attend_chunk(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """attend_prompt for a CPU: two products for each kv head.

    Scores have the dtype of the cache and go to scratch memory. A pass takes as many queries as fit there.
    This is 2.5 to 3 times as fast as torch's fused attention (256 queries over 256 to 7168 keys, bfloat16, 2
    threads), but only in memory that is mapped already: to map fresh pages takes longer than the products."""
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
