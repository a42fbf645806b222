"""What a model is made of (`ModelSpec`), and what one step computes (`Batch`)."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

from chatlm.common.config import PAGE_SIZE


class LayerGroups(NamedTuple):
    """Which layers share pages: of each layer its group and its index there, of each group its window."""

    of_layer: tuple[tuple[int, int], ...]  # (0, 0) also of a layer without pages
    windows: tuple[int, ...] = (0,)  # keys that a token sees, its own included; 0 = all
    depth: int = 0                   # layers of a page

    @property
    def holes(self) -> bool:
        """May a table have holes? Then the cache has one page more, which stands for them."""
        return any(self.windows)


MOST_GROUPS = 16  # more would make long tables


def group_layers(windows: Seq[int], layers: int, context: int, apart: bool = True,
                 unpaged: Seq[int] = ()) -> LayerGroups:
    """The groups of a model for contexts of so many tokens; one group unless they may be `apart`. Layers that
    are `unpaged` keep a state instead of keys and values."""
    windows = [window if window < context else 0 for window in windows or (0,) * layers]
    paged = [l for l in range(layers) if l not in unpaged]
    full, local = ([l for l in paged if bool(windows[l]) == limited] for limited in (False, True))
    if not (apart and local):
        places = tuple((0, paged.index(l) if l in paged else 0) for l in range(layers))
        return LayerGroups(places, (0,), len(paged))
    depth = max(min(len(full), len(local)), -(-layers // MOST_GROUPS)) if full else layers
    groups = [alike[i:i + depth] for alike in (full, local) for i in range(0, len(alike), depth)]
    of_layer = {l: (group, index) for group, members in enumerate(groups) for index, l in enumerate(members)}
    reach = tuple(max(windows[l] for l in members) for members in groups)
    return LayerGroups(tuple(of_layer.get(l, (0, 0)) for l in range(layers)), reach, depth)


@dataclass(frozen=True)
class ShortConv:
    """A gated convolution over the last tokens, in attention's place (LFM2).

    b, c, u = the thirds of mix_in x;  s = b * u;  y_t = c_t * (sum over j of taps[j] * s[t - size + 1 + j]);
    mix_out y. What it keeps of the tokens before is s of the last size - 1 of them.

    The mixer of another kind has the same attributes; what it keeps is data as here."""

    size: int           # tokens that y_t depends on, its own included
    bias: bool = False  # of mix_in, the taps and mix_out
    channels: int = 0   # of b, c and u each, where one of several ranks has some; 0: C

    def widths(self, C: int) -> tuple[int, int]:
        """Of what mix_in gives, and of what mix_out takes."""
        own = self.channels or C
        return 3 * own, own

    def tensors(self, C: int) -> dict[str, tuple[int, ...]]:
        """Its tensors in a model of this width; a file has the taps as (C, size)."""
        wide, own = self.widths(C)
        biases = {"mix_in_bias": (wide,), "taps_bias": (own,), "mix_out_bias": (C,)} if self.bias else {}
        return {"mix_in": (wide, C), "taps": (own * self.size,), "mix_out": (C, own)} | biases

    def states(self, C: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the float32 arrays that a sequence's state has in such a layer."""
        return ((self.size - 1, self.channels or C),)


