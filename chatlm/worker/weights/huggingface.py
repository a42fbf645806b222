"""Hugging Face folders as models: spec, tensors, tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import read_small, read_text, refuse_cut_json
from chatlm.common.hub.huggingface import other_tokenizers
from chatlm.common.jsontext import whole_unicode
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.formats import template_of
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.kinds import floats, item_bytes, kind_of
from chatlm.worker.arrays.packed import RopePairs, unpermute_rope
from chatlm.worker.model.head import Head
from chatlm.worker.model.kernels import choose_backend
from chatlm.worker.model.tensors import TILE_ROWS
from chatlm.worker.weights import cross_encoders, rerankers
from chatlm.worker.weights.adapters import Adaptable
from chatlm.worker.weights.assemble import (
    Mxfp4, assembled, check_names_and_shapes, file_shapes, fp8_block, read_safetensors, tensor_sources,
    unread_keys, unscaled, without_shared)
from chatlm.worker.weights.configs import (
    HF_KEYS, complete_heads, family_config, family_spec, growing_queries, scaled_rope)
from chatlm.worker.weights.draft_heads import draft_head_of, folder_head
from chatlm.worker.weights.embedders import folder_embedder
from chatlm.worker.weights.families import FAMILIES
from chatlm.worker.weights.family import is_one_more
from chatlm.worker.weights.lora import FileSlice, fused_slices
from chatlm.worker.weights.model_of import model_of
from chatlm.worker.weights.named_tokens import tokenizer_options, with_named_tokens
from chatlm.worker.weights.packed_layouts import NotExact, PackedWeight
from chatlm.worker.weights.quantization import origin_of, without_zero_biases
from chatlm.worker.weights.rules import (
    LAYER_TYPES, LoadedModel, Rule, check_divides, checked, float_type, own_sampling, read_json,
    suppressed_in, warn_of_templates)
from chatlm.worker.weights.tied_heads import Pair, head_of_folder, merge_adapters
from chatlm.worker.weights.trial import refuse_endless

if TYPE_CHECKING:
    import numpy
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.weights.assemble import Sources
    from chatlm.worker.weights.family import Family
    from chatlm.worker.weights.recipe import ModelSpec


def hf_rope(path: Path, family: str, config: Mapping, context: int | None) -> dict:
    """`scaled_rope` for a config.json with rope_scaling, or rope_parameters by layer type or for all."""
    row = FAMILIES[family]
    if row.own_attentions:
        return {"max_positions": config["max_position_embeddings"]}
    name = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    rope = config[name] or {}
    local = {}
    if "rope_local_base_freq" in config and isinstance(rope, dict) and rope.keys() & set(LAYER_TYPES):
        rope, local = (rope.get(layer_type) or {} for layer_type in LAYER_TYPES)
    for scaling in (rope, local):
        if not isinstance(scaling, dict) or scaling is local and local.get(
                "rope_type", "default") != "default":
            raise ConfigError(f"{path}: {name} is {shown(scaling)}; it must be an object, with the rope_type "
                              "default for sliding_attention")
    rope = row.rope_of(path, name, config, rope)
    growth = ("llama_4_scaling_beta", "max_position_embeddings") if row.queries_grow else ()
    beta = rope.get("llama_4_scaling_beta") if growth else None
    rope = {key: setting for key, setting in rope.items() if key not in growth}
    part = checked(path, "partial_rotary_factor",  # other families ignore it
                   rope.get("partial_rotary_factor", config["partial_rotary_factor"]),
                   Rule(float, 0.01 if "partial_rotary_factor" in row.config else 1, 1,
                        optional=True))
    size = int(config["head_dim"] * (part or 1))
    check_divides(path, "the number of rotated dimensions", size, 2)

    def base(rope: Mapping, key: str) -> float:
        theta = rope.get("rope_theta")
        return float(checked(path, key, config[key] if theta is None else theta, HF_KEYS[key]))

    fields = scaled_rope(path, name, rope, base(rope, "rope_theta"), size, config["max_position_embeddings"],
                         context)
    if "rope_local_base_freq" in config:
        fields["local_rope_base"] = base(local, "rope_local_base_freq")
    if beta is not None:
        key = "original_max_position_embeddings"
        original = checked(path, f"{name}.{key}", rope.get(key), HF_KEYS[key])
        checked(path, f"{name}.llama_4_scaling_beta", beta, Rule(float, 0, 10))
        fields |= growing_queries(fields, beta, original, context)
    return fields


def open_hf(source: ModelSource, settings: Settings, device) -> LoadedModel:
    config = source.path / "config.json"
    return open_folder(source, settings, device, config, read_json(config),
                       lambda: read_safetensors(source.path))


def open_folder(source: ModelSource, settings: Settings, device, config: Path, raw: dict,
                read_tensors: Callable[[], tuple[dict, dict]]) -> LoadedModel:
    """The model of a folder whose file `config` says what `raw`, a config.json, does; `read_tensors`: its
    tensors by transformers' names, and the scales of those in FP8."""
    family, spec = described_spec(config, raw, settings.context_length)
    names = source.name, str(source.path), str(raw.get("_name_or_path") or "")
    called = source.name, source.path.name, names[2]
    state, scales = with_prefix(*read_tensors())
    spec, embeds, score = purpose_of_folder(source.path, raw, family, spec, called, state)
    row, whole = FAMILIES[family], state
    pair = Pair.of(row.all_tensors)
    spec, state, scales = head_of_folder(config, spec, row, row.repack(state), scales)
    given = whole | {name: state[name] for name in pair if name in state}, scales
    sources = tensor_sources(spec, row.all_tensors, spec.vocab_size)
    state, scales = (without_shared(spec, tensors) for tensors in (state, scales))
    if lost := sorted(set(scales) - set(state)):
        raise ConfigError(f"{source.path}: {lost[0]} is in FP8, which is not supported for this tensor of "
                          f"a {family} model: use the unquantized model or a GGUF file of it")
    state = without_zero_biases(state, file_shapes(sources))
    check_names_and_shapes(source.path, {name: tuple(tensor.shape) for name, tensor in state.items()},
                           sources)
    backend = choose_backend(device, model_of(spec))
    as_stored = None if settings.dtype else backend.as_stored
    dtype = float_type(settings, backend)
    if spec.of_texts and as_stored:  # vectors are compared with those of others: nothing is rounded
        dtype = max(kinds_in(state), key=item_bytes, default=dtype)
    matrices, slices = for_adapters(row, spec, sources)
    spec, sources, added, adapted, tied = merge_adapters(
        settings, spec, sources, matrices, slices, names, pair, Pair.in_adapters(row, spec),
        (state, scales, given[0]))
    scale_block = fp8_block(config, raw) if scales else []

    def turned(name: str, rows: numpy.ndarray) -> numpy.ndarray:
        if row.interleaved and re.search(r"\.[qk]_proj\.", name):
            return unpermute_rope(rows, RopePairs(spec.head_size, spec.rope_size or spec.head_size))
        return row.ordered(spec, name, rows) if row.ordered else rows

    def changed(scales: Mapping, added: Mapping, name: str, tensor: numpy.ndarray) -> numpy.ndarray:
        tensor = unscaled(config, scales, scale_block, name, tensor) if name in scales else tensor
        if isinstance(tensor, PackedWeight):
            tensor = tensor.values("float32" if name in added else dtype)
        for change in added.get(name, ()):
            tensor = change.on(tensor)
        tensor = turned(name, tensor)
        return floats(tensor) + 1 if is_one_more(row, name) else tensor

    def kept(name: str, blocks: numpy.ndarray) -> numpy.ndarray:
        if name in added:
            raise NotExact
        return turned(name, blocks)

    tensors = assembled(source.path, settings, sources, state, dtype, partial(changed, scales, added),
                        as_stored, kept)
    text = hf_text(source.path, spec.vocab_size)
    head = Head()
    text, ranking = rerankers.of_folder(
        source.path, raw, family, called, spec, text, state, score)
    if embeds and ranking is None:
        text, head = as_embedder(config, raw, family, spec, called, text, whole)
    description = f"{family}, {spec.layers} layers, width {spec.width}" + origin_of(
        state, as_stored is not None) + ", from FP8" * bool(scales) + adapted
    block = max((32 if isinstance(tensor, Mxfp4) else 128 for tensor in state.values()
                 if isinstance(tensor, (Mxfp4, PackedWeight))), default=TILE_ROWS)
    adaptable = Adaptable((*settings.served_model_name, *names), sources, lambda: slices, turned,
                          unread_keys(spec), tied=tied)

    def draft_head() -> LoadedModel | None:
        if (found := folder_head(spec, row, *given)) is None:
            return None
        own, sources, state, scales = found
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        check_names_and_shapes(source.path, shapes, sources)
        tensors = assembled(source.path, settings, sources, state, dtype, partial(changed, scales, {}),
                            as_stored, kept)
        return LoadedModel(own, tensors, text, source.name, "", dtype, family=family)

    return LoadedModel(spec, tensors, text, source.name, description, dtype, block=block, family=family,
                       adaptable=adaptable, head=head, ranking=ranking,
                       draft_head=draft_head_of(settings, source.path, draft_head),
                       **sampling_of_folder(source.path / "generation_config.json"))


