"""Families that embed whole texts: BERT (MiniLM, bge, e5), RoBERTa and XLM-RoBERTa (bge-m3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.worker.model.blocks.experts import Experts
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import DISTANCE_BUCKETS, Model
from chatlm.worker.model.blocks.norms import LayerNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import Family, Gguf, Header
from chatlm.worker.weights.families.family import ACTIVATIONS, both
from chatlm.worker.weights.families.layernorms import ALL_BIASES, EPSILON, gguf_epsilon
from chatlm.worker.weights.rules import Rule

if TYPE_CHECKING:
    import numpy


def after_sums(facts: Facts, feeds: Seq[FeedForward | Experts], positions: int = 0,
               distances: bool = False) -> Model:
    """x = norm(x + attention x);  x = norm(x + feed-forward x). The first x is a norm too, of the sum of
    embeddings.

    positions: > 0: rows of a table, each added to the embedding
    distances: scores get a bias for each head and bucket of distances"""
    norm = LayerNorm(facts.eps, "norm" in facts.biases)
    layers = []
    for number, feed in enumerate(feeds):
        attention = facts.attention(number, sees="text", distances=distances)
        layers.append(Layer(attention, feed, output_norm=norm, down_norm=norm, norms_of_sums=True))
    first = Input(positions=positions, types=facts.config["type_vocab_size"], norm=norm)
    return facts.encoder(layers, None, first, facts.heads if distances else 0)


def bert(facts: Facts, unused: int = 0, distances: bool = False) -> Model:
    """Heads do not turn. `unused`: how many rows of the table of positions come before the first token's."""
    positions = facts.config["max_position_embeddings"] - unused
    facts = replace(facts, max_positions=positions, rope=replace(facts.rope, size=0))
    return after_sums(facts, [facts.feed(number) for number in facts.layers], positions, distances)


def roberta(facts: Facts) -> Model:
    return bert(facts, UNUSED)


def mpnet(facts: Facts) -> Model:
    return bert(facts, UNUSED, distances=True)


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
    "RoBERTa", BERT | {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1}, roberta,
    BERT_TENSORS, keys={**BERT_KEYS, "pad_token_id": Rule(int, UNUSED - 1, UNUSED - 1)},
    repack=repack_roberta, activations=ACTIVATIONS, aliases={"layer_norm_eps": "rms_norm_eps"},
    biases=lambda config: ALL_BIASES)
MPNET_TENSORS = BERT_TENSORS | both({
    ours: f"encoder.layer.{{}}.attention.{theirs}" for ours, theirs in (
        ("output", "attn.o"), ("output_norm", "LayerNorm"))}) | {
    f"qkv{ending}": tuple(f"encoder.layer.{{}}.attention.attn.{name}.{part}" for name in "qkv")
    for ending, part in (("", "weight"), ("_bias", "bias"))} | {
    "buckets": ("encoder.relative_attention_bias.weight",)}
FAMILIES = {
    "bert": Family(
        "BERT", BERT, bert, BERT_TENSORS, keys=BERT_KEYS,
        repack=repack_bert, activations=ACTIVATIONS, aliases={"layer_norm_eps": "rms_norm_eps"},
        biases=lambda config: ALL_BIASES, gguf=gguf("bert")),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA._replace(title=""),
    "mpnet": ROBERTA._replace(
        title="MPNet", model=mpnet,
        config=ROBERTA.config | {"type_vocab_size": 0, "relative_attention_num_buckets": DISTANCE_BUCKETS},
        keys={**ROBERTA.keys,
              "relative_attention_num_buckets": Rule(int, DISTANCE_BUCKETS, DISTANCE_BUCKETS)},
        tensors=MPNET_TENSORS)}
