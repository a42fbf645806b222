"""GGUF files as models: spec, tensors, tokenizer."""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, cannot_read, named, require_library, shown
from chatlm.common.log import log
from chatlm.common.messages.requests import InfillTokens, TextSpec
from chatlm.common.text.formats import template_of
from chatlm.worker.arrays.gguf_types import TYPES, GgufType, block_of
from chatlm.worker.arrays.kinds import floats, item_bytes
from chatlm.worker.arrays.packed import RopePairs, dequantize, dequantized, unpermute_rope
from chatlm.worker.model.blocks.mixers import DeltaRule
from chatlm.worker.model.head import Head
from chatlm.worker.model.kernels import choose_backend
from chatlm.worker.model.tensors import TILE_ROWS, Cut, MappedRows, Unread
from chatlm.worker.weights import cross_encoders, rerankers
from chatlm.worker.weights.adapters import Adaptable
from chatlm.worker.weights.assemble import (
    as_rows, check_names_and_shapes, cut_stored, file_shapes, mapped_rows, packed_together, tensor_sources,
    unread_keys, without_shared)
from chatlm.worker.weights.configs import (
    HF_DEFAULTS, complete_heads, family_spec, growing_queries, scaled_rope, unsupported)
from chatlm.worker.weights.control_tokens import END_TOKENS, misnamed
from chatlm.worker.weights.draft_heads import draft_head_of, gguf_head
from chatlm.worker.weights.embedders import gguf_embedder, pooling_of_gguf
from chatlm.worker.weights.encoder_text import text_of_encoder
from chatlm.worker.weights.factors import with_factors
from chatlm.worker.weights.families import FAMILIES, GGUF_FAMILIES
from chatlm.worker.weights.family import Family, Header, is_one_more
from chatlm.worker.weights.finite import refuse_faults
from chatlm.worker.weights.gguf_file import (
    GGUF_OWN, GGUF_SIZES, ROPE_TENSORS, check_gguf_types, gguf_value, read_gguf, refuse_unknown)
from chatlm.worker.weights.gguf_header import Texts
from chatlm.worker.weights.lora import FileSlice, fused_slices
from chatlm.worker.weights.model_of import model_of
from chatlm.worker.weights.pipelines import (
    CONTROL, USER_DEFINED, byte_level_pipeline, merges_of_scores, sentencepiece_pipeline)
from chatlm.worker.weights.rules import (
    LAYER_TYPES, LoadedModel, Rule, check_divides, checked, float_type, own_sampling,
    suppressed_in, warn_of_templates)
from chatlm.worker.weights.splits import PRE_TOKENIZERS
from chatlm.worker.weights.tied_heads import Pair, merge_adapters
from chatlm.worker.weights.vocabulary import vocabulary_from

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.model.kernels import Backend
    from chatlm.worker.weights.assemble import Sources
    from chatlm.worker.weights.lora import Change, Copy
    from chatlm.worker.weights.recipe import ModelSpec
    from chatlm.worker.weights.vocabulary import Vocabulary


