"""Finds the checkpoints of training runs below a folder while they are being written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from chatlm.common.config import Settings
from chatlm.common.errors import require_folder
from chatlm.common.hub.adapter_folders import CONFIG, WEIGHTS
from chatlm.common.hub.folder import seen_below
from chatlm.common.hub.nanochat_checkpoints import (
    AS_TRAINED, CheckpointPlace, checkpoints_in, is_wanted, meta_of, nanochat_tokenizers, step_of)
from chatlm.common.hub.stamps import HF_FILES, LITGPT_FILES, FoundFiles, files_of, stamp_of
from chatlm.common.hub.trainers import foreign, is_build_nanogpt
from chatlm.common.hub.trainer_files import LITGPT_CONFIG, LITGPT_FILE, is_litgpt

MOST_DEPTH = 4  # folders below the watched one: experiments/<experiment>/<tag>/<stage>
CHECKPOINT = re.compile(r"checkpoint-\d{1,15}")  # a folder of transformers' Trainer


@dataclass(frozen=True)
class CheckpointFiles(FoundFiles):
    """A checkpoint as its files are now, complete or not."""

    step: int = 0
    missing: str = ""     # the name of a missing file, "" if it is complete
    adapts: bool = False  # is it an adapter, as peft saves it?
    place: CheckpointPlace | None = None  # of nanochat's

    @property
    def run(self) -> Path:
        """The folder with the checkpoints of this run."""
        return self.path.parent

    @property
    def tag(self) -> str:
        """What people call its run."""
        return self.place.tag if self.place else self.run.name

    def is_chosen(self, settings: Settings) -> bool:
        """Whether its run fits -i and -g. The runs of other trainers have no stage, and are tagged by their
        folders."""
        if self.place:
            return is_wanted(self.place, settings)
        return settings.source is None and settings.model_tag in (None, self.run.name)


def find_steps(folder: Path) -> list[CheckpointFiles]:
    """Checkpoints of nanochat and build-nanogpt, Hugging Face folders `checkpoint-N` and litgpt's `step-N` at
    most MOST_DEPTH below a folder, by run and step; files of other trainers with what is to be done with
    them. Links are not followed. ConfigError if it is not a folder."""
    require_folder(f"--watch {folder}", folder)
    steps = seen_below(folder, CheckpointFiles, steps_in, links=0, depth=MOST_DEPTH, into_models=True)
    return sorted(steps, key=lambda step: (
        AS_TRAINED.index(step.place.stage) if step.place else -1, str(step.run), step.step))


def steps_in(folder: Path, names: Seq[str]) -> Iterator[CheckpointFiles]:
    if CHECKPOINT.fullmatch(folder.name):
        weights = [name for name in names if name.endswith(".safetensors")]
        adapts = CONFIG in names and "config.json" not in names
        files = sorted(weights + [name for name in names if name in HF_FILES or name == CONFIG])
        needed = (WEIGHTS,) if adapts else ("config.json", *names_of_parts(weights))
        missing = next((name for name in needed if name not in names), "" if weights else "*.safetensors")
        yield from unlinked(folder, int(folder.name[11:]), [folder / name for name in files], missing, adapts)
    checkpoints = checkpoints_in(folder, names)
    if not checkpoints:
        yield from steps_of_other_trainers(folder, names)
        return
    tokenizer = [path for path in nanochat_tokenizers(checkpoints[0].path) if path.exists()][:1]
    for checkpoint in checkpoints:
        meta = meta_of(checkpoint.path)
        missing = "" if meta.name in names else meta.name
        files = [checkpoint.path, *([] if missing else [meta]), *tokenizer]
        yield from unlinked(checkpoint.path, checkpoint.step, files, missing, place=checkpoint.place)


def steps_of_other_trainers(folder: Path, names: Seq[str]) -> Iterator[CheckpointFiles]:
    """litgpt's folder `step-N`, build-nanogpt's files, and what is to be done with files of others."""
    if re.fullmatch(r"step-\d{1,15}", folder.name) and LITGPT_FILE in names:
        missing = "" if LITGPT_CONFIG in names else LITGPT_CONFIG
        files = [folder / name for name in sorted(names) if name in (*LITGPT_FILES, *HF_FILES)]
        yield from unlinked(folder, int(folder.name[5:]), files, missing)
        return
    beside_model = any(CHECKPOINT.fullmatch(place.name) for place in (folder, folder.parent))
    if beside_model or is_litgpt(names):  # the state of a training; a model that is no step, such as `final`
        return
    for path in (folder, *(folder / name for name in names)):
        if (step := step_of(path.name)) is not None and is_build_nanogpt(path):
            yield from unlinked(path, step, files_of(path), "")
        elif error := foreign(path):
            yield CheckpointFiles(path, trouble=f"not served: {error}")


def names_of_parts(weights: Seq[str]) -> list[str]:
    """The names of all files of each numbered set of which at least one file exists."""
    sets = {(match[1], match[2]) for name in weights
            if (match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name))}
    return [f"{stem}-{number:05}-of-{count}.safetensors"
            for stem, count in sorted(sets) for number in range(1, int(count) + 1)]


def unlinked(path: Path, step: int, files: Seq[Path], missing: str, adapts: bool = False,
             place: CheckpointPlace | None = None) -> list[CheckpointFiles]:
    """No step if one of its files is a link."""
    linked = any(map(Path.is_symlink, files))
    return [] if linked else [CheckpointFiles(path, stamp_of(files), "", step, missing, adapts, place)]
