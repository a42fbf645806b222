"""A folder's tokenizer and chat template as the metadata of a GGUF file: `texts_of`.

Byte-level BPE becomes llama.cpp's model `gpt2`, sentencepiece's BPE its model `llama`. The reader of GGUF
files reads back what is written; a tokenizer that would give other tokens is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError, RequestError, shown
from chatlm.common.log import log
from chatlm.common.messages.requests import Message, TextSpec
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.doctor.hard_texts import HARD_TEXTS
from chatlm.worker.doctor.sample_text import TEXT
from chatlm.worker.weights.formats.gguf.description import gguf_texts
from chatlm.worker.weights.rules import read_json
from chatlm.worker.weights.text.pipelines import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from chatlm.worker.weights.text.sentencepiece_file import BPE, SPACE, UNUSED, read_sentencepiece

if TYPE_CHECKING:
    from chatlm.worker.weights.formats.folder.model import FolderModel

# llama.cpp's names of ways to cut texts into words, the likeliest first
PRE_NAMES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "deepseek-llm", "gpt-4o", "olmo", "falcon")
PADDING_SCORE = -10_000.0  # of a token that the vocabulary lacks, as llama.cpp's converter writes it
ADDED_SCORE = -1000.0      # of a token that was added to the vocabulary
OTHER_SPACES = ("%s: its tokenizer_config.json has legacy false, which a GGUF file cannot say: after special "
                "tokens, and before a text that begins with a space, the file's tokens have a space more, as "
                "in a file by llama.cpp's converter")
CHAT = (Message("user", "Grüße! 1 + 1?"), Message("assistant", "It's 2."), Message("user", " And  2 + 2?"))
INSTEAD = "convert the folder with llama.cpp's convert_hf_to_gguf.py, and quantize the file that it writes"


def texts_of(model: FolderModel, architecture: str) -> dict[str, Any]:
    """The tokenizer and the chat template. ConfigError for tokenizers of other kinds."""
    text, _ = model.text()
    path = model.source.path
    state = json.loads(text.payload) if text.kind == "hf" else {}
    bpe = state.get("model") or {}
    decoder = state.get("decoder") or {}
    size = model.model.vocab_size
    stated = {}
    if isinstance(text.chat_template, str):
        stated["tokenizer.chat_template"] = text.chat_template
    for name, token in (("bos", text.bos_token), ("eos", text.eos_token)):
        if token is not None:
            stated[f"tokenizer.ggml.{name}_token_id"] = token
    stated["tokenizer.ggml.add_bos_token"] = text.add_bos
    if bpe.get("type") == "BPE" and decoder.get("type") == "ByteLevel":
        stated |= byte_level(path / "tokenizer.json", state, size)
        return stated | {"tokenizer.ggml.pre": pre_of(path / "tokenizer.json", text, stated, architecture)}
    if (path / "tokenizer.model").exists():
        pieces = pieces_of_model(path, state, size)
    elif bpe.get("type") == "BPE" and bpe.get("byte_fallback"):
        pieces = pieces_of_json(path / "tokenizer.json", state, size)
    else:
        raise ConfigError(f"{path}: only tokenizers of byte-level BPE and of sentencepiece's BPE can be "
                          f"written; {INSTEAD}")
    stated |= pieces.stated()
    return stated | space_prefix_of(path, text, stated, architecture)


def byte_level(path: Path, state: Mapping[str, Any], size: int) -> dict[str, Any]:
    """llama.cpp's `gpt2`, for a model with `size` tokens. `state`: the tokenizer.json."""
    bpe = state["model"]
    tokens = [f"[PAD{token}]" for token in range(size)]
    types = [UNUSED] * size
    added = {entry["id"]: entry for entry in state.get("added_tokens", ())}
    for content, token in (*bpe["vocab"].items(), *((entry["content"], id) for id, entry in added.items())):
        check_id(path, content, token, size)
        tokens[token] = content
        types[token] = NORMAL
    for token, entry in added.items():
        types[token] = CONTROL if entry.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}


def check_id(path: Path, content: str, token: int, size: int):
    if token >= size:
        raise ConfigError(f"{path}: {shown(content)} has the id {token}, and the model has {size} tokens")


def pre_of(path: Path, text: TextSpec, stated: Mapping[str, Any], architecture: str) -> str:
    """The way to cut texts into words that gives the folder's tokens. ConfigError if none does."""
    expected = encodings(text)
    for name in PRE_NAMES:
        metadata = {**stated, "general.architecture": architecture, "tokenizer.ggml.pre": name}
        found, _ = gguf_texts(path, metadata)
        if encodings(found) == expected:
            return name
    raise ConfigError(f"{path}: texts are cut into words in a way that has no name in GGUF files; {INSTEAD}")


def encodings(text: TextSpec) -> list[list[int]]:
    tokenizer = open_tokenizer(replace(text, chat_template=None))
    return [[*tokenizer.encode(each)] for each in (TEXT, *HARD_TEXTS)]


# ---- sentencepiece's BPE, llama.cpp's `llama`


