"""Models on this machine: checkpoints, folders and files."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import ModelSource

if TYPE_CHECKING:
    from chatlm.common.config import Settings


Progress = Callable[[str, float], None]  # (stage, fraction 0..1); may raise to interrupt the work
no_progress: Progress = lambda stage, fraction: None

NANOCHAT_FOLDERS = {"chatsft_checkpoints": "sft", "chatrl_checkpoints": "rl", "mid_checkpoints": "mid",
                    "base_checkpoints": "base"}  # folder -> source, best first

def home_folder() -> Path:
    with suppress(RuntimeError):
        if (home := Path.home()).is_absolute():
            return home
    raise ConfigError("this user has no home folder for models: set HOME to a folder that it may write to, "
                      "or give MODEL (--help says what it may be)")


def explicit_choice(settings: Settings) -> str:
    """The flags -i, -g and -s as the operator gave them; "" if there were none."""
    flags = {"-i": settings.source, "-g": settings.model_tag, "-s": settings.step}
    return " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)


class Checkpoint(NamedTuple):
    source: str
    tag: str
    step: int
    path: Path  # model_<step>.pt

    def __str__(self) -> str:
        return f"{self.source}/{self.tag}/{self.step}"


def checkpoint_at(path: Path) -> Checkpoint | None:
    """What a file is by where it lies; None if that does not say it."""
    step, source = re.fullmatch(r"model_(\d+)\.pt", path.name), NANOCHAT_FOLDERS.get(path.parent.parent.name)
    if step is None or source is None:
        return None
    return Checkpoint(source, path.parent.name, int(step[1]), path)


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every checkpoint in a nanochat base folder, a *_checkpoints folder in it, or a <tag> folder in that.

    Raises PermissionError if one of these cannot be read: its checkpoints would be passed over silently."""
    for path in (folder, *folder.glob("*_checkpoints"), *folder.glob("*_checkpoints/*")):
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    checkpoints = []
    for path in (path for depth in ("", "*/", "*_checkpoints/*/")
                 for path in folder.glob(f"{depth}model_*.pt")):
        step, source = (re.fullmatch(r"model_(\d+)\.pt", path.name),
                        NANOCHAT_FOLDERS.get(path.parent.parent.name))
        if step and source:
            checkpoints.append(Checkpoint(source, path.parent.name, int(step[1]), path))
    sources = list(NANOCHAT_FOLDERS.values())
    return sorted(checkpoints, key=lambda each: (sources.index(each.source), each.tag, each.step))


def tag_order(checkpoint: Checkpoint) -> tuple:
    """nanochat's own rule: the largest d<number>; if there is none, the folder changed last."""
    match = re.match(r"d(\d+)", checkpoint.tag)
    if match:
        return 1, int(match[1]), checkpoint.tag == match[0]
    return 0, checkpoint.path.parent.stat().st_mtime, False


def choose_checkpoint(where: Path, settings: Settings) -> ModelSource:
    """Pick source sft (else rl, mid, base), largest tag, last step, each narrowed by -i, -g and -s."""
    checkpoints = find_checkpoints(where)
    chosen = [c for c in checkpoints
              if settings.source in (None, c.source) and settings.model_tag in (None, c.tag)]
    if chosen:
        tag = max((c for c in chosen if c.source == chosen[0].source), key=tag_order).tag
        chosen = [c for c in chosen
                  if (c.source, c.tag) == (chosen[0].source, tag) and settings.step in (None, c.step)]
    if not chosen:
        raise ConfigError(f"no nanochat checkpoint for {explicit_choice(settings)} in {where}; "
                          f"available: {', '.join(map(str, checkpoints)) or 'none'}")
    best = chosen[-1]
    others = ", ".join(str(c) for c in checkpoints if c != best)
    of_tag = " of that tag" if settings.model_tag else ""
    note = "" if settings.source or best.source == "sft" else f" (no sft checkpoint{of_tag})"
    return ModelSource("nanochat", best.path, f"nanochat-{best.tag}-{best.source}",
                       f"nanochat checkpoint {best}{note} from {best.path}",
                       others and f"also available (-i -g -s): {others}")


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def has_room(folder: Path, needed: int) -> bool:
    disk = shutil.disk_usage(folder)
    return disk.free >= needed or not disk.total  # some network file systems report only zeros


@contextmanager
def download_lock(cache: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock for downloads; the system releases it if the process dies."""
    import fcntl  # POSIX only, but so are the workers
    with open(cache / ".lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another process to download the default model", 0.0)
                time.sleep(0.2)
        yield


def check_sha256(path: Path, expected: str):
    if (digest := sha256_of(path)) != expected:
        raise ConfigError(f"{path.name} was downloaded, but its SHA-256 is {digest} instead of {expected}; "
                          "it is not used")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