def file_shape(name: str, tensor) -> tuple[int, ...]:
    """The shape of a gguf_header.Tensor, rows first; vectors of Mamba layers may be (H, 1), (groups, ..).

    llama.cpp's converter writes a shared expert's gate as (1, width), llama-quantize as (width,)."""
    if name.endswith(".ffn_gate_inp_shexp.weight"):
        return 1, int(tensor.n_elements)
    vector = name.endswith((".ssm_a", ".ssm_d", ".ssm_norm.weight"))
    return (int(tensor.n_elements),) if vector else tuple(reversed(tensor.shape.tolist()))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of reading a GGUF file into ConfigError."""
    try:
        yield
    except OSError as error:
        raise cannot_read(error.filename or path, error) from None
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error) as error:
        reason = "a tensor's shape does not match its bytes" if "reshape" in str(error) else named(error)
        raise ConfigError(f"{path} is not a readable GGUF file: {reason}") from None


def open_gguf(source: ModelSource, settings: Settings, device) -> LoadedModel:
    with readable(source.path):
        metadata, stored = read_gguf(source.path)
        types = Counter(tensor.tensor_type.name for tensor in stored.values())
        family, spec = gguf_spec(source.path, metadata, stored, settings.context_length)
        architecture = metadata["general.architecture"]
        check_gguf_types(source.path, stored)
        stored = with_factors(source.path, stored)
        stored = FAMILIES[family].gguf.repack(stored)
        given = stored
        if metadata.get(f"{architecture}.nextn_predict_layers"):  # a draft head is no layer of the model
            stored = {name: tensor for name, tensor in stored.items()
                      if not (layer := re.match(r"blk\.(\d+)\.", name)) or int(layer[1]) < spec.layers}
        stored = without_shared(spec, stored)
        heads = {name: tensor for name, tensor in stored.items() if re.match(r"(cls|dense_\d)\.", name)}
        classes = None if spec.of_texts else stored.pop(rerankers.CLASSES, None)
        if spec.of_texts:
            stored = {name: tensor for name, tensor in stored.items() if name not in heads}
        row = FAMILIES[family]
        names = row.gguf_names
        sources = tensor_sources(spec, names, spec.vocab_size)
        check_names_and_shapes(
            source.path, {name: file_shape(name, tensor) for name, tensor in stored.items()
                          if name not in ROPE_TENSORS},  # they became spec.rope_factors
            sources)
        backend = choose_backend(device, model_of(spec))
        if spec.of_texts and types.keys() == {"F32"}:  # else it would become bfloat16
            settings = replace(settings, dtype=settings.dtype or "float32")
        as_stored = None if settings.dtype else backend.as_stored
        dtype = None if as_stored else float_type(settings, backend)
        called = source.name, str(metadata.get("general.name") or "")
        slices = partial(gguf_slices, spec, family, names, sources)
        pair = Pair.of(names)
        spec, sources, added, adapted, tied = merge_adapters(
            settings, spec, sources, file_shapes(sources) | unread_keys(spec),
            slices() if settings.lora else {}, called, pair, Pair.in_adapters(row, spec), (stored, given))
        slices = partial(gguf_slices, spec, family, names, sources)
        tensors = gguf_tensors(source.path, settings, spec, sources, stored, dtype, backend,
                               row.gguf.permuted, row.interleaved, added)
        text, vocabulary = gguf_texts(source.path, metadata)
        ranking = None
        head = Head()

        def draft_head() -> LoadedModel | None:
            if (found := gguf_head(spec, row, given)) is None:
                return None
            own, sources, stored = found
            shapes = {name: file_shape(name, tensor) for name, tensor in stored.items()}
            check_names_and_shapes(source.path, shapes, sources)
            tensors = gguf_tensors(source.path, settings, own, sources, stored, dtype, backend,
                                   row.gguf.permuted, row.interleaved)
            return LoadedModel(own, tensors, text, source.name, "", dtype, family=architecture)

        drafter = draft_head_of(settings, source.path, draft_head)
        if not spec.of_texts:
            text, ranking = rerankers.of_gguf(source.path, metadata, family, spec, text, stored, classes)
        if embedder := gguf_embedder(source.path, metadata, text, family, spec):
            if spec.of_texts:
                head = cross_encoders.gguf_head(source.path, metadata, spec, embedder.pooling, heads)
            embedder = embedder._replace(size=head.size or embedder.size)
            text = replace(text, embedder=embedder, chat_template=None)
    description = f"{architecture}, {spec.layers} layers, width {spec.width}, " + \
        ", ".join(f"{count} {name}" for name, count in types.most_common())
    if dtype is None:
        description += backend.converted(sources, stored)
    description += adapted
    block = max(packed_together(tensor) for name, tensor in stored.items() if ".ffn_down" in name)
    mapped = sources["layer_embed"][1] if "layer_embed" in sources else ()
    held = {name: tensor for name, tensor in stored.items() if name not in mapped}
    pairs = RopePairs(spec.head_size, spec.rope_size or spec.head_size)
    own_pairs = pairs if row.interleaved else None
    adaptable = Adaptable((*settings.served_model_name, *called), sources, slices, lambda name, rows: (
        unpermute_rope(rows, own_pairs if re.search(r"attn_[qk]\.", name) else None)), unread_keys(spec),
        tied=tied)
    return LoadedModel(spec, tensors, text, source.name, description, dtype, block=max(block, TILE_ROWS),
                       family=architecture, adaptable=adaptable, head=head, ranking=ranking,
                       vocabulary=vocabulary, draft_head=drafter,
                       grows=growth(tensors, held, dtype is None),
                       **own_sampling(source.path, metadata, "general.sampling."))


def gguf_spec(path: Path, metadata: Mapping, stored: Mapping, context: int | None) -> tuple[str, ModelSpec]:
    """The row of FAMILIES and the spec, built as if from a config.json with the metadata's values."""
    header, family = family_of(path, metadata, stored)
    changes, instead = FAMILIES[family].gguf.layers(header)
    changed = {header.own + key: value for key, value in changes.items()}
    header = header._replace(metadata={**metadata, **changed})
    family = next((name for key, name in FAMILIES[family].gguf.variants.items()
                   if header.value(key, 0, low=0)), family)
    row = FAMILIES[family]
    config = HF_DEFAULTS | row.config
    refuse_unknown(header, row, config)
    config |= {ours: header.value(theirs, 1e-5 if ours == "rms_norm_eps" else None)
               for ours, theirs in GGUF_SIZES.items()}
    config |= {ours: header.value(theirs, config[ours]) or None for ours, theirs in GGUF_OWN.items()
               if ours in config}
    complete_heads(path, config, {ours: header.own + theirs for ours, theirs in GGUF_SIZES.items()})
    head_size = config["head_dim"]
    header.value("attention.value_length", head_size, low=head_size, high=head_size)  # no other is supported
    config |= {"vocab_size": vocabulary_of(header), "tie_word_embeddings": "output.weight" not in stored}
    config |= layer_types_of(header, config) | instead
    config |= row.complete(path, config)
    config |= row.gguf.unsaid(config)
    if "norm_topk_prob" in config:
        config["norm_topk_prob"] = header.value("expert_weights_norm", config["norm_topk_prob"])
    spec = family_spec(path, family, config, gguf_rope(header, config, context))
    spec = replace(spec, head_bias="output.bias" in stored, **{
        field: any(header.has(f"{name}.bias") for name in names.split()) for field, names in (
            ("qkv_bias", "attn_q attn_qkv"), ("output_bias", "attn_output"),
            ("norm_biases", "attn_norm attn_output_norm"),
            ("ffn_bias", "ffn_down_exps" if spec.experts and not spec.sum_norms else "ffn_down"))})
    return family, row.with_own_blocks(path, config, spec)