def for_adapters(row: Family, spec: ModelSpec, sources: Sources
                 ) -> tuple[dict[str, tuple[int, ...]], dict[str, list[FileSlice]]]:
    """The shapes of the matrices and vectors that adapters may change, by a folder's names; and by their own
    names, what of these they change."""
    mapped = sources.get("layer_embed", ((), ()))[1]
    shapes = {name: shape for name, shape in file_shapes(sources).items()
              if len(shape) < 3 and name not in mapped} | unread_keys(spec)
    slices = fused_slices({name: [FileSlice(name)] for name in shapes}, shapes, row.fused, spec.layers)
    return shapes, row.named_by_adapters(spec, slices)


def purpose_of_folder(path: Path, raw: dict, family: str, spec: ModelSpec, called: Seq[str],
                      state: dict) -> tuple[ModelSpec, bool, Any]:
    """The spec of a folder, whether it embeds texts, and the row that it ranks by, taken out of its
    tensors."""
    has_head = spec.of_texts or FAMILIES[family].all_tensors["head"][0] in state
    score = rerankers.score_of(path, raw, family, called, state.pop(rerankers.SCORE, None), has_head)
    embeds = spec.of_texts or (path / "modules.json").exists()
    if not has_head and (score is not None or embeds):
        spec = replace(spec, tied_head=True)  # it has no head, and needs none
    return spec, embeds, score


