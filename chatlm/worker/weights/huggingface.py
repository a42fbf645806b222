"""Hugging Face folders as models: spec, tensors, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, cannot_read, shown
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.formats import template_of
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.model.kernels import choose_backend
from chatlm.worker.model.tensors import TILE_ROWS
from chatlm.worker.weights.assemble import (
    Mxfp4, assembled, check_names_and_shapes, file_shapes, fp8_block, read_safetensors, tensor_sources,
    unscaled)
from chatlm.worker.weights.families import (
    FAMILIES, HF_KEYS, HF_TENSORS, LAYER_TYPES, complete_heads, family_config, family_spec, scaled_rope)
from chatlm.worker.weights.lora import read_adapters
from chatlm.worker.weights.rules import (
    LoadedModel, Rule, check_divides, checked, float_type, own_sampling, read_json)

if TYPE_CHECKING:
    import torch
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.model.spec import ModelSpec


def hf_rope(path: Path, kind: str, config: Mapping, context: int | None) -> dict:
    """`scaled_rope` of a config.json, which has rope_scaling, or rope_parameters by layer type or for all."""
    name = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    rope, local = config[name] or {}, {}
    if "rope_local_base_freq" in config and isinstance(rope, dict) and rope.keys() & set(LAYER_TYPES):
        rope, local = (rope.get(each) or {} for each in LAYER_TYPES)
    for each in (rope, local):
        if not isinstance(each, dict) or each is local and local.get("rope_type", "default") != "default":
            raise ConfigError(f"{path}: {name} is {shown(each)}; it must be an object, with the rope_type "
                              "default for sliding_attention")
    kinds = [each for key in ("rope_type", "type") if (each := rope.get(key)) is not None]
    if kind == "phi3" and kinds and kinds[0] != "default":  # older files call it su or yarn
        rope = rope | {"original_max_position_embeddings": config["original_max_position_embeddings"],
                       "rope_type": "longrope" if kinds[0] in ("su", "yarn") else kinds[0]}
    part = checked(path, "partial_rotary_factor",  # other families' code does not look at it
                   rope.get("partial_rotary_factor", config["partial_rotary_factor"]),
                   Rule(float, 0.01 if kind == "phi3" else 1, 1, optional=True))
    size = int(config["head_dim"] * (part or 1))
    check_divides(path, "the number of rotated dimensions", size, 2)

    def base(rope: Mapping, key: str) -> float:
        given = rope.get("rope_theta")
        return float(checked(path, key, config[key] if given is None else given, HF_KEYS[key]))

    fields = scaled_rope(path, name, rope, base(rope, "rope_theta"), size, config["max_position_embeddings"],
                         context)
    if "rope_local_base_freq" in config:
        fields["local_rope_base"] = base(local, "rope_local_base_freq")
    return fields


def open_hf(source: ModelSource, settings: Settings, device) -> LoadedModel:
    config = source.path / "config.json"
    kind, spec = hf_spec(config, settings.context_length)
    state, scales = read_safetensors(source.path)
    if spec.tied_head:
        state.pop("lm_head.weight", None)  # some files have it twice
    sources = tensor_sources(spec, HF_TENSORS | FAMILIES[kind].tensors, spec.vocab_size)
    state = FAMILIES[kind].repack(state)
    check_names_and_shapes(source.path, {name: tuple(tensor.shape) for name, tensor in state.items()},
                           sources)
    backend = choose_backend(device, spec)
    as_stored, dtype = None if settings.dtype else backend.as_stored, float_type(settings, backend)
    matrices = {name: shape for name, shape in file_shapes(sources).items() if len(shape) == 2}
    added, adapted = read_adapters(settings, matrices)
    scale_block = fp8_block(config, read_json(config)) if scales else []

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = unscaled(config, scales, scale_block, name, tensor) if name in scales else tensor
        for change in added.get(name, ()):
            tensor = tensor.float() + change.delta()
        return tensor + 1 if FAMILIES[kind].one_more and name.endswith("norm.weight") else tensor

    tensors = assembled(source.path, settings, sources, state, dtype, changed, as_stored)
    text = hf_text(source.path, spec.vocab_size)
    description = f"{kind}, {spec.layers} layers, width {spec.width}{', from FP8' * bool(scales)}{adapted}"
    path = source.path / "generation_config.json"
    block = 32 if any(isinstance(tensor, Mxfp4) for tensor in state.values()) else TILE_ROWS
    return LoadedModel(spec, tensors, text, source.name, description, dtype, block=block,
                       **own_sampling(path, read_json(path, needed=False)))


def hf_spec(path: Path, context: int | None) -> tuple[str, ModelSpec]:
    """The family and the spec of a config.json, for contexts of `context` tokens (None: the model's own)."""
    kind, config = family_config(path, read_json(path))
    complete_heads(path, config)
    return kind, family_spec(path, kind, config, hf_rope(path, kind, config, context))


def hf_text(folder: Path, vocab_size: int) -> TextSpec:
    """tokenizer.json, the chat template, and the tokens that other files there name as bos and eos."""
    try:
        payload = (folder / "tokenizer.json").read_bytes()
        template = folder / "chat_template.jinja"
        template = template.read_text("utf-8") if template.exists() else None
    except (OSError, ValueError) as error:
        raise cannot_read(getattr(error, "filename", None) or folder / "chat_template.jinja", error) from None
    options, *others = (read_json(folder / f"{name}.json", needed=False)
                        for name in ("tokenizer_config", "generation_config", "config"))
    try:
        if (tokenizer := open_tokenizer(TextSpec("hf", payload))).vocab_size > vocab_size:
            # gemma3 has a token for images, of which its text model knows nothing
            content = json.loads(payload)
            content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
            payload = json.dumps(content, ensure_ascii=False).encode()
            tokenizer = open_tokenizer(TextSpec("hf", payload))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{folder}: tokenizer.json has {tokenizer.vocab_size:,} tokens, the model "
                          f"{vocab_size:,}")
    template = template or options.get("chat_template")
    if isinstance(template, list):  # of {name, template}
        kinds = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = template_of(kinds.get("default"), kinds.get("tool_use"))
    checked(folder / "tokenizer_config.json", "chat_template", template, Rule(str, optional=True))

    def ids(name: str) -> list[int]:
        said = options.get(f"{name}_token")
        said = said.get("content") if isinstance(said, dict) else said
        token = tokenizer.pipeline.token_to_id(said) if isinstance(said, str) else None
        found = [token, *(each.get(f"{name}_token_id") for each in others)]
        found = [each if isinstance(each, list) else [each] for each in found if each is not None]
        return checked(folder, f"{name}_token_id", sum(found, []), Rule(int, 0, vocab_size - 1, many=True))

    bos, eos, adds = ids("bos"), ids("eos"), options.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = tokenizer.pipeline.encode("").ids[:1] == bos[:1] != []
    return TextSpec("hf", payload, template, stop_tokens=frozenset(eos), bos_token=bos[0] if bos else None,
                    eos_token=eos[0] if eos else None, add_bos=adds, chat_bos=False)
