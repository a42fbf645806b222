"""Checks a model's weights for what is never right, and for what stands out among its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence as Seq
from typing import TYPE_CHECKING

import numpy

from chatlm.worker.arrays.packed import RopePairs, unpermute_rope
from chatlm.worker.doctor.findings import Findings, error, examples, note, warning
from chatlm.worker.doctor.layers import (
    NORMS, Features, exchanged_layers, pairs_of_others, strange_levels, transposed)
from chatlm.worker.doctor.tensor_statistics import (
    GROUP, LARGE, MOST_VALUES, TensorStatistics, all_statistics, of_kinds)

if TYPE_CHECKING:
    from chatlm.worker.doctor.examined_model import ExaminedModel
    from chatlm.worker.model.blocks.model import Model

AGAIN = "download or convert the file again"
VOCABULARY = ("embed", "head", "layer_embed", "value_embed", "positions", "types")  # rows of tokens


def check_weights(examined: ExaminedModel) -> Findings:
    """Check all values for NaN, zeros and strange scales, and how the layers go together."""
    model = examined.floats
    drawn = all_statistics(model, examined.threads)
    kinds = of_kinds(drawn)
    values = sum(math.prod(one.shape) for one in drawn)
    if values > MOST_VALUES:
        share = 100 // -(-values // MOST_VALUES)
        yield note(f"about {share} % of the {values / 1e9:,.1f} billion weights were read",
                   advice="the rest is read at load, where NaN and infinity are refused")
    for one in drawn:
        yield from of_one(one)
    for of_kind in kinds.values():
        yield from empty_tensors(of_kind)
        yield from strange_blocks(of_kind)
        yield from levels(of_kind)
    yield from copies(kinds)
    features = Features(model.architecture, kinds)
    if found := exchanged_layers(features):
        first, second, gain = found
        yield error(f"the layers {first} and {second} seem to have changed places: exchanged, neighbours "
                    "would read and write much more alike channels", where=f"layers {first} and {second}",
                    advice=AGAIN, gain=round(gain, 2))
    for one, seen in transposed(features, kinds, row_orders(model.architecture)):
        yield error(f"{one.name} seems to be transposed: its rows and columns have exchanged roles, compared "
                    "with the tensors of its kind", where=one.name, advice=AGAIN, correlation=round(seen, 2))
    if ratio := pairs_of_others(model.architecture, kinds):
        yield error("the rows of the query and key matrices are in the order of other rotary pairs: a "
                    "converter left out, or repeated, their reordering", where=first_of(kinds, "qkv"),
                    advice="convert the model again", ratio=round(ratio, 2))


def row_orders(model: Model) -> tuple[numpy.ndarray, ...]:
    """How a file may order the rows of q and k: halves of rotary pairs apart, or side by side."""
    order = numpy.arange(model.width)
    attn = model.attentions[0] if model.attentions else None
    if not attn or model.width % attn.head_size:
        return (order,)
    pairs = RopePairs(attn.head_size, attn.rope.size or attn.head_size)
    return order, numpy.argsort(unpermute_rope(order, pairs))


def first_of(kinds: Mapping[str, Seq[TensorStatistics]], part: str) -> str:
    return next((of_kind[0].name for of_kind in kinds.values() if of_kind[0].part == part), part)


def of_one(one: TensorStatistics) -> Findings:
    """Find what is wrong with a tensor by itself."""
    if one.bad:
        yield error(f"{one.name} has {one.bad:,} values that are NaN or infinite"
                    + (f", the first in row {one.first_bad:,}" if one.matrix else ""), where=one.name,
                    advice=AGAIN)
    if one.constant and one.part not in VOCABULARY:
        yield error(f"{one.name}: {len(one.constant):,} of {len(one.rows):,} rows have the same number in "
                    f"all columns ({examples(one.constant)})", where=one.name, advice=AGAIN)
    if one.holes:
        yield error(f"{one.name}: {one.holes:,} blocks of zeros between others that are not, the first in "
                    f"row {one.hole:,}", where=one.name, advice=AGAIN)
    if one.part in VOCABULARY and one.matrix:
        yield from empty_tokens(one)


LEAST_HOLE = 64  # rows of a vocabulary in succession; unused tokens are rarely so many among others


def empty_tokens(one: TensorStatistics) -> Findings:
    """Runs of zeros in a vocabulary's rows, followed by more tokens; padding at the end is usual."""
    empty = one.rows == 0
    if not empty.any() or empty.all():
        return
    used = len(empty) - int((~empty)[::-1].argmax())
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate(([0], empty[:used], [0])).astype(numpy.int8)))
    runs = edges.reshape(-1, 2)
    longest = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
    if (count := int(longest[1] - longest[0])) >= LEAST_HOLE:
        yield warning(f"{one.name}: the rows of {count:,} tokens in succession, from {longest[0]:,} on, are "
                      "zeros", where=one.name, advice=AGAIN)
    elif count := int(empty.sum()):
        yield note(f"{one.name}: the rows of {count:,} tokens are zeros", where=one.name)


