"""One file to copy: chatlm, the page and the compiled core of this platform, as a zip that Python runs."""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import secrets
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from chatlm.common.core import find_core, seam
from chatlm.common.errors import ConfigError
from chatlm.common.program import SCRIPT, archive, in_program, page_files, program_root, program_sources
from chatlm.common.unpack import ABOUT, FOLDER, PLATFORM, AboutCore, about_core

# Python looks for a zip at the end of the file. If that is missing, it reads the file as a script, and its
# only message is that it does not know the second line's encoding.
FIRST_LINES = b"#!/usr/bin/env python3\n# coding: damaged-bundle--copy-chat_server.pyz-again\n"

# The first code of a bundle, in syntax that every Python knows: an old Python could not parse the script, and
# a damaged script could not report it. The library is checked when it is unpacked.
MAIN = b'''\
import sys


def stop(reason):
    sys.stderr.write("chat_server " + reason + "\\n")
    sys.exit(2)


if sys.version_info < (3, 10):
    stop("needs Python 3.10 or newer, but this is %d.%d" % sys.version_info[:2])

import os
import zipfile

sys.path[0] = os.path.realpath(sys.path[0])
try:
    with zipfile.ZipFile(sys.path[0]) as bundle:
        for name in bundle.namelist():
            if not name.endswith(".so"):
                bundle.read(name)  # compares its checksum
except Exception as error:
    stop("cannot run: %s is damaged (%s); copy it again" % (sys.path[0], error))

from chat_server import main

sys.exit(main())
'''


# Compiles the sources on stdin. Bytecode depends on what else a process has loaded and on its hash seed:
# equal bytes need a fresh process with a fixed seed. Python uses bytecode only of its own version, and only
# if the source next to it has not changed.
COMPILE = """
import importlib.util, json, marshal, sys
checked = importlib.util.MAGIC_NUMBER + b"\\3\\0\\0\\0"
made = {name + "c": checked + importlib.util.source_hash(source.encode())
        + marshal.dumps(compile(source, name, "exec", dont_inherit=True, optimize=0))
        for name, source in json.load(sys.stdin).items()}
marshal.dump(made, sys.stdout.buffer)
"""


def compiled(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The bytecode of the modules in these files: without it, the page takes twice as long to appear."""
    sources = {name: files[name].decode() for name in sorted(files) if name.endswith(".py")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", COMPILE], input=json.dumps(sources).encode(), stdout=subprocess.PIPE,
        env=environment | {"PYTHONHASHSEED": "0"}, cwd="/", check=True)
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
    core, problem = find_core()
    if core is None:
        return {}, problem or "which is not installed (`pip install .` in a checkout builds it)"
    if core.SEAM != seam():
        return {}, f"because the installed one has another version (seam {core.SEAM} instead of {seam()})"
    library = Path(core._core.__file__)
    paths = library, *Path(core.__file__).parent.glob("*.py")
    files = {f"{FOLDER}/decode_core/{path.name}": path.read_bytes() for path in paths}
    name = f"{FOLDER}/decode_core/{library.name}"
    about = AboutCore(name, hashlib.sha256(files[name]).hexdigest(), PLATFORM, core.SEAM)
    return files | {ABOUT: json.dumps(about).encode()}, ""


def own_core_files() -> dict[str, bytes]:
    """The core's files in the running bundle, if they are for this platform."""
    if program_root().is_file():
        with zipfile.ZipFile(program_root()) as bundle:
            if (about := about_core(bundle)) and (about.platform, about.seam) == (PLATFORM, seam()):
                return {name: bundle.read(name) for name in bundle.namelist()
                        if name.startswith(f"{FOLDER}/") and not name.endswith(".pyc")}
    return {}


def write_bundle(path: Path, without_core: bool) -> str:
    """Write the bundle, under another name until it is complete. Returns the line to print."""
    target = Path(os.path.realpath(path))
    part = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        check_target(target)
        files = bundle_files()
        core, problem = ({}, "as you asked") if without_core else core_files()
        files |= core
        data = archive(files | compiled(files) | {"__main__.py": MAIN}, FIRST_LINES)
        part.write_bytes(data)
        part.chmod(0o777 & ~current_umask())
        part.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    what = f"with decode_core for {PLATFORM}" if core else f"without decode_core, {problem}"
    return f"{path}: {len(data) / 1e6:.1f} MB, {what}"


def check_target(path: Path):
    """OSError unless the target is new or a bundle: the word after `bundle` may name another file by
    mistake."""
    if not path.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {path.parent}")
    if path.is_dir() or path.exists() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise FileExistsError("it exists and is not a bundle; name another file, or remove it first")


def current_umask() -> int:
    os.umask(umask := os.umask(0o077))
    return umask
