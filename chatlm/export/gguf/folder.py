"""Hugging Face folders of plain families as a `ExportModel`: what llama.cpp's converter writes of them.

The reader of GGUF files reads back the metadata that are written. A folder whose arithmetic or tokenizer
would not come back as it is, is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence as Seq
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.export.gguf import encoding
from chatlm.export.gguf.folder_tokenizer import INSTEAD, texts_of
from chatlm.export.gguf.mixes import ModelShape, TensorInfo, order_of
from chatlm.export.gguf.size_label import size_label
from chatlm.export.gguf.export_model import ExportModel, ExportTensor
from chatlm.worker.arrays.gguf_types import TYPES
from chatlm.worker.arrays.kinds import bits_of, floats, kind_of
from chatlm.worker.weights.differences import differences
from chatlm.worker.weights.formats.folder.model import read_folder_model
from chatlm.worker.weights.formats.gguf.description import gguf_blocks
from chatlm.worker.weights.formats.rope_scaling import ORIGINAL
from chatlm.worker.weights.load import name_tensors

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.weights.formats.folder.model import FolderModel

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # ours -> llama.cpp's architecture
KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def written_folder(source: ModelSource) -> ExportModel:
    """ConfigError for folders of other families, and for what a GGUF file cannot say."""
    model = read_folder_model(source, Settings())
    if model.family not in FAMILIES or model.scales or model.embeds or model.score is not None:
        raise ConfigError(f"{source.path}: folders of the families {', '.join(FAMILIES)} can be written as "
                          f"GGUF files, and this one is of {model.family} or not for chats; {INSTEAD}")
    name_tensors(model)
    tensors = tensors_of(model)
    stated = numbers_of(model) | texts_of(model, FAMILIES[model.family])
    factors = rope_factors(model)
    if factors is not None:
        tensors.append(array_tensor("rope_freqs.weight", factors))
    refuse_other_arithmetic(source, model, stated, tensors)
    stated["general.size_label"] = size_label(tensor.matrix for tensor in tensors)
    pairs = {key: encoded(value) for key, value in stated.items()}
    attn = model.model.attentions[0]
    shape = ModelShape(FAMILIES[model.family], len(model.model.layers), attn.heads, attn.kv_heads)
    files = sorted(path for path in source.path.iterdir()
                   if path.suffix in (".safetensors", ".json", ".jinja", ".model"))
    return ExportModel(pairs, tuple(sorted(tensors, key=lambda tensor: order_of(tensor.matrix.name))), shape,
                   tuple(files), is_quantized=False)


def encoded(value: Any) -> encoding.Value:
    if isinstance(value, str):
        return encoding.of_text(value)
    if isinstance(value, bool):
        return encoding.of_switch(value)
    if isinstance(value, int):
        return encoding.of_number(value)
    if isinstance(value, float):
        return encoding.of_float(value)
    if value and isinstance(value[0], float):
        return encoding.of_floats(value)
    is_texts = not value or isinstance(value[0], str)
    return encoding.of_texts(value) if is_texts else encoding.of_numbers(value)


def tensors_of(model: FolderModel) -> list[ExportTensor]:
    row = model.row
    names = row.gguf_names
    attn = model.model.attentions[0]
    heads = {"q": attn.heads, "k": attn.kv_heads}
    tensors = []
    for ours, (_, theirs) in name_tensors(model).items():
        layer, _, part = ours.rpartition(".")
        own = [name.format(layer) for name in names.get(part, ())]
        if len(own) != len(theirs):
            raise ConfigError(f"{model.source.path}: {ours} has no name in a GGUF file; {INSTEAD}")
        for name, stored in zip(own, theirs):
            array = model.state[stored]
            if kind_of(array) not in KINDS:
                raise ConfigError(f"{model.source.path}: {stored} is packed; {INSTEAD}")
            order = None
            for letter, count in heads.items():
                if row.gguf.permuted and f"attn_{letter}." in name:
                    order = paired_rows(len(array), count)
            tensors.append(array_tensor(name, array, order))
    return tensors


def paired_rows(rows: int, heads: int) -> numpy.ndarray:
    """Which of a folder's rows each of a GGUF file's is: the two rows of a rotary pair follow each other."""
    return numpy.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def array_tensor(name: str, array: numpy.ndarray, order: numpy.ndarray | None = None) -> ExportTensor:
    sizes = tuple(reversed(array.shape))
    vector = len(sizes) == 1
    if order is not None and vector:
        array = array[order]
        order = None
    data = array.reshape(-1, sizes[0])
    kind = "F32" if vector else KINDS[kind_of(array)]

    def slice_of(begin: int, end: int) -> numpy.ndarray:
        return data[begin:end] if order is None else data[order[begin:end]]

    def rows(begin: int, end: int) -> numpy.ndarray:
        return floats(slice_of(begin, end))

    def raw(begin: int, end: int) -> numpy.ndarray:
        return numpy.ascontiguousarray(bits_of(slice_of(begin, end))).view(numpy.uint8)

    return ExportTensor(TensorInfo(name, sizes, kind), rows, raw if kind == KINDS[kind_of(array)] else None)


def numbers_of(model: FolderModel) -> dict[str, Any]:
    blocks = model.model
    attn = blocks.attentions[0]
    feed = blocks.feed
    norm = blocks.norm
    assert feed is not None and norm is not None
    raw = model.config.raw
    rope = rope_of(raw)
    base = rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    own = f"{FAMILIES[model.family]}."
    return {
        "general.architecture": FAMILIES[model.family], "general.type": "model",
        "general.name": model.source.name,
        own + "context_length": int(raw.get("max_position_embeddings") or blocks.max_positions),
        own + "embedding_length": blocks.width, own + "block_count": len(blocks.layers),
        own + "feed_forward_length": feed.width, own + "vocab_size": blocks.vocab_size,
        own + "attention.head_count": attn.heads, own + "attention.head_count_kv": attn.kv_heads,
        own + "attention.key_length": attn.head_size, own + "attention.value_length": attn.head_size,
        own + "attention.layer_norm_rms_epsilon": float(norm.eps), own + "rope.freq_base": float(base),
        own + "rope.dimension_count": attn.head_size} | scaling_of(own, raw, rope)


def rope_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of rotary embeddings."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


# a parameter of yarn -> the metadata's key, after rope.scaling.
YARN = {"extrapolation_factor": "yarn_ext_factor", "attention_factor": "yarn_attn_factor",
        "attn_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def scaling_of(own: str, raw: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes of linear scaling and of yarn. `refuse_other_arithmetic` finds what
    these keys cannot say."""
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("linear", "yarn"):
        return {}
    own += "rope.scaling."
    positions = int(raw.get("max_position_embeddings") or 0)
    original = int(rope.get(ORIGINAL) or positions)
    factor = float(rope.get("factor") or positions / max(original, 1))
    found: dict[str, Any] = {own + "type": kind, own + "factor": factor}
    if kind == "yarn":
        found[own + "original_context_length"] = original
        for parameter, key in YARN.items():
            if rope.get(parameter) is not None:
                found.setdefault(own + key, float(rope[parameter]))
    return found


