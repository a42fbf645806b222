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
from chatlm.common.hub.repository import TOKENIZERS, mmproj_for
from chatlm.common.hub.nanochat_checkpoints import meta_of, nanochat_tokenizers, step_of
from chatlm.common.hub.trainer_files import LITGPT_CONFIG, LITGPT_FILE, NANOGPT_FILE, is_litgpt_folder
from chatlm.common.hub.trainers import is_build_nanogpt

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource


# The path, size and modification time in ns of each file. A file with the same size and another time counts
# as changed, since comparing bytes would take as long as reading the model.
Stamp = tuple[tuple[str, int, int], ...]

ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors"  # as peft saves one
# The files of a model in a Hugging Face folder, apart from its weights and from the trainer's own files.
HF_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZERS,
            "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
            "chat_template.jinja", "chat_template.json",
            "hf_quant_config.json", "quantize_config.json", "quant_config.json", "preprocessor_config.json",
            "processor_config.json")
NANOGPT_TOKENIZERS = ("meta.pkl", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                      "encoder.json", "vocab.bpe")
LITGPT_FILES = LITGPT_CONFIG, LITGPT_FILE, "prompt_style.yaml"
HF_PATTERNS = "*.safetensors", "additional_chat_templates/*.jinja"


@dataclass(frozen=True)
class FoundFiles:
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
    """All files of the model at a path:

    - all parts of a GGUF file
    - the weights, tokenizer, template and configuration of a folder of Hugging Face or litgpt
    - a nanochat checkpoint, its meta file and its tokenizer
    - a checkpoint of nanoGPT or build-nanogpt, and the tokenizer beside it"""
    if path.is_dir():
        own = LITGPT_FILES if is_litgpt_folder(path) else ()
        named = [path / name for name in (*own, *HF_FILES) if (path / name).exists()]
        for pattern in HF_PATTERNS:
            named += sorted(path.glob(pattern))
        return named
    is_nanogpt = path.name == NANOGPT_FILE
    is_step = step_of(path.name) is not None
    if is_step:
        is_nanogpt = is_build_nanogpt(path)
    if is_step and not is_nanogpt:
        tokenizers = [file for file in nanochat_tokenizers(path) if file.exists()]
        return [path, meta_of(path), *tokenizers[:1]]
    if is_nanogpt:
        tokenizers = [path.with_name(name) for name in NANOGPT_TOKENIZERS]
        return [path, *filter(Path.exists, tokenizers)]
    return gguf_parts(path)


def gguf_parts(path: Path) -> list[Path]:
    """All files of a GGUF model that is split over several; else the file itself."""
    split = re.fullmatch(r"(?i)(.+)-\d{5}-(of-\d{5}\.gguf)", path.name)
    if not split:
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(split[1])}-*-{split[2]}"))


def mmproj_of(path: Path, settings: Settings) -> Path | None:
    """The image encoder of a GGUF model: --mmproj, else the file beside the model. Raises OSError if its
    folder cannot be listed."""
    if settings.mmproj:
        return Path(settings.mmproj).expanduser()
    if path.suffix.lower() != ".gguf":
        return None
    found = mmproj_for(path.name, (file.name for file in path.parent.iterdir()))
    return path.with_name(found[0]) if found else None


def files_with(path: Path, settings: Settings) -> list[Path]:
    """The files that decide what a model answers: its own, the adapters that are merged into it (--lora), and
    its image encoder."""
    files = files_of(path)
    for folder in settings.lora:
        files += [Path(folder).expanduser() / name for name in ADAPTER_FILES]
    if mmproj := mmproj_of(path, settings):
        files.append(mmproj)
    return files


def model_stamp(path: Path, settings: Settings) -> Stamp:
    """The stamp of all files that decide what a model answers."""
    try:
        return stamp_of(files_with(path, settings))
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


def refuse_changed(source: ModelSource, settings: Settings):
    """Raises Changed if a model's files no longer match its stamp: an answer that has begun must not go on
    with other weights."""
    if source.stamp and model_stamp(source.path, settings) != source.stamp:
        raise Changed(which_changed(source))


def which_changed(source: ModelSource) -> Path:
    """The first file that no longer matches a model's stamp. The model's path if a file was added."""
    for each in source.stamp:
        path = Path(each[0])
        if stamp_of([path]) != (each,):
            return path
    return source.path
