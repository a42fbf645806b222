"""`Family`: everything in which families of models may differ, in a folder and in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.worker.arrays.kinds import floats
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.rules import LAYER_TYPES, Rule

if TYPE_CHECKING:
    from chatlm.worker.weights.changes import FileSlice


class Header(NamedTuple):
    """A GGUF file's metadata and tensors. Methods take the keys of its architecture, without that name."""

    path: Path
    metadata: Mapping
    stored: Mapping[str, Any]  # name -> gguf.header.GgufTensor
    read: Callable             # gguf_value

    @property
    def own(self) -> str:
        """What the keys of its architecture begin with."""
        return f"{self.metadata['general.architecture']}."

    def raw(self, key: str, default=None) -> Any:
        return self.metadata.get(self.own + key, default)

    def value(self, key: str, *default, **bounds) -> Any:
        return self.read(self.path, self.metadata, self.own + key, *default, **bounds)

    def check(self, name: str, value: Any, *length: int, **bounds) -> Any:
        """A value that was found elsewhere, if the rule for this key or tensor allows it."""
        return self.read(self.path, {}, name, value, *length, **bounds)

    def has(self, ending: str) -> bool:
        """Does any layer have a tensor of this name?"""
        return any(name.endswith(f".{ending}") for name in self.stored)


class Gguf(NamedTuple):
    """What is unusual about a family's GGUF files."""

    architectures: str = ""  # what general.architecture calls it, one or several names
    permuted: bool = False   # rows of q and k have adjacent rotary pairs; in a folder they do not
    variants: dict[str, str] = {}  # a key, unless it is 0 -> the row that it means: expert_count -> mixtral
    names: dict[str, tuple[str, ...]] = {}  # of tensors that GGUF_NAMES names otherwise
    keys: Mapping[str, Rule] = {}           # of metadata that only this family may have
    ignored: frozenset[str] = frozenset()   # metadata that converters write and nobody needs
    # -> changes that make the metadata those of plain layers, and what a config.json would say of others
    layers: Callable[[Header], tuple[dict, dict]] = lambda header: ({}, {})
    unsaid: Callable[[Mapping], dict] = lambda config: {}  # keys of a config that files imply
    repack: Callable[[dict], dict] = lambda stored: stored  # a file's tensors as `names` expects them
    # of a file's tensors: names that depend on which it has
    names_in: Callable[[Mapping[str, Any]], dict[str, tuple[str, ...]]] = lambda stored: {}
    # yarn_log_multiplier is mscale_all_dim over this, and mscale is equal; 0: is it itself, and mscale is 1
    log_unit: float = 0.0
    mscale_unknown: bool = False     # files with yarn do not say all of it; see MSCALE_UNKNOWN
    strips_specials: bool = False    # sentencepiece vocabularies drop the spaces after special tokens


GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu",
         "gelu": "gelu", "quick_gelu": "quick_geglu", "relu2": "reglu2"}
# of parts without gates
ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "gelu_quick", "relu2": "relu2"}
KV_UP = ("k_up", "v_up")  # of latents


def usual_biases(config: Mapping) -> Iterator[str]:
    """The biases that a config states in the words of most families."""
    if config.get("attention_bias"):
        yield "qkv"
        if config.get("attention_out_bias", True):
            yield "output"
    if config.get("mlp_bias"):
        yield "ffn"


