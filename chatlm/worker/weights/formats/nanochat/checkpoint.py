"""nanochat's checkpoints, of every generation."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, lack_of_memory, error_text, shown
from chatlm.common.files import MOST_OBJECT, parse_json, read_small, truncated
from chatlm.common.hub.nanochat_checkpoints import checkpoint_at, meta_of, nanochat_tokenizers
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import NANOCHAT_CHAT_TOKENS
from chatlm.worker.weights.files.torch_file import PlainUnpickler, load_checkpoint
from chatlm.worker.weights.formats.checkpoint import CheckpointModel, plain_state
from chatlm.worker.weights.formats.nanochat.generations import (
    GENERATIONS, NANOCHAT_KEYS, NANOCHAT_TENSORS, names_in_adapters, nanochat_model)
from chatlm.worker.weights.rules import MOST_TOKENS, Rule, check_divides, checked
from chatlm.worker.weights.text.trial import refuse_endless

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource


def read_nanochat_model(source: ModelSource, settings: Settings) -> CheckpointModel:
    config = read_nanochat_config(source.path)
    text = read_nanochat_tokenizer(source.path, config["vocab_size"])
    checkpoint = checkpoint_at(source.path)  # all sources have the tokens of a chat
    text = replace(text, base=checkpoint is not None and checkpoint.place.stage == "base")
    state = plain_state(source.path, load_checkpoint(source.path))
    number = nanochat_generation(state)
    model = nanochat_model(config, number, settings.softcap or 15.0)
    padded = max(model.vocab_size, len(state.get("transformer.wte.weight", ())))
    title = f"nanochat generation {number} ({GENERATIONS[number].since})"
    return CheckpointModel(source, "nanochat", title, model, NANOCHAT_TENSORS, padded, state, text,
                           names_in_adapters)


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
