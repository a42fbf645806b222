"""Models whose output matrix is the embedding: files that have one of the two or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.log import log
from chatlm.worker.arrays.kinds import floats

if TYPE_CHECKING:
    from chatlm.worker.weights.families.family import Family
    from chatlm.worker.model.blocks.model import Model

COMPARED_ROWS = 1024  # at a time: a float32 copy of all would take gigabytes


class Pair(NamedTuple):
    """The names of both matrices."""

    embed: str
    head: str

    @classmethod
    def of(cls, table: Mapping[str, Seq[str]]) -> Pair:
        """As a table of names for `tensor_sources` has them."""
        return cls(table["embed"][0], table["head"][0])

    @classmethod
    def in_adapters(cls, row: Family, model: Model) -> Pair:
        """As adapters call them."""
        return cls(*(row.in_adapters(model, name)[0] for name in cls.of(row.all_tensors)))


def head_of_folder(path: Path, model: Model, row: Family, state: Mapping[str, Any],
                   scales: Mapping[str, Any]) -> tuple[Model, dict[str, Any], dict[str, Any]]:
    """The blocks, tensors and scales of a folder whose config says that the head is the embedding.

    One of the two matrices is enough. A head that differs from the embedding is the model's own, as in
    transformers."""
    pair = Pair.of(row.all_tensors)
    state = dict(state)
    scales = dict(scales)
    if not model.tied or pair.head not in state:
        return model, state, scales
    if pair.embed not in state:
        for tensors in (state, scales):
            if pair.head in tensors:
                tensors[pair.embed] = tensors.pop(pair.head)
        return model, state, scales
    have_same_scales = equal(scales.get(pair.head), scales.get(pair.embed))
    if have_same_scales and equal(state[pair.head], state[pair.embed]):
        for tensors in (state, scales):
            tensors.pop(pair.head, None)
        return model, state, scales
    log.warning("%s says tie_word_embeddings, but %s differs from %s: the file's own head is used. If the "
                "model was trained with one matrix for both, remove it", path, pair.head, pair.embed)
    return model.with_own_head(), state, scales


def equal(one: Any, other: Any) -> bool:
    """Do two of a file's matrices have the same values? Packed ones are never compared, since few are
    exact."""
    if one is None or other is None:
        return one is other
    if not isinstance(one, numpy.ndarray) or not isinstance(other, numpy.ndarray) or one.shape != other.shape:
        return False
    if not one.ndim:
        return bool(floats(one) == floats(other))
    for first in range(0, len(one), COMPARED_ROWS):
        rows = slice(first, first + COMPARED_ROWS)
        if not numpy.array_equal(floats(one[rows]), floats(other[rows])):
            return False
    return True
