"""nanochat's checkpoints, of every generation."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, lack_of_memory, error_text, shown
from chatlm.common.files import MOST_OBJECT, parse_json, read_small, truncated
from chatlm.common.hub.nanochat_checkpoints import checkpoint_at, meta_of, nanochat_tokenizers
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import NANOCHAT_CHAT_TOKENS
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, HeadNorms, Scores, ValueEmbed
from chatlm.worker.model.blocks.extras import Keep, Lambdas
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input, Smear
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.checkpoint_model import CheckpointModel, plain_state
from chatlm.worker.weights.recipe import ModelSpec
from chatlm.worker.weights.rules import (
    MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS, Rule, check_divides, checked)
from chatlm.worker.weights.torch_file import PlainUnpickler, load_checkpoint
from chatlm.worker.weights.trial import refuse_endless

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource


class Generation(NamedTuple):
    """What sets one version of upstream's gpt.py apart (git log -p nanochat/gpt.py)."""

    since: str
    short_window: Callable[[int], int] = lambda length: length // 2  # where model_config does not state it
    has_windows: bool = True
    rope_base: float = 10_000.0
    rope_bfloat16: bool = False
    mixes_x0: bool = True           # into x, before each layer
    value_gate: tuple[int, float] | None = None  # of value embeddings: the channels it reads, and its scale
    qk_scale: float = 1.0
    smear_channels: int = 0         # > 0: of the gate of the previous token's embedding
    backs_out: bool = False         # x of the middle is subtracted at the end


