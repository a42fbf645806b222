"""litgpt's folders: model_config.yaml and lit_model.pth, in the terms of a Hugging Face folder.

litgpt has one block for all its models (github.com/Lightning-AI/litgpt, litgpt/model.py), which its Config
describes. A model that computes what a Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE or Pythia does
becomes a config.json of that family and tensors of its names, and `folder_model` does the rest. Any other is
refused by the key that differs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, error_text, require_library, shown
from chatlm.common.files import read_small
from chatlm.common.hub.links import refuse_links_out
from chatlm.common.hub.trainer_files import LITGPT_CONFIG, LITGPT_FILE
from chatlm.common.log import log
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.files.torch_file import load_checkpoint
from chatlm.worker.weights.formats.checkpoint import plain_state, without_tied_head
from chatlm.worker.weights.formats.folder.model import FolderConfig, folder_model
from chatlm.worker.weights.formats.tied_heads import Pair, equal
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS, ROPE_BASE,
    Rule, check_divides, checked)

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, TextSpec
    from chatlm.worker.weights.formats.folder.model import FolderModel

COUNT = Rule(int, 1, MOST_CHANNELS, optional=True)
KEYS: dict[str, tuple[Any, Rule]] = {  # of model_config.yaml: litgpt's default, what is allowed
    "name": ("", Rule(str)), "block_size": (4096, Rule(int, 16, MOST_POSITIONS)),
    "n_layer": (16, Rule(int, 1, MOST_LAYERS)), "n_embd": (4096, Rule(int, 2, MOST_CHANNELS)),
    "n_head": (32, Rule(int, 1, MOST_HEADS)), "head_size": (None, COUNT), "n_query_groups": (None, COUNT),
    "vocab_size": (50_254, Rule(int, 1, MOST_TOKENS)), "padding_multiple": (512, Rule(int, 1, MOST_TOKENS)),
    "padded_vocab_size": (None, Rule(int, 1, MOST_TOKENS, optional=True)),
    "intermediate_size": (None, COUNT), "norm_eps": (1e-5, Rule(float, 0, 1)),
    "mlp_class_name": ("GptNeoxMLP", Rule(str)), "parallel_residual": (True, Rule(bool)),
    "gelu_approximate": ("none", Rule(str, choices=("none", "tanh"))),
    "n_expert": (0, Rule(int, 0, MOST_EXPERTS)), "n_expert_per_token": (0, Rule(int, 0, MOST_EXPERTS)),
    "moe_intermediate_size": (None, COUNT),
    "norm_qk": (False, Rule(bool)), "norm_qk_type": ("default", Rule(str)),
    "bias": (True, Rule(bool)), "attn_bias": (False, Rule(bool)),
    "rope_base": (10_000, ROPE_BASE), "rotary_percentage": (0.25, Rule(float, 0.01, 1)),
    "rope_condense_ratio": (1, Rule(float, 0.01, 10**6)),
    "sliding_window_size": (None, Rule(int, 1, MOST_POSITIONS, optional=True)),
    "sliding_window_indices": (None, Rule(int, 0, 1, many=True, optional=True)),
    "attention_scores_scalar": (None, COUNT)}
# What these must be in all models, and litgpt's default.
ONLY: dict[str, tuple[Any, Any]] = {
    "norm_1": (True, True), "norm_2": (True, True), "rope_interleave": (False, False),
    **dict.fromkeys(("shared_attention_norm", "post_attention_norm", "post_mlp_norm", "scale_embeddings",
                     "lm_head_bias"), (False, False)),
    **dict.fromkeys(("attention_logit_softcapping", "final_logit_softcapping", "latent_attention",
                     "rope_local_base_freq"), (None, None))}
LLAMA = "LLaMAMLP"
EXPERTS = "LLaMAMoE"
NEOX = "GptNeoxMLP"
LLAMAS_BLOCK = {"parallel_residual": (False, True), "norm_class_name": ("RMSNorm", "LayerNorm")}
# Likewise in a block of this mlp_class_name.
ONLY_WITH: dict[str, dict[str, tuple[Any, Any]]] = {
    LLAMA: LLAMAS_BLOCK,
    EXPERTS: LLAMAS_BLOCK | {
        "n_shared_expert": (None, None), "n_expert_groups": (None, None),
        "first_k_dense_replace": (None, None), "routed_scaling_factor": (1, 1), "bias": (False, True),
        "attn_bias": (False, False)},
    NEOX: {"norm_class_name": ("LayerNorm", "LayerNorm"), "bias": (True, True), "norm_qk": (False, False),
           "sliding_window_size": (None, None)}}
# Of other kinds of models, without effect in those that are served.
UNUSED = {"hf_config", "rope_indices", "n_topk_groups", "n_topk_scores_per_group", "norm_topk_prob"}
ADVICE = ("litgpt folders of Llama, Mistral, Mixtral, Qwen2.5, Qwen3 and Pythia open as they are; for others "
          "`litgpt convert_from_litgpt FOLDER OUT` writes OUT/model.pth, and transformers a Hugging Face "
          "folder of it (from_pretrained(ORIGINAL, state_dict=torch.load(\"OUT/model.pth\")), then "
          "save_pretrained)")
KNOWN = {*KEYS, *ONLY, *UNUSED, "rope_adjustments", *(key for rows in ONLY_WITH.values() for key in rows)}
INSTRUCTIONS = {  # what litgpt/prompts.py writes before a question, by the class of a prompt style
    **dict.fromkeys(("litgpt.prompts.Alpaca", "litgpt.prompts.FLAN"),
                    "Below is an instruction that describes a task. Write a response that appropriately "
                    "completes the request."),
    "litgpt.prompts.Longform": "Below is an instruction that describes a task, paired with an input that "
                               "provides further context. Write a response that appropriately completes the "
                               "request."}
TURNS = """{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}INSTRUCTION

