"""Which files hold a model's weights, and what is wrong with a file that cannot be read."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from chatlm.common.errors import ConfigError
from chatlm.common.files import opened, refuse_pointer, truncated
from chatlm.common.hub.stamps import gguf_parts
from chatlm.common.hub.trainer_files import LITGPT_FILE, is_litgpt_folder
from chatlm.common.log import log
from chatlm.worker.weights.rules import read_json


WHOLE = "model.safetensors"
MOST_NAMED = 8  # of files, by an error


def weight_files(folder: Path) -> list[Path]:
    """A folder's weights: the files that the index names, else model.safetensors, else a numbered set.
    ConfigError if one is missing.

    An index of files that are not there does not count beside a whole model.safetensors."""
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    numbered = numbered_set(there)
    names = [WHOLE]
    origin = "it must have"
    if index.exists():
        indexed = files_in_index(index)
        origin = f"{index.name} names"
        if WHOLE in there and not indexed <= {*there}:
            log.warning("%s names files that are not all there: %s is used", index, WHOLE)
        else:
            names = sorted(indexed)
    elif WHOLE not in there and numbered:
        stem, count = numbered.groups()
        names = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
        origin = f"according to the name of {numbered[0]} it must have"
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        has = f"it has {', '.join(there[:MOST_NAMED])}" if there else "it has no *.safetensors"
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        are = "are" if len(missing) > 1 else "is"
        raise ConfigError(f"{folder}: {origin} {', '.join(missing[:MOST_NAMED])}{more}, which {are} missing; "
                          f"{has}")
    return [folder / name for name in names]


def numbered_set(names: Iterable[str]) -> re.Match | None:
    """One file of a numbered set, rather of model-*.safetensors than of another; None without any."""
    matches = [re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name) for name in names]
    sets = [match for match in matches if match]
    return next((match for match in sets if match[1] == "model"), sets[0] if sets else None)


def files_in_index(index: Path) -> set[str]:
    """The names of the files that an index gives tensors. ConfigError if it is no such index."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(
            isinstance(name, str) and Path(name).name == name for name in files.values()):
        raise ConfigError(f"{index}: weight_map must map each tensor to a file name in this folder")
    return set(files.values())


def files_of_weights(path: Path) -> list[Path]:
    """All files with a model's weights; ConfigError if a folder lacks one."""
    if is_litgpt_folder(path):
        return [path / LITGPT_FILE]
    if path.is_dir():
        return weight_files(path)
    return gguf_parts(path)


def files_of_adapters(folders: Iterable[str]) -> list[Path]:
    """The weight files of adapters merged into the model, folder by folder."""
    return [file for folder in folders for file in sorted(Path(folder).expanduser().glob("*.safetensors"))]


def refuse_cut_checkpoint(path: Path):
    """ConfigError if a torch zip archive lacks the table at its end, or the file is only a pointer."""
    begin, size = beginning(path)
    with opened(path) as file:
        is_whole = zipfile.is_zipfile(file)
    if b"PK\3\4".startswith(begin[:4]) and not is_whole:
        raise truncated(path, size, "and the table of contents at its end is missing")


MOST_HEADER_BYTES = 100_000_000  # of a safetensors file; its library accepts no more


def refuse_cut_safetensors(path: Path):
    """ConfigError if a file ends before its header or its tensors do, or is only a pointer."""
    begin, size = beginning(path)
    if size < 8:
        raise truncated(path, size, "and the length of its header alone takes 8")
    needed = 8 + int.from_bytes(begin[:8], "little")
    if begin[8:9] not in (b"", b"{") or needed > MOST_HEADER_BYTES:
        return
    if size < needed:
        raise truncated(path, size, f"and its header ends at byte {needed:,}")
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        with opened(path) as file:
            tensors = json.loads(file.read(needed)[8:])
        needed += max(int(tensor["data_offsets"][1]) for name, tensor in tensors.items()
                      if name != "__metadata__")
        if size < needed:
            raise truncated(path, size, f"and its tensors end at byte {needed:,}")


def beginning(path: Path) -> tuple[bytes, int]:
    """A file's first bytes, and its size; ConfigError if it cannot be read or is only a pointer."""
    with opened(path) as file:
        begin = file.read(1000)
        size = os.fstat(file.fileno()).st_size
    refuse_pointer(path, begin)
    return begin, size
