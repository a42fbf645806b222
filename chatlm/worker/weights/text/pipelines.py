"""A GGUF file's vocabulary as the parts of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Seq, Set
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError

if TYPE_CHECKING:
    from chatlm.worker.weights.text.splits import PreTokenizer


# tokenizer.ggml.token_type
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
BYTE = 6


def bpe_pipeline(tokens: Seq[str], merges: list, normalizer, pre_tokenizer, decoder, **options) -> dict:
    """The contents of a tokenizer.json, except its added tokens. The vocabulary is in the order of its texts:
    `tokenizers` puts it into a sorted map first, which takes it a fifth less time so (151,936 tokens)."""
    vocabulary = dict(sorted((token, i) for i, token in enumerate(tokens)))
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, **options}
    return {"version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder,
            "model": model}


def byte_level_pipeline(tokens: Seq[str], merges: list, pre: PreTokenizer) -> dict:
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
             for pattern in pre.splits]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.gpt2}
    return bpe_pipeline(tokens, merges, {"type": "NFC"} if pre.nfc else None,
                        {"type": "Sequence", "pretokenizers": [*steps, byte_level]}, byte_level,
                        ignore_merges=pre.ignore_merges)


def sentencepiece_pipeline(tokens: Seq[str], merges: list, unknown: str, space_prefix: bool) -> dict:
    """llama's sentencepiece BPE. Spaces are U+2581; with `space_prefix` a text begins with one.

    Unknown characters become bytes."""
    steps: list[dict] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    undo = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
    if space_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return bpe_pipeline(tokens, merges, {"type": "Sequence", "normalizers": steps}, None,
                        {"type": "Sequence", "decoders": undo},
                        byte_fallback=True, fuse_unk=True, unk_token=unknown)


def merges_of_scores(where: Path | str, tokens: Seq[str], scores: Seq[float],
                     types: Seq[int]) -> list[tuple[str, str]]:
    """The merges, which a sentencepiece vocabulary does not list.

    Two pieces merge if they are a piece together; the best score comes first."""
    usable = {token: score for token, score, token_type in zip(tokens, scores, types)
              if token_type not in (UNKNOWN, CONTROL, BYTE)}
    refuse_long(where, usable)
    merges = [(score, len(token[:i]), token[:i], token[i:]) for token, score in usable.items()
              for i in range(1, len(token)) if token[:i] in usable and token[i:] in usable]
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    return [(left, right) for _, _, left, right in merges]


def merges_of_ids(where: Path | str, tokens: Seq[str]) -> list[tuple[str, str]]:
    """The merges of a vocabulary whose ids are ranks, as tiktoken's are: of two neighbours that are a token
    together, those with the least id merge first."""
    return merges_among(where, tokens, set(tokens))


MOST_CUT = 1 << 28  # characters in all cuts of all tokens; the 130,072 of a tekken.json have 0.03 of it


def refuse_long(where: Path | str, tokens: Iterable[str]):
    """ConfigError for tokens of which all cuts take too long, such as one of 600,000 characters."""
    if sum(len(token) ** 2 for token in tokens) > MOST_CUT:
        raise ConfigError(f"{where}: its tokens are too long: one has {max(map(len, tokens)):,} characters, "
                          "and all ways to cut them would take too long")


def merges_among(where: Path | str, tokens: Iterable[str], known: Set[str]) -> list[tuple[str, str]]:
    """Each way to make one of these tokens of two known ones, in the order of the tokens."""
    refuse_long(where, known)
    merges = []
    for token in tokens:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known:
                merges.append(pair)
    return merges


def special_token(token_id: int, content: str) -> dict[str, Any]:
    """A control token as a tokenizer.json lists it."""
    return {"id": token_id, "content": content, "special": True, "normalized": False, "single_word": False,
            "lstrip": False, "rstrip": False}


def begins_with(name: str, token: int) -> dict[str, Any]:
    """The post_processor that puts a token before a text."""
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    return {"type": "TemplateProcessing", "single": [special, first], "pair": [special, first, second],
            "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}}}