@dataclass(frozen=True)
class DeltaRule:
    """Linear attention that corrects what a key is bound to (Yang et al., "Gated Delta Networks", 2024).

    p, z, b, a = mix_in x;  u = silu of a convolution of p over the last `size` tokens;  q, k, v = u, in
    heads, q and k of length 1, q / sqrt(Dk);  S = exp(decay * softplus(a + dt_bias)) * S;
    S = S + k (sigmoid(b) * (v - S^T k))^T;  mix_out (mix_norm * rms(S^T q) * silu(z)).
    It keeps S (Hv, Dk, Dv) and p of the last size - 1 tokens. Value head j reads the key head j // (Hv / Hk),
    or j % Hk if `alternating`. In Qwen3-Next rows of mix_in lie side by side for each key head: those of its
    b and a, and of its q, k, v, z."""

    size: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    alternating: bool = False
    gates_by_key: bool = False    # b and a lie so
    heads_by_key: bool = False    # q, k, v, z do

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """The rows of mix_in: p, z, b, a."""
        keys, values = self.key_heads * self.key_size, self.value_heads * self.value_size
        return 2 * keys + values, values, self.value_heads, self.value_heads

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of the tensors of a file that mix_in is made of."""
        p, z, b, a = self.parts
        return *((p + z,) if self.heads_by_key else (p, z)), *((b + a,) if self.gates_by_key else (b, a))

    def widths(self, C: int) -> tuple[int, int]:
        return sum(self.parts), self.parts[1]

    def tensors(self, C: int) -> dict[str, tuple[int, ...]]:
        per_head = dict.fromkeys(("decay", "dt_bias"), (self.value_heads,))
        return {"mix_in": (sum(self.parts), C), "taps": (self.parts[0] * self.size,),
                "mix_norm": (self.value_size,), "mix_out": (C, self.parts[1])} | per_head

    def states(self, C: int) -> tuple[tuple[int, ...], ...]:
        return (self.size - 1, self.parts[0]), (self.value_heads, self.key_size, self.value_size)


@dataclass(frozen=True)
class Mamba2:
    """A state space that decays by the token (Dao and Gu, "Transformers are SSMs", 2024; Granite 4).

    z, p, dt = mix_in x;  v, B, C = silu of a convolution of p over the last `size` tokens;
    dt = softplus(dt + dt_bias);  S = exp(decay * dt) * S + (dt * v) B^T;  y = S C + skip * v;
    mix_out (mix_norm * rms(y * silu(z))), the rms over each group. Head j reads the group's B and C, which
    is j // (heads / groups). It keeps S, as (heads, N, P), and p of the last size - 1 tokens.

    One of several ranks that share groups has its heads, all groups' B and C, and parts of their rms."""

    size: int
    heads: int
    head_size: int             # P
    state_size: int            # N
    groups: int = 1
    taps_bias: bool = True     # of the convolution
    bias: bool = False         # of mix_in and mix_out
    of_heads: int = 0          # > 0: of so many, where ranks share groups, these are the heads
    first_head: int = 0        # from this one on

    @property
    def group_size(self) -> int:
        """The heads of a group, in all ranks together."""
        return (self.of_heads or self.heads) // self.groups

    @property
    def parts(self) -> tuple[int, int, int]:
        """The rows of mix_in: z, p, dt."""
        inner = self.heads * self.head_size
        return inner, inner + 2 * self.groups * self.state_size, self.heads

    def widths(self, C: int) -> tuple[int, int]:
        return sum(self.parts), self.parts[0]

    def tensors(self, C: int) -> dict[str, tuple[int, ...]]:
        inner, channels, heads = self.parts
        biases = {"taps_bias": (channels,)} if self.taps_bias else {}
        if self.bias:
            biases |= {"mix_in_bias": (sum(self.parts),), "mix_out_bias": (C,)}
        return {"mix_in": (sum(self.parts), C), "taps": (channels * self.size,), "mix_norm": (inner,),
                "mix_out": (C, inner)} | dict.fromkeys(("decay", "dt_bias", "skip"), (heads,)) | biases

    def states(self, C: int) -> tuple[tuple[int, ...], ...]:
        return (self.size - 1, self.parts[1]), (self.heads, self.state_size, self.head_size)


Mixer = ShortConv | DeltaRule | Mamba2


