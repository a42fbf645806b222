"""What is in a folder that a vector store follows, and why some of it is not read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError
from chatlm.common.files import opened


class Found(NamedTuple):
    """A file, or what stands for all below a folder that is not read."""

    path: str         # within the folder, with / between its parts
    stamp: str        # another one if the file may be another one
    reason: str = ""  # why it is not read


class Look(NamedTuple):
    """What was found in a folder."""

    found: list[Found]
    unread: list[str]  # paths of folders that could not be listed: nothing is known about what is in them
    problem: str       # why some of it is not there; '' if all is


class Gone(Exception):
    """A file is no longer what was found. The next look finds what is there now."""


def look(folder: Path) -> Look:
    """List a folder. OSError if it cannot be listed; for folders in it that is no error."""
    found = list[Found]()
    unread = list[str]()
    waiting = [""]
    while waiting:
        within = waiting.pop()
        try:
            with os.scandir(folder / within) as entries:
                rows = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            if not within:
                raise
            unread.append(within)
            continue
        below = list[str]()
        for entry in rows:
            path = f"{within}/{entry.name}" if within else entry.name
            if len(found) >= LIMITS.store_files:
                return Look(found, unread, f"the folder has more than {LIMITS.store_files:,} files: the rest "
                                           "is not read")
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError:
                unread.append(path)
                continue
            reason = reason_of(entry.name, status)
            path = path.encode(errors="backslashreplace").decode()
            if stat.S_ISDIR(status.st_mode) and not reason:
                below.append(path)
            else:
                found.append(Found(path, "" if reason else stamp_of(status), reason))
        waiting += reversed(below)
    problem = f"these folders in it cannot be read: {', '.join(unread[:5])}" if unread else ""
    return Look(found, unread, problem)


def reason_of(name: str, status: os.stat_result) -> str:
    """Why a file or folder is not read; '' if it is."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if name.startswith("."):
        return "it is hidden: its name begins with a dot"
    if stat.S_ISLNK(status.st_mode):
        return "it is a link: links are not followed"
    if stat.S_ISDIR(status.st_mode):
        return ""
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_size > LIMITS.document_bytes:
        return f"it has {status.st_size:,} bytes, more than {LIMITS.document_bytes:,}"
    return ""


def stamp_of(status: os.stat_result) -> str:
    """Differs once a file was written to or replaced: nobody can set back ctime."""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"


def read(folder: Path, found: Found) -> bytes:
    """The content of a file as it was found. Raises Gone if it is another one by now, or no longer in the
    folder; ConfigError if it cannot be read."""
    path = folder / found.path
    try:
        if path.parent.resolve() != folder.resolve() / Path(found.path).parent:
            raise Gone
        if stamp_of(path.lstat()) != found.stamp:
            raise Gone
        if found.stamp.startswith("0 "):
            return b""
        with opened(path) as file:
            if stamp_of(os.fstat(file.fileno())) != found.stamp:
                raise Gone
            data = file.read(LIMITS.document_bytes + 1)
            if stamp_of(os.fstat(file.fileno())) != found.stamp:
                raise Gone
    except FileNotFoundError:
        raise Gone from None
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror}") from None
    return data
