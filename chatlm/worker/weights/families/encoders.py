"""Families that embed whole texts: BERT (MiniLM, bge, e5), RoBERTa and XLM-RoBERTa (bge-m3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from chatlm.worker.model.blocks.model import DISTANCE_BUCKETS
from chatlm.worker.weights.families.family import Family, Gguf, Header
from chatlm.worker.weights.families.family import ACTIVATIONS, both
from chatlm.worker.weights.families.layernorms import BIASES, EPSILON, gguf_epsilon
from chatlm.worker.weights.rules import Rule

if TYPE_CHECKING:
    import numpy

# x = norm(x + attention x); x = norm(x + feed-forward x); the first x is a norm of the sum of embeddings
AFTER_SUMS = {"of_texts": True, "layer_norms": True, "norm_biases": True, "pre_norms": False,
              "sum_norms": True, "input_norm": True, **BIASES}
BERT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2,
        "position_embedding_type": "absolute"} | dict.fromkeys(
            """directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
            pooler_size_per_head pooler_type""".split())  # of a head that is not used
BERT_KEYS = {"layer_norm_eps": EPSILON, "type_vocab_size": Rule(int, 0, 1 << 10),
             "position_embedding_type": Rule(str, choices=("absolute",))}
BERT_TENSORS = both({
    "embed": "embeddings.word_embeddings", "embed_norm": "embeddings.LayerNorm",
    "positions": "embeddings.position_embeddings", "types": "embeddings.token_type_embeddings",
    **{ours: f"encoder.layer.{{}}.{theirs}" for ours, theirs in (
        ("output", "attention.output.dense"), ("output_norm", "attention.output.LayerNorm"),
        ("up", "intermediate.dense"), ("down", "output.dense"), ("down_norm", "output.LayerNorm"))}}) | {
    f"qkv{ending}": tuple(f"encoder.layer.{{}}.attention.self.{name}.{part}"
                          for name in ("query", "key", "value"))
    for ending, part in (("", "weight"), ("_bias", "bias"))}
# heads for tasks that this server does not have, and those of rerankers, which are read apart
HEADS = r"(cls|pooler|classifier|lm_head|qa_outputs|head|decoder)\."


def repack_bert(state: Mapping[str, numpy.ndarray], unused: int = 0) -> dict[str, numpy.ndarray]:
    """The encoder's tensors under today's names. `unused`: how many rows of the table of positions come
    before the first token's."""
    names = {name: re.sub(r"^(bert|roberta|xlm_roberta|mpnet)\.", "", name) for name in state}
    for name, ours in names.items():
        names[name] = re.sub(r"\.(gamma|beta)$", lambda old: {"gamma": ".weight", "beta": ".bias"}[old[1]],
                             ours)
    kept = {ours: state[name] for name, ours in names.items() if not re.match(HEADS, ours)}
    if unused and (name := "embeddings.position_embeddings.weight") in kept:
        kept[name] = kept[name][unused:]
    return kept


def repack_roberta(state: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    return repack_bert(state, UNUSED)


UNUSED = 2  # a RoBERTa's first token has the position after that of the padding, which is 1


def fields_of(config: Mapping, unused: int = 0) -> dict:
    positions = config["max_position_embeddings"] - unused
    return {"rope_size": 0, "positions": positions, "max_positions": positions,
            "token_types": config["type_vocab_size"]}


def gguf_bert(header: Header) -> tuple[dict, dict]:
    """The epsilon of its norms, and how many types of tokens its table has."""
    changes, _ = gguf_epsilon(header)
    types = header.stored.get("token_types.weight")
    return changes, {"type_vocab_size": 0 if types is None else int(types.shape[1])}


NAMES_AFTER_SUMS = {
    f"{ours}{ending}": (f"blk.{{}}.{theirs}.{part}",) for ending, part in (("", "weight"), ("_bias", "bias"))
    for ours, theirs in (("output_norm", "attn_output_norm"), ("down_norm", "layer_output_norm"))}


def gguf(architecture: str, layers: Callable = gguf_bert) -> Gguf:
    return Gguf(architecture, names=NAMES_AFTER_SUMS, keys={"attention.layer_norm_epsilon": EPSILON},
                layers=layers)


ROBERTA = Family(
    "RoBERTa", BERT | {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1}, AFTER_SUMS,
    BERT_TENSORS, keys={**BERT_KEYS, "pad_token_id": Rule(int, UNUSED - 1, UNUSED - 1)},
    repack=repack_roberta, activations=ACTIVATIONS, aliases={"layer_norm_eps": "rms_norm_eps"},
    fields_of=lambda path, config: fields_of(config, UNUSED))
MPNET_TENSORS = BERT_TENSORS | both({
    ours: f"encoder.layer.{{}}.attention.{theirs}" for ours, theirs in (
        ("output", "attn.o"), ("output_norm", "LayerNorm"))}) | {
    f"qkv{ending}": tuple(f"encoder.layer.{{}}.attention.attn.{name}.{part}" for name in "qkv")
    for ending, part in (("", "weight"), ("_bias", "bias"))} | {
    "buckets": ("encoder.relative_attention_bias.weight",)}
FAMILIES = {
    "bert": Family(
        "BERT", BERT, AFTER_SUMS, BERT_TENSORS, keys=BERT_KEYS,
        repack=repack_bert, activations=ACTIVATIONS, aliases={"layer_norm_eps": "rms_norm_eps"},
        fields_of=lambda path, config: fields_of(config), gguf=gguf("bert")),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA._replace(title=""),
    "mpnet": ROBERTA._replace(
        title="MPNet", fields=AFTER_SUMS | {"distance_buckets": True},
        config=ROBERTA.config | {"type_vocab_size": 0, "relative_attention_num_buckets": DISTANCE_BUCKETS},
        keys={**ROBERTA.keys,
              "relative_attention_num_buckets": Rule(int, DISTANCE_BUCKETS, DISTANCE_BUCKETS)},
        tensors=MPNET_TENSORS)}
