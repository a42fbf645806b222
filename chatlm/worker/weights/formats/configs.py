"""A config.json's values, checked key by key, become Facts, of which the family makes blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence as Seq
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, printable, shown
from chatlm.common.log import log
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.weights.facts import ExpertFacts, Facts
from chatlm.worker.weights.families.family import GATED, Family
from chatlm.worker.weights.families.table import FAMILIES, TEXT_TYPES, VISION
from chatlm.worker.weights.formats.refused import REFUSED
from chatlm.worker.weights.formats.rope_scaling import ORIGINAL, ORIGINAL_RULE
from chatlm.worker.weights.packed.fp8 import fp8_block
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS, ROPE_BASE,
    Rule, check_divides, checked)


HF_DEFAULTS = {  # of every family; None: required, or derived from other keys
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
                     "rope_scaling", "rope_parameters", "partial_rotary_factor")),
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0}
HF_KEYS = {  # of any family's config.json; its own keys are in its row, and all others are bool
    **dict.fromkeys(("hidden_size", "intermediate_size"), Rule(int, 1, MOST_CHANNELS)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), ROPE_BASE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"),
                    Rule(float, 0.01, 10**6, optional=True)),
    "vocab_size": Rule(int, 1, MOST_TOKENS), "num_hidden_layers": Rule(int, 1, MOST_LAYERS),
    "num_attention_heads": Rule(int, 1, MOST_HEADS), "rms_norm_eps": Rule(float, 0, 1),
    "num_key_value_heads": Rule(int, 1, MOST_HEADS, optional=True),
    "head_dim": Rule(int, 2, MOST_CHANNELS, optional=True),
    "max_position_embeddings": Rule(int, 16, MOST_POSITIONS),
    "sliding_window_pattern": Rule(int, 1, optional=True),
    ORIGINAL: ORIGINAL_RULE,
    "sliding_window": Rule(int, 1, MOST_POSITIONS, optional=True), "max_window_layers": Rule(int, 0),
    "layer_types": Rule(str, choices=LAYER_TYPES, many=True, optional=True),
    "num_experts": Rule(int, 1, MOST_EXPERTS, optional=True),
    "num_experts_per_tok": Rule(int, 0, MOST_EXPERTS),
    "num_local_experts": Rule(int, 0, MOST_EXPERTS, optional=True),
    "moe_intermediate_size": Rule(int, 1, MOST_CHANNELS, optional=True),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"),
                    Rule(int, 0, MOST_CHANNELS)), "decoder_sparse_step": Rule(int, 1),
    "mlp_only_layers": Rule(int, 0, MOST_LAYERS, many=True, optional=True)}
LLAMA_SIZES = {  # what a text_config may leave out
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048}
TIED = "tie_word_embeddings"
BESIDE_TEXT = set("""image_token_id video_token_id vision_config vision_end_token_id vision_start_token_id
    vision_token_id perceiver_config pixel_shuffle_factor""".split())
HF_INERT = set("""architectures attention_dropout auto_map bos_token_id cache_implementation dtype embd_pdrop
    do_sample eos_token_id init_method initializer_range is_llama_config mamba_ssm_dtype max_length
    model_type mtp_num_hidden_layers mtp_use_dedicated_embeddings neftune_noise_alpha output_attentions
    output_hidden_states output_router_logits pad_token_id pretraining_tp quantization_config
    resid_pdrop return_dict router_aux_loss_coef sep_token_id temperature tokenizer_class top_p torch_dtype
    transformers.js_config transformers_version model_name unsloth_fixed unsloth_version use_cache
    _attn_implementation _attn_implementation_autoset _name_or_path
    _sliding_window_pattern""".split())
GENERATION = set("""bad_words_ids begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id
    diversity_penalty early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    eta_cutoff finetuning_task forced_bos_token_id forced_eos_token_id id2label label2id length_penalty
    max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences penalty_alpha prefix problem_type renormalize_logits repetition_penalty
    suppress_tokens task_specific_params top_k typical_p""".split())  # and the like: no arithmetic
# other programs' implementations, training and names: no effect on the arithmetic
OTHERS_AFFAIR = set("""attention_probs_dropout_prob attention_softmax_in_fp32 attn_impl
    attn_implementation attn_implementation_autoset base_model_name_or_path classifier_dropout
    classifier_from_token cls_token_id dropout embedding_dropout experts_implementation
    exponential_decay_length_penalty ffn_dropout flash_attn fuse_cross_entropy fused_cross_entropy
    gradient_checkpointing hidden_dropout hidden_dropout_prob ignore_index init_std initializer_factor
    is_decoder is_matryoshka is_original_qwen3_reranker keys_to_ignore_at_inference kv_cache_dtype
    kv_cache_quant_algo kv_cache_scheme label_smoothing
    language layerdrop license loss_type mask_token_id matryoshka_dimensions max_seq_len
    max_sequence_length mlp_dropout model_max_length n_ctx name_or_path num_labels num_logits_to_keep
    output_past output_scores padding_side pad_token pruned_heads remove_invalid_values
    return_dict_in_generate router_z_loss_coef sbert_ce_default_activation_function
    sentence_transformers seq_length tf_legacy_loss tokenizer_name torchscript training
    trust_remote_code unk_token_id use_bfloat16 use_cache_kernel
    use_cache_quantization use_flash_attention use_flash_attention_2 use_flash_attn use_fused_mlp
    use_fused_rms_norm use_fused_rope use_fused_swiglu use_memory_efficient_attention z_loss_coef""".split())
HF_ONLY = {  # the only value these may have, unless the family has them
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias", "rope_interleaved", "use_bias",
                     "use_mrope", "use_bidirectional_attention", "use_cla",
                     "add_classification_head"), False),
    "full_attn_mod": 1, "interpolate_factor": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "num_experts": 1, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "output_gate_type": "swish",
    **dict.fromkeys(("is_causal", "use_rope", "use_rotary", "attn_output_gate", "scale_attn_weights",
                     "use_embedding_sharing", "use_gated_activation", "use_parallel_block"), True)}


def unsupported(name: str) -> str:
    """The error text for a family that has no row in FAMILIES."""
    if reason := REFUSED.get(name):
        return f"this server cannot run {name}: {reason}"
    return (f"this server cannot run {printable(name)[:60]} yet; it runs: "
            f"{', '.join(row.title for row in FAMILIES.values() if row.title)}")


def changes_nothing(key: str, raw: Mapping) -> bool:
    """Does a key in no row only concern generation, training or other programs, or disable something?"""
    if key in HF_ONLY:
        return False
    if key in ("sliding_window", "max_window_layers"):
        if not (raw.get("sliding_window") and raw.get("use_sliding_window", True)):
            return True
    return key.startswith("_") or key in GENERATION | OTHERS_AFFAIR or not raw[key]


def refuse_unknown(path: Path, family: str, raw: Mapping, known: Mapping):
    """ConfigError for a key that would change the arithmetic; unknown ones that would not are logged."""
    ignored = []
    for key, value in raw.items():
        if key in known or key in HF_INERT or value in (None, HF_ONLY.get(key)):
            continue
        if not changes_nothing(key, raw):
            must = f"this key is not supported in a {family} model. Supported: {', '.join(sorted(known))}"
            if key in HF_ONLY:
                must = f"in a {family} model it must be {json.dumps(HF_ONLY[key])}"
            raise ConfigError(f"{path}: {key} is {shown(value)}; {must}")
        ignored.append(printable(key))
    if ignored:
        log.info("%s: %s: ignored, since they have no effect here", path, ", ".join(ignored))


def family_config(path: Path, raw: Mapping) -> tuple[str, dict]:
    """The family of a config.json, and the checked values of the keys in its row and HF_DEFAULTS."""
    family = checked(path, "model_type", raw.get("model_type"), Rule(str))
    if family not in FAMILIES and family not in VISION:
        raise ConfigError(f"{path}: {unsupported(family)}")
    if "quantization_config" not in FAMILIES.get(family, FAMILIES["llama"]).config:
        fp8_block(path, raw)  # refuses what is not read
    if family in VISION:
        family, raw = text_part(path, family, raw)
    if family == "nomic_bert" and raw.get("num_experts"):
        family = "nomic_bert_moe"
    if family not in FAMILIES:
        raise ConfigError(f"{path}: {unsupported(family)}")
    row = FAMILIES[family]
    raw = with_layers_of_now(row.restated(path, raw))
    for own, theirs in row.aliases.items():  # its own key wins, as in transformers
        raw = {**raw, own: raw[own] if raw.get(own) is not None else raw.get(theirs)}
    defaults = HF_DEFAULTS | row.config
    refuse_unknown(path, family, raw, defaults)
    config = checked_config(path, row, raw, defaults)
    for name in ("rope_scaling", "rope_parameters"):
        if config[name] and not isinstance(config[name], dict):
            raise ConfigError(f"{path}: {name} is {shown(config[name])}; it must be an object")
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        checked(path, "quantization_config.quant_method", method, Rule(str, choices=("mxfp4",)))
    config |= {theirs: config[own] for own, theirs in row.aliases.items()}
    return family, config | row.complete(path, config)


def checked_config(path: Path, row: Family, raw: Mapping, defaults: Mapping) -> dict:
    """The values of these keys, checked, those of aliases under their own names."""
    config = {key: raw.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        rule = rule_of(row, key, default)
        if rule is None or key in row.aliases.values():
            continue
        if config[key] is None and not rule.optional:
            config[key] = default
        checked(path, key, config[key], rule._replace(optional=rule.optional and key not in row.needed))
    return config


def rule_of(row: Family, key: str, default: Any) -> Rule | None:
    """What a family's config may have under a key; None: it is checked elsewhere."""
    if key == "layer_types" and row.kinds:
        return HF_KEYS[key]._replace(choices=(LAYER_TYPES[0], *row.kinds))
    if key.startswith("hidden_act"):
        any_of = row.activations is not GATED or default == "silu"
        return Rule(str, choices=tuple(row.activations) if any_of else (str(default),))
    rule = row.keys.get(key) or HF_KEYS.get(key)
    if rule is None and isinstance(default, bool):
        return Rule(bool)
    return rule


