"""An output that has its name only once it is complete.

It is made beside its place, in a hidden folder with a mark. A killed export leaves that folder, and the next
one to the same place begins anew in it. A folder of that name without the mark is somebody else's."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chatlm.common.errors import ConfigError
from chatlm.common.hub.local import FULL, has_room
from chatlm.common.interrupts import held_interrupts


MARK = ".chat_server"  # the name of an empty file in each unfinished folder


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A new folder, which becomes `target` at the end of the block, or disappears if it fails.

    ConfigError if there is something at `target`, if another process is writing it, or if it cannot be
    written."""
    target = Path(os.path.abspath(target))
    refuse_existing(target)
    part = target.with_name(f".{target.name}.unfinished")
    ours = False
    with full_disk(target), ExitStack() as stack:
        try:
            with held_interrupts():
                make(part, target)
                stack.enter_context(locked(part, target))
                refuse_others(part, target)
                ours = True
            empty(part)
            (part / MARK).touch()
            yield part
            (part / MARK).unlink()
            keep(part, target)
        except BaseException:
            if ours:
                with held_interrupts():  # a second Ctrl-C waits
                    shutil.rmtree(part, ignore_errors=True)
            raise


def refuse_existing(target: Path):
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists: give a name that is free, or remove it")


def make(part: Path, target: Path):
    try:
        part.mkdir(exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(f"cannot write {target}: {os.strerror(error.errno or 0)}") from None


def refuse_others(part: Path, target: Path):
    """ConfigError unless the folder is empty, or an export has made it."""
    if any(part.iterdir()) and not os.path.lexists(part / MARK):
        raise ConfigError(f"cannot write {target}: {part} has files that no export has left; move it away, "
                          "or name another output")


def check_room(folder: Path, target: Path, needed: int):
    """ConfigError unless the disk has room for so many bytes."""
    if not has_room(folder, needed):
        free = shutil.disk_usage(folder).free
        raise ConfigError(f"no room for {target}: it needs {needed:,} bytes, and {free:,} are free")


@contextmanager
def full_disk(target: Path) -> Iterator[None]:
    """Turn the system's errors about a full disk into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(f"no room for {target}: {os.strerror(error.errno)}; nothing was written") from None


@contextmanager
def locked(part: Path, target: Path) -> Iterator[None]:
    """Hold the lock of an unfinished folder; the system releases it if the process dies."""
    try:
        opened = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {part}: {os.strerror(error.errno or 0)}") from None
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing {target}") from None
        if not (part.exists() and os.path.samestat(os.fstat(opened), part.stat())):
            raise ConfigError(f"another process has just written {target}, or given up")
        yield
    finally:
        os.close(opened)


def empty(folder: Path):
    """Remove what a killed export has left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def keep(part: Path, target: Path):
    """Give the complete folder its name, once all of it is on the disk."""
    for path in [*part.rglob("*"), part]:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    refuse_existing(target)  # rename would replace an empty folder
    try:
        os.rename(part, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        refuse_existing(target)
        raise
