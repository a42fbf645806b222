"""Reference ops of layers that keep a state for each sequence instead of keys and values.

The `states` of a layer are float32 tensors (slots, ...), with the shapes that its mixer states. `sequences`
is the Sequences of the step, or OneEach. Before the first token of a sequence its state is zero, whatever the
slot holds, so slots need not be cleared."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional


class OneEach(NamedTuple):
    """The sequences of a step in which each has one row, as tensors.

    Nothing is read on the host, so a CUDA graph can contain the step."""

    reads: torch.Tensor   # (T,) int64 slots; -1: the row is the first of its sequence
    writes: torch.Tensor  # (T,) int64 slots; -1: padding, which writes nothing

    def before(self, state):
        """The states before the rows, (T, ...)."""
        first = (self.reads < 0).view(-1, *(1 for _ in state.shape[1:]))
        return state[self.reads.clamp(min=0)].masked_fill(first, 0.0)

    def write(self, state, after):
        """Write the states after the rows, (T, ...), to their slots."""
        # padding writes what another row writes; if all rows are padding, it writes back what was there
        rows = torch.arange(len(self.writes), device=state.device)
        source = torch.where(self.writes < 0, self.writes.argmax(), rows)
        slots = self.writes[source].clamp(min=0)
        written = (self.writes[source] >= 0).view(-1, *(1 for _ in state.shape[1:]))
        state[slots] = torch.where(written, after[source], state[slots])


def short_conv_reference(x, taps, states, sequences, out, bias=None):
    """x (T, 3 C) = b, c, u;  s = b * u;  c_t * (sum over j of taps[j] * s[t - K + 1 + j] + bias) -> out

    taps        (K * C), the oldest tap first
    states      one tensor (slots, K - 1, C): s of the last tokens, oldest first
    The sum starts with the oldest token, and each product and sum is rounded. So the bits do not depend on
    how a prompt is divided into steps."""
    b, c, u = x.float().split(out.shape[1], 1)
    total = convolve(b * u, taps, states[0], sequences)
    out.copy_(c * (total if bias is None else total + bias))


def convolve(s, taps, state, sequences):
    """The sum over j of taps[j] * s[t - K + 1 + j] -> (T, C). s (T, C), state (slots, K - 1, C)."""
    taps = taps.view(-1, s.shape[1])
    total = torch.empty_like(s)
    if isinstance(sequences, OneEach):
        columns = torch.cat((sequences.before(state), s[:, None]), 1)  # (T, K, C)
        sequences.write(state, columns[:, 1:])
        total = taps[0] * columns[:, 0]
        for j in range(1, len(taps)):
            total += taps[j] * columns[:, j]
        return total
    for begin, end, before, writes in spans_of(sequences, state):
        rows = torch.cat((before, s[begin:end]))  # new token t of the sequence is row t + K - 1
        total[begin:end] = taps[0] * rows[:end - begin]
        for j in range(1, len(taps)):
            total[begin:end] += taps[j] * rows[j:j + end - begin]
        for row, slot in writes.items():
            state[slot] = rows[row - begin + 1:row - begin + len(taps)]
    return total


def recur(state, sequences, advance: Callable):
    """Compute the rows in order, and write the states after them. state: (slots, ...).

    advance(S, rows) -> the state after a row (...), from S, the state before it; or those after several rows
    (T, ...) of different sequences."""
    if isinstance(sequences, OneEach):
        return sequences.write(state, advance(sequences.before(state), slice(None)))
    for begin, end, S, writes in spans_of(sequences, state):
        for t in range(begin, end):
            S = advance(S, t)
            if t in writes:
                state[writes[t]] = S


def spans_of(sequences, state):
    """For each sequence: (first row, end, the state before it, row -> the slot that is written after it)."""
    spans = itertools.pairwise(sequences.starts)
    for (begin, end), first, slot in zip(spans, sequences.firsts, sequences.reads):
        before = state[slot].clone() if first else torch.zeros_like(state[slot])
        writes = {row: to for row, to in sequences.writes if begin <= row < end}
        yield begin, end, before, writes


def delta_rule_reference(x, weights, mixer, eps, states, sequences, out):
    """DeltaRule: x (T, its first width) -> out (T, its second), token by token. The block says what it is.

    weights     taps, decay, dt_bias and mix_norm
    states      (slots, K - 1, channels) and (slots, Hv, Dk, Dv)"""
    H = mixer.value_heads
    D = mixer.key_size
    Hk = mixer.key_heads
    p, z, b, a = split_projections(x.float(), mixer)
    u = functional.silu(convolve(p, weights["taps"], states[0], sequences))
    q, k, v = u.split((Hk * D, Hk * D, mixer.parts[1]), 1)
    q = unit_heads(q, Hk)
    k = unit_heads(k, Hk)
    heads = torch.arange(H, device=x.device)  # the key head that each value head reads
    heads = heads % Hk if mixer.alternating else heads // (H // Hk)
    q = q[:, heads] * D**-0.5    # (T, Hv, Dk)
    k = k[:, heads]              # (T, Hv, Dk)
    v = v.unflatten(1, (H, -1))  # (T, Hv, Dv)
    beta = torch.sigmoid(b)[..., None]
    decay = torch.exp(weights["decay"] * functional.softplus(a + weights["dt_bias"]))[..., None, None]

    def advance(S, t):  # (Hv, Dk, Dv)
        S = S * decay[t]
        d = beta[t] * (v[t] - (S * k[t][..., None]).sum(-2))  # (Hv, Dv)
        S = S + k[t][..., None] * d[..., None, :]
        o = (S * q[t][..., None]).sum(-2)
        scale = torch.rsqrt((o * o).mean(-1, keepdim=True) + eps)
        out[t] = (weights["mix_norm"] * (o * scale)).flatten(-2) * functional.silu(z[t])
        return S

    recur(states[1], sequences, advance)


def unit_heads(x, count):
    """x (T, count * D) -> (T, count, D), with each head of length 1."""
    heads = x.unflatten(1, (count, -1))
    return heads * torch.rsqrt((heads * heads).sum(-1, keepdim=True) + 1e-6)


def split_projections(x, mixer):
    """p, z, b and a of a DeltaRule, as wide as mixer.parts says."""
    Hk = mixer.key_heads
    D = mixer.key_size
    r = mixer.value_heads // mixer.key_heads
    p, z, b, a = x.split(mixer.parts, 1)
    if mixer.heads_by_key:
        values = r * mixer.value_size
        heads = torch.cat((p, z), 1).unflatten(1, (Hk, -1)).split((D, D, values, values), 2)
        q, k, v, z = (part.flatten(1) for part in heads)
        p = torch.cat((q, k, v), 1)
    if mixer.gates_by_key:
        gates = torch.cat((b, a), 1).unflatten(1, (Hk, 2, r))
        b = gates[:, :, 0].flatten(1)
        a = gates[:, :, 1].flatten(1)
    return p, z, b, a


def mamba2_reference(x, weights, mixer, eps, states, sequences, out):
    """Mamba2: x (T, its first width) -> out (T, its second), token by token. The block says what it is.

    weights     taps, decay, dt_bias, skip, mix_norm, and taps_bias if it has one
    states      (slots, K - 1, channels) and (slots, H, N, P)
    If ranks share groups, out has no norm yet."""
    inner, _, H = mixer.parts
    G = mixer.groups
    N = mixer.state_size
    z, p, dt = x.float().split(mixer.parts, 1)
    u = convolve(p, weights["taps"], states[0], sequences)
    u = functional.silu(u + weights["taps_bias"] if mixer.taps_bias else u)
    v, B, C = u.split((inner, G * N, G * N), 1)
    group = groups_of_heads(mixer, x.device)
    B = B.unflatten(1, (G, N))[:, group]               # (T, H, N)
    C = C.unflatten(1, (G, N))[:, group]               # (T, H, N)
    v = v.unflatten(1, (H, -1))                        # (T, H, P)
    dt = functional.softplus(dt + weights["dt_bias"])  # (T, H)
    decay = torch.exp(weights["decay"] * dt)[..., None, None]

    def advance(S, t):  # (H, N, P)
        S = decay[t] * S + B[t][..., None] * (dt[t][..., None] * v[t])[..., None, :]
        y = (S * C[t][..., None]).sum(-2) + weights["skip"][:, None] * v[t]
        y = y.flatten(-2) * functional.silu(z[t])
        if not mixer.of_heads:
            y = y.unflatten(-1, (G, -1))
            scale = torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
            y = weights["mix_norm"] * (y * scale).flatten(-2)
        out[t] = y
        return S

    recur(states[1], sequences, advance)


def groups_of_heads(mixer, device):
    """The group of each head of a Mamba2, (H,)."""
    return torch.arange(mixer.first_head, mixer.first_head + mixer.heads, device=device) // mixer.group_size


def group_squares_reference(x, mixer, out):
    """The sum of the squares of each group's channels in x (T, H * P) -> out (T, groups) float32.

    A group of which no head is here has the sum 0."""
    squares = x.float().square().unflatten(1, (mixer.heads, -1)).sum(-1)  # (T, H)
    out.zero_().index_add_(1, groups_of_heads(mixer, x.device), squares)


def norm_groups_reference(x, weight, squares, mixer, eps, out):
    """weight * x (T, H * P) over the root mean square of x's group -> out.

    squares: (T, groups) as above, summed over all ranks."""
    scale = torch.rsqrt(squares / (mixer.group_size * mixer.head_size) + eps)
    scale = scale[:, groups_of_heads(mixer, x.device)].repeat_interleave(mixer.head_size, 1)
    out.copy_(weight * (x * scale))


def split_gates_reference(x, head_size, gates, out):
    """x (T, (2 H + 2 Hkv) * D) -> gates (T, H * D) and out (T, (H + 2 Hkv) * D), which is q, k and v.

    x has q and then the gate of each query head, and then k and v."""
    size = gates.shape[1]
    halves = x[:, :2 * size].unflatten(1, (-1, 2, head_size))
    out[:, :size] = halves[:, :, 0].flatten(1)
    out[:, size:] = x[:, 2 * size:]
    gates.copy_(halves[:, :, 1].flatten(1))


def gate_reference(x, gates, out, activation="sigmoid"):
    """x (T, H * D) * sigmoid(gates) -> out, which may be x. `activation`: sigmoid or softplus.

    gates       (T, H * D), or (T, H): one for each head"""
    of = torch.sigmoid if activation == "sigmoid" else torch.nn.functional.softplus
    by_gate = x.unflatten(1, (gates.shape[1], -1))
    out.copy_((by_gate * of(gates.float()).unsqueeze(-1)).flatten(1))
