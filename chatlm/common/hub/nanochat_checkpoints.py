"""Finds nanochat's checkpoints, and chooses the one that is meant.

A checkpoint is a file `model_<step>.pt` with `meta_<step>.json` beside it. Its folder tells its run and its
stage:

    <base>/chatsft_checkpoints/<tag>/            upstream's main branch
    <base>/experiments/<experiment>/<tag>/sft/   upstream's pull request 800: the stages are base, mid, sft
                                                 and rl in July 2026, base and chat in September
    <folder>/                                    published weights: tokenizer.pkl is there too, and nothing
                                                 says the stage

This module reads names of files and folders, and small JSON files; never weights."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chatlm.common.errors import ConfigError
from chatlm.common.files import read_object
from chatlm.common.messages.requests import ModelSource

if TYPE_CHECKING:
    from chatlm.common.config import Settings


STAGES = ("sft", "chat", "rl", "mid", "base")  # the best for a chat first
AS_TRAINED = ("base", "mid", "sft", "chat", "rl")
STAGE_FOLDERS = {"chatsft_checkpoints": "sft", "chatrl_checkpoints": "rl", "mid_checkpoints": "mid",
                 "base_checkpoints": "base"}  # of a base folder without experiments
MODEL_FILE = r"model_(\d{1,15})\.pt"
UNNAMED = "default"  # upstream's name for an experiment that was given none
DATASET = "climbmix"  # upstream's default


def step_of(name: str) -> int | None:
    """The step of a checkpoint's file; None for other names."""
    match = re.fullmatch(MODEL_FILE, name)
    return int(match[1]) if match else None


def meta_of(model: Path) -> Path:
    """The path of a checkpoint's JSON file."""
    return model.with_name(model.name.replace("model_", "meta_").replace(".pt", ".json"))


class CheckpointPlace(NamedTuple):
    """What a folder's path tells about the checkpoints in it."""

    stage: str
    tag: str
    experiment: str = ""  # "": it lies in no experiment
    alone: bool = False   # published weights, which lie in no base folder

    @property
    def tag_with_experiment(self) -> str:
        return f"{self.experiment}/{self.tag}" if self.experiment else self.tag

    @property
    def lineage(self) -> str:
        """The name of all stages of its tag."""
        named = self.experiment not in ("", UNNAMED)
        return f"{self.experiment}-{self.tag}" if named else self.tag

    @property
    def model_name(self) -> str:
        return self.tag if self.alone else f"nanochat-{self.lineage}-{self.stage}"


class Checkpoint(NamedTuple):
    place: CheckpointPlace
    step: int
    path: Path  # model_<step>.pt

    def __str__(self) -> str:
        """The values of -i, -g and -s that choose it, with slashes between."""
        return f"{self.place.stage}/{self.place.tag_with_experiment}/{self.step}"

    @property
    def tag_folder(self) -> Path:
        inside = self.place.experiment
        return self.path.parent.parent if inside else self.path.parent


# --- one folder --------------------------------------------------------------------------------------------


def place_of(folder: Path, names: Collection[str]) -> CheckpointPlace | None:
    """What a folder with these files is; None if it cannot have nanochat's checkpoints."""
    folder = Path(os.path.abspath(folder))
    parent = folder.parent
    if parent.name in STAGE_FOLDERS:
        return CheckpointPlace(STAGE_FOLDERS[parent.name], folder.name)
    if folder.name in STAGES and parent.parent.name and not any(map(Path.exists, own_tokenizers(folder))):
        return CheckpointPlace(folder.name, parent.name, parent.parent.name)
    models = [folder / name for name in sorted(names)
              if step_of(name) is not None and meta_of(folder / name).name in names]
    if not models:
        return None
    stage = "base" if is_told_a_depth(read_meta(models[0])) else "chat"
    return CheckpointPlace(stage, folder.name, alone=True)


def read_meta(model: Path) -> dict[str, Any]:
    """The object in the meta file of a checkpoint; {} if there is none."""
    return object_in(meta_of(model))


