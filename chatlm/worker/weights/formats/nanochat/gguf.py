"""nanochat's models in GGUF files, which `quantize` and `export` write: architectures nanochat1 to nanochat6.

The generation is in the architecture's name, because no key says what else differs. Only this program reads
such files. They lack the rows by which upstream pads the vocabulary. The tokenizer is there as its tokens in
GPT-2's letters, and the expression that cuts texts into words has a key of its own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import NANOCHAT_CHAT_TOKENS, byte_of_character
from chatlm.worker.weights.formats.checkpoint import CheckpointModel, in_the_same_order, whole_tensors
from chatlm.worker.weights.formats.gguf.file import check_gguf_types
from chatlm.worker.weights.formats.gguf.file_types import quantization_of
from chatlm.worker.weights.formats.gguf.tensors import GgufTensors, details_of, file_shape, growth
from chatlm.worker.weights.formats.nanochat.generations import (
    GENERATIONS, NANOCHAT_KEYS, NANOCHAT_TENSORS, names_in_adapters, nanochat_model)
from chatlm.worker.weights.formats.stored_model import AdapterTargets, Report, Storage
from chatlm.worker.weights.formats.tied_heads import Pair
from chatlm.worker.weights.rules import Rule, check_divides, checked
from chatlm.worker.weights.text.trial import refuse_endless

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.kernels.kernels import Backend
    from chatlm.worker.model.tensors import MappedRows, Unread
    from chatlm.worker.weights.changes import Change, Copy
    from chatlm.worker.weights.formats.sources import Sources

ARCHITECTURES = {f"nanochat{number}": number for number in GENERATIONS}
KEYS = {  # a key of model_config -> the metadata's, after the architecture
    "sequence_len": "context_length", "vocab_size": "vocab_size", "n_layer": "block_count",
    "n_head": "attention.head_count", "n_kv_head": "attention.head_count_kv", "n_embd": "embedding_length",
    "window_pattern": "attention.window_pattern", "short_seq_len": "attention.short_window"}
SOFTCAP = "final_logit_softcapping"
PATTERN = "tokenizer.nanochat.pattern"
# the types of tokens
NORMAL = 1
CONTROL = 3
UNUSED = 5

# upstream's tensor (of layer {}) -> its name in a GGUF file; others keep theirs
GGUF_NAMES: dict[str, str] = {
    "transformer.wte.weight": "token_embd.weight", "lm_head.weight": "output.weight",
    "transformer.h.{}.attn.c_q.weight": "blk.{}.attn_q.weight",
    "transformer.h.{}.attn.c_k.weight": "blk.{}.attn_k.weight",
    "transformer.h.{}.attn.c_v.weight": "blk.{}.attn_v.weight",
    "transformer.h.{}.attn.c_proj.weight": "blk.{}.attn_output.weight",
    "transformer.h.{}.attn.ve_gate.weight": "blk.{}.ve_gate.weight",
    "transformer.h.{}.mlp.c_fc.weight": "blk.{}.ffn_up.weight",
    "transformer.h.{}.mlp.c_proj.weight": "blk.{}.ffn_down.weight",
    "value_embeds.{}.weight": "blk.{}.value_embd.weight"}
UPSTREAM_NAMES = {theirs: upstream for upstream, theirs in GGUF_NAMES.items()}
TABLE: dict[str, tuple[str, ...]] = {
    ours: tuple(GGUF_NAMES[name] if name in GGUF_NAMES else name for name in names)
    for ours, names in NANOCHAT_TENSORS.items()}


def renamed(name: str, table: Mapping[str, str]) -> str:
    """A tensor's name in the other kind of file."""
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        return table.get(name, name)
    general = name.replace(number[0], ".{}.", 1)
    return table.get(general, general).format(number[1])


def gguf_name(upstream: str) -> str:
    return renamed(upstream, GGUF_NAMES)


def adapters_call(name: str, shape: tuple[int, ...]) -> Seq[str]:
    """How adapters may call a tensor of a GGUF file."""
    return names_in_adapters(renamed(name, UPSTREAM_NAMES), shape)


def is_nanochat(metadata: Mapping) -> bool:
    return metadata.get("general.architecture") in ARCHITECTURES


