"""Rows of data sets that are on disk already: where nanochat keeps them, and how they are read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence as Seq
from pathlib import Path

from chatlm.common.errors import ConfigError
from chatlm.common.files import read_small
from chatlm.common.hub.find import nanochat_base
from chatlm.common.hub.local import home_folder
from chatlm.common.hub.shards import read_parts

MANIFEST = "manifest.json"  # which nanochat writes last, so that a folder with one is whole


def data_files(data_set: str, subset: str, split: str) -> list[Path]:
    """The files of a split, in order: nanochat's own of today (`task_data`), files of JSON lines that someone
    put there, or those in the cache of the library `datasets`, which nanochat used until July 2026; [] if
    they are not on this machine. ConfigError for a broken manifest."""
    folder = nanochat_base() / "task_data" / data_set.replace("/", "--") / subset / split
    if (folder / MANIFEST).exists():
        return [folder / name for name in read_manifest(folder / MANIFEST)]
    if lines := sorted(folder.glob("*.jsonl")):
        return lines
    hub = os.environ.get("HF_HOME") or home_folder() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(hub) / "datasets")
    wanted = re.compile(rf".*-{split}(-\d+-of-\d+)?\.arrow")
    versions: dict[Path, list[Path]] = {}
    for path in sorted((cache / data_set.replace("/", "___") / subset).glob("*/*/*.arrow")):
        if wanted.fullmatch(path.name):
            versions.setdefault(path.parent, []).append(path)
    return max(versions.values(), key=lambda files: files[0].stat().st_mtime, default=[])


def read_manifest(path: Path) -> list[str]:
    try:
        names = json.loads(read_small(path))
    except (ValueError, RecursionError):
        names = None
    if not (isinstance(names, list) and names and all(
            isinstance(name, str) and re.fullmatch(r"[\w.-]+\.parquet", name) for name in names)):
        raise ConfigError(f"{path} is not a list of parquet files beside it")
    return names


def read_table(paths: Seq[Path], columns: Seq[str]) -> list[dict]:
    """The rows of parquet, arrow or JSON lines files. ConfigError names what cannot be read."""
    rows = []
    for path in paths:
        for part in read_parts(path, columns):
            rows += part
    return rows
