"""Nemotron-H: layers of one part each, Mamba-2, attention or feed-forward, become layers of two."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.spec import Mamba2
from chatlm.worker.weights.family import Family, of_mixer
from chatlm.worker.weights.granite import NO_LIMITS
from chatlm.worker.weights.rules import LAYER_TYPES, MOST_HEADS, MOST_LAYERS, Rule, check_divides

if TYPE_CHECKING:
    import numpy

KINDS = {"linear_attention": "mamba", "mamba": "mamba", "M": "mamba", "full_attention": LAYER_TYPES[0],
         "attention": LAYER_TYPES[0], "*": LAYER_TYPES[0], "mlp": "", "-": ""}
# Without effect: on training, on programs, or of experts and drafts where there are none
INERT = dict.fromkeys("""attention_head_dim chunk_size expand mamba_ssm_cache_dtype moe_intermediate_size
    moe_latent_size moe_shared_expert_intermediate_size moe_shared_expert_overlap mtp_layers_block_type
    mtp_hybrid_override_pattern n_group n_routed_experts n_shared_experts norm_topk_prob
    num_nextn_predict_layers rescale_prenorm_residual residual_in_fp32 routed_scaling_factor
    time_step_floor time_step_max time_step_min topk_group use_mamba_kernels""".split())
CONFIG = INERT | {
    "hidden_act": "relu2", "mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-5, "head_dim": 128,
    "num_key_value_heads": 8, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    "layer_types": None, "bare_layers": None, "ssm_state_size": 128, "mamba_num_heads": 128,
    "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4, "use_conv_bias": True, "mamba_proj_bias": False,
    "use_bias": False, "mamba_hidden_act": "silu", "time_step_limit": None, "num_experts_per_tok": 0}
KEYS = {
    "layer_norm_epsilon": Rule(float, 0, 1), "mlp_hidden_act": Rule(str, choices=("relu2",)),
    "mamba_hidden_act": Rule(str, choices=("silu",)),
    "bare_layers": Rule(int, 0, MOST_LAYERS, many=True, optional=True),
    "routed_scaling_factor": Rule(float, optional=True), "conv_kernel": Rule(int, 2, 64),
    **dict.fromkeys(("ssm_state_size", "mamba_head_dim"), Rule(int, 1, 4096)),
    **dict.fromkeys(("mamba_num_heads", "n_groups"), Rule(int, 1, MOST_HEADS))}
TENSORS = {
    "embed": ("backbone.embeddings.weight",), "final_norm": ("backbone.norm_f.weight",),
    **{ours: tuple(f"layers.{{}}.{name}" for name in theirs.split()) for ours, theirs in (
        ("attention_norm", "mixer_norm.weight"), ("ffn_norm", "mlp_norm.weight"),
        ("mix_in", "mixer.in_proj.weight"), ("mix_in_bias", "mixer.in_proj.bias"),
        ("mix_out", "mixer.out_proj.weight"), ("mix_out_bias", "mixer.out_proj.bias"),
        ("taps", "mixer.conv1d.weight"), ("taps_bias", "mixer.conv1d.bias"), ("decay", "mixer.A_log"),
        ("dt_bias", "mixer.dt_bias"), ("skip", "mixer.D"), ("mix_norm", "mixer.norm.weight"),
        *((f"{ours}{ending}", " ".join(f"{module}_proj.{part}" for module in modules.split()))
          for ending, part in (("", "weight"), ("_bias", "bias")) for ours, modules in (
              ("qkv", "mixer.q mixer.k mixer.v"), ("output", "mixer.o"), ("up", "mlp.up"),
              ("down", "mlp.down"))))}}


def in_pairs(path: Path, raw: Mapping) -> dict:
    """A config.json whose layers are those of two parts: Mamba or attention, and the feed-forward part that
    follows it, if one does; `bare_layers` are those without one."""
    key = "layers_block_type" if raw.get("layers_block_type") else "hybrid_override_pattern"
    types, have = [], []
    for number, kind in enumerate(raw.get(key) or ()):
        if not isinstance(kind, str) or kind not in KINDS:
            raise ConfigError(f"{path}: {key}[{number}] is {shown(kind)}; it must be one of "
                              f"{', '.join(KINDS)}: experts are not supported in a nemotron_h model")
        if KINDS[kind]:
            types.append(KINDS[kind])
            have.append(False)
        elif not types or have[-1]:
            raise ConfigError(f"{path}: {key}[{number}] is {shown(kind)}; one must follow Mamba or attention")
        else:
            have[-1] = True
    if not types:
        raise ConfigError(f"{path}: layers_block_type is missing, and so is hybrid_override_pattern")
    other = {name: value for name, value in raw.items() if name not in (
        "layers_block_type", "hybrid_override_pattern")}
    return other | {"num_hidden_layers": len(types), "layer_types": types, "bare_layers": [
        layer for layer, fed in enumerate(have) if not fed],
        "head_dim": raw.get("head_dim") or raw.get("attention_head_dim")}


def repack(state: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Its tensors by the numbers of layers of two parts."""
    found = (re.match(r"backbone\.layers\.(\d+)\.", name) for name in state)
    numbers = sorted({int(match[1]) for match in found if match})
    places, last = {}, -1
    for number in numbers:
        fed = f"backbone.layers.{number}.mixer.up_proj.weight" in state
        last += not fed
        places[str(number)] = f"layers.{last}.{'mlp' if fed else 'mixer'}"

    def renamed(name: str) -> str:
        found = re.match(r"backbone\.layers\.(\d+)\.(mixer\.|norm\.)", name)
        return name if not found else places[found[1]] + (
            "." if found[2] == "mixer." else "_norm.") + name[found.end():]

    return {renamed(name): of_mixer(name, tensor) for name, tensor in state.items()}


def mamba2_of(path: Path, config: Mapping) -> Mamba2:
    if config["time_step_limit"] not in NO_LIMITS:
        raise ConfigError(f"{path}: time_step_limit is {shown(config['time_step_limit'])}; it must be "
                          "[0.0, Infinity]")
    check_divides(path, "mamba_num_heads", config["mamba_num_heads"], config["n_groups"], "n_groups")
    return Mamba2(config["conv_kernel"], config["mamba_num_heads"], config["mamba_head_dim"],
                  config["ssm_state_size"], config["n_groups"], config["use_conv_bias"], config["use_bias"])


FAMILIES = {"nemotron_h": Family(
    "Nemotron-H", CONFIG, {}, TENSORS, lambda config, layer: False, keys=KEYS, repack=repack,
    restated=in_pairs, needed=("layer_types",), mixers={"mamba": mamba2_of},
    aliases={"layer_norm_epsilon": "rms_norm_eps", "mlp_hidden_act": "hidden_act"},
    activations={"relu2": "relu2"},
    fields_of=lambda path, config: {"rope_size": 0, "bare_layers": tuple(config["bare_layers"])})}
