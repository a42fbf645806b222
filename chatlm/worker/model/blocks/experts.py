"""Feed-forward blocks of experts. Each token takes a few of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from chatlm.worker.arrays.kinds import Norm
from chatlm.worker.model.blocks.axes import Divided, Run, Tensors, matrix, vector
from chatlm.worker.model.blocks.feed_forward import UNGATED, FeedForward, biases_of, columns_of, halves
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.model.blocks.step import Block, BlockStep, Buffer, Read, Scratch, Sum, widest
from chatlm.worker.model.tensors import rounded_up


@dataclass(frozen=True)
class Router:
    """Chooses a token's experts and their shares by the logits router x (T, E)."""

    chosen: int              # so many experts, those with the largest logits
    kind: str = "softmax"    # "sigmoid": as the reference `sigmoid_routes` says; "jitter": as `sparse_routes`
    sum_to_one: bool = True  # shares are the softmax over the chosen experts' logits; else over all logits
    bias: bool = False
    correction_bias: bool = False  # a bias counts in the choice, but not in the shares
    groups: tuple[int, int] = (1, 1)  # (groups, how many of them experts are chosen from), without jitter
    scale: float = 1.0       # of the shares, without jitter
    jitter: float = 0.0
    group_best: int = 2      # so many best experts of a group count in the choice of groups

    def tensors(self, experts: int, C: int) -> Tensors:
        router = matrix(experts, C)
        found = {"router": router}
        if self.bias:
            found["router_bias"] = router.bias
        if self.correction_bias:
            found["correction_bias"] = vector(experts)
        return found

    def options(self, w: dict[str, Any]) -> dict[str, Any]:
        """The options of the op `experts`."""
        options: dict[str, Any] = {"chosen": self.chosen, "sum_to_one": self.sum_to_one}
        if self.kind == "jitter":
            options["jitter"] = self.jitter
        if self.kind == "sigmoid":
            options |= {"sigmoids": True, "correction_bias": w.get("correction_bias"), "groups": self.groups,
                        "share_scale": self.scale}
        if self.kind == "softmax" and (self.groups != (1, 1) or self.scale != 1):
            options |= {"groups": self.groups, "share_scale": self.scale, "group_best": self.group_best}
        if self.kind == "softmax" and self.correction_bias:
            options["correction_bias"] = w["correction_bias"]
        return options


@dataclass(frozen=True)
class Experts(Block):
    """The sum over a token's experts of share * down(act(up x)) (Shazeer et al., "Outrageously large neural
    networks", 2017). An expert that all tokens take may be added (DeepSeekMoE, 2024).

    expert_gate_up (2 E F, C) has the rows of all experts' gates, then those of their ups. Without gates it
    is expert_up (E F, C). expert_down is (E C, F). With a `latent` size X they are (.., X) and (E X, F),
    between latent_in (X, C) and latent_out (C, X)."""

    count: int               # E
    width: int               # F, of each expert
    router: Router
    activation: str = "swiglu"
    biased: bool = False
    latent: int = 0          # X; 0: experts read x itself and add to it
    shared: FeedForward | None = None  # the expert that all tokens take
    shared_gate: bool = False  # its output is multiplied by the sigmoid of another product of x
    sum_bias: bool = False   # a bias is added to the sum of all experts

    @functools.cached_property
    def up(self) -> str:
        return "expert_up" if self.activation in UNGATED else "expert_gate_up"

    def tensors(self, C: int) -> Tensors:
        E = self.count
        X = self.latent or C
        columns = Run(self.width, of="columns")
        matrices = {self.up: matrix((columns,) * (halves(self.activation) * E), X),
                    "expert_down": matrix((Run(X),) * E, (columns,))}
        found = self.router.tensors(E, C) | matrices
        if self.biased:
            found |= biases_of(matrices)
        if self.latent:
            found |= {"latent_in": matrix(X, C, adapted=True), "latent_out": matrix(C, X, adapted=True)}
        if self.shared:
            found |= self.shared.tensors(C)
        if self.shared_gate:
            found["shared_gate"] = matrix(1, C)
        if self.sum_bias:
            found["experts_bias"] = vector(C)
        return found

    def scratch(self, C: int) -> Scratch:
        found = {"routing": Buffer(self.count)}
        if self.latent:
            found["latent"] = Buffer(self.latent)
        if self.shared_gate:
            found["share"] = Buffer(1)
        if self.shared:
            found |= self.shared.scratch(C)
        return found

    def compute(self, s: BlockStep, read: Read, to: Sum):
        k = s.k
        b = s.b
        w = s.w
        # if products read x itself, the op that computes the result also adds x to it
        residual = None
        if to.adds_directly(s) and read.x is to.residual(s):
            residual = read.x
        total = b.added if residual is None else to.out(s)             # (T, C)

        k.linear(read.x, w["router"], norm=read.norm, bias=w.get("router_bias"), out=b.routing)  # (T, E)
        if self.latent:
            s.product(read, "latent_in", b.latent)                     # (T, X)
            self.add_experts(s, Read(b.latent), b.latent, residual=False)
            s.product(Read(b.latent), "latent_out", total, residual=residual)
        else:
            self.add_experts(s, read, total, residual=residual is not None)
        if self.sum_bias:  # looked up in a table of types with one row, because all tokens are of type 0
            table = w["experts_bias"].reshape(1, -1)
            types = s.inputs.previous_token_ids
            k.embed(table, types, out=b.previous, part=(0, s.vocab_size))
            k.mix(total, b.previous, 1.0, 1.0, out=total)
        if self.shared:
            self.add_shared(s, self.shared, read, total)
        if residual is None:
            to.add(s, total)
        else:
            to.finish(s, total)

    def add_experts(self, s: BlockStep, read: Read, out, residual: bool):
        """out = the sum of each row's experts, plus the row itself if it is the residual."""
        w = s.w
        biases = w.get(f"{self.up}_bias"), w.get("expert_down_bias")
        s.k.experts(read.x, s.b.routing, w[self.up], w["expert_down"], norm=read.norm, biases=biases, out=out,
                    activation=self.activation, residual=residual, **self.router.options(w))

    def add_shared(self, s: BlockStep, shared: FeedForward, read: Read, total):
        """total = total + the expert that all tokens take, times its gate if it has one."""
        hidden = Read(shared.hidden(s, read))
        if not self.shared_gate:
            return s.product(hidden, shared.down, total, residual=total)
        s.k.linear(read.x, s.w["shared_gate"], norm=read.norm, out=s.b.share)  # (T, 1)
        s.product(hidden, shared.down, s.b.previous)
        s.k.gated_add(total, s.b.previous, s.b.share, out=total)

    # ---- other sizes

    def padded(self) -> Experts:
        return replace(self, width=rounded_up(self.width), shared=self.shared and self.shared.padded())

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        own = {"columns": columns_of(self.width, rank, tp, block)}
        if self.shared:
            own |= self.shared.divided(rank, tp, block)
        return own

    def of_rank(self, divided: Divided) -> Experts:
        shared = self.shared and self.shared.of_rank(divided)
        if shared and not shared.width:  # it is so narrow that other ranks compute it
            shared = None
        return replace(self, width=len(divided["columns"]), shared=shared)


