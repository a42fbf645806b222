"""Models on this machine: checkpoints, folders and files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chatlm.common.errors import ConfigError
from chatlm.common.files import opened


Progress = Callable[[str, float], None]  # (stage, fraction 0..1); may raise to interrupt the work
no_progress: Progress = lambda stage, fraction: None


def home_folder() -> Path:
    with suppress(RuntimeError):
        if (home := Path.home()).is_absolute():
            return home
    raise ConfigError("this user has no home folder for models: set HOME to a folder that it may write to, "
                      "or give MODEL (--help says what it may be)")


def hub_cache() -> Path:
    """Where huggingface_hub keeps models, by its own rules. Importing the library takes half a second."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser().absolute()


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def has_room(folder: Path, needed: int) -> bool:
    disk = shutil.disk_usage(folder)
    return disk.free >= needed or not disk.total  # some network file systems report only zeros


@contextmanager
def download_lock(cache: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock for downloads; the system releases it if the process dies."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(cache / ".lock", flags, 0o666), "r+b", buffering=0) as file:
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
    with opened(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
