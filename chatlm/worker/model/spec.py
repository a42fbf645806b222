"""What a model is made of (`ModelSpec`), and what one step computes (`Batch`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from chatlm.common.config import PACKED_BLOCK, PAGE_SIZE


@dataclass(frozen=True)
class ShortConv:
    """A gated convolution over the last tokens, instead of attention (LFM2).

    b, c, u = the thirds of mix_in x;  s = b * u;  y_t = c_t * (sum over j of taps[j] * s[t - size + 1 + j]);
    mix_out y. Its state is s of the last size - 1 tokens.

    Mixers of other kinds have the same attributes; their state is data too."""

    size: int           # tokens that y_t depends on, its own included
    bias: bool = False  # of mix_in, the taps and mix_out
    channels: int = 0   # of b, c and u each, if one of several ranks has some; 0: C

    def widths(self, C: int) -> tuple[int, int]:
        """The output width of mix_in, and the input width of mix_out."""
        own = self.channels or C
        return 3 * own, own

    def tensors(self, C: int) -> dict[str, tuple[int, ...]]:
        """Its tensors in a model of this width; files store the taps as (C, size)."""
        wide, own = self.widths(C)
        biases = {"mix_in_bias": (wide,), "taps_bias": (own,), "mix_out_bias": (C,)} if self.bias else {}
        return {"mix_in": (wide, C), "taps": (own * self.size,), "mix_out": (C, own)} | biases

    def states(self, C: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the float32 arrays of a sequence's state in this layer."""
        return ((self.size - 1, self.channels or C),)


@dataclass(frozen=True)
class DeltaRule:
    """Linear attention that corrects what a key is bound to (Yang et al., "Gated Delta Networks", 2024).

    p, z, b, a = mix_in x;  u = silu of a convolution of p over the last `size` tokens;  q, k, v = u, in
    heads, q and k of length 1, q / sqrt(Dk);  S = exp(decay * softplus(a + dt_bias)) * S;
    S = S + k (sigmoid(b) * (v - S^T k))^T;  mix_out (mix_norm * rms(S^T q) * silu(z)).
    Its state is S (Hv, Dk, Dv) and p of the last size - 1 tokens. Value head j reads key head j // (Hv / Hk),
    or j % Hk if `alternating`. In Qwen3-Next the rows of mix_in are grouped by key head: those of b and a,
    and those of q, k, v, z."""

    size: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    alternating: bool = False
    gates_by_key: bool = False    # b and a are grouped so
    heads_by_key: bool = False    # q, k, v, z are

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """The rows of mix_in: p, z, b, a."""
        keys, values = self.key_heads * self.key_size, self.value_heads * self.value_size
        return 2 * keys + values, values, self.value_heads, self.value_heads

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of the file's tensors that make up mix_in."""
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
    is j // (heads / groups). Its state is S, as (heads, N, P), and p of the last size - 1 tokens.

    One of several ranks that share groups has its heads, all groups' B and C, and parts of their rms."""

    size: int
    heads: int
    head_size: int             # P
    state_size: int            # N
    groups: int = 1
    taps_bias: bool = True     # of the convolution
    bias: bool = False         # of mix_in and mix_out
    of_heads: int = 0          # > 0: all ranks' heads, if they share groups; this rank's begin
    first_head: int = 0        # at this one

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


@dataclass(frozen=True)
class NoMixer:
    """Nothing: the layer has a feed-forward part alone, which reads x itself (Nemotron-H)."""

    size = 1  # no earlier token matters

    def widths(self, C: int) -> tuple[int, int]:
        return 0, 0

    def tensors(self, C: int) -> dict[str, tuple[int, ...]]:
        return {}

    def states(self, C: int) -> tuple[tuple[int, ...], ...]:
        return ()


Mixer = ShortConv | DeltaRule | Mamba2 | NoMixer


