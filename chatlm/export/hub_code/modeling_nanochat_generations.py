# SPDX-License-Identifier: MIT
"""nanochat models of any generation, for transformers 5 and newer.

Shapes by letter: B texts, T tokens, C hidden_size, H heads, Hkv key-value heads, D head_dim, V vocab_size.

What a token needs of its text besides keys and values: the smear reads the input of the token before it. It
is kept as one more layer of the cache, so that whatever reorders or repeats a cache does the same to it.
Positions are counted by the attention mask, so that padding on the left changes nothing.
"""

import torch
from torch import nn
from torch.nn import functional as F

from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.masking_utils import sliding_window_overlay
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_nanochat_generations import NanochatGenerationsConfig


def norm(x, eps):
    """RMS norm without a weight, computed in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)


def rotary_tables(position_ids, config, dtype):
    """cos and sin, each (B, 1, T, D / 2), of the positions (B, T)."""
    exact = torch.float32 if position_ids.device.type == "mps" else torch.float64
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=exact) / config.head_dim
    angles = position_ids[:, None, :, None].to(exact) / config.rope_theta**exponents
    rounded = torch.bfloat16 if config.rope_bfloat16 else torch.float32
    return angles.cos().to(rounded).to(dtype), angles.sin().to(rounded).to(dtype)


def rotate(x, cos, sin):
    """x (B, heads, T, D): numbers i and i + D / 2 of a head turn together, backwards."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def attend_eagerly(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NanochatAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.qk_scale**2 * config.head_dim**-0.5
        self.is_causal = True
        self.is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if self.is_sliding else None
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.value_embed = None
        self.ve_gate = None
        if layer_idx in config.value_embed_layers:
            self.value_embed = nn.Embedding(config.vocab_size, keys)
            self.ve_gate = nn.Linear(config.value_gate_channels, config.num_key_value_heads, bias=False)

    def forward(self, x, input_ids, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        """x (B, T, C), already normed -> (B, T, C)."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query = self.q_proj(x).view(heads).transpose(1, 2)
        key = self.k_proj(x).view(heads).transpose(1, 2)
        value = self.v_proj(x).view(heads)
        if self.value_embed is not None:
            embedded = self.value_embed(input_ids).view(heads).to(value.dtype)
            gate = torch.sigmoid(self.ve_gate(x[..., : self.config.value_gate_channels]))
            value = value + self.config.value_gate_scale * gate[..., None] * embedded
        value = value.transpose(1, 2)

        query = norm(rotate(query, *position_embeddings), self.config.rms_norm_eps)
        key = norm(rotate(key, *position_embeddings), self.config.rms_norm_eps)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = attend_eagerly
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling,
            sliding_window=self.sliding_window, **kwargs)
        return self.o_proj(output.reshape(*x.shape[:-1], -1))


class NanochatMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())


class NanochatLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = NanochatAttention(config, layer_idx)
        self.mlp = NanochatMLP(config)

    def forward(self, x, **kwargs):
        x = x + self.self_attn(norm(x, self.eps), **kwargs)
        return x + self.mlp(norm(x, self.eps))


class NanochatGenerationsPreTrainedModel(PreTrainedModel):
    config_class = NanochatGenerationsConfig
    base_model_prefix = "model"
    _no_split_modules = ["NanochatLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["scalars"]


class NanochatGenerationsModel(NanochatGenerationsPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(NanochatLayer(config, number) for number in layers)
        scalars = {}  # always float32; after the embedding, whose type is taken for the model's
        if config.mixes_x0:
            scalars["resid_lambdas"] = torch.ones(config.num_hidden_layers)
            scalars["x0_lambdas"] = torch.zeros(config.num_hidden_layers)
        if config.smear_channels:
            self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
            scalars["smear_lambda"] = torch.zeros(1)
        if config.backout_layer is not None:
            scalars["backout_lambda"] = torch.zeros(1)
        self.scalars = nn.ParameterDict(scalars)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, use_cache=None, **kwargs,
    ):
        config = self.config
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids")
            inputs_embeds = self.embed_tokens(input_ids)
        elif input_ids is None and config.value_embed_layers:
            raise ValueError(f"nanochat's generation {config.generation} looks up an embedding of each token "
                             f"in its "
                             "layers too: give input_ids, inputs_embeds alone are not enough")
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            position_ids = self.positions(inputs_embeds, attention_mask, past_key_values)

        masks = self.masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        x = norm(inputs_embeds, config.rms_norm_eps)
        if config.smear_channels:
            x = self.smear(x, position_ids, past_key_values)
        tables = rotary_tables(position_ids, config, x.dtype)
        x0 = x
        middle = None
        for number, layer in enumerate(self.layers):
            if config.mixes_x0:
                resid = self.scalars["resid_lambdas"][number].to(x.dtype)
                x = resid * x + self.scalars["x0_lambdas"][number].to(x.dtype) * x0
            x = layer(
                x, input_ids=input_ids, position_embeddings=tables, position_ids=position_ids,
                attention_mask=masks[config.layer_types[number]], past_key_values=past_key_values, **kwargs)
            if number == config.backout_layer:
                middle = x
        if middle is not None:
            x = x - self.scalars["backout_lambda"].to(x.dtype) * middle
        x = norm(x, config.rms_norm_eps)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)

    def positions(self, inputs_embeds, attention_mask, past_key_values):
        """(B, T). A mask of (B, tokens so far) says which are padding: these have no position of their
        own."""
        count = inputs_embeds.shape[1]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        return torch.arange(before, before + count, device=inputs_embeds.device)[None]

    def masks(self, inputs_embeds, attention_mask, past_key_values, position_ids):
        """The mask of each type of layer."""
        config = self.config
        if isinstance(attention_mask, dict):
            return attention_mask
        asked = dict(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                     past_key_values=past_key_values, position_ids=position_ids)
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        is_long = config.long_window is not None and before + inputs_embeds.shape[1] > config.long_window
        overlay = sliding_window_overlay(config.long_window) if is_long else None
        masks = {"full_attention": create_causal_mask(**asked, and_mask_function=overlay)}
        if "sliding_attention" in config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**asked)
        return masks

    def smear(self, x, position_ids, past_key_values):
        """Mix the input of the token before into each token's. The first token of a text has none before it.

        x is (B, T, C)."""
        count = x.shape[1]
        seen = x
        if past_key_values is not None:
            seen = self.with_last_of_cache(x, past_key_values)
        before = torch.cat((torch.zeros_like(x[:, :1]), seen), dim=1)[:, -count - 1 : -1]
        strength = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))
        strength = self.scalars["smear_lambda"].to(x.dtype) * strength * (position_ids > 0)[..., None]
        return x + strength * before

    def with_last_of_cache(self, x, past_key_values: Cache):
        """x with the last input that the cache has before it. From now on the cache has the last one of x."""
        place = self.config.num_hidden_layers
        if len(past_key_values.layers) == place:
            past_key_values.layers.append(DynamicSlidingWindowLayer(sliding_window=2))
        seen, _ = past_key_values.update(x[:, None], x[:, None, :, :0], place)
        return seen[:, 0]


class NanochatGenerationsForCausalLM(NanochatGenerationsPreTrainedModel, GenerationMixin):
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatGenerationsModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, use_cache=None, logits_to_keep=0, return_dict=None, **kwargs,
    ):
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        softcap = self.config.final_logit_softcapping
        if softcap:
            logits = softcap * torch.tanh(logits.float() / softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["NanochatGenerationsModel", "NanochatGenerationsForCausalLM", "NanochatGenerationsPreTrainedModel"]
