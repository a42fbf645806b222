"""`Facts`: what files state of a model in the words that most families share, and the blocks that follow.

A reader fills it in; a family makes a `Model` of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlm.worker.model.blocks.attention import Attention, HeadNorms, Scores
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.model import Model

if TYPE_CHECKING:
    from chatlm.worker.arrays.rotary import Rope
    from chatlm.worker.model.blocks.layer import Layer
    from chatlm.worker.model.blocks.norms import AnyNorm


@dataclass(frozen=True)
class ExpertFacts:
    """Of a model whose layers have experts, all or some of them."""

    count: int                # E
    chosen: int               # so many of them for each token
    sum_to_one: bool          # the shares of the chosen ones
    shared_size: int = 0      # > 0: width of the expert that all tokens take
    dense_layers: tuple[int, ...] = ()  # layers that have none
    dense_size: int = 0       # width of the feed-forward part of these


@dataclass(frozen=True)
class Facts:
    """What is not here is in `config`, or follows from the family.

    Vocabularies are cropped to V rows, and rotary pairs are half-split, whatever the file has."""

    path: Path                # of the file, for errors
    config: Mapping[str, Any]  # a complete config.json. Of a GGUF file it has the metadata's values
    vocab_size: int           # V
    count: int                # L, of layers
    width: int                # C
    heads: int                # H
    kv_heads: int             # Hkv
    head_size: int            # D
    ffn_size: int             # F, of each expert if there are some
    max_positions: int
    eps: float                # of norms
    tied: bool                # the head is the embedding
    activation: str           # one of ops' GATES, or of UNGATED in feed_forward.py
    biases: frozenset[str]    # of "qkv", "output", "ffn", "norm", "head"
    kinds: tuple[str, ...]    # of layers: LAYER_TYPES, and those of the family
    windows: tuple[int, ...]  # of layers: how many keys a token sees, its own included; 0: all
    rope: Rope                # how heads turn
    local_base: float | None = None  # in layers with a window: another base, and nothing else
    unrotated: frozenset[int] = frozenset()  # layers whose heads do not turn
    growth: tuple[float, ...] = ()  # (beta, n): queries grow by 1 + beta * ln(1 + position // n)
    experts: ExpertFacts | None = None

    @property
    def layers(self) -> range:
        return range(self.count)

    def rope_of(self, layer: int) -> Rope:
        """How the heads of a layer turn."""
        rope = self.rope
        if self.windows[layer] and self.local_base:
            rope = replace(rope, base=self.local_base, factors=None, scale=1.0)
        return replace(rope, size=0) if layer in self.unrotated else rope

    def head_norms(self, when: str = "before_rope", weights: bool = True) -> HeadNorms:
        return HeadNorms(when, self.eps, weights)

    def whole_norms(self) -> HeadNorms:
        """Norms of all heads of q together, and of k."""
        sizes = self.heads * self.head_size, self.kv_heads * self.head_size
        return HeadNorms("whole", self.eps, sizes=sizes)

    def attention(self, layer: int, norms: HeadNorms | None = None, scale: float = 1.0, sees: str = "before",
                  **of_scores: Any) -> Attention:
        """A layer's attention. `scale` and `of_scores` are of its Scores."""
        window = self.windows[layer]
        if sees == "text":  # as wide on both sides together
            window //= 2
        scores = Scores(scale, self.growth, window=window, sees=sees, **of_scores)
        biases = tuple(name for name in ("qkv", "output") if name in self.biases)
        return Attention(self.heads, self.kv_heads, self.head_size, self.head_size, self.rope_of(layer),
                         scores, norms, biases=biases)

    def feed(self, layer: int, shared_gate: bool = False, **routing: Any) -> FeedForward | Experts:
        """A layer's feed-forward part: experts, or a dense one. `routing`: of its Router."""
        experts = self.experts
        biased = "ffn" in self.biases
        if experts is None:
            return FeedForward(self.ffn_size, self.activation, biased)
        if layer in experts.dense_layers:
            return FeedForward(experts.dense_size, self.activation, biased)
        settings: dict[str, Any] = {"sum_to_one": experts.sum_to_one} | routing
        router = Router(experts.chosen, **settings)
        shared = None
        if experts.shared_size:
            shared = FeedForward(experts.shared_size, self.activation, prefix="shared_")
        return Experts(experts.count, self.ffn_size, router, self.activation, biased, shared=shared,
                       shared_gate=shared_gate)

    def decoder(self, layers: Iterable[Layer], norm: AnyNorm, input: Input = Input(),
                logit_scale: float = 1.0, residual_scale: float = 1.0) -> Model:
        """A model that writes texts."""
        head = LmHead(self.tied, "head" in self.biases, logit_scale,
                      self.config.get("final_logit_softcapping") or 0.0)
        return Model(self.vocab_size, self.width, self.max_positions, input, tuple(layers), norm, head,
                     residual_scale=residual_scale)

    def encoder(self, layers: Iterable[Layer], norm: AnyNorm | None, input: Input = Input(),
                distances: int = 0) -> Model:
        """A model that embeds whole texts: a token also sees what comes after it, and there is no head."""
        return Model(self.vocab_size, self.width, self.max_positions, input, tuple(layers), norm, None,
                     of_texts=True, distances=distances)