GENERATIONS = {
    1: Generation("2025-10", has_windows=False, rope_bfloat16=True, mixes_x0=False),
    2: Generation("2026-01-11", rope_bfloat16=True),
    3: Generation("2026-01-17", rope_bfloat16=True, value_gate=(32, 2.0)),
    4: Generation("2026-03-09", lambda length: -(-length // 3 // 128) * 128, rope_base=100_000.0,
                  value_gate=(12, 3.0), qk_scale=1.15),
    5: Generation("2026-03-14", lambda length: -(-length // 4 // 128) * 128, rope_base=100_000.0,
                  value_gate=(12, 3.0), qk_scale=1.2, smear_channels=24, backs_out=True),
    # upstream's branch experiment_refactor (pull request 800); its model_config states the short window
    6: Generation("2026-09", rope_base=100_000.0, value_gate=(12, 3.0), qk_scale=1.2, backs_out=True),
}


def read_nanochat_model(source: ModelSource, settings: Settings) -> CheckpointModel:
    config = read_nanochat_config(source.path)
    text = read_nanochat_tokenizer(source.path, config["vocab_size"])
    checkpoint = checkpoint_at(source.path)  # all sources have the tokens of a chat
    text = replace(text, base=checkpoint is not None and checkpoint.place.stage == "base")
    state = plain_state(source.path, load_checkpoint(source.path))
    number = nanochat_generation(state)
    spec = nanochat_spec(config, number, settings.softcap or 15.0)
    padded = max(spec.vocab_size, len(state.get("transformer.wte.weight", ())))
    title = f"nanochat generation {number} ({GENERATIONS[number].since})"
    return CheckpointModel(source, "nanochat", title, spec, NANOCHAT_TENSORS, padded, state, text,
                           names_in_adapters)


NANOCHAT_KEYS = {  # of model_config
    "sequence_len": Rule(int, 16, MOST_POSITIONS), "vocab_size": Rule(int, 1, MOST_TOKENS),
    "n_layer": Rule(int, 1, MOST_LAYERS), "n_head": Rule(int, 1, MOST_HEADS),
    "n_kv_head": Rule(int, 1, MOST_HEADS), "n_embd": Rule(int, 2, MOST_CHANNELS),
    "window_pattern": Rule(str, optional=True), "short_seq_len": Rule(int, 1, MOST_POSITIONS, optional=True)}


def read_nanochat_config(model_path: Path) -> dict:
    """The `model_config` of the meta_<step>.json beside the checkpoint, checked."""
    path = meta_of(model_path)
    try:
        data = read_small(path, MOST_OBJECT)
    except ConfigError as error:
        raise ConfigError(f"{error}; it must be next to {model_path.name}") from None
    try:
        stated = dict(parse_json(path, data)["model_config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a nanochat meta file: {error_text(error)}") from None
    if unknown := [key for key in stated if key not in NANOCHAT_KEYS]:
        known = ", ".join(NANOCHAT_KEYS)
        raise ConfigError(f"{path}: model_config has the key {shown(unknown[0])}; known are {known}")
    config = {key: checked(path, f"model_config.{key}", stated.get(key), rule)
              for key, rule in NANOCHAT_KEYS.items()}
    pattern = (config["window_pattern"] or "L").upper()
    if set(pattern) - set("SL"):
        raise ConfigError(f"{path}: model_config.window_pattern is {shown(pattern)}; it must be of S and L")
    check_divides(path, "model_config.n_embd", config["n_embd"], 2 * config["n_head"], "2 * n_head")
    check_divides(path, "model_config.n_head", config["n_head"], config["n_kv_head"], "n_kv_head")
    return config | {"window_pattern": pattern}


def nanochat_generation(state: Mapping[str, numpy.ndarray]) -> int:
    """The checkpoint's generation, recognized by its keys and the gate's width.

    `check_names_and_shapes` later reports the keys that do not belong to it."""
    gates = {tensor.shape[-1:] for name, tensor in state.items() if name.endswith("ve_gate.weight")}
    if any(name.startswith("smear_") for name in state):
        return 5
    if "backout_lambda" in state:
        return 6
    if gates or any(name.startswith("value_embeds.") for name in state):
        return 3 if (32,) in gates else 4
    return 2 if "resid_lambdas" in state or "x0_lambdas" in state else 1


SCORED_LENGTHS = 10  # upstream's rotary tables have so many times sequence_len


def nanochat_spec(config: Mapping, number: int, softcap: float) -> ModelSpec:
    generation = GENERATIONS[number]
    length = config["sequence_len"]
    C = config["n_embd"]
    recipe = ModelSpec(
        vocab_size=config["vocab_size"], layers=config["n_layer"], width=C, heads=config["n_head"],
        kv_heads=config["n_kv_head"], head_size=C // config["n_head"], ffn_size=4 * C,
        max_positions=SCORED_LENGTHS * length, answer_positions=length,
        norm_eps=1.1920929e-07,  # torch's default for rms_norm in float32
        norm_weights=False, softcap=softcap)
    windows = windows_of(config, generation)
    return replace(recipe, own_input=input_of(generation, recipe),
                   own_layers=layers_of(generation, recipe, windows))


def windows_of(config: Mapping, generation: Generation) -> list[int]:
    """The window of each layer. Upstream's window of W covers the token itself and W tokens before it. The
    last layer has the long one."""
    L = config["n_layer"]
    length = config["sequence_len"]
    pattern = config["window_pattern"]
    if not generation.has_windows:
        return [0] * L
    short = config["short_seq_len"] or generation.short_window(length)
    is_short = [pattern[layer % len(pattern)] == "S" and layer < L - 1 for layer in range(L)]
    return [short + 1 if each else length + 1 for each in is_short]


def input_of(generation: Generation, recipe: ModelSpec) -> Input:
    """x0: the norm of the embedding. Smeared, it has a part of the previous token's too."""
    norm = RmsNorm(recipe.norm_eps, weights=False)
    smear = None
    if generation.smear_channels:
        smear = Smear(generation.smear_channels, norm)
    return Input(norm=norm, smear=smear, keeps=generation.mixes_x0)


def layers_of(generation: Generation, recipe: ModelSpec, windows: list[int]) -> tuple[Layer, ...]:
    """Norms have no weights. Every second layer, counted from the last one, adds an embedding of the token to
    its values. x of the middle layer is kept for the end."""
    H = recipe.heads
    Hkv = recipe.kv_heads
    D = recipe.head_size
    L = recipe.layers
    norm = RmsNorm(recipe.norm_eps, weights=False)
    rope = Rope(D, generation.rope_base, direction=-1, bfloat16=generation.rope_bfloat16)
    head_norms = HeadNorms("after_rope", recipe.norm_eps, weights=False)
    feed = FeedForward(recipe.ffn_size, "relu2")
    layers = []
    for number, window in enumerate(windows):
        embed = None
        if generation.value_gate and number % 2 == (L - 1) % 2:
            embed = ValueEmbed(recipe.vocab_size, *generation.value_gate)
        scores = Scores(qk_scale=generation.qk_scale, window=window)
        attention = Attention(H, Hkv, D, D, rope, scores, head_norms, embed=embed)
        is_kept = generation.backs_out and number == L // 2
        layers.append(Layer(
            attention, feed, attention_norm=norm, ffn_norm=norm,
            before=(Lambdas(),) if generation.mixes_x0 else (), after=(Keep(),) if is_kept else ()))
    return tuple(layers)


NANOCHAT_TENSORS = {  # our tensor (of layer {}) -> upstream's tensors whose rows it is made of
    "qkv": ("transformer.h.{}.attn.c_q.weight", "transformer.h.{}.attn.c_k.weight",
            "transformer.h.{}.attn.c_v.weight"),
    "output": ("transformer.h.{}.attn.c_proj.weight",), "up": ("transformer.h.{}.mlp.c_fc.weight",),
    "down": ("transformer.h.{}.mlp.c_proj.weight",), "ve_gate": ("transformer.h.{}.attn.ve_gate.weight",),
    "value_embed": ("value_embeds.{}.weight",), "embed": ("transformer.wte.weight",),
    "head": ("lm_head.weight",), "smear_gate": ("smear_gate.weight",)}
IN_TRANSFORMERS = {  # upstream's modules -> their names in transformers' NanoChat; adapters use either
    "transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def names_in_adapters(name: str, shape: tuple[int, ...]) -> Seq[str]:
    """How adapters may call a tensor. They cannot change vectors."""
    if len(shape) != 2:
        return ()
    return name, name_in_transformers(name)


def name_in_transformers(name: str) -> str:
    for upstream, theirs in IN_TRANSFORMERS.items():
        name = name.replace(upstream, theirs)
    return name


class TokenizerUnpickler(PlainUnpickler):
    """Loads tiktoken's Encoding as a plain namespace, and no other global."""

    owner = "nanochat tokenizer"

    def find_class(self, module: str, name: str):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return SimpleNamespace  # if the state is a string, tiktoken fetches the encoding of that name
        return super().find_class(module, name)


def read_encoding(data: bytes) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """(pattern, ranks, special tokens) of a pickled tiktoken Encoding. ValueError if two tokens share an id
    or a byte has none."""
    state = vars(TokenizerUnpickler(io.BytesIO(data)).load())
    ids = Rule(int, 0, MOST_TOKENS - 1)
    names = {"name", "pat_str", "mergeable_ranks", "special_tokens"}
    if set(state) != names or type(state["pat_str"]) is not str:
        raise ValueError(f"its state is {sorted(state)}, or the pattern is not text")
    pattern = state["pat_str"]
    ranks = state["mergeable_ranks"]
    specials = state["special_tokens"]
    for table, key_type in ((ranks, bytes), (specials, str)):
        if (type(table) is not dict or set(map(type, table)) != {key_type}
                or not ids.allows(list(table.values()))):
            raise ValueError(f"a table is not a dict of {key_type.__name__} to token ids, each {ids.allowed}")
    [(token, count)] = Counter([*ranks.values(), *specials.values()]).most_common(1)
    if count > 1:
        raise ValueError(f"{count} tokens have the id {token}; each must have its own")
    bytes_without_token = set(range(256)) - {token[0] for token in ranks if len(token) == 1}
    if bytes_without_token:
        raise ValueError(f"the byte {min(bytes_without_token)} has no token; each of the 256 must have one")
    return pattern, ranks, specials


def read_nanochat_tokenizer(model_path: Path, vocab_size: int) -> TextSpec:
    """The TextSpec from the checkpoint's tokenizer.pkl."""
    candidates = nanochat_tokenizers(model_path)
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise ConfigError(f"the tokenizer of {model_path} is missing; "
                          f"looked for {', '.join(map(str, candidates))}")
    data = read_small(path)
    try:
        pattern, ranks, specials = read_encoding(data)
    except Exception as error:  # a hostile or truncated pickle can raise nearly anything
        broken = ConfigError(f"{path} is not a tiktoken Encoding: {error_text(error)}")
        if isinstance(error, EOFError) or not data.endswith(pickle.STOP):
            broken = truncated(path, len(data), "and the pickle in it does not end")
        raise lack_of_memory(error) or broken from None
    missing = [name for name in NANOCHAT_CHAT_TOKENS if name not in specials]
    size = max([*ranks.values(), *specials.values()]) + 1
    if missing or size != vocab_size:
        raise ConfigError(f"{path} does not fit {model_path}: it has {size} tokens, the model {vocab_size}; "
                          f"missing special tokens: {', '.join(missing) or 'none'}")
    bos = specials["<|bos|>"]
    end = specials["<|assistant_end|>"]
    payload = json.dumps((pattern, {piece.decode("latin-1"): token for piece, token in ranks.items()},
                          specials)).encode()
    refuse_endless(path, TextSpec("nanochat", payload))
    return TextSpec("nanochat", payload, bos_token=bos, eos_token=end,
                    stop_tokens=frozenset((bos, end)), add_bos=True)
