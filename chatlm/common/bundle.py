"""One file to copy: chatlm, the page and the compiled core of this platform, as a zip that Python runs. It
may have the libraries that they need, a model, and words of the command line too."""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import secrets
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from chatlm.common import contents, libraries
from chatlm.common.contents import BundledModel, Contents, contents_of
from chatlm.common.core import core_package, find_core, interface_of, lacks, versions
from chatlm.common.errors import ConfigError
from chatlm.common.gather import Gathered, gather
from chatlm.common.interface import INTERFACE
from chatlm.common.interrupts import ENDS_ON_CTRL_C, masked_interrupts
from chatlm.common.invocation import pip_command
from chatlm.common.libraries import Libraries, packed_libraries, use_libraries
from chatlm.common.program import SCRIPT, archive, in_program, page_files, program_root, program_sources
from chatlm.common.unpack import ABOUT, FOLDER, PLATFORM, AboutCore, about_core

# Python looks for a zip at the end of the file. If that is missing, it reads the file as a script, and its
# only message is that it does not know the second line's encoding.
FIRST_LINES = b"#!/usr/bin/env python3\n# coding: damaged-bundle--copy-chat_server.pyz-again\n"

# The first code of a bundle, in syntax that every Python knows: an old Python could not parse the script, and
# a damaged script could not report it. Libraries are checked when they are unpacked.
MAIN = b'''\
import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(reason):
    sys.stderr.write("chat_server " + reason + "\\n")
    sys.exit(2)


if sys.version_info < (3, 10):
    stop("needs Python 3.10 or newer, but this is %d.%d" % sys.version_info[:2])

import os
import zipfile

# All processes read the program through one descriptor: the file may be replaced or deleted while they run.
# It gets no number that a stream has.
path = os.path.realpath(sys.path[0])
sys.path[0] = path
try:
    import fcntl

    opened = os.open(path, os.O_RDONLY)
    held = "/proc/self/fd/%d" % fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(opened)
    if os.path.isfile(held):
        sys.path[0] = held
except (ImportError, OSError):
    pass
try:
    with zipfile.ZipFile(sys.path[0]) as bundle:
        for name in bundle.namelist():
            if not name.endswith((".so", ".zip")):
                bundle.read(name)  # compares its checksum
except Exception as error:
    stop("cannot run: %s is damaged (%s); copy it again" % (path, error))

from chatlm.common.standard_streams import repair_streams

repair_streams()  # first: a pipe to a worker must not take the number of a closed stream

from chatlm.common.errors import ConfigError
from chatlm.common.libraries import use_libraries

if sys.argv[1:2] != ["bundle"]:
    try:
        use_libraries()
    except ConfigError as error:
        stop("cannot run: %s" % error)

from chatlm.commands import WITHOUT_WORKER_AHEAD
from chatlm.common.contents import own_contents
from chatlm.common.processes.start import start_worker_ahead

start_worker_ahead([*own_contents().words, *sys.argv[1:]], WITHOUT_WORKER_AHEAD)

from chat_server import main

sys.exit(main())
'''


class Wanted(NamedTuple):
    """What `bundle` is asked for."""

    without_core: bool = False
    libraries: bool = False
    pythons: tuple[str, ...] = ()   # whose libraries; () is this one's
    wheels: Path | None = None      # a folder of chat_server's wheels, which have its compiled core
    model: Path | None = None       # a GGUF file
    words: tuple[str, ...] = ()     # of the command line


# Compiles the sources on stdin. Bytecode depends on what else a process has loaded and on its hash seed:
# equal bytes need a fresh process with a fixed seed. Python uses bytecode only of its own version.
COMPILE = ENDS_ON_CTRL_C + """
import importlib.util, marshal, sys
made, flags = {}, int(sys.argv[1]).to_bytes(4, "little")
for name, source in marshal.load(sys.stdin.buffer).items():
    try:
        code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        continue
    hashed = importlib.util.source_hash(source)
    made[name] = importlib.util.MAGIC_NUMBER + flags + hashed + marshal.dumps(code)
marshal.dump([sys.implementation.cache_tag, made], sys.stdout.buffer, 2)
"""
# whether Python compares the source's hash; what PEP 552 says
CHECKED = 3
UNCHECKED = 1
SELDOM = "pygments", "huggingface_hub", "fsspec", "httpx2", "httpcore2", "anyio", "click", "urllib3", "pip"


