"""Nemotron-H and Nemotron 3. Their files have a layer for each part (Mamba-2, attention or feed-forward);
here a layer has two."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.experts import Experts
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import Mamba2
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import EXPERTS, Family, Gguf, Header, of_mixer, separate_experts
from chatlm.worker.weights.families.granite import NO_LIMITS
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, SHARE_SCALE, Rule, check_divides,
    checked, router_groups)

if TYPE_CHECKING:
    import numpy

# the names of a part -> Mamba, attention, or a dense or sparse feed-forward part
KINDS = {"linear_attention": "mamba", "mamba": "mamba", "M": "mamba", "full_attention": LAYER_TYPES[0],
         "attention": LAYER_TYPES[0], "*": LAYER_TYPES[0], "mlp": "mlp", "-": "mlp", "moe": "moe", "E": "moe"}
FED = ("mlp", "moe")
# Without effect: on training, on programs, or of drafts
INERT = dict.fromkeys("""attention_head_dim chunk_size expand mamba_ssm_cache_dtype
    moe_shared_expert_overlap mtp_layers_block_type mtp_hybrid_override_pattern n_shared_experts
    num_nextn_predict_layers rescale_prenorm_residual residual_in_fp32
    time_step_floor time_step_max time_step_min use_mamba_kernels""".split())
EXPERT_SIZES = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688, "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": 7688, "shared_expert_intermediate_size": 0, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "mlp_only_layers": None}
CONFIG = INERT | EXPERTS | EXPERT_SIZES | {
    "hidden_act": "relu2", "mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-5, "head_dim": 128,
    "num_key_value_heads": 8, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    "layer_types": None, "bare_layers": None, "norm_eps": 1e-5, "ssm_state_size": 128, "mamba_num_heads": 128,
    "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4, "use_conv_bias": True, "mamba_proj_bias": False,
    "use_bias": False, "mamba_hidden_act": "silu", "time_step_limit": None}
KEYS = {
    **dict.fromkeys(("layer_norm_epsilon", "norm_eps"), Rule(float, 0, 1)),
    "mlp_hidden_act": Rule(str, choices=("relu2",)), "mamba_hidden_act": Rule(str, choices=("silu",)),
    "bare_layers": Rule(int, 0, MOST_LAYERS, many=True, optional=True), "conv_kernel": Rule(int, 2, 64),
    "routed_scaling_factor": SHARE_SCALE, "n_routed_experts": Rule(int, 0, MOST_EXPERTS),
    "n_shared_experts": Rule(int, 0, MOST_EXPERTS, optional=True),
    "num_nextn_predict_layers": Rule(int, 0, 100, optional=True),
    "moe_latent_size": Rule(int, 1, MOST_CHANNELS, optional=True),
    "moe_shared_expert_intermediate_size": Rule(int, 0, MOST_CHANNELS),
    **dict.fromkeys(("n_group", "topk_group"), Rule(int, 1, MOST_EXPERTS)),
    **dict.fromkeys(("ssm_state_size", "mamba_head_dim"), Rule(int, 1, 4096)),
    **dict.fromkeys(("mamba_num_heads", "n_groups"), Rule(int, 1, MOST_HEADS))}
# our tensor -> the folder's, of one part each: their layers have numbers of two parts, see `renumbered`
MIXER = {"attention_norm": "norm.weight", "mix_in": "in_proj.weight", "mix_in_bias": "in_proj.bias",
         "mix_out": "out_proj.weight", "mix_out_bias": "out_proj.bias", "taps": "conv1d.weight",
         "taps_bias": "conv1d.bias", "decay": "A_log", "dt_bias": "dt_bias", "skip": "D",
         "mix_norm": "norm.weight", "qkv": "q_proj.weight k_proj.weight v_proj.weight",
         "qkv_bias": "q_proj.bias k_proj.bias v_proj.bias", "output": "o_proj.weight",
         "output_bias": "o_proj.bias"}
FEED_FORWARD = {
    "ffn_norm": "norm.weight", "up": "up_proj.weight", "up_bias": "up_proj.bias",
    "down": "down_proj.weight", "down_bias": "down_proj.bias", "router": "gate.weight",
    "correction_bias": "gate.e_score_correction_bias", "expert_up": "experts.{}.up_proj.weight",
    "expert_down": "experts.{}.down_proj.weight", "shared_up": "shared_experts.up_proj.weight",
    "shared_down": "shared_experts.down_proj.weight", "latent_in": "fc1_latent_proj.weight",
    "latent_out": "fc2_latent_proj.weight"}
TENSORS = {
    "embed": ("backbone.embeddings.weight",), "final_norm": ("backbone.norm_f.weight",),
    **{ours: tuple(f"layers.{{}}.{part}{'_' if ours.endswith(('attention_norm', 'ffn_norm')) else '.'}{name}"
                   for name in theirs.split())
       for part, table in (("mixer", MIXER), ("mlp", FEED_FORWARD)) for ours, theirs in table.items()}}
GGUF_TENSORS = {ours: tuple(f"blk.{{}}.{name}" for name in theirs.split()) for ours, theirs in {
    "attention_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight", "mix_in": "ssm_in.weight",
    "mix_in_bias": "ssm_in.bias", "mix_out": "ssm_out.weight", "mix_out_bias": "ssm_out.bias",
    "taps": "ssm_conv1d.weight", "taps_bias": "ssm_conv1d.bias", "decay": "ssm_a", "dt_bias": "ssm_dt.bias",
    "skip": "ssm_d", "mix_norm": "ssm_norm.weight", "qkv": "attn_q.weight attn_k.weight attn_v.weight",
    "qkv_bias": "attn_q.bias attn_k.bias attn_v.bias", "output": "attn_output.weight",
    "output_bias": "attn_output.bias", "up": "ffn_up.weight", "up_bias": "ffn_up.bias",
    "down": "ffn_down.weight", "down_bias": "ffn_down.bias", "router": "ffn_gate_inp.weight",
    "correction_bias": "exp_probs_b.bias", "expert_up": "ffn_up_exps.weight",
    "expert_down": "ffn_down_exps.weight", "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight", "latent_in": "ffn_latent_down.weight",
    "latent_out": "ffn_latent_up.weight"}.items()}


def layers_of_parts(fed: Iterable[bool]) -> list[int]:
    """The number of the layer that each part belongs to. A feed-forward part belongs to the Mamba or
    attention before it, or else to a layer of its own."""
    parts = list(fed)
    number = -1
    numbers = []
    for is_fed, was_fed in zip(parts, (True, *parts)):
        number += was_fed or not is_fed
        numbers.append(number)
    return numbers


def layers_of(kinds: Seq[str]) -> dict:
    """What a config says of layers of two parts, made of parts of these kinds. `bare_layers` are those
    without a feed-forward part."""
    numbers = layers_of_parts(kind in FED for kind in kinds)
    types = {}
    fed = {}
    for number, kind in zip(numbers, kinds):
        (fed if kind in FED else types)[number] = kind
    layers = range(numbers[-1] + 1)
    return {"layer_types": [types.get(layer, "none") for layer in layers],
            "bare_layers": [layer for layer in layers if layer not in fed],
            "mlp_only_layers": [layer for layer in layers if fed.get(layer) == "mlp"]}


def in_pairs(path: Path, raw: Mapping) -> dict:
    """A config.json whose layers have two parts."""
    key = "layers_block_type" if raw.get("layers_block_type") else "hybrid_override_pattern"
    pattern = raw.get(key)
    if not pattern:
        raise ConfigError(f"{path}: layers_block_type is missing, and so is hybrid_override_pattern")
    checked(path, key, list(pattern) if isinstance(pattern, str) else pattern,
            Rule(str, choices=tuple(KINDS), many=True))
    kinds = [KINDS[kind] for kind in pattern]
    other = {name: value for name, value in raw.items() if name not in (
        "layers_block_type", "hybrid_override_pattern")}
    if "moe" not in kinds:
        other |= {"n_routed_experts": 0, "moe_shared_expert_intermediate_size": 0}
    elif raw.get("mlp_bias"):
        raise ConfigError(f"{path}: mlp_bias is true; in a model with experts it must be false")
    found = layers_of(kinds)
    return other | found | {"num_hidden_layers": len(found["layer_types"]),
                            "head_dim": raw.get("head_dim") or raw.get("attention_head_dim")}


def renumbered(state: Mapping[str, Any], parts: str, names: Callable[[bool, str], str]) -> dict[str, Any]:
    """A file's tensors by the numbers of layers of two parts. `parts` matches the number of a part and the
    rest of a tensor's name. From that rest `names` makes the new name, with {} for the layer."""
    found = {name: match for name in state if (match := re.match(parts, name))}
    fed = {int(match[1]): False for match in found.values()}
    for match in found.values():
        fed[int(match[1])] |= bool(re.match(r"(mixer\.up_proj|mixer\.gate|ffn_(up|gate_inp))\.", match[2]))
    order = sorted(fed)
    places = dict(zip(order, layers_of_parts(fed[number] for number in order)))

    def renamed(name: str) -> str:
        number = int(found[name][1])
        rest = found[name][2]
        return names(fed[number], rest).replace("{}", str(places[number]), 1)

    return {renamed(name) if name in found else name: tensor for name, tensor in state.items()}


