"""`Sources`: which rows of the files' tensors make each of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.packed import RopePairs
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.experts import Experts, ExpertsBesideDense
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2, ShortConv
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.weights.families.family import KV_UP

if TYPE_CHECKING:
    import numpy
    from chatlm.worker.model.blocks.step import Block
    from chatlm.worker.model.blocks.model import Model

# our tensor -> (its shape, {the files' tensors whose rows it is made of: their shapes})
Sources = dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]]]]
Made = Callable[["numpy.ndarray"], "numpy.ndarray"]  # a file's tensor, or some of its rows, becomes ours
MOST_PROBLEMS = 20  # that an error names
OF_VOCABULARY = ("embed", "head", "value_embed", "layer_embed")  # a row for each token
HALVES = ("gate_up", "gate_up_bias", "shared_gate_up")


def of_rows(ours: str) -> Made | None:
    """What makes one of our tensors, if it is not just rows of the file's."""
    return None


def file_shapes(sources: Sources) -> dict[str, tuple[int, ...]]:
    return {name: shape for _, theirs in sources.values() for name, shape in theirs.items()}


def check_names_and_shapes(path: Path, state: Mapping[str, tuple], sources: Sources):
    """ConfigError unless the files' tensors (name -> shape) are those of `sources`."""
    expected = file_shapes(sources)
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in state]
    problems += [f"unknown {name} {state[name]}" for name in state if name not in expected]
    problems += [f"{name} is {state[name]} instead of {expected[name]}"
                 for name in expected if name in state and state[name] != expected[name]]
    if problems:
        left = len(problems) - MOST_PROBLEMS
        more = f" and {left} more" if left > 0 else ""
        raise ConfigError(f"{path}: the tensors do not match this model: "
                          f"{'; '.join(problems[:MOST_PROBLEMS])}{more}")