@dataclass(frozen=True)
class ModelSpec:
    """All that distinguishes one model from another; a loader makes it, `Transformer.forward` reads it.

    Sizes by letter: V vocab_size, L layers, C width, H heads, Hkv kv_heads, D head_size, F ffn_size.
    The loader crops padded vocabularies to V rows and un-permutes interleaved rotary pairs to half-split."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_size: int
    max_positions: int                # length of the rotary tables; the context cannot be longer
    norm_eps: float = 1e-5
    norm_weights: bool = True         # attention_norm, ffn_norm, final_norm have weights
    pre_norms: bool = True            # False: blocks read x as it is, without attention_norm and ffn_norm
    post_norms: bool = False          # output_norm, down_norm: of what each block adds to x
    embedding_norm: bool = False      # RMS norm (without weight) right after the embedding
    embedding_scale: float = 1.0      # multiplies the embedding; itself rounded to the weights' type
    residual_scale: float = 1.0       # multiplies what each block adds to x
    logit_scale: float = 1.0          # multiplies the logits
    tied_head: bool = False           # the head shares the embedding's weights
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False            # gate_up_bias (or up_bias) and down_bias
    rope_base: float = 10000.0
    rope_size: int | None = None      # rotated dims of each head; None = all D
    rope_direction: int = 1           # +1 textbook, -1 nanochat
    rope_bfloat16: bool = False       # cos and sin rounded to bfloat16 (nanochat until 2026-03-04)
    rope_factors: tuple[float, ...] | None = None  # divides each of the rope_size/2 frequencies
    rope_scale: float = 1.0           # multiplies cos and sin (yarn, longrope)
    local_rope_base: float = 0.0      # of layers with a window, which have no factors; 0: as the others
    unrotated_layers: tuple[int, ...] = ()
    qk_norm: str = "none"             # "none" | "before_rope" | "after_rope"
    qk_norm_weights: bool = False
    qk_norm_sizes: tuple[int, ...] = ()  # (H * D, Hkv * D): q and k are normalized whole, before rope
    qk_scale: float = 1.0             # multiplies q and k, after norm and rope
    q_scale: float = 1.0              # multiplies q alone, besides 1 / sqrt(D)
    q_growth: tuple[float, ...] = ()  # (beta, n): and 1 + beta * ln(1 + position // n)
    attention_softcap: float = 0.0    # scores = c * tanh(scores / c), before the mask; 0 = none
    activation: str = "swiglu"        # one of GATES, or "relu2" (without a gate)
    experts: int = 0                  # of each layer, F wide; 0: its feed-forward part is one dense one
    dense_layers: tuple[int, ...] = ()  # those that have none all the same
    dense_size: int = 0               # as wide is the feed-forward part of these
    shared_size: int = 0              # > 0: beside its experts a layer has one so wide that every token takes
    shared_gate: bool = False         # whose output is multiplied by the sigmoid of one product more
    experts_per_token: int = 0        # those with the largest of the router's logits
    shares_sum_to_one: bool = True    # softmax over the chosen experts' logits; else over all experts'
    router_bias: bool = False
    sigmoid_router: bool = False      # shares are the chosen experts' sigmoids, divided by their sum
    choice_bias: bool = False         # which counts where a sigmoid_router chooses, and not in the shares
    output_gate: bool = False         # beside each head's q, qkv has as many rows for a gate of its output
    sinks: bool = False               # a logit for each query head, which attends to no value
    windows: tuple[int, ...] = ()     # keys per layer, including the token's own; 0 = full, () = all
    mixers: tuple[Mixer | None, ...] = ()  # of each layer, in attention's place; None, () = attention
    softcap: float = 0.0              # logits = c * tanh(logits / c); 0 = none
    residual_lambdas: bool = False    # x = resid_lambdas[l] * x + x0_lambdas[l] * x0 before layer l
    value_embed_layers: tuple[int, ...] = ()  # layers with value_embed and ve_gate
    ve_gate_scale: float = 2.0
    ve_gate_channels: int = 32
    smear_channels: int = 0           # > 0: add the previous embedding, gated by this many channels
    backout_layer: int | None = None  # subtract backout_lambda * (x after it) before the final norm
    own_rows: int = 0                 # > 0: of embedding and head, those that this one of several ranks has,
    first_row: int = 0                # from this one on
    opens: bool = True                # False: another stage computes the layers before these,
    closes: bool = True               # and here those after them

    @property
    def unpaged_layers(self) -> tuple[int, ...]:
        """Those that keep a state for each sequence instead of keys and values for each token."""
        return tuple(l for l, mixer in enumerate(self.mixers) if mixer)

    @property
    def paged_layers(self) -> int:
        return self.layers - len(self.unpaged_layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence; 0 in a model whose layers are all attention."""
        shapes = [shape for mixer in self.mixers if mixer for shape in mixer.states(self.width)]
        return 4 * sum(map(math.prod, shapes))


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model of this spec, and no others (weights are (out, in))."""
    V, C, D, F = spec.vocab_size, spec.width, spec.head_size, spec.ffn_size
    H, Hkv = spec.heads, spec.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.own_rows or V, C)} if spec.opens else {}
    if spec.closes:
        shapes["head"] = spec.own_rows or V, C
    if spec.norm_weights:
        shapes["final_norm"] = (C,)
    if spec.residual_lambdas:
        shapes |= {"resid_lambdas": (spec.layers,), "x0_lambdas": (spec.layers,)}
    if spec.smear_channels and spec.opens:
        shapes |= {"smear_gate": (1, spec.smear_channels), "smear_lambda": (1,)}
    if spec.backout_layer is not None and spec.closes:
        shapes["backout_lambda"] = (1,)
    for l in range(spec.layers):
        mixer = spec.mixers[l] if spec.mixers else None
        if mixer:
            shapes |= {f"{l}.{name}": shape for name, shape in mixer.tensors(C).items()}
        else:
            shapes |= {f"{l}.qkv": ((H * (1 + spec.output_gate) + 2 * Hkv) * D, C), f"{l}.output": (C, H * D)}
        E, shared = spec.experts if l not in spec.dense_layers else 0, spec.shared_size
        size = F if E or not spec.experts else spec.dense_size
        up, down, rows = ("up", "down", size) if spec.activation == "relu2" else ("gate_up", "down", 2 * size)
        if E:  # one matrix: the rows of all experts' gates, then of their ups
            up, down = "expert_gate_up", "expert_down"
            shapes |= {f"{l}.router": (E, C), f"{l}.{up}": (E * rows, C), f"{l}.{down}": (E * C, F)}
        else:
            shapes |= {f"{l}.{up}": (rows, C), f"{l}.{down}": (C, size)}
        if E and shared:
            shapes |= {f"{l}.shared_gate_up": (2 * shared, C), f"{l}.shared_down": (C, shared)}
        if E and spec.choice_bias:
            shapes[f"{l}.choice_bias"] = (E,)
        if E and spec.shared_gate:
            shapes[f"{l}.shared_gate"] = (1, C)
        if spec.norm_weights and spec.pre_norms:
            shapes |= {f"{l}.attention_norm": (C,), f"{l}.ffn_norm": (C,)}
        if spec.post_norms:
            shapes |= {f"{l}.output_norm": (C,), f"{l}.down_norm": (C,)}
        for part, biased in {"qkv": spec.qkv_bias, "output": spec.output_bias, "router": spec.router_bias,
                             up: spec.ffn_bias, down: spec.ffn_bias}.items():
            if biased and f"{l}.{part}" in shapes:
                shapes[f"{l}.{part}_bias"] = shapes[f"{l}.{part}"][:1]
        if spec.qk_norm_weights and not mixer:
            q_size, k_size = spec.qk_norm_sizes and (H * D, Hkv * D) or (D, D)
            shapes |= {f"{l}.q_norm": (q_size,), f"{l}.k_norm": (k_size,)}
        if spec.sinks and not mixer:
            shapes[f"{l}.sinks"] = (H,)
        if l in spec.value_embed_layers:
            shapes |= {f"{l}.value_embed": (V, Hkv * D), f"{l}.ve_gate": (Hkv, spec.ve_gate_channels)}
    return shapes


class Batch(NamedTuple):
    """One flattened step: the T new tokens of N sequences, one after another; one-token sequences first."""

    token_ids: list[int]           # (T); ~i stands for the token that row i of the previous step is drawing
    previous_token_ids: list[int]  # (T); -1 at position 0
    starts: list[int]              # (N + 1): tokens starts[i] .. starts[i + 1] - 1 belong to sequence i
    lengths: list[int]             # (N): number of keys of sequence i after this step
    tables: list[list[int]]        # (N): pages of sequence i, in order; of each group of layers in turn
    logit_rows: list[int]          # (R): which of the T rows need logits
    states: bool = False           # are the hidden states of all T rows needed?
    state_reads: list[int] = []    # (N): the slot with the state before the new tokens; any at position 0
    write_rows: list[int] = []     # rows, ascending, after each of which the state is written
    write_slots: list[int] = []    # into a slot, these


class Sequences(NamedTuple):
    """What a step's layers with states are told of its sequences; lists as in Batch."""

    starts: list[int]
    firsts: list[int]              # (N): the position of each sequence's first new token
    reads: list[int]
    writes: list[tuple[int, int]]  # (row, slot)

    @classmethod
    def of(cls, batch: Batch) -> Sequences:
        firsts = [length - end + start
                  for length, start, end in zip(batch.lengths, batch.starts, batch.starts[1:])]
        return cls(batch.starts, firsts, batch.state_reads, list(zip(batch.write_rows, batch.write_slots)))


class Inputs(NamedTuple):
    """A Batch as the ops read it: int64 tensors on the device, and attention's plan.

    `parts[group]` has the slots and the plan of a group of layers; those of group 0 are also here."""

    token_ids: Any           # (T,)
    previous_token_ids: Any  # (T,)
    positions: Any           # (T,)
    slots: Any               # (T,) page * PAGE_SIZE + offset: where k and v are written
    logit_rows: Any          # (R,)
    attention: Any           # the kernels' plan: where each row finds its keys
    parts: tuple = ()
    sequences: Any = None    # Sequences, where layers keep states


def token_places(batch: Batch) -> tuple[Seq[int], Seq[int]]:
    """The absolute position of each new token, and the slot for its keys and values."""
    counts = [end - start for start, end in zip(batch.starts, batch.starts[1:])]
    pairs = [(position, table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
             for count, length, table in zip(counts, batch.lengths, batch.tables)
             for position in range(length - count, length)]
    positions, slots = zip(*pairs)
    return positions, slots
