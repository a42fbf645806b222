"""Where a command writes a file that appears once it is complete."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatlm.common.errors import ConfigError, visible


def shown_path(path: Path) -> str:
    return visible(str(path))


@contextmanager
def named_errors(path: Path, done: str = "", flag: str = "") -> Iterator[None]:
    """ConfigError for what the system says of a file. done: what is safe nevertheless."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{flag}{shown_path(path)}: {error.strerror or error}{done}") from None


def output_path(text: str) -> Path:
    """Where the output will be. ConfigError for what cannot become a file."""
    path = Path(text).expanduser()
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise ConfigError(f"-o {visible(text)}: {error.strerror}") from None
    if found and stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"-o {visible(text)} is a folder; name a file in it")
    if found and not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"-o {visible(text)} must be a regular file: it appears once it is complete")
    if not path.name or text.endswith("/"):
        raise ConfigError(f"-o {visible(text)} is no name of a file")
    try:
        return path.resolve()  # what is beside it is beside the file that a link names
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"-o {visible(text)}: {getattr(error, 'strerror', None) or error}") from None
