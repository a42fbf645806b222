"""Reading files that others wrote: a model's configuration, its template, its tokenizer, its weights.

Whoever made a model may have put anything in place of any of its files: a pipe, which would wait for a
writer, a link to /dev/zero, which never ends, gigabytes of brackets. So nothing opens such a file in another
way than these:

    opened        any file: a regular one, open for reading
    read_small    all bytes of a file, up to a limit
    read_text     the same as text
    read_object   the object in a file of JSON, up to a smaller limit: what the front itself may parse
    copy_file     a file to a new place

Each raises ConfigError, which names the file and what is wrong with it. A library that opens a file itself
gets its path after `check_regular`."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from chatlm.common.errors import ConfigError, cannot_read, error_text, shown

WRITER_S = 5.0          # how long a named pipe may have no writer
MOST_BYTES = 256 << 20  # the largest tokenizer.json of a published model has 33 MB
MOST_OBJECT = 4 << 20   # of brackets alone they become 90 MB of objects, in 50 ms
MOST_INDEX = 32 << 20   # that of DeepSeek-V3's 91,991 tensors has 9 MB


def opened(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for anybody. ConfigError for a pipe, a device, a
    socket or a folder, and for a file that cannot be opened."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # a socket
            check_regular(path)
        raise cannot_read(path, error) from error
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)
        raise ConfigError(f"{path} is {kind_of(status.st_mode)}; it must be a regular file")
    if not status.st_size:  # of the system's files, such as /proc/kmsg, some have neither a size nor an end
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(nothing, number, inheritable=False)
        os.close(nothing)
    return open(number, "rb")


def read_small(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a whole regular file of at most `most` bytes. ConfigError for a larger one, for a pointer of Git
    LFS, and for what `opened` refuses."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ConfigError(f"{path} has {size:,} bytes; the limit for such files is {most:,}")
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise cannot_read(path, error) from error
    if len(data) > most:  # it grows
        raise ConfigError(f"{path} has more than {most:,} bytes, the limit for such files")
    refuse_pointer(path, data)
    return data


def read_object(path: Path, most: int = MOST_OBJECT) -> dict[str, Any]:
    """The object in a JSON file. ConfigError if there is none in it, and for what `read_small` refuses."""
    value = parse_json(path, read_small(path, most))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {shown(value)}; it must hold an object")
    return value


def copy_file(path: Path, new: Path):
    """Copy a regular file to a place where there is none. ConfigError if it cannot be read."""
    with opened(path) as source, open(new, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


class Truncated(ConfigError):
    """A file ends too early."""


def truncated(path: Path, size: int, lack: str) -> Truncated:
    """The error for a file of `size` bytes that ends too early; `lack` is the evidence."""
    return Truncated(f"{path} is truncated: it has {size:,} bytes, {lack}; copy or download it again")


def refuse_pointer(path: Path, data: bytes):
    """ConfigError for a Git LFS pointer: the large file itself was not fetched."""
    if data.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,18})\n", data[:1000])
        file = f"a file of {int(size[1]):,} bytes" if size else "a file"
        raise ConfigError(f"{path} is only Git LFS's pointer to {file}; run `git lfs pull` in its folder")


def parse_json(path: Path, data: bytes):
    """Parse a JSON file; ConfigError if it is invalid or truncated."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        refuse_cut_json(path, data)
        raise ConfigError(f"{path} is not valid JSON: {error_text(error)}") from None


def refuse_cut_json(path: Path, data: bytes):
    """ConfigError if this is the start of a JSON object without its end."""
    text = data.strip()
    try:
        if text:
            json.loads(text)
            return
    except (ValueError, RecursionError) as error:
        at_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc)
        if text[:1] != b"{" or text[-1:] == b"}" and not at_end:
            return
    raise truncated(path, len(data), "and the JSON object in it does not end")


def read_operators(path: str) -> str:
    """The text of a file that the operator names; it may be a pipe, as in `--config <(command)`. OSError for
    a pipe without a writer, ValueError above MOST_BYTES, as for /dev/zero."""
    opened = os.open(Path(path).expanduser(), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(opened, "rb", buffering=0) as file:
        data = first_of_pipe(opened) if stat.S_ISFIFO(os.fstat(opened).st_mode) else b""
        os.set_blocking(opened, True)
        data += io.BufferedReader(file).read(MOST_BYTES + 1 - len(data))
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return data.decode()


def read_text_of(path: str, flag: str) -> str:
    """The text of a file that a flag names. ConfigError if it cannot be read or is empty."""
    try:
        text = read_operators(path)
    except (OSError, RuntimeError, ValueError) as error:  # unreadable; unknown ~user; not text
        no_text = isinstance(error, UnicodeDecodeError)
        reason = "not UTF-8 text" if no_text else getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag} {path}: {reason}") from None
    if not text:
        raise ConfigError(f"{flag} {path}: the file is empty")
    return text


def first_of_pipe(opened: int) -> bytes:
    """The first bytes of a pipe. A shell's pipe has its writer from the start, and may be empty; a named
    pipe's writer may take up to WRITER_S to open it."""
    shells = False
    deadline_s = time.monotonic() + WRITER_S
    with suppress(OSError):  # without /proc, we wait for both kinds
        shells = os.readlink(f"/proc/self/fd/{opened}").startswith("pipe:")
    try:
        while not (data := os.read(opened, 1 << 16)) and not shells:  # it has no writer
            if time.monotonic() > deadline_s:
                raise OSError(errno.ENXIO, f"it is a pipe, and no writer opened it within {WRITER_S:g} s")
            time.sleep(0.02)
    except BlockingIOError:  # it has one, which has written nothing yet
        return b""
    return data


def check_regular(path: Path):
    """ConfigError unless this is a regular file; a missing one is reported where it is opened."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is {kind_of(path.stat().st_mode)}; it must be a regular file")


def kind_of(mode: int) -> str:
    """The kind of a file that is not a regular one."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
             stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "no file")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """read_small, decoded as UTF-8."""
    try:
        return read_small(path, most).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from None
