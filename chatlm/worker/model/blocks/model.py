"""`Model`: an input, layers and a head; and what becomes of it for padding, ranks and stages."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from chatlm.worker.model.blocks.axes import (
    Divided, RankPart, Run, Tensor, Tensors, padded_places, rank_part, vector)
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.experts import Experts, ExpertsBesideDense
from chatlm.worker.model.blocks.extras import Keep, Lambdas, LayerInput, PictureRows
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input, Join, Rows
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.mixers import Mixer
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.model.blocks.norms import AnyNorm, RmsNorm
from chatlm.worker.model.blocks.step import Buffer, Scratch, widest
from chatlm.worker.model.padding import Padding
from chatlm.worker.model.tensors import rounded_up

DISTANCE_BUCKETS = 32  # half of them of keys that come after a token


@dataclass(frozen=True)
class Model:
    """All that a Transformer computes. One of several ranks or stages has a Model of its own."""

    vocab_size: int          # V, of all ranks
    width: int               # C
    max_positions: int       # length of the rotary tables; a text cannot be longer
    input: Input | Join | None  # None: another stage computes the layers before these
    layers: tuple[Layer, ...]
    norm: AnyNorm | None     # the last one
    head: LmHead | None      # None: another stage computes what follows, or texts get no logits
    answer_positions: int = 0  # > 0: prompt and answer end here; a longer text is only scored
    of_texts: bool = False   # it embeds whole texts: a token sees what comes after it, too
    waits: bool = False      # texts are all that it computes: layers wait while others write answers
    distances: int = 0       # > 0: heads that have a bias for each bucket of distances (MPNet)
    rope_axes: tuple[int, ...] = ()  # how many pairs turn by a picture's time, row and column
    residual_scale: float = 1.0  # x is kept divided by it
    kept: bool = False       # an earlier stage has kept x for the head's backout

    # ---- tensors and buffers

    def own_tensors(self) -> Tensors:
        """Those that no layer has."""
        found: Tensors = {}
        if self.input:
            found |= self.input.tensors(self.vocab_size, self.width)
        if self.head:
            found |= self.head.tensors(self.vocab_size, self.width)
        if self.norm:
            found |= self.norm.tensors("final_norm", self.width)
        if any(isinstance(extra, Lambdas) for layer in self.layers for extra in layer.before):
            found |= dict.fromkeys(("resid_lambdas", "x0_lambdas"), vector(len(self.layers)))
        if self.distances:
            found["buckets"] = vector((Run(DISTANCE_BUCKETS, self.distances),))
        return found

    def tensors(self) -> Tensors:
        """Every tensor of the model and no others, by name; those of layer 3 are named "3.qkv"."""
        found = self.own_tensors()
        for number, layer in enumerate(self.layers):
            found |= {f"{number}.{name}": tensor for name, tensor in layer.tensors(self.width).items()}
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor (weights are (out, in))."""
        return {name: tensor.shape for name, tensor in self.tensors().items()}

    def scratch(self) -> Scratch:
        logits = 0 if self.of_texts else self.vocab_size  # the first stage receives them, too
        parts: list[Scratch] = [{"x": Buffer(self.width), "logits": Buffer(logits, of_logits=True)}]
        if self.kept:
            parts.append({"middle": Buffer(self.width)})
        if self.input:
            parts.append(self.input.scratch(self.width))
        if self.head:
            parts.append(self.head.scratch(self.width))
        return widest(parts + [layer.scratch(self.width) for layer in self.layers])

    def buffer_sizes(self, T: int, R: int, dtype: str) -> dict[str, tuple[int, int, str]]:
        """(rows, columns, type) of each buffer, for steps of T tokens and R rows of logits."""
        return {name: (R if buffer.of_logits else T, buffer.columns, dtype if buffer.short else "float32")
                for name, buffer in self.scratch().items()}

    def passed_on(self, layer: int) -> list[str]:
        """The buffers that layers from `layer` on need from earlier ones."""
        extras = [extra for own in self.layers for extra in (*own.before, *own.after)]
        earlier = [extra for own in self.layers[:layer] for extra in own.after]
        needed = {"x": True, "x0": any(isinstance(extra, Lambdas) for extra in extras),
                  "layer_inputs": any(isinstance(extra, LayerInput) for extra in extras),
                  "middle": self.kept or any(isinstance(extra, Keep) for extra in earlier)}
        return [name for name, is_needed in needed.items() if is_needed]

    # ---- what others ask

    @property
    def opens(self) -> bool:
        """Does it compute the first layer's input, of tokens alone?"""
        return isinstance(self.input, Input)

    @property
    def closes(self) -> bool:
        return self.head is not None

    @property
    def tied(self) -> bool:
        """Is the head's matrix the embedding?"""
        return self.head is not None and self.head.tied

    @property
    def joins(self) -> bool:
        """Is it a draft head, which reads a state of another model?"""
        return isinstance(self.input, Join)

    @property
    def sees(self) -> bool:
        """Are rows of pictures added to the embeddings?"""
        return isinstance(self.input, Input) and self.input.sees

    @property
    def token_types(self) -> int:
        """How many types of tokens it knows; 0: none."""
        return self.input.types if isinstance(self.input, Input) else 0

    @property
    def picture_pad(self) -> int | None:
        """The token whose inputs layers get in rows of pictures: a step's previous_token_ids are then it in
        such rows, and V elsewhere."""
        layers = self.input.layers if isinstance(self.input, Input) else None
        return layers and layers.pad

    @property
    def context_length(self) -> int:
        """The longest that prompt and answer may be together."""
        return self.answer_positions or self.max_positions

    @functools.cached_property
    def by_layer(self) -> tuple[Attention | Mla | None, ...]:
        """How each layer attends; None: it does not."""
        mixers = [layer.mixer for layer in self.layers]
        return tuple(mixer if isinstance(mixer, Attention | Mla) else None for mixer in mixers)

    @property
    def attentions(self) -> list[Attention | Mla]:
        return [attn for attn in self.by_layer if attn]

    @functools.cached_property
    def mixers(self) -> tuple[Mixer | None, ...]:
        """What each layer keeps a state for; None: it keeps none."""
        return tuple(layer.mixer if isinstance(layer.mixer, Mixer) else None for layer in self.layers)

    @property
    def keeps_states(self) -> bool:
        """Do layers keep a state of each sequence, or nothing, instead of keys and values of each token?"""
        return not all(self.by_layer)

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer, the keys that a token sees, including its own; 0: all."""
        return tuple(attn.window if attn else 0 for attn in self.by_layer)

    @property
    def has_rope_factors(self) -> bool:
        return any(attn.rope.factors for attn in self.attentions)

    @property
    def paged_layers(self) -> int:
        """The number of layers that keep keys and values."""
        return len(self.attentions)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence; 0 in a model whose layers are all attention."""
        shapes = [shape for mixer in self.mixers if mixer for shape in mixer.states(self.width)]
        return 4 * sum(map(math.prod, shapes))

    @property
    def picture_buffers(self) -> list[str]:
        """The names of what has a step's rows of pictures: for the input, and after the first layers."""
        extras = [extra for layer in self.layers for extra in layer.after]
        return ["pictures", *(extra.buffer for extra in extras if isinstance(extra, PictureRows))]

    @property
    def rows(self) -> Rows | None:
        """The rows of the vocabulary that one of several ranks has."""
        ends = [end for end in (self.input, self.head) if end]
        return ends[0].rows if ends else None

    @property
    def feed(self) -> Experts | ExpertsBesideDense | FeedForward | None:
        """The usual feed-forward block: experts, where it has some, else the narrowest; None: it has
        none."""
        feeds = [layer.feed for layer in self.layers if layer.feed]
        experts = [feed for feed in feeds if isinstance(feed, Experts | ExpertsBesideDense)]
        dense = [feed for feed in feeds if isinstance(feed, FeedForward)]
        return experts[0] if experts else min(dense, key=lambda feed: feed.width, default=None)

    @property
    def experts(self) -> Experts | ExpertsBesideDense | None:
        return self.feed if isinstance(self.feed, Experts | ExpertsBesideDense) else None

    # ---- padding

    def padded(self) -> Model:
        """With sizes that are multiples of 16, as far as that changes no result; see padding.py."""
        model = self.widened()
        return replace(model, layers=tuple(layer.padded(model.heads_can_grow) for layer in model.layers))

    def widened(self) -> Model:
        """With a width that is a multiple of 16, unless a norm without weights would see the zeros."""
        C = self.width
        wide = rounded_up(self.width)
        norms = [norm for layer in self.layers for norm in layer.norms.values()]
        norms += [self.norm, self.input.norm if self.input else None]
        if C == wide or any(isinstance(norm, RmsNorm) and not norm.weights for norm in norms):
            return self
        if not all(layer.mixer and layer.mixer.widens for layer in self.layers):
            return self
        return replace(self, width=wide, input=self.input and self.input.widened(C, wide),
                       norm=self.norm and self.norm.padded(C, wide),
                       layers=tuple(layer.widened(C, wide) for layer in self.layers))

    @property
    def heads_can_grow(self) -> bool:
        """May heads be padded: do all grow by one factor, or have no norms of their own, and do those of
        values have weights?"""
        parts = {attn.head_size / rounded_up(attn.head_size) for attn in self.attentions}
        if any(attn.value_norm for attn in self.attentions):  # which have none
            return False
        return len(parts) == 1 or not any(attn.norms and not attn.norms.whole for attn in self.attentions)

    def paddings(self) -> dict[str, Padding]:
        """The tensors that padding changes, by name."""
        own = self.tensors()
        padded = self.padded().tensors()
        return {name: padding_of(tensor, padded[name]) for name, tensor in own.items()
                if tensor.shape != padded[name].shape}

    # ---- ranks

    def of_rank(self, rank: int, tp: int, block: int = 1) -> tuple[Model, dict[str, RankPart | None]]:
        """The model of one of `tp` ranks, and what the rank has of each tensor; None: nothing.

        Feed-forward blocks are divided by whole blocks of `block` columns, the vocabulary into ceil(V / tp)
        rows for each rank, of which the last ones have what remains. Embeddings and what blocks add are
        summed over the ranks, logits concatenated."""
        count = -(-self.vocab_size // tp)
        rows = Rows(count, rank * count)
        vocabulary = {"vocabulary": range(self.vocab_size)[rows.first:rows.first + count]}
        parts = {name: own_part(tensor, vocabulary, rank) for name, tensor in self.own_tensors().items()}
        layers = []
        for number, layer in enumerate(self.layers):
            divided = layer.divided(rank, tp, block)
            layers.append(layer.of_rank(divided))
            for name, tensor in layer.tensors(self.width).items():
                parts[f"{number}.{name}"] = own_part(tensor, divided, rank)
        return replace(self, layers=tuple(layers), input=self.input and replace(self.input, rows=rows),
                       head=self.head and replace(self.head, rows=rows)), parts

    # ---- stages

    def of_layers(self, mine: range) -> Model:
        """The stage that computes these layers. Layers that read others' keys must be with them."""
        is_last = mine.stop == len(self.layers)
        head = replace(self.head, tied=False) if self.head and is_last else None
        earlier = [extra for layer in self.layers[:mine.start] for extra in layer.after]
        return replace(self, input=None if mine.start else self.input, head=head,
                       kept=any(isinstance(extra, Keep) for extra in earlier),
                       layers=tuple(layer.moved(mine.start) for layer in self.layers[mine.start:mine.stop]))


def own_part(tensor: Tensor, divided: Divided, rank: int) -> RankPart | None:
    if not tensor.once:
        return rank_part(tensor, divided)
    return None if rank else RankPart()


def padding_of(tensor: Tensor, padded: Tensor) -> Padding:
    places = tuple(None if axis == wide else padded_places(axis, wide)
                   for axis, wide in zip(tensor.axes, padded.axes))
    return Padding(padded.shape, places, padded.factor / tensor.factor)
