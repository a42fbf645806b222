"""Models of llama-like families as Hugging Face folders: from GGUF files, and from folders with packed
weights or adapters, which become plain ones.

What is written is read again before any weight is: the config must make the blocks that the source makes. So
a config that cannot say something, such as a rotary scaling that only GGUF has, is an error and not a worse
model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING, cast

import numpy

from chatlm.common.errors import ConfigError
from chatlm.common.hub.repository import FOLDER_FILES, INDEX
from chatlm.export.hub_model import HubModel, Weights
from chatlm.export.older_words import notes_on_versions, with_older_words
from chatlm.worker.arrays.kinds import FLOATS, as_kind, floats, kind_of
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.experts import Experts
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.tensors import Unread, advise
from chatlm.worker.weights.differences import differences
from chatlm.worker.weights.families.family import Family, is_one_more
from chatlm.worker.weights.families.table import FAMILIES, VISION
from chatlm.worker.weights.formats.folder.description import described_blocks
from chatlm.worker.weights.formats.folder.model import FolderModel, in_our_order
from chatlm.worker.weights.formats.gguf.description import gguf_config, gguf_scaling
from chatlm.worker.weights.formats.gguf.model import GgufModel
from chatlm.worker.weights.formats.gguf.tensors import FLOAT_TYPES
from chatlm.worker.weights.formats.rope_scaling import ORIGINAL, scaled_rope
from chatlm.worker.weights.formats.sources import tensor_sources
from chatlm.worker.weights.formats.stored_model import Storage
from chatlm.worker.weights.rules import LAYER_TYPES

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.kernels.kernels import Backend
    from chatlm.worker.model.blocks.mla import Mla
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.formats.stored_model import Merged

CLASSES = {  # a model_type that can be written -> its class in transformers
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM", "phi3": "Phi3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "olmoe": "OlmoeForCausalLM",
    "glm4": "Glm4ForCausalLM", "ernie4_5": "Ernie4_5ForCausalLM", "seed_oss": "SeedOssForCausalLM",
    "exaone4": "Exaone4ForCausalLM"}
HALF = "bfloat16"  # of dequantized weights, unless --dtype asks for another


def family_model(merged: Merged, settings: Settings) -> HubModel:
    """A model of a GGUF file or a folder, with the adapters of --lora. ConfigError if a folder cannot hold
    it."""
    stored = merged.stored
    assert isinstance(stored, (GgufModel, FolderModel))
    family = stored.model_type if isinstance(stored, GgufModel) else stored.family
    refuse(stored, family)
    dtype = settings.dtype or own_dtype(stored)
    if isinstance(stored, GgufModel):
        config = config_of_gguf(stored, family)
        copied = ()
    else:
        config = dict(stored.config.raw)
        copied = tuple(sorted(path for path in map(stored.source.path.joinpath, FOLDER_FILES - NOT_COPIED)
                              if path.is_file()))
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    config |= {"architectures": [CLASSES[family]], "model_type": family, "dtype": dtype,
               "tie_word_embeddings": stored.model.tied}
    config = with_older_words(config, stored.model)
    refuse_another_model(stored, family, config, settings.context_length)
    text, _ = stored.text()
    return HubModel(config, weights_of(merged, settings, dtype), text,
                    stored.report({}, {}, storage_of("float32")).sampling if copied else {}, copied=copied,
                    notes=(*notes_on(stored, dtype, settings), *notes_on_versions(config)))


NOT_COPIED = {"config.json", INDEX, "hf_quant_config.json", "quantize_config.json", "quant_config.json",
              "preprocessor_config.json", "processor_config.json"}


def refuse(stored: GgufModel | FolderModel, family: str):
    """ConfigError for models that a folder of this kind cannot hold whole."""
    path = stored.source.path
    in_folder = isinstance(stored, FolderModel)
    if stored.model.of_texts or in_folder and (stored.embeds or stored.score is not None):
        raise ConfigError(f"{path}: --format hf is for models that write answers, and this one embeds or "
                          "ranks texts: give others its own files")
    if in_folder and stored.config.raw.get("model_type") in VISION:
        raise ConfigError(f"{path} also sees images, and --format hf would lose its image encoder: give "
                          "others its own folder")
    if family not in CLASSES:
        raise ConfigError(f"--format hf cannot hold a model of the family {family}. It can hold nanochat's "
                          f"and those of {', '.join(CLASSES)}")


def own_dtype(stored: GgufModel | FolderModel) -> str:
    """The type of the source's floats. bfloat16 if matrices are packed."""
    if isinstance(stored, GgufModel):
        kinds = {name for name in stored.types if stored.types[name]}
        if kinds <= {*FLOAT_TYPES}:
            matrices = {tensor.tensor_type.name for tensor in stored.stored.values() if len(tensor.shape) > 1}
            return {("F32",): "float32", ("F16",): "float16", ("BF16",): "bfloat16"}.get(
                tuple(matrices), "float32")
        return HALF
    stated = stored.config.raw.get("dtype") or stored.config.raw.get("torch_dtype")
    kinds = {kind_of(tensor) for tensor in stored.state.values() if isinstance(tensor, numpy.ndarray)}
    if is_packed(stored):
        return stated if stated in FLOATS else HALF
    if stated in kinds:
        return str(stated)
    return kinds.pop() if len(kinds) == 1 else "float32"


