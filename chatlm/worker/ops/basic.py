"""Reference ops: products, norms, activations, experts.

An op writes into the output that it is given. `X_reference` defines what a faster `X` must compute. It uses
torch, on any device, and numpy for sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.arrays.kinds import AdapterMatrix
from chatlm.worker.ops.packed_kv import PACKED
from chatlm.worker.ops.tensors import normed, zeroed


pausing: dict = {}  # the arguments of Backend.pause_while


def pause_reference():
    """Wait while answers are written. A model that embeds texts does so between its layers."""
    if pausing:
        pausing["lease"].wait(pausing["most_s"])


def embed_reference(table, ids, out, part=None):
    """Rows `ids` (T,) of table (V, C) -> out (T, C). A negative id gives row 0, which the caller ignores.

    part: None, or (first, V): the table has only the rows from `first` on, of V. Other ids give -0.0, which
    changes no sum, so the sum over ranks has the bits of the whole table's row."""
    ids = ids.clamp(min=0)
    if part is None:
        out.copy_(torch.index_select(table, 0, ids))
        return
    row = (ids - part[0]).clamp(0, len(table) - 1)
    out.copy_(torch.index_select(table, 0, row)).masked_fill_((row + part[0] != ids)[:, None], -0.0)


def gather_rows_reference(x, rows, out):
    """x (T, C), rows (R,) -> out (R, C)."""
    torch.index_select(x, 0, rows, out=out)


def rms_norm_reference(x, weight, eps, out):
    """x (T, C) float32 over its root mean square, times weight (C) or None -> out (T, C), in out's dtype."""
    out.copy_(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps))


def layer_norm_reference(x, weight, bias, eps, out, count=0):
    """(x (T, C) - mean) / sqrt(variance + eps) (* weight (C)) (+ bias (C)) -> out (T, C), which may be x.

    With `count` only the first `count` columns count, and the others of out become zeros."""
    own = slice(count or x.shape[1])
    weight, bias = (numbers if numbers is None else numbers[own] for numbers in (weight, bias))
    normed = torch.nn.functional.layer_norm(x[:, own], (own.stop,), weight, bias, eps)
    out[:, own].copy_(normed)
    out[:, own.stop:].zero_()