{% endif %}{% for message in messages %}{% if message.role == 'user' %}### Instruction:
{{ message.content }}

### Response:
{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}

{% endif %}{% endfor %}"""
MOST_YAML_BYTES = 1 << 16  # litgpt's have 1 to 2 KB; a parser takes seconds for a megabyte
LLAMA3_ROPE = "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"


def read_litgpt_model(source: ModelSource, settings: Settings) -> FolderModel:
    refuse_links_out(source.path)
    path = source.path / LITGPT_CONFIG
    model = LitModel(path, model_config(path))
    raw = model.config_json()
    state = model.tensors(source.path / LITGPT_FILE)
    pair = Pair.of(FAMILIES[raw["model_type"]].all_tensors)
    if pair.head in state and equal(state[pair.head], state.get(pair.embed)):
        del state[pair.head]  # converted from a model with one matrix for both
    raw["tie_word_embeddings"] = pair.head not in state
    config = FolderConfig.of(path, raw, settings.context_length)
    style = source.path / "prompt_style.yaml"
    return folder_model(source, config, state, {}, partial(in_prompt_style, style))


def config_json(folder: Path) -> dict:
    """What a litgpt folder says, as a config.json would."""
    path = folder / LITGPT_CONFIG
    return LitModel(path, model_config(path)).config_json()


def in_prompt_style(path: Path, text: TextSpec) -> TextSpec:
    """The text with the template by which the model was fine-tuned, if litgpt says so beside it.

    A style that belongs to a dataset becomes a template. A style that belongs to a model is what the
    tokenizer's own template writes."""
    if not path.exists():
        return text
    stated = read_yaml(path).get("class_path")
    style = stated if isinstance(stated, str) else ""  # YAML can state lists that would take years to print
    name = style.rpartition(".")[2]
    if instruction := INSTRUCTIONS.get(style):
        log.info("%s: chats are written as litgpt's %s writes questions", path, name)
        begin = "{{ bos_token }}" if text.add_bos else ""
        return replace(text, chat_template=begin + TURNS.replace("INSTRUCTION", instruction))
    if not text.chat_template:
        log.warning("%s: chats are not written in the prompt style %s, which this server does not know",
                    path, name)
    return text


def read_yaml(path: Path) -> dict:
    """The keys and values of a YAML file."""
    yaml = require_library("yaml", f"reading {path.name}")
    data = read_small(path)
    if len(data) > MOST_YAML_BYTES:
        raise ConfigError(f"{path} has {len(data):,} bytes; the limit for such files is {MOST_YAML_BYTES:,}")
    try:
        stated = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error_text(error)}") from None
    if not isinstance(stated, dict):
        raise ConfigError(f"{path} holds {words(stated)}; it must hold keys and values")
    return stated


