"""The library of decode_core in a bundle. The system loads a compiled library only from a file: it is
unpacked once, into the user's cache."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from chatlm.common.program import program_root

FOLDER = "core"              # of the bundle: the package decode_core, its platform and interface
ABOUT = f"{FOLDER}/about.json"
UNUSED_S = 30 * 86400        # an older unpacked library is removed when a new one is unpacked
# A library loads only on this system, processor and Python
PLATFORM = " ".join((os.uname().sysname, os.uname().machine,
                     importlib.machinery.EXTENSION_SUFFIXES[0].strip(".").partition(".")[0]))


class AboutCore(NamedTuple):
    """A bundle's description of its core: whether it fits is known without loading anything."""

    library: str             # the compiled half: its name in the bundle
    sha256: str
    platform: str
    interface: int


class UnfitCore(Exception):
    """Why the bundle's core is not used; completes a sentence about it."""


def about_core(bundle: zipfile.ZipFile) -> AboutCore | None:
    """The bundle's description of its core; None if it has none."""
    return AboutCore(*json.loads(bundle.read(ABOUT))) if ABOUT in bundle.namelist() else None


def load_bundled_core(interface: int):
    """Load the running bundle's library; None if it has none. UnfitCore if it cannot be used."""
    root = program_root()
    if not root.is_file():
        return None
    try:
        with zipfile.ZipFile(root) as bundle:
            if (about := about_core(bundle)) is None:
                return None
            if about.platform != PLATFORM:
                raise UnfitCore(f"is for {about.platform}, not for {PLATFORM}")
            if about.interface != interface:
                raise UnfitCore(f"has another version (interface {about.interface} instead of {interface})")
            return load_anywhere(about, lambda: bundle.read(about.library))
    except UnfitCore:
        raise
    except Exception as error:  # whatever zipfile, zlib, json and the system raise for damaged files
        raise UnfitCore(f"cannot be read ({type(error).__name__}: {error}); copy the bundle again") from None


def load_anywhere(about: AboutCore, read: Callable[[], bytes]):
    """Load the library from the cache; or from a private folder, deleted at once, if the
    cache cannot be written, is writable by others, or does not allow executables."""
    reasons = {}
    for open_library in (cached_library, private_library):
        try:
            with open_library(about, read) as path:
                return load_library(path)
        except (OSError, ImportError) as error:
            reasons[str(error)] = None
    raise UnfitCore(f"cannot run here ({'; '.join(reasons)})")


def load_library(path: Path):
    spec = importlib.util.spec_from_file_location("decode_core._core", path)
    assert spec and spec.loader
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library


@contextmanager
def cached_library(about: AboutCore, read: Callable[[], bytes]) -> Iterator[Path]:
    """The library in the cache. Each time, we check its SHA-256, and that nobody else can change it.

    Processes that start together may each write it: the last rename wins, with the same bytes."""
    folder = cache_folder() / about.sha256
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_ours(path.lstat(), path)
    path = folder / Path(about.library).name
    try:
        check_library(path, about)
    except (OSError, UnfitCore):
        remove_unused(folder)
        part = folder / f".{secrets.token_hex(8)}"
        try:
            write_library(part, about, read)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    yield path


@contextmanager
def private_library(about: AboutCore, read: Callable[[], bytes]) -> Iterator[Path]:
    """The library in this process's own folder. Once loaded it needs no file, so none is left behind, however
    the process ends."""
    with tempfile.TemporaryDirectory(prefix="chat_server-") as folder:
        path = Path(folder, Path(about.library).name)
        write_library(path, about, read)
        yield path


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "chat_server" / "core"
    except RuntimeError as error:  # this user has no home
        raise OSError(str(error)) from None


def check_ours(status: os.stat_result, path: Path):
    if status.st_uid != os.geteuid() or stat.S_ISLNK(status.st_mode) or status.st_mode & 0o022:
        raise PermissionError(f"{path} belongs to another user, or others can write to it")


def check_library(path: Path, about: AboutCore):
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        check_ours(status, path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for a writer, a device may never end
            raise OSError(f"{path} is not a regular file")
        check_digest(file.read(), about)


def check_digest(data: bytes, about: AboutCore):
    if hashlib.sha256(data).hexdigest() != about.sha256:
        raise UnfitCore("is damaged; copy the bundle again")


def write_library(path: Path, about: AboutCore, read: Callable[[], bytes]):
    data = read()
    check_digest(data, about)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o500), "wb") as file:
        file.write(data)


def remove_unused(folder: Path):
    """Remove the libraries of other versions. One in use stays in memory, and is unpacked again if needed."""
    with suppress(OSError):
        for other in folder.parent.iterdir():
            if other != folder and other.lstat().st_mtime < time.time() - UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)
