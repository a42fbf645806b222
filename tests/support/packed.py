"""Bundles in tests: commands that find nothing of this environment, and bundles with other files in them."""

import functools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import chat_server
from chatlm.common import bundle, core
from made_once import made_once

CHECKOUT = Path(chat_server.__file__).resolve().parent
BARE = "-S", "-E"            # without any library that pip installed


def run(*words, python=sys.executable, **more):
    """A command of a Python, in another folder; its output is text."""
    return subprocess.run([python, *map(str, words)], capture_output=True, text=True, timeout=120,
                          **{"cwd": "/", "env": clean_environment()} | more)


# What --version says of the kernels, from a bundle, of whose program Python imports no more than that needs
KERNELS = "-c", "import sys; sys.path.insert(0, sys.argv[1]); from chatlm.common.core import kernels_line; print(kernels_line())"


def kernels(file, *flags, **environment):
    done = run(*flags, *KERNELS, file, env=clean_environment(**environment))
    (line,) = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    return line

# A command of the program in the folder or bundle that is the first argument, which makes bundles without bytecode: that takes seconds, and a
# Python of its own with no library in any case
WITHOUT_BYTECODE = "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); from chatlm.common import bundle; bundle.compiled = lambda files: {}; " \
                         "import chat_server; sys.exit(chat_server.main())"

# The same for a bundle that is the first argument, which takes over the bytecode of its own modules
WITH_ITS_BYTECODE = "-c", "import sys, zipfile; sys.path.insert(0, sys.argv.pop(1)); from chatlm.common import bundle; own = zipfile.ZipFile(sys.path[0]); " \
                          "bundle.compiled = lambda files: {name: own.read(name) for name in own.namelist() if name.endswith('.pyc')}; " \
                          "import chat_server; sys.exit(chat_server.main())"


def bytecode_in(file):
    """The bytecode of the modules in a bundle, by name."""
    with zipfile.ZipFile(file) as source:
        return {name: source.read(name) for name in source.namelist() if name.endswith(".pyc")}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """A bundle as the command makes it, with the core if there is one here; the processes of this run share it."""
    def make(file):
        made = run(CHECKOUT / "chat_server.py", "bundle", file)
        assert (made.returncode, made.stderr) == (0, "")
        assert made.stdout.startswith(f"{file}: ") and (core.decode_core() is None or "with decode_core for Linux" in made.stdout)
    return made_once(tmp_path_factory, "bundled/chat_server.pyz", make)


@functools.cache
def bytecode(files, interpreter, flags, original=bundle.bytecode):
    return original(dict(files), interpreter, flags)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Bundles that this process makes compile the same modules once."""
    monkeypatch.setattr(bundle, "bytecode", lambda files, interpreter, flags: bytecode(frozenset(files.items()), interpreter, flags))


def clean_environment(**more):
    """Without what makes the code under test importable here."""
    return {name: value for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "CHAT_SERVER_DIR", "CHAT_SERVER_KERNELS")} | {k: str(v) for k, v in more.items()}


def one_line(done, status=2):
    """What a command said that failed in one line."""
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (status, "") and "Traceback" not in line
    return line


def changed(file, target, changes):
    """A copy of a bundle in which some files are others."""
    with zipfile.ZipFile(file) as source:
        files = {name: source.read(name) for name in source.namelist()} | changes
    with zipfile.ZipFile(target, "w") as other:
        for name, data in files.items():
            other.writestr(name, data)
    return target
