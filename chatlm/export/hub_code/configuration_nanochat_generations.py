# SPDX-License-Identifier: MIT
"""The configuration of a nanochat model of any generation, for transformers.

nanochat's gpt.py has changed several times, and each change made another architecture. The keys below say
what one generation has and another lacks; `generation` is only a name for people.
"""

from transformers import PretrainedConfig


class NanochatGenerationsConfig(PretrainedConfig):
    """What sets a generation apart:

    rope_bfloat16: cos and sin are rounded to bfloat16.
    layer_types, sliding_window: in layers of the type sliding_attention a token sees so many tokens, its own
        included.
    long_window: what it sees in the other layers; None is all.
    mixes_x0: before layer l, x = resid_lambdas[l] * x + x0_lambdas[l] * x0, where x0 is the model's input.
    value_embed_layers: in these layers each token adds an embedding of its own to its values, times
        value_gate_scale * sigmoid(ve_gate @ the first value_gate_channels numbers of the layer's input).
    qk_scale: multiplies queries and keys, after their norm.
    smear_channels: if more than 0, the input of a token is x + smear_lambda * sigmoid(smear_gate @ the first
        so many numbers of x) * the input of the token before it.
    backout_layer: backout_lambda times x after this layer is subtracted from the last layer's x; None is no
        layer.
    """

    model_type = "nanochat_generations"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    def __init__(
        self,
        generation=6,
        vocab_size=32768,
        hidden_size=1280,
        intermediate_size=None,
        num_hidden_layers=20,
        num_attention_heads=10,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="relu2",
        max_position_embeddings=2048,
        rms_norm_eps=1.1920929e-07,
        rope_theta=100_000.0,
        rope_bfloat16=False,
        layer_types=None,
        sliding_window=None,
        long_window=None,
        mixes_x0=True,
        value_embed_layers=(),
        value_gate_channels=12,
        value_gate_scale=3.0,
        qk_scale=1.2,
        smear_channels=0,
        backout_layer=None,
        final_logit_softcapping=15.0,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.generation = generation
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_bfloat16 = rope_bfloat16
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.long_window = long_window
        self.mixes_x0 = mixes_x0
        self.value_embed_layers = list(value_embed_layers)
        self.value_gate_channels = value_gate_channels
        self.value_gate_scale = value_gate_scale
        self.qk_scale = qk_scale
        self.smear_channels = smear_channels
        self.backout_layer = backout_layer
        self.final_logit_softcapping = final_logit_softcapping
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


__all__ = ["NanochatGenerationsConfig"]
