"""nanochat's checkpoints as GGUF files. Each generation is an architecture, which only this program reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy

from chatlm.common.config import Settings
from chatlm.common.hub.nanochat_checkpoints import checkpoint_at, meta_of
from chatlm.common.text.load import in_characters
from chatlm.export.gguf import encoding
from chatlm.export.gguf.mixes import ModelShape, TensorInfo, order_of
from chatlm.export.gguf.size_label import size_label
from chatlm.export.gguf.export_model import ExportModel, ExportTensor
from chatlm.export.tiktoken_json import CHAT_TEMPLATE
from chatlm.worker.arrays.kinds import bits_of, floats, kind_of
from chatlm.worker.weights.formats.nanochat.checkpoint import (
    nanochat_generation, read_nanochat_config, read_nanochat_model)
from chatlm.worker.weights.formats.nanochat.generations import GENERATIONS
from chatlm.worker.weights.formats.nanochat.gguf import (
    CONTROL, KEYS, NORMAL, PATTERN, SOFTCAP, UNUSED, gguf_name)
from chatlm.worker.weights.load import name_tensors

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource, TextSpec

OF_VOCABULARY = "token_embd.weight", "value_embd.weight", "output.weight"  # a row for each token
KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def written_nanochat(source: ModelSource, softcap: float | None = None) -> ExportModel:
    """ConfigError for a checkpoint that would not load either."""
    model = read_nanochat_model(source, Settings(softcap=softcap))
    name_tensors(model)  # refuses tensors that are missing or unknown
    number = nanochat_generation(model.state)
    config = read_nanochat_config(source.path)
    tensors = []
    for name, array in model.state.items():
        own = gguf_name(name)
        is_padded = own.endswith(OF_VOCABULARY)
        tensors.append(written_tensor(own, array[:config["vocab_size"]] if is_padded else array))
    ordered = tuple(sorted(tensors, key=lambda tensor: order_of(tensor.matrix.name)))
    architecture = f"nanochat{number}"
    pairs = metadata_of(source, architecture, config, model.spec.softcap)
    pairs["general.size_label"] = encoding.of_text(size_label(tensor.matrix for tensor in ordered))
    pairs |= tokenizer_pairs(model.tokenizer, config["vocab_size"])
    shape = ModelShape(architecture, config["n_layer"], config["n_head"], config["n_kv_head"])
    return ExportModel(pairs, ordered, shape, (source.path, meta_of(source.path)), is_quantized=False)


def written_tensor(name: str, array: numpy.ndarray) -> ExportTensor:
    sizes = tuple(reversed(array.shape)) or (1,)
    data = array.reshape(-1, sizes[0])
    kind = KINDS.get(kind_of(array), "F32")
    if len(sizes) == 1:  # lambdas count exactly
        kind = "F32"
    is_small = name.endswith(("ve_gate.weight", "smear_gate.weight"))
    kind = "F32" if is_small else kind

    def rows(begin: int, end: int) -> numpy.ndarray:
        return floats(data[begin:end])

    def raw(begin: int, end: int) -> numpy.ndarray:
        return numpy.ascontiguousarray(bits_of(data[begin:end])).view(numpy.uint8)

    is_stored_so = kind == KINDS.get(kind_of(array))
    return ExportTensor(TensorInfo(name, sizes, kind), rows, raw if is_stored_so else None)


def metadata_of(source: ModelSource, architecture: str, config: dict,
                softcap: float) -> dict[str, encoding.Value]:
    generation = GENERATIONS[int(architecture.removeprefix("nanochat"))]
    width = config["n_embd"]
    own = f"{architecture}."
    pairs = {"general.architecture": encoding.of_text(architecture),
             "general.type": encoding.of_text("model"),
             "general.name": encoding.of_text(source.name), "general.license": encoding.of_text("mit")}
    checkpoint = checkpoint_at(source.path)
    if checkpoint is not None:
        pairs["general.finetune"] = encoding.of_text(checkpoint.place.stage)
    for key, theirs in KEYS.items():
        value = config[key]
        if isinstance(value, str):
            pairs[own + theirs] = encoding.of_text(value)
        elif value is not None:
            pairs[own + theirs] = encoding.of_number(value)
    pairs |= {
        own + "feed_forward_length": encoding.of_number(4 * width),
        own + "attention.key_length": encoding.of_number(width // config["n_head"]),
        own + "attention.value_length": encoding.of_number(width // config["n_head"]),
        own + "attention.layer_norm_rms_epsilon": encoding.of_float(1.1920929e-07),
        own + "rope.freq_base": encoding.of_float(generation.rope_base),
        own + SOFTCAP: encoding.of_float(softcap)}
    return pairs


def tokenizer_pairs(text: TextSpec, vocab_size: int) -> dict[str, encoding.Value]:
    pattern, ranks, specials = json.loads(text.payload)
    tokens = [f"[UNUSED_{token}]" for token in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for piece, token in ranks.items():
        tokens[token] = in_characters(piece.encode("latin-1"))
        types[token] = NORMAL
    for special, token in specials.items():
        tokens[token] = special
        types[token] = CONTROL
    assert text.bos_token is not None and text.eos_token is not None
    return {
        "tokenizer.ggml.model": encoding.of_text("gpt2"), "tokenizer.ggml.pre": encoding.of_text("nanochat"),
        PATTERN: encoding.of_text(pattern),
        "tokenizer.ggml.tokens": encoding.of_texts(tokens),
        "tokenizer.ggml.token_type": encoding.of_numbers(types),
        "tokenizer.ggml.merges": encoding.of_texts(merges_of(ranks)),
        "tokenizer.ggml.bos_token_id": encoding.of_number(text.bos_token),
        "tokenizer.ggml.eos_token_id": encoding.of_number(text.eos_token),
        "tokenizer.ggml.add_bos_token": encoding.of_switch(True),
        # for other programs: the reader of these files lays out a chat as it does for the checkpoint
        "tokenizer.chat_template": encoding.of_text(CHAT_TEMPLATE)}


def merges_of(ranks: dict[str, int]) -> list[str]:
    """The pair of tokens that each token is merged of, by rank, in GPT-2's letters. tiktoken needs none."""
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(piece) > 1:
            parts = parts_below(piece, rank, ranks)
            if len(parts) == 2:
                merges.append(" ".join(in_characters(part.encode("latin-1")) for part in parts))
    return merges


def parts_below(piece: str, rank: int, ranks: dict[str, int]) -> list[str]:
    """The tokens that a piece is made of before the merge of this rank."""
    parts = [*piece]
    while len(parts) > 1:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        least = min(pairs)
        if least >= rank:
            break
        place = pairs.index(least)
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return parts
