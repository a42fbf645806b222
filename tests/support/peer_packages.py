"""Packages of the peers in tests/peers, installed once into folders of build-peers/."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE, HOME = ROOT / "tests/peers", ROOT / "build-peers"
INSTALL_S = 300


def made(name, source, *commands, called=None):
    """The folder build-peers/`name`, made by `commands` from the file `source`, there `called` so. Skips the
    tests if that fails or takes too long."""
    folder, text = HOME / name, (HERE / source).read_bytes()
    stamp = folder / "made-from"
    digest = hashlib.sha256(text + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / (called or source)).write_bytes(text)
    for command in commands:
        try:
            done = subprocess.run(command, cwd=folder, timeout=INSTALL_S, capture_output=True, text=True)
        except (subprocess.TimeoutExpired, OSError) as error:
            pytest.skip(f"the peers' packages could not be installed: {error}")
        if done.returncode:
            pytest.skip(f"the peers' packages could not be installed: {done.stderr.strip()[-300:]}")
    stamp.write_text(digest)
    return folder


def made_venv(name, source):
    """The Python of a virtual environment that has the packages in the file `source`."""
    venv = [sys.executable, "-m", "venv", "--without-pip", "venv"]
    pip = [sys.executable, "-m", "pip", "--python", "venv/bin/python", "install", "--quiet", "--no-deps", "--no-compile",
           "--disable-pip-version-check", "--retries", "1", "-r", source]
    return made(name, source, venv, pip) / "venv/bin/python"


def llama_cpp(folder, *parts):
    """The folder of llama.cpp's sources, of which the files whose paths have one of `parts` are unpacked into `folder`: from the source
    package of llama-cpp-python, which is downloaded once."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "-r", "template.txt"]
    (package,) = made("harmony-template", "template.txt", download).glob("*.tar.gz")
    with tarfile.open(package) as files:
        files.extractall(folder, [member for member in files.getmembers() if any(f"/llama.cpp/{part}" in member.name for part in parts)], filter="data")
    (home,) = folder.glob("*/vendor/llama.cpp")
    return home


NPM = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