def rope_factors(model: FolderModel) -> numpy.ndarray | None:
    """What the frequencies of Llama 3.1 and later are divided by; None for other models."""
    raw = model.config.raw
    rope = rope_of(raw)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    size = model.model.attentions[0].head_size
    base = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(rope[ORIGINAL])
    found = []
    for place in range(0, size, 2):
        turns = length * base**(-place / size) / (2 * math.pi)  # in the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return numpy.array(found, numpy.float32)


def refuse_other_arithmetic(source: ModelSource, model: FolderModel, stated: Mapping[str, Any],
                            tensors: Seq[ExportTensor]):
    """ConfigError unless a reader of the metadata would compute the same model."""
    stored = {}
    for tensor in tensors:
        matrix = tensor.matrix
        values = tensor.rows(0, 1) if matrix.name.startswith("rope_") else numpy.empty(0)
        stored[matrix.name] = SimpleNamespace(
            name=matrix.name, tensor_type=TYPES["F32"], shape=numpy.array(matrix.sizes),
            n_elements=values.size, data=values.reshape(-1))
    _, blocks = gguf_blocks(source.path, stated, stored, None)
    for name, ours, theirs in differences(blocks, model.model):
        raise ConfigError(f"{source.path}: {name} would be {ours} in a GGUF file and is {theirs}; {INSTEAD}")
