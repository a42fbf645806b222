"""Finds tensors that are not in their place, by what trained layers have in common.

A layer reads and writes the same channels of the residual stream as its neighbours, with strengths that
change little from one to the next. Random weights have no such profile: then nothing is concluded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from chatlm.worker.doctor.tensor_statistics import TensorStatistics
    from chatlm.worker.model.blocks.model import Model

READERS = ("qkv", "gate_up", "up", "mix_in", "router", "expert_gate_up", "expert_up", "shared_gate_up",
           "shared_up")  # their columns are the channels
WRITERS = ("output", "down", "mix_out", "expert_down", "shared_down")  # their rows are
NORMS = ("attention_norm", "ffn_norm", "output_norm", "down_norm")


class Level(NamedTuple):
    """A tensor that is larger or smaller than one expects from its neighbours."""

    statistics: TensorStatistics
    log_factor: float
    edge: bool  # is it of one of the first two layers, or of the last?


def strange_levels(of_kind: Seq[TensorStatistics]) -> list[Level]:
    """The tensors of a kind whose root mean square is far from those of the two layers before and after.

    The first two layers and the last differ in good models, their norms by a factor of 5."""
    placed = [(one, one.level) for one in of_kind if one.layer is not None and math.isfinite(one.level)]
    if len(placed) < 5:
        return []
    levels = numpy.array([level for _, level in placed])
    apart = numpy.array([levels[i] - numpy.median(numpy.delete(levels[max(i - 2, 0):i + 3], min(i, 2)))
                         for i in range(len(levels))])
    spread = float(numpy.median(numpy.abs(apart)))
    found = []
    for i, (one, _) in enumerate(placed):
        edge = i < 2 or i > len(placed) - 2
        least = math.log(16) if edge else max(math.log(2.5), 8 * spread)
        # beside a strange one, others seem strange too: only the most strange is meant
        around = numpy.abs(apart[max(i - 2, 0):i + 3]).max()
        if abs(apart[i]) > least and abs(apart[i]) >= around:
            found.append(Level(one, float(apart[i]), edge))
    return found


def profile(values: numpy.ndarray) -> numpy.ndarray | None:
    """The logs of strengths, mean 0 and length 1, so that a product of two is their correlation; None if
    they do not vary."""
    positive = values > 0
    if positive.sum() < len(values) / 2 or not numpy.isfinite(values).all():
        return None
    logs = numpy.log(numpy.where(positive, values, numpy.median(values[positive])))
    logs = logs - logs.mean()
    length = math.sqrt(float((logs * logs).sum()))
    return None if length < 1e-3 * math.sqrt(len(logs)) else logs / length


def channel_profile(one: TensorStatistics, width: int) -> numpy.ndarray | None:
    """How strongly a tensor reads or writes each channel of the residual stream, as a profile."""
    if one.part in READERS and len(one.columns) == width:
        return profile(one.columns)
    if one.part in WRITERS and one.rows.size and one.rows.size % width == 0:  # experts are one below another
        return profile(one.rows.reshape(-1, width).mean(0))
    if one.part in NORMS and one.values is not None and len(one.values) == width:
        return profile(numpy.square(one.values))
    return None


class Features:
    """The profiles of all layers: `by_kind[kind][layer]`; experts of a layer count as their mean."""

    def __init__(self, model: Model, kinds: Mapping[str, Seq[TensorStatistics]]):
        self.width = model.width
        self.groups = groups_of(model)
        self.by_kind: dict[str, dict[int, numpy.ndarray]] = {}
        for kind, of_kind in kinds.items():
            found: dict[int, list[numpy.ndarray]] = {}
            for one in of_kind:
                if one.layer is not None and (made := channel_profile(one, self.width)) is not None:
                    found.setdefault(one.layer, []).append(made)
            means = {layer: numpy.sum(each, 0) for layer, each in found.items()}
            self.by_kind[kind] = {layer: mean / max(float(numpy.sqrt((mean * mean).sum())), 1e-9)
                                  for layer, mean in means.items()}


def groups_of(model: Model) -> list[list[int]]:
    """Groups of layers that are built alike: with the same kinds of blocks and the same window."""
    alike: dict[tuple[type, type, int], list[int]] = {}
    for number, (layer, window) in enumerate(zip(model.layers, model.windows)):
        kind = type(layer.mixer), type(layer.feed), window
        alike.setdefault(kind, []).append(number)
    return [*alike.values()]


LAYERS_COMPARED = 160   # comparing all pairs takes their number cubed
LEAST_GAIN = 0.6    # of correlation; good models: at most 0.28, by exchanging neighbours


def exchanged_layers(features: Features) -> tuple[int, int, float] | None:
    """Two layers that have changed places, and how much more alike neighbours would be otherwise, as the mean
    over the kinds of the sum of correlations."""
    best: tuple[float, int, int] | None = None
    for layers in features.groups:
        of_kinds = [found for found in features.by_kind.values() if all(layer in found for layer in layers)]
        L = len(layers)
        if not 6 <= L <= LAYERS_COMPARED or len(of_kinds) < 3:
            continue
        alike = numpy.array([numpy.array([found[layer] for layer in layers])
                             @ numpy.array([found[layer] for layer in layers]).T for found in of_kinds])
        if alike.mean(0)[range(L - 1), range(1, L)].mean() < max(0.3, 4 / math.sqrt(features.width)):
            continue  # there is no order to see
        for i, j in itertools.combinations(range(L), 2):
            order = [*range(L)]
            order[i] = j
            order[j] = i
            near = {k for k in (i - 1, i, j - 1, j) if 0 <= k < L - 1}
            gains = numpy.sum([alike[:, order[k], order[k + 1]] - alike[:, k, k + 1] for k in near], 0)
            gain = float(gains.mean())
            least = best[0] if best else LEAST_GAIN
            if gain > least and (gains > 0).mean() >= 0.8:
                best = gain, layers[i], layers[j]
    return best and (best[1], best[2], best[0])


def transposed(features: Features, kinds: Mapping[str, Seq[TensorStatistics]],
               orders: Seq[numpy.ndarray]) -> list[tuple[TensorStatistics, float]]:
    """Square matrices whose other side has the profile of the channels, with that correlation. `orders`: how
    a file may order the rows of q and k."""
    found = []
    least = max(0.4, 6 / math.sqrt(features.width))
    for kind, of_kind in kinds.items():
        for one in of_kind:
            if one.layer is None or one.part not in (*READERS, *WRITERS) or one.shape != (
                    features.width, features.width):
                continue
            reader = one.part in READERS
            own, other = (one.columns, one.rows) if reader else (one.rows, one.columns)
            if len(own) != len(other):
                continue
            expected = expected_profile(features, kinds, kind, one)
            if expected is None or (own := profile(own)) is None:
                continue
            turned = [one for one in (profile(other[order]) for order in orders) if one is not None]
            seen = max((float(made @ expected) for made in turned), default=0.0)
            if seen > least and seen > float(own @ expected) + 0.3:
                found.append((one, seen))
    return found


def expected_profile(features: Features, kinds: Mapping[str, Seq[TensorStatistics]], kind: str,
                     one: TensorStatistics) -> numpy.ndarray | None:
    """The mean profile of the tensors that read, or write, the same channels: of the same kind in the two
    layers before and after, and of the others of the same part in this one."""
    assert one.layer is not None
    near = [features.by_kind[kind][layer] for layer in range(one.layer - 2, one.layer + 3)
            if layer != one.layer and layer in features.by_kind[kind]]
    near += [features.by_kind[other][one.layer] for other, of_kind in kinds.items()
             if other != kind and of_kind[0].part == one.part and one.layer in features.by_kind[other]]
    return profile(numpy.exp(numpy.sum(near, 0))) if near else None


# The rows of one angle are of about one size, and so are those of neighbouring angles. Mean differences of
# logs in the default model: 0.31 of pairs, 0.36 of neighbours, 0.85 of rows a quarter of a head apart, which
# are what pairs become that are put in order once too often
LEAST_APART = {"neighbours": (0.7, 8.0), "quarters": (0.95, 5.0)}  # the ratio, and standard errors


def pairs_of_others(model: Model, kinds: Mapping[str, Seq[TensorStatistics]]) -> float:
    """How much better the rows of q and k go together as other rotary pairs than as the model's, as the ratio
    of their mean differences; 0 if they do not."""
    apart: dict[str, list[numpy.ndarray]] = {}
    for of_kind in kinds.values():
        for one in of_kind:
            attn = model.by_layer[one.layer] if one.part == "qkv" and one.layer is not None else None
            if not attn or one.index > 1 or attn.gated:
                continue
            D = attn.head_size
            rotated = attn.rope.size
            if one.rows.size % D or rotated < 32 or rotated % 4 or not (one.rows > 0).all():
                continue
            heads = numpy.log(one.rows).reshape(-1, D)[:, :rotated]
            halves, quarters = (heads.reshape(len(heads), *shape, -1) for shape in ((2,), (2, 2)))
            for name, difference in (("own", halves[:, 0] - halves[:, 1]),
                                     ("neighbours", heads[:, 0::2] - heads[:, 1::2]),
                                     ("quarters", quarters[:, :, 0] - quarters[:, :, 1])):
                apart.setdefault(name, []).append(numpy.abs(difference).ravel())
    own = numpy.concatenate(apart.pop("own", [numpy.zeros(0)]))
    if len(own) < 256:
        return 0.0
    for name, (least, sure) in LEAST_APART.items():
        other = numpy.concatenate(apart[name])
        gap = own - other
        ratio = float(other.mean() / max(float(own.mean()), 1e-9))
        if ratio < least and gap.mean() > sure * gap.std() / math.sqrt(len(gap)):
            return ratio
    return 0.0
