"""Tokenizers of GGUF files of encoders: WordPiece (llama.cpp's model `bert`) and Unigram (`t5`)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence as Seq
from typing import Any

from chatlm.common.messages.requests import TextSpec
from chatlm.worker.weights.text.pipelines import CONTROL, special_token

LONGEST_WORD = 100  # characters; a longer one is unknown


def text_of_encoder(value: Callable[..., Any]) -> TextSpec:
    """A GGUF file's tokenizer as the text of a tokenizer.json. `value` reads a key of its metadata and checks
    it."""
    tokens = value("ggml.tokens")
    types = value("ggml.token_type", [1] * len(tokens), len(tokens))
    last = len(tokens) - 1
    names = ("bos", "cls"), ("eos", "seperator"), ("unknown",)  # as llama.cpp spells it

    def token_of(*names: str) -> int | None:
        ids = (value(f"ggml.{name}_token_id", high=last) for name in names)
        return next((token for token in ids if token is not None), None)

    is_wordpiece = value("ggml.model") == "bert"
    begin, end, unknown = (token_of(*(reversed(keys) if is_wordpiece else keys)) for keys in names)
    if is_wordpiece:
        tokens = [word_of(token, token_type) for token, token_type in zip(tokens, types)]
        unknown = index_of(tokens, "[UNK]") if unknown is None else unknown
        lower = value("ggml.normalizer.lowercase", not any(re.search("^[A-Z]", token) for token in tokens))
        pipeline = wordpiece_pipeline(tokens, tokens[unknown], lower)
    else:
        scores = value("ggml.scores", None, len(tokens))
        unknown = index_of(tokens, "<unk>") if unknown is None else unknown
        pipeline = unigram_pipeline(
            tokens, scores, unknown, charsmap_of(value), value("ggml.remove_extra_whitespaces", True),
            value("ggml.add_space_prefix", True))
    begins = [begin] if begin is not None and value("ggml.add_bos_token", True) else []
    ends = [end] if end is not None and value("ggml.add_eos_token", True) else []
    pipeline |= {"version": "1.0",
                 "post_processor": framed(tokens, begins, ends, twice=not is_wordpiece),
                 "added_tokens": added_tokens(tokens, types)}
    return TextSpec("hf", json.dumps(pipeline, ensure_ascii=False).encode(), None,
                    frozenset(ends), begin, end, add_bos=bool(begins))


def added_tokens(tokens: Seq[str], types: Seq[int]) -> list[dict]:
    """The control tokens, as a tokenizer.json lists them."""
    added = []
    for token_id, (token, token_type) in enumerate(zip(tokens, types)):
        if token and token_type == CONTROL:
            added.append(special_token(token_id, token))
    return added


def index_of(tokens: Seq[str], name: str) -> int:
    """The id of a token; 0 if the vocabulary has none."""
    return tokens.index(name) if name in tokens else 0


def word_of(token: str, token_type: int) -> str:
    """A token as WordPiece's makers write it. llama.cpp marks the beginnings of words with U+2581, they mark
    continuations with ##."""
    if token.startswith("\u2581"):
        return token[1:]
    special = token_type == CONTROL or re.fullmatch(r"\[\w+\]", token)
    return token if special else f"##{token}"


def wordpiece_pipeline(tokens: Seq[str], unknown: str, lowercase: bool) -> dict:
    return {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                           "strip_accents": None, "lowercase": lowercase},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "model": {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(tokens)},
                      "unk_token": unknown, "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": LONGEST_WORD}}


def unigram_pipeline(tokens: Seq[str], scores: Seq[float], unknown: int, charsmap: str,
                     trims: bool, space_prefix: bool) -> dict:
    """sentencepiece's Unigram. `charsmap` (base64) changes characters first. `trims`: runs of spaces count as
    one, and those around the text are dropped."""
    scheme = "always" if space_prefix else "never"
    mark = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": True}
    steps = [{"type": "WhitespaceSplit"}, mark] if trims else [mark]
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": mark,
            "model": {"type": "Unigram", "unk_id": unknown, "byte_fallback": False,
                      "vocab": [[token, score] for token, score in zip(tokens, scores)]}}


def charsmap_of(value: Callable[..., Any]) -> str:
    numbers = value("ggml.precompiled_charsmap", [])
    return base64.b64encode(bytes(number & 255 for number in numbers)).decode()


def framed(tokens: Seq[str], begins: Seq[int], ends: Seq[int], twice: bool) -> dict | None:
    """The post_processor that puts special tokens around a text, and between the texts of a pair, where
    RoBERTa's vocabularies have two."""
    if not begins and not ends:
        return None

    def special(ids: Seq[int], part: int) -> list[dict]:
        return [{"SpecialToken": {"id": tokens[token], "type_id": part}} for token in ids]

    one, other = ({"Sequence": {"id": name, "type_id": part}} for part, name in enumerate("AB"))
    single = [*special(begins, 0), one, *special(ends, 0)]
    pair = [*single, *(special(ends, 1) if twice else []), other, *special(ends, 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {
        tokens[token]: {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]}
        for token in (*begins, *ends)}}
