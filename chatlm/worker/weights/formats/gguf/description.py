"""What a GGUF file says: the blocks of its model, and its tokenizer as a tokenizer.json."""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.common.log import log
from chatlm.common.messages.requests import InfillTokens, TextSpec
from chatlm.common.text.formats import template_of
from chatlm.worker.weights.families.family import Family, Header
from chatlm.worker.weights.families.table import FAMILIES, GGUF_FAMILIES
from chatlm.worker.weights.formats.configs import HF_DEFAULTS, complete_heads, family_blocks, unsupported
from chatlm.worker.weights.formats.gguf.file import (
    GGUF_OWN, GGUF_SIZES, ROPE_TENSORS, gguf_value, refuse_unknown)
from chatlm.worker.weights.formats.gguf.header import Metadata
from chatlm.worker.weights.formats.gguf.kept_texts import MadeText, kept_or_made
from chatlm.worker.weights.formats.gguf.texts import Texts
from chatlm.worker.weights.formats.rope_scaling import growing_queries, scaled_rope
from chatlm.worker.weights.purposes.embedders import pooling_of_gguf
from chatlm.worker.weights.rules import (
    LAYER_TYPES, Rule, check_divides, checked, own_system, suppressed_in, warn_of_templates)
from chatlm.worker.weights.text.control_tokens import END_TOKENS, misnamed
from chatlm.worker.weights.text.encoder_text import text_of_encoder
from chatlm.worker.weights.text.pipelines import (
    CONTROL, USER_DEFINED, byte_level_pipeline, merges_of_ids, merges_of_scores, sentencepiece_pipeline)
from chatlm.worker.weights.text.splits import MADE_MERGES, PIECES_WITH_MERGES, PRE_TOKENIZERS
from chatlm.worker.weights.text.vocabulary import vocabulary_from

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.text.vocabulary import Vocabulary


def gguf_blocks(path: Path, metadata: Mapping, stored: Mapping, context: int | None) -> tuple[str, Model]:
    """The row of FAMILIES and the blocks, made as if from a config.json with the metadata's values."""
    header, family, config = gguf_config(path, metadata, stored)
    rope = gguf_rope(header, config, context)
    return family, family_blocks(path, family, config, rope, biases_in(header))


def gguf_config(path: Path, metadata: Mapping, stored: Mapping) -> tuple[Header, str, dict[str, Any]]:
    """The header, the row of FAMILIES, and what a config.json would say, but for biases and rotation."""
    header, family = family_of(path, metadata, stored)
    changes, instead = FAMILIES[family].gguf.layers(header)
    changed = {header.own + key: value for key, value in changes.items()}
    header = header._replace(metadata={**metadata, **changed})
    for key, variant in FAMILIES[family].gguf.variants.items():
        if header.value(key, 0, low=0):
            family = variant
            break
    row = FAMILIES[family]
    config = HF_DEFAULTS | row.config
    refuse_unknown(header, row, config)
    for ours, theirs in GGUF_SIZES.items():
        config[ours] = header.value(theirs, 1e-5 if ours == "rms_norm_eps" else None)
    for ours, theirs in GGUF_OWN.items():
        if ours in config:
            config[ours] = header.value(theirs, config[ours]) or None
    complete_heads(path, config, {ours: header.own + theirs for ours, theirs in GGUF_SIZES.items()})
    head_size = config["head_dim"]
    header.value("attention.value_length", head_size, low=head_size, high=head_size)  # no other is supported
    config |= {"vocab_size": vocabulary_of(header), "tie_word_embeddings": "output.weight" not in stored}
    config |= layer_types_of(header, config) | instead
    config |= row.complete(path, config)
    config |= row.gguf.unsaid(config)
    if "norm_topk_prob" in config:
        config["norm_topk_prob"] = header.value("expert_weights_norm", config["norm_topk_prob"])
    return header, family, config


def biases_in(header: Header) -> set[str]:
    """Which biases there are: Facts.biases. The metadata do not say it, so the tensors tell."""
    names = {"qkv": ("attn_q", "attn_qkv"), "output": ("attn_output",), "ffn": ("ffn_down", "ffn_down_exps"),
             "norm": ("attn_norm", "attn_output_norm")}
    found = {part for part, any_of in names.items() if any(header.has(f"{name}.bias") for name in any_of)}
    return found | {"head"} if "output.bias" in header.stored else found