def sampling_of_folder(path: Path) -> dict:
    return own_sampling(path, read_json(path, needed=False))


def kinds_in(state: Mapping) -> Iterator[str]:
    """The types of the tensors that are not packed."""
    return (kind_of(tensor) for tensor in state.values() if not isinstance(tensor, PackedWeight))


def as_embedder(config: Path, raw: dict, family: str, spec: ModelSpec, called: Seq[str], text: TextSpec,
                state: Mapping) -> tuple[TextSpec, Head]:
    """The text and the head of a folder that embeds texts or ranks pairs of them."""
    pipeline = getattr(open_tokenizer(text), "pipeline")
    embedder, head = folder_embedder(config.parent, pipeline, family, spec, called)
    if cross_encoders.classifies(state, spec):
        head = cross_encoders.folder_head(config, raw, spec, state)
        sigmoid = cross_encoders.makes_probabilities(config, raw)
        embedder = embedder._replace(pooling="rank", size=1, least=0, sigmoid=sigmoid, dimensions=0,
                                     pools_prompt=True)
    return replace(text, embedder=embedder, chat_template=None), head


def with_prefix(state: dict, scales: dict) -> tuple[dict, dict]:
    """A folder's tensors by the names of a model with a head, if it was written without one."""
    if "embed_tokens.weight" not in state:
        return state, scales
    state, scales = ({name if name == "lm_head.weight" else f"model.{name}": tensor
                      for name, tensor in tensors.items()} for tensors in (state, scales))
    return state, scales


