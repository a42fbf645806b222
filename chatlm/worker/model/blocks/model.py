"""`Model`: an input, layers and a head. It becomes other models for padding, ranks and stages."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.axes import (
    Divided, RankPart, Run, TensorAxes, Tensors, padded_places, rank_part, vector)
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

NO_ATTENTION = Attention(0, 0, 0, 0, Rope(0))
DISTANCE_BUCKETS = 32  # half of them are for keys after a token


@dataclass(frozen=True)
class Model:
    """All that a Transformer computes. Each of several ranks or stages has a Model of its own."""

    vocab_size: int          # V, of all ranks
    width: int               # C
    max_positions: int       # length of the rotary tables; no text can be longer
    input: Input | Join | None  # None: another stage computes the layers before these
    layers: tuple[Layer, ...]
    norm: AnyNorm | None     # after the last layer
    head: LmHead | None      # None: another stage computes what follows, or texts get no logits
    answer_positions: int = 0  # > 0: longest prompt with its answer; a longer text is only scored
    of_texts: bool = False   # it embeds whole texts: a token also sees what comes after it
    waits: bool = False      # it computes only texts, so its layers wait while others write answers
    distances: int = 0       # > 0: so many heads have a bias for each bucket of distances (MPNet)
    rope_axes: tuple[int, ...] = ()  # how many pairs turn by a picture's time, row and column
    residual_scale: float = 1.0  # the buffer x holds x divided by it
    kept: bool = False       # an earlier stage has kept x for the head's backout

    # ---- tensors and buffers

    def own_tensors(self) -> Tensors:
        """The tensors that belong to no layer."""
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
        """Every tensor of the model and no others, by name. Those of layer 3 have names such as "3.qkv"."""
        found = self.own_tensors()
        for number, layer in enumerate(self.layers):
            found |= {f"{number}.{name}": tensor for name, tensor in layer.tensors(self.width).items()}
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor (weights are (out, in))."""
        return {name: tensor.shape for name, tensor in self.tensors().items()}

    def scratch(self) -> Scratch:
        logits = 0 if self.of_texts else self.vocab_size  # every stage has them: the first one receives them
        parts: list[Scratch] = [{"x": Buffer(self.width), "logits": Buffer(logits, of_logits=True)}]
        if self.kept:
            parts.append({"middle": Buffer(self.width)})
        if self.input:
            parts.append(self.input.scratch(self.width))
        if self.head:
            parts.append(self.head.scratch(self.width))
        return widest(parts + [layer.scratch(self.width) for layer in self.layers])

    def buffer_sizes(self, T: int, R: int, dtype: str) -> dict[str, tuple[int, int, str]]:
        """Name of a buffer -> (rows, columns, type), for steps of T tokens and R rows of logits."""
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
        """Does it compute the input of the first layer from tokens?"""
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
        """Is it a draft head, which reads the states of another model?"""
        return isinstance(self.input, Join)

    @property
    def sees(self) -> bool:
        """Are rows of pictures added to the embeddings?"""
        return isinstance(self.input, Input) and self.input.sees

    @property
    def token_types(self) -> int:
        """How many types of tokens it knows; 0 if it knows none."""
        return self.input.types if isinstance(self.input, Input) else 0

    @property
    def picture_pad(self) -> int | None:
        """The token whose inputs the layers get in rows of pictures; None in most models.

        A step's previous_token_ids are then this token in rows of pictures, and V in all others."""
        layers = self.input.layers if isinstance(self.input, Input) else None
        return layers and layers.pad

    @property
    def context_length(self) -> int:
        """How long prompt and answer may be together, in tokens."""
        return self.answer_positions or self.max_positions

    @functools.cached_property
    def by_layer(self) -> tuple[Attention | Mla | None, ...]:
        """How each layer attends; None for a layer that does not."""
        mixers = [layer.mixer for layer in self.layers]
        return tuple(mixer if isinstance(mixer, Attention | Mla) else None for mixer in mixers)

    @property
    def attention(self) -> Attention | Mla:
        """How the first layer attends that does. Kernels are proved in its sizes."""
        return self.attentions[0] if self.attentions else NO_ATTENTION

    @property
    def attentions(self) -> list[Attention | Mla]:
        return [attn for attn in self.by_layer if attn]

    @functools.cached_property
    def mixers(self) -> tuple[Mixer | None, ...]:
        """The block of each layer that keeps states; None for a layer without one."""
        return tuple(layer.mixer if isinstance(layer.mixer, Mixer) else None for layer in self.layers)

    @property
    def keeps_states(self) -> bool:
        """Are there layers that do not attend? They keep a state of each sequence, or nothing."""
        return not all(self.by_layer)

    @property
    def windows(self) -> tuple[int, ...]:
        """How many keys a token sees in each layer, its own included; 0: all."""
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
        """Bytes of a sequence's states in all layers; 0 if no layer keeps states."""
        shapes = [shape for mixer in self.mixers if mixer for shape in mixer.states(self.width)]
        return 4 * sum(map(math.prod, shapes))

    @property
    def picture_buffers(self) -> list[str]:
        """The buffers with a step's rows of pictures: of the input, and of layers that add such rows."""
        extras = [extra for layer in self.layers for extra in layer.after]
        return ["pictures", *(extra.buffer for extra in extras if isinstance(extra, PictureRows))]

    @property
    def rows(self) -> Rows | None:
        """The rows of the vocabulary that this rank has; None without ranks."""
        ends = [end for end in (self.input, self.head) if end]
        return ends[0].rows if ends else None

    @property
    def feed(self) -> Experts | ExpertsBesideDense | FeedForward | None:
        """The usual feed-forward block: the first with experts, else the narrowest; None without any."""
        feeds = [layer.feed for layer in self.layers if layer.feed]
        experts = [feed for feed in feeds if isinstance(feed, Experts | ExpertsBesideDense)]
        dense = [feed for feed in feeds if isinstance(feed, FeedForward)]
        return experts[0] if experts else min(dense, key=lambda feed: feed.width, default=None)

    @property
    def feed_width(self) -> int:
        """F of that block; 0 without any."""
        return self.feed.width if self.feed else 0

    @property
    def experts(self) -> Experts | ExpertsBesideDense | None:
        return self.feed if isinstance(self.feed, Experts | ExpertsBesideDense) else None

    # ---- what a server makes of it

    def with_sight(self, deep_rows: int = 0, rope_axes: tuple[int, ...] = (), two_sided: str = "",
                   pad: int | None = None) -> Model:
        """The same model for texts with rows of pictures among them, which are added to the embeddings.

        deep_rows: after each of so many first layers, others are added
        rope_axes: how many pairs turn by a picture's time, row and column, interleaved
        two_sided: the layers in which a picture's rows see all of its rows: "all", those with "windows", none
        pad: in rows of pictures, layers get the inputs of this token"""
        assert isinstance(self.input, Input)
        layers = []
        for number, layer in enumerate(self.layers):
            mixer = layer.mixer
            after = layer.after
            if isinstance(mixer, Attention):
                if two_sided == "all" or two_sided == "windows" and mixer.window:
                    mixer = replace(mixer, scores=replace(mixer.scores, sees="pictures"))
            if number < deep_rows:
                after = (*after, PictureRows(number))
            layers.append(replace(layer, mixer=mixer, after=after))
        layer_inputs = self.input.layers and replace(self.input.layers, pad=pad)
        return replace(self, input=replace(self.input, sees=True, layers=layer_inputs), layers=tuple(layers),
                       rope_axes=rope_axes)

    def with_own_head(self) -> Model:
        """The same model with a head that is a matrix of its own, no longer the embedding."""
        return replace(self, head=self.head and replace(self.head, tied=False))

    def with_tied_head(self) -> Model:
        """The same model with a head that is the embedding."""
        return replace(self, head=self.head and replace(self.head, tied=True))

    def with_context(self, length: int) -> Model:
        """The same model for texts of at most `length` tokens, answers included."""
        return replace(self, max_positions=length, answer_positions=0)

    # ---- padding

    def padded(self) -> Model:
        """The model with sizes that are multiples of 16, as far as that changes no result: see padding.py."""
        model = self.widened()
        heads_can_grow = model.heads_can_grow
        return replace(model, layers=tuple(layer.padded(heads_can_grow) for layer in model.layers))

    def widened(self) -> Model:
        """The model with a width that is a multiple of 16.

        It stays as it is if a norm without weights would see the zeros."""
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
        """May heads be padded?

        Not with norms of values, which have no weights that could undo it. Where heads have norms of
        their own, all must grow by the same factor."""
        parts = {attn.head_size / rounded_up(attn.head_size) for attn in self.attentions}
        if any(attn.value_norm for attn in self.attentions):
            return False
        return len(parts) == 1 or not any(attn.norms and not attn.norms.whole for attn in self.attentions)

    def paddings(self) -> dict[str, Padding]:
        """Name -> padding, for the tensors that padding changes."""
        own = self.tensors()
        padded = self.padded().tensors()
        return {name: padding_of(tensor, padded[name]) for name, tensor in own.items()
                if tensor.shape != padded[name].shape}

    # ---- ranks

    def of_rank(self, rank: int, tp: int, block: int = 1) -> tuple[Model, dict[str, RankPart | None]]:
        """The model of one of `tp` ranks, and what the rank has of each tensor; None: nothing of it.

        Feed-forward blocks are divided into whole blocks of `block` columns. Each rank gets ceil(V / tp)
        rows of the vocabulary, and the last ones get what remains. Ranks sum embeddings and what blocks
        add, and concatenate logits."""
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
        """The stage that computes these layers. A layer that reads another's keys must be in its stage."""
        is_last = mine.stop == len(self.layers)
        head = replace(self.head, tied=False) if self.head and is_last else None
        earlier = [extra for layer in self.layers[:mine.start] for extra in layer.after]
        return replace(self, input=None if mine.start else self.input, head=head,
                       kept=any(isinstance(extra, Keep) for extra in earlier),
                       layers=tuple(layer.moved(mine.start) for layer in self.layers[mine.start:mine.stop]))


def own_part(tensor: TensorAxes, divided: Divided, rank: int) -> RankPart | None:
    if not tensor.once:
        return rank_part(tensor, divided)
    return None if rank else RankPart()


def padding_of(tensor: TensorAxes, padded: TensorAxes) -> Padding:
    places = tuple(None if axis == wide else padded_places(axis, wide)
                   for axis, wide in zip(tensor.axes, padded.axes))
    return Padding(padded.shape, places, padded.factor / tensor.factor)