def family_of(path: Path, metadata: Mapping, stored: Mapping) -> tuple[Header, str]:
    """The header, and the row of FAMILIES of its architecture. ConfigError if this is no model for it."""
    if metadata.get("general.type", "model") != "model":
        raise ConfigError(f"{path} is not a model: its general.type is {shown(metadata['general.type'])}. "
                          "Give the GGUF file of the model itself")
    architecture = gguf_value(path, metadata, "general.architecture")
    if architecture not in GGUF_FAMILIES:
        raise ConfigError(f"{path}: {unsupported(architecture)}")
    header = Header(path, metadata, stored, gguf_value)
    pooling_of_gguf(path, header.own, metadata)
    return header, GGUF_FAMILIES[architecture]


def vocabulary_of(header: Header) -> int:
    """The rows of the embedding, which may be padded."""
    tokens = len(gguf_value(header.path, header.metadata, "tokenizer.ggml.tokens"))
    embedding = header.stored["token_embd.weight"].shape if "token_embd.weight" in header.stored else ()
    size = int(embedding[1]) if len(embedding) > 1 else tokens
    if not 1 <= tokens <= size:
        raise ConfigError(f"{header.path}: tokenizer.ggml.tokens has {tokens:,} entries; it must have 1 to "
                          f"{size:,}, the number of rows of token_embd.weight")
    return size


