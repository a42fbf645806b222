"""The checkpoints of training runs below a folder, step by step, while they are written."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence as Seq
from pathlib import Path
from typing import NamedTuple

from chatlm.common.errors import ConfigError, require_folder
from chatlm.common.hub.adapters import CONFIG, WEIGHTS
from chatlm.common.hub.local import NANOCHAT_FOLDERS

MOST_DEPTH = 3  # folders below the watched one
# Of a Hugging Face folder, what a model is made of beside its weights. A trainer's own files come later.
HF_FILES = frozenset((
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"))
Stamp = tuple[tuple[str, int, int], ...]


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
        stamp = stamp_of(place / name for name in files)
        yield Step(place.parent, int(place.name[11:]), place, stamp, missing, adapts)
    if place.parent.name in NANOCHAT_FOLDERS:
        tokenizers = [path for path in (place / "tokenizer.pkl", place / "tokenizer" / "tokenizer.pkl",
                                        place.parent.parent / "tokenizer" / "tokenizer.pkl") if path.exists()]
        for name in names:
            if match := re.fullmatch(r"model_(\d{1,15})\.pt", name):
                meta = f"meta_{match[1]}.json"
                missing = "" if meta in names else meta
                files = [place / name, *([] if missing else [place / meta]), *tokenizers[:1]]
                yield Step(place, int(match[1]), place / name, stamp_of(files), missing)


def parts_of(weights: Seq[str]) -> list[str]:
    """All files of the numbered sets of which some are there."""
    sets = {(match[1], match[2]) for name in weights
            if (match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name))}
    return [f"{stem}-{number:05}-of-{count}.safetensors"
            for stem, count in sorted(sets) for number in range(1, int(count) + 1)]


def stamp_of(paths) -> Stamp:
    """() where one of the files has gone meanwhile, or is no regular file but a link, say."""
    stamp = []
    for path in map(Path, paths):
        try:
            status = path.lstat()
        except OSError:
            return ()
        if not stat.S_ISREG(status.st_mode):
            return ()
        stamp.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(stamp)


def refuse_changed(path: Path, stamp: Stamp):
    """ConfigError if a checkpoint's files are not those any more that were seen complete: an answer that has
    begun must not go on with other weights."""
    if stamp and stamp_of(name for name, _, _ in stamp) != stamp:
        raise ConfigError(f"{path} has changed or gone since it was found")
