"""Folders of adapters, as peft saves them: where they are, and for which model they were made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chatlm.common.config import ADAPTER_NAME
from chatlm.common.errors import ConfigError, require_folder
from chatlm.common.hub.folder import seen_below
from chatlm.common.hub.nanochat_checkpoints import object_in
from chatlm.common.hub.stamps import ADAPTER_FILES, FoundFiles, adapter_stamp

CONFIG, WEIGHTS = ADAPTER_FILES
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class AdapterFiles(FoundFiles):
    """An adapter below a folder."""

    name: str = ""

    @property
    def nbytes(self) -> int:
        """About how many bytes a worker needs for it, until one has reported it. decode_core gives each its
        own huge pages."""
        size = sum(size for _, size, _ in self.stamp)
        return size + -size % HUGE_PAGE


def adapter_at(folder: Path, name: str = "") -> AdapterFiles:
    """The adapter in a folder; without a stamp where one of its files is missing, empty or unreadable."""
    stamp = adapter_stamp(folder)
    return AdapterFiles(folder, stamp if all(size for _, size, _ in stamp) else (), name=name or folder.name)


def adapters_below(*folders: Path, **limits: int) -> list[AdapterFiles]:
    """All adapters below some folders whose names are valid; the first if two have the same name."""
    def adapter_in(place: Path, names: Seq[str]) -> list[AdapterFiles]:
        there = {*ADAPTER_FILES} <= {*names} and re.fullmatch(ADAPTER_NAME, place.name)
        return [adapter_at(place)] if there else []

    first = {}
    for folder in folders:
        for files in seen_below(folder, AdapterFiles, adapter_in, **limits):
            first.setdefault(files.name or files.path, files)
    return [*first.values()]


def adapters_in(*folders: Path) -> list[AdapterFiles]:
    """The adapters in subfolders of some folders. ConfigError if one of these is not a folder."""
    for folder in folders:
        require_folder(f"--adapter {folder}", folder)
    found = adapters_below(*folders, depth=1, into_models=True)
    return [files for files in found if not files.name or files.path not in folders]


def named_adapters(words: Iterable[str]) -> tuple[list[AdapterFiles], list[Path]]:
    """The adapters that --adapter names, and the folders that it has watched. ConfigError for a duplicate
    name and where there is no adapter."""
    adapters: dict[str, AdapterFiles] = {}
    watched: list[Path] = []
    for word in words:
        name, equals, path = word.partition("=")
        folder = Path(path if equals else word).expanduser()
        if name in adapters:
            raise ConfigError(f"--adapter {word}: {adapters[name].path} has the name {name} too")
        require_folder(f"--adapter {word}", folder)
        if not equals and (folder / CONFIG).exists():
            raise ConfigError(f"--adapter {word}: an adapter needs a name: {folder.name}={word}")
        if not equals:
            watched.append(folder)
        elif (files := adapter_at(folder, name)).stamp:
            adapters[name] = files
        else:
            raise ConfigError(f"--adapter {word}: there is no {CONFIG} with an {WEIGHTS}")
    return [*adapters.values()], watched


def bytes_of_adapters(words: Iterable[str]) -> int:
    """About how many bytes a worker needs for the adapters of --adapter that exist."""
    total = 0
    for word in words:
        with suppress(ConfigError, OSError):
            named, watched = named_adapters([word])
            total += sum(files.nbytes for files in named + adapters_in(*watched))
    return total


def base_of(folder: Path) -> str:
    """The name of the model that an adapter was made for, from its config; "" if it has none that can be one.
    The worker reports what is wrong with the file."""
    base = object_in(folder / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and len(base) <= LONGEST_BASE else ""


LONGEST_BASE = 4096  # the longest path that a system has; a name of the hub has at most 193 characters
LONGEST_NAME = 255   # of one file or folder
QUANTIZED = r"[-_. ]((unsloth|bnb|awq|gguf|bf16|[48]bit|gptq|fp8|f16|f32|(ud-)?i?q\d)\w*)$"  # ends of names


def short_name(name: str) -> str:
    """A model's name without its owner, its quantization, and anything but letters and digits."""
    parts = name[-LONGEST_BASE:].rstrip("/").split("/")
    name = parts[-1]
    if "snapshots" in parts[1:]:  # a path in huggingface_hub's cache
        folder = parts[parts.index("snapshots", 1) - 1]
        _, mark, repository = folder.partition("models--")
        name = repository.partition("--")[2] or name if mark else name
    name = name[-LONGEST_NAME:]  # the time of the pattern grows with the square
    while (shorter := re.sub(QUANTIZED, "", name.lower())) != name:
        name = shorter
    return re.sub(r"[\W_]", "", name)


def is_other_base(base, names: Iterable[str]) -> bool:
    """Was an adapter whose base_model_name_or_path is `base` made for a model with another name?"""
    wanted = short_name(base) if isinstance(base, str) else ""
    has = [short for name in names if (short := short_name(name))]
    return bool(wanted and has) and not any(wanted.endswith(name) or name.endswith(wanted) for name in has)
