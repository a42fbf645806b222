"""Every model below a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import ModelChoice
from chatlm.common.errors import require_folder
from chatlm.common.hub.huggingface import SPLIT_GGUF
from chatlm.common.hub.local import NANOCHAT_FOLDERS
from chatlm.common.hub.stamps import Stamp, files_of, stamp_of

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq


class Files(NamedTuple):
    """A model below a folder, and what tells whether its files have changed."""

    choice: ModelChoice
    stamp: Stamp


def find_models(folder: Path) -> list[Files]:
    """The GGUF files, Hugging Face folders and nanochat checkpoints below a folder, by name. Of models with
    the same name each is called by its path. ConfigError if it is no folder."""
    require_folder(f"--models {folder}", folder)
    found = [files for place, names in folders_below(folder) for files in models_in(place, names)]
    found.sort(key=lambda files: (files.choice.name.lower(), files.choice.path))
    counts = Counter(files.choice.name for files in found)
    aliases = Counter(alias for files in found for alias in files.choice.aliases)
    taken = {*counts, *(alias for alias, count in aliases.items() if count > 1)}
    return [Files(ModelChoice(
        choice.path, choice.name if counts[choice.name] == 1 else path_name(folder, Path(choice.path)),
        tuple(alias for alias in choice.aliases if alias not in taken)), stamp) for choice, stamp in found]


def path_name(folder: Path, path: Path) -> str:
    return re.sub(SPLIT_GGUF, "", str(path.relative_to(folder))).removesuffix(".gguf")


def folders_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder with the names of its files. Those of a Hugging Face folder, and hidden ones, have none."""
    for place, folders, names in os.walk(folder, followlinks=True):
        names.sort()
        whole = "config.json" in names and any(name.endswith(".safetensors") for name in names)
        here = Path(place).resolve()
        folders[:] = [] if whole else sorted(
            name for name in folders if not name.startswith(".")
            and not here.is_relative_to(Path(place, name).resolve()))  # no link to a folder above
        yield Path(place), names


def models_in(place: Path, names: Seq[str]) -> Iterator[Files]:
    weights = [name for name in names if name.endswith(".safetensors")]
    if "config.json" in names and weights:
        yield Files(ModelChoice(str(place), place.name), stamp_of(files_of(place)))
    parts: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(".gguf") and not name.lower().startswith("mmproj"):
            parts.setdefault(re.sub(SPLIT_GGUF, "", name).removesuffix(Path(name).suffix), []).append(name)
    for name, files in parts.items():
        yield Files(ModelChoice(str(place / files[0]), name), stamp_of(place / file for file in files))
    source = NANOCHAT_FOLDERS.get(place.parent.name)
    steps = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"model_(\d+)\.pt", name)))
    for step in steps if source else ():
        file = next(name for name in names if re.fullmatch(rf"model_0*{step}\.pt", name))
        name, last = f"nanochat-{place.name}-{source}", step == steps[-1]
        several, tag = len(steps) > 1, f"{place.name}@{step}"
        yield Files(ModelChoice(str(place / file), f"{name}@{step}" if several else name,
                                (tag, *((f"{place.name}@latest",) if last else ()),
                                 *((name,) if last and several else ()))), stamp_of(files_of(place / file)))