@dataclass
class SentencePieceVocabulary:
    """A vocabulary of so many tokens as llama.cpp's converter writes it (conversion/base.py,
    _create_vocab_sentencepiece): pieces, the scores by which they merge, and types."""

    tokens: list[str]
    scores: list[float]
    types: list[int]

    @classmethod
    def empty(cls, size: int) -> SentencePieceVocabulary:
        tokens = [f"[PAD{token}]" for token in range(size)]
        return cls(tokens, [PADDING_SCORE] * size, [UNUSED] * size)

    def put(self, path: Path, token: int, content: str, score: float, kind: int):
        check_id(path, content, token, len(self.tokens))
        self.tokens[token] = content
        self.scores[token] = score
        self.types[token] = kind

    def add(self, path: Path, token: int, content: str, special: bool):
        """A token that is cut out of a text before all else."""
        if not (special or looks_special(content)):
            content = content.replace(SPACE, " ")
            self.put(path, token, content, ADDED_SCORE, USER_DEFINED)
        else:
            self.put(path, token, content, ADDED_SCORE, CONTROL)

    def stated(self) -> dict[str, Any]:
        found = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
                 "tokenizer.ggml.tokens": self.tokens, "tokenizer.ggml.scores": self.scores,
                 "tokenizer.ggml.token_type": self.types}
        if UNKNOWN in self.types:
            found["tokenizer.ggml.unknown_token_id"] = self.types.index(UNKNOWN)
        elif "<unk>" in self.tokens:
            found["tokenizer.ggml.unknown_token_id"] = self.tokens.index("<unk>")
        return found


def looks_special(content: str) -> bool:
    """The converter's does_token_look_special."""
    return (content in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
            or content.startswith("<|") and content.endswith("|>")
            or content.startswith("<｜") and content.endswith("｜>")
            or content.startswith("<unused") and content.endswith(">"))


def pieces_of_model(folder: Path, state: Mapping[str, Any], size: int) -> SentencePieceVocabulary:
    """Of a tokenizer.model and the folder's lists of added tokens. `state`: its tokenizer.json."""
    path = folder / "tokenizer.model"
    model = read_sentencepiece(path)
    if model.algorithm != BPE:
        raise ConfigError(f"{path}: of sentencepiece's tokenizers only those of the type bpe can be written, "
                          f"and this one is unigram; {INSTEAD}")
    pieces = SentencePieceVocabulary.empty(size)
    for token, (piece, score, kind) in enumerate(zip(model.pieces, model.scores, model.types)):
        pieces.put(path, token, piece, score, NORMAL if kind == USER_DEFINED else kind)
    added = folder / "added_tokens.json"
    for content, token in read_json(added, needed=False).items():
        pieces.put(added, token, content, ADDED_SCORE, USER_DEFINED)
    options = folder / "tokenizer_config.json"
    for token, entry in (read_json(options, needed=False).get("added_tokens_decoder") or {}).items():
        pieces.add(options, int(token), entry["content"], bool(entry.get("special")))
    add_missing(folder / "tokenizer.json", state, pieces)
    return pieces


def add_missing(path: Path, state: Mapping[str, Any], pieces: SentencePieceVocabulary):
    """Added tokens of a tokenizer.json that nothing else has named."""
    for entry in state.get("added_tokens", ()):
        token = entry["id"]
        check_id(path, entry["content"], token, len(pieces.tokens))
        if pieces.types[token] == UNUSED:
            pieces.add(path, token, entry["content"], entry.get("special", False))


def pieces_of_json(path: Path, state: Mapping[str, Any], size: int) -> SentencePieceVocabulary:
    """Of a tokenizer.json that was made of a tokenizer.model: what merges first has the best score. The
    converter gives all pieces one score, with which llama.cpp merges wrongly."""
    bpe = state["model"]
    pieces = SentencePieceVocabulary.empty(size)
    for content, token in bpe["vocab"].items():
        kind = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", content) else NORMAL
        pieces.put(path, token, content, 0.0, UNKNOWN if content == bpe.get("unk_token") else kind)
    for entry in state.get("added_tokens", ()):
        if pieces.types[entry["id"]] != UNKNOWN:
            pieces.add(path, entry["id"], entry["content"], entry.get("special", False))
    for rank, merge in reversed([*enumerate(bpe["merges"])]):
        whole = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        if whole in bpe["vocab"]:
            pieces.scores[bpe["vocab"][whole]] = -1.0 - rank
    return pieces


def space_prefix_of(folder: Path, text: TextSpec, stated: Mapping[str, Any],
                    architecture: str) -> dict[str, Any]:
    """The key that says whether a text begins with a space, if it must be there for the folder's tokens.
    ConfigError if the tokens would be others with it and without."""
    key = "tokenizer.ggml.add_space_prefix"
    has_prefix = read_json(folder / "tokenizer_config.json", needed=False).get("add_prefix_space")
    choices = [{}, {key: False}] if has_prefix is None else [{key: bool(has_prefix)}, {}, {key: False}]
    tokens = zip(stated["tokenizer.ggml.tokens"], stated["tokenizer.ggml.token_type"])
    added = [token for token, kind in tokens if kind in (CONTROL, USER_DEFINED)]
    expected = encodings(text)
    inexact = None
    for choice in choices:
        metadata = {**stated, **choice, "general.architecture": architecture}
        found, _ = gguf_texts(folder, metadata)
        others = [sample for sample, ours, theirs in zip((TEXT, *HARD_TEXTS), encodings(found), expected)
                  if ours != theirs and not any(token in sample for token in added)]
        if not others and (not text.chat_template or same_chats(text, found)):
            return choice
        if inexact is None and all(sample.startswith((" ", SPACE)) for sample in others):
            inexact = choice
    if inexact is None:
        raise ConfigError(f"{folder}: its tokenizer would give other tokens in a GGUF file; {INSTEAD}")
    log.warning(OTHER_SPACES, folder)
    return inexact


def same_chats(text: TextSpec, other: TextSpec) -> bool:
    """Does a chat become the same tokens?"""
    try:
        return open_tokenizer(other).render(CHAT) == open_tokenizer(text).render(CHAT)
    except RequestError:  # the template refuses the chat
        return True