class Family(NamedTuple):
    """How a family differs from llama (see transformers' modeling_<name>.py): a row of FAMILIES.

    A `config` is a config.json with all defaults filled in. Of a GGUF file it has the metadata's values."""

    title: str         # the common names of its models
    config: dict       # its own config.json keys and their defaults
    model: Callable[[Facts], Model]  # its blocks
    tensors: dict[str, tuple[str, ...]] = {}  # where its files differ from HF_TENSORS
    has_window: Callable[[Mapping, int], Any] = lambda config, layer: config.get("sliding_window")
    gguf: Gguf = Gguf()
    keys: Mapping[str, Rule] = {}  # of keys in `config` that are not bool
    one_more: bool = False  # its norms multiply by 1 + w,
    plain_norms: tuple[str, ...] = ()  # but these by w
    has_draft_head: bool = False  # its files may have one, see weights/formats/draft_heads.py
    has_rerankers: bool = False   # its files may be rerankers, see weights/purposes/rerankers.py
    repack: Callable[[dict], dict] = lambda state: state  # a folder's tensors as `tensors` expects them
    # (model, name, rows) of a folder's matrix or bias -> the rows in our order; None: they have it already
    ordered: Callable[[Model, str, numpy.ndarray], numpy.ndarray] | None = None
    activations: Mapping[str, str] = GATED  # hidden_act -> Facts' activation
    interleaved: bool = False  # rotary pairs are adjacent, in a folder too
    needed: tuple[str, ...] = ()  # keys that must be stated: transformers' default is another model
    kinds: tuple[str, ...] = ()  # layer types other than attention
    biases: Callable[[Mapping], Iterable[str]] = usual_biases  # of a folder's config: Facts.biases
    aliases: dict[str, str] = {}  # its own keys -> the usual keys that they replace
    # a config.json in the terms of `config`, if the family's own has others
    restated: Callable[[Path, Mapping], Mapping] = lambda path, raw: raw
    complete: Callable[[Path, dict], dict] = lambda path, config: {}  # keys derived from a config
    own_attentions: bool = False  # its `model` finds out which windows layers have, and how heads turn
    # (config, windows of layers) -> the layers whose heads do not turn
    unrotated: Callable[[Mapping, Seq[int]], set[int]] = lambda config, windows: set()
    # (path, name, config, the rotary parameters under that name) -> the same in the terms of SCALINGS
    rope_of: Callable[[Path, str, Mapping, dict], dict] = lambda path, name, config, rope: rope
    queries_grow: bool = False  # rotary parameters may have llama_4_scaling_beta
    fused: Seq[tuple[str, tuple[str, ...]]] = ()  # (a matrix that `repack` splits, the matrices of its rows)
    # what adapters call a tensor of `tensors`: they use the modules' names, where files have others
    in_adapters: Callable[[Model, str], Seq[str]] = lambda model, name: (name,)

    def named_by_adapters(self, model: Model,
                          slices: Mapping[str, list[FileSlice]]) -> dict[str, list[FileSlice]]:
        """`slices` by the names of a folder's tensors -> the same by the names that adapters use."""
        return {called: at for name, at in slices.items() for called in self.in_adapters(model, name)}

    @property
    def all_tensors(self) -> dict[str, tuple[str, ...]]:
        return HF_TENSORS | self.tensors

    @property
    def gguf_names(self) -> dict[str, tuple[str, ...]]:
        """Like all_tensors, with the names in a GGUF file."""
        table = {}
        for ours, theirs in self.all_tensors.items():
            names = GGUF_NAMES.get(ours, "").split()
            if len(names) > len(theirs):  # they are one matrix
                names = GGUF_WHOLE[ours].split()
            table[ours] = tuple(name if name.startswith(GGUF_ONCE) else f"blk.{{}}.{name}" for name in names)
        return {ours: names for ours, names in table.items() if names} | self.gguf.names


def is_one_more(row: Family, name: str) -> bool:
    """Does a folder's norm multiply by 1 + w? A GGUF file has the sum."""
    is_norm = re.search(r"(?<!linear_attn\.)norm\.weight$", name) is not None
    return row.one_more and is_norm and name not in row.plain_norms


