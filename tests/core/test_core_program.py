"""Program: a replayed step gives the bits of its ops called one by one, however it is divided
(numpy only)."""

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import numpy as np
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.library import _core  # noqa: E402
from chatlm.worker.kernels.program import LOGIT_ROWS, TOKENS, Buffers  # noqa: E402
from core_settings import usual_settings  # noqa: E402, F401
from instruction_sets import ISAS, SOME_ISAS  # noqa: E402
from nightly import by_day  # noqa: E402
from record import agree, exact  # noqa: E402
from row_ops import exp_negative, fma, gelu_tanh, layer_norm, rms_norm, route, route_sigmoids, route_sparse, sigmoid, silu, softcap, softplus, tree  # noqa: E402

PAGE, MAX_TOKENS, MAX_ROWS, PAGES, SLOTS = 16, 128, 128, 64, 16
SHARE = float(os.environ.get("DECODE_CORE_TEST_SHARE", "1"))
pytestmark = pytest.mark.usefixtures("usual_settings")


class Eager:
    """The methods of Program, each computing at once on the first T (or R) rows of its buffers."""

    token_ids, previous_token_ids, positions, slots, attention, logit_rows = "ids", "previous", "positions", "slots", "plan", "rows"
    sequences = "sequences"

    def __init__(self, step, heads, kv_heads):
        self.step, self.T, self.R = step, len(step.token_ids), len(step.logit_rows)
        self.plan = compiled.plan_attention(step.tables, step.lengths, step.starts, heads, kv_heads, PAGES)
        counts = np.diff(step.starts)
        position = [np.arange(length - count, length) for count, length in zip(counts, step.lengths)]
        self.at = np.concatenate(position)
        self.into = np.concatenate([np.array(table)[p // PAGE] * PAGE + p % PAGE for table, p in zip(step.tables, position)])
        self.gathered, self.tokens = set(), []

    def rows(self, x):
        return self.R if id(x) in self.gathered else self.T

    def embed(self, table, ids, out):
        ids = np.maximum(self.at if ids == "positions" else np.array(self.step.token_ids if ids == "ids" else self.step.previous), 0)
        if isinstance(table, compiled.Matrix):
            compiled.embed(table, ids, out[:self.T])
        else:
            out[:self.T] = table[ids]

    def gather_rows(self, x, rows, out):
        self.gathered.add(id(out))
        out[:self.R] = x[self.step.logit_rows]

    def rms_norm(self, x, weight, eps, out):
        n = self.rows(x)
        out[:n] = rms_norm(x[:n], weight, eps)

    def layer_norm(self, x, weight, bias, eps, out):
        n = self.rows(x)
        out[:n] = layer_norm(x[:n], weight, bias, eps)

    def linear(self, x, matrix, out, norm=None, bias=None, activation=None, residual=None):
        if n := self.rows(x):
            if id(x) in self.gathered:
                self.gathered.add(id(out))
            x = x[:n]
            if x.shape[1] != matrix.columns:
                x, norm = np.ascontiguousarray((rms_norm(x, *norm) if norm else x)[:, :matrix.columns]), None
            compiled.multiply(x, matrix, norm=norm, bias=bias, activation=activation, out=out[:n],
                                 residual=None if residual is None else residual[:n])

    def experts(self, x, logits, gate_up, down, out, norm, biases, activation, chosen, sum_to_one, residual=True, sigmoids=False, scales=None, jitter=None,
                **router):
        (C, F), logits, halves = (x.shape[1], down.columns), logits[:self.T], 1 + (activation in compiled.tiles.GATES)
        before, routes = x[:self.T].copy(), route_sigmoids(logits, chosen, sum_to_one, **router) if sigmoids else route(logits, chosen, sum_to_one, **router)
        routes = routes if jitter is None else route_sparse(logits, chosen, 2 * jitter)
        for row, (ids, shares) in enumerate(zip(*routes)):
            shares = shares if scales is None else shares * scales[ids]
            total, hidden, added = (np.zeros((1, n), np.float32) for n in (C, gate_up.rows // halves, down.rows))      # of all experts
            total = total[0]
            compiled.multiply(before[row:row + 1], gate_up, norm=norm, bias=biases[0], activation=activation, out=hidden)
            for expert, share in zip(ids, shares):
                compiled.multiply(hidden[:, expert * F:(expert + 1) * F], down, bias=biases[1], out=added)
                total = fma(share, added[0, expert * C:(expert + 1) * C], total)
            out[row] = before[row] + total if residual else total

    def copy(self, x, out):
        out[:self.rows(x)] = x[:self.rows(x)]

    def mix(self, x, x0, resid_lambda, x0_lambda, out):
        n = self.rows(x)
        out[:n] = x[:n] * np.float32(resid_lambda) + x0[:n] * np.float32(x0_lambda)

    def backout(self, x, middle, backout_lambda, out):
        out[:self.T] = x[:self.T] - middle[:self.T] * np.float32(backout_lambda)

    def smear(self, x, previous, previous_ids, gate, smear_lambda, out):
        strength = np.zeros(self.T, np.float32)
        for c in range(gate.shape[1]):
            strength = fma(x[:self.T, c], gate[0, c], strength)
        strength = np.float32(smear_lambda) * sigmoid(strength)
        has = (np.array(self.step.previous) >= 0)[:, None]
        out[:self.T] = np.where(has, x[:self.T] + strength[:, None] * previous[:self.T], x[:self.T])

    def softcap(self, logits, cap, out):
        out[:self.R] = softcap(logits[:self.R], cap)

    def rope_append(self, qkv, cos, sin, positions, slots, cache, out, *, value_embed=None, gate=None, **more):
        D = cache.shape[3] // PAGE
        rows = {} if gate is None else {"value_embed": value_embed[:self.T], "gate": gate[:self.T]}
        compiled.rope_append(qkv[:self.T], cos, sin, self.at, self.into, cache, out[:self.T].reshape(self.T, -1, D), **rows, **more)

    def paged_attention(self, q, cache, attention, window, out, softcap=0.0, sinks=None):
        compiled.paged_attention(q[:self.T].reshape(self.T, self.plan.heads, -1), cache, self.plan, out[:self.T], window=window,
                                    softcap=softcap, sinks=sinks)

    def spans(self, states):
        """(begin, end, the states before, row -> the slots written after it) of each sequence."""
        reads, rows, slots = self.step.states
        for begin, end, length, slot in zip(self.step.starts, self.step.starts[1:], self.step.lengths, reads):
            before = [state[slot].copy() if length > end - begin else np.zeros_like(state[slot]) for state in states]
            yield begin, end, before, lambda row: [slot for at, slot in zip(rows, slots) if at == row]

    def convolve(self, s, taps, state):
        K, total = len(taps) // s.shape[1], np.empty_like(s)
        taps = taps.reshape(K, -1)
        for begin, end, [before], written in self.spans([state]):
            rows = np.concatenate((before, s[begin:end]))
            for row in range(begin, end):
                seen = rows[row - begin:row - begin + K]
                total[row] = taps[0] * seen[0]
                for j in range(1, K):
                    total[row] = total[row] + taps[j] * seen[j]
                for slot in written(row):
                    state[slot] = seen[1:]
        return total

    def short_conv(self, x, taps, states, sequences, out, bias=None):
        C = out.shape[1]
        total = self.convolve(x[:self.T, :C] * x[:self.T, 2 * C:], taps, states[0])
        out[:self.T] = x[:self.T, C:2 * C] * (total if bias is None else total + bias)

    def delta_rule(self, x, weights, mixer, eps, states, sequences, out):
        f, T, Hk, Hv, Dk, Dv = np.float32, self.T, mixer.key_heads, mixer.value_heads, mixer.key_size, mixer.value_size
        p, z, b, a = np.split(x[:T], np.cumsum((2 * Hk * Dk + Hv * Dv, Hv * Dv, Hv)), axis=1)
        r, head = Hv // Hk, lambda part, D: part.reshape(T, -1, D)
        if mixer.heads_by_key:
            by_key = np.concatenate((p, z), 1).reshape(T, Hk, -1)
            p = np.concatenate([part.reshape(T, -1) for part in (by_key[:, :, :Dk], by_key[:, :, Dk:2 * Dk], by_key[:, :, 2 * Dk:2 * Dk + r * Dv])], 1)
            z = by_key[:, :, 2 * Dk + r * Dv:].reshape(T, -1)
        if mixer.gates_by_key:
            b, a = (part.reshape(T, -1) for part in np.split(np.concatenate((b, a), 1).reshape(T, Hk, 2 * r), 2, axis=2))
        u = silu(self.convolve(np.ascontiguousarray(p), weights["taps"], states[0]))
        q, k, v = (head(part, D) for part, D in zip(np.split(u, (Hk * Dk, 2 * Hk * Dk), axis=1), (Dk, Dk, Dv)))

        def squares(x):
            lanes = np.zeros((*x.shape[:-1], 16), f)
            for c in range(0, x.shape[-1], 16):
                lanes = fma(x[..., c:c + 16], x[..., c:c + 16], lanes)
            return tree(lanes.reshape(-1, 16)).reshape(*x.shape[:-1], 1)

        q = q * (f(1) / np.sqrt(squares(q) + f(1e-6)) * (f(1) / np.sqrt(f(Dk))))
        k = k * (f(1) / np.sqrt(squares(k) + f(1e-6)))
        heads = np.arange(Hv) % Hk if mixer.alternating else np.arange(Hv) // r
        q, k, beta, power = q[:, heads], k[:, heads], sigmoid(b)[..., None], (weights["decay"] * softplus(a + weights["dt_bias"]))[..., None]
        g = np.where(power < -40, f(0), exp_negative(power))
        for begin, end, [S], written in self.spans(states[1:]):
            for t in range(begin, end):
                seen, o = np.zeros((Hv, Dv), f), np.zeros((Hv, Dv), f)
                for i in range(Dk):
                    seen = fma(S[:, i], k[t, :, i:i + 1], seen)
                d = beta[t] * (v[t] - g[t] * seen)
                S = fma(k[t, :, :, None], d[:, None], g[t, :, None] * S)
                for i in range(Dk):
                    o = fma(S[:, i], q[t, :, i:i + 1], o)
                scale = f(1) / np.sqrt(squares(o) / f(Dv) + f(eps))
                out[t] = (weights["mix_norm"] * (o * scale) * silu(head(z, Dv)[t])).reshape(-1)
                for slot in written(t):
                    states[1][slot] = S

    def mamba2(self, x, weights, mixer, eps, states, sequences, out):
        f, T, H, P, N, G = np.float32, self.T, mixer.heads, mixer.head_size, mixer.state_size, mixer.groups
        z, p, dt = np.split(x[:T], (H * P, 2 * H * P + 2 * G * N), axis=1)
        u = self.convolve(np.ascontiguousarray(p), weights["taps"], states[0])
        v, B, C = np.split(silu(u + weights["taps_bias"] if mixer.taps_bias else u), (H * P, H * P + G * N), axis=1)
        v, (B, C) = v.reshape(T, H, P), (part.reshape(T, G, N)[:, self.groups(mixer)] for part in (B, C))
        dt = softplus(dt + weights["dt_bias"])[..., None]
        decay = exp_negative(weights["decay"][:, None] * dt)
        for begin, end, [S], written in self.spans(states[1:]):
            for t in range(begin, end):
                S, y = fma(B[t, ..., None], (dt[t] * v[t])[:, None], decay[t, ..., None] * S), np.zeros((H, P), f)
                for n in range(N):
                    y = fma(S[:, n], C[t, :, n:n + 1], y)
                y = fma(weights["skip"][:, None], v[t], y) * silu(z[t].reshape(H, P))
                out[t] = y.reshape(-1) if mixer.of_heads else rms_norm(y.reshape(G, -1), weights["mix_norm"].reshape(G, -1), eps).reshape(-1)
                for slot in written(t):
                    states[1][slot] = S

    def groups(self, mixer):
        """Of each head its group."""
        return (mixer.first_head + np.arange(mixer.heads)) // ((mixer.of_heads or mixer.heads) // mixer.groups)

    def group_squares(self, x, mixer, out):
        out[:self.T] = 0
        for head, group in enumerate(self.groups(mixer)):
            lanes = np.zeros((self.T, 16), np.float32)
            for c in range(head * mixer.head_size, (head + 1) * mixer.head_size, 16):
                lanes = fma(x[:self.T, c:c + 16], x[:self.T, c:c + 16], lanes)
            out[:self.T, group] += tree(lanes)

    def norm_groups(self, x, weight, squares, mixer, eps, out):
        f, P = np.float32, mixer.head_size
        mean = squares[:self.T, self.groups(mixer)] / f(mixer.of_heads // mixer.groups * P)
        scale = np.repeat(f(1) / np.sqrt(mean + f(eps)), P, axis=1)
        out[:self.T] = x[:self.T] * scale * weight

    def mean_squares(self, qkv, q_norm, k_norm, sizes, out):
        first = 0
        for column, (count, size) in enumerate(zip((len(q_norm), len(k_norm)), sizes)):
            lanes = np.zeros((self.T, 16), np.float32)
            for c in range(first, first + count, 16):
                lanes = fma(qkv[:self.T, c:c + 16], qkv[:self.T, c:c + 16], lanes)
            out[:self.T, column], first = tree(lanes) / np.float32(size), first + count

    def norm_qk(self, qkv, q_norm, k_norm, means, eps, out):
        first = 0
        for column, weight in enumerate((q_norm, k_norm)):
            scale = np.float32(1) / np.sqrt(means[:self.T, column] + np.float32(eps))
            qkv[:self.T, first:first + len(weight)] *= scale[:, None]
            qkv[:self.T, first:first + len(weight)] *= weight
            first += len(weight)

    def norm_heads(self, qkv, q_norm, k_norm, head_size, eps, out, count=0):
        weights = np.concatenate((q_norm, k_norm))
        for c in range(0, len(weights), head_size):
            head = slice(c, c + head_size)
            out[:self.T, head] = layer_norm(qkv[:self.T, head], weights[head], None, eps)

    def scale_rows(self, x, scales, positions, out):
        out[:self.T] = x[:self.T] * scales[self.at][:, None]

    def split_gates(self, x, head_size, gates, out):
        size = gates.shape[1]
        halves = x[:self.T, :2 * size].reshape(self.T, -1, 2, head_size)
        out[:self.T, :size], gates[:self.T] = halves[:, :, 0].reshape(self.T, -1), halves[:, :, 1].reshape(self.T, -1)
        out[:self.T, size:] = x[:self.T, 2 * size:]

    def gate(self, x, gates, out, activation="sigmoid"):
        of = {"sigmoid": sigmoid, "softplus": softplus}[activation](gates[:self.T])
        out[:self.T] = x[:self.T] * np.repeat(of, x.shape[1] // gates.shape[1], axis=1)

    def gated_add(self, x, added, gate, out):
        out[:self.T] = x[:self.T] + sigmoid(gate[:self.T]) * added[:self.T]

    def look_up(self, table, ids, out):
        out[:self.T] = table.values[np.maximum(self.step.token_ids, 0)]

    def layer_inputs(self, projected, rows, weight, eps, out):
        P, half = len(weight), np.float32(0.5)
        for c in range(0, out.shape[1], P):
            normed = rms_norm(np.ascontiguousarray(projected[:self.T, c:c + P]), weight, eps)
            out[:self.T, c:c + P] = normed * np.sqrt(half) + rows[:self.T, c:c + P] * np.sqrt(half * np.float32(P))

    def gate_input(self, gate, inputs, first, out):
        out[:self.T] = gelu_tanh(gate[:self.T]) * inputs[:self.T, first:first + gate.shape[1]]

    def sample(self, logits):
        if self.R and self.step.sampling:
            self.tokens = compiled.sample(logits[:self.R], self.step.sampling).tolist()


# ---- small models: a llama, one with every feature of nanochat checkpoints, one with experts and sinks, one with convolutions,
# two with delta rules: value heads next to their key heads, and alternating; three with Mamba-2 layers, one of them a rank's part; and
# one whose layers have inputs of their own and whose last two read the keys of the first, one with LayerNorms and learned positions

RULES = {"deltas": SimpleNamespace(size=4, key_heads=2, value_heads=6, key_size=16, value_size=80, alternating=False, gates_by_key=True, heads_by_key=True),
         "alternating deltas": SimpleNamespace(size=3, key_heads=3, value_heads=6, key_size=32, value_size=16, alternating=True, gates_by_key=False,
                                               heads_by_key=False)}
MAMBAS = {"mamba": SimpleNamespace(size=4, heads=4, head_size=80, state_size=12, groups=2, taps_bias=True, of_heads=0, first_head=0),
          "narrow mamba": SimpleNamespace(size=2, heads=6, head_size=16, state_size=8, groups=3, taps_bias=False, of_heads=0, first_head=0),
          "part of a mamba": SimpleNamespace(size=3, heads=4, head_size=48, state_size=8, groups=2, taps_bias=True, of_heads=12, first_head=4)}


def shapes_of(mixer):
    """Of a delta rule or a Mamba layer: the columns of its x and out, its weights' sizes, and its states' shapes."""
    if "key_heads" in vars(mixer):
        H, width = mixer.value_heads, mixer.value_heads * mixer.value_size
        channels, columns = 2 * mixer.key_heads * mixer.key_size + width, 2 * H
        own, state = {"mix_norm": mixer.value_size}, (H, mixer.key_size, mixer.value_size)
    else:
        H, width = mixer.heads, mixer.heads * mixer.head_size
        channels, columns = width + 2 * mixer.groups * mixer.state_size, H
        own, state = {"skip": H, "mix_norm": width} | ({"taps_bias": channels} if mixer.taps_bias else {}), (H, mixer.state_size, mixer.head_size)
    return width + channels + columns, width, {"taps": mixer.size * channels, "decay": H, "dt_bias": H} | own, ((mixer.size - 1, channels), state)


class FileTable:
    """Rows of a file, of Q8_0: their bytes, and what they stand for."""

    kind = "q8_0"

    def __init__(self, rows, columns, generator):
        scales = (generator.random((rows, columns // 32, 1), np.float32) / 100).astype(np.float16)
        codes = generator.integers(-127, 128, (rows, columns // 32, 32), np.int8)
        self.table = np.concatenate((scales.view(np.uint8), codes.view(np.uint8)), 2).reshape(rows, -1)
        self.values = (scales.astype(np.float32) * codes).reshape(rows, columns)


class Model:
    P = 32                      # columns of a layer's own input

    def __init__(self, name, seed=0):
        self.name, generator = name, np.random.default_rng(seed)
        self.E = 12 if name == "groups" else 7      # experts
        self.H, self.Hkv, self.D, self.C, self.F, self.V = (3, 3, 32, 96, 128, 163) if name == "nanochat" else (4, 2, 16, 64, 96, 320)
        kind, self.arena = "bf16" if name == "nanochat" else "q4_1", compiled.Arena(1 << 20)
        qkv = (self.H + 2 * self.Hkv) * self.D
        shapes = {"qkv": (qkv, self.C), "output": (self.C, self.H * self.D), "down": (self.C, self.F)}
        if name == "convolutions":
            shapes["mix_in"], shapes["mix_out"] = (3 * self.C, self.C), (self.C, self.C)
        mixed, mixer = 3 * self.C, self.C
        if rule := (RULES | MAMBAS).get(name):
            mixed, mixer, weights_sizes, states = shapes_of(rule)
            shapes |= {"mix_in": (mixed, self.C), "mix_out": (self.C, mixer)}
        if name == "layer norms":
            shapes |= {"head_gates": (self.H, self.C), "gates": (self.H * self.D, self.C)}
        if name in RULES:
            shapes |= {"qkv": (qkv + self.H * self.D, self.C), "share": (1, self.C)}
        shapes |= {"up": (self.F if name == "nanochat" else 2 * self.F, self.C)}
        if name == "inputs":
            shapes |= {"gate_in": (self.P, self.C), "gate_out": (self.C, self.P), "queries": (self.H * self.D, self.C), "project": (3 * self.P, self.C)}
        if name in ("experts", "groups"):
            halves = 2 if name == "experts" else 1
            shapes |= {"router": (self.E, self.C), "up": (self.E * halves * self.F, self.C), "down": (self.E * self.C, self.F)}
        self.layers = [{key: self.matrix(kind, shape, generator) for key, shape in shapes.items()} for _ in range(3)]
        self.head = self.matrix("bf16" if name == "nanochat" else "q8_0", (self.V, self.C), generator)
        normal = lambda *shape: generator.standard_normal(shape, np.float32)
        self.sinks, self.biases = normal(self.H), [normal(self.layers[0][key].rows) / 4 for key in ("up", "down")]
        self.norm, self.bias, self.table, self.gate = 1 + normal(self.C) / 8, normal(qkv) / 8, normal(self.V, self.C), normal(1, 24)
        self.values, self.ve_gate = normal(self.V, self.Hkv * self.D).astype(np.float16), self.matrix("f32", (self.Hkv, 12), generator)
        angles = np.outer(np.arange(PAGES * PAGE), 100.0 ** -(np.arange(self.D // 2) / self.D))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.routers = {}, {"sigmoids": True, "correction_bias": normal(self.E) / 4}, {"scales": 1 + normal(self.E) / 4, "jitter": 0.3}
        if name == "groups":
            self.routers = [{"sigmoids": True, "correction_bias": normal(self.E) / 4, "groups": groups, "share_scale": 2.5} for groups in ((4, 2), (3, 1))]
            self.routers.append({"correction_bias": normal(self.E) / 4, "share_scale": 2.5})
        self.taps, self.conv_bias = {l: normal(size * self.C) for l, size in ((0, 3), (2, 5))}, normal(self.C)
        self.file = FileTable(self.V, 3 * self.P, generator)
        self.positions, self.norm_bias = normal(PAGES * PAGE, self.C), normal(self.C)
        self.growth = 1 + np.abs(normal(PAGES * PAGE))
        if rule:
            self.rule, self.rules = rule, [{key: normal(size) for key, size in weights_sizes.items()} for _ in range(2)]
            for weights in self.rules:
                weights["decay"] = -np.exp(weights["decay"])
        kept = dict.fromkeys((0, 2), states) if rule else {0: ((2, self.C),), 2: ((4, self.C),)}
        self.states = lambda: {l: tuple(np.ones((SLOTS, *shape), np.float32) for shape in own) for l, own in kept.items()}
        sizes = {"mixed": mixed, "mixer": mixer, "unnormed": mixer, "squares": 16, "gated": qkv + self.H * self.D, "gates": self.H * self.D, "head_gates": self.H, "share": 1, "x": self.C, "normed": self.C, "x0": self.C, "middle": self.C, "previous": self.C, "qkv": qkv, "q": self.H * self.D, "attended": self.H * self.D,
                 "queries": self.H * self.D,
                 "projected": 3 * self.P, "rows": 3 * self.P, "input": self.P, "hidden": self.F, "routing": self.E, "value": self.Hkv * self.D, "strength": self.Hkv}
        self.buffers = lambda: SimpleNamespace(
            **{key: np.full((MAX_TOKENS, columns), np.nan, np.float32) for key, columns in sizes.items()},
            states=self.states(), last=np.full((MAX_ROWS, self.C), np.nan, np.float32), logits=np.full((MAX_ROWS, self.V), np.nan, np.float32))
        self.make_cache = lambda: np.zeros((len(self.layers), PAGES, self.Hkv, 2, PAGE * self.D), np.float16)

    def matrix(self, kind, shape, generator):
        matrix = compiled.Matrix(self.arena, kind, *shape)
        if kind == "q4_1":
            d = (generator.random((*shape[:1], shape[1] // 32, 1), np.float32) / 40).astype(np.float16)
            parts = [d.view(np.uint8), (-7.5 * d).astype(np.float16).view(np.uint8), generator.integers(0, 256, (*d.shape[:2], 16), np.uint8)]
            matrix.fill(np.ascontiguousarray(np.concatenate(parts, 2).reshape(shape[0], -1)), kind)
        else:
            matrix.fill(generator.standard_normal(shape, np.float32) / 8, "f32")
        return matrix

    def forward(self, k, b, cache):
        """The ops of a step, called on `k`: a Program that records them or an Eager that runs them."""
        {"nanochat": self.nanochat, "inputs": self.inputs, "layer norms": self.layer_norms}.get(self.name, self.llama)(k, b, cache)
        k.sample(b.logits)

    def llama(self, k, b, cache):
        k.embed(self.head, k.token_ids, b.x)
        for l, (layer, pages) in enumerate(zip(self.layers, cache)):
            if "mix_in" in layer and l in self.taps:                # the last layer too, whose rows are all needed up to here
                k.linear(b.x, layer["mix_in"], b.mixed, norm=(self.norm, 1e-5))
                if self.name == "convolutions":
                    k.short_conv(b.mixed, self.taps[l], b.states[l], k.sequences, b.mixer, bias=self.conv_bias if l else None)
                else:
                    op, shared = k.delta_rule if self.name in RULES else k.mamba2, getattr(self.rule, "of_heads", 0)
                    op(b.mixed, self.rules[l // 2], self.rule, 1e-5, b.states[l], k.sequences, b.unnormed if shared else b.mixer)
                    if shared:
                        k.group_squares(b.unnormed, self.rule, b.squares)
                        k.norm_groups(b.unnormed, self.rules[l // 2]["mix_norm"], b.squares, self.rule, 1e-5, b.mixer)
                k.linear(b.mixer, layer["mix_out"], b.x, residual=b.x)
                k.linear(b.x, layer["up"], b.hidden, norm=(self.norm, 1e-5), activation="swiglu")
                k.linear(b.hidden, layer["down"], b.x, residual=b.x)
                continue
            if self.name in RULES:
                self.gated(k, b, layer, pages)
                continue
            k.linear(b.x, layer["qkv"], b.qkv, norm=(self.norm, 1e-5), bias=self.bias)
            k.rope_append(b.qkv, self.cos, self.sin, k.positions, k.slots, pages, b.q)
            if self.name in ("experts", "groups"):
                k.paged_attention(b.q, pages, k.attention, 20 if layer is self.layers[1] else 0, b.attended, sinks=self.sinks)
                k.linear(b.attended, layer["output"], b.x, residual=b.x)
                k.linear(b.x, layer["router"], b.routing, norm=(self.norm, 1e-5))
                k.experts(b.x, b.routing, layer["up"], layer["down"], b.x, norm=None if l == 2 else (self.norm, 1e-5), biases=self.biases,
                          activation="clamped_swiglu" if self.name == "experts" else "relu2", chosen=3,
                          sum_to_one=l == 0 or l == 1 and self.name == "experts", residual=self.name == "experts" or l < 2, **self.routers[l])
                continue
            k.paged_attention(b.q, pages, k.attention, 0, b.attended)
            k.linear(b.attended, layer["output"], b.x, residual=b.x)
            k.linear(b.x, layer["up"], b.hidden, norm=(self.norm, 1e-5), activation="swiglu")
            k.linear(b.hidden, layer["down"], b.x, residual=b.x)
        k.gather_rows(b.x, k.logit_rows, b.last)
        k.linear(b.last, self.head, b.logits, norm=(self.norm, 1e-5))

    def gated(self, k, b, layer, pages):
        """Attention whose outputs have gates and a feed-forward part that has one, heads turned by a quarter."""
        quarter = self.D // 8
        k.linear(b.x, layer["qkv"], b.gated, norm=(self.norm, 1e-5))
        k.split_gates(b.gated, self.D, gates=b.gates, out=b.qkv)
        k.rope_append(b.qkv, np.ascontiguousarray(self.cos[:, :quarter]), np.ascontiguousarray(self.sin[:, :quarter]), k.positions, k.slots, pages, b.q)
        k.paged_attention(b.q, pages, k.attention, 0, b.attended)
        k.gate(b.attended, b.gates, out=b.attended)
        k.linear(b.attended, layer["output"], b.x, residual=b.x)
        k.linear(b.x, layer["up"], b.hidden, norm=(self.norm, 1e-5), activation="swiglu")
        k.linear(b.hidden, layer["down"], b.previous)
        k.linear(b.x, layer["share"], b.share, norm=(self.norm, 1e-5))
        k.gated_add(b.x, b.previous, b.share, out=b.x)

    def inputs(self, k, b, cache):
        k.embed(self.head, k.token_ids, b.x)
        k.linear(b.x, self.layers[0]["project"], b.projected)
        k.look_up(self.file, k.token_ids, b.rows)
        k.layer_inputs(b.projected, b.rows, self.norm[:self.P], 1e-5, b.projected)
        k.copy(b.x, b.x0)
        for l, layer in enumerate(self.layers):
            k.linear(b.x, layer["qkv" if l == 0 else "queries"], b.qkv if l == 0 else b.queries, norm=(self.norm, 1e-5))
            k.rope_append(b.qkv if l == 0 else b.queries, self.cos, self.sin, k.positions, k.slots, cache[0], b.q, norm="before_rope", value_norm=True)
            k.paged_attention(b.q, cache[0], k.attention, (0, 40, 0)[l], b.attended)
            k.linear(b.attended, layer["output"], b.x, residual=b.x)
            k.linear(b.x, layer["up"], b.hidden, norm=(self.norm, 1e-5), activation="geglu")
            k.linear(b.hidden, layer["down"], b.x, residual=b.x)
            k.linear(b.x, layer["gate_in"], b.input)
            k.gate_input(b.input, b.projected, l * self.P, b.input)
            k.linear(b.input, layer["gate_out"], b.previous)
            k.rms_norm(b.previous, self.norm, 1e-5, b.previous)
            k.mix(b.x, b.previous, 1.0, 1.0, b.x)
        k.embed(self.table, k.previous_token_ids, b.previous)       # which ids a row has is known to the end
        k.smear(b.x, b.previous, k.previous_token_ids, self.gate, 0.4, b.x)
        k.mix(b.x, b.x0, 1.0, 0.5, b.x)
        k.gather_rows(b.x, k.logit_rows, b.last)
        k.linear(b.last, self.head, b.logits, norm=(self.norm, 1e-5))

    def layer_norms(self, k, b, cache):
        k.embed(self.head, k.token_ids, b.x)
        k.embed(self.positions, k.positions, b.previous)
        k.mix(b.x, b.previous, 1.0, 1.0, b.x)
        for l, (layer, pages) in enumerate(zip(self.layers, cache)):    # both parts read x: of one norm, of two
            k.layer_norm(b.x, self.norm if l else None, self.norm_bias if l else None, 1e-5, b.normed)
            k.linear(b.normed, layer["qkv"], b.qkv, bias=self.bias)
            if l == 1:
                norms = np.resize(self.norm, self.H * self.D), np.resize(self.norm, self.Hkv * self.D)
                k.mean_squares(b.qkv, *norms, (self.H * self.D, self.Hkv * self.D), b.squares)
                k.norm_qk(b.qkv, *norms, b.squares, 1e-5, b.qkv)
            if l == 2:
                norms = np.resize(self.norm, self.H * self.D), np.resize(self.norm[3:], self.Hkv * self.D)
                k.norm_heads(b.qkv, *norms, self.D, 1e-5, b.qkv)
            k.rope_append(b.qkv, self.cos, self.sin, k.positions, k.slots, pages, b.q)
            k.scale_rows(b.q, self.growth, k.positions, b.q)
            k.paged_attention(b.q, pages, k.attention, 0, b.attended)
            if l:
                gates, activation = (b.head_gates, "softplus") if l == 1 else (b.gates, "sigmoid")
                k.linear(b.normed, layer["head_gates" if l == 1 else "gates"], gates)
                k.gate(b.attended, gates, b.attended, activation=activation)
            k.linear(b.attended, layer["output"], b.x0, residual=b.x)
            if l != 1:
                k.layer_norm(b.x, self.norm, self.norm_bias, 1e-5, b.normed)
            k.linear(b.normed, layer["up"], b.hidden, activation="swiglu")
            k.linear(b.hidden, layer["down"], b.x, residual=b.x0)
        k.gather_rows(b.x, k.logit_rows, b.last)
        k.layer_norm(b.last, self.norm, self.norm_bias, 1e-5, b.last)
        k.linear(b.last, self.head, b.logits)

    def nanochat(self, k, b, cache):
        k.embed(self.table, k.token_ids, b.x)
        k.rms_norm(b.x, None, 1e-6, b.x)
        k.embed(self.table, k.previous_token_ids, b.previous)
        k.rms_norm(b.previous, self.norm, 1e-6, b.previous)
        k.smear(b.x, b.previous, k.previous_token_ids, self.gate, 0.4, b.x)
        k.copy(b.x, b.x0)
        for l, (layer, pages) in enumerate(zip(self.layers, cache)):
            k.mix(b.x, b.x0, 0.9, np.float32(0.2), b.x)
            k.linear(b.x, layer["qkv"], b.qkv, norm=(None, 1e-6))
            k.embed(self.values, k.token_ids, b.value)
            k.linear(b.x, self.ve_gate, b.strength, norm=(None, 1e-6))
            k.rope_append(b.qkv, self.cos, self.sin, k.positions, k.slots, pages, b.q, norm="after_rope", post_scale=1.2,
                          value_embed=b.value, gate=b.strength, gate_scale=3.0)
            k.paged_attention(b.q, pages, k.attention, (20, 0, 33)[l], b.attended, softcap=(0.0, 1.5, 0.0)[l])
            k.linear(b.attended, layer["output"], b.x, residual=b.x)
            k.linear(b.x, layer["up"], b.hidden, norm=(None, 1e-6), activation="relu2")
            k.linear(b.hidden, layer["down"], b.x, residual=b.x)
            if l == 1:
                k.copy(b.x, b.middle)
        k.backout(b.x, b.middle, 0.3, b.x)
        k.gather_rows(b.x, k.logit_rows, b.last)
        k.rms_norm(b.last, None, 1e-6, b.last)
        k.linear(b.last, self.head, b.logits)
        k.softcap(b.logits, 2.0, b.logits)


MODELS = {name: Model(name) for name in ("llama", "nanochat", "experts", "groups", "inputs", "layer norms", "convolutions", *RULES, *MAMBAS)}


class Recorded:
    """A Program of the model and its own cache."""

    def __init__(self, name, model=None):
        self.model, self.program = model or MODELS[name], compiled.Program(MAX_TOKENS, MAX_ROWS)
        self.buffers, self.cache = self.model.buffers(), self.model.make_cache()
        self.model.forward(self.program, self.buffers, self.cache)

    def start(self, step):
        return self.program.start(step.token_ids, step.previous, step.starts, step.lengths, step.tables, step.logit_rows, step.sampling,
                                  states=step.states)

    def run(self, step):
        return self.program.finish(self.start(step))


def test_a_buffer_is_read_only_when_it_is_ready():
    """A buffer is read only once an op has written it, and while no other rank may have it."""
    buffers, x = Buffers(max_tokens=8, max_rows=2), np.zeros((8, 16), np.float32)
    with pytest.raises(ValueError, match="x: no op has written it yet"):
        buffers.read("x", x)
    at = buffers.written("x", x, TOKENS)
    assert at == (x.ctypes.data, 16) and buffers.read("x", x) == (at, TOKENS)
    with pytest.raises(ValueError, match="x: holds rows of max_tokens already"):
        buffers.written("x", x[:2], LOGIT_ROWS)
    buffers.lose(at)
    with pytest.raises(ValueError, match="x: the other ranks have it"):
        buffers.read("x", x)
    buffers.written("x", x, TOKENS)
    assert buffers.read_like("x", x, TOKENS, 16) == at


def sampling(model, rows, position, seed=1):
    params = SimpleNamespace(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
                             repetition_penalty=1.0, logit_bias=((3, 0.5),), seed=seed, choice=0)
    return compiled.SampleBatch([SimpleNamespace(params=params, position=position + i, tokens=[], prompt_tokens=0) for i in range(rows)], model.V)


def make_step(model, sequences, logit_rows, seed, samples=True):
    """sequences: [(positions before, new tokens)]; sequence i has the pages from i * 8."""
    generator = np.random.default_rng(seed)
    starts = [0, *np.cumsum([new for _, new in sequences]).tolist()]
    T = starts[-1]
    ids = generator.integers(0, model.V, T + 1).tolist()
    previous = [-1 if before + i == 0 else ids[start + i] for (before, new), start in zip(sequences, starts) for i in range(new)]
    tables = [[(i * 8 + 5 * p) % PAGES for p in range(-(-(before + new) // PAGE))] for i, (before, new) in enumerate(sequences)]
    rows = {"none": [], "one": [T - 1], "all": list(range(T))[::-1]}[logit_rows]
    return SimpleNamespace(token_ids=ids[1:], previous=previous, starts=starts, lengths=[b + n for b, n in sequences], tables=tables,
                           logit_rows=rows, sampling=sampling(model, len(rows), 7, seed) if rows and samples else None,
                           states=states_of(starts, generator))


def states_of(starts, generator):
    """Each sequence's state is read from a slot and written, after its last row and another, there or elsewhere."""
    own = generator.permutation(SLOTS)[:2 * (len(starts) - 1)].reshape(-1, 2).tolist()
    rows = [(row, slot) for (read, other), begin, end in zip(own, starts, starts[1:])
            for row, slot in [((begin + end) // 2, other)] * (end > begin + 1) + [(end - 1, read)]]
    return [read for read, _ in own], [row for row, _ in rows], [slot for _, slot in rows]


def run_eagerly(model, step, buffers, cache):
    eager = Eager(step, model.H, model.Hkv)
    model.forward(eager, buffers, cache)
    return eager.tokens


MIXES = {                       # T tokens: those of the sequences, repeated as needed
    1: [(0, 1)],
    2: [(5, 1), (40, 1)],
    5: [(31, 1), (3, 1), (0, 3)],
    21: [(90, 1), (17, 1), (0, 19)],        # rows divided on two threads, products on four
    33: [(90, 1), (17, 1), (0, 31)],
    100: [(100, 1), (2, 1), (0, 81), (16, 17)],
}
# (threads, forced width, take others' chunks first[, repeat at once what another thread is doing])
SCHEDULES = [(1, 0, False), (2, 0, False), (2, 2, True), (2, 1, False), (4, 4, False), (4, 4, True), (4, 3, False), (2, 2, False, 0), (4, 4, True, 0),
             (16, 16, False), (16, 16, True, 0)]


@pytest.mark.parametrize("logit_rows", by_day(["none", "one", "all"], "one"))
@pytest.mark.parametrize("tokens", by_day(MIXES, 5, 21, 33))
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_bits_of_its_ops_one_by_one(name, tokens, logit_rows):
    model, recorded = MODELS[name], Recorded(name)
    buffers, cache = model.buffers(), model.make_cache()
    rounds = [*enumerate(SCHEDULES if SHARE > 0.05 else SCHEDULES[1::3])]          # few under the sanitizers
    if SHARE < 1:                                           # by day each number of tokens meets each schedule with a third of the models
        rounds = rounds[([*MODELS].index(name) + [*MIXES].index(tokens)) % 3::3]
    for round, (threads, *schedule) in rounds:
        compiled.set_isa(ISAS[round % len(ISAS)])
        step = make_step(model, MIXES[tokens], logit_rows, seed=round)
        compiled.set_threads(1)
        expected = run_eagerly(model, step, buffers, cache)
        compiled.set_threads(threads)
        _core.force_schedule(*schedule)
        assert recorded.run(step) == expected
        R = len(step.logit_rows)
        assert np.array_equal(recorded.buffers.logits[:R].view(np.int32), buffers.logits[:R].view(np.int32))
        # the last layer's other rows are not read: those with logits lie before them, in their order
        x, expected_x = recorded.buffers.x[np.searchsorted(np.unique(step.logit_rows), step.logit_rows)], buffers.x[step.logit_rows]
        assert np.array_equal(x.view(np.int32), expected_x.view(np.int32))
        assert np.array_equal(recorded.cache.view(np.uint16), cache.view(np.uint16))
        assert all(np.array_equal(*states) for l in buffers.states for states in zip(recorded.buffers.states[l], buffers.states[l]))
        assert np.isnan(recorded.buffers.x[tokens:]).all() and np.isnan(recorded.buffers.logits[R:]).all()


@pytest.mark.parametrize("isa", SOME_ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_bits_of_record(name, isa):
    model = Model(name, exact(5))
    model.cos, model.sin = (exact(6).standard_normal(model.cos.shape, np.float32) for _ in range(2))       # numpy's are libm's
    for weights in getattr(model, "rules", ()):
        weights["decay"] = -np.abs(exact(7).standard_normal(weights["decay"].shape, np.float32))
    compiled.set_isa(isa)
    recorded, made = Recorded(name, model), []
    for turn, mix in enumerate((33, 5, 1)):
        step = make_step(model, MIXES[mix], "all", exact(turn), samples=False)
        step.sampling = sampling(model, len(step.logit_rows), 7)
        made += [recorded.run(step), recorded.buffers.logits[:len(step.logit_rows)].copy()]
    agree(f"step {name}", *made, recorded.cache, *(state for states in recorded.buffers.states.values() for state in states))


@pytest.mark.parametrize("states, words", [
    (([], [], []), "state_reads: must be a slot for each of lengths"), (([SLOTS], [0], [1]), "state_reads: must be a slot"),
    (([-1], [0], [1]), "state_reads: must be a slot"), (([0], [0], []), "write_slots: must be a slot for each of write_rows"),
    (([0], [0], [SLOTS]), "write_slots: must be a slot"), (([0], [1, 0], [1, 2]), "write_rows: must be rows of the step, ascending"),
    (([0], [3], [1]), "write_rows: must be rows of the step"), (("0", [], []), "state_reads: a list of integers")])
def test_a_wrong_slot_is_an_error_without_effect(states, words):
    recorded = Recorded("convolutions")
    step = make_step(recorded.model, [(4, 3)], "one", seed=1)
    good, step.states = step.states, states
    with pytest.raises(ValueError, match=words):
        recorded.run(step)
    assert all((state == 1).all() for [state] in recorded.buffers.states.values())
    step.states = good
    assert len(recorded.run(step)) == 1


@pytest.mark.parametrize("change, words", [
    (dict(states=(np.ones((4, 2, 40), np.float32),)), "a third of x's columns"), (dict(states=(np.ones((4, 0, 16), np.float32),)), "states: must be"),
    (dict(states=(np.ones((4, 64, 16), np.float32),)), "states: must be"), (dict(states=(np.ones((4, 2, 16)),)), "states: must be float32"),
    (dict(taps=np.ones(47, np.float32)), "taps: must have the shape"), (dict(bias=np.ones(15, np.float32)), "bias: must have the shape"),
    (dict(sequences="sequences"), "sequences: must be <program.sequences>"), (dict(out=np.ones((8, 32), np.float32)), "out: must have the shape")])
def test_a_wrong_short_convolution_is_an_error(change, words):
    program, x = compiled.Program(8, 2), np.zeros((8, 48), np.float32)
    program.embed(np.zeros((3, 48), np.float32), program.token_ids, x)
    good = dict(x=x, taps=np.ones(48, np.float32), states=(np.ones((4, 2, 16), np.float32),), sequences=program.sequences, out=np.ones((8, 16), np.float32))
    with pytest.raises(ValueError, match=words):
        program.short_conv(**good | change)
    program.short_conv(**good)


@pytest.mark.parametrize("change, words", [
    (dict(size=1), "mixer: must have 2 to 64 taps"), (dict(value_heads=5), "value heads a multiple of key heads"), (dict(value_size=24), "multiples of 16"),
    (dict(states=(np.ones((4, 3, 128), np.float32), np.ones((5, 4, 16, 16), np.float32))), "states: must have the shape"),
    (dict(states=(np.ones((4, 3, 112), np.float32), np.ones((4, 4, 16, 16), np.float32))), "states: must have the shape"),
    (dict(states=(np.ones((0, 3, 128), np.float32), np.ones((0, 4, 16, 16), np.float32))), "states have a slot"),
    (dict(decay=np.ones(5, np.float32)), "decay: must have the shape"), (dict(mix_norm=np.ones(64, np.float32)), "mix_norm: must have the shape"),
    (dict(x=np.zeros((8, 208), np.float32)), "x: no op has written it"), (dict(sequences="sequences"), "sequences: must be <program.sequences>"),
    (dict(out=np.ones((8, 32), np.float32)), "out: must have the shape")])
def test_a_wrong_delta_rule_is_a_value_error(change, words):
    program, x = compiled.Program(8, 2), np.zeros((8, 200), np.float32)
    program.embed(np.zeros((3, 200), np.float32), program.token_ids, x)
    mixer = dict(size=4, key_heads=2, value_heads=4, key_size=16, value_size=16, alternating=False, gates_by_key=False, heads_by_key=False)
    weights = dict(taps=np.ones(512, np.float32), decay=np.ones(4, np.float32), dt_bias=np.ones(4, np.float32), mix_norm=np.ones(16, np.float32))
    good = dict(x=x, eps=1e-5, states=(np.ones((4, 3, 128), np.float32), np.ones((4, 4, 16, 16), np.float32)), sequences=program.sequences,
                out=np.ones((8, 64), np.float32))
    of = lambda names: names | {key: value for key, value in change.items() if key in names}       # noqa: E731
    with pytest.raises(ValueError, match=words):
        program.delta_rule(**of(good), weights=of(weights), mixer=SimpleNamespace(**of(mixer)))
    program.delta_rule(**good, weights=weights, mixer=SimpleNamespace(**mixer))


@pytest.mark.parametrize("op, change, words", [
    ("split_gates", dict(head_size=24), "gates: must have a multiple of 24 columns"), ("split_gates", dict(gates=np.ones((8, 48), np.float32)), "more than twice as many"),
    ("split_gates", dict(out=np.ones((8, 32), np.float32)), "out: must have the shape"),
    ("gate", dict(gates=np.ones((8, 80), np.float32)), "gates: no op has written it"), ("gate", dict(out=np.ones((8, 64), np.float32)), "out: must have the shape"),
    ("gated_add", dict(gate="x"), "gate: must be .max_tokens = 8, 1."), ("gated_add", dict(added="gate"), "added: must be .max_tokens = 8, 80.")])
def test_wrong_gates_are_value_errors(op, change, words):
    program, made = compiled.Program(8, 2), {"x": np.zeros((8, 80), np.float32), "gate": np.zeros((8, 1), np.float32)}
    for array in made.values():
        program.embed(np.zeros((3, array.shape[1]), np.float32), program.token_ids, array)
    good = {"split_gates": dict(x="x", head_size=16, gates=np.ones((8, 32), np.float32), out=np.ones((8, 48), np.float32)),
            "gate": dict(x="x", gates="x", out=np.ones((8, 80), np.float32)), "gated_add": dict(x="x", added="x", gate="gate", out=np.ones((8, 80), np.float32))}[op]
    real = lambda options: {key: made.get(value, value) if isinstance(value, str) else value for key, value in options.items()}        # noqa: E731
    with pytest.raises(ValueError, match=words):
        getattr(program, op)(**real(good | change))
    getattr(program, op)(**real(good))


def without(weights, name):
    return {"weights": {key: np.ones(len(weight) - (key == name), np.float32) for key, weight in weights.items()}}


@pytest.mark.parametrize("rows", [33, 65, 97])
def test_a_last_row_finds_its_tile_s_state(rows):
    """As in Qwen3.5, whose heads are 128 wide: a row that is a step's only one of a sequence reads its state otherwise."""
    rule = SimpleNamespace(size=4, key_heads=1, value_heads=2, key_size=16, value_size=128, alternating=False, gates_by_key=False, heads_by_key=False)
    mixed, width, sizes, shapes = shapes_of(rule)
    generator, program = np.random.default_rng(3), compiled.Program(MAX_TOKENS, 1)
    normal = lambda *shape: generator.standard_normal(shape, np.float32)        # noqa: E731
    x, out, states = np.zeros((MAX_TOKENS, mixed), np.float32), np.zeros((MAX_TOKENS, width), np.float32), [np.zeros((3, *shape), np.float32) for shape in shapes]
    program.embed(normal(rows, mixed), program.token_ids, x)
    weights = {key: normal(size) for key, size in sizes.items()}
    program.delta_rule(x, weights | {"decay": -np.exp(weights["decay"])}, rule, 1e-5, states, program.sequences, out)

    def step(begin, end, slot):
        new = end - begin
        program.finish(program.start([*range(begin, end)], [0] * new, [0, new], [end], [[*range(8)]], [], states=([slot], [new - 1], [slot])))
        return out[:new].copy()

    whole = step(0, rows, 1)
    assert np.array_equal(whole, np.concatenate((step(0, rows - 1, 2), step(rows - 1, rows, 2))))
    assert all(np.array_equal(state[1], state[2]) for state in states)


@pytest.mark.parametrize("name", ["mamba", "narrow mamba"])
def test_a_wrong_mamba_layer_is_a_value_error(name):
    mixer, program = MAMBAS[name], compiled.Program(8, 2)
    mixed, width, sizes, shapes = shapes_of(mixer)
    x, weights = np.zeros((8, mixed), np.float32), {key: np.ones(size, np.float32) for key, size in sizes.items()}
    program.embed(np.zeros((3, mixed), np.float32), program.token_ids, x)
    good = dict(x=x, weights=weights, mixer=mixer, eps=1e-5, states=tuple(np.ones((4, *shape), np.float32) for shape in shapes),
                sequences=program.sequences, out=np.ones((8, width), np.float32))
    changed = lambda **values: {"mixer": SimpleNamespace(**vars(mixer) | values)}       # noqa: E731
    past, S = good["states"]
    wrong = [(changed(size=1), "mixer: must have 2 to 64 taps"), (changed(size=65), "mixer: must"), (changed(head_size=24), "mixer: must"),
             (changed(state_size=mixer.state_size + 1), "mixer: must"), (changed(groups=5), "mixer: must"), (changed(groups=0), "mixer: must"),
             (changed(of_heads=2 * mixer.heads, first_head=mixer.heads + 1), "mixer: must"),
             ({"states": (past, S[:, :1])}, "states: must have the shape"), ({"states": (past[:, :, :16], S)}, "states: must have the shape"),
             ({"states": (past, S[:3])}, "states: must have the shape"), ({"states": (past[:0], S[:0])}, "states have a slot"),
             ({"sequences": "sequences"}, "sequences: must be <program.sequences>"), ({"out": x}, "out: must have the shape"),
             *((without(weights, key), f"{key}: must have the shape") for key in sizes)]
    for change, words in wrong:
        with pytest.raises(ValueError, match=words):
            program.mamba2(**good | change)
    program.mamba2(**good)
    assert program.describe()[1:] == ["convolve" + " bias" * mixer.taps_bias, "mamba2", "rms_norm"]


def test_wrong_mamba_groups_are_a_value_error():
    """Wrong groups of a part of a Mamba layer are a value error."""
    mixer, program = MAMBAS["part of a mamba"], compiled.Program(8, 2)
    x, squares, out = (np.zeros((8, columns), np.float32) for columns in (192, 16, 192))
    program.embed(np.zeros((3, 192), np.float32), program.token_ids, x)
    weight, changed = np.ones(192, np.float32), lambda **values: SimpleNamespace(**vars(mixer) | values)      # noqa: E731
    for given, into, words in ((changed(heads=3), squares, "x: must be"), (changed(first_head=9), squares, "x: must be"),
                               (changed(groups=5), squares, "x: must be"), (mixer, squares[:, :1].copy(), "out: must have at least 2 columns")):
        with pytest.raises(ValueError, match=words):
            program.group_squares(x, given, into)
    program.group_squares(x, mixer, squares)
    for changes, words in ({"weight": weight[:16]}, "weight: must"), ({"squares": x[:, :1].copy()}, "squares: no op"), ({"out": squares}, "out: must"):
        with pytest.raises(ValueError, match=words):
            program.norm_groups(**dict(x=x, weight=weight, squares=squares, mixer=mixer, eps=1e-5, out=out) | changes)
    program.norm_groups(x, weight, squares, mixer, 1e-5, out)
    assert program.describe()[1:] == ["group_squares", "norm_groups"]


def run_thousands(name, threads, *schedule):
    """Steps of changing shapes; each must give the tokens and logits of one thread."""
    model, recorded = MODELS[name], Recorded(name)
    shapes = [MIXES[1], MIXES[2], MIXES[5], MIXES[33], [(0, 4)], [(9, 1)] * 6]
    steps = [make_step(model, shape, "all", seed) for seed, shape in enumerate(shapes)]
    compiled.set_threads(1)
    expected = []
    # each with the cache that the previous one left; it settles layer by layer
    for step in steps * 4:
        recorded.run(step)
    for step in steps:
        expected.append((recorded.run(step), recorded.buffers.logits[:len(step.logit_rows)].copy()))
    compiled.set_threads(threads)
    _core.force_schedule(*schedule)
    for n in range(int((2500 if name == "llama" else 600) * SHARE)):
        step, (tokens, logits) = steps[n % len(steps)], expected[n % len(steps)]
        assert recorded.run(step) == tokens
        assert n % 50 or np.array_equal(recorded.buffers.logits[:len(tokens)], logits)


@pytest.mark.parametrize("schedule", [("llama", 2, 0, False), ("llama", 2, 2, True), ("llama", 4, 4, False), ("llama", 3, 2, False),
                                      ("experts", 2, 2, True), ("experts", 4, 4, False)])
def test_thousands_of_steps_give_the_first_tokens(schedule):
    """Thousands of steps of changing shapes give the same tokens as the first time."""
    run_thousands(*schedule)


def run_until_chunks_were_done_again(*schedule):
    for _ in range(200):                    # usually one is enough
        run_thousands(*schedule)            # with a new pool
        if _core.redone_chunks():
            return
    raise AssertionError("no chunk was ever done again")


@pytest.mark.parametrize("schedule", [("llama", 2, 2, False, 0), ("llama", 4, 4, True, 0), ("experts", 2, 2, False, 0)])
def test_a_chunk_done_by_two_threads_counts_once(schedule):
    run_until_chunks_were_done_again(*schedule)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="stops a single thread with a signal")
def test_steps_go_on_without_stopped_threads():
    """Steps go on without threads that are stopped in the middle of a chunk."""
    libc, pid, number, done = ctypes.CDLL(None), os.getpid(), signal.SIGRTMAX, threading.Event()
    threads = lambda: set(map(int, os.listdir("/proc/self/task")))                          # noqa: E731
    others, ours = threads(), threading.get_native_id()
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = libc.signal(number, ctypes.cast(libc.usleep, ctypes.c_void_p))                 # the handler gets the number: 64 us

    def stop_them():
        while not done.wait(1e-4):
            for thread in threads() - others - {ours, threading.get_native_id()}:
                libc.tgkill(pid, thread, number)

    stopping = threading.Thread(target=stop_them)
    stopping.start()
    try:
        run_until_chunks_were_done_again("llama", 2, 2, False)
    finally:
        done.set()
        stopping.join()
        libc.signal(number, ctypes.c_void_p(1))     # SIG_IGN drops the signals that a thread has yet to receive: the default ends us
        libc.signal(number, before)


def decode_alone(recorded, tables, prompts, count, pipelined):
    """Decode some sequences, step by step or (`pipelined`) with each step started before the previous one is
    finished."""
    model, N = recorded.model, len(prompts)
    tokens, started = [[] for _ in prompts], None
    for n in range(count):
        ids = [list(p) for p in prompts] if n == 0 else [[~i] if pipelined else [tokens[i][-1]] for i in range(N)]
        lengths = [len(p) + n for p in prompts]
        starts = [0, *np.cumsum([len(i) for i in ids]).tolist()]
        # the token before the newest is known even while the newest is not; a drafted one behind it would be -2 - i
        flat = [i for row in ids for i in row]
        before = [[-1, *p[:-1]] for p in prompts] if n == 0 else [[prompts[i][-1] if n == 1 else tokens[i][n - 2]] for i in range(N)]
        batch = sampling(model, N, 0)
        batch.positions[:] = lengths
        step = SimpleNamespace(token_ids=flat, previous=[i for row in before for i in row], starts=starts, lengths=lengths, tables=tables,
                               logit_rows=[end - 1 for end in starts[1:]], sampling=batch,
                               states=([*range(N)], [end - 1 for end in starts[1:]], [*range(N)]))       # where they are read
        ticket = recorded.start(step)
        if started is not None:
            for row, token in zip(tokens, recorded.program.finish(started)):
                row.append(token)
        started = ticket
        if not pipelined:
            for row, token in zip(tokens, recorded.program.finish(started)):
                row.append(token)
            started = None
    if started is not None:
        for row, token in zip(tokens, recorded.program.finish(started)):
            row.append(token)
    return tokens


@pytest.mark.parametrize("name, threads", by_day([(name, threads) for name in MODELS for threads in (1, 2)],
                                                 *((name, 1 + number % 2) for number, name in enumerate(MODELS))))
def test_a_step_may_take_ids_of_a_running_one(name, threads):
    """A step may take its ids from the one before, which still runs."""
    compiled.set_threads(threads)
    tables, prompts = [[1, 2, 3, 4], [9, 8, 7, 6], [20, 22, 21, 23]], [[5, 6, 7], [1], [4, 4, 4, 9, 11]]
    one_by_one = decode_alone(Recorded(name), tables, prompts, 40, pipelined=False)
    assert decode_alone(Recorded(name), tables, prompts, 40, pipelined=True) == one_by_one
    alone = decode_alone(Recorded(name), tables[1:2], prompts[1:2], 40, pipelined=True)
    # `sampling` draws row i at position + i: set each to its own length
    seeds_differ = one_by_one[1] != alone[0]
    assert not seeds_differ


def test_drafts_may_follow_a_token_being_drawn():
    model, recorded = MODELS["nanochat"], Recorded("nanochat")
    first = make_step(model, [(0, 4)], "one", seed=3)
    token, = recorded.run(first)
    step = lambda ids, previous: SimpleNamespace(token_ids=ids, previous=previous, starts=[0, 3], lengths=[7], tables=first.tables, states=first.states,
                                                 logit_rows=[0, 1, 2], sampling=sampling(model, 3, 4))
    expected = recorded.run(step([token, 11, 12], [first.token_ids[-1], token, 11]))
    logits = recorded.buffers.logits[:3].copy()
    one = recorded.start(first)
    two = recorded.start(step([~0, 11, 12], [first.token_ids[-1], -2 - 0, 11]))
    assert recorded.program.finish(one) == [token]
    assert recorded.program.finish(two) == expected and np.array_equal(recorded.buffers.logits[:3], logits)


def test_padding_disturbs_no_other_row():
    """Nor does a row that draws nothing."""
    model, recorded = MODELS["llama"], Recorded("llama")
    step = make_step(model, [(0, 1), (0, 1), (0, 2)], "all", seed=5)
    expected, cache = recorded.run(step), recorded.cache.copy()
    step.lengths[1], step.tables[1], step.sampling.positions[2] = 0, [], -1         # rows 3, 2, 1, 0 are asked for
    drawn = recorded.run(step)
    assert drawn[2] == -1 and [drawn[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
    assert np.array_equal(recorded.cache.view(np.uint16), cache.view(np.uint16))


# ---- what is refused

def good_step():
    return make_step(MODELS["llama"], [(3, 1), (0, 4)], "one", seed=0)


WRONG_STEPS = {
    "token_ids: must lie": {"token_ids": [320, 0, 0, 0, 0]},
    "token_ids: ~i": {"token_ids": [-1, 0, 0, 0, 0]},
    "token_ids: must be 1": {"token_ids": [], "previous": []},
    "token_ids: a list": {"token_ids": (1, 2)},
    "token_ids: a list of": {"token_ids": [1.5, 0, 0, 0, 0]},
    "previous: must be as many": {"previous": [1]},
    "previous: must lie": {"previous": [0, 0, 0, 0, 320]},
    "previous: -2 - i": {"previous": [-2, 0, 0, 0, 0]},
    "starts: must end": {"starts": [0, 1, 4]},
    "starts: one more": {"starts": [0, 5]},
    "starts: must not fall": {"starts": [0, 6, 5], "lengths": [6, 4]},
    "lengths: a sequence": {"lengths": [4, 3]},
    "lengths: must not pass": {"lengths": [2000, 4]},
    "tables: too few": {"lengths": [50, 4]},
    "tables: each page": {"tables": [[64], [1]]},
    "tables: lists": {"tables": [[0], [None]]},
    "logit_rows: must be rows": {"logit_rows": [5]},
    "logit_rows: must be at most": {"logit_rows": [0] * 129},
    "sampling: must have": {"logit_rows": [0, 1]},
    "sampling: must be a SampleBatch": {"sampling": [1]},
    "sampling: is for": {"sampling": sampling(SimpleNamespace(V=99), 1, 0)},
}


@pytest.mark.parametrize("complaint", WRONG_STEPS)
def test_a_wrong_step_is_an_error_without_effect(complaint):
    recorded = Recorded("llama")
    wrong = good_step()
    vars(wrong).update(WRONG_STEPS[complaint])
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        recorded.start(wrong)
    assert not recorded.cache.any()
    assert recorded.run(good_step()) == Recorded("llama").run(good_step())


def test_tokens_turn_by_the_steps_own_tables():
    """By those of their positions as without them; by others otherwise, and their attention sees what it did."""
    plain, step = Recorded("llama"), make_step(MODELS["llama"], [(3, 1), (0, 4)], "all", seed=0)
    own, turns = vars(step), [3, 0, 1, 2, 3]

    def logits(turns):
        recorded = Recorded("llama")
        recorded.program.finish(recorded.program.start(own["token_ids"], own["previous"], own["starts"], own["lengths"], own["tables"], own["logit_rows"], turns=turns))
        return recorded.buffers.logits[:5].copy()
    assert np.array_equal(logits(turns), logits([])) and np.array_equal(logits([9, *turns[1:]])[:4], logits([])[:4])
    assert not np.array_equal(logits([3, 0, 2, 3, 7])[:3], logits([])[:3])
    for wrong in ([1], [*turns[:4], -1], [*turns[:4], 100_000]):
        with pytest.raises(ValueError, match="turns: must be"):
            plain.program.start(own["token_ids"], own["previous"], own["starts"], own["lengths"], own["tables"], own["logit_rows"], turns=wrong)


def test_ids_that_cannot_be_drawn_are_refused():
    recorded, step = Recorded("llama"), good_step()
    step.sampling.positions[:] = -1
    ticket = recorded.start(step)
    following = make_step(MODELS["llama"], [(4, 1)], "one", seed=1)
    following.token_ids = [~0]
    with pytest.raises(ValueError, match="token_ids: ~i"):
        recorded.start(following)
    assert recorded.program.finish(ticket) == [-1]


def test_at_most_two_steps_are_under_way():
    """At most two steps are under way, and a ticket counts once."""
    recorded, step = Recorded("llama"), good_step()
    one, two = recorded.start(step), recorded.start(step)
    with pytest.raises(ValueError, match="two steps are under way"):
        recorded.start(step)
    assert recorded.program.finish(two) == recorded.program.finish(one)
    with pytest.raises(ValueError, match="ticket"):
        recorded.program.finish(one)
    with pytest.raises(ValueError, match="ticket"):
        Recorded("llama").program.finish(1)


def buffer(columns, rows=MAX_TOKENS, dtype=np.float32):
    return np.zeros((rows, columns), dtype)


def wrong_ops(p, m):
    """(complaint, call) for a Program in which x (C wide), x2 and last (gathered) have been written."""
    x, last = buffer(m.C), buffer(m.C)
    p.embed(m.head, p.token_ids, x)
    p.gather_rows(x, p.logit_rows, last)
    cache, q, qkv = m.make_cache()[0], buffer(m.H * m.D), buffer((m.H + 2 * m.Hkv) * m.D)
    p.linear(x, m.layers[0]["qkv"], qkv)
    p.rope_append(qkv, m.cos, m.sin, p.positions, p.slots, cache, q)
    yield "ids", lambda: p.embed(m.head, [1], x)
    yield "table", lambda: p.embed(np.zeros(3, np.float32), p.token_ids, x)
    yield "part", lambda: p.embed(m.head, p.token_ids, x, part=(-1, 100))
    yield "part", lambda: p.embed(m.head, p.token_ids, x, part=(100, 100))
    yield "out", lambda: p.embed(m.head, p.token_ids, buffer(m.C + 1))
    yield "out", lambda: p.embed(m.head, p.token_ids, buffer(m.C, rows=7))
    yield "out", lambda: p.embed(m.head, p.token_ids, buffer(m.C, dtype=np.float64))
    yield "out", lambda: p.embed(m.head, p.token_ids, buffer(2 * m.C)[:, :m.C])
    yield "out", lambda: p.copy(x, last)
    yield "x", lambda: p.copy(buffer(m.C), buffer(m.C))
    yield "rows", lambda: p.gather_rows(x, p.slots, buffer(m.C))
    yield "x: was gathered", lambda: p.gather_rows(last, p.logit_rows, buffer(m.C))
    yield "weight", lambda: p.rms_norm(x, np.ones(3, np.float32), 1e-5, x)
    yield "weight", lambda: p.layer_norm(x, np.ones(3, np.float32), None, 1e-5, x)
    yield "bias", lambda: p.layer_norm(x, m.norm, np.ones(3, np.float32), 1e-5, x)
    yield "matrix", lambda: p.linear(x, m.table, buffer(m.C))
    yield "x", lambda: p.linear(q, m.layers[0]["down"], buffer(m.C))
    yield "out", lambda: p.linear(x, m.layers[0]["output"], x)
    yield "out", lambda: p.linear(x, m.layers[0]["output"], buffer(m.C + 1))
    yield "out", lambda: p.linear(x, m.layers[0]["up"], buffer(2 * m.F), activation="swiglu")
    yield "activation", lambda: p.linear(x, m.layers[0]["up"], buffer(m.F), activation="softmax")
    yield "norm", lambda: p.linear(x, m.layers[0]["output"], buffer(m.C), norm=1e-5)
    yield "norm", lambda: p.linear(x, m.layers[0]["output"], buffer(m.C), norm=(np.ones(4, np.float32), 1e-5))
    yield "bias", lambda: p.linear(x, m.layers[0]["output"], buffer(m.C), bias=np.ones(4, np.float32))
    yield "residual", lambda: p.linear(x, m.layers[0]["output"], buffer(m.C), residual=last)
    yield "x0", lambda: p.mix(x, q[:, :3], 1, 1, x)
    yield "gate", lambda: p.smear(x, x, p.previous_token_ids, np.ones((2, 4), np.float32), 1, x)
    yield "previous_ids", lambda: p.smear(x, x, p.token_ids, np.ones((1, 4), np.float32), 1, x)
    yield "cap", lambda: p.softcap(last, 0, last)
    norms = np.ones(32, np.float32), np.ones(16, np.float32)
    yield "q_norm, k_norm", lambda: p.mean_squares(qkv, norms[0][:8], norms[1], (32, 16), x)
    yield "q_norm, k_norm", lambda: p.mean_squares(qkv, np.ones(4096, np.float32), norms[1], (32, 16), x)
    yield "out", lambda: p.mean_squares(qkv, *norms, (32, 0), x)
    yield "out", lambda: p.mean_squares(qkv, *norms, (32, 16), buffer(1))
    yield "means", lambda: p.norm_qk(qkv, *norms, last, 1e-5, qkv)
    yield "means", lambda: p.norm_qk(qkv, *norms, buffer(2), 1e-5, qkv)
    yield "out", lambda: p.norm_qk(qkv, *norms, x, 1e-5, x)
    yield "q_norm, k_norm", lambda: p.norm_heads(qkv, norms[0][:8], norms[1], 16, 1e-5, qkv)
    yield "head_size", lambda: p.norm_heads(qkv, *norms, 32, 1e-5, qkv)
    yield "head_size", lambda: p.norm_heads(qkv, *norms, 8, 1e-5, qkv)
    yield "head_size", lambda: p.norm_heads(qkv, *norms, 16, 1e-5, qkv, count=17)
    yield "out", lambda: p.norm_heads(qkv, *norms, 16, 1e-5, x)
    yield "gates", lambda: p.gate(x, last, x)
    yield "gates", lambda: p.gate(x, qkv, x)
    yield "activation", lambda: p.gate(x, x, x, activation="tanh")
    yield "out", lambda: p.gate(x, x, qkv)
    yield "positions", lambda: p.scale_rows(x, m.growth, p.slots, x)
    yield "scales", lambda: p.scale_rows(x, m.growth.astype(np.float64), p.positions, x)
    odd = buffer((m.H + m.Hkv) * m.D + 16)
    p.linear(x, m.layers[0]["qkv"], odd)
    yield "qkv", lambda: p.rope_append(odd, m.cos, m.sin, p.positions, p.slots, cache, q)
    yield "qkv", lambda: p.rope_append(last, m.cos, m.sin, p.positions, p.slots, cache, q)
    yield "out", lambda: p.rope_append(qkv, m.cos, m.sin, p.positions, p.slots, cache, buffer(m.H * m.D + 1))
    yield "cos", lambda: p.rope_append(qkv, m.cos[0], m.sin, p.positions, p.slots, cache, q)
    yield "slots", lambda: p.rope_append(qkv, m.cos, m.sin, p.positions, p.positions, cache, q)
    yield "cache", lambda: p.rope_append(qkv, m.cos, m.sin, p.positions, p.slots, cache[0], q)
    yield "gate", lambda: p.rope_append(qkv, m.cos, m.sin, p.positions, p.slots, cache, q, value_embed=x)
    yield "window", lambda: p.paged_attention(q, cache, p.attention, -2, buffer(m.H * m.D))
    yield "attention", lambda: p.paged_attention(q, cache, None, 0, buffer(m.H * m.D))
    yield "q", lambda: p.paged_attention(x, np.zeros((4, 3, 2, 16 * 16), np.float16), p.attention, 0, buffer(m.C))
    yield "sinks", lambda: p.paged_attention(q, cache, p.attention, 0, buffer(m.H * m.D), sinks=np.ones(3, np.float32))
    yield "logits", lambda: p.sample(x)
    e, logits = MODELS["experts"], buffer(m.E)
    p.linear(x, e.layers[0]["router"], logits)
    good = dict(x=x, logits=logits, gate_up=e.layers[0]["up"], down=e.layers[0]["down"], out=x, norm=(None, 0.0), biases=(None, None),
                activation="swiglu", chosen=2, sum_to_one=True)
    for argument, wrong in (("x", last), ("logits", last), ("gate_up", m.table), ("gate_up", m.layers[0]["up"]), ("down", m.layers[0]["down"]),
                            ("chosen", 0), ("chosen", 8), ("chosen", 1.0), ("activation", "silu"), ("activation", None),
                            ("groups", (2, 1)), ("groups", (7, 2)), ("groups", (1, 0)),
                            ("correction_bias", np.ones(8, np.float32)), ("norm", (np.ones(3, np.float32), 0.0)),
                            ("biases", (np.ones(3, np.float32), None)), ("out", logits)):
        yield ("" if argument == "x" else argument), lambda: p.experts(**(good | {argument: wrong}))


def test_a_wrong_op_is_a_named_value_error():
    program, count = compiled.Program(MAX_TOKENS, MAX_ROWS), 0
    for complaint, call in wrong_ops(program, MODELS["llama"]):
        with pytest.raises(ValueError, match=f"^{complaint}"):
            call()
        count += 1
    assert count > 40 and len(program.describe()) == 6
    for sizes in ((0, 1), (4, 5), (1 << 20, 1)):
        with pytest.raises(ValueError, match="max_"):
            compiled.Program(*sizes)


def test_nothing_is_recorded_after_the_first_step():
    """Nothing is recorded after the first step or behind sample."""
    recorded = Recorded("llama")
    with pytest.raises(ValueError, match="sample is the last"):
        recorded.program.copy(recorded.buffers.x, recorded.buffers.x0)
    program, x = compiled.Program(4, 4), buffer(64, rows=4)
    program.embed(MODELS["llama"].head, program.token_ids, x)
    assert program.finish(program.start([1], [-1], [0, 1], [1], [[0]], [])) == []
    with pytest.raises(ValueError, match="after the first step"):
        program.copy(x, x)


# ---- life cycle of a Program

def test_what_was_recorded_stays_and_is_described():
    recorded = Recorded("nanochat")
    lines = recorded.program.describe()
    assert lines[0] == "embed" and lines[-1] == "sample (logit rows)" and "linear 128x96 norm relu2" in lines
    assert "paged_attention window 33" in lines and "softcap (logit rows)" in lines
    recorded.run(make_step(recorded.model, MIXES[5], "one", seed=1))
    times = recorded.program.times()[-1]
    assert times["tokens"] == 5 and times["logit_rows"] == 1 and times["width"] >= 1
    assert times["gap_us"] > 0
    assert abs(sum(us for _, us in times["phases"]) - times["us"]) < 1e-3 * times["us"] + 1
    assert {"paged_attention", "sample"} <= set(times["kinds"])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_may_go_while_its_step_runs(threads):
    compiled.set_threads(threads)
    for seed in range(int(20 * SHARE) + 2):
        recorded = Recorded("llama")
        recorded.start(make_step(recorded.model, MIXES[100], "all", seed))
        if seed % 2:
            recorded.start(make_step(recorded.model, MIXES[1], "all", seed))
        del recorded


def test_programs_do_not_disturb_each_other():
    """Programs, eager ops and changes of threads do not disturb each other."""
    model, results, stop = MODELS["llama"], {}, threading.Event()

    def decode(key):
        results[key] = decode_alone(Recorded("llama"), [[1, 2, 3]], [[5, 6, 7]], 40, pipelined=True)

    def disturb():
        x, out = np.ones((8, model.C), np.float32), np.zeros((8, 160), np.float32)
        while not stop.is_set():
            for threads in (1, 3, 2):
                compiled.set_threads(threads)
                compiled.multiply(x, model.layers[0]["qkv"], out=out[:, :128])

    decode("alone")
    threads = [threading.Thread(target=decode, args=(key,)) for key in range(3)]
    other = threading.Thread(target=disturb)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert len(results) == 4 and all(tokens == results["alone"] for tokens in results.values())


FORK = """
    import os
    from test_core_program import *
    compiled.set_threads(2)
    recorded = Recorded("llama")
    step = make_step(recorded.model, MIXES[33], "all", seed=2)
    expected = recorded.run(step)
    ticket = recorded.start(step)           # the fork comes while a step may run
    child = os.fork()
    if child == 0:
        status = recorded.run(step) != expected or Recorded("llama").run(step) is None
        del recorded
        os._exit(int(status))
    assert recorded.program.finish(ticket) == expected == recorded.run(step)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_child_runs_steps_on_its_threads():
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    for _ in range(int(5 * SHARE) + 1):
        subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK)], env=environment, check=True, timeout=60)


# ---- failures during a step

@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [2, 100])        # divided products, divided rows
def test_a_step_without_memory_fails_alone(threads, tokens):
    """A step that is refused memory fails, and the next one has it."""
    compiled.set_threads(threads)
    step, free = make_step(MODELS["llama"], MIXES[tokens], "all", 1), Recorded("llama")
    expected, recorded = free.run(step), Recorded("llama")
    compiled.set_threads(3)                      # new threads that have no memory yet
    compiled.set_threads(threads)
    _core.refuse_memory(1)
    with pytest.raises((MemoryError, RuntimeError)):
        recorded.run(step)
    _core.refuse_memory(0)
    assert recorded.run(step) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_a_chunk_without_memory_fails_its_step_alone(threads):
    compiled.set_threads(threads)
    wide = compiled.Matrix(compiled.Arena(1 << 20), "q8_0", 32, 4096)
    program, x, out = compiled.Program(64, 4), np.zeros((64, 4096), np.float32), np.zeros((64, 32), np.float32)
    program.embed(np.ones((4, 4096), np.float32), program.token_ids, x)
    program.linear(x, wide, out)
    run = lambda T: program.finish(program.start([1] * T, [-1] * T, [0, T], [T], [[0, 1, 2, 3]], []))       # noqa: E731
    assert run(1) == []                             # by now the program has its own memory
    _core.refuse_memory(20_000)                     # 8 rows of x prepared within a chunk need more
    with pytest.raises(RuntimeError, match="bad_alloc"):
        run(64)
    _core.refuse_memory(0)
    assert run(64) == []


def test_a_drawn_token_needs_a_row_in_every_table():
    """A drawn token without a row in every table fails the step that takes it."""
    model, C = MODELS["llama"], 64
    few = np.ones((5, C), np.float32)
    program, x, last = compiled.Program(4, 4), *(np.zeros((4, C), np.float32) for _ in range(2))
    logits = np.zeros((4, model.V), np.float32)
    program.embed(few, program.token_ids, x)
    program.gather_rows(x, program.logit_rows, last)
    program.linear(last, model.head, logits)
    program.sample(logits)
    params = SimpleNamespace(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
                             repetition_penalty=1.0, logit_bias=((300, 1e9),), seed=1, choice=0)
    draws = lambda: compiled.SampleBatch([SimpleNamespace(params=params, position=3, tokens=[], prompt_tokens=0)], model.V)    # noqa: E731
    step = lambda token, previous: ([token], [previous], [0, 1], [1], [[0]], [0], draws())      # noqa: E731
    for token, previous in [(~0, -1), (1, -2)]:
        first = program.start(*step(1, -1))
        second = program.start(*step(token, previous))
        assert program.finish(first) == [300]
        with pytest.raises(RuntimeError, match="token 300 was drawn, and the smallest table has 5 rows"):
            program.finish(second)
    assert program.finish(program.start(*step(4, -1))) == [300]


def test_a_shrinking_list_is_read_to_its_new_end():
    recorded, step = Recorded("llama"), make_step(MODELS["llama"], MIXES[5], "all", 1)

    class Shrinking:
        def __init__(self, of):
            self.of = of

        def __index__(self):
            self.of.clear()
            return 0

    for name in ("token_ids", "previous", "starts", "lengths", "logit_rows"):
        changed = list(getattr(step, name))
        changed[0] = Shrinking(changed)
        with pytest.raises(ValueError):
            recorded.start(SimpleNamespace(**{**vars(step), name: changed}))
    tables = [list(table) for table in step.tables]
    tables[0][0] = Shrinking(tables)
    with pytest.raises(ValueError):
        recorded.start(SimpleNamespace(**{**vars(step), "tables": tables}))
    tokens = [1, 2, 3]
    tokens[0] = Shrinking(tokens)
    assert _core.count_tokens([(tokens, 0)], 10)[0] == [1]


# ---- how many threads (cpu/program/width.h)

def simulate(steps, cost, stalls=lambda step: False):
    """Which steps ran wide if a step takes cost(wide, step)."""
    policy, wide = _core.Width(6), []
    for step in range(steps):
        wide.append(policy.choose(2) == 2)
        policy.learn(7, cost(wide[-1], step), wide[-1] and stalls(step))
    return wide


def test_the_faster_width_is_found():
    """The faster width is found, and probes become rare."""
    wide = simulate(20_000, lambda wide, _: 1.0 if wide else 1.3)
    assert wide[:64] == [True] * 64 and wide.count(False) < 150
    narrow = simulate(20_000, lambda wide, _: 1.3 if wide else 1.0)
    assert narrow[:64] == [True] * 64 and narrow.count(True) < 64 + 6 + 150


def test_a_stall_brings_the_probe_forward():
    """A stall brings the probe forward, and a freed core is found again."""
    hog = range(1000, 5000)                     # next to a busy program two threads stall and take four times as long
    wide = simulate(12_000, lambda wide, step: (4.0 if step in hog else 1.0) if wide else 1.5, lambda step: step in hog)
    assert wide[1000:5000].count(True) < 400 and wide[1000:1100].count(False) > 40
    assert wide[8000:].count(True) > 3900


def test_cheap_stalls_are_borne():
    """Stalls that cost less than the second thread gives are borne."""
    wide = simulate(10_000, lambda wide, step: (2.0 if step % 10 == 0 else 1.0) if wide else 1.5, lambda step: step % 10 == 0)
    assert wide.count(True) > 9700


def test_steps_of_another_shape_are_not_compared():
    policy = _core.Width(6)
    # long steps of one shape and short ones of another: neither width is better
    for step in range(3000):
        width = policy.choose(2)
        policy.learn(step % 2, 100.0 if step % 2 else 1.0, False)
        assert width == 2
