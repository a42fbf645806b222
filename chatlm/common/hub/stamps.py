"""The files of a model or an adapter, and whether they have changed."""

from __future__ import annotations

import glob
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource


# The path, size and modification time in ns of each file. A file with the same size and another time counts
# as changed, since comparing bytes would take as long as reading the model.
Stamp = tuple[tuple[str, int, int], ...]

ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors"  # as peft saves one
# The files of a model in a Hugging Face folder, apart from its weights and from the trainer's own files.
HF_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
            "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
            "hf_quant_config.json", "quantize_config.json", "quant_config.json", "preprocessor_config.json",
            "processor_config.json")
NANOGPT_FILE = "ckpt.pt"
NANOGPT_TOKENIZERS = ("meta.pkl", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                      "encoder.json", "vocab.bpe")
HF_PATTERNS = "*.safetensors", "additional_chat_templates/*.jinja"


@dataclass(frozen=True)
class Sighting:
    """A model, a checkpoint or an adapter below a folder, as a scan finds it."""

    path: Path
    stamp: Stamp = ()  # (): it is being written, or cannot be read now
    trouble: str = ""  # why it cannot be read

    @property
    def changed_s(self) -> float:
        return max((time_ns for _, _, time_ns in self.stamp), default=0) / 1e9


def stamp_of(paths: Iterable[Path]) -> Stamp:
    """() if one of the files is missing or is not a regular file."""
    stamp = []
    try:
        for path in paths:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return ()
            stamp.append((str(path), status.st_size, status.st_mtime_ns))
    except OSError:
        return ()
    return tuple(stamp)


def files_of(path: Path) -> list[Path]:
    """The files of a model: all parts of a GGUF file; the weights, tokenizer, template and configuration of a
    Hugging Face folder; a nanochat checkpoint with its meta file and tokenizer; nanoGPT's with its tokenizer
    next to it."""
    if path.is_dir():
        named = [path / name for name in HF_FILES if (path / name).exists()]
        return named + [file for pattern in HF_PATTERNS for file in sorted(path.glob(pattern))]
    if step := re.fullmatch(r"model_(\d+)\.pt", path.name):
        tokenizers = [file for file in nanochat_tokenizers(path) if file.exists()]
        return [path, path.with_name(f"meta_{step[1]}.json"), *tokenizers[:1]]
    if path.name == NANOGPT_FILE:
        return [path, *(file for name in NANOGPT_TOKENIZERS if (file := path.with_name(name)).exists())]
    if split := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name):
        return sorted(path.parent.glob(f"{glob.escape(split[1])}-*-of-{split[2]}.gguf"))
    return [path]


def nanochat_tokenizers(checkpoint: Path) -> list[Path]:
    """Where the tokenizer of a nanochat checkpoint may be. The first that exists is used."""
    folder = checkpoint.parent
    return [folder / "tokenizer.pkl", folder / "tokenizer" / "tokenizer.pkl",
            folder.parent.parent / "tokenizer" / "tokenizer.pkl"]


def model_stamp(path: Path, merged: Iterable[str] = ()) -> Stamp:
    """The stamp of a model's files and of the files of adapters that are `merged` into it (--lora)."""
    adapters = [Path(folder).expanduser() / name for folder in merged for name in ADAPTER_FILES]
    try:
        return stamp_of([*files_of(path), *adapters])
    except OSError:  # no permission to list its folder
        return ()


def adapter_stamp(folder: Path) -> Stamp:
    return stamp_of(folder / name for name in ADAPTER_FILES)


def refuse_changed_adapter(folder: Path, stamp: Stamp):
    if stamp and adapter_stamp(folder) != stamp:
        raise Changed(folder)


class Changed(ConfigError):
    """The files of a model or an adapter have changed since they were found."""

    def __init__(self, path: Path):
        super().__init__(f"{path} was changed or removed since it was found")


def refuse_changed(source: ModelSource, merged: Iterable[str] = ()):
    """ConfigError if a model's files no longer match its stamp: an answer that has begun must not continue
    with other weights."""
    if source.stamp and model_stamp(source.path, merged) != source.stamp:
        raise Changed(source.path)
