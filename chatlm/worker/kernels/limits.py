"""What decode_core cannot compute of a model, and what torch then computes instead."""

from __future__ import annotations

from typing import Any, NamedTuple

from chatlm.worker.arrays.kinds import Device
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.experts import Experts, ExpertsBesideDense
from chatlm.worker.model.blocks.extras import LayerInput
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import LayerNorm
from chatlm.worker.model.tensors import TILE_ROWS


def left_to_torch(model: Model, device) -> list[str]:
    """In words, the ops that torch computes on this device while decode_core computes the others."""
    ops = dict.fromkeys(mixer.title for mixer in model.mixers if mixer)
    if any(experts.router.kind == "sigmoid" for experts in feeds_of(model, Experts)):
        ops["router of sigmoids"] = None
    routers = [experts.router for experts in feeds_of(model, Experts)]
    if any(router.kind == "softmax" and router.correction_bias for router in routers):
        ops["router with a bias"] = None
    if any(isinstance(attn, Attention) and attn.gates for attn in model.attentions):
        ops["gates of heads"] = None
    if any(isinstance(attn, Mla) and attn.scores.growth for attn in model.attentions):
        ops["scale of queries by their position"] = None
    return list(ops) if Device(device).type != "cpu" else []


class Most(NamedTuple):
    """The largest sizes that decode_core's kernels accept, as its `cpu` and `cuda` halves check them."""

    head_size: int
    group: int          # query heads per KV head
    experts: int
    chosen: int         # experts per token
    vocabulary: int


MOST_ON_CPU = Most(head_size=512, group=16, experts=4096, chosen=64, vocabulary=2**31)
MOST_ON_GPU = Most(head_size=256, group=64, experts=1024, chosen=1024, vocabulary=2**18)


MOST_LATENT = 576  # numbers that a token keeps of latent attention
MOST_LATENT_VALUE = 512  # of which so many are the value; on a GPU


def feeds_of(model: Model, *kinds: type) -> list[Any]:
    """The feed-forward blocks of these kinds, including the experts that all tokens take."""
    feeds = [layer.feed for layer in model.layers if layer.feed]
    feeds += [feed.shared for feed in feeds if isinstance(feed, Experts) and feed.shared]
    feeds += [feed.dense for feed in feeds if isinstance(feed, ExpertsBesideDense)]
    return [feed for feed in feeds if isinstance(feed, kinds)]


def layer_inputs_of(model: Model) -> list[LayerInput]:
    return [extra for layer in model.layers for extra in layer.after if isinstance(extra, LayerInput)]


def not_compiled(model: Model, device="cpu") -> str:
    """In words, what decode_core cannot compute of a model on this device; then torch computes all of it.

    Nothing else is refused: tests/worker/model/test_odd_sizes.py tries every dimension."""
    on_gpu = Device(device).type != "cpu"
    refused = refused_on_gpu(model) if on_gpu else refused_on_cpu(model.padded())
    features = refused_anywhere(model if on_gpu else model.padded(), MOST_ON_GPU if on_gpu else MOST_ON_CPU)
    return " and ".join(feature for feature, needed in (features | refused).items() if needed)


def refused_anywhere(model: Model, most: Most) -> dict[str, bool]:
    attentions = [attn for attn in model.attentions if isinstance(attn, Attention)]
    experts = feeds_of(model, Experts, ExpertsBesideDense)
    return {
        **{mixer.title: True for mixer in model.mixers if mixer and not mixer.compiled},
        "heads of this size": any(
            attn.head_size % 16 or attn.head_size > most.head_size for attn in attentions),
        "this many query heads per KV head": any(
            attn.heads > most.group * attn.kv_heads for attn in attentions),
        "this many experts": any(
            each.count > most.experts or each.router.chosen > most.chosen for each in experts),
        "vocabulary of this size": model.vocab_size > most.vocabulary,
        "attention whose keys and values differ in width": any(
            attn.value_size != attn.head_size for attn in attentions)}


