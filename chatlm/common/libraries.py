"""The libraries in a bundle: unpacked once into the user's cache, checked at each start, found by all of our
processes.

A tree of libraries is a folder named by the digest of what was packed. It has `site`, from which Python
imports, a note of what each file looked like when it was written, and a lock that each start holds while it
runs. Nobody sees a tree before it is whole: it is written under another name."""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import io
import json
import mmap
import os
import secrets
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from chatlm.common.errors import ConfigError
from chatlm.common.program import program_place, program_root
from chatlm.common.unpack import PLATFORM, UNUSED_S, cache_folder, check_ours

FOLDER = "libraries"                # of the bundle, and of the cache
ABOUT = f"{FOLDER}/about.json"
FOUND = "CHAT_SERVER_LIBRARIES"     # the tree that this process uses: for the processes that it starts
UNPACKING_S = 120.0                 # how long to wait for another process that unpacks the same
NEEDED = "150 MB"
OPTIONAL = {"llguidance": "2.30"}   # what needs a newer glibc than the others, and can be done without
# What they need of the system beside glibc, and the packages of Debian and Fedora that have it
SYSTEM = {"libstdc++.so.6": "libstdc++6, or libstdc++", "libgcc_s.so.1": "libgcc-s1, or libgcc",
          "libz.so.1": "zlib1g, or zlib"}
THIS_PYTHON = "{}.{}".format(*sys.version_info)


class Libraries(NamedTuple):
    """A bundle's libraries for one Python on one platform."""

    python: str                     # "3.11"
    platform: str                   # as PLATFORM
    glibc: str                      # the oldest that all of them load with; "" if none needs any
    archives: dict[str, str]        # archives of the bundle, whose files make the tree -> their SHA-256

    @property
    def digest(self) -> str:
        return hashlib.sha256(" ".join(self.archives.values()).encode()).hexdigest()

    @property
    def machine(self) -> str:
        system, machine, tag = self.platform.split()
        return f"{system} {machine}{' with musl' if tag.endswith('musl') else ''}"

    def __str__(self) -> str:
        return f"Python {self.python} on {self.machine}"


class DamagedBundle(ConfigError):
    """A bundle is not what was packed."""

    def __init__(self, path: Path | str | None, what: str):
        super().__init__(f"{path} is damaged ({what}); copy it again")


def packed_libraries(bundle: zipfile.ZipFile) -> list[Libraries]:
    """What the bundle says of its libraries, one for each Python; none if it has none."""
    try:
        return [Libraries(*each) for each in json.loads(bundle.read(ABOUT))]
    except KeyError:
        return []


def fitting(bundle: zipfile.ZipFile) -> Libraries | None:
    """The libraries for this Python; None if the bundle has none at all. Raises ConfigError if it has some,
    but none that fit."""
    packed = packed_libraries(bundle)
    if not packed:
        return None
    found = next((each for each in packed if each.platform == PLATFORM), None)
    if found is None:
        here = Libraries(THIS_PYTHON, PLATFORM, "", {})
        commands = [f"python{each.python}" for each in packed if each.machine == here.machine]
        other = next(filter(shutil.which, commands), None)
        advice = f"; try {other}, which is here" if other else ""
        raise ConfigError(f"{bundle.filename} was made for {' and '.join(map(str, packed))}, and this is "
                          f"{here}{advice}")
    ours = glibc()
    if ours and version_numbers(ours) < version_numbers(found.glibc):
        raise ConfigError(f"{bundle.filename} was made for glibc {found.glibc} or newer, and this is {ours}")
    return found


def version_numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split("."))))


def glibc() -> str:
    """The version of this system's glibc; "" if that is not its C library."""
    with suppress(ValueError, OSError, AttributeError):
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return version if name == "glibc" else ""
    return ""


def use_libraries():
    """Make the running bundle's libraries importable, before all others. ConfigError if that cannot be."""
    root = program_root()
    if not root.is_file():
        return
    with opened_bundle(root) as bundle:
        if libraries := fitting(bundle):
            site = usable_tree(bundle, libraries) / "site"
            os.environ[FOUND] = str(site)
            use_site(str(site))


def use_found_libraries():
    """In a process that we have started: use what its parent uses. On a node of Ray, find it here."""
    if program_root().is_file():
        if site := os.environ.get(FOUND):
            use_site(site)
        else:
            use_libraries()


def use_site(site: str):
    """Import libraries from this folder, except those that this system is too old for."""
    sys.path.insert(1, site)
    ours = version_numbers(glibc())
    for name, needed in OPTIONAL.items():
        if ours and ours < version_numbers(needed):
            sys.modules[name] = None  # pyright: ignore[reportArgumentType]  as the import system documents it