def object_in(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; {} if there is none, or it cannot be read."""
    try:
        return read_object(path)
    except ConfigError:
        return {}


def part_of(meta: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object in a meta file; {} if it is none."""
    value = meta.get(name)
    return value if isinstance(value, dict) else {}


def is_told_a_depth(meta: Mapping[str, Any]) -> bool:
    """Whether base training wrote it: no other stage is told the model's depth."""
    return "depth" in part_of(meta, "user_config")


def checkpoints_in(folder: Path, names: Collection[str]) -> list[Checkpoint]:
    """The checkpoints among a folder's files, complete or not, by step."""
    steps = {}
    for name in names:
        step = step_of(name)
        if step is not None:
            steps[step] = name
    place = place_of(folder, names) if steps else None
    if place is None:
        return []
    return [Checkpoint(place, step, folder / name) for step, name in sorted(steps.items())
            if not place.alone or meta_of(Path(name)).name in names]


def checkpoint_at(model: Path) -> Checkpoint | None:
    """The checkpoint that a file is, judged by its path; None if the path does not tell."""
    found = checkpoints_in(model.parent, [model.name, meta_of(model).name])
    return found[0] if found else None


def published(names: Collection[str], file: str = "") -> list[str]:
    """The files of the best checkpoint in a repository, or of the one that `file` names: its meta file, its
    tokenizer and, last, its weights. [] if there is none. The best is the last step of the best stage."""
    found = []
    for name in names:
        path = Path(name)
        step = step_of(path.name)
        meta = str(meta_of(path))
        tokenizer = next((str(place) for place in tokenizers_near(path, names) if str(place) in names), "")
        if step is not None and file in ("", name, path.name) and meta in names and tokenizer:
            place = place_of(Path("/repository") / path.parent, [path.name])
            rank = -STAGES.index(place.stage) if place else 1
            found.append((rank, step, name, [meta, tokenizer, name]))
    return max(found)[-1] if found else []


def tokenizers_near(checkpoint: Path, names: Collection[str]) -> list[Path]:
    """Where a checkpoint's tokenizer may be among a repository's files, the likeliest first."""
    folder = checkpoint.parent
    of_data_sets = sorted(name for name in names if name.endswith("/tokenizer/tokenizer.pkl"))
    return [*own_tokenizers(folder), folder.parent.parent / "tokenizer" / "tokenizer.pkl",
            *map(Path, of_data_sets)]


# --- all checkpoints below a folder ------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints below a folder: a base folder, or a part of one (all experiments, one of them, a tag, a
    stage). The best stage for a chat comes first.

    Raises PermissionError if a folder cannot be read, rather than pass over its checkpoints in silence."""
    folder = folder.resolve() if ".." in folder.parts else folder.absolute()
    if not folder.is_dir():
        return []
    refuse_unreadable(folder)
    found: dict[Path, Checkpoint] = {}
    for place in folders_of_steps(folder):
        found |= {each.path: each for each in checkpoints_in(place, os.listdir(place))}
    return sorted(found.values(), key=lambda each: (
        STAGES.index(each.place.stage), each.place.tag_with_experiment, each.step))


def place_among(named: Path, target: Path) -> tuple[Path, list[Checkpoint]]:
    """A folder has two paths: the one that was given, and the one that links lead to. Returns the path that
    tells more about the checkpoints, and the checkpoints."""
    found = {folder: find_checkpoints(folder) for folder in (named, target)}
    place = min((folder for folder in found if found[folder]),
                key=lambda folder: found[folder][0].place.alone, default=named)
    return place, found[place]


def folders_of_steps(folder: Path) -> Iterator[Path]:
    """The folders at and below a folder that may have checkpoints."""
    yield folder
    if folder.name in STAGE_FOLDERS:  # its tags
        yield from folders_in(folder, certain=True)
    for name in STAGE_FOLDERS:  # of a base folder
        yield from folders_in(folder / name, certain=True)
    yield from stages_in(folder)  # of a tag
    for tag in folders_in(folder, certain=is_experiments(folder.parent)):  # of an experiment
        yield from stages_in(tag)
    for experiments in (folder, folder / "experiments"):
        certain = is_experiments(experiments)
        for experiment in folders_in(experiments, certain):
            for tag in folders_in(experiment, certain):
                yield from stages_in(tag)


def is_experiments(folder: Path) -> bool:
    """Whether it is the folder of all experiments."""
    named = os.environ.get("NANOCHAT_EXPERIMENTS_DIR")
    return folder.name == "experiments" or bool(named) and Path(named).absolute() == folder.absolute()


def stages_in(tag: Path) -> list[Path]:
    if not is_readable(tag):  # it may be a folder of anything
        return []
    stages = [tag / stage for stage in STAGES if (tag / stage).is_dir()]
    for stage in stages:
        refuse_unreadable(stage)
    return stages


def folders_in(folder: Path, certain: bool) -> list[Path]:
    """The folders in a folder; [] if it does not exist.

    certain: it surely has checkpoints, so PermissionError is raised if it, or one of them, cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(folder / entry.name for entry in entries
                           if not entry.name.startswith(".") and is_folder(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        if certain:
            raise
        return []
    if certain:
        for path in found:
            refuse_unreadable(path)
    return found


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def refuse_unreadable(path: Path):
    if not is_readable(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


# --- which of them is meant --------------------------------------------------------------------------------


def checkpoint_flags(settings: Settings) -> str:
    """The flags -i, -g and -s as the operator gave them; "" if there were none."""
    flags = {"-i": settings.source, "-g": settings.model_tag, "-s": settings.step}
    return " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)


def choose_checkpoint(where: Path, found: Seq[Checkpoint], settings: Settings) -> ModelSource:
    """The checkpoint that -i, -g and -s mean. Where they say nothing, choose what upstream would: its default
    experiment, the best stage for a chat, the largest tag, the last step."""
    chosen = of_named_experiment(where, found)
    chosen = [each for each in chosen if is_wanted(each.place, settings)]
    if chosen:
        group = default_experiment(chosen)
        chosen = [each for each in chosen if each.place.experiment == group]
        stage = chosen[0].place.stage
        tag = max((each for each in chosen if each.place.stage == stage), key=tag_order).place.tag
        chosen = [each for each in chosen if (each.place.stage, each.place.tag) == (stage, tag)
                  and settings.step in (None, each.step)]
    if not chosen:
        flags = checkpoint_flags(settings) or experiment_words()
        raise ConfigError(f"no nanochat checkpoint for {flags} in {where}; "
                          f"available: {', '.join(map(str, found)) or 'none'}")
    best = chosen[-1]
    others = ", ".join(str(each) for each in found if each != best)
    return ModelSource("nanochat", best.path, best.place.model_name,
                       f"nanochat checkpoint {best}{note_on(best.place, settings)} from {best.path}",
                       others and f"also available (-i -g -s): {others}")


def is_wanted(place: CheckpointPlace, settings: Settings) -> bool:
    """Whether it fits -i and -g. The stage `chat` is another name of sft, so it fits -i sft."""
    stages = {None: STAGES, "sft": ("sft", "chat")}.get(settings.source, (settings.source,))
    return place.stage in stages and settings.model_tag in (None, place.tag, place.tag_with_experiment)


def note_on(place: CheckpointPlace, settings: Settings) -> str:
    """A remark for the log if the stage is not the expected one."""
    if place.alone or place.stage == "sft" or settings.source == place.stage:
        return ""
    if place.stage == "chat" and settings.source is None:
        return ""
    return f" (no sft checkpoint{' of that tag' if settings.model_tag else ''})"


def tag_order(checkpoint: Checkpoint) -> tuple:
    """nanochat's own rule: the largest d<number>; if there is none, the folder changed last."""
    tag = checkpoint.place.tag
    match = re.match(r"d(\d+)", tag)
    if match:
        return 1, int(match[1]), tag == match[0]
    return 0, checkpoint.tag_folder.stat().st_mtime, False


def named_experiment() -> str | None:
    return os.environ.get("NANOCHAT_EXPERIMENT") or None


def experiment_words() -> str:
    return f"NANOCHAT_EXPERIMENT={named_experiment()}"


def of_named_experiment(where: Path, found: Seq[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints of NANOCHAT_EXPERIMENT. All checkpoints if it is not set, or if `where` is an
    experiment, is a part of one, or has no experiments."""
    name = named_experiment()
    experiments = {each.tag_folder.parent for each in found if each.place.experiment}
    if name is None or all(path in (where, *where.parents) for path in experiments):
        return [*found]
    return [each for each in found if each.place.experiment == name]


def default_experiment(found: Seq[Checkpoint]) -> str:
    """The experiment to take if none is named: the one that has no name itself, else the one written last.
    Checkpoints outside any experiment count as an experiment without a name."""
    def written_s(checkpoint: Checkpoint) -> float:
        return checkpoint.path.stat().st_mtime

    unnamed = [each for each in found if each.place.experiment in ("", UNNAMED)]
    return max(unnamed or found, key=written_s).place.experiment


# --- tokenizers and data sets -------------------------------------------------------------------------------


def nanochat_tokenizers(checkpoint: Path) -> list[Path]:
    """Where the tokenizer of a checkpoint may be; the first that exists is used."""
    folder = checkpoint.parent
    home = folder.parent.parent  # the base folder, or the experiment
    inside = [*own_tokenizers(folder), home / "tokenizer" / "tokenizer.pkl"]
    if folder.parent.name in STAGE_FOLDERS or folder.name not in STAGES:
        return inside
    return inside + [place / "tokenizer" / "tokenizer.pkl" for place in datasets_of(home)]


def own_tokenizers(folder: Path) -> list[Path]:
    """Where the tokenizer of published weights lies."""
    return [folder / "tokenizer.pkl", folder / "tokenizer" / "tokenizer.pkl"]


def datasets_of(experiment: Path) -> list[Path]:
    """Folders of data sets that an experiment may have been trained on, the likeliest first."""
    stores = [experiment.parent.parent / "datasets"]  # <base>/experiments/<experiment>
    if base := os.environ.get("NANOCHAT_BASE_DIR"):
        stores.append(Path(base) / "datasets")
    names = stated_dataset(experiment), os.environ.get("NANOCHAT_DATASET"), DATASET
    known = [store / name for store in stores for name in names if name]
    only = [each for each in map(only_dataset, stores) if each]
    return [*dict.fromkeys([*known, *only])]


def shard_folders(base: Path) -> list[Path]:
    """Where a base folder may have its training texts: parquet shards, the last of which is for validation.
    If NANOCHAT_DATASET names a data set, only that one counts."""
    if named := os.environ.get("NANOCHAT_DATASET"):
        return [base / "datasets" / named]
    return shard_folders_of(base / "experiments" / (named_experiment() or UNNAMED))


def shard_folders_of(experiment: Path) -> list[Path]:
    """Where the texts of an experiment may lie."""
    base = experiment.parent.parent
    return [*datasets_of(experiment), base / "base_data_climbmix", base / "base_data"]


def stated_dataset(experiment: Path) -> str:
    """The data set's name in an experiment's meta.json; "" without one."""
    name = object_in(experiment / "meta.json").get("dataset")
    return name if isinstance(name, str) and Path(name).name == name != ".." else ""


def only_dataset(store: Path) -> Path | None:
    """The one data set that has a tokenizer, if it is the only one."""
    found = [each for each in folders_in(store, certain=False)
             if (each / "tokenizer" / "tokenizer.pkl").exists()]
    return found[0] if len(found) == 1 else None
