"""Reference ops of layers that keep a state of each sequence instead of keys and values.

A layer's `states` are float32 tensors (slots, ...), of the shapes that its mixer names; `sequences` is the
step's spec.Sequences. Before a sequence's first token its state is zero, so a slot need not be cleared."""

from __future__ import annotations

import itertools

import torch


def short_conv_reference(x, taps, states, sequences, out, bias=None):
    """x (T, 3 C) = b, c, u;  s = b * u;  c_t * (sum over j of taps[j] * s[t - K + 1 + j] + bias) -> out

    taps (K * C) has the oldest tap first; `states` one tensor (slots, K - 1, C): s of the last tokens, oldest
    first. The sum begins with the oldest, and each product and sum is rounded: how a prompt is cut changes no
    bit."""
    [state], C = states, out.shape[1]
    taps = taps.view(-1, C)
    K, (b, c, u) = len(taps), x.float().split(C, 1)
    s = b * u
    spans = itertools.pairwise(sequences.starts)
    for (begin, end), first, slot in zip(spans, sequences.firsts, sequences.reads):
        before = state[slot] if first else torch.zeros_like(state[slot])
        rows = torch.cat((before, s[begin:end]))  # token t of the sequence's new ones is row t + K - 1
        total = taps[0] * rows[:end - begin]
        for j in range(1, K):
            total += taps[j] * rows[j:j + end - begin]
        if bias is not None:
            total += bias
        out[begin:end] = c[begin:end] * total
        for row, target in sequences.writes:
            if begin <= row < end:
                state[target] = rows[row - begin + 1:row - begin + K]
