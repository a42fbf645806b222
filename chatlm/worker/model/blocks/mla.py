"""Attention over one compressed vector for each token (MLA)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Scores
from chatlm.worker.model.blocks.axes import Divided, Run, Tensors, matrix
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.model.blocks.step import Block, BlockStep, Buffer, Read, Scratch, Sum


@dataclass(frozen=True)
class Mla(Block):
    """output(softmax(q k^T / sqrt(D)) v), where a head's key is (k_up c, r) and its value v_up c
    (DeepSeek-AI, "DeepSeek-V2", 2024).

    c, r = kv_in norm(x): a latent of `kept` numbers, which gets a norm, and `turned` numbers that turn by
    the position. All heads share them, and a token caches nothing else.
    q = queries_up norm(queries_in norm(x)), or queries norm(x): for each head `plain` numbers that do not
    turn, then `turned` numbers that do. D = plain + turned.

    Keys are never computed. Because q^T (k_up c) = (k_up^T q)^T c, k_up is applied to queries, and v_up to
    the output of attention. So attention is that of H queries over one head, with keys (c, r) and values c.

    queries is (H D, C), kv_in (kept + turned, C), k_up (H kept, plain) with each head's matrix transposed,
    v_up (H Dv, kept), output (C, H Dv). queries_in is (query_width, C), queries_up (H D, query_width)."""

    heads: int               # H
    kept: int                # numbers of a latent
    plain: int               # numbers of a head's query that do not turn
    turned: int              # numbers of a head's query that turn
    head_values: int         # Dv, numbers of a head's value
    norm: RmsNorm            # of latents, and of what queries_up reads
    rope: Rope
    query_width: int = 0     # width of what queries_up reads; 0: `queries` reads x
    scores: Scores = Scores()
    adjacent: bool = False   # numbers that turn together are neighbours; else i and i + turned / 2 are
    biased: bool = False     # queries_in, kv_in and output have biases
    caches: int = 1          # of so many ranks

    # What other code asks of attention. This one caches a single head, and has no norms of heads, gates or
    # biases
    kv_heads = 1
    values_in_keys = True
    source = None
    window = 0
    norms = None
    embed = None
    gated = False
    value_norm = False
    values_from_keys = False
    widens = False

    @property
    def head_size(self) -> int:
        return self.kept + self.turned

    @property
    def value_size(self) -> int:
        return self.kept

    @property
    def slot_size(self) -> int:
        """How many numbers it caches for a token: a value is the beginning of its key."""
        return self.caches * self.head_size

    @property
    def queries(self) -> int:
        return self.heads * (self.plain + self.turned)

    @property
    def queries_name(self) -> str:
        """The matrix that makes queries."""
        return "queries_up" if self.query_width else "queries"

    @property
    def query_scale(self) -> float:
        """A factor of queries.

        paged_attention divides scores by the root of the width of the keys that it reads. They must be
        divided by the root of D instead."""
        return self.scores.scale * (self.head_size / (self.plain + self.turned))**0.5

    def tensors(self, C: int) -> Tensors:
        queries = Run(self.heads, self.plain + self.turned, "heads")
        values = Run(self.heads, self.head_values, "heads")
        found = {self.queries_name: matrix((queries,), self.query_width or C, adapted=True),
                 "kv_in": matrix((Run(self.kept), Run(self.turned)), C, adapted=True),
                 "k_up": matrix((Run(self.heads, self.kept, "heads"),), self.plain),
                 "v_up": matrix((values,), self.kept),
                 "output": matrix(C, (values,), adapted=True)}
        if self.query_width:
            found["queries_in"] = matrix(self.query_width, C, adapted=True)
        if self.biased:
            biased = [name for name in ("queries_in", "kv_in", "output") if name in found]
            found |= {f"{name}_bias": found[name].bias for name in biased}
        if self.query_width:
            found |= self.norm.tensors("queries_norm", self.query_width)
        return found | self.norm.tensors("kv_norm", self.kept)

    def scratch(self, C: int) -> Scratch:
        return {"queries_in": Buffer(self.query_width), "queries": Buffer(self.queries),
                "kv": Buffer(self.head_size), "q": Buffer(self.heads * self.head_size),
                "latents": Buffer(self.heads * self.kept),
                "attended": Buffer(self.heads * self.head_values, short=True)}

    def compute(self, s: BlockStep, read: Read, to: Sum):
        k = s.k
        b = s.b
        w = s.w
        inputs = s.inputs
        queries = b.of("queries", self.queries)                        # (T, H * (plain + turned))
        kv = b.of("kv", self.head_size)                                # (T, kept + turned)
        q = b.of("q", self.heads * self.head_size)                     # (T, H * (kept + turned))
        latents = b.of("latents", self.heads * self.kept)              # (T, H * kept)
        attended = b.of("attended", self.heads * self.head_values)     # (T, H * Dv)

        s.product(read, "kv_in", kv, bias=w.get("kv_in_bias"))
        k.append_latents(kv, w["kv_norm"], self.norm.eps, *s.rope, inputs.turns, inputs.slots, s.cache,
                         adjacent=self.adjacent)
        s.product(self.read_of_queries(s, read), self.queries_name, queries)
        k.absorb(queries, w["k_up"], *s.rope, inputs.turns, scale=self.query_scale, cache=s.cache, out=q,
                 adjacent=self.adjacent)
        if s.q_scale is not None:
            k.scale_rows(q, s.q_scale, inputs.positions, out=q)
        k.paged_attention(q, s.cache, inputs.attention, self.window, out=latents)
        k.by_head(latents, w["v_up"], out=attended)
        to.product(s, attended, "output")

    def read_of_queries(self, s: BlockStep, read: Read) -> Read:
        """What the product that makes queries reads."""
        if not self.query_width:
            return read
        compressed = s.b.of("queries_in", self.query_width)
        s.product(read, "queries_in", compressed, bias=s.w.get("queries_in_bias"))
        return self.norm.read(s, compressed, "queries_norm")

    # ---- other sizes

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        """A rank's heads. Every rank has all latents."""
        return {"heads": range(rank * self.heads // tp, (rank + 1) * self.heads // tp)}

    def of_all_ranks(self, tp: int) -> Mla:
        """What all ranks cache together, which only counts bytes: each has all latents."""
        return replace(self, caches=tp)

    def of_rank(self, divided: Divided) -> Mla:
        return replace(self, heads=len(divided["heads"]))