def layer_types_of(header: Header, config: Mapping) -> dict:
    """The layer_types of a config.json, if the metadata say which layers have a window."""
    key = "attention.sliding_window_pattern"
    layers = config["num_hidden_layers"]
    pattern = header.raw(key)
    if pattern is None:
        none = "layer_types" in config and "sliding_window" in config and not config["sliding_window"]
        return {"layer_types": [LAYER_TYPES[0]] * layers} if none else {}
    listed = isinstance(pattern, list)  # else every n-th layer has none
    pattern = checked(header.path, header.own + key, pattern,
                      Rule(bool, many=True) if listed else Rule(int, 1), layers)
    return {"layer_types": [LAYER_TYPES[pattern[layer] if listed else (layer + 1) % pattern > 0]
                            for layer in range(layers)]}


# llama.cpp's converter omits mscale and mscale_all_dim, and llama.cpp also computes the usual factor
MSCALE_UNKNOWN = ("%s: yarn multiplies queries and keys by %.3f, as usual. This is wrong if the original "
                  "config.json has mscale_all_dim, which the file cannot state; use the folder then")


def gguf_rope(header: Header, config: Mapping, context: int | None) -> dict:
    """Like hf_rope, from the scaling's keys, phi3's two lists of factors, or llama 3's single one."""
    head_size = config["head_dim"]
    row = FAMILIES[GGUF_FAMILIES[header.own[:-1]]]
    if row.own_attentions:
        return {"max_positions": config["max_position_embeddings"]}
    partial = "partial_rotary_factor" in row.config
    value = header.value
    own = header.own
    lists = {name: header.check(name, header.stored[name].data.tolist())
             for name in ROPE_TENSORS if name in header.stored}
    size = value("rope.dimension_count", head_size, low=2 if partial else head_size, high=head_size)
    check_divides(header.path, f"{own}rope.dimension_count", size, 2)
    rope = gguf_scaling(header, row, config, lists)
    base = float(value("rope.freq_base", 10_000.0))
    fields = scaled_rope(header.path, f"{own}rope.scaling", rope, base, size,
                         config["max_position_embeddings"], context)
    if (name := "rope_freqs.weight") in lists:
        factors = header.check(name, lists[name], size // 2)
        scaled = fields.get("rope_factors", itertools.repeat(1.0))
        fields["rope_factors"] = tuple(map(operator.mul, factors, scaled))
    if "rope_local_base_freq" in config:
        fields["local_rope_base"] = float(value("rope.freq_base_swa", config["rope_local_base_freq"] or base))
    if beta := value("attention.temperature_scale"):
        fields |= growing_queries(fields, beta, rope["original_max_position_embeddings"], context)
    return fields


def gguf_scaling(header: Header, row: Family, config: Mapping, lists: Mapping[str, Seq[float]]) -> dict:
    """The rope_scaling of a config.json; `lists`: those of ROPE_TENSORS that the file has."""
    value = header.value
    scaling = header.value("rope.scaling.type", "none")
    rope = {"original_max_position_embeddings": value("rope.scaling.original_context_length")}
    if "rope_factors_long.weight" in lists:
        return rope | {"rope_type": "longrope", "attention_factor": value("rope.scaling.attn_factor", 1.0),
                       "short_factor": lists.get("rope_factors_short.weight"),
                       "long_factor": lists["rope_factors_long.weight"]}
    if scaling not in ("linear", "yarn"):
        return {}
    value("rope.scaling.attn_factor", 1.0, low=1.0, high=1.0)
    factor = value("rope.scaling.factor", 1.0)
    if scaling == "linear":
        return {"rope_type": scaling, "factor": factor}
    rope |= {"rope_type": scaling, "factor": factor,  # the metadata cannot say whether to round
             "truncate": (config["rope_parameters"] or {}).get("truncate"),
             "attn_factor": value("rope.scaling.yarn_attn_factor")}
    value("rope.scaling.yarn_ext_factor", 1.0)
    rope |= {beta: value(f"rope.scaling.yarn_{beta}") for beta in ("beta_fast", "beta_slow")}
    if over := value("rope.scaling.yarn_log_multiplier"):
        rope |= {"mscale": 1.0, "mscale_all_dim": over}
    elif row.gguf.mscale_unknown:
        log.info(MSCALE_UNKNOWN, header.path, 0.1 * math.log(max(factor, 1)) + 1)
    return rope


def gguf_slices(spec: ModelSpec, family: str, names: Mapping[str, tuple],
                sources: Sources) -> dict[str, list[FileSlice]]:
    """Where a GGUF file stores the matrices of the model's folder; `names` is like HF_TENSORS."""
    table = FAMILIES[family].all_tensors
    ordered = FAMILIES[family].ordered
    layers = model_of(spec).layers
    slices = {name: [FileSlice(name)] for name in unread_keys(spec)}
    shapes = file_shapes(sources)
    for ours in sources:
        layer, _, part = ours.rpartition(".")
        theirs, own = ([name.format(layer) for name in names_of.get(part, ()) if "expert" not in part]
                       for names_of in (table, names))
        if part == "layer_embed":  # it stays in its file
            continue
        mixer = layers[int(layer)].mixer if layer else None
        if isinstance(mixer, DeltaRule) and part in ("mix_in", "mix_out"):
            slices |= linear_slices(mixer, theirs, own)
        else:
            rows = {at: ordered(spec, name, numpy.arange(shapes[at][0])) for name, at in zip(theirs, own)
                    if ordered and at in shapes}
            slices |= {name: [FileSlice(at, rows.get(at, slice(None)))] for name, at in zip(theirs, own)
                       if len(shapes.get(at, ())) == 2}
            slices |= {name: [FileSlice(at, plus=float(is_one_more(FAMILIES[family], name)))]
                       for name, at in zip(theirs, own) if is_norm(part, shapes.get(at, ()))}
    slices = fused_slices(slices, shapes, FAMILIES[family].fused, spec.layers)
    return FAMILIES[family].named_by_adapters(spec, slices)


def is_norm(part: str, shape: tuple[int, ...]) -> bool:
    """Is our tensor a norm's weight or bias, which a GGUF file has in the folder's order?"""
    return len(shape) == 1 and part.removesuffix("_bias").endswith("norm")


def linear_slices(mixer: DeltaRule, theirs: Seq[str], own: Seq[str]) -> dict[str, list[FileSlice]]:
    """Where a GGUF file stores a folder's linear attention matrices: Qwen3.5's value heads are in another
    order there, and Qwen3-Next's rows are not grouped by key head."""
    Hk = mixer.key_heads
    D = mixer.key_size
    Dv = mixer.value_size
    r = mixer.value_heads // mixer.key_heads
    p, z, *_ = mixer.parts
    if mixer.gates_by_key and len(own) > len(theirs):
        *qkv, gates = numpy.split(numpy.arange(p + z).reshape(Hk, -1), (D, 2 * D, 2 * D + r * Dv), 1)
        rows = numpy.concatenate([part.flatten() for part in qkv]), gates.flatten()
        return {theirs[0]: [*map(FileSlice, own, rows)], theirs[1]: [FileSlice(own[2])]}
    heads = numpy.arange(Hk * r)
    heads = heads.reshape(Hk, r).T.flatten() if mixer.alternating else heads
    values = (heads[:, None] * Dv + numpy.arange(Dv)).flatten()
    if len(own) == 1:
        return {theirs[0]: [FileSlice(own[0], columns=values)]}
    rows = numpy.concatenate((numpy.arange(p - z), p - z + values)), values, heads, heads
    return {name: [file_slice] for name, file_slice in zip(theirs, map(FileSlice, own, rows))}


def gguf_tensors(path: Path, settings: Settings, spec: ModelSpec, sources: Sources, stored: Mapping,
                 dtype: str | None, backend: Backend, permuted: bool, interleaved: bool,
                 added: Mapping[str, list[Change | Copy]] = {}) -> dict[str, Unread | MappedRows]:
    """Our tensors as `dtype`; None: the backend's `as_stored` makes the matrices, in the file's type or one
    close to it."""
    as_stored = backend.as_stored if dtype is None else None
    held_bytes = getattr(backend, "held_bytes", file_bytes)  # older builds of decode_core lack it
    pairs = RopePairs(spec.head_size, spec.rope_size or spec.head_size)

    def read(theirs: Iterable[str], cut: Cut):
        own = [pairs if (permuted or interleaved) and re.search(r"attn_[qk]\.", name) else None
               for name in theirs]
        parts = [merged(stored[name], part, added[name], part if interleaved else None, dtype is None)
                 if name in added else (as_rows(stored[name], cut.shape), part)
                 for name, part in zip(theirs, own)]
        parts = cut_stored(parts, cut)
        matrix = len(cut.shape) == 2
        return (as_stored(cut.shape, parts) if as_stored and matrix else
                dequantized(cut.shape, parts, dtype if dtype and matrix else "float32"))

    def unread(shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]]) -> Unread:
        mapped = tuple(stored[name].data for name in theirs)
        size = math.prod(shape) * (item_bytes(dtype) if dtype and len(shape) > 1 else 4)
        if dtype is None and len(shape) == 2:
            types = [merged_type(stored[name], True) if name in added else stored[name].tensor_type
                     for name in theirs]
            size = held_bytes([SimpleNamespace(tensor_type=gguf_type, shape=stored[name].shape)
                               for name, gguf_type in zip(theirs, types)])
        check = partial(refuse_faults, path, settings, theirs, read)
        return Unread(Cut.whole(shape), partial(read, theirs), size, mapped, check, (read, theirs))

    return {ours: mapped_table(stored[next(iter(source[1]))]) if ours == "layer_embed" else unread(*source)
            for ours, source in sources.items()}