def compiled(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The bytecode of the modules in these files: without it, the page takes twice as long to appear. It is
    used only if the source next to it has not changed."""
    return {f"{name}c": code for name, code in bytecode(files, sys.executable, CHECKED)[1].items()}


def compiled_tree(gathered: Gathered) -> dict[str, bytes]:
    """The bytecode of libraries, in the folders where Python looks for it, and where Python writes that of
    libraries which are seldom imported."""
    often = {name: data for name, data in gathered.files.items() if name.partition("/")[0] not in SELDOM}
    tag, made = bytecode(often, gathered.interpreter, UNCHECKED)
    names = {name: name.rpartition("/") for name in made}
    return {f"{folder}{slash}__pycache__/{module[:-3]}.{tag}.pyc": made[name]
            for name, (folder, slash, module) in names.items()}


def bytecode(files: Mapping[str, bytes], interpreter: str, flags: int) -> tuple[str, dict[str, bytes]]:
    """(the tag of the Python, the bytecode of each module)."""
    sources = {name: files[name] for name in sorted(files) if name.endswith(".py")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with masked_interrupts():
        done = subprocess.run(
            [interpreter, "-S", "-W", "ignore", "-c", COMPILE, str(flags)], input=marshal.dumps(sources, 2),
            stdout=subprocess.PIPE, env=environment | {"PYTHONHASHSEED": "0"}, cwd="/", check=True)
    return marshal.loads(done.stdout)


def bundle_files() -> dict[str, bytes]:
    """The script, the modules and the page, by name."""
    root = program_root()
    page = {f"static/{name}": data for name, data in page_files().items()}
    return {SCRIPT: in_program(root, SCRIPT).read_bytes()} | program_sources() | page


def core_files() -> tuple[dict[str, bytes], str]:
    """(the core's files for a bundle, by name; why there are none, or "")."""
    if files := own_core_files():  # a bundle makes another
        return files, ""
    use_libraries()
    core, problem = find_core()
    if core is None:
        return {}, problem or f"which is not installed (`{pip_command('.')}` in a checkout builds it)"
    if interface_of(core) != INTERFACE:
        return {}, f"because the installed one has another version ({versions(core)})"
    files = {f"{FOLDER}/{name}": data for name, data in core_package(core).items()}
    name = f"{FOLDER}/decode_core/{Path(core.__file__).name}"
    about = AboutCore(name, hashlib.sha256(files[name]).hexdigest(), PLATFORM, INTERFACE)
    return files | {ABOUT: json.dumps(about).encode()}, ""


def own_core_files() -> dict[str, bytes]:
    """The core's files in the running bundle, if they are for this platform."""
    if program_root().is_file():
        with zipfile.ZipFile(program_root()) as bundle:
            if (about := about_core(bundle)) and (about.platform, about.interface) == (PLATFORM, INTERFACE):
                return {name: bundle.read(name) for name in bundle.namelist()
                        if name.startswith(f"{FOLDER}/") and not name.endswith(".pyc")}
    return {}


def library_files(wanted: Wanted) -> tuple[dict[str, bytes], list[Libraries]]:
    """(the archives of libraries and what is said of them, by name; that)."""
    if not (wanted.pythons or wanted.wheels) and program_root().is_file():
        with zipfile.ZipFile(program_root()) as bundle:
            if packed := packed_libraries(bundle):  # a bundle makes another
                return {name: bundle.read(name) for name in bundle.namelist()
                        if name.startswith(f"{libraries.FOLDER}/")}, packed
    gathered = [each._replace(files=each.files | compiled_tree(each))
                for each in gather(wanted.pythons, wanted.wheels)]
    archives = {f"{libraries.FOLDER}/{'-'.join(pythons)}.zip": archive(files)
                for pythons, files in shared_files(gathered)}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in archives.items()}
    packed = [Libraries(each.python, each.platform, each.glibc, {
        name: digest for name, digest in digests.items() if each.python in Path(name).stem.split("-")})
        for each in gathered]
    return archives | {libraries.ABOUT: json.dumps(packed).encode()}, packed


def shared_files(gathered: Seq[Gathered]) -> Iterator[tuple[tuple[str, ...], dict[str, bytes]]]:
    """Group identical files by the Python versions that share them, so that each is packed once."""
    having: dict[tuple[str, bytes], list[str]] = {}
    for each in gathered:
        for file in each.files.items():
            having.setdefault(file, []).append(each.python)
    groups: dict[tuple[str, ...], dict[str, bytes]] = {}
    for (name, data), pythons in having.items():
        groups.setdefault(tuple(pythons), {})[name] = data
    yield from sorted(groups.items())


def write_bundle(path: Path, wanted: Wanted) -> str:
    """Write the bundle, under another name until it is complete. Returns the line to print."""
    target = Path(os.path.realpath(path))
    part = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    packed: list[Libraries] = []
    try:
        check_target(target)
        files = bundle_files()
        core, problem = ({}, "as you asked") if wanted.without_core or wanted.libraries else core_files()
        made = compiled(files | core)
        if wanted.libraries:
            more, packed = library_files(wanted)
            files |= more
        with open(part, "xb") as file:
            model = copy_model(wanted.model, file) if wanted.model else None
            if model or wanted.words:
                files[contents.ABOUT] = Contents(model, wanted.words).packed()
            files |= core | made | {"__main__.py": MAIN}
            # offsets in the archive are its own: Python adds where it begins
            file.write(archive(files, b"" if model else FIRST_LINES))
            size = file.tell()
        part.chmod(0o777 & ~current_umask())
        part.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    if packed:
        about = f"with the libraries for {' and '.join(map(str, packed))}{needed_glibc(packed)}"
    elif core:
        about = f"with decode_core for {PLATFORM}"
    else:
        about = f"without decode_core, {problem}"
    if model:
        about += f" and the model {model.name}"
    if (core or packed) and not wanted.wheels and (left_out := lacks()):
        about += (f"; decode_core was compiled without {left_out}, so it is slow on CPUs that need these: "
                  f"`DECODE_CORE_SETS=all {pip_command('.')}` in the checkout first, and it has all")
    return f"{path}: {size / 1e6:.1f} MB, {about}"


def needed_glibc(packed: Seq[Libraries]) -> str:
    needed = sorted({each.glibc for each in packed if each.glibc}, key=libraries.version_numbers)
    return f" (glibc {needed[-1]} or newer)" if needed else ""


def copy_model(path: Path, file: BinaryIO) -> BundledModel:
    """Copy a GGUF file. If the path is a bundle that begins with one, copy that."""
    name = path.stem
    left = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as bundle:
            if model := contents_of(bundle).model:
                name = model.name
                left = model.size
    digest = hashlib.sha256()
    size = left
    with open(path, "rb") as source:
        while left and (data := source.read(min(left, 1 << 20))):
            digest.update(data)
            file.write(data)
            left -= len(data)
    if left:
        raise ConfigError(f"{path} became shorter while it was copied")
    return BundledModel(name, size, digest.hexdigest())


def check_target(path: Path):
    """Raise OSError unless the target is new or a bundle: the word after `bundle` may name another file by
    mistake."""
    if not path.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {path.parent}")
    if path.exists() and not is_bundle(path):
        raise FileExistsError("it exists and is not a bundle; name another file, or remove it first")


def is_bundle(path: Path) -> bool:
    """Is it one? A checkpoint of torch is a zip file, too."""
    if not (path.is_file() and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"__main__.py", "chat_server.py"} <= {*archive.namelist()}


def current_umask() -> int:
    umask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(umask)
    return umask
