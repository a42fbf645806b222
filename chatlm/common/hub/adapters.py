"""Folders of adapters, as peft saves them: which there are, and for which model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from chatlm.common.config import ADAPTER_NAME
from chatlm.common.errors import ConfigError, require_folder
from chatlm.common.hub.folder import folders_below
from chatlm.common.hub.stamps import ADAPTER_FILES, Stamp, adapter_stamp

CONFIG, WEIGHTS = ADAPTER_FILES
HUGE_PAGE = 2 << 20


class AdapterFiles(NamedTuple):
    """An adapter below a folder, and what tells whether its files have changed."""

    name: str
    folder: Path
    stamp: Stamp

    @property
    def nbytes(self) -> int:
        """About what a worker needs for it, until one has said it. decode_core gives each its own pages."""
        size = sum(size for _, size, _ in self.stamp)
        return size + -size % HUGE_PAGE


def adapter_at(folder: Path, name: str = "") -> AdapterFiles | None:
    """The adapter in a folder; None where one of its files is missing, empty or unreadable."""
    stamp = adapter_stamp(folder)
    there = stamp and all(size for _, size, _ in stamp)
    return AdapterFiles(name or folder.name, folder, stamp) if there else None


def adapters_in(folder: Path) -> list[AdapterFiles]:
    """The adapters in the folders of a folder, by name; without those whose names an adapter may not have."""
    try:
        places = sorted(place for place in folder.iterdir() if re.fullmatch(ADAPTER_NAME, place.name))
    except OSError:
        return []
    return [files for place in places if (files := adapter_at(place))]


def adapters_below(folder: Path) -> list[AdapterFiles]:
    """All adapters below a folder whose names an adapter may have; of equal names the first."""
    found = [files for place, names in folders_below(folder) if CONFIG in names
             and re.fullmatch(ADAPTER_NAME, place.name) and (files := adapter_at(place))]
    return [*{files.name: files for files in reversed(found)}.values()][::-1]


def named_adapters(words: Iterable[str]) -> tuple[list[AdapterFiles], list[Path]]:
    """What --adapter says: the adapters that it names, and the folders to watch. ConfigError for a name
    twice, and where no adapter is."""
    adapters: dict[str, AdapterFiles] = {}
    watched: list[Path] = []
    for word in words:
        name, equals, path = word.partition("=")
        folder = Path(path if equals else word).expanduser()
        if name in adapters:
            raise ConfigError(f"--adapter {word}: {adapters[name].folder} is called {name} too")
        require_folder(f"--adapter {word}", folder)
        if not equals and (folder / CONFIG).exists():
            raise ConfigError(f"--adapter {word}: an adapter needs a name: {folder.name}={word}")
        if not equals:
            watched.append(folder)
        elif files := adapter_at(folder, name):
            adapters[name] = files
        else:
            raise ConfigError(f"--adapter {word}: there is no {CONFIG} with an {WEIGHTS}")
    return [*adapters.values()], watched


def bytes_of_adapters(words: Iterable[str]) -> int:
    """About what a worker needs for those that --adapter names, as far as they are there."""
    total = 0
    for word in words:
        name, equals, path = word.partition("=")
        folder = Path(path if equals else word).expanduser()
        there = [adapter_at(folder)] if equals else adapters_in(folder)
        total += sum(files.nbytes for files in there if files)
    return total


def base_of(folder: Path) -> str:
    """The name of the model that an adapter was made for, as its config says; "" if it says none."""
    try:
        base = json.loads((folder / CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""  # the worker says what is wrong with it
    return base if isinstance(base, str) else ""


QUANTIZED = r"[-_. ]((unsloth|bnb|awq|gguf|bf16|[48]bit|gptq|fp8|f16|f32|(ud-)?i?q\d)\w*)$"  # ends of names


def short_name(name: str) -> str:
    """A model's name without its owner, its quantization and what is between letters and digits."""
    cached = re.search(r"models--.+?--(.+?)/snapshots/", f"{name}/")  # in huggingface_hub's cache
    name = cached[1] if cached else name.rstrip("/").rpartition("/")[2]
    while (shorter := re.sub(QUANTIZED, "", name.lower())) != name:
        name = shorter
    return re.sub(r"[\W_]", "", name)


def is_other_base(base, names: Iterable[str]) -> bool:
    """Does an adapter whose base_model_name_or_path is `base` say that it is for a model of another name?"""
    wanted = short_name(base) if isinstance(base, str) else ""
    has = [short for name in names if (short := short_name(name))]
    return bool(wanted and has) and not any(wanted.endswith(name) or name.endswith(wanted) for name in has)
