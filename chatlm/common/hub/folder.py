"""Finds the models below a folder."""

from __future__ import annotations

import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, TypeVar

from chatlm.common.config import ModelEntry
from chatlm.common.errors import error_text, printable, require_folder
from chatlm.common.hub.repository import ENCODER, SPLIT_GGUF
from chatlm.common.hub.nanochat_checkpoints import checkpoints_in, step_of
from chatlm.common.hub.stamps import FoundFiles, files_of, stamp_of
from chatlm.common.hub.trainer_files import NANOGPT_FILE, is_hugging_face, is_litgpt
from chatlm.common.hub.trainers import foreign, is_build_nanogpt

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

T = TypeVar("T", bound=FoundFiles)


@dataclass(frozen=True)
class ModelFiles(FoundFiles):
    """A model below a folder."""

    name: str = ""
    step: int | None = None  # of a training run's checkpoint
    tag: str = ""            # the name of that run

    @property
    def entry(self) -> ModelEntry:
        return ModelEntry(str(self.path), self.name)

    @property
    def run(self) -> Path | None:
        """The folder with all checkpoints of its run."""
        return None if self.step is None else self.path.parent


# How many links to folders one path may follow. Without a limit, folders that link to each other make paths
# without end.
MOST_LINKS = 2


def find_models(folder: Path, going_on: Callable[[], None] = lambda: None) -> list[ModelFiles]:
    """All models below a folder, sorted by name and step: GGUF files, folders of Hugging Face and litgpt,
    checkpoints of nanochat, nanoGPT and build-nanogpt. Files of other trainers are listed with advice.

    going_on: called for each folder; it may raise an exception to end the search.
    Raises ConfigError if `folder` is not a folder."""
    def models_here(place: Path, names: Seq[str]) -> Iterator[ModelFiles]:
        going_on()
        return models_in(place, names)

    require_folder(f"--models {folder}", folder)
    return sorted(seen_below(folder, ModelFiles, models_here), key=lambda files: (
        files.name.lower(), str(files.run or ""), files.step or 0, str(files.path)))


def named_models(folder: Path, found: Seq[ModelFiles], unable: Container[str] = (),
                 taken: Container[str] = ()) -> list[ModelEntry]:
    """The names of a folder's models, in the order of `found`.

    If a run has several steps, each step's name has its number; the last step that can be served also
    answers to the run's name. Models with the same name are named by their paths.
    unable: paths of models that cannot be served. taken: names of other models."""
    last: dict[Path, ModelFiles] = {}
    for files in found:
        if files.run and (files.run not in last or files.entry.path not in unable):
            last[files.run] = files
    steps = Counter(files.run for files in found)
    entries = []
    for files in found:
        if files.run:
            entries.append(checkpoint_entry(files, last[files.run] is files, steps[files.run] > 1))
        else:
            entries.append(files.entry)
    names = Counter(entry.name for entry in entries)
    aliases = Counter()
    for entry in entries:
        aliases.update(entry.aliases)
    ambiguous = {*names, *(alias for alias, count in aliases.items() if count > 1)}
    named = []
    for entry in entries:
        name = entry.name
        number = 2
        if names[name] > 1 or name in taken:
            name = path_name(folder, Path(entry.path))
        while name in taken or any(name == other.name for other in named):  # odd characters were replaced
            name = f"{entry.name}-{number}"
            number += 1
        own = [alias for alias in entry.aliases if alias not in ambiguous and alias not in taken]
        named.append(replace(entry, name=name, aliases=tuple(own)))
    return named


def checkpoint_entry(files: ModelFiles, last: bool, several: bool) -> ModelEntry:
    """The names of one step of a run. last: it is the newest that can be served. several: its run
    has several."""
    name = files.name
    tag = shown_name(files.tag)
    aliases = [f"{tag}@{files.step}"]
    if last:
        aliases.append(f"{tag}@latest")
    if last and several:
        aliases.append(name)
    if several:
        name = f"{name}@{files.step}"
    return replace(files.entry, name=name, aliases=tuple(aliases))


