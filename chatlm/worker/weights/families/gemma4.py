"""Gemma 4: its layers, which attend in ways of their own, and its tensors, in a folder and in a GGUF file."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, Scores
from chatlm.worker.model.blocks.experts import ExpertsBesideDense, Router
from chatlm.worker.model.blocks.extras import LayerInput, Scalar
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input, LayerInputs
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import Family, Gguf, Header, separate_experts
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Rule, check_divides, checked)

FULL, LOCAL = LAYER_TYPES
ROPE = {LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}
CONFIG = {
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
    "num_global_key_value_heads": None, "per_layer_config": None, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "sliding_window": 512, "layer_types": None,
    "rope_parameters": None, "vocab_size": 262_144, "max_position_embeddings": 131_072,
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
    "final_logit_softcapping": None, "use_bidirectional_attention": None,  # "vision": among an image's tokens
    "enable_moe_block": False, "num_experts": None, "num_local_experts": None, "top_k_experts": None,
    "num_experts_per_tok": 0, "moe_intermediate_size": None}
KEYS = {
    "global_head_dim": Rule(int, 2, MOST_CHANNELS), "num_kv_shared_layers": Rule(int, 0, MOST_LAYERS),
    "num_global_key_value_heads": Rule(int, 1, MOST_HEADS, optional=True),
    "hidden_size_per_layer_input": Rule(int, 0, MOST_CHANNELS),
    "top_k_experts": Rule(int, 1, MOST_EXPERTS, optional=True),
    "use_bidirectional_attention": Rule(str, choices=("vision",), optional=True)}
TENSORS: dict[str, tuple[str, ...]] = {
    "layer_embed": ("model.embed_tokens_per_layer.weight",),
    "layer_project": ("model.per_layer_model_projection.weight",),
    "layer_project_norm": ("model.per_layer_projection_norm.weight",),
    **{ours: (f"model.layers.{{}}.{theirs}",) for ours, theirs in (
        ("output_norm", "post_attention_layernorm.weight"), ("ffn_norm", "pre_feedforward_layernorm.weight"),
        ("down_norm", "post_feedforward_layernorm.weight"), ("scalar", "layer_scalar"),
        ("input_gate", "per_layer_input_gate.weight"), ("input_out", "per_layer_projection.weight"),
        ("input_norm", "post_per_layer_input_norm.weight"), ("router", "router.proj.weight"),
        ("router_norm", "router.scale"), ("experts_scale", "router.per_expert_scale"),
        ("experts_norm", "pre_feedforward_layernorm_2.weight"),
        ("experts_down_norm", "post_feedforward_layernorm_2.weight"),
        ("shared_down_norm", "post_feedforward_layernorm_1.weight"), ("shared_down", "mlp.down_proj.weight"),
        ("expert_down", "experts.{}.down_proj.weight"))},
    **{f"{ours}gate_up": tuple(f"model.layers.{{}}.{theirs}.{part}_proj.weight" for part in ("gate", "up"))
       for ours, theirs in (("shared_", "mlp"), ("expert_", "experts.{}"))}}
GGUF_TENSORS: dict[str, tuple[str, ...]] = {
    "scalar": ("blk.{}.layer_output_scale.weight",), "router_norm": ("blk.{}.ffn_gate_inp.scale",),
    "experts_scale": ("blk.{}.ffn_down_exps.scale",), "expert_down": ("blk.{}.ffn_down_exps.weight",),
    "expert_gate_up": ("blk.{}.ffn_gate_exps.{}.weight", "blk.{}.ffn_up_exps.{}.weight"),
    "shared_gate_up": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
    "shared_down": ("blk.{}.ffn_down.weight",)}


def complete(path: Path, config: Mapping) -> dict:
    """The keys of other families that a checked config of Gemma 4 implies."""
    layers = config["num_hidden_layers"]
    experts = config["enable_moe_block"]
    types = config["layer_types"] or [LAYER_TYPES[(layer + 1) % 6 > 0] for layer in range(layers)]
    return {"layer_types": [*types[:-1], FULL],  # whatever the file says about the last one
            "rope_parameters": config["rope_parameters"] or ROPE,
            "num_experts": (config["num_experts"] or 0) if experts else 0,
            "shared_intermediate_size": config["intermediate_size"] if experts else 0}


def sizes_of_full_layers(path: Path, config: Mapping, types: Seq[str]) -> tuple[int, int]:
    """The head size and the number of KV heads of layers with full attention. transformers 5.23 and later
    write them for each such layer, earlier ones once."""
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    rules = {"head_dim": KEYS["global_head_dim"], "num_key_value_heads": KEYS["num_global_key_value_heads"]}
    listed = config["per_layer_config"]
    key = "per_layer_config"
    if listed is None:
        own = {name: config[theirs] for name, theirs in names.items()}
        if not config["attention_k_eq_v"]:
            del own["num_key_value_heads"]
    elif listed == {}:
        own = {}
    else:
        full = [str(layer) for layer, type_ in enumerate(types) if type_ == FULL]
        if isinstance(listed, dict):  # whose layer numbers are padded with zeros
            listed = {re.sub("^0+(?=[0-9])", "", layer): sizes for layer, sizes in listed.items()}
        if not isinstance(listed, dict) or sorted(listed) != sorted(full) or any(
                sizes != listed[full[0]] or not isinstance(sizes, dict) for sizes in listed.values()):
            raise ConfigError(f"{path}: {key} is {shown(listed)}; it must give the same sizes for each layer "
                              f"with {FULL} ({', '.join(full)}) and for no other")
        own = listed[full[0]]
        if unknown := sorted(own.keys() - names.keys()):
            raise ConfigError(f"{path}: {key} has the key {shown(unknown[0])}; known are {', '.join(names)}")
        own = {name: checked(path, f"{key}.{full[0]}.{name}", size, rules[name])
               for name, size in own.items()}
    size = own.get("head_dim")
    kv_heads = own.get("num_key_value_heads")
    return size or config["head_dim"], kv_heads or config["num_key_value_heads"]


def rope_of(path: Path, name: str, rope: Any, size: int) -> dict:
    """The base and the factors of a Rope, from the entry of one type of layer in rope_parameters."""
    if not isinstance(rope, dict):
        raise ConfigError(f"{path}: {name} is {shown(rope)}; it must be an object")
    type_ = checked(path, f"{name}.rope_type", rope.get("rope_type", "default"),
                    Rule(str, choices=("default", "proportional")))
    known = ("rope_type", "rope_theta", "partial_rotary_factor")
    if unknown := [key for key in rope if key not in known and rope[key] is not None]:
        raise ConfigError(f"{path}: {name} has the key {shown(unknown[0])}; known are {', '.join(known)}")
    base = rope.get("rope_theta", 10_000.0)
    base = float(checked(path, f"{name}.rope_theta", base, Rule(float, 2, 10**15)))
    part = 1.0 if rope.get("partial_rotary_factor") is None else rope["partial_rotary_factor"]
    checked(path, f"{name}.partial_rotary_factor", part, Rule(float, 0, 1))
    turned = int(part * size // 2)
    if type_ == "default" or turned == size // 2:
        return {"base": base}
    return {"base": base, "factors": (1.0,) * turned + (math.inf,) * (size // 2 - turned)}


def gemma4(facts: Facts) -> Model:
    """Norms before and after each block. Attention is followed by one dense block, which may be twice as wide
    in layers that read others' keys, or by experts beside a dense block.

    After both blocks, each layer adds its part of the layer inputs, if the model has them, and multiplies x
    by a number."""
    config = facts.config
    experts = facts.experts
    norm = RmsNorm(facts.eps)
    P = config["hidden_size_per_layer_input"]
    layers = []
    for number, attention in enumerate(attentions_of(facts)):
        if experts:
            dense = FeedForward(experts.shared_size, facts.activation, prefix="shared_")
            feed = ExpertsBesideDense(experts.count, facts.ffn_size, Router(experts.chosen), dense, norm)
        else:
            is_double = config["use_double_wide_mlp"] and attention.source is not None
            feed = FeedForward(facts.ffn_size * (2 if is_double else 1), facts.activation)
        own_input = (LayerInput(P, number, facts.count, norm),) if P else ()
        layers.append(Layer(attention, feed, attention_norm=norm, ffn_norm=norm, output_norm=norm,
                            down_norm=norm, after=(*own_input, Scalar())))
    return facts.decoder(layers, norm, input_of(facts))


def input_of(facts: Facts) -> Input:
    """The embedding * sqrt(C), and P more numbers of a token for each layer."""
    config = facts.config
    P = config["hidden_size_per_layer_input"]
    vocabulary = config["vocab_size_per_layer_input"]
    if P and vocabulary != config["vocab_size"]:
        raise ConfigError(f"{facts.path}: vocab_size_per_layer_input is {shown(vocabulary)}; it must be "
                          f"{config['vocab_size']}, like vocab_size")
    layers = LayerInputs(P, facts.count, facts.eps * facts.width) if P else None
    return Input(scale=facts.width**0.5, layers=layers)


def attentions_of(facts: Facts) -> list[Attention]:
    """How each layer attends. Full layers have heads of another size than sliding ones. The last layers read
    the keys and values of the last layer of their type that has its own.

    `config` is complete. `rope_of_types`, if it has that, is rope_of's result for each type of layer."""
    path = facts.path
    config = facts.config
    types = facts.kinds
    for key in ("rope_scaling", "partial_rotary_factor"):
        if config[key] is not None:
            raise ConfigError(f"{path}: {key} is {shown(config[key])}; in a gemma4_text model "
                              "rope_parameters gives this for each type of layer")
    if not isinstance(config["rope_parameters"], dict):
        raise ConfigError(f"{path}: rope_parameters is {shown(config['rope_parameters'])}; it must be an "
                          "object")
    key = "num_kv_shared_layers"
    shared: int = checked(path, key, config[key], Rule(int, 0, facts.count - 1))
    own = types[:facts.count - shared]
    sizes = {FULL: sizes_of_full_layers(path, config, types),
             LOCAL: (config["head_dim"], config["num_key_value_heads"])}
    kinds = {type_: attention_of(facts, type_, *sizes[type_]) for type_ in sorted({*types})}
    attentions = []
    for layer, type_ in enumerate(types):
        if layer < len(own):
            attentions.append(kinds[type_])
        elif type_ in own:
            source = len(own) - 1 - own[::-1].index(type_)
            attentions.append(replace(kinds[type_], values_from_keys=False, source=source))
        else:
            raise ConfigError(f"{path}: layer_types[{layer}] is {shown(type_)}, but none of the first "
                              f"{len(own)} layers is, and the others have no keys ({key} is {shared})")
    return attentions


