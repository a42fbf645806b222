"""Bundles in tests: commands that find nothing of this environment, and bundles with other files in them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import chat_server

CHECKOUT = Path(chat_server.__file__).resolve().parent
BARE = "-S", "-E"            # without any library that pip installed


def run(*words, python=sys.executable, **more):
    """A command of a Python, in another folder; its output is text."""
    return subprocess.run([python, *map(str, words)], capture_output=True, text=True, timeout=120,
                          **{"cwd": "/", "env": clean_environment()} | more)


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
