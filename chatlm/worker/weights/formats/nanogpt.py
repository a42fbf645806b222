"""Checkpoints of nanoGPT, whose vocabulary is of characters or GPT-2's, and of build-nanogpt."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence as Seq
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, lack_of_memory, error_text, shown
from chatlm.common.files import read_small, read_text
from chatlm.common.hub.trainers import BUILD_NANOGPT, is_build_nanogpt
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import LayerNorm
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.files.torch_file import PlainUnpickler, StandIn, load_checkpoint
from chatlm.worker.weights.formats.checkpoint import CheckpointModel, plain_state, without_tied_head
from chatlm.worker.weights.formats.folder.description import hf_text
from chatlm.worker.weights.formats.folder.tensors import UNREAD
from chatlm.worker.weights.rules import (
    MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS, Rule, check_divides, checked,
    read_json)
from chatlm.worker.weights.text.trial import refuse_endless

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource

MODEL_ARGS = {
    "n_layer": Rule(int, 1, MOST_LAYERS), "n_head": Rule(int, 1, MOST_HEADS),
    "n_embd": Rule(int, 2, MOST_CHANNELS), "block_size": Rule(int, 16, MOST_POSITIONS),
    "vocab_size": Rule(int, 1, MOST_TOKENS), "bias": Rule(bool), "dropout": Rule(float, 0, 1)}
GPT2_TOKENS = 50_257
HEAD = "lm_head.weight"
BPE_FILES = ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")  # on the hub; by OpenAI


def read_nanogpt_model(source: ModelSource, settings: Settings) -> CheckpointModel:
    is_build = is_build_nanogpt(source.path)
    checkpoint = load_checkpoint(source.path, stand_ins=is_build)
    if is_build:
        args = build_args(source.path, checkpoint)
    else:
        args = model_args(source.path, checkpoint.get("model_args"), "model_args")
    state = own_tensors(source.path, checkpoint.get("model"))
    text = nanogpt_text(source.path, checkpoint.get("config"), args["vocab_size"])
    model = nanogpt_model(args, open_tokenizer(text).vocab_size, HEAD not in state,
                          "gelu_tanh" if is_build else "gelu_erf")
    trainer = BUILD_NANOGPT if is_build else "nanoGPT"
    names = FAMILIES["gpt2"].tensors | {"head": (HEAD,)}
    return CheckpointModel(source, "nanogpt", trainer, model, names, args["vocab_size"], state, text,
                           names_in_adapters)


def names_in_adapters(name: str, shape: tuple[int, ...]) -> Seq[str]:
    """How adapters may call a tensor. They cannot change the positions."""
    return () if ".wpe." in name else (name,)


def build_args(path: Path, checkpoint: Mapping) -> dict:
    """The sizes of a model, which build-nanogpt pickles as an object of its class GPTConfig. All its layers
    have biases."""
    config = checkpoint.get("config")
    stated = config.attributes if isinstance(config, StandIn) else {}
    plain = {str(name): value if isinstance(value, (int, float, str)) else type(value).__name__
             for name, value in stated.items()}
    return model_args(path, plain, "config")


def model_args(path: Path, stated, key: str) -> dict:
    """The sizes of a model, checked; `key` is where the file has them."""
    if not isinstance(stated, dict):
        raise ConfigError(f"{path} is not nanoGPT's: {key} is {shown(stated)}; it must be a dict")
    if unknown := [name for name in stated if name not in MODEL_ARGS]:
        raise ConfigError(f"{path}: {key} has the key {shown(unknown[0])}; known are "
                          f"{', '.join(MODEL_ARGS)}")
    args = {"bias": True, "dropout": 0.0} | stated
    args = {name: checked(path, f"{key}.{name}", args.get(name), rule) for name, rule in MODEL_ARGS.items()}
    check_divides(path, f"{key}.n_embd", args["n_embd"], 2 * args["n_head"], "2 * n_head")
    return args


def own_tensors(path: Path, state) -> dict[str, numpy.ndarray]:
    """The model's tensors, without masks and without a head that is the embedding."""
    if not isinstance(state, dict):
        raise ConfigError(f"{path}: model is {shown(state)}; it must be a state dict")
    own = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()
           if not re.match(UNREAD, str(name))}
    return plain_state(path, without_tied_head(own))