def attention_of(facts: Facts, type_: str, size: int, kv_heads: int) -> Attention:
    """How layers of one type attend: scores are q k^T of normed heads, without another scale."""
    path = facts.path
    config = facts.config
    check_divides(path, "num_attention_heads", facts.heads, kv_heads, f"the number of kv heads of {type_}")
    check_divides(path, f"the head size of {type_}", size, 2)
    if "rope_of_types" in config:
        rope = config["rope_of_types"][type_]
    else:
        rope = rope_of(path, f"rope_parameters.{type_}", config["rope_parameters"].get(type_), size)
    window = 0
    if type_ == LOCAL:
        window = checked(path, "sliding_window", config["sliding_window"], Rule(int, 1))
    return Attention(
        facts.heads, kv_heads, size, size, Rope(size, **rope), Scores(scale=size**0.5, window=window),
        facts.head_norms(), value_norm=True,
        values_from_keys=type_ == FULL and config["attention_k_eq_v"])


def repack(state: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """A folder's tensors, with a matrix for each expert."""
    return {ours: part for name, tensor in state.items()
            for ours, part in separate_experts(name, tensor).items()}


def gguf_layers(header: Header) -> tuple[dict, dict]:
    """The metadata become those of sliding layers alone. What is different in full layers is stated as in a
    config.json."""
    path = header.path
    own = header.own
    value = header.value
    stored = header.stored
    layers: int = value("block_count")
    pattern = "attention.sliding_window_pattern"
    shared: int = value("attention.shared_kv_layers", 0, high=layers - 1)
    local = checked(path, own + pattern, header.raw(pattern), Rule(bool, many=True), layers)
    full = [l for l in range(layers) if not local[l]]

    def sizes(key: str, *groups: list[int]) -> list[int]:
        """The number under a key for each group of layers, which must be the same within a group."""
        found = header.raw(key)
        numbers: list[Any] = found if isinstance(found, list) and len(found) == layers else [found] * layers
        for group in groups:
            if any(numbers[l] != numbers[group[0]] for l in group):
                raise ConfigError(f"{path}: {own}{key} is {shown(numbers)}; it must be the same in layers "
                                  f"{', '.join(map(str, group))}")
        firsts = [numbers[group[0]] if group else numbers[0] for group in groups]
        for first in firsts:
            header.check(own + key, first)
        return firsts

    kv_heads, full_kv_heads = sizes("attention.head_count_kv", [l for l in range(layers) if local[l]], full)
    width, last_width = sizes("feed_forward_length", list(range(layers - shared)),
                              list(range(layers - shared, layers)) or [0])
    if last_width not in (width, 2 * width):
        raise ConfigError(f"{path}: {own}feed_forward_length is {last_width} in the last layers; it must be "
                          f"{width} or {2 * width}")
    size = value("attention.key_length", optional=False)
    local_size: int = value("attention.key_length_swa", size)
    for ending, expected in (("", size), ("_swa", local_size)):
        for key in ("attention.value_length", "rope.dimension_count"):
            value(f"{key}{ending}", expected, low=expected, high=expected)
    value("rope.scaling.type", "none", choices=("none",))
    rope: dict[str, dict] = {type_: {"base": float(value(f"rope.freq_base{ending}", base))}
                             for type_, ending, base in zip(LAYER_TYPES, ("", "_swa"), (1e6, 1e4))}
    if (name := "rope_freqs.weight") in stored:
        factors = header.check(name, stored[name].data.tolist(), size // 2, high=1e31)
        rope[LAYER_TYPES[0]]["factors"] = tuple(
            math.inf if factor > 1e29 else factor for factor in factors)
    more = {"global_head_dim": size, "num_global_key_value_heads": full_kv_heads, "rope_of_types": rope,
            "attention_k_eq_v": not any(
                f"blk.{l}.attn_v.weight" in stored for l in full if l < layers - shared),
            "num_kv_shared_layers": shared, "use_double_wide_mlp": last_width > width,
            "hidden_size_per_layer_input": value("embedding_length_per_layer_input", 0),
            "enable_moe_block": value("expert_count", 0, low=0) > 0}
    return {"attention.head_count_kv": kv_heads, "feed_forward_length": width,
            **{f"attention.{part}_length": local_size for part in ("key", "value")}}, more


def experts_apart(stored: Mapping) -> dict:
    """A file's tensors with a gate and an up matrix for each expert. Files have one or two for all
    experts."""
    found = {}
    for name, tensor in stored.items():
        match = re.fullmatch(r"(blk\.\d+\.ffn_)(gate_up|gate|up)_exps\.weight", name)
        if not match or len(tensor.shape) != 3:
            found[name] = tensor
            continue
        columns, rows, count = tensor.shape.tolist()
        parts = match[2].split("_")
        rows //= len(parts)
        for expert, (index, part) in itertools.product(range(count), enumerate(parts)):
            data = tensor.data[expert, index * rows:(index + 1) * rows]
            found[f"{match[1]}{part}_exps.{expert}.weight"] = tensor._replace(
                shape=numpy.array([columns, rows]), n_elements=rows * columns, n_bytes=data.nbytes, data=data)
    return found


GGUF_KEYS = {
    "attention.key_length_swa": Rule(int, 2, MOST_CHANNELS, optional=True),
    "attention.value_length_swa": Rule(int), "attention.shared_kv_layers": KEYS["num_kv_shared_layers"],
    "rope.dimension_count_swa": Rule(int), "rope.freq_base_swa": Rule(float, 2, 10**15),
    "embedding_length_per_layer_input": KEYS["hidden_size_per_layer_input"]}
ROW = Family(
    "Gemma 4", CONFIG, gemma4, TENSORS, keys=KEYS, repack=repack,
    aliases={"top_k_experts": "num_experts_per_tok"}, complete=complete,
    own_attentions=True, gguf=Gguf(
        "gemma4", names=GGUF_TENSORS, keys=GGUF_KEYS, layers=gguf_layers, repack=experts_apart,
        unsaid=lambda config: {"vocab_size_per_layer_input": config["vocab_size"]}))
FAMILIES = {"gemma4_text": ROW, "gemma4_unified_text": ROW._replace(
    title="", gguf=Gguf(), config=CONFIG | {
        "hidden_size_per_layer_input": 0, "sliding_window": 1024, "max_position_embeddings": 262_144})}
