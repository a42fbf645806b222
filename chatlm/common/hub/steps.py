"""The checkpoints of training runs below a folder, step by step, while they are written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence as Seq
from pathlib import Path
from typing import NamedTuple

from chatlm.common.errors import require_folder
from chatlm.common.hub.adapters import CONFIG, WEIGHTS
from chatlm.common.hub.local import NANOCHAT_FOLDERS
from chatlm.common.hub.stamps import HF_FILES, Stamp, nanochat_tokenizers, stamp_of

MOST_DEPTH = 3  # folders below the watched one


class Step(NamedTuple):
    """A checkpoint as its files are now, whole or not."""

    run: Path      # the folder of its run: nanochat's <tag> folder, or that of `checkpoint-N`
    step: int
    path: Path     # model_<step>.pt, or the folder checkpoint-<step>
    stamp: Stamp   # of each of its files: path, size, time of its last change in ns
    missing: str   # the name of a file that it lacks, "" if it has all
    adapts: bool = False  # is it an adapter, as peft saves it?

    @property
    def changed_s(self) -> float:
        return max((time_ns for _, _, time_ns in self.stamp), default=0) / 1e9


def find_steps(folder: Path) -> list[Step]:
    """nanochat's checkpoints and Hugging Face folders `checkpoint-N` below a folder, MOST_DEPTH deep, by run
    and step. Links are not followed. ConfigError if it is no folder."""
    require_folder(f"--watch {folder}", folder)
    steps = [step for place, names in folders_within(folder) for step in steps_in(place, names)]
    order = [*NANOCHAT_FOLDERS][::-1]  # as they are trained: base, mid, rl, sft
    return sorted(steps, key=lambda step: (
        order.index(step.run.parent.name) if step.run.parent.name in order else -1, str(step.run), step.step))


def folders_within(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folder and those within it, each with the names of its files; no hidden ones."""
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if depth < MOST_DEPTH and not name.startswith("."))
        yield Path(place), names


def steps_in(place: Path, names: Seq[str]) -> Iterator[Step]:
    if re.fullmatch(r"checkpoint-\d{1,15}", place.name):
        weights = [name for name in names if name.endswith(".safetensors")]
        adapts = CONFIG in names and "config.json" not in names
        files = sorted(weights + [name for name in names if name in HF_FILES or name == CONFIG])
        needed = (WEIGHTS,) if adapts else ("config.json", *parts_of(weights))
        missing = next((name for name in needed if name not in names), "" if weights else "*.safetensors")
        stamp = unlinked_stamp([place / name for name in files])
        yield Step(place.parent, int(place.name[11:]), place, stamp, missing, adapts)
    if place.parent.name in NANOCHAT_FOLDERS:
        tokenizers = [path for path in nanochat_tokenizers(place / "model_0.pt") if path.exists()]
        for name in names:
            if match := re.fullmatch(r"model_(\d{1,15})\.pt", name):
                meta = f"meta_{match[1]}.json"
                missing = "" if meta in names else meta
                files = [place / name, *([] if missing else [place / meta]), *tokenizers[:1]]
                yield Step(place, int(match[1]), place / name, unlinked_stamp(files), missing)


def parts_of(weights: Seq[str]) -> list[str]:
    """All files of the numbered sets of which some are there."""
    sets = {(match[1], match[2]) for name in weights
            if (match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name))}
    return [f"{stem}-{number:05}-of-{count}.safetensors"
            for stem, count in sorted(sets) for number in range(1, int(count) + 1)]


def unlinked_stamp(files: Seq[Path]) -> Stamp:
    """() also where one of the files is a link."""
    return () if any(map(Path.is_symlink, files)) else stamp_of(files)