def empty_tensors(of_kind: Seq[TensorStatistics]) -> Findings:
    """Matrices, norms and rows of zeros, where others of the kind have none."""
    if of_kind[0].part in VOCABULARY or not (of_kind[0].matrix or of_kind[0].part in NORMS):
        return
    empty = [one for one in of_kind if not one.bad and one.level == -math.inf]
    if empty and len(empty) == len(of_kind):
        if of_kind[0].matrix:
            yield note(f"{of_kind[0].kind} is zero in all layers: the model seems untrained",
                       where=of_kind[0].kind)
        return
    for one in empty if 2 * len(empty) < len(of_kind) else ():
        yield error(f"{one.name} has only zeros, and the others of its kind do not", where=one.name,
                    advice=AGAIN)
    partly = [one for one in of_kind if one not in empty and one.matrix and (one.rows == 0).any()]
    if 0 < len(partly) <= max(1, len(of_kind) // 10) and len(of_kind) > 3:
        for one in partly:
            rows = numpy.flatnonzero(one.rows == 0)
            yield warning(f"{one.name}: {len(rows):,} of {len(one.rows):,} rows are zeros, the first is "
                          f"{rows[0]:,}; others of its kind have none", where=one.name, advice=AGAIN)
    elif partly:
        count = sum(int((one.rows == 0).sum()) for one in partly)
        yield note(f"{of_kind[0].kind}: {count:,} rows are zeros, in {len(partly)} of {len(of_kind)} layers",
                   where=of_kind[0].kind)


ROW_FACTOR = 200.0   # a row as its tensor's median row; good models: up to 10


def strange_blocks(of_kind: Seq[TensorStatistics]) -> Findings:
    """Find blocks and rows that have a wrong scale."""
    usual = float(numpy.quantile([one.usual for one in of_kind], 0.9))  # heads differ much in some layers
    least = max(math.log(LARGE), usual + math.log(4))
    straight = numpy.median([one.usual_leaning for one in of_kind]) < 0.25
    for one in of_kind:
        if straight and one.leaning > max(0.6, 8 / math.sqrt(one.shape[-1])) and one.part not in VOCABULARY:
            yield error(f"{one.name}: nearly all weights of row {one.leaning_row:,} are on one side of zero: "
                        "scales and minima may be exchanged, or another type's", where=one.name, advice=AGAIN,
                        leaning=round(one.leaning, 2))
        if found := [peak for peak in lone_peaks(one, of_kind) if peak[0] > least]:
            over, row, column = max(found)
            yield error(f"{one.name}: the weights of a block are {math.exp(min(over, 50)):,.0f} times as "
                        f"large as those around it (row {row:,}, from column {column:,} on): its scale is "
                        "not its own", where=one.name, advice=AGAIN)
        if not one.matrix or one.part in VOCABULARY or one.bad or not (one.rows > 0).any():
            continue
        over = math.sqrt(float(one.rows.max() / max(float(numpy.median(one.rows)), 1e-30)))
        if over > ROW_FACTOR and len(one.rows) >= 16 and numpy.median(one.rows) > 0:
            yield warning(f"{one.name}: row {int(one.rows.argmax()):,} is {over:,.0f} times as large as the "
                          "median row", where=one.name, advice=AGAIN)


def lone_peaks(one: TensorStatistics, of_kind: Seq[TensorStatistics]) -> list[tuple[float, int, int]]:
    """The large blocks of a tensor that are no massive weights of a trained model: these are in the same row
    in several layers (a channel of the residual stream), or in several rows of the same columns (a head that
    writes to few channels)."""
    def large_peaks(of: TensorStatistics) -> list[tuple[float, int, int]]:
        return [peak for peak in of.peaks if peak[0] > math.log(LARGE)]

    large = large_peaks(one)
    rows_of_others = set[int]()
    for other in of_kind:
        if other is not one:
            rows_of_others.update(row for _, row, _ in large_peaks(other))
    groups = [column // GROUP for _, _, column in large]
    return [peak for peak in large
            if peak[1] not in rows_of_others and groups.count(peak[2] // GROUP) == 1]


def levels(of_kind: Seq[TensorStatistics]) -> Findings:
    """Find tensors that are larger or smaller than those of the neighbouring layers."""
    if not (of_kind[0].matrix or of_kind[0].part in NORMS):
        return
    for strange in strange_levels(of_kind):
        times = math.exp(abs(strange.log_factor))
        compared = "larger" if strange.log_factor > 0 else "smaller"
        name = strange.statistics.name
        yield error(f"{name} is {times:,.1f} times {compared} than in the layers around it: its scale is not "
                    "its own", where=name, advice=AGAIN)


def copies(kinds: Mapping[str, Seq[TensorStatistics]]) -> Findings:
    """Matrices that are those of another layer: a whole layer may be on purpose, one tensor is not."""
    same: dict[tuple[int, int], list[str]] = {}
    count: dict[int, int] = {}
    for of_kind in kinds.values():
        seen: dict[bytes, TensorStatistics] = {}
        for one in of_kind:
            if not one.matrix or one.layer is None or one.level == -math.inf or not one.rows.size:
                continue
            count[one.layer] = count.get(one.layer, 0) + 1
            first = seen.setdefault(one.rows.tobytes() + one.columns.tobytes(), one)
            if first is not one and first.layer is not None and first.layer != one.layer:
                same.setdefault((first.layer, one.layer), []).append(one.name)
    for (first, second), names in same.items():
        if len(names) == count[second]:
            yield note(f"layer {second} is a copy of layer {first}", where=f"layer {second}")
        else:
            yield error(f"{examples(names)}: a copy of the tensor of layer {first}", where=names[0],
                        advice=AGAIN)
