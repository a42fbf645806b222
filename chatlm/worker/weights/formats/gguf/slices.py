"""Where a GGUF file stores the matrices of the model's folder, which adapters name and change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from typing import TYPE_CHECKING

import numpy

from chatlm.worker.model.blocks.mixers import DeltaRule
from chatlm.worker.weights.changes import FileSlice, fused_slices
from chatlm.worker.weights.families.family import KV_UP, is_one_more
from chatlm.worker.weights.formats.sources import file_shapes, made_by, shape_of_both, unread_keys

if TYPE_CHECKING:
    from chatlm.worker.weights.families.family import Family
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.model.blocks.model import Model


def gguf_slices(row: Family, model: Model, table: Mapping[str, tuple[str, ...]],
                sources: Sources) -> dict[str, list[FileSlice]]:
    """By adapters' names, where a GGUF file stores the matrices of the model's folder; `table` has the names
    in the file."""
    layers = model.layers
    slices = {name: [FileSlice(name)] for name in unread_keys(model)}
    shapes = file_shapes(sources)
    for ours in sources:
        layer, _, part = ours.rpartition(".")
        if part == "layer_embed":  # it stays in its file
            continue
        theirs = names_of(row.all_tensors, part, layer)
        own = names_of(table, part, layer)
        if part in KV_UP and table["k_up"] != table["v_up"]:  # the folder has them in one matrix
            slices.setdefault(theirs[0], []).append(
                FileSlice(own[0], made_by=made_by(model, ours), whole=shape_of_both(model, ours)))
            continue
        mixer = layers[int(layer)].mixer if layer else None
        if isinstance(mixer, DeltaRule) and part in ("mix_in", "mix_out"):
            slices |= linear_slices(mixer, theirs, own)
            continue
        for name, at in zip(theirs, own):
            shape = shapes.get(at, ())
            rows = slice(None)
            if row.ordered and at in shapes:
                rows = row.ordered(model, name, numpy.arange(shape[0]))
            if len(shape) == 2:
                slices[name] = [FileSlice(at, rows)]
            if is_norm(part, shape):
                slices[name] = [FileSlice(at, plus=float(is_one_more(row, name)))]
    slices = fused_slices(slices, shapes, row.fused, len(layers))
    return row.named_by_adapters(model, slices)


def names_of(table: Mapping[str, tuple[str, ...]], part: str, layer: str) -> list[str]:
    """The tensors that a part of a layer is made of; none of experts, which adapters cannot change here."""
    return [name.format(layer) for name in table.get(part, ()) if "expert" not in part]


def is_norm(part: str, shape: tuple[int, ...]) -> bool:
    """Is our tensor a norm's weight or bias, which a GGUF file has in the folder's order?"""
    return len(shape) == 1 and part.removesuffix("_bias").endswith("norm")


def linear_slices(mixer: DeltaRule, theirs: Seq[str], own: Seq[str]) -> dict[str, list[FileSlice]]:
    """Where a GGUF file stores a folder's linear attention matrices: Qwen3.5's value heads are in another
    order there, and Qwen3-Next's rows are not grouped by key head."""
    Hk = mixer.key_heads
    D = mixer.key_size
    Dv = mixer.value_size
    r = mixer.value_heads // mixer.key_heads
    p, z, *_ = mixer.parts
    if mixer.gates_by_key and len(own) > len(theirs):
        *qkv, gates = numpy.split(numpy.arange(p + z).reshape(Hk, -1), (D, 2 * D, 2 * D + r * Dv), 1)
        rows = numpy.concatenate([part.flatten() for part in qkv]), gates.flatten()
        return {theirs[0]: [*map(FileSlice, own, rows)], theirs[1]: [FileSlice(own[2])]}
    heads = numpy.arange(Hk * r)
    heads = heads.reshape(Hk, r).T.flatten() if mixer.alternating else heads
    values = (heads[:, None] * Dv + numpy.arange(Dv)).flatten()
    if len(own) == 1:
        return {theirs[0]: [FileSlice(own[0], columns=values)]}
    rows = numpy.concatenate((numpy.arange(p - z), p - z + values)), values, heads, heads
    return {name: [file_slice] for name, file_slice in zip(theirs, map(FileSlice, own, rows))}
