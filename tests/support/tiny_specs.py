"""Tiny models of every family and shape: those of transformers, nanochat's, encoders, towers, draft heads, models that see, ranks, stages."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import encoders
import nomic_experts
from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.norms import LayerNorm, RmsNorm
from chatlm.worker.weights.formats.draft_heads import head_blocks
from chatlm.worker.weights.formats.folder.description import hf_blocks
from chatlm.worker.weights.formats.nanochat.generations import GENERATIONS, nanochat_model
from chatlm.worker.weights.loaded.shards import layers_of, refuse_ranks
from chatlm.worker.weights.towers.families import gemma4_layer, siglip_layer, tower
from attention_kinds import blocks_of
from families import GROWING, MODELS, tiny_config

ODD = {1, 2, 3, 5, 8, 10, 17, 18, 20, 24, 40, 48}
NO_SIZES = ("_token_id", "num_hidden_layers", "max_position_embeddings", "n_positions", "chunk_size_feed_forward", "mamba_chunk_size")
NANOCHAT = dict(vocab_size=256, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, sequence_len=256, window_pattern="SSL")


def spec_of(config, context=None):
    """What a folder with this config.json is read as."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return hf_blocks(path, context)[1]


def family_config(name, **changes):
    return tiny_config(name, **changes).to_dict() | {"model_type": MODELS[name][0]}


@functools.cache
def family_spec(name):
    return spec_of(family_config(name))


def odd_specs(name):
    """(the key that differs, the spec or None if no such model exists), of a family at unpublished sizes."""
    config = family_config(name)
    for key, value in config.items():
        if type(value) is not int or key.endswith(NO_SIZES):
            continue
        for size in sorted(ODD | {value + 1, 3 * value} - {value}):
            try:
                yield f"{key}={size}", spec_of(config | {key: size})
            except ConfigError:
                yield f"{key}={size}", None


@functools.cache
def tiny_model(name):
    """The blocks of one of SHAPES."""
    return blocks_of(SHAPES[name]())


def encoder_spec(name):
    import transformers
    kind, own = encoders.MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**encoders.SIZES, **own})
    return spec_of(config.to_dict() | {"model_type": kind})


def tower_model(clamped=None):
    """The tower of Gemma 4, or if `clamped` is None one like SigLIP's."""
    if clamped is None:
        norm = LayerNorm(1e-6, bias=True)
        layer = siglip_layer(4, 16, 96, norm, "gelu_tanh", Rope(0))
        return tower(64, 64, (layer, layer), norm)
    layer = gemma4_layer(4, 2, 16, 96, 1e-5, 100.0, clamped)
    return tower(64, 64, (layer, layer), layer.ffn_norm)


def with_post_norms(model):
    """The same model with norms of what its blocks add."""
    norm = RmsNorm(1e-3)
    return replace(model, layers=tuple(replace(layer, output_norm=norm, down_norm=norm) for layer in model.layers))


SIGHT = {       # family -> what differs where it sees
    "gemma3": dict(two_sided="all"), "gemma4": dict(two_sided="windows", pad=0), "gemma4moe": dict(two_sided="windows"),
    "qwen3": dict(deep_rows=2, rope_axes=(3, 3, 2)), "qwen3.5": dict(rope_axes=(3, 3, 2)), "lfm2": {}, "llama3.2": {}}

ODD_SHAPES = {  # families whose sizes decode_core pads
    "qwen3": dict(hidden_size=72, head_dim=20, intermediate_size=90), "gemma3": dict(hidden_size=72, head_dim=36, intermediate_size=90),
    "gpt-oss": dict(hidden_size=72, head_dim=24, intermediate_size=90), "qwen2moe": dict(hidden_size=72, moe_intermediate_size=40, shared_expert_intermediate_size=50),
    "cohere": dict(hidden_size=72, intermediate_size=90), "olmo2": dict(hidden_size=72, intermediate_size=90), "lfm2": dict(hidden_size=72, num_key_value_heads=4),
    "granite4h": dict(shared_intermediate_size=50), "qwen3.5": dict(head_dim=40, intermediate_size=90),
    "nemotron3": dict(head_dim=20, moe_shared_expert_intermediate_size=90)}


def made_of_others():
    """name -> a function that makes the spec or the blocks, of all that have no config of their own."""
    made = {f"gen{number}": functools.partial(nanochat_model, NANOCHAT | {"short_seq_len": None}, number, 15.0) for number in GENERATIONS}
    made |= {f"encoder {name}": functools.partial(encoder_spec, name) for name in encoders.MODELS}
    made["encoder nomic-moe"] = lambda: spec_of(nomic_experts.CONFIG)
    made |= {"tower siglip": tower_model, "tower gemma4": lambda: tower_model(False), "tower gemma4 clamped": lambda: tower_model(True)}
    for name in ("qwen3.5", "qwen3.5moe", "qwen3next"):
        made[f"{name} draft head"] = lambda name=name: head_blocks(family_spec(name), None)
    for name in ("qwen3.5moe", "qwen3next"):
        made[f"{name} dense draft head"] = lambda name=name: head_blocks(family_spec(name), 96)
    made |= {f"{name} sees": lambda name=name, own=own: family_spec(name).with_sight(**own) for name, own in SIGHT.items()}
    made["llama3.1 embeds"] = lambda: replace(family_spec("llama3.1"), waits=True)
    made |= {f"{name} odd": lambda name=name, own=own: spec_of(family_config(name) | own) for name, own in ODD_SHAPES.items()}
    made["granite post norms"] = lambda: with_post_norms(family_spec("granite"))
    made["ministral3 growing"] = lambda: spec_of(family_config("ministral3", rope_parameters=GROWING), 512)
    return made


SHAPES = {name: functools.partial(family_spec, name) for name in MODELS} | made_of_others()


# ---- parts of models

def is_divided(model):
    """Can ranks and stages share it? Towers, encoders, draft heads and models that see are whole."""
    return not (model.of_texts or model.joins or model.sees)


def rank_model(model, rank, tp, block=16):
    """The share of a rank; ConfigError if it cannot be divided so."""
    refuse_ranks(model, tp, block)
    return model.of_rank(rank, tp, block)[0]


def stage_of(model, stage, stages):
    return model.of_layers(layers_of(model, stage, stages))