def refused_on_cpu(model: Model) -> dict[str, bool]:
    """What a CPU cannot compute. The model is padded already."""
    feeds = feeds_of(model, FeedForward, Experts, ExpertsBesideDense)
    experts = feeds_of(model, Experts)
    latents = [attn for attn in model.attentions if isinstance(attn, Mla)]
    return {
        "latent attention of these sizes": any(
            attn.head_size > MOST_LATENT or size % 16 for attn in latents
            for size in (attn.kept, attn.turned, attn.plain, attn.head_values, attn.query_width)),
        "embedding of each layer with a width not a multiple of 16": any(
            extra.size % 16 for extra in layer_inputs_of(model)),
        "width that is not a multiple of 16": model.width % 16 != 0,
        "experts that read a width not a multiple of 16": any(each.latent % 16 for each in experts),
        "delta rule with head sizes that are not multiples of 16": any(
            isinstance(mixer, DeltaRule) and (mixer.key_size % 16 or mixer.value_size % 16)
            for mixer in model.mixers),
        "Mamba layer whose heads or channels are not multiples of 16": any(
            isinstance(mixer, Mamba2) and (mixer.head_size % 16 or mixer.parts[1] % 16)
            for mixer in model.mixers),
        "feed-forward of this width": any(feed.width % TILE_ROWS for feed in feeds)}


ONLY_ON_CPU = ("gelu", "reglu2", "quick_geglu", "gelu_erf", "gelu_tanh", "gelu_quick")  # activations


def refused_on_gpu(model: Model) -> dict[str, bool]:
    attentions = model.attentions
    norms = [norm for layer in model.layers for norm in layer.norms.values()]
    dense = feeds_of(model, FeedForward)
    experts = feeds_of(model, Experts, ExpertsBesideDense)
    latents = [each.latent for each in experts if isinstance(each, Experts)]
    mlas = [attn for attn in attentions if isinstance(attn, Mla)]
    activations = dict.fromkeys(feed.activation for feed in (*dense, *feeds_of(model, Experts)))
    return {
        "latent attention of these sizes on a GPU": any(
            attn.head_size > MOST_LATENT or attn.kept > MOST_LATENT_VALUE or size % 16
            for attn in mlas for size in (attn.kept, attn.turned)),
        "norm of all heads together on a GPU": any(attn.norms and attn.norms.whole for attn in attentions),
        "LayerNorm of heads on a GPU": any(
            isinstance(attn, Attention) and attn.norms and attn.norms.centred for attn in attentions),
        "bounds of queries and keys on a GPU": any(
            isinstance(attn, Attention) and attn.clip for attn in attentions),
        "embedding of each layer on a GPU": bool(layer_inputs_of(model)),
        "scale of experts on a GPU": any(isinstance(each, ExpertsBesideDense) for each in experts),
        "scale of queries by their position on a GPU": any(
            isinstance(attn, Attention) and attn.scores.growth for attn in attentions),
        "experts of this width": bool(experts) and any(
            size % 8 for size in (model.width, *latents, *(each.width for each in experts))),
        "attention of several kinds on a GPU": not uniform(model),
        "LayerNorm on a GPU": any(isinstance(norm, LayerNorm) for norm in (*norms, model.norm)),
        "attention to what comes after a token on a GPU": model.of_texts,
        "router with jitter on a GPU": any(
            each.router.kind == "jitter" for each in experts if isinstance(each, Experts)),
        "learned positions on a GPU": isinstance(model.input, Input) and model.input.positions > 0,
        **{f"{activation} feed-forward on a GPU": activation in ONLY_ON_CPU for activation in activations},
        "feed-forward of this width": bool(experts) and any(feed.width % TILE_ROWS for feed in dense)}


def uniform(model: Model) -> bool:
    """Does every attention layer cache the same sizes, and read no other layer's keys and values?"""
    kinds = {(attn.heads, attn.kv_heads, attn.head_size, attn.value_norm, attn.values_from_keys, attn.source)
             for attn in model.attentions}
    return all(kind[3:] == (False, False, None) for kind in kinds) and len(kinds) <= 1
