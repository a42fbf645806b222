"""sentencepiece's `tokenizer.model` as a tokenizer.json, which gives the same ids.

The file is a message of protocol buffers (sentencepiece_model.proto): its pieces with scores and types, and
how it was trained and normalizes. Reading the few fields that count takes less code than a library."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import read_small
from chatlm.common.text.charsmap import check_charsmap
from chatlm.worker.weights.text.pipelines import (
    BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, begins_with, bpe_pipeline, merges_among, special_token)

UNIGRAM = 1
BPE = 2
ALGORITHMS = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}
UNUSED = 5
NEVER = -1e9        # the score of a piece that no text may become
SPACE = "\u2581"    # how pieces write a space
VARINT = 0
FIXED_64 = 1
BYTES = 2
FIXED_32 = 5


@dataclass
class PieceModel:
    """What a file says. Defaults are those of sentencepiece_model.proto, for fields that it leaves out."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    algorithm: int = UNIGRAM
    spaces_follow: bool = False         # treat_whitespace_as_suffix
    byte_fallback: bool = False
    charsmap: bytes = b""               # precompiled_charsmap: which characters become others
    begins_with_space: bool = True      # add_dummy_prefix
    trims: bool = True                  # remove_extra_whitespaces
    bos: int = 1                        # bos_id; other than a token's id: none

    def of_type(self, *types: int) -> list[int]:
        return [token for token, kind in enumerate(self.types) if kind in types]


def sentencepiece_json(path: Path, options: Mapping) -> bytes:
    """A tokenizer.model as the text of a tokenizer.json. `options`: of tokenizer_config.json. ConfigError if
    the file is broken, or of a kind that `tokenizers` cannot do."""
    model = read_sentencepiece(path)
    check_user_defined(path, model)
    pipeline = bpe_parts(path, model) if model.algorithm == BPE else unigram_parts(model)
    pipeline["normalizer"] = normalizer_of(model, options)
    pipeline["pre_tokenizer"] = pre_tokenizer_of(model, options)
    pipeline["decoder"] = decoder_of(model, options)
    pipeline["added_tokens"] = [
        special_token(token, model.pieces[token])
        for token in model.of_type(CONTROL, UNKNOWN, UNUSED) if model.pieces[token]]
    if model.bos in model.of_type(CONTROL):
        pipeline["post_processor"] = begins_with(model.pieces[model.bos], model.bos)
    return json.dumps(pipeline, ensure_ascii=False).encode()


def read_sentencepiece(path: Path) -> PieceModel:
    """ConfigError if the file is broken, or of a kind that has no equal elsewhere."""
    data = read_small(path)
    try:
        model = model_of(data)
    except (ValueError, IndexError, struct.error):
        raise ConfigError(f"{path} is no model of sentencepiece, or is cut off") from None
    check(path, model)
    try:
        check_charsmap(model.charsmap)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return model


def check(path: Path, model: PieceModel):
    if model.algorithm not in (UNIGRAM, BPE):
        kind = ALGORITHMS.get(model.algorithm, str(model.algorithm))
        raise ConfigError(f"{path}: its model_type is {kind}; it must be bpe or unigram")
    if model.spaces_follow:
        raise ConfigError(f"{path}: treat_whitespace_as_suffix is true; it must be false")
    if not model.pieces:
        raise ConfigError(f"{path} has no pieces")
    if len(set(model.pieces)) < len(model.pieces):
        raise ConfigError(f"{path}: two of its pieces have the same text")
    if len(model.of_type(UNKNOWN)) != 1:
        raise ConfigError(f"{path} has {len(model.of_type(UNKNOWN))} unknown pieces; there must be one")


def check_user_defined(path: Path, model: PieceModel):
    """sentencepiece cuts user-defined pieces out of a text before it normalizes the rest. `tokenizers` cuts
    afterwards, so ids would differ where the normalizer changes such a piece."""
    from tokenizers import normalizers
    steps = changes_of(model)
    if not steps:
        return
    change = normalizers.Sequence([normalizer_from(step) for step in steps])
    for token in model.of_type(USER_DEFINED):
        piece = model.pieces[token]
        around = f"x{piece}x"
        if change.normalize_str(around) != around:
            raise ConfigError(f"{path}: its normalizer would change the user-defined piece {shown(piece)}, "
                              "which this server cannot do as sentencepiece does")


# ---- the file


def model_of(data: bytes) -> PieceModel:
    model = PieceModel()
    for number, value in fields(data):
        if number not in (1, 2, 3):
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"the field {number} is no message")
        part = PieceMessage(dict(fields(value)))
        if number == 1:
            model.pieces.append(part.data(1).decode("utf-8"))
            model.scores.append(part.real(2))
            model.types.append(part.number(3, NORMAL))
        elif number == 2:
            model.algorithm = part.number(3, UNIGRAM)
            model.spaces_follow = bool(part.number(24, 0))
            model.byte_fallback = bool(part.number(35, 0))
            model.bos = part.number(41, 1)
        else:
            model.charsmap = part.data(2)
            model.begins_with_space = bool(part.number(3, 1))
            model.trims = bool(part.number(4, 1))
    return model