def with_layers_of_now(raw: Mapping) -> Mapping:
    """A config whose keys describe its layers in transformers' current form."""
    types = raw.get("layer_types")
    pattern = raw.get("sliding_window_pattern")
    if raw.get("sliding_window", False) is not False and not raw["sliding_window"]:
        raw = {**raw, "sliding_window": None}  # 0
    if raw.get("mamba_d_head") == "auto":
        raw = {**raw, "mamba_d_head": None}
    if isinstance(types, list):
        raw = {**raw, "layer_types": [LAYER_TYPES[0] if kind == "attention" else kind for kind in types]}
    if isinstance(pattern, str) and re.fullmatch("L+G", pattern):  # EXAONE: LLLG
        raw = {**raw, "sliding_window_pattern": len(pattern)}
    return raw


def text_part(path: Path, family: str, raw: Mapping) -> tuple[str, Mapping]:
    """The family and the config of an image model's text model; the image encoder is not loaded.

    Some keys lie outside text_config, in the oldest files all of them."""
    text = raw.get("text_config", raw if family.startswith("qwen2") else None)
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config is {shown(text)}; it must be an object")
    kind: str = checked(path, "text_config.model_type", text.get("model_type", VISION[family]), Rule(str))
    kind = VISION[family] if kind == family else TEXT_TYPES.get(kind, kind)
    outer = {key: raw[key] for key in (TIED, "vocab_size") if key in raw}
    if family == "llava" and kind == "llama":
        outer = LLAMA_SIZES | outer
    inner = {key: value for key, value in text.items() if key not in BESIDE_TEXT}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := inner.get(name), dict):
            inner[name] = of_text_positions(rope)
    if raw.get(TIED) is True and inner.get(TIED) is False:
        inner[TIED] = True  # both say it for the same two matrices; a head in the files still counts
    return kind, outer | inner