def is_packed(stored: GgufModel | FolderModel) -> bool:
    if isinstance(stored, GgufModel):
        return not {*stored.types} <= {*FLOAT_TYPES}
    return bool(stored.scales) or not all(isinstance(tensor, numpy.ndarray) for tensor in
    stored.state.values())


def notes_on(stored: GgufModel | FolderModel, dtype: str, settings: Settings) -> Iterator[str]:
    if isinstance(stored, GgufModel) and is_packed(stored):
        types = ", ".join(f"{count} {name}" for name, count in stored.types.most_common())
        yield f"The weights were dequantized from a GGUF file ({types})."
    elif is_packed(stored):
        yield "The weights were dequantized."
    if is_packed(stored) and dtype != "float32":
        yield f"Then they were rounded to {dtype}."
    if settings.lora:
        folders = ", ".join(Path(folder).name for folder in settings.lora)
        yield f"The LoRA adapter {folders} is merged into them."
    if stored.draft_head() is not None:
        yield "The head that drafts tokens is left out."


# --- config.json -------------------------------------------------------------------------------------------


def config_of_gguf(stored: GgufModel, family: str) -> dict[str, Any]:
    """What a config.json says of the model of a GGUF file."""
    model = stored.model
    row = FAMILIES[family]
    header, _, config = gguf_config(stored.source.path, stored.metadata, stored.whole)
    attn = turning(model)
    of_attention = attn.biases if isinstance(attn, Attention) else ()
    biases = {"attention_bias": "qkv" in of_attention, "attention_out_bias": "output" in of_attention,
              "mlp_bias": isinstance(model.feed, Experts | FeedForward) and model.feed.biased}
    config |= {key: value for key, value in biases.items() if key in config}
    stated = gguf_scaling(header, row, config, {})
    rope: dict[str, Any] = {key: value for key, value in stated.items() if value is not None}
    if "rope_freqs.weight" in stored.whole:
        rope = llama3_scaling(stored, config["max_position_embeddings"])
    if "rope_type" not in rope:
        rope = {"rope_type": "default"}
    rope["rope_theta"] = attn.rope.base
    if attn.rope.size != attn.head_size:
        rope["partial_rotary_factor"] = attn.rope.size / attn.head_size
    if "rope_local_base_freq" in config:
        local = {"rope_type": "default", "rope_theta": local_base(model)}
        rope = dict(zip(LAYER_TYPES, (rope, local)))
    config = {key: value for key, value in config.items()
              if value is not None and key not in ("rope_scaling", "rope_theta", "rope_local_base_freq",
                                                   "partial_rotary_factor")}
    config["rope_parameters"] = rope
    text, _ = stored.text()
    # transformers' defaults are tokens of other vocabularies
    config |= {"bos_token_id": text.bos_token, "eos_token_id": text.eos_token, "pad_token_id": text.eos_token}
    return config


def turning(model: Model) -> Attention | Mla:
    """How the layers attend whose heads turn, those without a window if there are any."""
    found = [attn for attn in model.attentions if attn.rope.size] or model.attentions
    return min(found, key=lambda attn: attn.window > 0)