def family_of(path: Path, metadata: Mapping, stored: Mapping) -> tuple[Header, str]:
    """A header, and the row of FAMILIES of its architecture. ConfigError if the file is not a model of a
    known one."""
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
    """The rows of the embedding. There may be more than tokens, as padding."""
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
        has_none = "layer_types" in config and "sliding_window" in config and not config["sliding_window"]
        return {"layer_types": [LAYER_TYPES[0]] * layers} if has_none else {}
    if isinstance(pattern, list):
        windows = checked(header.path, header.own + key, pattern, Rule(bool, many=True), layers)
    else:  # every nth layer has none
        n = checked(header.path, header.own + key, pattern, Rule(int, 1))
        windows = [(layer + 1) % n > 0 for layer in range(layers)]
    return {"layer_types": [LAYER_TYPES[has_window] for has_window in windows]}


# llama.cpp's converter omits mscale and mscale_all_dim, and llama.cpp also computes the usual factor
MSCALE_UNKNOWN = ("%s: yarn multiplies queries and keys by %.3f, as usual. This is wrong if the original "
                  "config.json has mscale_all_dim, which the file cannot state; use the folder then")


def gguf_rope(header: Header, config: Mapping, context: int | None) -> dict:
    """The rotary settings of a model, as `hf_rope` makes them: from the scaling's keys, phi3's two lists of
    factors, or llama 3's single one."""
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
    """What the metadata say of scaling, as a config.json's rope_scaling. `lists`: those of ROPE_TENSORS that
    the file has."""
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
        unit = row.gguf.log_unit
        rope |= {"mscale": over * unit or 1.0, "mscale_all_dim": over * (unit or 1.0)}
    elif row.gguf.mscale_unknown:
        log.info(MSCALE_UNKNOWN, header.path, 0.1 * math.log(max(factor, 1)) + 1)
    return rope


MOST_NAMED = 8
MISNAMED = ("%s: its tokenizer.ggml.token_type says that these are no control tokens, but they count as "
            "such: %s%s")


def gguf_text(path: Path, metadata: Mapping) -> TextSpec:
    return gguf_texts(path, metadata)[0]


class TokenizerKeys(NamedTuple):
    """What a GGUF file says of its tokenizer."""

    path: Path
    metadata: Mapping[str, Any]

    def value(self, name: str, *default, **bounds) -> Any:
        """The value of a key, without `tokenizer.`, checked."""
        value = self.as_in_file(name, *default, **bounds)
        return list(value) if isinstance(value, Texts) else value

    def as_in_file(self, name: str, *default, **bounds) -> Any:
        """The same; long lists of strings are not decoded."""
        return gguf_value(self.path, self.metadata, f"tokenizer.{name}", *default, **bounds)

    def chat_template(self) -> str | None:
        return template_of(self.value("chat_template"),
                           self.metadata.get("tokenizer.chat_template.tool_use"))

    def other_templates(self) -> list[str]:
        """The names of chat templates that are not for every chat."""
        prefix = "tokenizer.chat_template."
        return [key.removeprefix(prefix) for key in self.metadata if key.startswith(prefix)]


def kept_texts(path: Path, metadata: Mapping) -> tuple[TextSpec, Vocabulary | None]:
    """`gguf_texts` of a file's own metadata: from the cache, if they were read before."""
    if not isinstance(metadata, Metadata) or metadata.spelled is None:
        return gguf_texts(path, metadata)
    return with_path(path, kept_or_made(metadata.spelled, partial(made_text, path, metadata)))


def gguf_texts(path: Path, metadata: Mapping) -> tuple[TextSpec, Vocabulary | None]:
    """The tokenizer (as the text of a tokenizer.json), the chat template and the tokens that end answers. Of
    a decoder also its vocabulary."""
    return with_path(path, made_text(path, metadata))


def with_path(path: Path, made: MadeText) -> tuple[TextSpec, Vocabulary | None]:
    """The text, for a file with this path. What is unusual about it is logged."""
    warn_of_templates(path, made.templates)
    if made.misnamed:
        names = ", ".join(map(shown, made.misnamed[:MOST_NAMED]))
        log.warning(MISNAMED, path, names, " .." * (len(made.misnamed) > MOST_NAMED))
    return replace(made.text, system=own_system(path)), made.vocabulary


