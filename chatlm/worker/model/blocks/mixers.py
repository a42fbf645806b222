"""Blocks that keep a state for each sequence instead of keys and values for each token."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from chatlm.worker.model.blocks.axes import Axis, Divided, Run, Tensors, length, matrix, vector
from chatlm.worker.model.blocks.feed_forward import columns_of
from chatlm.worker.model.blocks.step import Block, BlockStep, Buffer, Read, Scratch, Sum
from chatlm.worker.model.tensors import rounded_up

States = tuple[tuple[int, ...], ...]  # shapes of the float32 arrays of a sequence's state


def run(s: BlockStep, read: Read, widths: tuple[int, int], op, to: Sum):
    """mix_out op(mix_in x). widths: how many columns the op reads, and how many it gives."""
    wide, narrow = widths
    mixed = s.b.mixed[:, :wide]
    out = s.b.mixer[:, :narrow]
    s.product(read, "mix_in", mixed, bias=s.w.get("mix_in_bias"))
    op(s, mixed, out)
    to.product(s, out, "mix_out")


def buffers_of(widths: tuple[int, int]) -> Scratch:
    wide, narrow = widths
    return {"mixed": Buffer(wide, short=True), "mixer": Buffer(narrow, short=True)}


def by_tap(w: dict[str, Any], size: int) -> dict[str, Any]:
    """The taps with the columns of each tap side by side. Files have them as (columns, size)."""
    return {"taps": w["taps"].reshape(-1, size).T.flatten()}


class Mixer(Block):
    """A block that stands in the place of attention, and keeps a state. Caches, ranks and stages need no more
    than this."""

    title = "layer with a state"  # what the log calls it
    compiled = False           # does decode_core record steps with it?

    @property
    def shared(self) -> tuple[int, str]:
        """How many heads ranks must share evenly, and what they are; "" if they divide it as they like."""
        return 1, ""

    def states(self, C: int) -> States:
        """The shapes of what it keeps for a sequence."""
        raise NotImplementedError


@dataclass(frozen=True)
class ShortConv(Mixer):
    """A gated convolution over the last tokens (LFM2).

    b, c, u = the thirds of mix_in x;  s = b * u;  y_t = c_t * (sum over j of taps[j] * s[t - size + 1 +
    j]); mix_out y. mix_in is (3 C, C), taps (C * size), mix_out (C, C). Its state is s of the last size - 1
    tokens."""

    title = "short convolution"
    compiled = True
    size: int           # how many tokens y_t depends on, its own included
    bias: bool = False  # mix_in, the taps and mix_out have biases
    channels: int = 0   # a rank's columns of b, of c and of u; 0: all C

    def widths(self, C: int) -> tuple[int, int]:
        """(output width of mix_in, input width of mix_out)"""
        own = self.channels or C
        return 3 * own, own

    def tensors(self, C: int) -> Tensors:
        own = Run(self.channels or C, of="channels")
        found = {"mix_in": matrix((own,) * 3, C, adapted=True),
                 "taps": vector((own._replace(size=self.size),)),
                 "mix_out": matrix(C, (own,), adapted=True)}
        biases = {"mix_in_bias": found["mix_in"].bias, "taps_bias": vector((own,)),
                  "mix_out_bias": found["mix_out"].bias}
        return found | biases if self.bias else found

    def states(self, C: int) -> States:
        return ((self.size - 1, self.channels or C),)

    def scratch(self, C: int) -> Scratch:
        return buffers_of(self.widths(C))

    def arranged(self, w: dict[str, Any], arrays: Any) -> dict[str, Any]:
        return by_tap(w, self.size)

    def compute(self, s: BlockStep, read: Read, to: Sum):
        run(s, read, self.widths(s.b.x.shape[1]), self.mix, to)

    def mix(self, s: BlockStep, x, out):
        s.k.short_conv(x, s.w["taps"], s.states, s.inputs.sequences, out=out, bias=s.w.get("taps_bias"))

    def widened(self, C: int, wide: int) -> ShortConv:
        return replace(self, channels=rounded_up(self.channels or C))

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        return {"channels": columns_of(self.channels, rank, tp, block)}

    def of_rank(self, divided: Divided) -> ShortConv:
        return replace(self, channels=len(divided["channels"]))


@dataclass(frozen=True)
class DeltaRule(Mixer):
    """Linear attention that corrects what a key is bound to (Yang et al., "Gated Delta Networks", 2024).

    p, z, b, a = mix_in x
    u = silu of a convolution of p over the last `size` tokens
    q, k, v = u, in heads; q and k get the length 1, then q = q / sqrt(Dk)
    S = exp(decay * softplus(a + dt_bias)) * S
    S = S + k (sigmoid(b) * (v - S^T k))^T
    the result is mix_out (mix_norm * rms(S^T q) * silu(z))

    Its state is S (Hv, Dk, Dv) and p of the last size - 1 tokens. Value head j reads key head
    j // (Hv / Hk), or j % Hk if `alternating`. In Qwen3-Next the rows of mix_in are grouped by key head:
    those of b and a, and those of q, k, v and z."""

    widens = False
    title = "delta rule"
    compiled = True
    size: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    alternating: bool = False
    gates_by_key: bool = False    # b and a are grouped by key head
    heads_by_key: bool = False    # q, k, v and z are grouped by key head
    eps: float = 1e-5             # of mix_norm

    @property
    def shared(self) -> tuple[int, str]:
        return self.key_heads, "key heads in its linear attention"

    @property
    def values_per_key(self) -> int:
        return self.value_heads // self.key_heads

    def value_runs(self, size: int = 1) -> Axis:
        """Rows of `size` for each value head, in units of the key heads that these read."""
        if self.alternating:
            return (Run(self.key_heads, size, "keys"),) * self.values_per_key
        return (Run(self.key_heads, self.values_per_key * size, "keys"),)

    def channel_runs(self, size: int = 1) -> Axis:
        """The rows of p: those of q, k and v. size: how many numbers each row has."""
        keys = Run(self.key_heads, self.key_size * size, "keys")
        return keys, keys, *self.value_runs(self.value_size * size)

    @functools.cached_property
    def parts(self) -> tuple[int, int, int, int]:
        """How many rows of mix_in are p, z, b and a."""
        keys = self.key_heads * self.key_size
        values = self.value_heads * self.value_size
        return 2 * keys + values, values, self.value_heads, self.value_heads

    @property
    def rows(self) -> tuple[int, ...]:
        """How many rows each of the file's tensors has that make up mix_in."""
        p, z, b, a = self.parts
        heads = (p + z,) if self.heads_by_key else (p, z)
        gates = (b + a,) if self.gates_by_key else (b, a)
        return heads + gates

    def widths(self, C: int) -> tuple[int, int]:
        return sum(self.parts), self.parts[1]

    def tensors(self, C: int) -> Tensors:
        r = self.values_per_key
        values = self.value_runs(self.value_size)
        rows = self.channel_runs() + values
        if self.heads_by_key:
            rows = (Run(self.key_heads, 2 * (self.key_size + r * self.value_size), "keys"),)
        if self.gates_by_key:
            rows += (Run(self.key_heads, 2 * r, "keys"),)
        else:
            rows += self.value_runs() * 2
        return {"mix_in": matrix(rows, C, adapted=True), "taps": vector(self.channel_runs(self.size)),
                "mix_norm": vector(self.value_size), "mix_out": matrix(C, values, adapted=True),
                "decay": vector(self.value_runs()), "dt_bias": vector(self.value_runs())}

    def states(self, C: int) -> States:
        return (self.size - 1, self.parts[0]), (self.value_heads, self.key_size, self.value_size)

    def scratch(self, C: int) -> Scratch:
        return buffers_of(self.widths(C))

    def arranged(self, w: dict[str, Any], arrays: Any) -> dict[str, Any]:
        return by_tap(w, self.size)

    def compute(self, s: BlockStep, read: Read, to: Sum):
        run(s, read, self.widths(0), self.mix, to)

    def mix(self, s: BlockStep, x, out):
        s.k.delta_rule(x, s.w, self, self.eps, s.states, s.inputs.sequences, out=out)

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        """Some key heads, and all value heads that read them."""
        return {"keys": range(rank * self.key_heads // tp, (rank + 1) * self.key_heads // tp)}

    def of_rank(self, divided: Divided) -> DeltaRule:
        count = len(divided["keys"])
        return replace(self, key_heads=count, value_heads=count * self.values_per_key)


@dataclass(frozen=True)
class Mamba2(Mixer):
    """A state space that decays by the token (Dao and Gu, "Transformers are SSMs", 2024; Granite 4).

    z, p, dt = mix_in x
    v, B, C = silu of a convolution of p over the last `size` tokens
    dt = softplus(dt + dt_bias)
    S = exp(decay * dt) * S + (dt * v) B^T
    y = S C + skip * v
    the result is mix_out (mix_norm * rms(y * silu(z))), with the rms over each group

    Head j reads B and C of group j // (heads / groups). Its state is S, as (heads, N, P), and p of the last
    size - 1 tokens.

    Where ranks share groups, a rank has its heads, B and C of all groups, and a part of each rms."""

    widens = False
    title = "Mamba layer"
    compiled = True
    size: int
    heads: int
    head_size: int             # P
    state_size: int            # N
    groups: int = 1
    taps_bias: bool = True     # the convolution has a bias
    bias: bool = False         # mix_in and mix_out have biases
    of_heads: int = 0          # > 0: ranks share groups, and have so many heads together
    first_head: int = 0        # number of this rank's first head
    eps: float = 1e-5          # of mix_norm

    @property
    def shared(self) -> tuple[int, str]:
        return self.heads, "heads in its Mamba layers"

    @functools.cached_property
    def group_size(self) -> int:
        """How many heads a group has, in all ranks together."""
        return (self.of_heads or self.heads) // self.groups

    @functools.cached_property
    def parts(self) -> tuple[int, int, int]:
        """How many rows of mix_in are z, p and dt."""
        return self.heads * self.head_size, length(self.channel_runs()), self.heads

    def channel_runs(self, size: int = 1) -> Axis:
        """The rows of p: those of v, B and C. size: how many numbers each row has."""
        groups = Run(self.groups, self.state_size * size, "groups")
        return Run(self.heads, self.head_size * size, "heads"), groups, groups

    def widths(self, C: int) -> tuple[int, int]:
        return sum(self.parts), self.parts[0]

    def tensors(self, C: int) -> Tensors:
        inner = Run(self.heads, self.head_size, "heads")
        heads = Run(self.heads, of="heads")
        found = {"mix_in": matrix((inner, *self.channel_runs(), heads), C, adapted=True),
                 "taps": vector(self.channel_runs(self.size)), "mix_norm": vector((inner,)),
                 "mix_out": matrix(C, (inner,), adapted=True)}
        found |= dict.fromkeys(("decay", "dt_bias", "skip"), vector((heads,)))
        if self.taps_bias:
            found["taps_bias"] = vector(self.channel_runs())
        if self.bias:
            found |= {f"{name}_bias": found[name].bias for name in ("mix_in", "mix_out")}
        return found

    def states(self, C: int) -> States:
        return (self.size - 1, self.parts[1]), (self.heads, self.state_size, self.head_size)

    def scratch(self, C: int) -> Scratch:
        found = buffers_of(self.widths(C))
        if self.of_heads:
            found["unnormed"] = Buffer(self.parts[0])
            found["squares"] = Buffer(rounded_up(self.groups))
        return found

    def arranged(self, w: dict[str, Any], arrays: Any) -> dict[str, Any]:
        return by_tap(w, self.size)

    def compute(self, s: BlockStep, read: Read, to: Sum):
        run(s, read, self.widths(0), self.mix, to)

    def mix(self, s: BlockStep, x, out):
        k = s.k
        b = s.b
        w = s.w
        if not self.of_heads:
            return k.mamba2(x, w, self, self.eps, s.states, s.inputs.sequences, out=out)
        k.mamba2(x, w, self, self.eps, s.states, s.inputs.sequences, out=b.unnormed)
        k.group_squares(b.unnormed, self, out=b.squares)
        k.all_reduce(b.squares, out=b.squares)
        k.norm_groups(b.unnormed, w["mix_norm"], b.squares, self, self.eps, out=out)

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        """Some heads with B and C of their groups, or of all groups if ranks cannot get whole groups."""
        count = self.heads // tp
        G = self.groups
        groups = range(G) if G % tp else range(rank * G // tp, (rank + 1) * G // tp)
        return {"heads": range(rank * count, (rank + 1) * count), "groups": groups}

    def of_rank(self, divided: Divided) -> Mamba2:
        heads = divided["heads"]
        groups = divided["groups"]
        own = replace(self, heads=len(heads), groups=len(groups))
        if len(groups) < self.groups or len(heads) == self.heads:
            return own
        return replace(own, of_heads=self.heads, first_head=heads.start)

