"""How a model is divided among ranks and stages."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError
from chatlm.worker.model.spec import DeltaRule, Mamba2, NoMixer, expected_tensors
from chatlm.worker.model.tensors import TILE_ROWS, Cut

if TYPE_CHECKING:
    from chatlm.worker.model.spec import Attention, Mixer, ModelSpec
    from chatlm.worker.weights.rules import LoadedModel


class MixerShare(NamedTuple):
    """A rank's share of a layer that keeps a state: the mixer of its part, and the axis and ranges of each
    tensor that is divided."""

    own: Mixer
    parts: dict[str, tuple[int, list[range]]]


class RankShare(NamedTuple):
    """A rank's share of the vocabulary, of the heads, and of the F of each feed-forward part or expert.

    If there are more ranks than kv heads, several share one, each with some of its query heads.
    """

    rank: int
    tp: int
    vocabulary: range
    heads: range
    kv_heads: range
    ffn: range
    dense: range   # of the F of layers without experts, where others have some
    shared: range  # of the F of the expert that every token takes
    own_rows: int  # of the vocabulary, padded on the last ranks: the same for every rank
    mixers: dict[Mixer, MixerShare]


def divide(spec: ModelSpec, rank: int, tp: int, block: int) -> RankShare:
    """The share of a rank, in smaller blocks if there are too few for all; ConfigError if that fails."""
    for smaller in (256, 32, TILE_ROWS):
        if smaller <= block and spec.ffn_size % smaller == 0 and spec.ffn_size // smaller >= tp:
            return share_of(spec, rank, tp, smaller)
    return share_of(spec, rank, tp)


def share_of(spec: ModelSpec, rank: int, tp: int, block: int = 1) -> RankShare:
    """The share of one of `tp` ranks, or ConfigError if some rank would get nothing.

    `block` columns of `down` are packed together. If blocks cannot be divided evenly, the first ranks have
    one more. Each rank has ceil(V / tp) rows of the vocabulary, the last ones what remains.
    """
    heads, kv_heads = heads_of(spec.attention(0), rank, tp)
    blocks = -(-spec.ffn_size // block)
    if spec.qk_norm_sizes and tp > spec.kv_heads:
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {spec.kv_heads} key "
                          "heads, which ranks cannot share because all are normalized together")
    if tp > min(most := min((attn.heads for attn in spec.by_layer if attn), default=spec.heads), blocks):
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {most} query heads, "
                          f"and its feed-forward part {blocks} blocks of {block} columns")
    refuse_heads(spec, tp, min(spec.heads, blocks))
    rows = -(-spec.vocab_size // tp)
    ffn, dense, shared = (blocks_of(size, rank, tp, block)
                          for size in (spec.ffn_size, spec.dense_size, spec.shared_size))
    mixers = {mixer: mixer_share(mixer, spec.width, rank, tp, block) for mixer in spec.mixers if mixer}
    return RankShare(rank, tp, range(spec.vocab_size)[rank * rows:(rank + 1) * rows], heads, kv_heads, ffn,
                     dense, shared, rows, mixers)


def refuse_heads(spec: ModelSpec, tp: int, most: int):
    """ConfigError if the heads of a layer that keeps a state cannot be divided evenly among `tp` ranks; all
    else in the model can be divided among up to `most`."""
    for mixer in filter(None, spec.mixers):
        count, heads = ((mixer.key_heads, "key heads in its linear attention")
                        if isinstance(mixer, DeltaRule) else
                        (mixer.heads, "heads in its Mamba layers") if isinstance(mixer, Mamba2) else (0, ""))
        if count % tp:
            allowed = [str(ranks) for ranks in range(1, min(count, most) + 1) if count % ranks == 0]
            raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {count} {heads}, so "
                              f"--tp must be one of {', '.join(allowed)}")


def heads_of(attention: Attention, rank: int, tp: int) -> tuple[range, range]:
    """The query heads and kv heads that a rank has in a layer."""
    kv_heads = attention.kv_heads
    group, firsts = attention.heads // kv_heads, [n * kv_heads // tp for n in range(tp)]
    first, sharing = firsts[rank], firsts.count(firsts[rank])
    own = range(first, max(first + 1, (rank + 1) * kv_heads // tp))
    turn = rank - firsts.index(first)  # among those with the same kv heads
    return range(first * group + group * turn // sharing,
                 own[-1] * group + group * (turn + 1) // sharing), own


def attention_share(attention: Attention, rank: int, tp: int) -> Attention:
    """A rank's share of a layer's attention."""
    heads, kv_heads = heads_of(attention, rank, tp)
    return replace(attention, heads=len(heads), kv_heads=len(kv_heads))


def qkv_rows(s: ModelSpec, attn: Attention, heads: range, kv_heads: range) -> list[range]:
    """A rank's rows of q, k and v, as far as the layer has them."""
    (q, k, v), D, Dv = attn.parts, attn.head_size, attn.value_size
    return [rows_of(heads, D * (1 + s.output_gate)),
            *([rows_of(kv_heads, D, q * (1 + s.output_gate))] if k else []),
            *([rows_of(kv_heads, Dv, q * (1 + s.output_gate) + k)] if v else [])]