HF_TENSORS = {  # our tensor (of layer {}) -> the folder's tensors whose rows it is made of
    "embed": ("model.embed_tokens.weight",), "head": ("lm_head.weight",),
    "final_norm": ("model.norm.weight",),
    "attention_norm": ("model.layers.{}.input_layernorm.weight",),
    "ffn_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    **{name: (f"model.layers.{{}}.self_attn.{name}.weight",) for name in ("q_norm", "k_norm")},
    "sinks": ("model.layers.{}.self_attn.sinks",),
    **{ours + ending: tuple(f"model.layers.{{}}.{module}_proj.{part}" for module in theirs.split())
       for ending, part in (("", "weight"), ("_bias", "bias"))
       for ours, theirs in (("qkv", "self_attn.q self_attn.k self_attn.v"), ("output", "self_attn.o"),
                            ("gate_up", "mlp.gate mlp.up"), ("down", "mlp.down"),
                            ("shared_gate_up", "mlp.shared_expert.gate mlp.shared_expert.up"),
                            ("shared_down", "mlp.shared_expert.down"))}}
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "moe_intermediate_size"))
QWEN_EXPERTS = EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": None, "decoder_sparse_step": 1}
SHARED_GATE = {"shared_gate": ("model.layers.{}.mlp.shared_expert_gate.weight",)}


def expert_tensors(experts: str, router: str, parts: Seq[str] = ("weight",)) -> dict[str, tuple[str, ...]]:
    """Rows of HF_TENSORS for a family's router and experts. `experts` has a {} if each expert has its own
    tensors."""
    names = {"router": router, "expert_gate_up": f"{experts}.gate_proj {experts}.up_proj",
             "expert_down": f"{experts}.down_proj"}
    return {f"{ours}_bias" if part == "bias" else ours: tuple(
        f"model.layers.{{}}.mlp.{module}.{part}" for module in theirs.split())
        for ours, theirs in names.items() for part in parts}


def of_mixer(name: str, tensor: numpy.ndarray) -> numpy.ndarray:
    """A folder's tensor as a GGUF file has it: convolutions (C, 1, taps) as (C, taps), and the decay of
    A_log."""
    if re.search(r"\.(conv|conv1d)\.weight$", name) and tensor.ndim == 3:
        return tensor[:, 0]
    if not name.endswith(".A_log"):
        return tensor
    return -numpy.exp(floats(tensor).astype(numpy.float64)).astype(numpy.float32)