@dataclass(frozen=True)
class Attention:
    """How a layer attends: what it caches for each token, and which of that its queries see.

    For each token it caches, for each of Hkv heads, a key of D numbers and a value of Dv. A layer with a
    `source` caches nothing: its queries read the pages of that layer, whose sizes are its own."""

    heads: int                        # H, of queries
    kv_heads: int                     # Hkv
    head_size: int                    # D, of queries and keys
    own_value_size: int | None = None  # None: values are as wide as keys; see value_size
    window: int = 0                   # keys that a token sees, its own included; 0 = all
    rope_base: float = 10000.0
    rope_size: int | None = None      # rotated dims of each head; None = all D, 0 = none
    rope_factors: tuple[float, ...] | None = None  # divides each of the rope_size/2 frequencies; inf stops it
    rope_scale: float = 1.0           # multiplies cos and sin (yarn, longrope)
    q_scale: float = 1.0              # multiplies q, in addition to 1 / sqrt(D)
    value_norm: bool = False          # RMS norm (without weight) of each head of v
    values_from_keys: bool = False    # v is the product that k is made of, before its norm; no rows for v
    source: int | None = None         # the earlier layer whose keys and values it reads; no rows for k and v

    @property
    def value_size(self) -> int:
        """Dv."""
        return self.head_size if self.own_value_size is None else self.own_value_size

    @property
    def slot_size(self) -> int:
        """Numbers that it caches per token."""
        return 0 if self.source is not None else self.kv_heads * (self.head_size + self.value_size)

    @property
    def parts(self) -> tuple[int, int, int]:
        """The rows of qkv without gates: q, k, v."""
        keys, values = self.kv_heads * self.head_size, self.kv_heads * self.value_size
        if self.source is not None:
            keys = values = 0
        return self.heads * self.head_size, keys, 0 if self.values_from_keys else values


KV_BLOCKS = {  # how keys and values are kept -> (numbers, their bytes): in a float, in a block with its scale
    "float32": (1, 4), "float16": (1, 2), "bfloat16": (1, 2), "q8_0": (PACKED_BLOCK, PACKED_BLOCK + 2)}


class KvType(NamedTuple):
    """How layers keep keys and values: as floats, or packed as q8_0.

    With q8_0, each head is multiplied by the normalized Hadamard matrix, which spreads large numbers over
    all of it, and kept as 8-bit integers with a float16 scale for each 32. Heads whose size is not a power
    of two, or is below 32, stay floats."""

    floats: str = "float16"
    packed: bool = False

    @property
    def unit(self) -> int:
        """The unit of page sizes in bytes: that of a number, or 1 if layers may differ."""
        return 1 if self.packed else KV_BLOCKS[self.floats][1]

    @staticmethod
    def unpacked_sizes(attn: Attention) -> set[int]:
        """The sizes of a layer's keys and values that q8_0 does not allow."""
        return {size for size in (attn.head_size, attn.value_size)
                if size < PACKED_BLOCK or size & (size - 1)}

    def packs(self, attn: Attention) -> bool:
        return self.packed and not self.unpacked_sizes(attn)

    def of(self, attn: Attention) -> str:
        """The type of a layer's keys and values: "q8_0" or a type of floats."""
        return "q8_0" if self.packs(attn) else self.floats

    def slot_size(self, attn: Attention) -> int:
        """Units that a layer caches per token."""
        numbers, block_bytes = KV_BLOCKS[self.of(attn)]
        return attn.slot_size // numbers * block_bytes // self.unit


class LayerGroups(NamedTuple):
    """Which layers share pages. All pages have the same bytes, so that any group may take any of them."""

    members: tuple[tuple[int, ...], ...]  # the layers of each group, among those that keep keys and values
    windows: tuple[int, ...] = (0,)  # for each group, the keys that a token sees, including its own; 0 = all

    @property
    def holes(self) -> bool:
        """May a table have holes? The cache then has one more page, which stands for them."""
        return any(self.windows)

    @property
    def depth(self) -> int:
        """The largest number of layers in a page."""
        return max(map(len, self.members), default=0)


MOST_GROUPS = 16  # more would make tables long