def pack_reference(name, *parts):
    """The matrix `name` (N, K), whose rows are those of all parts, in the layout that `linear` reads fastest.

    On x86 that is oneDNN's blocked layout: 2.4 times as fast as the plain one at one row (bfloat16, layers of
    SmolLM2-135M, 2 threads: 4.7 ms, not 11.1), and 1.2 times at 256 rows. `embed`, `experts` and the
    matrices of latents' heads need the plain layout.
    """
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    if name == "embed" or "expert" in name or name.endswith(("k_up", "v_up")) or weight.ndim != 2:
        return weight
    x86 = weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not (x86 and torch.backends.mkldnn.is_available() and mkldnn_takes(weight.dtype)):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def mkldnn_takes(dtype: torch.dtype) -> bool:
    """Does oneDNN support the type on this processor? Few support float16, and some not even bfloat16."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32 or mkldnn_bfloat16()


def mkldnn_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fastest_dtype(device) -> torch.dtype:
    """The dtype in which references run fastest: bfloat16, except on a CPU without instructions for it."""
    return torch.float32 if torch.device(device).type == "cpu" and not mkldnn_bfloat16() else torch.bfloat16


def clamped_swiglu(gate, up):
    """The gate of gpt-oss. All its models have these constants."""
    gate = gate.clamp(max=7.0)
    up = up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def gelu_quick(x):
    return x * torch.sigmoid(1.702 * x)


GATES = {"swiglu": lambda gate, up: torch.nn.functional.silu(gate) * up,
         "gelu": lambda gate, up: torch.nn.functional.gelu(gate) * up,
         "reglu2": lambda gate, up: torch.square(torch.relu(gate)) * up,
         "quick_geglu": lambda gate, up: gelu_quick(gate) * up,
         "geglu": lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
         "clamped_swiglu": clamped_swiglu}
UNGATED = {"relu2": lambda up: torch.square(torch.relu(up)),
           "gelu_erf": torch.nn.functional.gelu,
           "gelu_quick": gelu_quick,
           "gelu_tanh": lambda up: torch.nn.functional.gelu(up, approximate="tanh")}


Adapted = Seq[tuple[Any, AdapterMatrix]]  # (rows of the step, what is added to them) of each adapter


def adapter_products(x, adapted: Adapted):
    """For each adapter: (rows, what it adds to them, float32 (rows, N)). x (T, >= K) is after the norm.

    Rows are computed one by one, so that the bits of a row depend on no other."""
    for rows, (a, b, scales) in adapted:
        yield rows, torch.stack([
            b.float() @ (scales * (a.float() @ row)) for row in x[rows, :a.shape[1]].float()])


def linear_reference(x, weight, out, norm=None, bias=None, activation=None, residual=None,
                     adapted: Adapted = ()):
    """residual + activation(norm(x) @ weight.T + bias + what adapters add) -> out.

    weight      (N, K), packed or plain
    x           (T, >= K); the first K columns are read
    activation  None, or one of UNGATED, or one of GATES: then the weight has the rows of gates first, and out
                is (T, N / 2)"""
    if norm:
        x = normed(x, norm)
    added = list(adapter_products(x, adapted))
    x = x[:, :weight.shape[1]].to(weight.dtype)
    bias = bias if bias is None else bias.to(weight.dtype)
    if weight.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        y = torch.nn.functional.linear(x, weight, bias)
    if added:
        y = y.float()
    for rows, product in added:
        y[rows] += product
    finish_linear(y, out, activation, residual)


def finish_linear(y, out, activation, residual):
    """residual + activation(y) -> out."""
    if activation in GATES:
        y = GATES[activation](*y.chunk(2, dim=-1))
    elif activation:
        y = UNGATED[activation](y)
    if residual is None:
        out.copy_(y)
    else:
        torch.add(residual, y, out=out)


def experts_reference(x, logits, gate_up, down, out, *, norm, biases, activation, chosen, sum_to_one,
                      residual=True, sigmoids=False, correction_bias=None, groups=(1, 1), share_scale=1.0,
                      group_best=2, scales=None, jitter=None):
    """x + the sum over a row's experts of share * (activation(norm(x) @ gate_up.T) @ down.T) -> out (T, C).

    Without `residual`, x is not added. Without `norm`, products read x itself.

    Which experts a row has, and their shares:
    logits      (T, E): the `chosen` largest of a row, of equal ones the lower ids. Shares are the softmax
                over the logits of these, or over all E unless `sum_to_one`
    groups      (n, k): experts are chosen from k of n equally large groups, those whose `group_best` best
                experts have the largest sum of shares (DeepSeek-V3 technical report, 2024)
    share_scale a factor of all shares
    correction_bias
                None, or (E): added to an expert's part of the softmax over all E when experts are chosen
    sigmoids    experts and shares are those of `sigmoid_routes`, with correction_bias
    jitter      None, or a row has the two experts that `sparse_routes` chooses
    scales      None, or (E): each share is multiplied by the expert's

    What they compute:
    gate_up     (2 * E * F, C): the gates of all experts, then their ups; (E * F, C) with one of UNGATED
    down        (E * C, F)
    biases      of gate_up and of down, or None"""
    E = logits.shape[1]
    logits = logits.float()
    if jitter is not None:
        ids, shares = sparse_routes(logits, jitter)
    elif sigmoids:
        ids, shares = sigmoid_routes(logits, chosen, sum_to_one, correction_bias, groups, share_scale,
                                     group_best)
    else:
        ids, shares = routes(logits, chosen, sum_to_one, groups, share_scale, group_best, correction_bias)
    if scales is not None:
        shares = shares * scales[ids]
    y = normed(x, norm) if norm else x
    y = y.to(gate_up.dtype)
    halves = 2 if activation in GATES else 1
    gate_up = gate_up.unflatten(0, (halves, E, -1))
    down = down.unflatten(0, (E, -1))
    up_bias, down_bias = (bias if bias is None else bias.to(y.dtype) for bias in biases)
    total = torch.zeros_like(out)
    for expert in ids.unique().tolist():
        rows, columns = (ids == expert).nonzero(as_tuple=True)
        parts = [y[rows] @ matrices[expert].T for matrices in gate_up]  # (rows, F) each
        if up_bias is not None:
            parts = [part + own for part, own in zip(parts, up_bias.view(halves, E, -1)[:, expert])]
        hidden = GATES[activation](*parts) if halves > 1 else UNGATED[activation](*parts)
        added = hidden @ down[expert].T                            # (rows, C)
        if down_bias is not None:
            added = added + down_bias.view(E, -1)[expert]
        total.index_add_(0, rows, shares[rows, columns, None] * added)
    torch.add(x if residual else torch.zeros_like(x), total, out=out)


def routes(logits, chosen, sum_to_one, groups=(1, 1), share_scale=1.0, group_best=2, correction_bias=None):
    """Ids and shares (T, chosen) of each row's experts, as experts_reference says."""
    scores = logits
    if correction_bias is not None:
        scores = torch.softmax(logits, -1) + correction_bias
    if groups[1] < groups[0]:
        parts = torch.softmax(logits, -1) if correction_bias is None else scores
        scores = of_best_groups(parts, groups, group_best)
    ids = largest_first(scores, chosen)
    largest = logits.gather(1, ids)
    if sum_to_one:
        return ids, torch.softmax(largest, -1) * share_scale
    return ids, torch.exp(largest - logits.logsumexp(-1, True)) * share_scale


