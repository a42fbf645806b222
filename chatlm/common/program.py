"""The program itself: its sources and its page, in a checkout, an installation or a bundle."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from chatlm.common.errors import Overloaded


T = TypeVar("T")

HELD = "/proc/self/fd/"  # a bundle is read through the descriptor with which it was opened: its first code
                         # (chatlm/common/bundle.py: MAIN) and our other processes find it at this path
DELETED = " (deleted)"   # what Linux adds to the name of an open file that is gone
FIXED_DATE = 1980, 1, 1, 0, 0, 0  # the earliest in a zip: equal files make equal archives
SCRIPT = "chat_server.py"


def program_root() -> Path:
    """The folder that contains the package chatlm (a checkout, or site-packages), or the bundle. A bundle
    that was replaced or deleted since is still the one that runs."""
    root = Path(__file__).parents[2]
    return root if str(root).startswith(HELD) else root.resolve()


def program_descriptors() -> tuple[int, ...]:
    """What our other processes must be passed so that they find `program_root`."""
    root = str(program_root())
    return (int(root.removeprefix(HELD)),) if root.startswith(HELD) else ()


def program_place() -> Path:
    """The same as `program_root`, under the name that people know, where another file may be by now."""
    root = program_root()
    if not program_descriptors():
        return root
    return Path(os.readlink(root).removesuffix(DELETED))


def in_program(root: Path, name: str):
    """A file or folder of a program: its path on disk or in a bundle."""
    if not root.is_file():
        return root / name
    return zipfile.Path(root) / name


def files_below(folder, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file below a folder, on disk or in an archive, sorted by name."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from files_below(entry, f"{prefix}{entry.name}/")
        elif entry.is_file() and not (isinstance(entry, Path) and entry.is_symlink()):
            yield prefix + entry.name, entry.read_bytes()


def program_sources(root: Path | None = None, folder: str = "chatlm") -> dict[str, bytes]:
    """The modules of chatlm, or of one of its folders, in this program or in `root`, by their names in an
    archive."""
    package = in_program(root or program_root(), folder)
    return {name: text for name, text in files_below(package, f"{folder}/") if name.endswith(".py")}


def archive(files: Mapping[str, bytes], first_lines: bytes = b"") -> bytes:
    """A zip of these files, after `first_lines` if it is a program; equal files give equal bytes."""
    data = io.BytesIO()
    data.write(first_lines)
    with zipfile.ZipFile(data, "w") as target:
        for name in sorted(files):
            packed = zipfile.ZIP_STORED if name.endswith(".zip") else zipfile.ZIP_DEFLATED
            target.writestr(zipfile.ZipInfo(name, FIXED_DATE), files[name], packed)
    return data.getvalue()


def program_bytes(start: int = 0) -> bytes:
    """All that another machine needs to run one of our roles: the bundle, or an archive of our modules.

    start: where the bundle's program begins, after a model."""
    root = program_root()
    if not root.is_file():
        return archive(program_sources())
    with open(root, "rb") as bundle:
        bundle.seek(start)
        return bundle.read()


@functools.cache
def program_digest(root: Path | None = None) -> str:
    """A digest of the sources, the same on any machine, bundled or not."""
    root = root or program_root()
    digest = hashlib.sha256()
    script = in_program(root, SCRIPT)
    sources = program_sources(root) | ({SCRIPT: script.read_bytes()} if script.is_file() else {})
    for name, text in sources.items():
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def other_program() -> Path | None:
    """The root of another chatlm that differs from ours: installed while a checkout runs, or in the current
    folder while the installation runs. None in a bundle, which is self-contained."""
    ours = program_root()
    if ours.is_file():
        return None
    for folder in dict.fromkeys([*sys.path[1:], os.getcwd()]):
        spec = importlib.machinery.PathFinder.find_spec("chatlm", [folder])
        if spec and spec.origin:
            root = Path(spec.origin).resolve().parents[1]
            if root != ours and program_digest(root) != program_digest(ours):
                return root
    return None


def program_stamp() -> tuple:
    """A stamp of the sources on disk, which a newly started process would read."""
    root = program_root()
    paths = [str(root)] if root.is_file() else source_paths(root)
    stamps = []
    for path in paths:
        with suppress(OSError):
            now = os.stat(path)
            stamps.append((now.st_mtime_ns, now.st_size))
    return tuple(stamps)


@functools.cache
def stamp_at_start() -> tuple:
    """`program_stamp` when this was first asked: by the first pool, when the server starts."""
    return program_stamp()


def why_outdated() -> str:
    """Why what is imported or started from now on may not fit what runs; "" if it does."""
    if program_stamp() == stamp_at_start():
        return ""
    return "the program has changed since this server started: restart the server"


def imported_later(load: Callable[[], T]) -> T:
    """What `load` returns, which imports modules after the start. It belongs into a thread. Raises Overloaded
    if the program's files are no longer those that were started: what is imported now may not fit what
    runs."""
    try:
        value = load()
    except (Exception, SystemExit) as error:  # half a file, or another bundle at the old place
        if why := why_outdated():
            raise Overloaded(why) from error
        if isinstance(error, SystemExit):  # it would end the event loop
            raise ImportError("a module that was imported late tried to end the program") from error
        raise
    if why := why_outdated():
        raise Overloaded(why)
    return value


def source_paths(root: Path) -> list[str]:
    """Of our modules below the program's root, sorted."""
    return sorted(map(str, (root / "chatlm").rglob("*.py")))


def page_files() -> dict[str, bytes]:
    """The page's files by name, such as "chat.js" or "vendor/katex.min.js"; none without a page."""
    for name in ("chatlm/static", "static"):  # where pip installs it; a checkout or a bundle
        if (folder := in_program(program_root(), name)).is_dir():
            return dict(files_below(folder))
    return {}