def local_base(model: Model) -> float:
    """The base of the layers with a window."""
    bases = [attn.rope.base for attn in model.attentions if attn.window]
    return bases[0] if bases else turning(model).rope.base


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of all of Meta's models


def llama3_scaling(stored: GgufModel, positions: int) -> dict[str, Any]:
    """Llama 3's scaling, of which a GGUF file has only the result: a factor for each frequency. ConfigError
    if it is of another kind."""
    turned = turning(stored.model).rope
    factors = turned.factors or ()
    factor = max(factors)
    for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64):
        scaling = LLAMA3 | {"factor": factor, ORIGINAL: original}
        fields = scaled_rope(stored.source.path, "rope_parameters", scaling, turned.base,
                             turned.size, positions, None)
        if numpy.allclose(fields["rope_factors"], factors, rtol=1e-5):
            return scaling
    raise ConfigError(f"{stored.source.path}: its rope_freqs.weight is no scaling that a config.json can "
                      "state, so --format hf cannot hold this model")


def refuse_another_model(stored: GgufModel | FolderModel, family: str, config: dict[str, Any],
                         context: int | None):
    """ConfigError unless a config makes the source's blocks."""
    path = stored.source.path
    read_family, read = described_blocks(path, config, context)
    differing = [] if read_family == family else ["model_type"]
    differing += [place for place, _, _ in differences(read, stored.model, ignored=frozenset())]
    if differing:
        raise ConfigError(f"{path}: a config.json cannot state all of this model ({', '.join(differing)}), "
                          "so --format hf cannot hold it")


# --- tensors -----------------------------------------------------------------------------------------------


def storage_of(dtype: str) -> Storage:
    """Matrices as floats. No kernels are chosen, since nothing is computed."""
    return Storage(cast("Backend", None), dtype, None)


def weights_of(merged: Merged, settings: Settings, dtype: str) -> list[Weights]:
    """The model's tensors under a folder's names, in a folder's order of rows."""
    stored = merged.stored
    assert isinstance(stored, (GgufModel, FolderModel))
    row = stored.row
    tensors = stored.tensors(settings, merged.sources, merged.added, storage_of(dtype))
    named = tensor_sources(stored.model, row.all_tensors, stored.model.vocab_size)
    weights = []
    for ours, (_, theirs) in named.items():
        unread = tensors[ours]
        assert isinstance(unread, Unread)  # a family whose tables stay in their files is not in CLASSES
        read = partial(rows_of, unread, theirs, row, stored.model, dtype)
        weights.append(Weights(dict(theirs), dtype, read))
    return weights


def rows_of(unread: Unread, theirs: Mapping[str, tuple[int, ...]], row: Family, model: Model,
            dtype: str) -> Iterator[numpy.ndarray]:
    """One of our tensors, cut into the folder's tensors whose rows it is made of."""
    made = unread.read()
    unread.refuse_faults(made, False)
    parts = list(made) if isinstance(made, tuple) else [made]
    for name, shape in theirs.items():
        own = take_rows(parts, shape)
        own = in_folder_order(row, model, name, own)
        if is_one_more(row, name):
            own = floats(own) - 1
        yield as_kind(own.reshape(shape), dtype)
    advise(unread.mapped, "MADV_DONTNEED")


def take_rows(parts: list[numpy.ndarray], shape: tuple[int, ...]) -> numpy.ndarray:
    """Take the next rows of stacked arrays, as many as a tensor of this shape has."""
    count = shape[0] * (shape[1] if len(shape) == 3 else 1)
    first = parts[0]
    assert len(first) >= count, (len(first), shape)
    parts[0] = first[count:]
    if not len(parts[0]):
        parts.pop(0)
    return first[:count]


def in_folder_order(row: Family, model: Model, name: str, rows: numpy.ndarray) -> numpy.ndarray:
    """The inverse of `in_our_order`."""
    order = in_our_order(row, model, name, numpy.arange(len(rows)))
    if (order == numpy.arange(len(rows))).all():
        return rows
    place = numpy.empty_like(order)
    place[order] = numpy.arange(len(order))
    return rows[place]