def of_best_groups(scores, groups, group_best):
    """Scores (T, E), -inf but in `groups`' k of n groups whose `group_best` best experts have the largest
    sum."""
    count, kept = groups
    best = scores.unflatten(1, (count, -1)).topk(group_best, -1).values.sum(-1)  # (T, n)
    out = torch.ones_like(best, dtype=torch.bool).scatter_(1, largest_first(best, kept), False)
    return scores.masked_fill(out.repeat_interleave(scores.shape[1] // count, 1), -math.inf)


def sigmoid_routes(logits, chosen, sum_to_one, correction_bias=None, groups=(1, 1), share_scale=1.0,
                   group_best=2):
    """Ids and shares (T, chosen) of each row's experts: those with the largest sigmoid + correction_bias.

    correction_bias None, or (E)
    sum_to_one      shares are the experts' sigmoids over their sum; else the sigmoids themselves
    share_scale, groups, group_best     as experts_reference says"""
    scores = torch.sigmoid(logits)
    if correction_bias is not None:
        scores = scores + correction_bias
    if groups[1] < groups[0]:
        scores = of_best_groups(scores, groups, group_best)
    ids = largest_first(scores, chosen)
    own = logits.gather(1, ids)
    if sum_to_one:
        shares = torch.softmax(torch.nn.functional.logsigmoid(own), -1)
    else:
        shares = torch.sigmoid(own)
    return ids, shares * share_scale


def largest_first(scores, count):
    """The ids (T, count) of the largest scores of each row. Of equal scores the lower id comes first."""
    return torch.sort(scores, descending=True, stable=True).indices[:, :count]


def sparse_routes(logits, jitter):
    """Ids and shares (T, 2) of the experts with the two largest logits (Liu et al., "GRIN", 2024).

    An expert's share is a softmax over its logit and lower ones: those whose distance to it, over the larger
    size of both, is at most 2 * jitter. The two shares do not add up to 1."""
    left = logits
    found = []
    for _ in range(2):
        largest, best = left.max(-1, keepdim=True)
        far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * jitter
        found.append((best, left.masked_fill(far, -math.inf).softmax(-1).gather(-1, best)))
        left = left.scatter(-1, best, -math.inf)
    ids, shares = zip(*found)
    return torch.cat(ids, -1), torch.cat(shares, -1)


def copy_reference(x, out):
    out.copy_(x)


def mix_reference(x, x0, resid_lambda, x0_lambda, out):
    """resid_lambda * x + x0_lambda * x0 -> out, which may be x. The lambdas are numbers or tensors of one."""
    torch.add(x * resid_lambda, x0 * x0_lambda, out=out)


def clamp_reference(x, low, high, out):
    """x (T, C) -> out, with each column at least its `low` (C,) and at most its `high` (C,)."""
    torch.minimum(torch.maximum(x, low), high, out=out)


def look_up_reference(table, ids, out, part=None):
    """The rows `ids` (T,) of a MappedRows -> out (T, K). A negative id gives row 0, which is never used.

    part: None, or (0, V): ids from the last row on and below V give zeros."""
    ids = ids.cpu()
    own = ids < len(table.table) if part else torch.ones_like(ids, dtype=torch.bool)
    out.copy_(torch.from_numpy(table.look_up(torch.where(own, ids, 0).numpy())))
    out[~own] = 0.0


def layer_inputs_reference(projected, rows, weight, eps, out):
    """(weight * rms(each layer's part of projected) + sqrt(P) * rows) / sqrt(2) -> out, all (T, L * P).

    weight (P,). `out` may be `projected`."""
    parts = projected.unflatten(1, (-1, len(weight)))
    normed = torch.nn.functional.rms_norm(parts, weight.shape, weight, eps).flatten(1)
    torch.mul(normed + rows * math.sqrt(len(weight)), math.sqrt(0.5), out=out)


def gate_input_reference(gate, inputs, first, out):
    """gelu(gate) * inputs[:, first:first + P] -> out, which may be gate, both (T, P). gelu uses tanh."""
    part = inputs[:, first:first + gate.shape[1]]
    torch.mul(torch.nn.functional.gelu(gate, approximate="tanh"), part, out=out)


def gated_add_reference(x, added, gate, out):
    """x + sigmoid(gate) * added -> out (T, C), which may be x; gate is (T, 1)."""
    torch.add(x, torch.sigmoid(gate) * added, out=out)


def smear_reference(x, previous, previous_ids, gate, smear_lambda, out):
    """x + lambda * sigmoid(x[:, :channels] @ gate.T) * previous -> out (T, C).

    The first position of a sequence has no previous one: its previous id is negative."""
    strength = smear_lambda * torch.sigmoid(x[:, :gate.shape[1]] @ gate.T.to(x.dtype))  # (T, 1)
    torch.add(x, strength * previous * (previous_ids >= 0).unsqueeze(1), out=out)


def backout_reference(x, middle, backout_lambda, out):
    """x - lambda * middle -> out (T, C)."""
    torch.sub(x, backout_lambda * middle, out=out)


def softcap_reference(logits, cap, out):
    """cap * tanh(logits / cap) -> out (R, V)."""
    torch.mul(torch.tanh(logits / cap), cap, out=out)


def make_cache_reference(model, layout, num_pages, device):
    """The KV pages of all layers: their memory, and for each layer the cache that its ops get.

    `layout` is the PageLayout. A layer that reads another's pages gets those, one with a mixer gets None."""
    slots = num_pages * PAGE_SIZE
    layers = []
    whole = zeroed((slots * layout.size * layout.unit,), torch.uint8, device)
    for l, attn in enumerate(model.by_layer):
        begin, stride = (places * layout.unit for places in layout.place(l, slots))  # bytes
        if attn is None:
            layers.append(None)
            continue
        if packed := PACKED.get(layout.types[l]):
            keys, begin = packed.within(whole, slots, attn.kv_heads, attn.head_size, begin, stride)
            if attn.values_in_keys:
                layers.append(keys.divided(attn.value_size))
                continue
            values, _ = packed.within(whole, slots, attn.kv_heads, attn.value_size, begin, stride)
            layers.append((keys, values))
            continue
        memory = whole.view(getattr(torch, layout.types[l]))
        begin = begin // memory.itemsize
        stride = stride // memory.itemsize
        if attn.value_size != attn.head_size or PACKED.keys() & set(layout.types):
            begins = begin, begin + (0 if attn.values_in_keys else attn.kv_heads * attn.head_size)
            layers.append(tuple(
                memory.as_strided((slots, attn.kv_heads, size), (stride, size, 1), start)
                for start, size in zip(begins, (attn.head_size, attn.value_size))))
        else:
            shape = slots, 2, attn.kv_heads, attn.head_size
            steps = stride, attn.kv_heads * attn.head_size, attn.head_size, 1
            layers.append(memory.as_strided(shape, steps, begin))
    return whole, layers