def mapped_table(tensor) -> MappedRows:
    table = numpy.asarray(tensor.data)
    gguf_type = tensor.tensor_type
    if gguf_type.name in ("F32", "F16", "BF16"):
        return mapped_rows(dequantize(gguf_type, table))
    return MappedRows(table, gguf_type.name.lower(),
                      lambda rows: floats(dequantize(gguf_type, rows)).reshape(len(rows), -1))


def merged(tensor, pairs: RopePairs | None, changes: Iterable[Change | Copy], own_pairs: RopePairs | None,
           packed: bool) -> tuple[Any, None]:
    """Part of a matrix with its adapters' changes, whose rows have `own_pairs`; a `packed` one becomes
    Q8_0. A vector stays one of floats."""
    values = dequantized(tuple(reversed(tensor.shape.tolist())), [(tensor, pairs)], "float32")
    for change in changes:
        values = change.on(values, partial(unpermute_rope, pairs=own_pairs))
    gguf_type = merged_type(tensor, packed)
    data = require_library("gguf", "an adapter").quantize(values, gguf_type)
    return SimpleNamespace(tensor_type=gguf_type, data=data, shape=tensor.shape), None


def merged_type(tensor, packed: bool) -> GgufType:
    return TYPES["Q8_0" if packed and tensor.tensor_type.name not in ("F32", "F16", "BF16") else "F32"]


