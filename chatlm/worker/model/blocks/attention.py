"""Attention: what a layer caches for each token, and how its queries read it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.axes import Axis, Divided, Run, Tensors, length, matrix, vector
from chatlm.worker.model.blocks.step import Block, BlockStep, Buffer, Read, Scratch, Sum
from chatlm.worker.model.tensors import rounded_up


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of q and k, before or after they turn, of each head or of all heads together; or LayerNorms
    of each head."""

    when: str                # "before_rope", "after_rope"; "whole": of all heads together, before they turn;
                             # "centred": LayerNorms before they turn, where each head has its own weights
    eps: float
    weights: bool = True
    sizes: tuple[int, ...] = ()  # "whole": how many numbers q has and k has, in all ranks
    count: int = 0           # numbers of a padded head without its zeros; 0: it is not padded

    @property
    def whole(self) -> bool:
        return self.when == "whole"

    @property
    def centred(self) -> bool:
        return self.when == "centred"

    def tensors(self, q: Run, k: Run | None) -> Tensors:
        named = {"q_norm": q}
        if k:
            named["k_norm"] = k
        if self.whole or self.centred:
            return {name: vector((run,)) for name, run in named.items()}
        factor = math.sqrt(self.count / q.size) if self.count else 1.0
        return {name: vector(run.size, factor=factor) for name, run in named.items()}


@dataclass(frozen=True)
class Scores:
    """Which keys a query sees, and how its scores are computed."""

    scale: float = 1.0       # multiplies q, besides 1 / sqrt(D)
    growth: tuple[float, ...] = ()  # (beta, n): q is also multiplied by 1 + beta * ln(1 + position // n)
    qk_scale: float = 1.0    # multiplies q and k, after norm and rope
    window: int = 0          # how many keys a token sees, its own included; 0: all
    softcap: float = 0.0     # c > 0: scores = c * tanh(scores / c), before the mask
    sinks: bool = False      # each query head has one more logit, which attends to no value
    sees: str = "before"     # "text": also what comes after it; "pictures": also the rest of its picture
    distances: bool = False  # each head adds a bias to scores, by the bucket of the distance (MPNet)


@dataclass(frozen=True)
class HeadGates:
    """What heads give is multiplied by an activation of other products of x, which have their own matrix.

    head_gates is (H, C), or (H Dv, C)."""

    activation: str = "sigmoid"  # or "softplus"
    of_numbers: bool = True  # each number of a head has a gate; else one is for the whole head

    def run(self, heads: int, value_size: int) -> Run:
        return Run(heads, value_size if self.of_numbers else 1, "heads")

    def apply(self, s: BlockStep, read: Read, attended, count: int):
        gates = s.b.of("gates", count)
        s.product(read, "head_gates", gates)
        s.k.gate(attended, gates, out=attended, activation=self.activation)


@dataclass(frozen=True)
class ValueEmbed:
    """v + scale * sigmoid(ve_gate x) * an embedding of the token (nanochat)."""

    vocabulary: int
    channels: int            # the gate reads so many first numbers of x
    scale: float

    def tensors(self, values: Run) -> Tensors:
        table = matrix(self.vocabulary, (values,), packed=False)
        return {"value_embed": table, "ve_gate": matrix((values._replace(size=1),), self.channels)}

    def scratch(self, values: Run) -> Scratch:
        return {"value": Buffer(values.length, short=True), "gate": Buffer(values.count, short=True)}

    def compute(self, s: BlockStep, read: Read) -> dict[str, Any]:
        """What rope_append adds to v."""
        k = s.k
        b = s.b
        w = s.w
        k.embed(w["value_embed"], s.inputs.token_ids, out=b.value)     # (T, Hkv * Dv)
        k.linear(read.x, w["ve_gate"], norm=read.norm, out=b.gate)     # (T, Hkv)
        return {"value_embed": b.value, "gate": b.gate, "gate_scale": self.scale}