@dataclass
class PieceMessage:
    """A message in a message. ValueError for a field of another kind than the asked one."""

    values: dict[int, Any]

    def number(self, field: int, default: int) -> int:
        value = self.values.get(field, default)
        if type(value) is not int:
            raise ValueError(f"the field {field} is no number")
        return value

    def data(self, field: int) -> bytes:
        value = self.values.get(field, b"")
        if type(value) is not bytes:
            raise ValueError(f"the field {field} has no bytes")
        return value

    def real(self, field: int) -> float:
        [value] = struct.unpack("<f", self.data(field) or bytes(4))
        if not math.isfinite(value):
            raise ValueError(f"the field {field} is not finite")
        return value


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of a message's fields. ValueError or IndexError if it is no message."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        if kind == BYTES:
            size, at = varint(data, at)
        elif kind in (FIXED_32, FIXED_64):
            size = 4 if kind == FIXED_32 else 8
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(data):
            raise ValueError("a field that is cut off")
        yield key >> 3, data[at:at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(a number in groups of seven bits, where the next field begins)."""
    number = 0
    for place in range(10):
        byte = data[at + place]
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at + place + 1
    raise ValueError("a number of more than ten bytes")


# ---- the parts of a tokenizer.json


def bpe_parts(path: Path, model: PieceModel) -> dict[str, Any]:
    [unknown] = model.of_type(UNKNOWN)
    return bpe_pipeline(model.pieces, merges_of(path, model), None, None, None, fuse_unk=True,
                        unk_token=model.pieces[unknown], byte_fallback=model.byte_fallback,
                        ignore_merges=bool(model.of_type(USER_DEFINED)))


def merges_of(path: Path, model: PieceModel) -> list[tuple[str, str]]:
    """Each way to make a piece of two others; pieces with the best scores come first."""
    normal = model.of_type(NORMAL)
    best_first = sorted(normal, key=lambda token: -model.scores[token])
    pieces = [model.pieces[token] for token in best_first]
    return merges_among(path, pieces, set(pieces))


def unigram_parts(model: PieceModel) -> dict[str, Any]:
    """A text never becomes a control, unknown, unused or byte piece by its letters, and always becomes a
    user-defined one."""
    [unknown] = model.of_type(UNKNOWN)
    scores = list(model.scores)
    for token in model.of_type(CONTROL, UNKNOWN, UNUSED, BYTE):
        scores[token] = NEVER
    for token in model.of_type(USER_DEFINED):
        scores[token] = 0.0
    return {"version": "1.0", "model": {
        "type": "Unigram", "unk_id": unknown, "byte_fallback": model.byte_fallback,
        "vocab": [[piece, score] for piece, score in zip(model.pieces, scores)]}}


def normalizer_of(model: PieceModel, options: Mapping) -> dict[str, Any] | None:
    steps = changes_of(model)
    if not marks_first_text_only(model, options):
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
        if has_prefix(model, options):
            steps.append({"type": "Prepend", "prepend": SPACE})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def changes_of(model: PieceModel) -> list[dict[str, Any]]:
    """What happens to a text before its spaces are marked."""
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.trims:  # spaces only; Strip would take tabs and line breaks too
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return steps


def normalizer_from(step: Mapping) -> Any:
    """A step of a tokenizer.json as an object of `tokenizers`."""
    from tokenizers import Regex, normalizers
    if step["type"] == "Precompiled":
        return normalizers.Precompiled(base64.b64decode(step["precompiled_charsmap"]))
    return normalizers.Replace(Regex(step["pattern"]["Regex"]), step["content"])


def has_prefix(model: PieceModel, options: Mapping) -> bool:
    return model.begins_with_space and options.get("add_prefix_space") is not False


def marks_first_text_only(model: PieceModel, options: Mapping) -> bool:
    """Does only the text at the beginning get a space, and none after an added token?"""
    return has_prefix(model, options) and options.get("legacy") is False


def pre_tokenizer_of(model: PieceModel, options: Mapping) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if marks_first_text_only(model, options):
        steps.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False})
    users = sorted((model.pieces[token] for token in model.of_type(USER_DEFINED)), key=len, reverse=True)
    if users:  # they are cut out of a text before all else
        steps.append({"type": "Split", "pattern": {"Regex": "|".join(map(escaped, users))},
                      "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


def escaped(text: str) -> str:
    return re.sub(r"[^\w\s]|_", lambda sign: f"\\{sign[0]}" if sign[0].isascii() else sign[0], text)


def decoder_of(model: PieceModel, options: Mapping) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}]
    if has_prefix(model, options):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
