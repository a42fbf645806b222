"""How a model is divided among ranks and stages."""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError
from chatlm.worker.model.blocks.experts import Experts, ExpertsBesideDense
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.tensors import TILE_ROWS, Cut

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.mixers import Mixer
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.loaded.model import LoadedModel


def refuse_ranks(model: Model, tp: int, block: int):
    """ConfigError if some rank would get nothing. `block` columns of a feed-forward block stay together."""
    feed = model.feed
    blocks = -(-feed.width // block) if feed else tp
    whole = [attn for attn in model.attentions if attn.norms and attn.norms.whole]
    if whole and tp > whole[0].kv_heads:
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {whole[0].kv_heads} key "
                          "heads, which ranks cannot share because all are normalized together")
    most = min((attn.heads for attn in model.attentions), default=blocks)
    if tp > min(most, blocks):
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {most} query heads, "
                          f"and its feed-forward part {blocks} blocks of {block} columns")
    narrowest = min((feed.width for feed in dense_feeds(model)), default=tp)
    if narrowest < tp:
        raise ConfigError(f"the model cannot be divided among {tp} ranks: the feed-forward part of a layer "
                          f"has {narrowest} columns")
    for mixer in filter(None, model.mixers):
        refuse_heads(mixer, tp, min(most, blocks))


def dense_feeds(model: Model) -> list[FeedForward]:
    """The dense feed-forward blocks, of which each rank must have a part."""
    feeds = [layer.feed for layer in model.layers]
    beside = [feed.dense for feed in feeds if isinstance(feed, ExpertsBesideDense)]
    return beside + [feed for feed in feeds if isinstance(feed, FeedForward)]


def refuse_heads(mixer: Mixer, tp: int, most: int):
    """ConfigError if `tp` ranks cannot have equally many heads of a layer that keeps a state. Everything else
    can be divided among up to `most`."""
    count, heads = mixer.shared
    if heads and count % tp:
        allowed = [str(ranks) for ranks in range(1, min(count, most) + 1) if count % ranks == 0]
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {count} {heads}, so "
                          f"--tp must be one of {', '.join(allowed)}")


def block_for(model: Model, tp: int, block: int) -> int:
    """How many columns of a feed-forward block stay together, at most `block`. ConfigError if the model
    cannot be divided."""
    width = model.feed.width if model.feed else 0
    fitting = [smaller for smaller in (256, 32, TILE_ROWS)
               if smaller <= block and width % smaller == 0 and width // smaller >= tp]
    chosen = fitting[0] if fitting else 1
    refuse_ranks(model, tp, chosen)
    return chosen


def shard_model(model: LoadedModel, rank: int, tp: int, quantize: str | None = None) -> LoadedModel:
    """One rank's share of a model, divided among `tp` and packed as --quantize says. No weight is read
    yet."""
    if tp == 1:
        return model
    whole = model.architecture
    tensors = dict(model.tensors)
    block = model.block
    if quantize:
        block = max(block, 256 if "_k" in quantize else 32)
    own, parts = whole.of_rank(rank, tp, block_for(whole, tp, block))
    shapes = whole.shapes()
    for name, shape in own.shapes().items():
        part = parts[name]
        if part is None:
            tensors[name] = numpy.zeros(shape, numpy.float32)  # pyright: ignore[reportArgumentType]  a tensor is packed as well
        elif part.ranges and name in tensors:  # a tied head is not
            tensors[name] = tensors[name].less(Cut(shapes[name], shape, part.axis, part.ranges))
    return replace(model, architecture=own, tensors=tensors)


def layers_of(model: Model, stage: int, stages: int) -> range:
    """The layers of a stage. Layers that share keys stay together. The head counts like as many layers as
    have its weights."""
    layers = len(model.layers)
    total = layers + model.vocab_size * model.width / weights_of_layer(model)
    sources = {l: attn.source for l, attn in enumerate(model.by_layer) if attn and attn.source is not None}
    # the layers with which a stage may begin
    firsts = [l for l in range(1, layers)
              if all(source >= l for reader, source in sources.items() if reader >= l)]
    if len(firsts) < stages - 1:
        raise ConfigError(f"the model cannot be divided into {stages} stages: its last layers read keys "
                          f"of others, which must be in their stage; at most {len(firsts) + 1} are possible")
    cuts = [min(max(bisect.bisect(firsts, round(n * total / stages)), n), len(firsts) - stages + 1 + n)
            for n in range(1, stages)]
    ends = [0, *(firsts[cut - 1] for cut in cuts), layers]
    return range(ends[stage], ends[stage + 1])


def weights_of_layer(model: Model) -> int:
    """About how many weights a step reads of a layer."""
    attn = model.attentions[0]
    feed = model.feed
    width = feed.width if feed else 0
    if isinstance(feed, Experts):
        width = feed.width * feed.router.chosen + (feed.shared.width if feed.shared else 0)
    if isinstance(feed, ExpertsBesideDense):
        width = feed.width * feed.router.chosen + feed.dense.width
    return model.width * (2 * (attn.heads + attn.kv_heads) * attn.head_size + 3 * width)


def stage_model(model: LoadedModel, stage: int, stages: int) -> LoadedModel:
    """One stage's share of a model: some of its layers. No weight is read yet."""
    if stages == 1:
        return model
    whole = model.architecture
    if stages > len(whole.layers):
        raise ConfigError(f"the model has {len(whole.layers)} layers, which cannot be divided into {stages} "
                          "stages")
    mine = layers_of(whole, stage, stages)
    own = whole.of_layers(mine)
    first = mine.start
    given = {"head": model.tensors["embed"]} | model.tensors
    tensors = {}
    for name, shape in own.shapes().items():
        layer, dot, part = name.partition(".")
        tensors[name] = given[f"{int(layer) + first}.{part}" if dot else name]
        if name in ("resid_lambdas", "x0_lambdas"):
            tensors[name] = tensors[name].less(Cut((len(whole.layers),), shape, 0, (mine,)))
    adaptable = model.adaptable and replace(model.adaptable, first_layer=first)
    return replace(model, architecture=own, tensors=tensors, adaptable=adaptable)