def model_config(path: Path) -> dict[str, Any]:
    """The values of KEYS in a model_config.yaml, checked, with litgpt's defaults; and rope_adjustments."""
    stated = read_yaml(path)
    for key, value in stated.items():
        if key not in KNOWN and value:
            raise ConfigError(f"{path}: the key {words(key)} is not known, and may change the arithmetic")
    block = stated.get("mlp_class_name", NEOX)
    if not isinstance(block, str) or block not in ONLY_WITH:
        raise refused(path, "mlp_class_name", block, f"one of {', '.join(ONLY_WITH)}")
    for key, (only, default) in (ONLY | ONLY_WITH[block]).items():
        if (value := stated.get(key, default)) != only:
            raise refused(path, key, value, words(only))
    config = {key: stated.get(key, default) for key, (default, _) in KEYS.items()}
    for key, (_, rule) in KEYS.items():
        checked(path, key, plain(config[key]), rule)
    if "Gemma" in config["name"]:  # then litgpt's norms multiply by 1 + w
        raise refused(path, "name", config["name"], "a name without Gemma")
    return config | {"rope_adjustments": stated.get("rope_adjustments")}


def plain(value: Any) -> Any:
    """A value of YAML as JSON could have it. Lists within lists may be endless, so they are only named."""
    def scalar(value: Any) -> Any:
        return value if isinstance(value, (str, int, float, type(None))) else type(value).__name__

    if isinstance(value, dict):
        return value
    return [scalar(entry) for entry in value] if isinstance(value, list) else scalar(value)


def words(value: Any) -> str:
    return shown(plain(value))


def refused(path: Path, key: str, value: Any, must: str) -> ConfigError:
    return ConfigError(f"{path}: {key} is {words(value)}; it must be {must}: {ADVICE}")