@dataclass(frozen=True)
class Attention(Block):
    """output(softmax(q k^T / sqrt(D)) v), where q, k, v = qkv norm(x) (Vaswani et al., "Attention is all you
    need", 2017; grouped heads: Ainslie et al., "GQA", 2023).

    qkv is (H D + Hkv D + Hkv Dv, C), output (C, H Dv). For each token the layer caches a key of D numbers
    and a value of Dv for each of Hkv heads. A layer with a `source` caches nothing: its queries read the
    pages of that layer, which has the same sizes."""

    heads: int               # H, of queries
    kv_heads: int            # Hkv
    head_size: int           # D, of queries and keys
    value_size: int          # Dv
    rope: Rope
    scores: Scores = Scores()
    norms: HeadNorms | None = None
    value_norm: bool = False  # each head of v has an RMS norm without weights
    values_from_keys: bool = False  # v is what k is before its norm, so qkv has no rows for v
    source: int | None = None  # the earlier layer whose keys and values it reads; qkv has no rows for them
    embed: ValueEmbed | None = None
    gated: bool = False      # each head's output has a gate, whose rows follow the head's q in qkv
    gates: HeadGates | None = None
    clip: float = 0.0        # > 0: numbers of q, k and v beyond +-clip become that
    biases: tuple[str, ...] = ()  # which of "qkv" and "output" have one

    values_in_keys = False   # is a value the beginning of its key? Else it is cached beside it

    @property
    def window(self) -> int:
        return self.scores.window

    @property
    def slot_size(self) -> int:
        """How many numbers it caches for a token."""
        return 0 if self.source is not None else self.kv_heads * (self.head_size + self.value_size)

    @functools.cached_property
    def runs(self) -> Axis:
        """The rows of qkv, without gates: those of q, k and v, or of those that it has."""
        q = Run(self.heads, self.head_size, "heads")
        k = Run(self.kv_heads, self.head_size, "kv_heads")
        v = Run(self.kv_heads, self.value_size, "kv_heads")
        if self.source is not None:
            return (q,)
        return (q, k) if self.values_from_keys else (q, k, v)

    @functools.cached_property
    def rows(self) -> int:
        return length(self.runs)

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def values(self) -> Run:
        return Run(self.kv_heads, self.value_size, "kv_heads")

    def tensors(self, C: int) -> Tensors:
        q, *kv = self.runs
        gated = q._replace(parts=2) if self.gated else q
        attended = Run(self.heads, self.value_size, "heads")
        found = {"qkv": matrix((gated, *kv), C, adapted=True), "output": matrix(C, (attended,), adapted=True)}
        found |= {f"{name}_bias": found[name].bias for name in self.biases}
        if self.norms and self.norms.weights:
            found |= self.norms.tensors(q, kv[0] if kv else None)
        if self.scores.sinks:
            found["sinks"] = vector((Run(self.heads, of="heads"),))
        if self.embed:
            found |= self.embed.tensors(self.values)
        if self.gates:
            found["head_gates"] = matrix((self.gates.run(self.heads, self.value_size),), C, adapted=True)
        return found

    def arranged(self, w: dict[str, Any], arrays: Any) -> dict[str, Any]:
        if not self.clip:
            return {}
        ends = {"clip_low": -self.clip, "clip_high": self.clip}
        return {name: arrays.of(numpy.full(self.rows, end, numpy.float32)) for name, end in ends.items()}

    def scratch(self, C: int) -> Scratch:
        found = {"qkv": Buffer(self.rows, short=True), "q": Buffer(self.queries),
                 "attended": Buffer(self.heads * self.value_size, short=True)}
        if self.gated:
            found["gated"] = Buffer(self.queries + self.rows, short=True)
            found["gates"] = Buffer(self.queries, short=True)
        if self.gates:
            found["gates"] = Buffer(self.gates.run(self.heads, self.value_size).length, short=True)
        if self.norms and self.norms.whole:
            found["means"] = Buffer(16)
        if self.embed:
            found |= self.embed.scratch(self.values)
        return found

    def compute(self, s: BlockStep, read: Read, to: Sum):
        qkv = self.project(s, read)            # (T, rows)
        q = self.turn(s, read, qkv)            # (T, H * D)
        attended = self.attend(s, q)           # (T, H * Dv)
        if self.gated:
            s.k.gate(attended, s.b.of("gates", self.queries), out=attended)
        if self.gates:
            self.gates.apply(s, read, attended, self.gates.run(self.heads, self.value_size).length)
        to.product(s, attended, "output")

    def project(self, s: BlockStep, read: Read):
        """q, k and v of each token. Gates of heads go to a buffer of their own."""
        b = s.b
        bias = s.w.get("qkv_bias")
        qkv = b.of("qkv", self.rows)
        if not self.gated:
            s.product(read, "qkv", qkv, bias=bias)
            if self.clip:
                s.k.clamp(qkv, s.w["clip_low"], s.w["clip_high"], out=qkv)
            return qkv
        both = b.of("gated", self.queries + self.rows)
        s.product(read, "qkv", both, bias=bias)
        s.k.split_gates(both, self.head_size, gates=b.of("gates", self.queries), out=qkv)
        return qkv

    def turn(self, s: BlockStep, read: Read, qkv):
        """q, normed and turned by position. The new keys and values go into the layer's pages."""
        k = s.k
        inputs = s.inputs
        q = s.b.of("q", self.queries)
        embed = self.embed.compute(s, read) if self.embed else {}
        if self.norms and self.norms.whole:
            self.norm_whole(s, qkv)
        if self.norms and self.norms.centred:
            k.norm_heads(qkv, s.w["q_norm"], s.w["k_norm"], self.head_size, self.norms.eps, out=qkv,
                         count=self.norms.count)
        k.rope_append(qkv, *s.rope, inputs.turns, inputs.slots, s.cache, out=q, **self.norm_options(s),
                      **embed, **self.rope_options)
        if s.q_scale is not None:
            k.scale_rows(q, s.q_scale, inputs.positions, out=q)
        return q

    def attend(self, s: BlockStep, q):
        """softmax(q k^T / sqrt(D)) v, with the keys and values in the pages."""
        k = s.k
        plan = s.inputs.attention
        scores = self.scores
        out = s.b.of("attended", self.heads * self.value_size)
        if s.pauses:
            k.pause()
        if scores.sees == "text":
            distances = {"distances": s.distances} if scores.distances else {}
            k.text_attention(q, s.cache, plan, scores.window, out=out, **distances)
            return out
        two_sided = {"two_sided": True} if scores.sees == "pictures" else {}
        k.paged_attention(q, s.cache, plan, scores.window, out=out, softcap=scores.softcap,
                          sinks=s.w.get("sinks"), **two_sided)
        return out

    def norm_whole(self, s: BlockStep, qkv):
        """Apply the norms of q and of k, each over all heads of all ranks."""
        k = s.k
        means = s.b.means
        norms = self.norms
        assert norms
        weights = {"q_norm": s.w.get("q_norm"), "k_norm": s.w.get("k_norm")}
        k.mean_squares(qkv, **weights, sizes=norms.sizes, out=means)   # (T, 2)
        if k.all_reduce:
            k.all_reduce(means, out=means)
        k.norm_qk(qkv, **weights, means=means, eps=norms.eps, out=qkv)

    def norm_options(self, s: BlockStep) -> dict[str, Any]:
        """The options of rope_append for the norms of heads."""
        norms = self.norms
        if norms is None or norms.whole or norms.centred:
            return {"norm": "none", "eps": 0.0}
        weights = {"q_norm": s.w.get("q_norm"), "k_norm": s.w.get("k_norm")}
        return {"norm": norms.when, **weights, "eps": norms.eps}

    @functools.cached_property
    def rope_options(self) -> dict[str, Any]:
        options = {"post_scale": self.scores.qk_scale, "q_scale": self.scores.scale}
        if self.value_norm:
            options["value_norm"] = True
        return options

    # ---- other sizes

    def padded(self) -> Attention:
        """The block with heads that are multiples of 16.

        The added numbers are zeros, so scores and sums stay what they were. Only what divides by D changes:
        scores, and the norms of each head."""
        D = self.head_size
        wide = rounded_up(self.head_size)
        if D == wide:
            return self
        norms = self.norms
        qk_scale = self.scores.qk_scale
        if norms and norms.centred:
            norms = replace(norms, count=D)
        elif norms and not norms.whole:
            norms = replace(norms, eps=norms.eps * (D / wide), count=D)
            qk_scale *= 1 if norms.weights else math.sqrt(D / wide)
        scores = replace(self.scores, scale=self.scores.scale * math.sqrt(wide / D), qk_scale=qk_scale)
        return replace(self, head_size=wide, value_size=rounded_up(self.value_size), norms=norms,
                       scores=scores)

    def moved(self, layers: int) -> Attention:
        return self if self.source is None else replace(self, source=self.source - layers)

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        """A rank's query heads and kv heads.

        If there are more ranks than kv heads, several ranks share a kv head, each with some of its query
        heads."""
        group = self.heads // self.kv_heads
        firsts = [number * self.kv_heads // tp for number in range(tp)]
        first = firsts[rank]
        sharing = firsts.count(firsts[rank])
        own = range(first, max(first + 1, (rank + 1) * self.kv_heads // tp))
        turn = rank - firsts.index(first)  # among those with the same kv heads
        begin = first * group + group * turn // sharing
        end = own[-1] * group + group * (turn + 1) // sharing
        return {"heads": range(begin, end), "kv_heads": own}

    def of_all_ranks(self, tp: int) -> Attention:
        """What all ranks cache together: some may have the same kv head."""
        return replace(self, kv_heads=max(self.kv_heads, tp))

    def of_rank(self, divided: Divided) -> Attention:
        return replace(self, heads=len(divided["heads"]), kv_heads=len(divided["kv_heads"]))
