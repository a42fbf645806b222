"""The ops between two products in numpy, with decode_core's bits on every instruction set.

A fused multiply-add is computed in float64 and rounded once more, which gives another bit about once in 2^29.
"""

import numpy as np


def fma(a, b, c):
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def exp_negative(x):
    f = np.float32
    y = np.maximum(np.asarray(x, f), f(-87))
    n = fma(y, f(1.44269504), f(12582912)) - f(12582912)
    r = fma(n, f(2.12194440e-4), fma(n, f(-0.693359375), y))
    p = fma(np.full_like(r, f(1.9875691500e-4)), r, f(1.3981999507e-3))
    for term in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, f(term))
    return np.where(np.asarray(x) < -87, f(0), np.ldexp(fma(p, r * r, r) + f(1), n.astype(int)).astype(f))


def rms_norm(x, weight, eps):
    squares = np.zeros((len(x), 16), np.float32)
    for c in range(0, x.shape[1], 16):
        squares = fma(x[:, c:c + 16], x[:, c:c + 16], squares)
    for width in (8, 4, 2, 1):
        squares = squares[:, :width] + squares[:, width:2 * width]
    scale = np.float32(1) / np.sqrt(squares / np.float32(x.shape[1]) + np.float32(eps))
    return x * scale if weight is None else x * scale * weight


def layer_norm(x, weight, bias, eps):
    f, totals, squares = np.float32, np.zeros((len(x), 16), np.float32), np.zeros((len(x), 16), np.float32)
    for c in range(0, x.shape[1], 16):
        totals = totals + x[:, c:c + 16]
    x = x - (tree(totals) / f(x.shape[1]))[:, None]
    for c in range(0, x.shape[1], 16):
        squares = fma(x[:, c:c + 16], x[:, c:c + 16], squares)
    y = x * (f(1) / np.sqrt(tree(squares) / f(x.shape[1]) + f(eps)))[:, None]
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def sigmoid(x):
    e = exp_negative(-np.abs(x))
    return np.where(x < 0, e, np.float32(1)) / (np.float32(1) + e)


def softplus(x):
    f = np.float32
    y = exp_negative(-np.abs(x))
    s = y / (f(2) + y)
    t = s * s
    p = fma(np.full_like(t, f(1 / 13)), t, f(1 / 11))
    for n in (9, 7, 5, 3):
        p = fma(p, t, f(1 / n))
    p = fma(p * t, s, s)
    return np.maximum(x, f(0)) + (p + p)


def times_sigmoid(x, t):
    above, positive = np.maximum(x, np.float32(0)), np.maximum(t, np.float32(0))
    e = exp_negative((t - positive) - positive)
    return fma(x - above, e, above) / (np.float32(1) + e)


def silu(x):
    return times_sigmoid(x, x)


def gelu_tanh(x):
    c = np.float32(1.59576912)
    return times_sigmoid(x, x * fma(x * x, c * np.float32(0.044715), c))


def gelu_erf(x):
    f = np.float32
    size = np.abs(x)
    t = f(1) / fma(size, f(0.3275911) * f(0.707106781), f(1))
    p = fma(np.full_like(t, f(0.5) * f(1.061405429)), t, f(0.5) * f(-1.453152027))
    for factor in (1.421413741, -0.284496736, 0.254829592):
        p = fma(p, t, f(0.5) * f(factor))
    return np.maximum(x, f(0)) - size * (p * t * exp_negative(size * size * f(-0.5)))


def gelu_quick(x):
    return times_sigmoid(x, x * np.float32(1.702))


def relu2(x):
    return np.maximum(x, np.float32(0)) ** 2


def clamped_swiglu(gate, up):
    g = np.minimum(gate, np.float32(7))
    return times_sigmoid(g, g * np.float32(1.702)) * (np.clip(up, np.float32(-7), np.float32(7)) + np.float32(1))


def tree(x):
    """The sum of (rows, 16), as 16 lanes are summed."""
    for width in (8, 4, 2, 1):
        x = x[:, :width] + x[:, width:2 * width]
    return x[:, 0]


def sum_of_exps(x, largest):
    lanes = np.zeros((len(x), 16), np.float32)
    for c in range(0, x.shape[1], 16):
        exps = exp_negative(x[:, c:c + 16] - largest)
        lanes[:, :exps.shape[1]] += exps
    return tree(lanes)[:, None]


def route(logits, chosen, sum_to_one, correction_bias=None, share_scale=1.0):
    """(ids, shares) (T, chosen) of each row's experts. A bias is added to their softmax where they are chosen."""
    scores = logits
    if correction_bias is not None:
        top = logits.max(1, keepdims=True)
        scores = exp_negative(logits - top) / sum_of_exps(logits, top) + correction_bias
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :chosen]
    best = np.take_along_axis(logits, ids, 1)
    among = best if sum_to_one else logits
    largest = among.max(1, keepdims=True)
    return ids, exp_negative(best - largest) / sum_of_exps(among, largest) * np.float32(share_scale)


def route_sigmoids(logits, chosen, sum_to_one, correction_bias=None, groups=(1, 1), share_scale=1.0):
    """The same by their sigmoids, to which a bias is added where they choose, in some of the groups."""
    scores, (count, kept) = sigmoid(logits) + (np.float32(0) if correction_bias is None else correction_bias), groups
    if kept < count:
        grouped = scores.reshape(len(scores), count, -1)
        pairs = -np.sort(-grouped, axis=2)[..., :2]
        best = np.argsort(-(pairs[..., 0] + pairs[..., 1]), axis=1, kind="stable")[:, :kept]
        scores = np.where((np.arange(count)[None, :, None] == best[:, None, :]).any(2)[..., None], grouped, np.float32(-np.inf)).reshape(scores.shape)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :chosen]
    best = np.take_along_axis(logits, ids, 1)
    if not sum_to_one:
        return ids, sigmoid(best) * np.float32(share_scale)
    below = np.minimum(best, np.float32(0))
    shares = exp_negative(below - below.max(1, keepdims=True)) / (np.float32(1) + exp_negative(-np.abs(best)))
    total = np.zeros(len(logits), np.float32)
    for j in range(chosen):
        total += shares[:, j]
    return ids, shares / total[:, None] * np.float32(share_scale)


def route_sparse(logits, chosen, farthest):
    """The same by logits, each with a softmax of its own: over it and the near ones below it."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :chosen]
    left, shares = logits.copy(), np.empty(ids.shape, np.float32)
    for j, best in enumerate(ids.T):
        own = np.take_along_axis(logits, best[:, None], 1)
        near = np.where((own - logits) / np.maximum(np.abs(logits), own) > np.float32(farthest), np.float32(-np.inf), left)
        lanes = np.zeros((len(logits), 16), np.float32)
        for c in range(0, logits.shape[1], 16):
            exps = exp_negative(near[:, c:c + 16] - own)
            lanes[:, :exps.shape[1]] += exps
        shares[:, j] = np.float32(1) / tree(lanes)
        np.put_along_axis(left, best[:, None], np.float32(-np.inf), 1)
    return ids, shares


def softcap(x, cap):
    t = x / np.float32(cap)
    e = exp_negative(np.abs(t) * np.float32(-2))
    return np.copysign((np.float32(1) - e) / (np.float32(1) + e) * np.float32(cap), t)