def nanogpt_model(args: Mapping, vocab_size: int, tied: bool, activation: str) -> Model:
    """GPT-2's blocks: LayerNorms, and positions from a table. `vocab_size` is the tokenizer's. Rows beyond it
    are padding, whose ids are never drawn."""
    C = args["n_embd"]
    H = args["n_head"]
    D = C // H
    positions = args["block_size"]
    biased = args["bias"]
    norm = LayerNorm(1e-5, biased)
    attention = Attention(H, H, D, D, Rope(0), biases=("qkv", "output") if biased else ())
    layer = Layer(attention, FeedForward(4 * C, activation, biased), attention_norm=norm, ffn_norm=norm)
    return Model(vocab_size, C, positions, Input(positions=positions), (layer,) * args["n_layer"], norm,
                 LmHead(tied))


def nanogpt_text(path: Path, config, vocab_size: int) -> TextSpec:
    """The tokenizer: meta.pkl beside the checkpoint, or in nanoGPT's data/<dataset> beside its folder. For
    GPT-2's vocabulary, its files beside the checkpoint."""
    folder = path.parent
    looked_for = [path.with_name("meta.pkl")]
    dataset = config.get("dataset") if isinstance(config, dict) else None
    if isinstance(dataset, str) and dataset not in ("", "..") and Path(dataset).name == dataset:
        looked_for.append(folder.parent / "data" / dataset / "meta.pkl")
    for meta in looked_for:
        if meta.exists():
            return fitting(meta, path, characters_of(meta), vocab_size)
    if (folder / "tokenizer.json").exists():
        return fitting(folder / "tokenizer.json", path, hf_text(folder, vocab_size), vocab_size)
    for vocabulary, merges in BPE_FILES:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            text = gpt2_text(folder / vocabulary, folder / merges)
            return fitting(folder / vocabulary, path, text, vocab_size)
    needs = "looked for " + ", ".join(map(str, looked_for))
    if vocab_size >= GPT2_TOKENS:
        needs = f"{folder} needs GPT-2's tokenizer.json, or its vocab.json and merges.txt"
    raise ConfigError(f"the tokenizer of {path} is missing: the model has {vocab_size:,} tokens; {needs}")


def fitting(path: Path, model: Path, text: TextSpec, vocab_size: int) -> TextSpec:
    """The text. ConfigError if the tokenizer at `path` has more tokens than the model."""
    if (size := open_tokenizer(text).vocab_size) > vocab_size:
        raise ConfigError(f"{path} does not fit {model}: it has {size:,} tokens, the model {vocab_size:,}")
    return text


class MetaUnpickler(PlainUnpickler):
    owner = "vocabulary of characters"


def characters_of(path: Path) -> TextSpec:
    """nanoGPT's vocabulary of characters. ConfigError if meta.pkl has anything but dict, str and int."""
    data = read_small(path)
    try:
        meta = MetaUnpickler(io.BytesIO(data)).load()
        ids, characters = (meta[key] for key in ("stoi", "itos"))
        if not are_each_others(ids, characters):
            raise ValueError("stoi does not give each of some characters one of the ids from 0 on, or itos "
                             "is another table")
        payload = json.dumps([characters[token] for token in range(len(ids))])
        "".join(ids).encode()
    except Exception as error:  # a hostile or truncated pickle can raise nearly anything
        raise lack_of_memory(error) or ConfigError(
            f"{path} is not nanoGPT's vocabulary of characters: {error_text(error)}") from None
    return TextSpec("characters", payload.encode())


def are_each_others(ids: Any, characters: Any) -> bool:
    """Does one table give each character an id, from 0 on, and the other each id its character?"""
    if not type(ids) is type(characters) is dict or set(map(type, ids)) != {str}:
        return False
    if set(map(len, ids)) != {1} or sorted(ids.values()) != [*range(len(ids))]:
        return False
    return characters == {token: character for character, token in ids.items()}


def gpt2_text(vocabulary: Path, merges: Path) -> TextSpec:
    """GPT-2's BPE from its two files, as a tokenizer.json."""
    tokens = read_json(vocabulary)
    end = "<|endoftext|>"
    ids = Rule(int, 0, MOST_TOKENS - 1)
    if not ids.allows(list(tokens.values())) or type(tokens.get(end)) is not int:
        raise ConfigError(f"{vocabulary} does not map tokens, {end} among them, to ids, each {ids.allowed}")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pairs = [line for line in read_text(merges).split("\n") if line and not line.startswith("#version")]
    special = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    payload = {"version": "1.0", "pre_tokenizer": level, "decoder": level,
               "added_tokens": [special | {"id": tokens[end], "content": end, "special": True}],
               "model": {"type": "BPE", "vocab": tokens, "merges": pairs}}
    text = TextSpec("hf", json.dumps(payload).encode(), stop_tokens=frozenset({tokens[end]}),
                    bos_token=tokens[end], eos_token=tokens[end])
    refuse_endless(vocabulary, text)
    return text
