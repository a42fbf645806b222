"""What each of several ranks holds of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TYPE_CHECKING

import torch

from chatlm.common.errors import ConfigError
from chatlm.worker.model.spec import expected_tensors
from chatlm.worker.model.tensors import TILE_ROWS, Cut

if TYPE_CHECKING:
    from chatlm.worker.model.spec import ModelSpec
    from chatlm.worker.weights.rules import LoadedModel


class RankShare(NamedTuple):
    """What a rank has: of the vocabulary, of the heads, and of the F of each feed-forward part or expert.

    Where there are more ranks than kv heads, several have the same one, and each some of its query heads.
    """

    rank: int
    vocabulary: range
    heads: range
    kv_heads: range
    ffn: range
    dense: range   # of the F of layers without experts, where others have some
    shared: range  # of the F of the expert that every token takes
    own_rows: int  # of it, with those that the last ranks have too few of: as many for every rank


def divide(spec: ModelSpec, rank: int, tp: int, block: int) -> RankShare:
    """The share of a rank, in smaller blocks where there are too few for all; ConfigError if that fails."""
    for smaller in (256, 32, TILE_ROWS):
        if smaller <= block and spec.ffn_size % smaller == 0 and spec.ffn_size // smaller >= tp:
            return share_of(spec, rank, tp, smaller)
    return share_of(spec, rank, tp)


def share_of(spec: ModelSpec, rank: int, tp: int, block: int = 1) -> RankShare:
    """The share of one of `tp` ranks, or ConfigError where some rank would get nothing.

    `block`: so many columns of `down` are packed together. Blocks that do not divide are given out so that
    the first ranks have one more. Of the vocabulary each rank has ceil(V / tp), the last ones what remains.
    """
    group, firsts = spec.heads // spec.kv_heads, [n * spec.kv_heads // tp for n in range(tp)]
    first, sharing = firsts[rank], firsts.count(firsts[rank])
    kv_heads = range(first, max(first + 1, (rank + 1) * spec.kv_heads // tp))
    turn = rank - firsts.index(first)  # among those with the same kv heads
    heads = range(first * group + group * turn // sharing,
                  kv_heads[-1] * group + group * (turn + 1) // sharing)
    blocks = -(-spec.ffn_size // block)
    if spec.qk_norm_sizes and tp > spec.kv_heads:
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {spec.kv_heads} heads of "
                          "keys, and no rank may share one, because all are normalized together")
    if tp > min(spec.heads, blocks):
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {spec.heads} query heads, "
                          f"and its feed-forward part {blocks} blocks of {block} columns")
    rows = -(-spec.vocab_size // tp)
    ffn, dense, shared = (blocks_of(size, rank, tp, block)
                          for size in (spec.ffn_size, spec.dense_size, spec.shared_size))
    return RankShare(rank, range(spec.vocab_size)[rank * rows:(rank + 1) * rows], heads, kv_heads, ffn, dense,
                     shared, rows)


def blocks_of(size: int, rank: int, tp: int, block: int) -> range:
    """The columns of a rank, in smaller blocks where there are too few; the first ranks may have one more."""
    block = next(smaller for smaller in (block, 32, TILE_ROWS, 1) if smaller == 1 or size >= smaller * tp)
    all_have, more = divmod(-(-size // block), tp)
    return range(size)[slice(*(block * (n * all_have + min(n, more)) for n in (rank, rank + 1)))]


def rows_of(heads: range, size: int, before: int = 0) -> range:
    """The rows of some heads of `size` rows each, in a matrix where `before` rows precede the first head."""
    return range(before + heads.start * size, before + heads.stop * size)


SPLITS: dict[str, tuple[int, Callable[[ModelSpec, RankShare], list[range]]]] = {
    # our tensor -> (its axis that is divided, what of that a rank has); of all others it has everything
    "embed": (0, lambda s, my: [my.vocabulary]), "head": (0, lambda s, my: [my.vocabulary]),
    "qkv": (0, lambda s, my: [
        rows_of(my.heads, s.head_size),
        *(rows_of(my.kv_heads, s.head_size, n * s.head_size) for n in (s.heads, s.heads + s.kv_heads))]),
    "q_norm": (0, lambda s, my: [rows_of(my.heads, s.head_size)] if s.qk_norm_sizes else []),
    "k_norm": (0, lambda s, my: [rows_of(my.kv_heads, s.head_size)] if s.qk_norm_sizes else []),
    "sinks": (0, lambda s, my: [my.heads]), "output": (1, lambda s, my: [rows_of(my.heads, s.head_size)]),
    "value_embed": (1, lambda s, my: [rows_of(my.kv_heads, s.head_size)]),
    "ve_gate": (0, lambda s, my: [my.kv_heads]),
    "up": (0, lambda s, my: [my.ffn]), "down": (1, lambda s, my: [my.dense if s.experts else my.ffn]),
    "gate_up": (0, lambda s, my: [rows_of(my.dense, 1, n * s.dense_size) if s.experts else
                                  rows_of(my.ffn, 1, n * s.ffn_size) for n in range(2)]),
    "shared_gate_up": (0, lambda s, my: [rows_of(my.shared, 1, n * s.shared_size) for n in range(2)]),
    "shared_down": (1, lambda s, my: [my.shared]),
    "expert_gate_up": (0, lambda s, my: [rows_of(my.ffn, 1, n * s.ffn_size) for n in range(2 * s.experts)]),
    "expert_down": (1, lambda s, my: [my.ffn])}


def shard_of(name: str, spec: ModelSpec, share: RankShare) -> tuple[int, list[range]] | None:
    """(an axis of the tensor, ranges of it that together are the rank's); no ranges: all of it is.

    None: nothing is. Where the columns of a matrix are divided, rank 0 alone adds the bias.
    """
    matrix, bias, _ = name.rpartition(".")[2].partition("_bias")
    axis, ranges_of = SPLITS.get(matrix, (0, lambda spec, share: []))
    if bias and axis == 1:
        return None if share.rank else (0, [])
    return axis, ranges_of(spec, share)


def shard_spec(spec: ModelSpec, share: RankShare) -> ModelSpec:
    """The sizes of what a rank has; embeddings are added up over the ranks, logits put side by side."""
    return replace(spec, heads=len(share.heads), kv_heads=len(share.kv_heads), ffn_size=len(share.ffn),
                   dense_size=len(share.dense), shared_size=len(share.shared),
                   own_rows=share.own_rows, first_row=share.rank * share.own_rows)


def refuse_states(model: LoadedModel, flag: str):
    if model.spec.mixers:
        raise ConfigError(f"{flag} is not supported yet for a model with layers that keep a state (here "
                          f"{len(model.spec.unpaged_layers)} of {model.spec.layers}); use {flag} 1")


def shard_model(model: LoadedModel, rank: int, tp: int, quantize: str | None = None) -> LoadedModel:
    """What one of `tp` ranks has of a model that is yet to be read, as --quantize packs it."""
    if tp == 1:
        return model
    refuse_states(model, "--tp")
    spec, shapes = model.spec, expected_tensors(model.spec)
    packed_together = 256 if "_k" in (quantize or "") else 32 if quantize else 0
    share = divide(spec, rank, tp, max(model.block, packed_together))
    own, tensors = shard_spec(spec, share), dict(model.tensors)
    for name, shape in expected_tensors(own).items():
        part = shard_of(name, spec, share)
        if part is None:
            tensors[name] = torch.zeros(shape)  # pyright: ignore[reportArgumentType]  a tensor is packed as well
        elif part[1] and name in tensors:  # a tied head is not
            tensors[name] = tensors[name].less(Cut(shapes[name], shape, *part))
    return replace(model, spec=own, tensors=tensors)


def layers_of(spec: ModelSpec, stage: int, stages: int) -> range:
    """The layers of a stage. The head counts as as many layers as have its weights."""
    layer = spec.width * (2 * (spec.heads + spec.kv_heads) * spec.head_size
                          + 3 * (spec.ffn_size * max(spec.experts_per_token, 1) + spec.shared_size))
    total = spec.layers + spec.vocab_size * spec.width / layer
    ends = [min(max(round(n * total / stages), n), spec.layers - stages + n) for n in range(stages)]
    return range(ends[stage], [*ends, spec.layers][stage + 1])


def stage_model(model: LoadedModel, stage: int, stages: int) -> LoadedModel:
    """What one of several stages, each of some layers, has of a model that is yet to be read."""
    spec = model.spec
    if stages == 1:
        return model
    refuse_states(model, "--pp")
    if stages > spec.layers:
        raise ConfigError(f"the model has {spec.layers} layers, which cannot be divided into {stages} stages")
    mine = layers_of(spec, stage, stages)
    first, kept = mine.start, slice(mine.start, mine.stop)
    own = replace(
        spec, layers=len(mine), windows=spec.windows[kept], opens=stage == 0, closes=stage == stages - 1,
        tied_head=False, backout_layer=None if spec.backout_layer is None else spec.backout_layer - first,
        **{name: tuple(layer - first for layer in getattr(spec, name) if layer in mine)
           for name in ("unrotated_layers", "value_embed_layers", "dense_layers")})
    whole, tensors = {"head": model.tensors["embed"]} | model.tensors, {}
    for name, shape in expected_tensors(own).items():
        layer, dot, part = name.partition(".")
        tensors[name] = whole[f"{int(layer) + first}.{part}" if dot else name]
        if name in ("resid_lambdas", "x0_lambdas"):
            tensors[name] = tensors[name].less(Cut((spec.layers,), shape, 0, (mine,)))
    return replace(model, spec=own, tensors=tensors)