@contextmanager
def opened_bundle(path: Path) -> Iterator[zipfile.ZipFile]:
    """The bundle. ConfigError for whatever zipfile, zlib and json raise for damaged files."""
    shown = program_place() if path == program_root() else path
    try:
        with zipfile.ZipFile(path) as bundle:
            bundle.filename = str(shown)  # for messages
            yield bundle
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror or error}") from None
    except Exception as error:
        raise DamagedBundle(shown, f"{type(error).__name__}: {error}") from None


def usable_tree(bundle: zipfile.ZipFile, libraries: Libraries) -> Path:
    """A tree of these libraries: in the cache, else in a private folder that goes when this process ends.

    ConfigError with all reasons if neither can be."""
    reasons = {}
    for find in (cached_tree, private_tree):
        try:
            return find(bundle, libraries)
        except OSError as error:
            reasons[str(error)] = None
    raise ConfigError(f"its libraries can be unpacked nowhere ({'; '.join(reasons)}); set TMPDIR or "
                      f"XDG_CACHE_HOME to a folder of yours with {NEEDED} free, whose programs may run")


def trees_folder() -> Path:
    return cache_folder().parent / FOLDER


def cached_tree(bundle: zipfile.ZipFile, libraries: Libraries) -> Path:
    """The tree in the cache, which is made or replaced if its files are not those that were written."""
    folder = trees_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_ours(folder.lstat(), folder)
    tree = folder / libraries.digest[:32]
    with suppress(OSError, ValueError):
        return checked_tree(tree)
    with only_one(folder / ".lock") as alone:
        with suppress(OSError, ValueError):     # another process has made it meanwhile
            return checked_tree(tree)
        part = folder / f".part-{secrets.token_hex(8)}"
        try:
            if alone:
                remove_leftovers(folder, tree)
            part.mkdir(mode=0o700)
            write_tree(part, bundle, libraries)
            old = folder / f".part-{secrets.token_hex(8)}"
            if os.path.lexists(tree):           # its files are others
                tree.rename(old)
            part.rename(tree)
            remove_part(old)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    try:
        return checked_tree(tree)
    except ValueError as error:
        raise OSError(f"{tree}: {error}") from None


def private_tree(bundle: zipfile.ZipFile, libraries: Libraries) -> Path:
    """A tree of this process alone, in the first folder for temporary files that lets programs run."""
    reasons = {}
    for folder in temporary_folders():
        remove_private(folder)
        try:
            tree = Path(tempfile.mkdtemp(prefix="chat_server-", dir=folder))
        except OSError as error:
            reasons[str(error)] = None
            continue
        atexit.register(remove_own, tree, os.getpid())
        try:
            write_tree(tree, bundle, libraries)
            return checked_tree(tree)
        except OSError as error:
            reasons[str(error)] = None
            shutil.rmtree(tree, ignore_errors=True)
    raise OSError("; ".join(reasons) or "there is no folder for temporary files")


def temporary_folders() -> Iterable[str]:
    with suppress(OSError):                     # it tries $TMPDIR first
        yield tempfile.gettempdir()
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm"):
        if folder and os.path.isabs(folder):
            yield folder


def remove_own(tree: Path, maker: int):
    if os.getpid() == maker:                    # not a process that it has forked
        shutil.rmtree(tree, ignore_errors=True)


# the files of a tree


def write_tree(tree: Path, bundle: zipfile.ZipFile, libraries: Libraries):
    """Write a tree into an empty folder. DamagedBundle if an archive is not what was packed; ConfigError if
    the system lacks what the libraries need."""
    check_system()
    write_new(f"{tree}/lock", bytes(mmap.PAGESIZE))
    hold(tree / "lock")
    check_executable(tree)
    site = f"{tree}/site"
    note = {}
    made = set()
    os.mkdir(site, 0o700)
    for name, data in packed_files(bundle, libraries):
        for folder in [parent.as_posix() for parent in Path(name).parents[-2::-1]]:
            if folder not in made:
                os.mkdir(f"{site}/{folder}", 0o700)
                made.add(folder)
        path = f"{site}/{name}"
        write_new(path, data)
        note[name] = looks_of(os.lstat(path))
    write_new(f"{tree}/note.json", json.dumps(note).encode())


def check_system():
    """ConfigError for a library that the system lacks: apt and dnf bring all of them, an image without these
    may not have them."""
    for library, packages in SYSTEM.items():
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise ConfigError(f"its libraries need {library} of this system ({error}); install the package "
                              f"{packages}") from None


def write_new(path: str, data: bytes):
    """Write a file that nobody can change, and only this user can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400), "wb") as file:
        file.write(data)


def packed_files(bundle: zipfile.ZipFile, libraries: Libraries) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of the tree. DamagedBundle unless all are what was packed."""
    for name, sha256 in libraries.archives.items():
        data = bundle.read(name)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedBundle(bundle.filename, f"{name} is not what was packed")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                if entry.filename.startswith("/") or ".." in entry.filename.split("/"):
                    raise DamagedBundle(bundle.filename, f"{name} has a file outside of its folder")
                yield entry.filename, archive.read(entry)