def shown_name(name: str) -> str:
    """A file name as a model's name, safe to show in a terminal: replaces bytes that are not text, and
    characters that control a terminal or the direction of writing."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


def path_name(folder: Path, path: Path) -> str:
    name = re.sub(SPLIT_GGUF, "", str(path.relative_to(folder)))
    return shown_name(re.sub(r"(?i)\.gguf$", "", name))


def seen_below(folder: Path, kind: type[T], seen_in: Callable[[Path, list[str]], Iterable[T]],
               **limits: int) -> Iterator[T]:
    """Call `seen_in` with each folder below `folder` and the names of its files, and yield what it finds. A
    folder that cannot be read becomes an entry that says why. So does one whose files make our reading of
    them fail: it keeps no other folder from being served."""
    for path, names in folders_below(folder, **limits):
        if isinstance(names, OSError):
            yield kind(path, trouble=f"{path} cannot be read: {names.strerror}")
            continue
        try:
            yield from seen_in(path, names)
        except InterruptedError:  # the search is to end
            raise
        except Exception as error:
            yield kind(path, trouble=f"{path} cannot be read: {printable(error_text(error))}")


def folders_below(folder: Path, links: int = MOST_LINKS, depth: int = 1000,
                  into_models: int = False) -> Iterator[tuple[Path, list[str] | OSError]]:
    """Each folder at or below `folder`, with the names of its files or the error of reading it.

    Skips hidden folders, and folders inside a Hugging Face folder (unless into_models). Follows at most
    `links` links on one path, and none that leads back to a folder on the path or above it."""
    above = frozenset(identity(parent.stat()) for parent in folder.resolve().parents)
    waiting = [(folder, identity(folder.stat()), above, links, depth)]
    while waiting:
        path, here, above, links, depth = waiting.pop()
        try:
            with os.scandir(path) as entries:
                found = sorted(entries, key=operator.attrgetter("name"))
        except FileNotFoundError:
            continue
        except OSError as error:
            yield path, error
            continue
        folders = {}
        for entry in found:
            if status := folder_status(entry):
                folders[entry.name] = status
        names = [entry.name for entry in found if entry.name not in folders]
        yield path, names
        if depth == 0 or not into_models and is_hugging_face(names):
            continue
        above = above | {here}
        for entry in reversed(found):  # so that the first is popped next
            if entry.name in folders and not entry.name.startswith("."):
                there = identity(folders[entry.name])
                left = links - entry.is_symlink()
                if there not in above and left >= 0:
                    waiting.append((path / entry.name, there, above, left, depth - 1))


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def folder_status(entry: os.DirEntry) -> os.stat_result | None:
    """A folder's status; None if the entry is not a folder."""
    try:
        return entry.stat() if entry.is_dir() else None
    except OSError:  # a link to itself, or it was removed meanwhile
        return None


def models_in(folder: Path, names: Seq[str]) -> Iterator[ModelFiles]:
    """The models that lie directly in a folder, whose files are `names`."""
    def model(path: Path, name: str, files: Seq[Path], step: int | None = None, tag: str = "") -> ModelFiles:
        stamp = stamp_of(files)
        name = shown_name(name)
        trouble = "" if stamp else next(filter(None, map(trouble_with, files)), "")
        return ModelFiles(path, stamp, trouble and f"{name} is not served: {trouble}", name, step, tag)

    if is_hugging_face(names):
        yield model(folder, folder.name, [folder / "config.json", *files_of(folder)])
    parts: dict[str, list[Path]] = {}
    for name in names:
        if name.lower().endswith(".gguf") and not re.fullmatch(ENCODER, name):
            stem = re.sub(SPLIT_GGUF, "", name).removesuffix(Path(name).suffix)
            parts.setdefault(stem, []).append(folder / name)
    for name, files in parts.items():
        yield model(files[0], name, files)
    if is_litgpt(names):
        yield model(folder, folder.name, files_of(folder))
    if NANOGPT_FILE in names and not foreign(folder / NANOGPT_FILE):
        yield model(folder / NANOGPT_FILE, folder.name, files_of(folder / NANOGPT_FILE))
    checkpoints = checkpoints_in(folder, names)
    for each in checkpoints:
        yield model(each.path, each.place.model_name, files_of(each.path), each.step, each.place.tag)
    if not checkpoints:
        for name in names:
            path = folder / name
            step = step_of(name)
            if step is not None and is_build_nanogpt(path):
                yield model(path, folder.name, files_of(path), step, folder.name)
    if not is_hugging_face(names) and not is_litgpt(names):
        for path in (folder, *(folder / name for name in names)):
            if error := foreign(path):
                yield ModelFiles(path, trouble=f"not served: {error}")


def trouble_with(path: Path) -> str:
    """Why a file cannot be read; "" if it can."""
    try:
        return "" if S_ISREG(path.stat().st_mode) else f"{path} is not a regular file"
    except FileNotFoundError:
        what = "a link to a missing file" if path.is_symlink() else "missing"
        return f"{path} is {what}"
    except OSError as error:
        return f"{path}: {error.strerror}"
