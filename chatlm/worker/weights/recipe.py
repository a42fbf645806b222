"""`ModelSpec`: a model as its files describe it, which `model_of` makes blocks of."""

from __future__ import annotations


from chatlm.common.records import record
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import HeadGates
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import Mixer


@record
class Attention:
    """How a layer attends, where layers differ."""

    heads: int                        # H, of queries
    kv_heads: int                     # Hkv
    head_size: int                    # D
    window: int = 0                   # keys that a token sees, its own included; 0 = all
    rope_base: float = 10000.0
    rope_size: int | None = None      # rotated dims of each head; None = all D, 0 = none
    rope_factors: tuple[float, ...] | None = None  # divides each of the rope_size/2 frequencies; inf stops it
    rope_scale: float = 1.0           # multiplies cos and sin (yarn, longrope)
    q_scale: float = 1.0              # multiplies q, in addition to 1 / sqrt(D)


@record
class ModelSpec:
    """Everything that distinguishes one model from another; made by a loader, read by `model_of`.

    Sizes by letter: V vocab_size, L layers, C width, H heads, Hkv kv_heads, D head_size, F ffn_size.
    The loader crops padded vocabularies to V rows and un-permutes interleaved rotary pairs to half-split."""

    vocab_size: int                   # 0: a tower, whose input others compute
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
    post_eps: float | None = None     # of these; None: norm_eps
    sum_norms: bool = False           # these two: of x with what the block has added; there is no final_norm
    of_texts: bool = False            # it embeds whole texts: a token sees what comes after it too, up to its
                                      # layer's window on either side; there is no head
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
    rope_factors: tuple[float, ...] | None = None  # divides each of the rope_size/2 frequencies
    rope_scale: float = 1.0           # multiplies cos and sin (yarn, longrope)
    qk_norm: str = "none"             # "none" | "before_rope" | "after_rope" | "centred", see HeadNorms
    qk_norm_weights: bool = False
    qk_norm_sizes: tuple[int, ...] = ()  # (H * D, Hkv * D): q and k are normalized whole, before rope
    q_scale: float = 1.0              # multiplies q alone, in addition to 1 / sqrt(D)
    attentions: tuple[Attention, ...] = ()  # of each layer, where they differ; see `attention`
    q_growth: tuple[float, ...] = ()  # (beta, n): and 1 + beta * ln(1 + position // n)
    attention_softcap: float = 0.0    # scores = c * tanh(scores / c), before the mask; 0 = none
    activation: str = "swiglu"        # one of ops' GATES, or of UNGATED in feed_forward.py
    experts: int = 0                  # of each layer, F wide; 0: its feed-forward part is one dense one
    dense_layers: tuple[int, ...] = ()  # layers that have none nonetheless
    dense_size: int = 0               # width of the feed-forward part of these
    shared_size: int = 0              # > 0: width of an additional expert that every token takes
    shared_gate: bool = False         # its output is multiplied by the sigmoid of another product
    experts_bias: bool = False        # added to what they add together
    experts_per_token: int = 0        # those with the largest of the router's logits
    shares_sum_to_one: bool = True    # softmax over the chosen experts' logits; else over all experts'
    router_bias: bool = False
    router_jitter: float | None = None  # experts and shares are those of `sparse_routes`
    sigmoid_router: bool = False      # shares are the chosen experts' sigmoids, see `sigmoid_routes`
    choice_bias: bool = False         # added when the router chooses, but not in the shares
    router_groups: tuple[int, int] = (1, 1)  # (groups, from how many of them the router chooses)
    group_best: int = 2               # so many best experts of a group count in the choice of groups
    share_scale: float = 1.0          # multiplies the shares of experts
    head_gates: HeadGates | None = None  # of what heads give, in a matrix of their own
    clip: float = 0.0                 # > 0: numbers of q, k and v beyond +-clip become that
    output_gate: bool = False         # after each head's q, qkv has as many rows for a gate of its output
    sinks: bool = False               # a logit for each query head, which attends to no value
    mixers: tuple[Mixer | None, ...] = ()  # of each layer, instead of attention; None, () = attention
    softcap: float = 0.0              # logits = c * tanh(logits / c); 0 = none
    joins: bool = False               # a draft head: its input is a product of the embedding and a state of
                                      # another model, as which x is given
    own_layers: tuple[Layer, ...] = ()  # what a family of another structure has built itself: then the fields
    own_input: Input | None = None    # say nothing of layers, or of the input

    def attention(self, layer: int) -> Attention:
        """How a layer attends, if it has no mixer: from `attentions`, else from the spec's own fields."""
        return self.attentions[layer] if self.attentions else Attention(
            self.heads, self.kv_heads, self.head_size, rope_base=self.rope_base, rope_size=self.rope_size,
            rope_factors=self.rope_factors, rope_scale=self.rope_scale, q_scale=self.q_scale)

    def rope(self, layer: int) -> Rope:
        """How the heads of a layer turn."""
        attn = self.attention(layer)
        size = attn.head_size if attn.rope_size is None else attn.rope_size
        return Rope(size, attn.rope_base, attn.rope_factors, attn.rope_scale, self.rope_direction)