def file_bytes(tensors: Seq) -> int:
    """The tensors' size in a GGUF file."""
    sizes = [block_of(tensor.tensor_type.name) for tensor in tensors]
    return sum(math.prod(tensor.shape.tolist()) // block * size
               for tensor, (block, size) in zip(tensors, sizes))


MIXED_BYTES = 0.6  # per weight in a typical Q4_K_M file


def growth(tensors: Mapping[str, Unread | MappedRows], stored: Mapping, packed: bool) -> str:
    """A note if the weights take much more memory than `stored`, the file's tensors to be read; "" if not."""
    held = sum(tensor.nbytes for tensor in tensors.values())
    on_disk = sum(tensor.n_bytes for tensor in stored.values())
    if held < 1.1 * on_disk:
        return ""
    small = MIXED_BYTES * sum(tensor.n_elements for tensor in stored.values())
    reason = "types that have no kernels here become Q8_0, and TQ1_0 takes 2 bits a weight" if packed else (
        "torch dequantizes its matrices, which decode_core would keep packed")
    smaller = f"; a file of type Q4_K_M would take about {small / 1e9:,.2f} GB" if packed else ""
    return (f"The file's {on_disk / 1e9:,.2f} GB of weights take {held / 1e9:,.2f} GB in memory: "
            f"{reason}{smaller if small < 0.9 * held else ''}")


MOST_NAMED = 8
MISNAMED = ("%s: its tokenizer.ggml.token_type says that these are no control tokens, but they count as "
            "such: %s%s")


