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


def sigmoid(x):
    e = exp_negative(-np.abs(x))
    return np.where(x < 0, e, np.float32(1)) / (np.float32(1) + e)


def times_sigmoid(x, t):
    above, positive = np.maximum(x, np.float32(0)), np.maximum(t, np.float32(0))
    e = exp_negative((t - positive) - positive)
    return fma(x - above, e, above) / (np.float32(1) + e)


def silu(x):
    return times_sigmoid(x, x)


def gelu_tanh(x):
    c = np.float32(1.59576912)
    return times_sigmoid(x, x * fma(x * x, c * np.float32(0.044715), c))


def softcap(x, cap):
    t = x / np.float32(cap)
    e = exp_negative(np.abs(t) * np.float32(-2))
    return np.copysign((np.float32(1) - e) / (np.float32(1) + e) * np.float32(cap), t)