def looks_of(status: os.stat_result) -> list[int]:
    """What changes with a file's content, owner or mode; only the system sets the last one."""
    return [status.st_size, status.st_mode, status.st_uid, status.st_mtime_ns, status.st_ctime_ns]


def checked_tree(tree: Path) -> Path:
    """The tree, held by this process until it ends. OSError or ValueError unless its files look as they did
    when they were written, and nobody else can change them."""
    lock = hold(tree / "lock")
    try:
        check_tree(tree)
    except BaseException:
        os.close(lock)
        raise
    with suppress(OSError):
        os.utime(tree)                          # when it was last used
    return tree


def check_tree(tree: Path):
    note = noted(tree)
    site = str(tree / "site") + "/"
    check_ours(tree.lstat(), tree)
    for folder, names in folders_of(note).items():
        path = Path(site + folder)
        check_ours(path.lstat(), path)
        if others := {*os.listdir(path)} - names:
            raise ValueError(f"{folder}/{others.pop()} was not packed")
    for name, looks in note.items():
        if looks_of(os.lstat(site + name)) != looks:
            raise ValueError(f"{name} has changed")
    check_executable(tree)


def folders_of(names: Iterable[str]) -> dict[str, set[str]]:
    """The folders of a tree with these files, by path -> the names in each; the tree itself is ""."""
    folders: dict[str, set[str]] = {"": set()}
    for name in names:
        folder, _, file = name.rpartition("/")
        while folder not in folders:
            folders[folder] = {file}
            folder, _, file = folder.rpartition("/")
        folders[folder].add(file)
    return folders


def noted(tree: Path) -> dict[str, list[int]]:
    with open(os.open(tree / "note.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        check_ours(os.fstat(file.fileno()), tree / "note.json")
        try:
            note = json.load(file)
        except RecursionError:
            raise ValueError("note.json is nested too deeply") from None
    if not (note and isinstance(note, dict)):
        raise ValueError("it notes nothing")
    return note


def check_executable(tree: Path):
    """OSError if the system runs no programs from this folder."""
    with open(os.open(tree / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        try:
            mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
        except OSError as error:
            raise PermissionError(f"no program may be run from {tree} ({error.strerror})") from None


def other_files(tree: Path, bundle: zipfile.ZipFile, libraries: Libraries) -> list[str]:
    """The names of files in a tree that were not packed, or whose content is not what was packed."""
    def differs(name: str, data: bytes) -> bool:
        try:
            return (tree / "site" / name).read_bytes() != data
        except OSError:
            return True
    packed = set[str]()
    found = list[str]()
    for name, data in packed_files(bundle, libraries):
        packed.add(name)
        if differs(name, data):
            found.append(name)
    for folder, names in folders_of(packed).items():
        with suppress(OSError):
            found += [f"{folder}/{name}".lstrip("/") for name in os.listdir(tree / "site" / folder)
                      if name not in names]
    return found


# several processes, users and versions

def hold(path: Path) -> int:
    """Keep others from removing a tree until this process ends or closes the lock, which is returned; wait
    while one removes it."""
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with suppress(OSError):                     # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def remove_unheld(tree: Path):
    """Remove a tree, unless a process holds it."""
    with suppress(OSError), open(os.open(tree / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(tree, ignore_errors=True)


@contextmanager
def only_one(lock: Path) -> Iterator[bool]:
    """While one process writes, the others wait for it; if it hangs, they write too. Yields whether this one
    is alone."""
    with open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
        deadline_s = time.monotonic() + UNPACKING_S
        alone = False
        while not alone and time.monotonic() < deadline_s:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:                     # a file system without locks
                break
        yield alone


def remove_leftovers(folder: Path, tree: Path):
    """Remove what a killed process has left, and trees that no process holds or has used for a month."""
    for other in folder.iterdir():
        if other.name.startswith(".part-"):
            remove_part(other)
        elif other != tree and other.is_dir() and other.lstat().st_mtime < time.time() - UNUSED_S:
            remove_unheld(other)


def remove_part(tree: Path):
    """Remove what is not or no longer in a tree's place, unless a process holds it; it may be anything."""
    if tree.is_symlink() or not tree.is_dir():
        tree.unlink(missing_ok=True)
    elif (tree / "lock").is_file():
        remove_unheld(tree)
    else:                                       # its process was killed before it held it
        shutil.rmtree(tree, ignore_errors=True)


def remove_private(folder: str):
    """Remove private trees of this user whose process was killed."""
    with suppress(OSError):
        for lock in Path(folder).glob("chat_server-*/lock"):
            if lock.lstat().st_uid == os.geteuid():
                remove_unheld(lock.parent)