class LitModel(NamedTuple):
    """A model as litgpt describes it."""

    path: Path  # model_config.yaml
    config: dict[str, Any]

    @property
    def head_size(self) -> int:
        return self.config["head_size"] or self.config["n_embd"] // self.config["n_head"]

    @property
    def groups(self) -> int:
        """The number of key-value heads."""
        return self.config["n_query_groups"] or self.config["n_head"]

    @property
    def feed_forward(self) -> int:
        return self.config["intermediate_size"] or 4 * self.config["n_embd"]

    @property
    def query_rows(self) -> int:
        return self.config["n_head"] * self.head_size

    @property
    def key_rows(self) -> int:
        return self.groups * self.head_size

    @property
    def has_experts(self) -> bool:
        return self.config["mlp_class_name"] == EXPERTS

    def family(self) -> str:
        """The model_type that computes the same."""
        config = self.config
        windows = self.windows()
        if config["mlp_class_name"] == NEOX:
            if self.groups != config["n_head"]:
                raise refused(self.path, "n_query_groups", self.groups, f"n_head in a model with {NEOX}")
            return "gpt_neox"
        if config["norm_qk"]:
            self.only("norm_qk_type", "default", "in a model with norm_qk")
            self.only("bias", False, "in a model with norm_qk")
            self.only("attn_bias", False, "in a model with norm_qk")
            return "qwen3_moe" if self.has_experts else "qwen3"
        if config["attn_bias"] and not config["bias"]:
            return "qwen2"
        if not any(windows):
            return "mixtral" if self.has_experts else "llama"
        self.only("bias", False, "in a model with sliding_window_size")
        if not all(windows):
            raise refused(self.path, "sliding_window_indices", config["sliding_window_indices"],
                          "1 for all layers in a model without norm_qk or attn_bias")
        return "mixtral" if self.has_experts else "mistral"

    def only(self, key: str, value: Any, where: str):
        if self.config[key] != value:
            raise refused(self.path, key, self.config[key], f"{words(value)} {where}")

    def windows(self) -> list[bool]:
        """Which layers have a window that the context exceeds."""
        config = self.config
        layers, size, indices = (config[key] for key in (
            "n_layer", "sliding_window_size", "sliding_window_indices"))
        if indices is not None and len(indices) < layers:
            raise ConfigError(f"{self.path}: sliding_window_indices has {len(indices)} entries, and n_layer "
                              f"is {layers:,}")
        if size is None or size >= config["block_size"]:
            return [False] * layers
        return [bool(index) for index in (indices or [1] * layers)[:layers]]

    def config_json(self) -> dict:
        """The config.json of the same model."""
        config = self.config
        family = self.family()
        self.check_sizes()
        if family == "gpt_neox":
            return self.neox_config_json()
        raw = {"model_type": family, "vocab_size": self.padded_vocabulary(), "hidden_size": config["n_embd"],
               "intermediate_size": self.feed_forward, "num_hidden_layers": config["n_layer"],
               "num_attention_heads": config["n_head"], "num_key_value_heads": self.groups,
               "head_dim": self.head_size, "max_position_embeddings": config["block_size"],
               "rms_norm_eps": config["norm_eps"], "hidden_act": "silu",
               "rope_theta": config["rope_base"], "rope_scaling": self.rope_scaling()}
        if family == "llama":
            raw |= {"attention_bias": config["bias"], "mlp_bias": config["bias"],
                    "partial_rotary_factor": config["rotary_percentage"]}
        else:
            self.only("rotary_percentage", 1.0, "in a model with norm_qk, attn_bias, experts or "
                                              "sliding_window_size")
        if any(windows := self.windows()):
            raw["sliding_window"] = config["sliding_window_size"]
            if family not in ("mistral", "mixtral"):
                raw["use_sliding_window"] = True
                raw["layer_types"] = [LAYER_TYPES[window] for window in windows]
        return raw | (self.expert_keys(family) if self.has_experts else {})

    def neox_config_json(self) -> dict:
        config = self.config
        return {"model_type": "gpt_neox", "vocab_size": self.padded_vocabulary(),
                "hidden_size": config["n_embd"], "intermediate_size": self.feed_forward,
                "num_hidden_layers": config["n_layer"], "num_attention_heads": config["n_head"],
                "head_dim": self.head_size, "max_position_embeddings": config["block_size"],
                "layer_norm_eps": config["norm_eps"], "use_parallel_residual": config["parallel_residual"],
                "hidden_act": "gelu" if config["gelu_approximate"] == "none" else "gelu_new",
                "rotary_pct": config["rotary_percentage"], "rotary_emb_base": config["rope_base"],
                "rope_scaling": self.rope_scaling()}

    def expert_keys(self, family: str) -> dict:
        """The keys of a config.json about experts. The shares of the chosen ones sum to one, since litgpt
        takes the softmax of their scores alone."""
        config = self.config
        count = checked(self.path, "n_expert", config["n_expert"], Rule(int, 1, MOST_EXPERTS))
        chosen = checked(self.path, "n_expert_per_token", config["n_expert_per_token"], Rule(int, 1, count))
        size = config["moe_intermediate_size"] or self.feed_forward
        if family == "mixtral":
            return {"num_local_experts": count, "num_experts_per_tok": chosen, "intermediate_size": size}
        return {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": size,
                "norm_topk_prob": True}

    def check_sizes(self):
        config = self.config
        if config["mlp_class_name"] == LLAMA:
            checked(self.path, "intermediate_size", config["intermediate_size"],
                    COUNT._replace(optional=False))
        if config["head_size"] is None:
            check_divides(self.path, "n_embd", config["n_embd"], config["n_head"], "n_head")
        check_divides(self.path, "n_head", config["n_head"], self.groups, "n_query_groups")
        check_divides(self.path, "head_size", self.head_size, 2)
        check_divides(self.path, "rotary_percentage of head_size",
                      int(config["rotary_percentage"] * self.head_size), 2)
        if config["attention_scores_scalar"] not in (None, self.head_size):
            raise refused(self.path, "attention_scores_scalar", config["attention_scores_scalar"],
                          f"missing, or head_size ({self.head_size})")

    def padded_vocabulary(self) -> int:
        """The rows of the vocabulary's matrices."""
        size = self.config["vocab_size"]
        multiple = self.config["padding_multiple"]
        return self.config["padded_vocab_size"] or -(-size // multiple) * multiple

    def rope_scaling(self) -> dict | None:
        """The rope_scaling of a config.json."""
        adjustments = self.config["rope_adjustments"] or {}
        ratio = self.config["rope_condense_ratio"]
        if not isinstance(adjustments, dict) or not set(adjustments) <= {*LLAMA3_ROPE}:
            raise refused(self.path, "rope_adjustments", list(adjustments) if isinstance(adjustments, dict)
                          else adjustments, f"missing, or have only {', '.join(LLAMA3_ROPE)}")
        if adjustments and ratio != 1:
            raise refused(self.path, "rope_condense_ratio", ratio, "1 beside rope_adjustments")
        values = {key: checked(self.path, f"rope_adjustments.{key}", plain(value), Rule(float, 0.01, 10**9))
                  for key, value in adjustments.items()}
        if ratio != 1 or set(values) == {"factor"}:
            return {"rope_type": "linear", "factor": float(values.get("factor", ratio))}
        if not values:
            return None
        if missing := [key for key in LLAMA3_ROPE if key not in values]:
            raise ConfigError(f"{self.path}: rope_adjustments lacks {', '.join(missing)}")
        original = checked(self.path, "rope_adjustments.original_max_seq_len", values["original_max_seq_len"],
                           Rule(int, 2, MOST_POSITIONS))
        return {"rope_type": "llama3", "original_max_position_embeddings": original,
                **{key: values[key] for key in LLAMA3_ROPE[:3]}}

    def tensors(self, path: Path) -> dict[str, numpy.ndarray]:
        """The tensors of lit_model.pth by the names of a Hugging Face folder."""
        state = load_checkpoint(path, stand_ins=True)
        if isinstance(state.get("model"), dict):  # as training saves it, beside the optimizer
            state = state["model"]
        state = {re.sub(WRAPPED, "", str(name)): tensor for name, tensor in state.items()}
        renamed: dict[str, numpy.ndarray] = {}
        for name, tensor in plain_state(path, without_tied_head(state)).items():
            renamed |= self.renamed(name, tensor)
        return renamed

    def renamed(self, name: str, tensor: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """A tensor under transformers' names; that of queries, keys and values becomes three. A tensor that
        is not known, or of another size, keeps its name, and `check_names_and_shapes` reports it."""
        is_neox = self.config["mlp_class_name"] == NEOX
        names = NEOX_NAMES if is_neox else LLAMA_NAMES
        if name in names.once:
            return {names.once[name]: tensor}
        layer = re.fullmatch(r"transformer\.h\.(\d+)\.([\w.]+)\.(weight|bias)", name)
        if layer is None:
            return {name: tensor}
        number, part, kind = layer.groups()
        if part in ("attn.qkv", "attn.attn"):
            if tensor.shape[:1] != (self.query_rows + 2 * self.key_rows,):
                return {name: tensor}
            if is_neox:
                whole = f"{names.layers}.{number}.attention.query_key_value.{kind}"
                return {whole: self.by_head(part, tensor)}
            tensors = self.queries_keys_values(tensor, interleaved=part == "attn.attn")
            return {f"model.layers.{number}.self_attn.{which}_proj.{kind}": rows
                    for which, rows in zip("qkv", tensors)}
        of_expert = self.has_experts and part.startswith("mlp.")
        theirs = self.expert_part(part) if of_expert else names.parts.get(part, part)
        return {f"{names.layers}.{number}.{theirs}.{kind}": tensor}

    def expert_part(self, part: str) -> str:
        """transformers' name of the router (mlp.gate) or of a matrix of an expert (mlp.experts.3.fc_1)."""
        block, names = EXPERT_PARTS[self.family()]
        _, *expert, module = part.split(".")
        return ".".join((block, *expert, names.get(module, module)))

    def by_head(self, part: str, rows: numpy.ndarray) -> numpy.ndarray:
        """The rows of q, k and v of each head in turn. So litgpt stored them itself before December 2024."""
        if part == "attn.attn":
            return rows
        by_kind = rows.reshape(3, self.groups, self.head_size, *rows.shape[1:])
        return by_kind.swapaxes(0, 1).reshape(rows.shape)

    def queries_keys_values(self, rows: numpy.ndarray, interleaved: bool) -> list[numpy.ndarray]:
        """The rows of q, k and v. Before December 2024 litgpt stored them group by group: the queries of a
        key-value head, its key, its value."""
        if not interleaved:
            return numpy.split(rows, [self.query_rows, self.query_rows + self.key_rows])
        heads = self.config["n_head"] // self.groups + 2  # of a group
        by_group = rows.reshape(self.groups, heads, self.head_size, *rows.shape[1:])
        parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
        return [part.reshape(-1, *rows.shape[1:]) for part in parts]


WRAPPED = r"_orig_mod\.|_forward_module\."  # by torch.compile and FSDP, anywhere in a name


class Names(NamedTuple):
    """litgpt's names -> transformers'."""

    once: dict[str, str]
    layers: str            # what its layers' names begin with
    parts: dict[str, str]  # of a layer


LLAMA_NAMES = Names(
    {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight"},
    "model.layers", {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm", "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"})
NEOX_NAMES = Names(
    {"transformer.wte.weight": "gpt_neox.embed_in.weight", "lm_head.weight": "embed_out.weight",
     **{f"transformer.ln_f.{kind}": f"gpt_neox.final_layer_norm.{kind}" for kind in ("weight", "bias")}},
    "gpt_neox.layers", {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "attention.dense",
        "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"})
EXPERT_PARTS = {  # of a family's layer: what has router and experts, the matrices of an expert
    "mixtral": ("block_sparse_moe", {"fc_1": "w1", "fc_2": "w3", "proj": "w2"}),
    "qwen3_moe": ("mlp", {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"})}