def blocks_of(size: int, rank: int, tp: int, block: int) -> range:
    """The columns of a rank, in smaller blocks if there are too few; the first ranks may have one more."""
    block = next(smaller for smaller in (block, 32, TILE_ROWS, 1) if smaller == 1 or size >= smaller * tp)
    all_have, more = divmod(-(-size // block), tp)
    return range(size)[slice(*(block * (n * all_have + min(n, more)) for n in (rank, rank + 1)))]


def rows_of(heads: range, size: int, before: int = 0) -> range:
    """The rows of some heads of `size` rows each, in a matrix where `before` rows precede the first head."""
    return range(before + heads.start * size, before + heads.stop * size)


def mixer_share(mixer: Mixer, C: int, rank: int, tp: int, block: int) -> MixerShare:
    """A rank's channels of a short convolution, or its heads of another layer that keeps a state."""
    if isinstance(mixer, DeltaRule):
        return delta_share(mixer, rank, tp)
    if isinstance(mixer, Mamba2):
        return mamba_share(mixer, rank, tp)
    if isinstance(mixer, NoMixer):
        return MixerShare(mixer, {})
    mine = blocks_of(C, rank, tp, block)
    thirds, taps = (0, [rows_of(mine, 1, n * C) for n in range(3)]), (0, [rows_of(mine, mixer.size)])
    return MixerShare(replace(mixer, channels=len(mine)), {
        "mix_in": thirds, "mix_in_bias": thirds, "taps": taps, "taps_bias": (0, [mine]),
        "mix_out": (1, [mine])})


def delta_share(mixer: DeltaRule, rank: int, tp: int) -> MixerShare:
    """Some key heads, and all value heads that read them."""
    Hk, D, Dv, r = mixer.key_heads, mixer.key_size, mixer.value_size, mixer.value_heads // mixer.key_heads
    keys = range(rank * Hk // tp, (rank + 1) * Hk // tp)
    values = [rows_of(keys, 1, n * Hk) for n in range(r)] if mixer.alternating else [rows_of(keys, r)]
    p, z, b, _ = mixer.parts
    channels = [rows_of(keys, D), rows_of(keys, D, Hk * D),
                *(rows_of(own, Dv, 2 * Hk * D) for own in values)]
    rows = [*channels, *(rows_of(own, Dv, p) for own in values)]
    if mixer.heads_by_key:
        rows = [rows_of(keys, 2 * (D + r * Dv))]
    if mixer.gates_by_key:
        rows.append(rows_of(keys, 2 * r, p + z))
    else:
        rows += [rows_of(own, 1, before) for before in (p + z, p + z + b) for own in values]
    return MixerShare(replace(mixer, key_heads=len(keys), value_heads=len(keys) * r), {
        "mix_in": (0, rows), "taps": (0, [rows_of(part, mixer.size) for part in channels]),
        "decay": (0, values), "dt_bias": (0, values), "mix_out": (1, [rows_of(own, Dv) for own in values])})


def mamba_share(mixer: Mamba2, rank: int, tp: int) -> MixerShare:
    """Some heads with the B and C of their groups, or of all groups if whole groups cannot be distributed:
    ranks then share the norms."""
    G, P, N, count = mixer.groups, mixer.head_size, mixer.state_size, mixer.heads // tp
    heads, inner = range(rank * count, (rank + 1) * count), mixer.parts[0]
    groups, own = range(G), replace(mixer, heads=count, of_heads=mixer.heads, first_head=heads.start)
    if G % tp == 0:
        groups = range(rank * G // tp, (rank + 1) * G // tp)
        own = replace(mixer, heads=count, groups=len(groups))
    columns = rows_of(heads, P)
    channels = [columns, rows_of(groups, N, inner), rows_of(groups, N, inner + G * N)]
    rows = [columns, *(rows_of(part, 1, inner) for part in channels), rows_of(heads, 1, 2 * (inner + G * N))]
    return MixerShare(own, {
        "mix_in": (0, rows), "mix_in_bias": (0, rows), "taps_bias": (0, channels),
        "taps": (0, [rows_of(part, mixer.size) for part in channels]),
        "mix_norm": (0, [columns]), "mix_out": (1, [columns])} | dict.fromkeys(
            ("decay", "dt_bias", "skip"), (0, [heads])))


SPLITS: dict[str, tuple[int, Callable[[ModelSpec, RankShare], list[range]]]] = {
    # our tensor -> (the axis that is divided, what a rank has of it); all others are not divided
    "embed": (0, lambda s, my: [my.vocabulary]), "head": (0, lambda s, my: [my.vocabulary]),
    "up": (0, lambda s, my: [my.dense if s.experts else my.ffn]),
    "down": (1, lambda s, my: [my.dense if s.experts else my.ffn]),
    "gate_up": (0, lambda s, my: [rows_of(my.dense, 1, n * s.dense_size) if s.experts else
                                  rows_of(my.ffn, 1, n * s.ffn_size) for n in range(2)]),
    "shared_gate_up": (0, lambda s, my: [rows_of(my.shared, 1, n * s.shared_size) for n in range(2)]),
    "shared_up": (0, lambda s, my: [my.shared]), "shared_down": (1, lambda s, my: [my.shared]),
    "expert_gate_up": (0, lambda s, my: [rows_of(my.ffn, 1, n * s.ffn_size) for n in range(2 * s.experts)]),
    "expert_up": (0, lambda s, my: [rows_of(my.ffn, 1, n * s.ffn_size) for n in range(s.experts)]),
    "expert_down": (1, lambda s, my: [my.ffn]),
    "mix_out": (1, lambda s, my: [])}  # as its mixer's share says
ATTENTION_SPLITS: dict[str, tuple[int, Callable[[ModelSpec, Attention, range, range], list[range]]]] = {
    # likewise, from the query heads and kv heads that a rank has in the layer
    "qkv": (0, qkv_rows), "sinks": (0, lambda s, attn, heads, kv_heads: [heads]),
    "q_norm": (0, lambda s, attn, heads, kv_heads: (
        [rows_of(heads, attn.head_size)] if s.qk_norm_sizes else [])),
    "k_norm": (0, lambda s, attn, heads, kv_heads: (
        [rows_of(kv_heads, attn.head_size)] if s.qk_norm_sizes else [])),
    "output": (1, lambda s, attn, heads, kv_heads: [rows_of(heads, attn.value_size)]),
    "value_embed": (1, lambda s, attn, heads, kv_heads: [rows_of(kv_heads, attn.value_size)]),
    "ve_gate": (0, lambda s, attn, heads, kv_heads: [kv_heads])}


def shard_of(name: str, spec: ModelSpec, share: RankShare) -> tuple[int, list[range]] | None:
    """(an axis of the tensor, the ranges of it that the rank has); no ranges: the whole tensor.

    None: nothing. If the columns of a matrix are divided, only rank 0 adds the bias.
    """
    layer, _, part = name.rpartition(".")
    matrix, bias, _ = part.partition("_bias")
    mixer = spec.mixers[int(layer)] if layer and spec.mixers else None
    if mixer and part in (parts := share.mixers[mixer].parts):
        return parts[part]
    if matrix in ATTENTION_SPLITS:
        axis, ranges_of = ATTENTION_SPLITS[matrix]
        attn = spec.attention(int(layer))
        ranges = ranges_of(spec, attn, *heads_of(attn, share.rank, share.tp))
    else:
        axis, ranges_of = SPLITS.get(matrix, (0, lambda spec, share: []))
        if layer and int(layer) in spec.double_layers:
            spec = replace(spec, ffn_size=2 * spec.ffn_size)
            share = share._replace(ffn=range(2 * share.ffn.start, 2 * share.ffn.stop))
        ranges = ranges_of(spec, share)
    if bias and axis == 1:
        return None if share.rank else (0, [])
    return axis, ranges


def shard_spec(spec: ModelSpec, share: RankShare) -> ModelSpec:
    """The spec of a rank's share; embeddings are summed over the ranks, logits concatenated."""
    attentions = tuple(attention_share(attn, share.rank, share.tp) for attn in spec.attentions)
    return replace(spec, heads=len(share.heads), kv_heads=len(share.kv_heads), attentions=attentions,
                   ffn_size=len(share.ffn),
                   dense_size=len(share.dense), shared_size=len(share.shared),
                   mixers=tuple(mixer and share.mixers[mixer].own for mixer in spec.mixers),
                   own_rows=share.own_rows, first_row=share.rank * share.own_rows)


def shard_model(model: LoadedModel, rank: int, tp: int, quantize: str | None = None) -> LoadedModel:
    """The share of one of `tp` ranks of a model not yet read, packed as --quantize says."""
    if tp == 1:
        return model
    spec, shapes = model.spec, expected_tensors(model.spec)
    packed_together = 256 if "_k" in (quantize or "") else 32 if quantize else 0
    share = divide(spec, rank, tp, max(model.block, packed_together))
    own, tensors = shard_spec(spec, share), dict(model.tensors)
    for name, shape in expected_tensors(own).items():
        part = shard_of(name, spec, share)
        if part is None:
            tensors[name] = numpy.zeros(shape, numpy.float32)  # pyright: ignore[reportArgumentType]  a tensor is packed as well
        elif part[1] and name in tensors:  # a tied head is not
            tensors[name] = tensors[name].less(Cut(shapes[name], shape, *part))
    return replace(model, spec=own, tensors=tensors)


def layers_of(spec: ModelSpec, stage: int, stages: int) -> range:
    """The layers of a stage; layers that share keys stay together. The head counts as the number of layers
    that have as many weights."""
    attn = next(filter(None, spec.by_layer))
    layer = spec.width * (2 * (attn.heads + attn.kv_heads) * attn.head_size
                          + 3 * (spec.ffn_size * max(spec.experts_per_token, 1) + spec.shared_size))
    total = spec.layers + spec.vocab_size * spec.width / layer
    sources = {l: attn.source for l, attn in enumerate(spec.by_layer) if attn and attn.source is not None}
    firsts = [l for l in range(1, spec.layers)
              if all(source >= l for reader, source in sources.items() if reader >= l)]
    if len(firsts) < stages - 1:
        raise ConfigError(f"the model cannot be divided into {stages} stages: its last layers read keys "
                          f"of others, which must be in their stage; at most {len(firsts) + 1} are possible")
    cuts = [min(max(bisect.bisect(firsts, round(n * total / stages)), n), len(firsts) - stages + 1 + n)
            for n in range(1, stages)]
    ends = [0, *(firsts[cut - 1] for cut in cuts), spec.layers]
    return range(ends[stage], ends[stage + 1])


def stage_model(model: LoadedModel, stage: int, stages: int) -> LoadedModel:
    """The share of one of several stages, each with some layers, of a model not yet read."""
    spec = model.spec
    if stages == 1:
        return model
    if stages > spec.layers:
        raise ConfigError(f"the model has {spec.layers} layers, which cannot be divided into {stages} stages")
    mine = layers_of(spec, stage, stages)
    first, kept = mine.start, slice(mine.start, mine.stop)
    own = replace(
        spec, layers=len(mine), mixers=spec.mixers[kept], opens=stage == 0, closes=stage == stages - 1,
        layer_inputs=(first, spec.layers) if spec.layer_input_size else (0, 0), tied_head=False,
        attentions=tuple(replace(attn, source=None if attn.source is None else attn.source - first)
                         for attn in spec.attentions[kept]),
        backout_layer=None if spec.backout_layer is None else spec.backout_layer - first,
        **{name: tuple(layer - first for layer in getattr(spec, name) if layer in mine)
           for name in ("value_embed_layers", "dense_layers", "double_layers", "bare_layers")})
    whole, tensors = {"head": model.tensors["embed"]} | model.tensors, {}
    for name, shape in expected_tensors(own).items():
        layer, dot, part = name.partition(".")
        tensors[name] = whole[f"{int(layer) + first}.{part}" if dot else name]
        if name in ("resid_lambdas", "x0_lambdas"):
            tensors[name] = tensors[name].less(Cut((spec.layers,), shape, 0, (mine,)))
    adaptable = model.adaptable and replace(model.adaptable, first_layer=first)
    return replace(model, spec=own, tensors=tensors, adaptable=adaptable)