def of_text_positions(rope: Mapping[str, Any]) -> dict[str, Any]:
    """An image model's rotary parameters for texts, whose positions have one axis, not three."""
    own = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    for key in ("type", "rope_type"):
        if own.get(key) == "mrope":
            own[key] = "default"
    return own


def complete_heads(path: Path, config: dict, names: Mapping[str, str] = {}):
    """Fill in the number of key-value heads and the head size, checked; `names`: key -> the file's name."""
    heads = config["num_attention_heads"]
    own = {key: names.get(key, key) for key in HF_DEFAULTS}
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    check_divides(path, own["num_attention_heads"], heads, config["num_key_value_heads"],
                  own["num_key_value_heads"])
    if not config["head_dim"]:
        check_divides(path, own["hidden_size"], config["hidden_size"], 2 * heads,
                      f"2 * {own['num_attention_heads']}")
        config["head_dim"] = config["hidden_size"] // heads
    check_divides(path, own["head_dim"], config["head_dim"], 2)


def family_blocks(path: Path, family: str, config: dict, rope: Mapping,
                  biases: Iterable[str] | None = None) -> Model:
    """The blocks of a checked config. `biases`: those that the tensors tell of; None: the config does.

    `rope` has max_positions, the fields that begin with rope_, and perhaps q_growth and local_rope_base."""
    row = FAMILIES[family]
    return row.model(facts_of(path, row, config, rope, row.biases(config) if biases is None else biases))