def hf_spec(path: Path, context: int | None) -> tuple[str, ModelSpec]:
    """The family and the spec of a config.json, for contexts of `context` tokens (None: the model's own)."""
    return described_spec(path, read_json(path), context)


def described_spec(path: Path, raw: dict, context: int | None) -> tuple[str, ModelSpec]:
    """`hf_spec` of a file that says what `raw`, a config.json, does."""
    family, config = family_config(path, raw)
    complete_heads(path, config)
    spec = family_spec(path, family, config, hf_rope(path, family, config, context))
    spec = FAMILIES[family].with_own_blocks(path, config, spec)
    if not spec.of_texts:
        rerankers.refuse_classifier(path, raw, family)
    return family, spec


def hf_template(folder: Path, options: Mapping) -> str | None:
    """The chat template: chat_template.jinja, else chat_template.json or the one in the tokenizer's
    `options`. Of several named ones it is `default`, with `tool_use` for chats with tools."""
    path = folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    others = {other.stem: other for other in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if path.exists():
        return template_of(read_text(path), read_text(others["tool_use"]) if "tool_use" in others else None)
    template = options.get("chat_template")
    if template is None:
        config = folder / "chat_template.json"
        template = read_json(config, needed=False).get("chat_template")
    if isinstance(template, list):  # of {name, template}
        by_name = {str(entry.get("name")): entry.get("template")
                   for entry in template if isinstance(entry, dict)}
        template = template_of(by_name.get("default"), by_name.get("tool_use"))
        others |= by_name
    if not template:
        warn_of_templates(config, others)
    return checked(config, "chat_template", template, Rule(str, optional=True))


def hf_text(folder: Path, vocab_size: int) -> TextSpec:
    """tokenizer.json, the chat template, and the tokens that other files there name as bos and eos."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no tokenizer.json"
                          + other_tokenizers(file.name for file in folder.iterdir()))
    payload = read_small(path)
    options = tokenizer_options(folder)
    others = [read_json(folder / f"{name}.json", needed=False) for name in ("generation_config", "config")]
    refuse_endless(path, TextSpec("hf", payload))
    try:
        if (tokenizer := open_tokenizer(TextSpec("hf", payload))).vocab_size > vocab_size:
            # gemma3 has an image token that its text model does not know
            content = json.loads(payload)
            content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
            payload = json.dumps(content, ensure_ascii=False).encode()
            tokenizer = open_tokenizer(TextSpec("hf", payload))
    except ConfigError as error:
        refuse_cut_json(path, payload)
        raise ConfigError(f"{path}: {error}") from None
    pipeline = getattr(tokenizer, "pipeline")  # of a HuggingFaceTokenizer
    named = with_named_tokens(folder, payload, pipeline, options, vocab_size)
    if named is not payload:
        tokenizer = open_tokenizer(TextSpec("hf", named))
        payload = named
        pipeline = getattr(tokenizer, "pipeline")
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{folder}: tokenizer.json has {tokenizer.vocab_size:,} tokens, the model "
                          f"{vocab_size:,}")
    template = hf_template(folder, options)

    def ids(name: str) -> list[int]:
        text = options.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        token = pipeline.token_to_id(whole_unicode(text)) if isinstance(text, str) else None
        values = [token, *(other.get(f"{name}_token_id") for other in others)]
        lists = [value if isinstance(value, list) else [value] for value in values if value is not None]
        return checked(folder, f"{name}_token_id", sum(lists, []), Rule(int, 0, vocab_size - 1, many=True))

    bos = ids("bos")
    eos = ids("eos")
    adds = options.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = pipeline.encode("").ids[:1] == bos[:1] != []
    return TextSpec("hf", payload, template, stop_tokens=frozenset(eos), bos_token=bos[0] if bos else None,
                    eos_token=eos[0] if eos else None, add_bos=adds, chat_bos=False,
                    suppressed=suppressed_in(folder / "generation_config.json", "suppress_tokens",
                                             others[0].get("suppress_tokens"), vocab_size))
