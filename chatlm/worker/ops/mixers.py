"""Reference ops of layers that keep a state for each sequence instead of keys and values.

A layer's `states` are float32 tensors (slots, ...), with the shapes that its mixer gives; `sequences` is the
step's spec.Sequences, or OneEach. Before a sequence's first token its state is zero, so a slot need not be
cleared."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional


class OneEach(NamedTuple):
    """The sequences of a step whose T rows are one of each, as tensors: nothing is read on the host, so that
    a CUDA graph can contain the step."""

    reads: torch.Tensor   # (T,) int64 slots; -1: the row is the sequence's first
    writes: torch.Tensor  # (T,) int64 slots; -1: padding, which writes nothing

    def before(self, state):
        """The states before the rows, (T, ...)."""
        first = (self.reads < 0).view(-1, *(1 for _ in state.shape[1:]))
        return state[self.reads.clamp(min=0)].masked_fill(first, 0.0)

    def write(self, state, after):
        """Write the states after the rows, (T, ...), to their slots."""
        # padding writes the same as some other row, or if all rows are padding, what was there
        rows = torch.arange(len(self.writes), device=state.device)
        source = torch.where(self.writes < 0, self.writes.argmax(), rows)
        slots = self.writes[source].clamp(min=0)
        written = (self.writes[source] >= 0).view(-1, *(1 for _ in state.shape[1:]))
        state[slots] = torch.where(written, after[source], state[slots])


def short_conv_reference(x, taps, states, sequences, out, bias=None):
    """x (T, 3 C) = b, c, u;  s = b * u;  c_t * (sum over j of taps[j] * s[t - K + 1 + j] + bias) -> out

    taps (K * C) has the oldest tap first; `states` one tensor (slots, K - 1, C): s of the last tokens, oldest
    first. The sum starts with the oldest, and each product and sum is rounded, so that the bits do not depend
    on how a prompt is divided."""
    b, c, u = x.float().split(out.shape[1], 1)
    total = convolve(b * u, taps, states[0], sequences)
    out.copy_(c * (total if bias is None else total + bias))


def convolve(s, taps, state, sequences):
    """The sum over j of taps[j] * s[t - K + 1 + j], (T, C); s (T, C), state (slots, K - 1, C)."""
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
        rows = torch.cat((before, s[begin:end]))  # token t of the sequence's new ones is row t + K - 1
        total[begin:end] = taps[0] * rows[:end - begin]
        for j in range(1, len(taps)):
            total[begin:end] += taps[j] * rows[j:j + end - begin]
        for row, slot in writes.items():
            state[slot] = rows[row - begin + 1:row - begin + len(taps)]
    return total


def recur(state, sequences, advance: Callable):
    """Writes the states: `advance(S, rows)` gives those after a row (...), or after each of some rows
    (T, ...) of different sequences, from the ones before, S; state (slots, ...)."""
    if isinstance(sequences, OneEach):
        return sequences.write(state, advance(sequences.before(state), slice(None)))
    for begin, end, S, writes in spans_of(sequences, state):
        for t in range(begin, end):
            S = advance(S, t)
            if t in writes:
                state[writes[t]] = S


def spans_of(sequences, state):
    """For each sequence: (first row, end, its state before, row -> the slot written after it)."""
    spans = itertools.pairwise(sequences.starts)
    for (begin, end), first, slot in zip(spans, sequences.firsts, sequences.reads):
        before = state[slot].clone() if first else torch.zeros_like(state[slot])
        yield begin, end, before, {row: slot for row, slot in sequences.writes if begin <= row < end}


def delta_rule_reference(x, weights, mixer, eps, states, sequences, out):
    """A spec.DeltaRule's x (T, its first width) -> out (T, its second), token by token.

    `weights` has taps, decay, dt_bias and mix_norm; `states` are (slots, K - 1, channels) and
    (slots, Hv, Dk, Dv)."""
    H = mixer.value_heads
    D = mixer.key_size
    Hk = mixer.key_heads
    p, z, b, a = split_projections(x.float(), mixer)
    u = functional.silu(convolve(p, weights["taps"], states[0], sequences))
    q, k, v = u.split((Hk * D, Hk * D, mixer.parts[1]), 1)
    q, k = (part.unflatten(1, (Hk, D)) for part in (q, k))
    q, k = (part * torch.rsqrt((part * part).sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    heads = torch.arange(H, device=x.device)
    heads = heads % Hk if mixer.alternating else heads // (H // Hk)
    # (T, Hv, Dk or Dv)
    q = q[:, heads] * D**-0.5
    k = k[:, heads]
    v = v.unflatten(1, (H, -1))
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


def split_projections(x, mixer):
    """A DeltaRule's p, z, b and a, (T, mixer.parts) each."""
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
    """A spec.Mamba2's x (T, its first width) -> out (T, its second), token by token.

    `weights` has taps, decay, dt_bias, skip, mix_norm and perhaps taps_bias; `states` are
    (slots, K - 1, channels) and (slots, H, N, P). If ranks share groups, out is not yet normalized."""
    inner, _, H = mixer.parts
    G = mixer.groups
    N = mixer.state_size
    z, p, dt = x.float().split(mixer.parts, 1)
    u = convolve(p, weights["taps"], states[0], sequences)
    u = functional.silu(u + weights["taps_bias"] if mixer.taps_bias else u)
    v, B, C = u.split((inner, G * N, G * N), 1)
    group = groups_of_heads(mixer, x.device)
    B, C = (part.unflatten(1, (G, N))[:, group] for part in (B, C))  # (T, H, N)
    # (T, H, P), (T, H)
    v = v.unflatten(1, (H, -1))
    dt = functional.softplus(dt + weights["dt_bias"])
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
    """The sum of the squares of each group's channels in x (T, H * P) -> out (T, groups) float32; 0 for
    groups without a head here."""
    squares = x.float().square().unflatten(1, (mixer.heads, -1)).sum(-1)  # (T, H)
    out.zero_().index_add_(1, groups_of_heads(mixer, x.device), squares)


def norm_groups_reference(x, weight, squares, mixer, eps, out):
    """weight * x (T, H * P), over its group's root mean square -> out; squares (T, groups) as above, the sums
    of all ranks."""
    scale = torch.rsqrt(squares / (mixer.group_size * mixer.head_size) + eps)
    scale = scale[:, groups_of_heads(mixer, x.device)].repeat_interleave(mixer.head_size, 1)
    out.copy_(weight * (x * scale))


def split_gates_reference(x, head_size, gates, out):
    """x (T, (2 H + 2 Hkv) * D), for each query head its q and then its gate, then k and v -> gates (T, H * D)
    and out (T, (H + 2 Hkv) * D)."""
    size = gates.shape[1]
    halves = x[:, :2 * size].unflatten(1, (-1, 2, head_size))
    out[:, :size] = halves[:, :, 0].flatten(1)
    out[:, size:] = x[:, 2 * size:]
    gates.copy_(halves[:, :, 1].flatten(1))


def gate_reference(x, gates, out):
    """x * sigmoid(gates) -> out, which may be x."""
    out.copy_(x * torch.sigmoid(gates.float()))