def made_text(path: Path, metadata: Mapping) -> MadeText:
    """What the metadata say, whatever the path is."""
    keys = TokenizerKeys(path, metadata)
    value = keys.value
    model = value("ggml.model")
    tokens = value("ggml.tokens")
    if model in ("bert", "t5"):
        return MadeText(text_of_encoder(value), None)
    types = list(value("ggml.token_type", [1] * len(tokens), len(tokens)))
    last = len(tokens) - 1
    bos, eos, *others = (value(f"ggml.{name}_token_id", high=last) for name in ("bos", "eos", "eot", "eom"))
    template = keys.chat_template()
    control = misnamed(tokens, types, (bos, eos, *others), template)
    for token in control:
        types[token] = CONTROL
    name = value("ggml.pre", "default") if model == "gpt2" else model
    pre = PRE_TOKENIZERS.get(name)
    if pre:
        merges = keys.as_in_file("ggml.merges", *([[]] if name in MADE_MERGES else []))
        pipeline = byte_level_pipeline(tokens, merges or merges_of_ids(path, tokens), pre)
    else:
        pipeline = pieces_pipeline(keys, tokens, types, name)
    family = GGUF_FAMILIES.get(str(metadata.get("general.architecture")), "llama")
    strips = FAMILIES[family].gguf.strips_specials and not pre
    pipeline["added_tokens"] = added_tokens(tokens, types, strips)
    ends = {eos, *others} - {None}
    ends |= {entry["id"] for entry in pipeline["added_tokens"] if entry["content"] in END_TOKENS}
    # as in llama.cpp
    add_bos = model == "gemma4" or value("ggml.add_bos_token", pre is None or pre.add_bos)
    key = "tokenizer.ggml.suppress_tokens"
    text = TextSpec(
        "hf", tokenizer_json(pipeline), template, frozenset(ends), bos, eos, add_bos,
        infill=gguf_infill(metadata, len(tokens)),
        suppressed=suppressed_in(path, key, metadata.get(key), len(tokens)))
    return MadeText(text, vocabulary_from(tokens, pipeline["added_tokens"], pipeline["decoder"]),
                    [tokens[token] for token in control], [] if template else keys.other_templates())


def tokenizer_json(pipeline: dict) -> bytes:
    """The contents of a tokenizer.json as its text. Merges that are as in the file become text without an
    object for each."""
    merges = pipeline["model"]["merges"]
    if not isinstance(merges, Texts):
        return json.dumps(pipeline, ensure_ascii=False).encode()
    model = pipeline["model"] | {"merges": []}
    text = json.dumps(pipeline | {"model": model}, ensure_ascii=False)
    # no token has this in the text: JSON writes its quotes with a backslash
    return text.replace('"merges": []', f'"merges": {merges.as_json()}', 1).encode()


def pieces_pipeline(keys: TokenizerKeys, tokens: list[str], types: Seq[int], name: str) -> dict:
    """The parts of a tokenizer.json of a sentencepiece vocabulary. `name`: of the file's pre-tokenizer or
    model, which says whether the file lists the merges."""
    has_merges = name in PIECES_WITH_MERGES
    merges = keys.value("ggml.merges", *() if has_merges else ([],))
    if not merges:
        merges = merges_of_scores(
            keys.path, tokens, keys.value("ggml.scores", None, len(tokens)), types)
    unknown = tokens[keys.value("ggml.unknown_token_id", 0, high=len(tokens) - 1)]
    begins_with_space = keys.value("ggml.add_space_prefix", not has_merges)
    return sentencepiece_pipeline(tokens, merges, unknown, begins_with_space)


def added_tokens(tokens: Seq[str], types: Seq[int], strips: bool) -> list[dict]:
    """The tokens that are cut out of a text before it is cut into words. `strips`: with the spaces after
    them."""
    added = []
    for token_id in [index for index, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]:
        if token := tokens[token_id]:
            added.append({
                "id": token_id, "content": token, "special": types[token_id] == CONTROL, "normalized": False,
                "single_word": False, "lstrip": False,
                "rstrip": strips and token not in ("<unk>", "<s>", "<|endoftext|>")})
    return added


def gguf_infill(metadata: Mapping, vocab_size: int) -> InfillTokens:
    """The infill tokens that the metadata name; the first three may have either of two names. Ids outside the
    vocabulary are ignored, as in llama.cpp."""
    ids: dict[str, int] = {}
    for keys in ("prefix suffix middle", "fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep"):
        for name, key in zip(InfillTokens._fields, keys.split()):
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if type(token) is int and 0 <= token < vocab_size:
                ids[name] = token
    return InfillTokens()._replace(**ids)