def repack(state: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """A folder's tensors with a matrix for each expert, without draft heads."""
    def ours(is_fed: bool, name: str) -> str:
        part = "mlp" if is_fed else "mixer"
        return f"layers.{{}}.{part}_{name}" if name.startswith("norm.") else (
            f"layers.{{}}.{part}.{name.removeprefix('mixer.')}")

    plain = {re.sub(r"^model\.", "backbone.", name): tensor
             for name, tensor in state.items() if not name.startswith("mtp.")}
    repacked = renumbered(plain, r"backbone\.layers\.(\d+)\.((?:mixer|norm)\..*)", ours)
    return {name: of_mixer(name, part) for stored, tensor in repacked.items()
            for name, part in separate_experts(stored, tensor).items()}


def repack_gguf(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A GGUF file's tensors, without a draft head's."""
    drafts = {match[0] for name in stored if (match := re.match(r"blk\.\d+\.(?=nextn\.)", name))}
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(tuple(drafts))}
    return renumbered(kept, r"blk\.(\d+)\.(.*)", lambda is_fed, name: (
        "blk.{}." + ("ffn_norm.weight" if is_fed and name == "attn_norm.weight" else name)))


def gguf_layers(header: Header) -> tuple[dict, dict]:
    """The metadata become those of layers of two parts."""
    count: int = header.value("block_count") - header.value("nextn_predict_layers", 0)
    sparse = header.value("expert_count", 0, low=0) > 0
    kinds = []
    for number in range(count):
        mixes = [kind for part, kind in (("ssm_in", "mamba"), ("attn_q", LAYER_TYPES[0]))
                 if f"blk.{number}.{part}.weight" in header.stored]
        kinds.append(mixes[0] if mixes else "moe" if sparse else "mlp")
    if not kinds:
        raise ConfigError(f"{header.path}: {header.own}block_count leaves no layers beside the draft head")

    def of_some(key: str) -> Any:  # 0 for parts of other kinds
        numbers = header.raw(key)
        return next(filter(None, numbers), 0) if isinstance(numbers, list) else numbers

    found = layers_of(kinds)
    changes = {key: of_some(key) for key in ("attention.head_count_kv", "feed_forward_length")}
    key = "attention.layer_norm_rms_epsilon"
    epsilon = header.raw(key) or header.value("attention.layer_norm_epsilon", 1e-5)
    own = {} if sparse else {"num_experts": 0}
    return changes | {"block_count": len(found["layer_types"]), "nextn_predict_layers": 0, key: epsilon}, {
        "mamba_head_dim": header.value("ssm.inner_size") // header.value("ssm.time_step_rank"),
        "use_conv_bias": header.has("ssm_conv1d.bias"), "use_bias": header.has("ssm_in.bias")} | found | own


def in_adapters(model: Model, name: str) -> tuple[str]:
    """What adapters call a tensor of TENSORS. Their layers are parts, each with a `mixer`."""
    match = re.fullmatch(r"layers\.(\d+)\.(mixer|mlp)(_norm)?\.(.*)", name)
    if not match:
        return (re.sub(r"^backbone\.", "model.", name),)
    layer = int(match[1])
    is_fed = match[2] == "mlp"
    is_norm = bool(match[3])
    rest = match[4]
    mixers = [each.mixer for each in model.layers[:layer + is_fed] if each.mixer]
    feeds = [each.feed for each in model.layers[:layer] if each.feed]
    part = len(mixers) + len(feeds)
    return (f"model.layers.{part}.{'norm' if is_norm else 'mixer'}.{rest}",)


def mamba2_of(facts: Facts) -> Mamba2:
    config = facts.config
    if config["time_step_limit"] not in NO_LIMITS:
        raise ConfigError(f"{facts.path}: time_step_limit is {shown(config['time_step_limit'])}; it must be "
                          "[0.0, Infinity]")
    check_divides(facts.path, "mamba_num_heads", config["mamba_num_heads"], config["n_groups"], "n_groups")
    return Mamba2(config["conv_kernel"], config["mamba_num_heads"], config["mamba_head_dim"],
                  config["ssm_state_size"], config["n_groups"], config["use_conv_bias"], config["use_bias"],
                  eps=facts.eps)


def nemotron(facts: Facts) -> Model:
    """A layer has a mixer, a feed-forward part or both, each after a norm. Heads do not turn."""
    facts = replace(facts, rope=replace(facts.rope, size=0))
    norm = RmsNorm(facts.eps)
    layers = []
    for number, kind in enumerate(facts.kinds):
        mixer = mixer_of(facts, number, kind)
        feed = None if number in facts.config["bare_layers"] else feed_of(facts, number)
        layers.append(Layer(mixer, feed, attention_norm=norm if mixer else None,
                            ffn_norm=norm if feed else None))
    return facts.decoder(layers, norm)


def mixer_of(facts: Facts, number: int, kind: str) -> Attention | Mamba2 | None:
    if kind == "none":
        return None
    return mamba2_of(facts) if kind == "mamba" else facts.attention(number)


def feed_of(facts: Facts, number: int) -> FeedForward | Experts:
    """A dense part, or experts that a router of sigmoids chooses, beside one that all tokens take. They may
    read a product of x, and add to x through another; the one beside them reads x itself."""
    config = facts.config
    routing = {}
    if facts.experts:
        routing = {"kind": "sigmoid", "correction_bias": True, "groups": router_groups(facts.path, config),
                   "scale": config["routed_scaling_factor"]}
    feed = facts.feed(number, **routing)
    return replace(feed, latent=config["moe_latent_size"] or 0) if isinstance(feed, Experts) else feed


FAMILIES = {"nemotron_h": Family(
    "Nemotron-H and Nemotron 3", CONFIG, nemotron, TENSORS, lambda config, layer: False, keys=KEYS,
    repack=repack, restated=in_pairs, needed=("layer_types",), kinds=("mamba", "none"),
    aliases={"layer_norm_epsilon": "rms_norm_eps", "mlp_hidden_act": "hidden_act",
             "n_routed_experts": "num_experts",
             "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size"},
    activations={"relu2": "relu2"},
    in_adapters=in_adapters, gguf=Gguf(
        "nemotron_h nemotron_h_moe", permuted=True, names=GGUF_TENSORS, layers=gguf_layers,
        repack=repack_gguf, keys={
            "attention.layer_norm_epsilon": Rule(float, 0, 1, optional=True),
            "expert_weights_norm": Rule(bool), "expert_shared_count": Rule(int, 0, MOST_EXPERTS)}))}
