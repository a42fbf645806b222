"""Models whose output matrix is the embedding: files that have one of the two or both, and adapters that
change only one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.log import log
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.weights.lora import Change, Copy, FileSlice, read_adapters

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.assemble import Sources
    from chatlm.worker.weights.family import Family
    from chatlm.worker.weights.recipe import ModelSpec

COMPARED_ROWS = 1024  # at a time: a float32 copy of all would take gigabytes


class Pair(NamedTuple):
    """The names of both matrices in a file."""

    embed: str
    head: str

    @classmethod
    def of(cls, table: Mapping[str, Seq[str]]) -> Pair:
        """As `tensor_sources` has them."""
        return cls(table["embed"][0], table["head"][0])

    @classmethod
    def in_adapters(cls, row: Family, spec: ModelSpec) -> Pair:
        """As adapters call them."""
        return cls(*(row.in_adapters(spec, name)[0] for name in cls.of(row.all_tensors)))


def head_of_folder(path: Path, spec: ModelSpec, row: Family, state: Mapping[str, Any],
                   scales: Mapping[str, Any]) -> tuple[ModelSpec, dict[str, Any], dict[str, Any]]:
    """The spec, tensors and scales of a folder whose config says that the head is the embedding.

    Of both, one is enough. A head that differs from the embedding is the model's own, as in transformers."""
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
    scale = scales.get(pair.head), scales.get(pair.embed)
    if equal(state[pair.head], state[pair.embed]) and equal(*scale):
        for tensors in (state, scales):
            tensors.pop(pair.head, None)
        return spec, state, scales
    log.warning("%s says tie_word_embeddings, but %s differs from %s: the file's own head is used. If the "
                "model was trained with one matrix for both, remove it", path, pair.head, pair.embed)
    return replace(spec, tied_head=False), state, scales


def equal(one: Any, other: Any) -> bool:
    """Have two of a file's matrices the same values? Packed ones are never compared: they are seldom
    exact."""
    if one is None or other is None:
        return one is other
    if not isinstance(one, numpy.ndarray) or not isinstance(other, numpy.ndarray) or one.shape != other.shape:
        return False
    if not one.ndim:
        return bool(floats(one) == floats(other))
    return all(numpy.array_equal(floats(one[row:row + COMPARED_ROWS]), floats(other[row:row + COMPARED_ROWS]))
               for row in range(0, len(one), COMPARED_ROWS))


class Merged(NamedTuple):
    """A model's files once adapters are merged into them."""

    spec: ModelSpec
    sources: Sources
    added: dict[str, list[Change | Copy]]  # what changes in each of the file's tensors
    described: str
    tied: Seq[str]  # Hugging Face's names of an embedding and of the head that it still is


def merge_adapters(settings: Settings, spec: ModelSpec, sources: Sources, shapes: Mapping[str, tuple],
                   slices: Mapping[str, list[FileSlice]], names: Iterable[str], pair: Pair, theirs: Pair,
                   tables: Iterable[dict[str, Any]]) -> Merged:
    """`read_adapters`. Where they divide a tied pair (`theirs` in a folder, `pair` in the file), the model
    gets a head of its own, which in the file's `tables` of tensors is still the embedding."""
    if not spec.tied_head:
        return Merged(spec, sources, *read_adapters(settings, shapes, slices, names), ())
    shapes = {**shapes, pair.head: shapes[pair.embed]}
    slices = {**slices, theirs.head: [FileSlice(pair.head)]}
    added, described = read_adapters(settings, shapes, slices, names, theirs)
    if not divided_by(added, pair):
        return Merged(spec, sources, added, described, theirs)
    for table in tables:
        if pair.embed in table:
            table[pair.head] = table[pair.embed]
    shape, in_file = sources["embed"]
    sources = {**sources, "head": (shape, {pair.head: in_file[pair.embed]})}
    return Merged(replace(spec, tied_head=False), sources, added, described, ())


def divided_by(added: dict[str, list[Change | Copy]], pair: Pair) -> bool:
    """Do adapters make the head another matrix than the embedding? If not, `added` has for the embedding what
    both become."""
    both = added.get(pair.embed, []), added.get(pair.head, [])
    copies = [change for changes in both for change in changes if isinstance(change, Copy)]
    if any(isinstance(change, Change) for changes in both for change in changes) or len(copies) == 1:
        return True
    if copies and not equal(copies[0].weight, copies[1].weight):
        return True
    added.pop(pair.head, None)
    return False
