"""Models whose output matrix is the embedding: files that have one of the two or both, and adapters that
change only one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.log import log
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.weights.lora import Change, Copy, FileSlice, read_adapters
from chatlm.worker.weights.sources import file_shapes, unread_keys

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.family import Family
    from chatlm.worker.weights.recipe import ModelSpec
    from chatlm.worker.weights.sources import Sources
    from chatlm.worker.weights.stored_model import StoredModel

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
    def in_adapters(cls, row: Family, spec: ModelSpec) -> Pair:
        """As adapters call them."""
        return cls(*(row.in_adapters(spec, name)[0] for name in cls.of(row.all_tensors)))


def head_of_folder(path: Path, spec: ModelSpec, row: Family, state: Mapping[str, Any],
                   scales: Mapping[str, Any]) -> tuple[ModelSpec, dict[str, Any], dict[str, Any]]:
    """The spec, tensors and scales of a folder whose config says that the head is the embedding.

    One of the two matrices is enough. A head that differs from the embedding is the model's own, as in
    transformers."""
    pair = Pair.of(row.all_tensors)
    state = dict(state)
    scales = dict(scales)
    if not spec.tied_head or pair.head not in state:
        return spec, state, scales
    if pair.embed not in state:
        for tensors in (state, scales):
            if pair.head in tensors:
                tensors[pair.embed] = tensors.pop(pair.head)
        return spec, state, scales
    have_same_scales = equal(scales.get(pair.head), scales.get(pair.embed))
    if have_same_scales and equal(state[pair.head], state[pair.embed]):
        for tensors in (state, scales):
            tensors.pop(pair.head, None)
        return spec, state, scales
    log.warning("%s says tie_word_embeddings, but %s differs from %s: the file's own head is used. If the "
                "model was trained with one matrix for both, remove it", path, pair.head, pair.embed)
    return replace(spec, tied_head=False), state, scales


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


class Merged(NamedTuple):
    """A model in its files once adapters are merged into it."""

    stored: StoredModel
    sources: Sources
    added: dict[str, list[Change | Copy]]  # what changes in each of the files' tensors
    described: str
    tied: Seq[str]  # Hugging Face's names of an embedding and of the head that it still is


def merge_adapters(settings: Settings, stored: StoredModel, sources: Sources) -> Merged:
    """Read the adapters of --lora. Where they make a tied head and the embedding different matrices, the
    model gets a head of its own, which in the files is still the embedding."""
    targets = stored.targets(sources)
    tied = targets.tied if stored.spec.tied_head else ()
    if not settings.lora:
        return Merged(stored, sources, {}, "", tied)
    shapes = file_shapes(sources) | unread_keys(stored.spec)
    slices = targets.slices()
    if not tied:
        return Merged(stored, sources, *read_adapters(settings, shapes, slices, stored.names), tied)
    pair = Pair.of(stored.table)
    shapes[pair.head] = shapes[pair.embed]
    slices[targets.tied.head] = [FileSlice(pair.head)]
    added, described = read_adapters(settings, shapes, slices, stored.names, tied)
    if not divided_by(added, pair):
        return Merged(stored, sources, added, described, tied)
    shape, in_file = sources["embed"]
    sources = {**sources, "head": (shape, {pair.head: in_file[pair.embed]})}
    return Merged(stored.with_own_head(), sources, added, described, ())


def divided_by(added: dict[str, list[Change | Copy]], pair: Pair) -> bool:
    """Do adapters make the head and the embedding different matrices? If not, `added` has for the embedding
    what both become."""
    both = added.get(pair.embed, []), added.get(pair.head, [])
    copies = [change for changes in both for change in changes if isinstance(change, Copy)]
    if any(isinstance(change, Change) for changes in both for change in changes) or len(copies) == 1:
        return True
    if copies and not equal(copies[0].weight, copies[1].weight):
        return True
    added.pop(pair.head, None)
    return False