def tensor_sources(model: Model, table: Mapping[str, tuple[str, ...]], padded: int) -> Sources:
    """The sources of a model whose files have the names in `table`. Their vocabulary tensors have `padded`
    rows."""
    sources: Sources = {}
    for ours, shape in model.shapes().items():
        layer, _, part = ours.rpartition(".")
        if part == "head" and model.tied:
            continue
        names = table.get(part, (part,))
        own = model.layers[int(layer)] if layer else Layer()
        mixer = own.mixer
        if part.startswith("expert_"):
            assert isinstance(own.feed, Experts | ExpertsBesideDense)
            sources[ours] = shape, expert_sources(names, layer, shape, own.feed.count)
        elif part in KV_UP and table["k_up"] == table["v_up"]:
            assert isinstance(mixer, Mla)
            rows = mixer.heads * (mixer.plain + mixer.head_values)
            sources[ours] = shape, {names[0].format(layer): (rows, mixer.kept)}
        elif columns := columns_of_flat(part, mixer, model):
            sources[ours] = shape, {names[0].format(layer): (shape[0] // columns, columns)}
        else:
            rows = rows_of_parts(part, shape, mixer, padded)
            if part in ("qkv", "qkv_bias"):  # a layer may have no k or v of its own
                names = names[:len(rows)]
            if len(rows) != len(names):  # phi3 has one tensor for all
                rows = shape[:1]
            sources[ours] = shape, {name.format(layer): (count, *shape[1:])
                                    for name, count in zip(names, rows)}
    return sources


def expert_sources(names: tuple[str, ...], layer: str, shape: tuple[int, ...],
                   experts: int) -> dict[str, tuple[int, ...]]:
    """The files' tensors of all experts' matrices of a layer, which we have as one of this shape.

    A name with a second {} stands for a tensor of each expert, another for one of all (E, rows of each,
    ..)."""
    of_all = experts, shape[0] // experts // len(names), *shape[1:]
    theirs = {}
    for name in names:
        one_each = name.count("{}") > 1
        for expert in range(experts):
            theirs[name.format(layer, expert)] = of_all[1:] if one_each else of_all
    return theirs


def columns_of_flat(part: str, mixer: Block | None, model: Model) -> int:
    """The columns that the files have of a table which is flat here, since no product uses it as a matrix; 0
    for any other tensor."""
    if part in ("positions", "types"):
        return model.width
    if part == "buckets":
        return model.distances
    if part == "taps":
        assert isinstance(mixer, ShortConv | DeltaRule | Mamba2)
        return mixer.size
    return 0


def rows_of_parts(part: str, shape: tuple[int, ...], mixer: Block | None, padded: int) -> tuple[int, ...]:
    """The rows of each of the files' tensors that make one of ours of this shape."""
    if part in OF_VOCABULARY:
        return (padded,)
    if part in ("qkv", "qkv_bias"):
        return qkv_rows(mixer)
    if part in HALVES:
        return shape[0] // 2, shape[0] // 2
    if part == "mix_in" and isinstance(mixer, DeltaRule):
        return mixer.rows
    return shape[:1]


def qkv_rows(attention: Block | None) -> tuple[int, ...]:
    """The rows of q, with its gates, k and v, as far as the layer has them."""
    assert isinstance(attention, Attention)
    q, *kv = attention.runs
    return q.length * (1 + attention.gated), *(run.length for run in kv)


def pairs_of(model: Model) -> RopePairs:
    """Which rows of q and k turn together in files where these are adjacent."""
    if not model.attentions:
        return RopePairs(0, 0)
    size = model.attentions[0].head_size
    return RopePairs(size, max(attn.rope.size for attn in model.attentions) or size)


def layers_without_keys(model: Model) -> dict[int, Attention]:
    """The layers that read the keys and values of another layer, by number: how they attend."""
    return {layer: attn for layer, attn in enumerate(model.by_layer)
            if isinstance(attn, Attention) and attn.source is not None}


def without_shared(model: Model, state: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors without the keys and values of layers that read another's, which some files have."""
    layers = {str(l) for l in layers_without_keys(model)}
    if not layers:
        return {**state}
    keys = re.compile(r"(?:model\.layers|blk)\.(\d+)\.(?:self_attn\.|attn_)[kv](?:_proj|_norm)?\.")
    own = {}
    for name, tensor in state.items():
        key = keys.match(name)
        if key is None or key[1] not in layers:
            own[name] = tensor
    return own


def unread_keys(model: Model) -> dict[str, tuple[int, ...]]:
    """Hugging Face's key and value matrices of layers that read another's; an adapter may contain them."""
    return {f"model.layers.{l}.self_attn.{part}_proj.weight": (attn.kv_heads * size, model.width)
            for l, attn in layers_without_keys(model).items()
            for part, size in (("k", attn.head_size), ("v", attn.value_size))}


def shape_of_both(model: Model, ours: str) -> tuple[int, int]:
    """Of the matrix that has a layer's keys and values of heads."""
    block = model.layers[int(ours.partition(".")[0])].mixer
    assert isinstance(block, Mla)
    return block.heads * (block.plain + block.head_values), block.kept


def made_by(model: Model, ours: str) -> Made | None:
    """What makes one of our tensors of a matrix (H * (plain + Dv), kept) that has each head's keys and then
    its values; None if it is not made of it."""
    layer, _, part = ours.rpartition(".")
    if part not in KV_UP:
        return None
    block = model.layers[int(layer)].mixer
    assert isinstance(block, Mla)
    sizes = block.plain, block.head_values

    def of_heads(both: numpy.ndarray) -> numpy.ndarray:
        return both.reshape(-1, sum(sizes), *both.shape[1:])

    def keys(both: numpy.ndarray) -> numpy.ndarray:
        return of_heads(both)[:, :sizes[0]].swapaxes(1, 2).reshape(-1, sizes[0])

    def values(both: numpy.ndarray) -> numpy.ndarray:
        return of_heads(both)[:, sizes[0]:].reshape(-1, *both.shape[1:])

    return {"k_up": keys, "v_up": values}.get(part)