def group_layers(attentions: Seq[Attention | None], context: int, apart: bool = True,
                 kv: KvType = KvType()) -> LayerGroups:
    """The groups of a model for contexts of this length; one group unless they may be `apart`. None: a layer
    that keeps a state instead of keys and values."""
    readers: dict[int, list[int]] = {
        l: [] for l, attn in enumerate(attentions) if attn and attn.source is None}
    for l, attn in enumerate(attentions):
        if attn:
            readers[l if attn.source is None else attn.source].append(
                attn.window if attn.window < context else 0)
    reach = {l: 0 if 0 in windows else max(windows) for l, windows in readers.items()}
    widest = 0 if 0 in reach.values() else max(reach.values(), default=0)  # 0: of layers without a window
    sizes = {l: kv.slot_size(attn) for l in readers if (attn := attentions[l])}
    full, local = ([l for l in readers if (reach[l] != widest) == limited] for limited in (False, True))
    if not (apart and local):
        return LayerGroups((tuple(readers),), (widest * apart,))
    if len({*sizes.values()}) == 1:
        depth = max(min(len(full), len(local)), -(-len(readers) // MOST_GROUPS))
        choices = [depth * sizes[full[0]]]
    else:
        choices = [size for alike in (full, local)
                   for size in itertools.accumulate(sizes[l] for l in alike) if size >= max(sizes.values())]
    packed = {size: [pack_layers(alike, sizes, size) for alike in (full, local)] for size in choices}

    def held(size: int) -> tuple[int, int]:  # by a sequence of the longest context, approximately
        whole, limited = map(len, packed[size])
        return (size * (whole * min(widest or context, context) + limited * max(reach[l] for l in local)),
                whole + limited)

    few = [size for size in choices if held(size)[1] <= MOST_GROUPS] or [max(choices)]
    groups = [members for part in packed[min(few, key=held)] for members in part]
    return LayerGroups(tuple(groups), tuple(max(reach[l] for l in members) for members in groups))


def pack_layers(layers: Seq[int], sizes: Mapping[int, int], most: int) -> list[tuple[int, ...]]:
    """The layers in runs whose total sizes are at most `most`."""
    runs: list[tuple[int, ...]] = []
    for l in layers:
        if runs and sum(sizes[other] for other in (*runs[-1], l)) <= most:
            runs[-1] += l,
        else:
            runs.append((l,))
    return runs


class PageLayout(NamedTuple):
    """Where each layer's keys and values are in the pages, in units of their type, per token. Pages are only
    compatible if their layouts are equal.

    If all layers cache the same size, each layer's part of all pages is contiguous, in the order of the
    layers; otherwise each page is."""

    group: tuple[int, ...]   # of each layer
    offset: tuple[int, ...]  # of each layer in a page of its group
    size: int                # of a page
    own: int                 # of each layer, if all are equal; else 0
    types: tuple[str, ...]   # of each layer's keys and values, see KvType; "" has none
    unit: int                # bytes

    @classmethod
    def of(cls, groups: LayerGroups, attentions: Seq[Attention | None], kv: KvType = KvType()) -> PageLayout:
        """The layout for a rank's attentions; the groups are the whole model's."""
        offsets, size, sizes = {}, 0, [kv.slot_size(attn) if attn else 0 for attn in attentions]
        for group, members in enumerate(groups.members):
            starts = itertools.accumulate((sizes[l] for l in members), initial=0)
            offsets |= {l: (group, start) for l, start in zip(members, starts)}
            size = max(size, sum(sizes[l] for l in members))
        found = [offsets.get(l if attn is None or attn.source is None else attn.source, (0, 0))
                 for l, attn in enumerate(attentions)]
        group, offset = zip(*found)
        kept = {size for size in sizes if size}
        types = tuple(kv.of(attn) if attn else "" for attn in attentions)
        return cls(group, offset, size, kept.pop() if len(kept) == 1 else 0, types, kv.unit)

    @property
    def shared(self) -> PageLayout:
        """The layout in which all layers have the same memory, one after another: a step computes whole
        texts, and no later one reads their keys and values. All must cache the same size."""
        return self._replace(offset=(0,) * len(self.offset), size=self.own)

    @property
    def page_bytes(self) -> int:
        return self.size * self.unit * PAGE_SIZE

    def place(self, layer: int, count: int) -> tuple[int, int]:
        """The offset of a layer's part in `count` pages or slots, and the distance between its parts."""
        offset = self.offset[layer]
        return (offset * count, self.own) if self.own else (offset, self.size)


DISTANCE_BUCKETS = 32  # half of them of keys that come after a token
UNGATED = ("relu2", "gelu_erf", "gelu_tanh", "gelu_quick")  # activations of a feed-forward part without gates


@dataclass(frozen=True)
class ModelSpec:
    """Everything that distinguishes one model from another; made by a loader, read by `Transformer.forward`.

    Sizes by letter: V vocab_size, L layers, C width, H heads, Hkv kv_heads, D head_size, F ffn_size.
    The loader crops padded vocabularies to V rows and un-permutes interleaved rotary pairs to half-split."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_size: int
    max_positions: int                # length of the rotary tables; a text cannot be longer
    norm_eps: float = 1e-5
    norm_weights: bool = True         # attention_norm, ffn_norm, final_norm have weights
    layer_norms: bool = False         # these three are LayerNorms: of x less its mean
    norm_biases: bool = False         # and add a bias to it
    pre_norms: bool = True            # False: blocks read x itself, without attention_norm and ffn_norm
    post_norms: bool = False          # output_norm, down_norm: of what each block adds to x
    sum_norms: bool = False           # these two: of x with what the block has added; there is no final_norm
    of_texts: bool = False            # it embeds whole texts: a token sees what comes after it too, up to its
                                      # layer's window on either side; there is no head
    embeds: bool = False              # texts are all that it computes: layers wait while others write answers
    first_norm: bool = True           # False: layer 0 has no attention_norm
    input_norm: bool = False          # embed_norm: of the sum of all embeddings
    distance_buckets: bool = False    # scores get a bias for each head and bucket of distances (MPNet)
    token_types: int = 0              # > 0: rows of a table of types, each added to the embedding
    parallel: bool = False            # feed-forward parts read x as attention does, not what it makes of x
    one_norm: bool = False            # and attention_norm's result: there is no ffn_norm
    embedding_norm: bool = False      # RMS norm (without weight) right after the embedding
    embedding_scale: float = 1.0      # multiplies the embedding; itself rounded to the weights' type
    positions: int = 0                # > 0: rows of a table of positions, each added to the embedding
    residual_scale: float = 1.0       # multiplies what each block adds to x
    logit_scale: float = 1.0          # multiplies the logits
    tied_head: bool = False           # the head shares the embedding's weights
    head_bias: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False            # gate_up_bias (or up_bias) and down_bias
    rope_base: float = 10000.0
    rope_size: int | None = None      # rotated dims of each head; None = all D, 0 = none
    rope_direction: int = 1           # +1 textbook, -1 nanochat
    rope_bfloat16: bool = False       # cos and sin rounded to bfloat16 (nanochat until 2026-03-04)
    rope_factors: tuple[float, ...] | None = None  # divides each of the rope_size/2 frequencies
    rope_scale: float = 1.0           # multiplies cos and sin (yarn, longrope)
    qk_norm: str = "none"             # "none" | "before_rope" | "after_rope"
    qk_norm_weights: bool = False
    qk_norm_sizes: tuple[int, ...] = ()  # (H * D, Hkv * D): q and k are normalized whole, before rope
    qk_norm_eps: float | None = None  # of this norm; None: norm_eps
    qk_scale: float = 1.0             # multiplies q and k, after norm and rope
    q_scale: float = 1.0              # multiplies q alone, in addition to 1 / sqrt(D)
    attentions: tuple[Attention, ...] = ()  # of each layer, where they differ; see `attention`
    q_growth: tuple[float, ...] = ()  # (beta, n): and 1 + beta * ln(1 + position // n)
    attention_softcap: float = 0.0    # scores = c * tanh(scores / c), before the mask; 0 = none
    activation: str = "swiglu"        # one of ops' GATES, or of UNGATED
    experts: int = 0                  # of each layer, F wide; 0: its feed-forward part is one dense one
    dense_layers: tuple[int, ...] = ()  # layers that have none nonetheless
    dense_size: int = 0               # width of the feed-forward part of these
    shared_size: int = 0              # > 0: width of an additional expert that every token takes
    shared_gate: bool = False         # its output is multiplied by the sigmoid of another product
    expert_norms: bool = False        # router, experts and shared expert have norms of their own
    experts_bias: bool = False        # added to what they add together
    bare_layers: tuple[int, ...] = ()  # layers without a feed-forward part
    double_layers: tuple[int, ...] = ()  # whose feed-forward part is 2 F wide
    experts_per_token: int = 0        # those with the largest of the router's logits
    shares_sum_to_one: bool = True    # softmax over the chosen experts' logits; else over all experts'
    router_bias: bool = False
    router_jitter: float | None = None  # experts and shares are those of `sparse_routes`
    sigmoid_router: bool = False      # shares are the chosen experts' sigmoids, see `sigmoid_routes`
    choice_bias: bool = False         # added when a sigmoid_router chooses, but not in the shares
    router_groups: tuple[int, int] = (1, 1)  # it chooses among the experts of so many groups
    share_scale: float = 1.0          # and multiplies its shares by this
    latent_size: int = 0              # > 0: experts read and add to a product of x of this width
    output_gate: bool = False         # after each head's q, qkv has as many rows for a gate of its output
    sinks: bool = False               # a logit for each query head, which attends to no value
    mixers: tuple[Mixer | None, ...] = ()  # of each layer, instead of attention; None, () = attention
    softcap: float = 0.0              # logits = c * tanh(logits / c); 0 = none
    residual_lambdas: bool = False    # x = resid_lambdas[l] * x + x0_lambdas[l] * x0 before layer l
    layer_scalars: bool = False       # x = scalar * x after each layer
    layer_input_size: int = 0         # P > 0: each layer adds a vector of its own for each token, P wide
    layer_inputs: tuple[int, int] = (0, 0)  # of a stage: its first layer, and how many all stages have
    value_embed_layers: tuple[int, ...] = ()  # layers with value_embed and ve_gate
    ve_gate_scale: float = 2.0
    ve_gate_channels: int = 32
    smear_channels: int = 0           # > 0: add the previous embedding, gated by this many channels
    backout_layer: int | None = None  # subtract backout_lambda * (x after it) before the final norm
    own_rows: int = 0                 # > 0: of embedding and head, the rows of this rank,
    first_row: int = 0                # from this one on
    answer_positions: int = 0         # > 0: prompt and answer end here; a longer text is only scored
    joins: bool = False               # a draft head: its input is a product of the embedding and a state of
                                      # another model, as which x is given
    sees: bool = False                # rows of pictures are added to the embeddings, which are 0 there,
    deep_rows: int = 0                # others of them after each of so many first layers
    rope_axes: tuple[int, ...] = ()   # how many pairs turn by a picture's time, row and column, interleaved
    two_sided: str = ""               # layers in which rows of a picture see all of its rows: "all" of them,
                                      # those with "windows", or none
    clamped: bool = False             # of a tower: what products read and give is bounded, see Clamps; gate
                                      # and up are products of their own
    picture_pad: int | None = None    # of rows of pictures, layers get the inputs of this token: a step's
                                      # previous_token_ids are then it in such rows, elsewhere V
    opens: bool = True                # False: another stage computes the layers before these,
    closes: bool = True               # and here those after them

    def attention(self, layer: int) -> Attention:
        """How a layer attends, if it has no mixer: from `attentions`, else from the spec's own fields."""
        return self.attentions[layer] if self.attentions else Attention(
            self.heads, self.kv_heads, self.head_size, rope_base=self.rope_base, rope_size=self.rope_size,
            rope_factors=self.rope_factors, rope_scale=self.rope_scale, q_scale=self.q_scale)

    @property
    def context_length(self) -> int:
        """The longest that prompt and answer may be together."""
        return self.answer_positions or self.max_positions

    @property
    def head_eps(self) -> float:
        """Of the norms of q and k."""
        return self.norm_eps if self.qk_norm_eps is None else self.qk_norm_eps

    @property
    def ungated(self) -> bool:
        return self.activation in UNGATED

    @property
    def by_layer(self) -> tuple[Attention | None, ...]:
        """How each layer attends; None: it has a mixer."""
        mixers = self.mixers or (None,) * self.layers
        return tuple(None if mixer else self.attention(l) for l, mixer in enumerate(mixers))

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer, the keys that a token sees, including its own; 0 = all."""
        return tuple(attn.window if attn else 0 for attn in self.by_layer)

    def with_windows(self, windows: Seq[int]) -> ModelSpec:
        """This spec with these windows, one for each layer."""
        return replace(self, attentions=tuple(
            replace(self.attention(l), window=window) for l, window in enumerate(windows)))

    def ahead(self, attn: Attention) -> dict[str, bool]:
        """What paged_attention must know of a layer in which rows of pictures see each other."""
        return {"two_sided": True} if self.two_sided == "all" or (
            self.two_sided == "windows" and attn.window) else {}

    @property
    def all_layers(self) -> int:
        """The number of layers of the whole model, even if this is only one of its stages."""
        return self.layer_inputs[1] or self.layers

    @property
    def unpaged_layers(self) -> tuple[int, ...]:
        """The layers that keep a state for each sequence, or nothing, instead of keys and values for each
        token."""
        return tuple(l for l, mixer in enumerate(self.mixers) if mixer)

    @property
    def paged_layers(self) -> int:
        return self.layers - len(self.unpaged_layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence; 0 in a model whose layers are all attention."""
        shapes = [shape for mixer in self.mixers if mixer for shape in mixer.states(self.width)]
        return 4 * sum(map(math.prod, shapes))


Shapes = dict[str, tuple[int, ...]]


def expected_tensors(spec: ModelSpec) -> Shapes:
    """Name -> shape of every tensor in a model of this spec, and no others (weights are (out, in))."""
    V, C, P, rows = spec.vocab_size, spec.width, spec.layer_input_size, spec.own_rows or spec.vocab_size
    shapes = present(
        (spec.opens or spec.joins, {"embed": (rows, C)}),
        (spec.closes and not spec.of_texts, {"head": (rows, C)}),
        (spec.positions and spec.opens, {"positions": (spec.positions * C,)}),
        (spec.token_types, {"types": (spec.token_types * C,)}),
        (spec.distance_buckets, {"buckets": (DISTANCE_BUCKETS * spec.heads,)}),
        (spec.input_norm, {"embed_norm": (C,)}),
        (spec.input_norm and spec.norm_biases, {"embed_norm_bias": (C,)}),
        (spec.joins, {"join_embed": (C, C), "join_hidden": (C, C), "join_embed_norm": (C,),
                      "join_hidden_norm": (C,)}),
        (spec.head_bias and spec.closes, {"head_bias": (rows,)}),
        (spec.norm_weights and not spec.sum_norms, {"final_norm": (C,)}),
        (spec.norm_biases and not spec.sum_norms, {"final_norm_bias": (C,)}),
        (P and spec.opens, {  # for all layers; other stages get them from this one
            "layer_embed": (V, spec.all_layers * P), "layer_project": (spec.all_layers * P, C),
            "layer_project_norm": (P,)}),
        (spec.residual_lambdas, {"resid_lambdas": (spec.layers,), "x0_lambdas": (spec.layers,)}),
        (spec.smear_channels and spec.opens, {"smear_gate": (1, spec.smear_channels), "smear_lambda": (1,)}),
        (spec.backout_layer is not None and spec.closes, {"backout_lambda": (1,)}))
    return shapes | {f"{l}.{name}": shape for l in range(spec.layers)
                     for name, shape in layer_tensors(spec, l).items()}


def present(*rows: tuple[object, Shapes]) -> Shapes:
    """The tensors of the rows whose condition holds."""
    return {name: shape for holds, tensors in rows if holds for name, shape in tensors.items()}


def layer_tensors(spec: ModelSpec, l: int) -> Shapes:
    C, P, attn = spec.width, spec.layer_input_size, spec.attention(l)
    (q, k, v), D = attn.parts, attn.head_size
    mixer = spec.mixers[l] if spec.mixers else None
    matrices = mixer.tensors(C) if mixer else {
        "qkv": (q * (1 + spec.output_gate) + k + v, C), "output": (C, attn.heads * attn.value_size)}
    matrices |= feed_forward_tensors(spec, l) | present(
        (P, {"input_gate": (P, C), "input_norm": (C,), "input_out": (C, P)}),
        (spec.layer_scalars, {"scalar": (1,)}), (spec.clamped, {"clamps": (28,)}),
        (spec.norm_weights and spec.pre_norms and not isinstance(mixer, NoMixer) and (
            l > 0 or spec.first_norm), {"attention_norm": (C,)}),
        (spec.norm_weights and spec.pre_norms and not spec.one_norm and l not in spec.bare_layers, {
            "ffn_norm": (C,)}),
        (spec.norm_biases and spec.pre_norms, {"attention_norm_bias": (C,)}),
        (spec.norm_biases and spec.pre_norms and not spec.one_norm, {"ffn_norm_bias": (C,)}),
        (spec.post_norms or spec.sum_norms, {"output_norm": (C,), "down_norm": (C,)}),
        (spec.sum_norms and spec.norm_biases, {"output_norm_bias": (C,), "down_norm_bias": (C,)}))
    biased = {"qkv": spec.qkv_bias, "output": spec.output_bias, "router": spec.router_bias} | dict.fromkeys(
        ("up", "gate_up", "down"), spec.ffn_bias) | dict.fromkeys(
        ("expert_gate_up", "expert_down"), spec.ffn_bias and not spec.sum_norms)
    biases: Shapes = {f"{name}_bias": shape[:1] for name, shape in matrices.items() if biased.get(name)}
    q_size, k_size = (q, k) if spec.qk_norm_sizes else (D, D)
    return matrices | biases | present(
        (spec.qk_norm_weights and not mixer, {"q_norm": (q_size,)}),
        (spec.qk_norm_weights and not mixer and k, {"k_norm": (k_size,)}),
        (spec.sinks and not mixer, {"sinks": (attn.heads,)}),
        (l in spec.value_embed_layers, {
            "value_embed": (spec.vocab_size, v), "ve_gate": (attn.kv_heads, spec.ve_gate_channels)}))


def feed_forward_tensors(spec: ModelSpec, l: int) -> Shapes:
    """Those of a layer's experts, or of its dense part."""
    if l in spec.bare_layers:
        return {}
    C, F, shared = spec.width, spec.ffn_size, spec.shared_size
    E = spec.experts if l not in spec.dense_layers else 0
    size = F * (1 + (l in spec.double_layers)) if E or not spec.experts else spec.dense_size
    if spec.clamped:
        return {"gate": (F, C), "up": (F, C), "down": (C, F)}
    up, halves = ("up", 1) if spec.ungated else ("gate_up", 2)
    if not E:
        return {up: (halves * size, C), "down": (C, size)}
    X = spec.latent_size or C
    return present(  # one matrix: the rows of all experts' gates, then of their ups
        (E, {"router": (E, C), f"expert_{up}": (E * halves * size, X), "expert_down": (E * X, F)}),
        (shared, {f"shared_{up}": (halves * shared, C), "shared_down": (C, shared)}),
        (spec.latent_size, {"latent_in": (X, C), "latent_out": (C, X)}),
        (spec.choice_bias, {"choice_bias": (E,)}), (spec.experts_bias, {"experts_bias": (C,)}),
        (spec.shared_gate, {"shared_gate": (1, C)}),
        (spec.expert_norms, {"experts_scale": (E,)} | {
            f"{part}_norm": (C,) for part in ("router", "experts", "experts_down", "shared_down")}))


class Batch(NamedTuple):
    """One flattened step: the T new tokens of N sequences, one after another; one-token sequences first."""

    token_ids: list[int]           # (T); ~i stands for the token that row i of the previous step is drawing
    previous_token_ids: list[int]  # (T); -1 at position 0. In a model with token types, or a picture_pad:
                                   # these
    starts: list[int]              # (N + 1): tokens starts[i] .. starts[i + 1] - 1 belong to sequence i
    lengths: list[int]             # (N): number of keys of sequence i after this step
    tables: list[list[int]]        # (N): pages of sequence i, in order; for each group of layers in turn
    logit_rows: list[int]          # (R): which of the T rows need logits
    states: bool = False           # are the hidden states of all T rows needed?
    state_reads: list[int] = []    # (N): the slot with the state before the new tokens; any at position 0
    write_rows: list[int] = []     # rows after which the state is written, ascending
    write_slots: list[int] = []    # the slot for each
    adapters: list[int] = []       # (N): the slot of each sequence's adapter, 0: none; []: none has one
    turns: list[int] = []          # (T): the row of the rotary tables of each token; []: its position
    ahead: list[int] = []          # (T), or []: the position before which a token sees all others in layers
                                   # that are two-sided, even those after itself; 0: those up to itself


class Sequences(NamedTuple):
    """What layers with states need to know of a step's sequences; lists as in Batch."""

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

    `parts[group]` has a group's slots and plan; those of group 0 are also here."""

    token_ids: Any           # (T,)
    previous_token_ids: Any  # (T,)
    positions: Any           # (T,)
    slots: Any               # (T,) page * PAGE_SIZE + offset: where k and v are written
    logit_rows: Any          # (R,)
    attention: Any           # the kernels' plan: where each row finds its keys
    parts: tuple = ()
    sequences: Any = None    # Sequences, where layers keep states
    adapters: Any = None     # see RowAdapters
    turns: Any = None        # (T,) rows of the rotary tables


class RowAdapters(NamedTuple):
    """Which rows of a step have which adapter: (its matrices by name, the rows) of each. For the head, rows
    are logit rows."""

    tokens: Seq[tuple[Mapping[str, Any], list[int]]] = ()
    logits: Seq[tuple[Mapping[str, Any], list[int]]] = ()

    @classmethod
    def of(cls, batch: Batch, adapters: Mapping[int, Mapping[str, Any]]) -> RowAdapters:
        owner = [slot for slot, first, end in zip(batch.adapters, batch.starts, batch.starts[1:])
                 for _ in range(first, end)]
        slots = [slot for slot in dict.fromkeys(batch.adapters) if slot]

        def rows_of(owners: Seq[int]) -> list[tuple[Mapping[str, Any], list[int]]]:
            return [(adapters.get(slot, {}), [row for row, owner in enumerate(owners) if owner == slot])
                    for slot in slots]

        return cls(rows_of(owner), rows_of([owner[row] for row in batch.logit_rows]))

    def of_matrix(self, name: str) -> list[tuple[list[int], Any]]:
        """(the rows, what their adapter adds to their products with a matrix) of each adapter that has it."""
        owned = self.logits if name == "head" else self.tokens
        return [(rows, matrices[name]) for matrices, rows in owned if name in matrices and rows]


def token_places(batch: Batch) -> tuple[Seq[int], Seq[int]]:
    """The absolute position of each new token, and the slot for its keys and values."""
    counts = [end - start for start, end in zip(batch.starts, batch.starts[1:])]
    pairs = [(position, table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
             for count, length, table in zip(counts, batch.lengths, batch.tables)
             for position in range(length - count, length)]
    positions, slots = zip(*pairs)
    return positions, slots
