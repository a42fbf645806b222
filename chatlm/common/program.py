"""Which program this is: its sources and its page, in a checkout, an installation or a bundle."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

FIXED_DATE = 1980, 1, 1, 0, 0, 0  # the first that a zip can have: equal files make equal archives


def program_root() -> Path:
    """The folder that has the package chatlm (a checkout, or site-packages), or the bundle."""
    return Path(__file__).resolve().parents[2]


def files_below(folder, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file below a folder, on disk or in an archive, in the order of names."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from files_below(entry, f"{prefix}{entry.name}/")
        elif entry.is_file() and not (isinstance(entry, Path) and entry.is_symlink()):
            yield prefix + entry.name, entry.read_bytes()


def program_sources() -> dict[str, bytes]:
    """The modules of chatlm, by their names in an archive."""
    package = importlib.resources.files("chatlm")
    return {name: text for name, text in files_below(package, "chatlm/") if name.endswith(".py")}


def archive(files: dict[str, bytes]) -> bytes:
    """A zip of these files; the same files give the same bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as target:
        for name in sorted(files):
            target.writestr(zipfile.ZipInfo(name, FIXED_DATE), files[name], zipfile.ZIP_DEFLATED)
    return data.getvalue()


def program_bytes() -> bytes:
    """What another machine needs to run one of our roles: an archive of chatlm's modules."""
    return archive(program_sources())


@functools.cache
def program_digest() -> str:
    """Tells one version of the sources from another, on any machine, bundled or not."""
    digest = hashlib.sha256()
    for name, text in program_sources().items():
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def program_stamp() -> tuple:
    """Changes when the sources do that another process of ours would read now."""
    root, stamps = program_root(), []
    for path in [root] if root.is_file() else sorted((root / "chatlm").rglob("*.py")):
        with suppress(OSError):
            now = os.stat(path)
            stamps.append((now.st_mtime_ns, now.st_size))
    return tuple(stamps)


def page_files() -> dict[str, bytes]:
    """The files of the page by name, such as "chat.js" or "vendor/katex.min.js"; none without a page."""
    package = importlib.resources.files("chatlm")
    beside = zipfile.Path(program_root()) if program_root().is_file() else program_root()
    for folder in (package / "static", beside / "static"):  # where pip installs it; a checkout or a bundle
        if folder.is_dir():
            return dict(files_below(folder))
    return {}
