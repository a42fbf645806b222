"""Writing files where others may have put something: a link, a pipe, a file of theirs.

    create         a file where there is nothing yet; a link is not followed, nothing is emptied
    replace_with   a small file, which appears as a whole under its name, whatever has that name
    refuse_inputs  an output that is one of the files that are read
    take_up        a file that an earlier run has left, if it can be that
    open_growing   a file that is kept, such as one of results

A name beside the output is chosen at random (`beside`) unless a later run must find it again."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from chatlm.common.errors import ConfigError, visible

CLOSED = getattr(os, "O_CLOEXEC", 0)
UNLINKED = getattr(os, "O_NOFOLLOW", 0)
AT_ONCE = getattr(os, "O_NONBLOCK", 0)


def beside(path: Path, word: str) -> Path:
    """A name beside a file that nobody else has."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.{word}")


def create(path: Path, mode: int = 0o666) -> BinaryIO:
    """A new file, for writing and reading. FileExistsError if there is anything of that name."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | UNLINKED | CLOSED, mode), "w+b")


def replace_with(path: Path, data: bytes, mode: int = 0o666):
    """Write a small file under another name, and give it its own once the disk has it. A link of that name is
    replaced, not followed."""
    new = beside(path, "new")
    try:
        with create(new, mode) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def refuse_inputs(output: Path, inputs: Iterable[Path]):
    """ConfigError if an output is one of the files that its command reads: the same file by whatever name, a
    link, or another case where that is the same."""
    for path in inputs:
        with suppress(OSError):  # one of them is not there
            if os.path.samefile(path, output):
                raise ConfigError(f"-o {visible(str(output))} is what is read ({visible(str(path))}); "
                                  "name another file")


def take_up(path: Path, flags: int = os.O_RDWR) -> int:
    """The descriptor of a file that an earlier run of this user has left. FileNotFoundError if there is none,
    ConfigError if it cannot be that: a link, a file with a second name, one of another user, no regular
    file."""
    try:
        number = os.open(path, flags | UNLINKED | CLOSED | AT_ONCE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise not_ours(path) from None
        raise
    status = os.fstat(number)
    own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    if not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and own):
        os.close(number)
        raise not_ours(path)
    return number


def open_growing(path: Path) -> FileIO:
    """A file that is kept and grows, made if it is missing: for reading, and for writing at its end,
    unbuffered. OSError unless it is a regular file, because others may block; a link is not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | AT_ONCE | UNLINKED | CLOSED
    return FileIO(regular(os.open(path, flags, 0o600)), "r+b")


def open_kept(path: Path) -> BinaryIO:
    """Such a file, for reading alone."""
    return open(regular(os.open(path, os.O_RDONLY | AT_ONCE | CLOSED)), "rb")


def regular(number: int) -> int:
    """The descriptor; OSError unless it is that of a regular file."""
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return number


def not_ours(path: Path) -> ConfigError:
    return ConfigError(f"{visible(str(path))} exists, and no unfinished run has written it; move it away, or "
                       "name another output")
