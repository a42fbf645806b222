"""What a Hugging Face folder says: the blocks of its model, its tokenizer and its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import read_text, refuse_cut_json
from chatlm.common.jsontext import whole_unicode
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.formats import template_of
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.formats.configs import HF_KEYS, complete_heads, family_blocks, family_config
from chatlm.worker.weights.formats.rope_scaling import ORIGINAL, growing_queries, scaled_rope
from chatlm.worker.weights.purposes.classifiers import refuse_classifier
from chatlm.worker.weights.rules import (
    LAYER_TYPES, Rule, check_divides, checked, read_json, suppressed_in, warn_of_templates)
from chatlm.worker.weights.text.folder_tokenizers import folder_tokenizer
from chatlm.worker.weights.text.named_tokens import tokenizer_options, with_named_tokens
from chatlm.worker.weights.text.trial import refuse_endless

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.model.blocks.model import Model


GROWTH = "llama_4_scaling_beta"  # of Ministral 3's queries


def hf_rope(path: Path, family: str, config: Mapping, context: int | None) -> dict:
    """The rotary settings of a model, from a config.json with rope_scaling, or with rope_parameters for all
    layers or by type."""
    row = FAMILIES[family]
    if row.own_attentions:
        return {"max_positions": config["max_position_embeddings"]}
    name = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    rope, local = by_type(path, name, config)
    rope = row.rope_of(path, name, config, rope)
    beta = None
    if row.queries_grow:
        beta = rope.get(GROWTH)
        rope = {key: setting for key, setting in rope.items()
                if key not in (GROWTH, "max_position_embeddings")}
    least = 0.01 if "partial_rotary_factor" in row.config else 1  # other families ignore it
    part = checked(path, "partial_rotary_factor",
                   rope.get("partial_rotary_factor", config["partial_rotary_factor"]),
                   Rule(float, least, 1, optional=True))
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
        original = checked(path, f"{name}.{ORIGINAL}", rope.get(ORIGINAL), HF_KEYS[ORIGINAL])
        checked(path, f"{name}.{GROWTH}", beta, Rule(float, 0, 10))
        fields |= growing_queries(fields, beta, original, context)
    return fields


def by_type(path: Path, name: str, config: Mapping) -> tuple[dict, dict]:
    """The rotary parameters under `name`: of layers with full attention, and of those with a window where
    they have their own."""
    rope = config[name] or {}
    local = {}
    if "rope_local_base_freq" in config and isinstance(rope, dict) and rope.keys() & set(LAYER_TYPES):
        rope, local = (rope.get(layer_type) or {} for layer_type in LAYER_TYPES)
    for scaling in (rope, local):
        is_object = isinstance(scaling, dict)
        if not is_object or scaling is local and local.get("rope_type", "default") != "default":
            raise ConfigError(f"{path}: {name} is {shown(scaling)}; it must be an object, with the rope_type "
                              "default for sliding_attention")
    return rope, local


def hf_blocks(path: Path, context: int | None) -> tuple[str, Model]:
    """The family and the blocks of a config.json, for contexts of `context` tokens (None: the model's
    own)."""
    return described_blocks(path, read_json(path), context)


def described_blocks(path: Path, raw: dict, context: int | None) -> tuple[str, Model]:
    """`hf_blocks` of any file that says what `raw`, a config.json, does."""
    family, config = family_config(path, raw)
    complete_heads(path, config)
    model = family_blocks(path, family, config, hf_rope(path, family, config, context))
    if not model.of_texts:
        refuse_classifier(path, raw, family)
    return family, model


def hf_template(folder: Path, options: Mapping) -> str | None:
    """The chat template: from chat_template.jinja, else from chat_template.json or the tokenizer's `options`.
    Of several named ones it takes `default`, and `tool_use` for chats with tools."""
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
    """The tokenizer, the chat template, and the tokens that other files name as bos and eos."""
    options = tokenizer_options(folder)
    path, payload = folder_tokenizer(folder, options)
    generation, config = (read_json(folder / f"{name}.json", needed=False)
                          for name in ("generation_config", "config"))
    payload, tokenizer = fitting_tokenizer(path, payload, options, vocab_size)
    pipeline = getattr(tokenizer, "pipeline")  # of a HuggingFaceTokenizer
    template = hf_template(folder, options)

    def ids(name: str) -> list[int]:
        """The tokens that the files name for this role."""
        text = options.get(f"{name}_token")
        if isinstance(text, dict):
            text = text.get("content")
        stated = [pipeline.token_to_id(whole_unicode(text)) if isinstance(text, str) else None]
        stated += [other.get(f"{name}_token_id") for other in (generation, config)]
        tokens = []
        for value in stated:
            if value is not None:
                tokens += value if isinstance(value, list) else [value]
        return checked(folder, f"{name}_token_id", tokens, Rule(int, 0, vocab_size - 1, many=True))

    bos = ids("bos")
    eos = ids("eos")
    adds_bos = options.get("add_bos_token")
    if not isinstance(adds_bos, bool):
        adds_bos = pipeline.encode("").ids[:1] == bos[:1] != []
    suppressed = suppressed_in(folder / "generation_config.json", "suppress_tokens",
                               generation.get("suppress_tokens"), vocab_size)
    return TextSpec("hf", payload, template, stop_tokens=frozenset(eos), bos_token=bos[0] if bos else None,
                    eos_token=eos[0] if eos else None, add_bos=adds_bos, chat_bos=False,
                    suppressed=suppressed)


def fitting_tokenizer(path: Path, payload: bytes, options: Mapping,
                      vocab_size: int) -> tuple[bytes, Tokenizer]:
    """A folder's tokenizer.json (`payload`, made from the file `path`) with the tokens that other files name,
    and without those for which the model has no row; and its tokenizer. ConfigError if others have no row
    either."""
    refuse_endless(path, TextSpec("hf", payload))
    try:
        tokenizer = open_tokenizer(TextSpec("hf", payload))
        if tokenizer.vocab_size > vocab_size:  # gemma3 has an image token that its text model does not know
            content = json.loads(payload)
            content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
            payload = json.dumps(content, ensure_ascii=False).encode()
            tokenizer = open_tokenizer(TextSpec("hf", payload))
    except ConfigError as error:
        refuse_cut_json(path, payload)
        raise ConfigError(f"{path}: {error}") from None
    named = with_named_tokens(path.parent, payload, getattr(tokenizer, "pipeline"), options, vocab_size)
    if named is not payload:
        payload = named
        tokenizer = open_tokenizer(TextSpec("hf", payload))
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{path.parent}: {path.name} has {tokenizer.vocab_size:,} tokens, the model "
                          f"{vocab_size:,}")
    return payload, tokenizer
