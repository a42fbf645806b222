"""How to start this program and its Python: the commands that messages tell the user to type.

Each is as short as the current folder and PATH allow, and works when it is pasted into the terminal where the
message stands."""

from __future__ import annotations

import importlib.machinery
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

SCRIPT = "chat_server.py"   # in a checkout
COMMAND = "chat-server"     # of an installation
PYTHON_NAMES = "python", "python3"
VENV_NAMES = ".venv", "venv", "env"


def root_of_program() -> Path:
    """The checkout, the folder of installed packages, or the bundle that this module is in."""
    return Path(__file__).resolve().parents[2]


def program_command() -> str:
    """What starts this program again: `.venv/bin/python chat_server.py`, `chat-server`, or
    `python3 chat_server.pyz`."""
    root = root_of_program()
    if root.is_file():
        return f"{python_command()} {shown_path(root)}"
    if (root / SCRIPT).exists() and "site-packages" not in root.parts:
        return f"{python_command()} {shown_path(root / SCRIPT)}"
    return tool_command(COMMAND)


def tool_command(name: str) -> str:
    """What starts a command that pip has installed for the Python that runs."""
    command = Path(sys.executable).with_name(name)
    if not command.exists() or same_program(shutil.which(name), command):
        return name
    return shown_command(command)


def shown_command(path: Path) -> str:
    """A program's path as the first word of a line for a shell, which looks for a bare name in PATH."""
    shown = shown_path(path)
    return shown if "/" in shown else f"./{shown}"


def python_command() -> str:
    """What starts the Python that runs."""
    running = Path(sys.executable)
    for name in PYTHON_NAMES:
        if same_program(shutil.which(name), running):
            return name
    return shown_command(running)


def pip_command(*packages: str) -> str:
    """What installs packages for the Python that runs."""
    return f"{python_command()} -m pip install {' '.join(packages)}"


def install_advice(*packages: str) -> str:
    """What to do about missing packages, as the end of a message: start the program with the virtual
    environment beside it that has them, make one where the system's Python takes none, or install them."""
    if python := python_beside(packages):
        return f"{shown_command(python)} has what is missing: run it instead of {python_command()}, as in " \
               f"`{shown_command(python)} {script()}`"
    if not is_managed():
        return f"install with: {pip_command(*packages)}"
    checkout = (root_of_program() / "requirements.txt").exists()
    what = "--no-compile -c requirements.txt ." if checkout else " ".join(packages)
    return (f"{python_command()} is the system's Python, which takes no packages. A virtual environment "
            f"does: `python3 -m venv .venv && .venv/bin/pip install {what}`, then "
            f"`.venv/bin/python {script()}`")


def advice_for_old_python() -> str:
    """Where a newer Python is, as the end of a message; "" if none is beside this program."""
    python = python_beside()
    return f"; run `{shown_command(python)} {script()}` instead" if python else ""


def script() -> str:
    root = root_of_program()
    return shown_path(root if root.is_file() else root / SCRIPT)


def python_beside(packages: tuple[str, ...] = ()) -> Path | None:
    """The Python of a virtual environment beside this program, if it has these packages and does not run."""
    root = root_of_program()
    folder = root.parent if root.is_file() else root
    running = os.path.realpath(sys.prefix)
    for name in VENV_NAMES:
        python = folder / name / "bin" / "python"
        sites = [str(site) for site in (folder / name).glob("lib/python*/site-packages")]
        if (python.exists() and os.path.realpath(folder / name) != running and
                all(importlib.machinery.PathFinder.find_spec(package, sites) for package in packages)):
            return python
    return None


def is_managed() -> bool:
    """Whether pip refuses to install into this Python (PEP 668)."""
    in_venv = sys.prefix != sys.base_prefix
    return not in_venv and os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))


def same_program(found: str | None, program: Path) -> bool:
    """Is what PATH has this program, in the same folder?"""
    if found is None:
        return False
    same_folder = os.path.realpath(os.path.dirname(found)) == os.path.realpath(program.parent)
    return same_folder and os.path.realpath(found) == os.path.realpath(program)


def shown_path(path: Path) -> str:
    """A path for a shell, relative to the current folder if it is below it; all are below /."""
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        here = "/"
    below = os.path.relpath(path, here)
    return shlex.quote(str(path) if here == "/" or below.startswith("..") else below)
