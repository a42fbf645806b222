"""Reads GGUF files: their metadata, checked by the table of keys, and their tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, cannot_read, error_text, shown
from chatlm.common.files import check_regular
from chatlm.common.hub.repository import SPLIT_GGUF
from chatlm.worker.arrays.gguf_types import WITHOUT_VALUES
from chatlm.worker.weights.families.family import Family, Header
from chatlm.worker.weights.families.table import FAMILIES, GGUF_FAMILIES
from chatlm.worker.weights.formats.configs import HF_KEYS
from chatlm.worker.weights.formats.gguf.header import FileHeader
from chatlm.worker.weights.formats.gguf.texts import Texts
from chatlm.worker.weights.rules import MOST_POSITIONS, ROPE_BASE, Rule, check_bytes, checked
from chatlm.worker.weights.text.splits import PIECES_WITH_MERGES, PRE_TOKENIZERS


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever a damaged GGUF file makes fail within becomes a ConfigError."""
    try:
        yield
    except OSError as error:
        raise cannot_read(error.filename or path, error) from None
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error) as error:
        reason = "a tensor's shape does not match its bytes" if "reshape" in str(error) else error_text(error)
        raise ConfigError(f"{path} is not a readable GGUF file: {reason}") from None


def read_gguf(path: Path) -> tuple[dict, dict]:
    """(metadata, name -> GgufTensor mapped from the file). A model that is split has the tensors of all its
    files."""
    metadata, stored = read_gguf_file(path)
    count = checked(path, "split.count", metadata.get("split.count", 1), Rule(int, 0, 99_999))
    for index in range(2, count + 1):
        part = path.with_name(re.sub(SPLIT_GGUF, f"-{index:05}-of-{count:05}", path.name))
        if part == path:
            raise ConfigError(f"{path}: split.count is {count}, so its name must end with "
                              f"-00001-of-{count:05}.gguf")
        stored |= read_gguf_file(part)[1]
    return metadata, stored


def read_gguf_file(path: Path, size: int = 0) -> tuple[dict, dict]:
    """Like `read_gguf`, of one file. `size`: how long the file is, if only its beginning is here; then its
    tensors have shapes and types alone."""
    check_regular(path)
    header = FileHeader(path, size)
    check_bytes(path, {name: tensor.n_bytes for name, tensor in header.tensors.items()})
    return header.metadata, header.tensors


def check_gguf_types(path: Path, stored: Mapping):
    """ConfigError for a tensor of a type that nothing here can dequantize."""
    for name, tensor in stored.items():
        if tensor.tensor_type.name in WITHOUT_VALUES:
            raise ConfigError(f"{path}: {name} is of type {tensor.tensor_type.name}, which the gguf package "
                              "cannot dequantize")


