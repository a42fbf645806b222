"""Vocabularies of tiktoken's kind as a tokenizer.json: Mistral's `tekken.json`, and files `*.tiktoken`.

They list tokens as bytes, with ranks and without merges: two neighbours merge if they are a token together,
those with the least rank first."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence as Seq
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, error_text, shown
from chatlm.common.files import read_object, read_small
from chatlm.common.text.load import in_characters
from chatlm.worker.weights.rules import MOST_TOKENS, Rule, checked
from chatlm.worker.weights.text.pipelines import (
    begins_with, byte_level_pipeline, merges_of_ids, special_token)
from chatlm.worker.weights.text.splits import KIMI_SPLIT, QWEN2_SPLIT, PreTokenizer

# of tekken.json files up to version 7, which do not list them
TEKKEN_SPECIALS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
    "[/SYSTEM_PROMPT] [TOOL_CONTENT]").split()
TEKKEN_BOS = "<s>"
TEKKEN_CONFIG = {
    "pattern": Rule(str), "default_num_special_tokens": Rule(int, 1, 1 << 16),  # of published files 1,000
    "default_vocab_size": Rule(int, 2, MOST_TOKENS)}
MOST_TEKKEN = 64 << 20  # bytes; published files have up to 20 MB
KIMI_SPECIALS = 256
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def tekken_json(path: Path, _: Mapping) -> bytes:
    """A tekken.json as the text of a tokenizer.json. ConfigError if it is no such file."""
    content = read_object(path, MOST_TEKKEN)
    config = content.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no tekken.json: config is {shown(config)}; it must be an object")
    pattern, special_count, size = (
        checked(path, f"config.{key}", config.get(key), rule) for key, rule in TEKKEN_CONFIG.items())
    count = size - special_count
    try:
        vocabulary = content["vocab"][:max(count, 0)]
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in vocabulary]
        ranks = [entry["rank"] for entry in vocabulary]
        listed = content.get("special_tokens") or [
            {"rank": rank, "token_str": name} for rank, name in enumerate(TEKKEN_SPECIALS)]
        named = {entry["rank"]: str(entry["token_str"]) for entry in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no tekken.json: {shown(error_text(error))}") from None
    if len(tokens) != count or ranks != list(range(count)):
        raise ConfigError(f"{path}: its tokens are not in the order of their ranks, or some are missing")
    specials = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(special_count)]
    pre = PreTokenizer((pattern,), ignore_merges=True)
    pipeline = pipeline_of(path, tokens, specials, pre, specials_first=True)
    if TEKKEN_BOS in specials:
        pipeline["post_processor"] = begins_with(TEKKEN_BOS, specials.index(TEKKEN_BOS))
    return json.dumps(pipeline, ensure_ascii=False).encode()


def kimi_json(path: Path, options: Mapping) -> bytes:
    """Kimi's tiktoken.model. added_tokens_decoder of tokenizer_config.json (`options`) names its special
    tokens."""
    if not str(options.get("tokenizer_class", "")).startswith("TikToken"):
        raise ConfigError(f"{path}: the tokenizer_class {shown(options.get('tokenizer_class'))} of "
                          "tokenizer_config.json is not known; this server reads the tiktoken.model of "
                          "TikTokenTokenizer (Kimi), as each other class cuts texts in its own way")
    tokens = ranked_tokens(path)
    decoder = options.get("added_tokens_decoder")
    names = decoder if isinstance(decoder, dict) else {}
    specials = []
    for number in range(len(tokens), len(tokens) + KIMI_SPECIALS):
        stated = names.get(str(number))
        content = stated.get("content") if isinstance(stated, dict) else None
        specials.append(content if isinstance(content, str) else f"<|reserved_token_{number}|>")
    pipeline = pipeline_of(path, tokens, specials, PreTokenizer((KIMI_SPLIT,), ignore_merges=True))
    return json.dumps(pipeline, ensure_ascii=False).encode()


def qwen_json(path: Path, _: Mapping) -> bytes:
    """qwen.tiktoken of Qwen 1, whose code names the special tokens."""
    pre = PreTokenizer((QWEN2_SPLIT,), nfc=True, ignore_merges=True)
    pipeline = pipeline_of(path, ranked_tokens(path), QWEN_SPECIALS, pre)
    return json.dumps(pipeline, ensure_ascii=False).encode()


def ranked_tokens(path: Path) -> list[bytes]:
    """The tokens of a file with a line for each: its bytes in base64, and its rank."""
    tokens = []
    for number, line in enumerate(read_small(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if int(rank) != len(tokens):
                raise ValueError("ranks must follow each other")
        except (ValueError, binascii.Error) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        tokens.append(token)
    if not tokens:
        raise ConfigError(f"{path} has no tokens")
    return tokens


def pipeline_of(path: Path, tokens: Seq[bytes], specials: Seq[str], pre: PreTokenizer,
                specials_first: bool = False) -> dict[str, Any]:
    """A tokenizer.json of tokens by rank, and of special tokens before or after them."""
    pieces = [in_characters(token) for token in tokens]
    everything = [*specials, *pieces] if specials_first else [*pieces, *specials]
    if len(set(everything)) < len(everything):
        raise ConfigError(f"{path}: two of its tokens are the same")
    pipeline = byte_level_pipeline(everything, merges_of_ids(path, pieces), pre)
    first = 0 if specials_first else len(pieces)
    pipeline["added_tokens"] = [
        special_token(first + place, name) for place, name in enumerate(specials)]
    return pipeline
