"""Resizes pictures exactly as Pillow 13 does, whichever Pillow is installed.

Between the two directions there are 8 bits, and weights have 22. Width goes first, then height; but height
goes first if it loses more than twice as many pixels as width. Pillow 12 and older always began with width,
so some of their sums differ by 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy


def lanczos(x: numpy.ndarray) -> numpy.ndarray:
    """Pillow's filter, with libm's sine of pi x, over pi x."""
    def sinc(x: float) -> float:
        return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)

    return numpy.array([sinc(each) * sinc(each / 3) if -3 <= each < 3 else 0.0 for each in x.ravel()]
                       ).reshape(x.shape)


def bicubic(x: numpy.ndarray) -> numpy.ndarray:
    x = numpy.abs(x)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return numpy.where(x < 1, near, numpy.where(x < 2, far, 0.0))


def bilinear(x: numpy.ndarray) -> numpy.ndarray:
    return numpy.maximum(1 - numpy.abs(x), 0)


FILTERS: dict[str, tuple[float, Callable[[numpy.ndarray], numpy.ndarray]]] = {
    "bilinear": (1.0, bilinear), "bicubic": (2.0, bicubic), "lanczos": (3.0, lanczos)}
BITS = 22  # of a weight's fraction


def taps_of(size: int, wanted: int, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(indices (wanted, K) of the numbers that each wanted number is made of, their weights as integers).

    All rows have K of them. Weights of 0 fill up shorter ones."""
    support, weigh = FILTERS[name]
    scale = size / wanted
    wide = max(scale, 1.0)
    support *= wide
    centre = (numpy.arange(wanted) + 0.5) * scale
    first = numpy.maximum((centre - support + 0.5).astype(numpy.int64), 0)
    last = numpy.minimum((centre + support + 0.5).astype(numpy.int64), size)
    taps = first[:, None] + numpy.arange((last - first).max())
    weights = weigh((taps - centre[:, None] + 0.5) * (1.0 / wide))
    weights[taps >= last[:, None]] = 0.0
    total = numpy.zeros(wanted)
    for column in weights.T:  # in the order in which Pillow adds
        total = total + column
    weights *= 1.0 / total[:, None]
    rounded = numpy.trunc(weights * (1 << BITS) + numpy.copysign(0.5, weights)).astype(numpy.int32)
    return numpy.minimum(taps, size - 1), rounded


def resized_rows(image: numpy.ndarray, wanted: int, name: str) -> numpy.ndarray:
    """uint8 (N, K, 3) -> (wanted, K, 3)."""
    others = image.shape[1:]
    image = numpy.ascontiguousarray(image).reshape(len(image), -1)
    taps, weights = taps_of(len(image), wanted, name)
    made = numpy.empty((wanted, image.shape[1]), numpy.uint8)
    step = max(1, (1 << 20) // max(image.shape[1], 1))  # rows at once, so few that sums stay in the cache
    for begin in range(0, wanted, step):
        rows = slice(begin, begin + step)
        total = numpy.full((len(taps[rows]), image.shape[1]), 1 << (BITS - 1), numpy.int32)
        for tap, weight in zip(taps[rows].T, weights[rows].T):
            if weight.any():
                total += image[tap] * weight[:, None]
        total >>= BITS
        made[rows] = numpy.clip(total, 0, 255, out=total)
    return made.reshape(wanted, *others)


def resized(image: numpy.ndarray, width: int, height: int, name: str) -> numpy.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3)."""
    H, W, _ = image.shape
    passes: list[Callable[[numpy.ndarray], numpy.ndarray]] = []
    if W != width:
        passes.append(lambda image: resized_rows(image.swapaxes(0, 1), width, name).swapaxes(0, 1))
    if H != height:
        passes.append(lambda image: resized_rows(image, height, name))
    if H - height > max(2 * (W - width), 0):
        passes.reverse()
    for each in passes:
        image = each(image)
    return numpy.ascontiguousarray(image)
