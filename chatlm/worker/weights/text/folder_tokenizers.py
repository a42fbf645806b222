"""The tokenizer of a Hugging Face folder: its tokenizer.json, or one made of the file that it has instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from chatlm.common.errors import ConfigError
from chatlm.common.files import read_small
from chatlm.common.hub.repository import other_tokenizers
from chatlm.worker.weights.text.sentencepiece_file import sentencepiece_json
from chatlm.worker.weights.text.tiktoken_file import kimi_json, qwen_json, tekken_json

MOST_BYTES = 96 << 20  # of a tokenizer.json, which the front reads, too; published ones have up to 33 MB
MAKERS = {  # in this order; chatlm.common.hub.repository.TOKENIZERS has the same names
    "tokenizer.model": sentencepiece_json,
    "tekken.json": tekken_json,
    "tiktoken.model": kimi_json,
    "qwen.tiktoken": qwen_json}


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", *MAKERS))


def folder_tokenizer(folder: Path, options: Mapping) -> tuple[Path, bytes]:
    """(the file that says what the tokenizer is, the text of a tokenizer.json). `options`: of
    tokenizer_config.json. ConfigError if the folder has none that this server reads."""
    path = folder / "tokenizer.json"
    if path.exists():
        return path, read_small(path, MOST_BYTES)
    for name, make in MAKERS.items():
        path = folder / name
        if path.exists():
            return path, make(path, options)
    raise ConfigError(f"{folder} has no tokenizer.json"
                      + other_tokenizers(file.name for file in folder.iterdir()))