@dataclass(frozen=True)
class NanochatGguf(CheckpointModel):
    """A nanochat model whose tensors (gguf.header.GgufTensor) lie in a GGUF file, and may be packed."""

    types: Counter[str]
    quantization: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file_shape(name, tensor) for name, tensor in self.state.items()}

    def storage(self, settings: Settings, backend: Backend) -> Storage:
        """As in the file where kernels read its types, and unless --dtype asks for floats."""
        if settings.dtype or not backend.as_stored:
            return Storage(backend, settings.dtype or backend.dtype, None)
        return Storage(backend, None, backend.as_stored)

    def targets(self, sources: Sources) -> AdapterTargets:
        return AdapterTargets(partial(whole_tensors, sources, self.adapter_names), in_the_same_order,
                              Pair.of(NANOCHAT_TENSORS))

    def tensors(self, settings: Settings, sources: Sources, added: Mapping[str, list[Change | Copy]],
                storage: Storage) -> dict[str, Unread | MappedRows]:
        return GgufTensors(self.source.path, settings, self.state, storage, added=added).of(sources)

    def report(self, sources: Sources, tensors: Mapping[str, Unread | MappedRows],
               storage: Storage) -> Report:
        details = details_of(self.types, sources, self.state, storage)
        return Report(details, grows=growth(tensors, self.state, storage.dtype is None),
                      quantization=self.quantization)


def read_nanochat_gguf(source: ModelSource, settings: Settings, metadata: Mapping[str, Any],
                       stored: dict[str, Any]) -> NanochatGguf:
    path = source.path
    check_gguf_types(path, stored)
    number = ARCHITECTURES[metadata["general.architecture"]]
    config = config_in(path, metadata)
    text = text_in(path, metadata, config["vocab_size"])
    softcap = checked(path, f"nanochat{number}.{SOFTCAP}", metadata.get(f"nanochat{number}.{SOFTCAP}", 15.0),
                      Rule(float, 0.1, 1000))
    model = nanochat_model(config, number, settings.softcap or softcap)
    title = f"nanochat generation {number} ({GENERATIONS[number].since})"
    types = Counter(tensor.tensor_type.name for tensor in stored.values())
    return NanochatGguf(source, "nanochat", title, model, TABLE, model.vocab_size, stored, text,
                        adapters_call, types, quantization_of(metadata, stored.values()))


def config_in(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `model_config` that the metadata state, checked as nanochat's own."""
    own = f"{metadata['general.architecture']}."
    config = {}
    for key, theirs in KEYS.items():
        config[key] = checked(path, own + theirs, metadata.get(own + theirs), NANOCHAT_KEYS[key])
    pattern = (config["window_pattern"] or "L").upper()
    if set(pattern) - set("SL"):
        raise ConfigError(f"{path}: {own}{KEYS['window_pattern']} is {shown(pattern)}; it must be of S and L")
    check_divides(path, own + KEYS["n_embd"], config["n_embd"], 2 * config["n_head"], "2 * head_count")
    check_divides(path, own + KEYS["n_head"], config["n_head"], config["n_kv_head"], "head_count_kv")
    return config | {"window_pattern": pattern}


def text_in(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> TextSpec:
    """The tokenizer. ConfigError if it is none of nanochat, or does not fit the model."""
    def value(key: str, rule: Rule, length: int | None = None) -> Any:
        stated = metadata.get(key)
        stated = stated if stated is None or isinstance(stated, (str, int)) else list(stated)
        return checked(path, key, stated, rule, length)

    tokens = value("tokenizer.ggml.tokens", Rule(str, many=True))
    if len(tokens) != vocab_size:
        raise ConfigError(f"{path}: tokenizer.ggml.tokens has {len(tokens):,} tokens, and the model has "
                          f"{vocab_size:,}")
    types = value("tokenizer.ggml.token_type", Rule(int, 0, 255, many=True), vocab_size)
    pattern = value(PATTERN, Rule(str))
    byte_of = byte_of_character()
    ranks = {}
    specials = {}
    for token, (text, kind) in enumerate(zip(tokens, types)):
        if kind == CONTROL:
            specials[text] = token
        elif kind == NORMAL:
            try:
                piece = bytes(map(byte_of.__getitem__, text))
            except KeyError:
                raise ConfigError(f"{path}: tokenizer.ggml.tokens: token {token} is {shown(text)}, which is "
                                  "not spelled in GPT-2's letters") from None
            ranks[piece.decode("latin-1")] = token
    missing = [name for name in NANOCHAT_CHAT_TOKENS if name not in specials]
    lacking = set(map(chr, range(256))) - ranks.keys()
    if missing or lacking or len(ranks) + len(specials) != types.count(NORMAL) + types.count(CONTROL):
        raise ConfigError(f"{path}: tokenizer.ggml.tokens: {len(lacking)} bytes have no token, some tokens "
                          f"are there twice, or special ones are missing: {', '.join(missing) or 'none'}")
    bos = specials["<|bos|>"]
    end = specials["<|assistant_end|>"]
    payload = json.dumps((pattern, ranks, specials)).encode()
    is_base = metadata.get("general.finetune") == "base"
    text = TextSpec("nanochat", payload, bos_token=bos, eos_token=end, stop_tokens=frozenset((bos, end)),
                    add_bos=True)
    refuse_endless(path, text)
    return replace(text, base=is_base)