def gguf_text(path: Path, metadata: Mapping) -> TextSpec:
    return gguf_texts(path, metadata)[0]


def gguf_texts(path: Path, metadata: Mapping) -> tuple[TextSpec, Vocabulary | None]:
    """The tokenizer (as the text of a tokenizer.json), chat template and stop tokens from the metadata; and
    what that text says, if it is of a decoder."""
    def value(name: str, *default, **bounds) -> Any:
        found = gguf_value(path, metadata, f"tokenizer.{name}", *default, **bounds)
        return list(found) if isinstance(found, Texts) else found

    model = value("ggml.model")
    tokens = value("ggml.tokens")
    if model in ("bert", "t5"):
        return text_of_encoder(value), None
    token_types = list(value("ggml.token_type", [1] * len(tokens), len(tokens)))
    last = len(tokens) - 1
    bos, eos, *ends = (value(f"ggml.{name}_token_id", high=last) for name in ("bos", "eos", "eot", "eom"))
    template = template_of(value("chat_template"), metadata.get("tokenizer.chat_template.tool_use"))
    if control := misnamed(tokens, token_types, (bos, eos, *ends), template):
        names = ", ".join(shown(tokens[token]) for token in control[:MOST_NAMED])
        log.warning(MISNAMED, path, names, " .." * (len(control) > MOST_NAMED))
        for token in control:
            token_types[token] = CONTROL
    pre = PRE_TOKENIZERS[value("ggml.pre", "default")] if model == "gpt2" else None
    of_gemma = model == "gemma4"  # sentencepiece's alphabet with explicit merges
    if pre:
        pipeline = byte_level_pipeline(tokens, value("ggml.merges"), pre)
    else:
        merges = value("ggml.merges", *() if of_gemma else ([],))
        merges = merges or merges_of_scores(tokens, value("ggml.scores", None, len(tokens)), token_types)
        unknown = tokens[value("ggml.unknown_token_id", 0, high=last)]
        space = value("ggml.add_space_prefix", not of_gemma)
        pipeline = sentencepiece_pipeline(tokens, merges, unknown, space)
    family = GGUF_FAMILIES.get(str(metadata.get("general.architecture")), "llama")
    spaces = FAMILIES[family].gguf.strips_specials and not pre  # dropped after these tokens
    pipeline["added_tokens"] = [
        {"id": i, "content": token, "special": token_type == CONTROL, "normalized": False,
         "single_word": False, "lstrip": False,
         "rstrip": spaces and token not in ("<unk>", "<s>", "<|endoftext|>")}
        for i, (token, token_type) in enumerate(zip(tokens, token_types))
        if token and token_type in (CONTROL, USER_DEFINED)]
    ends = {eos, *ends} - {None}
    ends |= {entry["id"] for entry in pipeline["added_tokens"] if entry["content"] in END_TOKENS}
    add_bos = of_gemma or value("ggml.add_bos_token", pre is None or pre.add_bos)  # as in llama.cpp
    if not template:
        warn_of_templates(path, [key.removeprefix("tokenizer.chat_template.") for key in metadata
                                 if key.startswith("tokenizer.chat_template.")])
    text = TextSpec("hf", json.dumps(pipeline, ensure_ascii=False).encode(), template, frozenset(ends), bos,
                    eos, add_bos, infill=gguf_infill(metadata, len(tokens)), suppressed=suppressed_in(
                        path, key := "tokenizer.ggml.suppress_tokens", metadata.get(key), len(tokens)))
    return text, vocabulary_from(tokens, pipeline["added_tokens"], pipeline["decoder"])


def gguf_infill(metadata: Mapping, vocab_size: int) -> InfillTokens:
    """The infill tokens that the metadata name, the first three under either of two names. As in llama.cpp,
    ids outside the vocabulary are ignored."""
    ids: dict[str, int] = {}
    for keys in ("prefix suffix middle", "fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep"):
        for name, key in zip(InfillTokens._fields, keys.split()):
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if type(token) is int and 0 <= token < vocab_size:
                ids[name] = token
    return InfillTokens()._replace(**ids)