def in_two(tensor: numpy.ndarray, axis: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The two halves along an axis. Of an odd length the first is longer."""
    middle = -(-tensor.shape[axis] // 2)
    before = (slice(None),) * (axis % tensor.ndim)
    return tensor[(*before, slice(middle))], tensor[(*before, slice(middle, None))]


def separate_experts(name: str, tensor: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """A folder's tensor; one that has the matrices of all experts becomes one for each."""
    stem, _, part = name.rpartition(".")
    if not stem.endswith(".experts") or tensor.ndim != 3:
        return {name: tensor}
    both = zip(("gate", "up"), in_two(tensor, 1))
    halves = both if part == "gate_up_proj" else [(part.removesuffix("_proj"), tensor)]
    return {f"{stem}.{e}.{which}_proj.weight": one
            for which, all_of in halves for e, one in enumerate(all_of)}


def without_draft_heads(state: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors, less those of layers that only draft: behind the others, with a product of their
    own of an embedding and a state."""
    drafts = tuple(draft_layers(state))
    return {name: tensor for name, tensor in state.items() if not name.startswith(drafts)}


def as_vectors(state: Mapping[str, Any], endings: tuple[str, ...]) -> dict[str, Any]:
    """A file's tensors, where those whose names end like this are vectors. Files have them in rows."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(endings) and len(tensor.shape) > 1:
            if isinstance(tensor, numpy.ndarray):
                tensor = tensor.reshape(-1)
            elif hasattr(tensor, "tensor_type") and tensor.tensor_type.name == "F32":
                tensor = tensor._replace(shape=numpy.array([tensor.n_elements]), data=tensor.data.reshape(-1))
        found[name] = tensor
    return found


def draft_layers(state: Mapping[str, Any]) -> set[str]:
    """What the names of their tensors begin with."""
    found = set()
    for name in state:
        layer = re.match(r"(model\.layers|blk)\.\d+\.", name)
        if layer and name.startswith((f"{layer[0]}eh_proj.", f"{layer[0]}nextn.")):
            found.add(layer[0])
    return found


def layers_of_kinds(header: Header, other: str) -> tuple[dict, dict]:
    """`Gguf.layers` of a family in which some layers have the type `other` instead of attention.

    The metadata become those of a model of attention alone, without a draft head."""
    key = "attention.head_count_kv"
    more = {}
    layers: int = header.value("block_count") - header.value("nextn_predict_layers", 0)
    changes: dict[str, Any] = {"block_count": layers}
    heads = header.raw(key)
    recurrent = header.value("attention.recurrent_layers")
    if isinstance(heads, list) and not all(heads):  # 0 for layers of the other type
        recurrent = [not count for count in heads]
        full = next(filter(None, heads), 0)
        changes[key] = [count or full for count in heads[:layers]]
    if recurrent:
        more["layer_types"] = [other if is_other else LAYER_TYPES[0] for is_other in recurrent[:layers]]
    return changes, more

AFTER_ATTENTION = {"ffn_norm": ("blk.{}.post_attention_norm.weight",)}  # some call the norm before ffn so

# our tensor (of layer {}, where it is not one of GGUF_ONCE) -> the GGUF file's
GGUF_ONCE = "token_embd", "output.", "output_norm", "position_embd", "token_types", "per_layer_"
GGUF_NAMES = {
    "embed": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight",
    "positions": "position_embd.weight", "types": "token_types.weight",
    "embed_norm": "token_embd_norm.weight",
    "attention_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight", "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight", "sinks": "attn_sinks.weight",
    "qkv": "attn_q.weight attn_k.weight attn_v.weight",
    "output": "attn_output.weight", "output_norm": "post_attention_norm.weight",
    "gate_up": "ffn_gate.weight ffn_up.weight", "up": "ffn_up.weight", "down": "ffn_down.weight",
    "down_norm": "post_ffw_norm.weight", "router": "ffn_gate_inp.weight", "correction_bias": "exp_probs_b",
    "expert_gate_up": "ffn_gate_exps.weight ffn_up_exps.weight", "expert_up": "ffn_up_exps.weight",
    "expert_down": "ffn_down_exps.weight",
    "shared_gate_up": "ffn_gate_shexp.weight ffn_up_shexp.weight", "shared_down": "ffn_down_shexp.weight",
    "shared_gate": "ffn_gate_inp_shexp.weight", "mix_in": "ssm_in.weight", "taps": "ssm_conv1d.weight",
    "decay": "ssm_a", "skip": "ssm_d", "mix_norm": "ssm_norm.weight", "mix_out": "ssm_out.weight",
    "layer_embed": "per_layer_token_embd.weight", "layer_project": "per_layer_model_proj.weight",
    "layer_project_norm": "per_layer_proj_norm.weight",
    "input_gate": "inp_gate.weight", "input_out": "proj.weight", "input_norm": "post_norm.weight",
    "experts_norm": "pre_ffw_norm_2.weight", "experts_down_norm": "post_ffw_norm_2.weight",
    "shared_down_norm": "post_ffw_norm_1.weight"}
GGUF_WHOLE = {"qkv": "attn_qkv.weight", "gate_up": "ffn_up.weight"}  # where it is one matrix
for names in (GGUF_NAMES, GGUF_WHOLE):
    names |= {f"{ours}_bias": theirs.replace(".weight", ".bias") for ours, theirs in names.items()
              if ".weight" in theirs}


def both(tensors: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Rows like those of HF_TENSORS for the weights and the biases of these modules."""
    return {ours + ending: (f"{theirs}.{part}",) for ours, theirs in tensors.items()
            for ending, part in (("", "weight"), ("_bias", "bias"))}
