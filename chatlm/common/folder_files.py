"""What is in a folder that a vector store follows, and why some of it is not read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError

MOST_FOLDERS = 20_000
DEEPEST = 100      # folders in folders, each of which is open while it is read
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
REPLACED = errno.ENOENT, errno.ELOOP, errno.ENOTDIR  # of what something else may be in place of


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


class Full(Exception):
    """There is more in a folder than is looked at; the text says so."""


class Looking:
    """Lists a folder, from descriptor to descriptor: a folder in it that becomes a link is not followed."""

    def __init__(self):
        self.found: list[Found] = []
        self.unread: list[str] = []
        self.folders = 0

    def list_folder(self, number: int, within: str):
        """List the folder with this descriptor. OSError if it cannot be listed; for folders in it that is no
        error."""
        self.folders += 1
        if self.folders > MOST_FOLDERS:
            raise Full(f"there are more than {MOST_FOLDERS:,} folders in it: the rest is not read")
        with os.scandir(number) as entries:
            rows = sorted(entries, key=lambda entry: entry.name)
        below = [entry.name for entry in rows if self._is_folder(entry, path_below(within, entry.name))]
        for name in below:
            self._enter(number, name, path_below(within, name))

    def _is_folder(self, entry: os.DirEntry[str], path: str) -> bool:
        """Note a file. True for a folder that is read."""
        if len(self.found) >= LIMITS.store_files:
            raise Full(f"the folder has more than {LIMITS.store_files:,} files: the rest is not read")
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError:
            self.unread.append(path)
            return False
        reason = reason_of(entry.name, status)
        if stat.S_ISDIR(status.st_mode) and not reason:
            return True
        shown = path.encode(errors="backslashreplace").decode()
        self.found.append(Found(shown, "" if reason else stamp_of(status), reason))
        return False

    def _enter(self, above: int, name: str, path: str):
        if path.count("/") >= DEEPEST:
            self.unread.append(path)
            return
        try:
            number = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=above)
        except OSError as error:
            if error.errno not in REPLACED:  # else the next look sees what is there now
                self.unread.append(path)
            return
        try:
            self.list_folder(number, path)
        except OSError:
            self.unread.append(path)
        finally:
            os.close(number)


def path_below(within: str, name: str) -> str:
    return f"{within}/{name}" if within else name


def look(folder: Path) -> Look:
    """List a folder. OSError if it cannot be listed."""
    looking = Looking()
    number = os.open(folder, FOLDER)
    problem = ""
    try:
        looking.list_folder(number, "")
    except Full as full:
        problem = str(full)
    finally:
        os.close(number)
    if looking.unread and not problem:
        problem = f"these folders in it cannot be read: {', '.join(looking.unread[:5])}"
    return Look(looking.found, looking.unread, problem)


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


def open_below(folder: Path, path: str) -> BinaryIO:
    """Open a file in a folder for reading. No link is followed in any part of its path. OSError."""
    *folders, name = path.split("/")
    number = os.open(folder, FOLDER)
    try:
        for part in folders:
            below = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=number)
            os.close(number)
            number = below
        return open(os.open(name, FILE, dir_fd=number), "rb")
    finally:
        os.close(number)


def read(folder: Path, found: Found) -> bytes:
    """The content of a file as it was found. Raises Gone if it is another one by now, or no longer in the
    folder; ConfigError if it cannot be read."""
    try:
        with open_below(folder, found.path) as file:
            if stamp_of(os.fstat(file.fileno())) != found.stamp:
                raise Gone
            if found.stamp.startswith("0 "):  # of the system's files, some have neither a size nor an end
                return b""
            data = file.read(LIMITS.document_bytes + 1)
            if stamp_of(os.fstat(file.fileno())) != found.stamp:
                raise Gone
    except OSError as error:
        if error.errno in REPLACED:
            raise Gone from None
        raise ConfigError(f"it cannot be read: {error.strerror}") from None
    return data