def facts_of(path: Path, row: Family, config: dict, rope: Mapping, biases: Iterable[str]) -> Facts:
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [
        LAYER_TYPES[bool(row.has_window(config, layer))] for layer in range(layers)]
    choices = (*LAYER_TYPES, *row.kinds)
    checked(path, "layer_types", kinds, HF_KEYS["layer_types"]._replace(choices=choices), layers)
    if set(kinds) <= set(row.kinds):
        raise ConfigError(f"{path}: none of its layers is {LAYER_TYPES[0]}; this server needs one")
    windows = (0,) * layers if row.own_attentions else windows_of(path, config, kinds)
    ffn_size, experts = feed_forward_sizes(path, config)
    turns = Rope(rope.get("rope_size", config["head_dim"]), rope.get("rope_base", 10_000.0),
                 rope.get("rope_factors"), rope.get("rope_scale", 1.0))
    return Facts(
        path, config, config["vocab_size"], layers, config["hidden_size"], config["num_attention_heads"],
        config["num_key_value_heads"], config["head_dim"], ffn_size, rope["max_positions"],
        config["rms_norm_eps"], config["tie_word_embeddings"], row.activations[config["hidden_act"]],
        frozenset(biases), tuple(kinds), windows, turns, rope.get("local_rope_base"),
        frozenset(row.unrotated(config, windows)), rope.get("q_growth", ()), experts)


def windows_of(path: Path, config: Mapping, types: Seq[str]) -> tuple[int, ...]:
    """The window of each layer of these types; 0: none."""
    if "sliding_attention" not in types:
        return (0,) * len(types)
    window = None if config.get("use_sliding_window") is False else config.get("sliding_window")
    checked(path, "sliding_window in use", window, HF_KEYS["sliding_window"]._replace(optional=False))
    return tuple(window or 0 if type_ == "sliding_attention" else 0 for type_ in types)


def feed_forward_sizes(path: Path, config: Mapping) -> tuple[int, ExpertFacts | None]:
    """F, checked, and what the config says of experts."""
    size = config["intermediate_size"]
    experts = None
    if "num_experts" in config:
        size, experts = expert_facts(path, config)
    checked(path, "the width of its feed-forward parts", size, HF_KEYS["intermediate_size"])
    return size, experts


def expert_facts(path: Path, config: Mapping) -> tuple[int, ExpertFacts | None]:
    """F and what it says of experts, also for a model that could have some but has none."""
    layers = config["num_hidden_layers"]
    chosen = "num_experts_per_tok"
    numbers = config["num_experts"], config["num_local_experts"]
    experts = next((number for number in numbers if number is not None), 128)  # as in transformers
    shared = config.get("shared_intermediate_size") or config.get("shared_expert_intermediate_size") or 0
    if not experts:
        return shared or config["intermediate_size"], None
    stated = config.get("mlp_only_layers") or range(config.get("num_dense_layers") or 0)
    step = config.get("decoder_sparse_step", 1)  # every such layer has experts
    dense = tuple(layer for layer in range(layers) if layer in stated or (layer + 1) % step)
    return config["moe_intermediate_size"] or config["intermediate_size"], ExpertFacts(
        experts, checked(path, chosen, config[chosen], Rule(int, 1, experts)),
        config.get("norm_topk_prob", True), shared, dense, config["intermediate_size"] if dense else 0)