@dataclass(frozen=True)
class ExpertsBesideDense(Block):
    """norm(dense x) + norm(experts x) (Gemma 4). Dense part, experts and router each have a norm before them.

    experts_scale (E,) has a factor for each expert's result. router_norm is divided by sqrt(C) when it is
    loaded."""

    count: int               # E
    width: int               # F, of each expert
    router: Router
    dense: FeedForward       # its tensors' names begin with "shared_"
    norm: RmsNorm

    NORMS = "experts_norm", "experts_down_norm", "shared_down_norm"

    def tensors(self, C: int) -> Tensors:
        E = self.count
        columns = Run(self.width, of="columns")
        found = self.router.tensors(E, C)
        found |= {"router_norm": vector(C), "experts_scale": vector(E),
                 "expert_gate_up": matrix((columns,) * (2 * E), C),
                 "expert_down": matrix((Run(C),) * E, (columns,))}
        for name in self.NORMS:
            found |= self.norm.tensors(name, C)
        return found | self.dense.tensors(C)

    def scratch(self, C: int) -> Scratch:
        return widest([{"routing": Buffer(self.count)}, self.dense.scratch(C)])

    def arranged(self, w: dict[str, Any], arrays: Any) -> dict[str, Any]:
        norm = w["router_norm"]
        return {"router_norm": norm * len(norm)**-0.5}

    def compute(self, s: BlockStep, read: Read, to: Sum):
        k = s.k
        b = s.b
        w = s.w
        eps = self.norm.eps
        x = to.residual(s)

        k.linear(x, w["router"], norm=Norm(w["router_norm"], eps), out=b.routing)  # (T, E)
        k.experts(x, b.routing, w["expert_gate_up"], w["expert_down"], norm=Norm(w["experts_norm"], eps),
                  biases=(None, None), out=b.added, activation=self.dense.activation, residual=False,
                  scales=w["experts_scale"], **self.router.options(w))
        self.reduce_and_norm(s, b.added, "experts_down_norm")

        hidden = self.dense.hidden(s, read)
        s.product(Read(hidden), self.dense.down, b.previous)
        self.reduce_and_norm(s, b.previous, "shared_down_norm")

        k.mix(b.added, b.previous, 1.0, 1.0, out=b.added)
        to.add(s, b.added, reduced=True)

    def reduce_and_norm(self, s: BlockStep, x, name: str):
        if s.k.all_reduce:
            s.k.all_reduce(x, out=x)
        self.norm.apply(s, x, name, out=x)

    # ---- other sizes

    def padded(self) -> ExpertsBesideDense:
        return replace(self, width=rounded_up(self.width), dense=self.dense.padded())

    def widened(self, C: int, wide: int) -> ExpertsBesideDense:
        return replace(self, norm=self.norm.padded(C, wide))

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        own = {"columns": columns_of(self.width, rank, tp, block)}
        return own | self.dense.divided(rank, tp, block)

    def of_rank(self, divided: Divided) -> ExpertsBesideDense:
        return replace(self, width=len(divided["columns"]), dense=self.dense.of_rank(divided))