GGUF_SIZES = {  # a config.json key -> the metadata's, after the architecture
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
GGUF_OWN = {  # the same for keys that only some families have
    "sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "rope_local_base_freq": "rope.freq_base_swa",
    "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length", "embedding_multiplier": "embedding_scale",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "residual_multiplier": "residual_scale", "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale", "logit_scale": "logit_scale", "conv_L_cache": "shortconv.l_cache",
    "linear_conv_kernel_dim": "ssm.conv_kernel", "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count", "linear_num_value_heads": "ssm.time_step_rank",
    "mamba_d_conv": "ssm.conv_kernel", "mamba_d_state": "ssm.state_size", "mamba_n_groups": "ssm.group_count",
    "mamba_n_heads": "ssm.time_step_rank", "full_attention_interval": "full_attention_interval",
    "num_dense_layers": "leading_dense_block_count", "conv_kernel": "ssm.conv_kernel",
    "ssm_state_size": "ssm.state_size", "n_groups": "ssm.group_count",
    "mamba_num_heads": "ssm.time_step_rank", "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count", "moe_latent_size": "moe_latent_size",
    "routed_scaling_factor": "expert_weights_scale", "clip_qkv": "attention.clamp_kqv"}
GGUF_INERT = {"attention.sliding_window_pattern", "vocab_size", "rope.scaling.finetuned", "pooling_type",
              "attention.causal", "classifier.output_labels", "tensor_data_layout", "rope.dimension_sections",
              "n_deepstack_layers"}
OF_SOME = {  # read of each file, but only some families may have them
    "attention.temperature_scale": Rule(float, 0, 10, optional=True), "expert_weights_norm": Rule(bool)}
GGUF_KEYS = {  # of any family; * stands for the architecture
    "*.ssm.inner_size": Rule(int, 1), "*.nextn_predict_layers": Rule(int, 0, 100),
    "*.attention.recurrent_layers": Rule(bool, many=True, optional=True),
    "general.architecture": Rule(str),
    **{f"*.{key}": rule for key, rule in OF_SOME.items()},
    **{f"*.{theirs}": HF_KEYS[ours] for ours, theirs in (GGUF_SIZES | GGUF_OWN).items() if ours in HF_KEYS},
    "*.attention.sliding_window": Rule(int, 0, MOST_POSITIONS, optional=True),
    "*.attention.value_length": Rule(int), "*.rope.dimension_count": Rule(int), "*.rope.freq_base": ROPE_BASE,
    **dict.fromkeys(("*.rope.scaling.yarn_beta_fast", "*.rope.scaling.yarn_beta_slow"),
                    Rule(float, 0.01, 10**6, optional=True)),
    "*.rope.scaling.type": Rule(str, choices=("none", "linear", "yarn", "longrope")),
    "*.rope.scaling.factor": Rule(float, 0.01, 10**6),
    "*.rope.scaling.yarn_log_multiplier": Rule(float, 0, 10**3, optional=True),
    **dict.fromkeys(("*.rope.scaling.attn_factor", "*.rope.scaling.yarn_attn_factor"),
                    Rule(float, 0.01, 10**3, optional=True)),
    "*.rope.scaling.yarn_ext_factor": Rule(float, 1, 1, optional=True),
    "*.rope.scaling.original_context_length": Rule(int, 2, MOST_POSITIONS, optional=True),
    **dict.fromkeys(ROPE_TENSORS, Rule(float, 0.01, 10**6, many=True)),
    "tokenizer.chat_template": Rule(str, optional=True),
    "tokenizer.ggml.model": Rule(str, choices=("gpt2", "llama", "gemma4", "bert", "t5")),
    "tokenizer.ggml.pre": Rule(str, choices=(*PRE_TOKENIZERS, *PIECES_WITH_MERGES)),
    "tokenizer.ggml.tokens": Rule(str, many=True), "tokenizer.ggml.token_type": Rule(int, 0, 255, many=True),
    "tokenizer.ggml.scores": Rule(float, many=True), "tokenizer.ggml.merges": Rule(str, many=True),
    "tokenizer.ggml.add_bos_token": Rule(bool), "tokenizer.ggml.add_eos_token": Rule(bool),
    "tokenizer.ggml.add_space_prefix": Rule(bool),
    "tokenizer.ggml.normalizer.lowercase": Rule(bool), "tokenizer.ggml.remove_extra_whitespaces": Rule(bool),
    "tokenizer.ggml.precompiled_charsmap": Rule(int, -128, 255, many=True),
    **{f"tokenizer.ggml.{name}_token_id": Rule(int, 0, optional=True)
       for name in ("bos", "eos", "eot", "eom", "unknown", "cls", "seperator")}}


def gguf_rule(key: str) -> Rule:
    """What a file may have under a key: the rule of any family, or of the family of this architecture."""
    architecture, _, name = key.partition(".")
    if rule := GGUF_KEYS.get(key) or GGUF_KEYS.get(f"*.{name}"):
        return rule
    row = FAMILIES[GGUF_FAMILIES[architecture]]
    for each in (row, *(FAMILIES[variant] for variant in row.gguf.variants.values())):
        if rule := each.gguf.keys.get(name) or rule_of_own(each, name):
            return rule
    raise KeyError(key)


def rule_of_own(row: Family, name: str) -> Rule | None:
    """The rule of a family's config.json for what files call so."""
    return next((row.keys[ours] for ours, theirs in GGUF_OWN.items() if theirs == name and ours in row.keys),
                None)


def gguf_value(path: Path, metadata: Mapping, key: str, default=None, length: int | None = None,
               **bounds) -> Any:
    """The value of a key, checked by its rule, which `bounds` may narrow; None if it is optional and missing.

    A list with one number per layer counts as that number if all are equal."""
    rule = gguf_rule(key)._replace(**bounds)
    value = metadata.get(key, default)
    if rule.value_type is int and not rule.many and isinstance(value, list) and value:
        if value.count(value[0]) == len(value) == metadata.get(f"{key.partition('.')[0]}.block_count"):
            value = value[0]
    if isinstance(value, Texts):
        if rule.many and rule.value_type is str and len(value) == (length or len(value)):
            return value  # all of them are texts
        value = list(value)
    return checked(path, key, value, rule, length)


def refuse_unknown(header: Header, family: Family, config: Mapping):
    """ConfigError for a key that would change the arithmetic of a model with this config."""
    known = {key.removeprefix("*.") for key in GGUF_KEYS} - {*GGUF_OWN.values(), *OF_SOME}
    known |= {theirs for ours, theirs in GGUF_OWN.items() if ours in config}
    known |= {*family.gguf.keys, *family.gguf.ignored, *GGUF_INERT}
    for key, value in header.metadata.items():
        if key.startswith(header.own) and value and key.removeprefix(header.own) not in known:
            raise ConfigError(f"{header.path}: {key} is {shown(value)}; this key is not supported in a "
                              f"{header.own[:-1]} model")
