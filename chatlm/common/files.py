"""Reading the small files of a model: configurations, templates, tokenizers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from chatlm.common.errors import ConfigError, cannot_read

MOST_BYTES = 256 << 20  # the largest tokenizer.json of a published model has 33 MB


def read_small(path: Path) -> bytes:
    """A regular file, whole. A pipe would wait for a writer and a device never end: both are a ConfigError,
    as is a file above MOST_BYTES or one that cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is {kind_of(status.st_mode)}; it must be a regular file")
            if status.st_size > MOST_BYTES:
                raise ConfigError(f"{path} has {status.st_size:,} bytes; such a file may have at most "
                                  f"{MOST_BYTES:,}")
            return file.read(MOST_BYTES)
    except OSError as error:
        raise cannot_read(path, error) from error


def kind_of(mode: int) -> str:
    """A file that is not a regular one, in words."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
             stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "no file")


def read_text(path: Path) -> str:
    """read_small, as UTF-8."""
    try:
        return read_small(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from None
