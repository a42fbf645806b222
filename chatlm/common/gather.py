"""Which libraries a bundle gets: those installed for this Python, or those that pip fetches for others."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence as Seq
from pathlib import Path
from typing import NamedTuple

from chatlm.common.core import core_package, find_core, interface_of
from chatlm.common.elf import glibc_of
from chatlm.common.errors import ConfigError, require_library
from chatlm.common.interface import INTERFACE
from chatlm.common.invocation import pip_command, python_command
from chatlm.common.libraries import OPTIONAL, THIS_PYTHON
from chatlm.common.program import in_program, program_place, program_root
from chatlm.common.unpack import PLATFORM

# What the program is installed with, as in pyproject.toml; tests compare them
REQUIRED = ("aiohttp", "numpy", "gguf", "huggingface_hub", "jinja2", "safetensors", "tokenizers", "tiktoken",
            "prompt_toolkit", "rich", "prometheus_client", "llguidance", "tomli; python_version < '3.11'")
# Of a library: tests, what its own users compile against, and what pip notes of an installation
LEFT_OUT = re.compile(r"(^|/)(tests|include|__pycache__|\.\.)/|\.(py[cixd]|pyx|pxd|[ch]|a|exe)$"
                      r"|\.dist-info/(RECORD|INSTALLER|REQUESTED|direct_url\.json|sboms/.*)$")


class Gathered(NamedTuple):
    """The libraries for one Python: all files of a tree but their bytecode."""

    python: str
    platform: str
    interpreter: str                # its command
    files: dict[str, bytes]

    @property
    def glibc(self) -> str:
        """The oldest glibc that all of them load with, but for optional ones."""
        needed = [glibc_of(data) for name, data in self.files.items()
                  if ".so" in name and name.partition("/")[0] not in OPTIONAL]
        return ".".join(map(str, max(needed, default=())))


def gather(pythons: Seq[str], wheels: Path | None) -> Iterator[Gathered]:
    """For this Python what is installed, if no other is named; else what pip fetches for each.

    wheels: a folder with a wheel of chat_server for each, whose compiled core is taken."""
    for python in pythons or (THIS_PYTHON,):
        interpreter = interpreter_of(python)
        platform = run_python(interpreter, "from chatlm.common.unpack import PLATFORM; print(PLATFORM)")
        core = core_of_wheel(wheels, python) if wheels else core_installed(python)
        libraries = fetched_libraries(interpreter, python) if pythons else installed_libraries()
        yield Gathered(python, platform, interpreter, dict(sorted((libraries | core).items())))


def interpreter_of(python: str) -> str:
    """The command of a Python version. ConfigError if it is not here."""
    if python == THIS_PYTHON:
        return sys.executable
    found = shutil.which(f"python{python}")
    if not found or run_python(found, "import sys; print('{}.{}'.format(*sys.version_info))") != python:
        raise ConfigError(f"--pythons {python}: the command python{python} is not here; pip needs it, and so "
                          "does bytecode")
    return found


def run_python(interpreter: str, code: str) -> str:
    """What another Python prints, which finds our modules; "" if it fails."""
    start = f"import sys; sys.path.insert(0, {str(program_place())!r})"
    done = subprocess.run([interpreter, "-c", f"{start}; {code}"],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/")
    return done.stdout.strip() if done.returncode == 0 else ""


def wanted(name: str) -> bool:
    return ".dist-info/licenses/" in name or not LEFT_OUT.search(name)


# what is installed


def installed_libraries() -> dict[str, bytes]:
    """The files of what this Python needs, from where they are installed."""
    files = {}
    for distribution in installed(REQUIRED):
        for path in distribution.files or ():
            if wanted(str(path)):
                files[str(path)] = Path(str(distribution.locate_file(path))).read_bytes()
    return files


def installed(requirements: Seq[str]) -> list[importlib.metadata.Distribution]:
    """These distributions and all that they require. ConfigError for a missing one."""
    require_library("packaging", "`bundle --with-libraries`")
    from packaging.requirements import Requirement
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = [Requirement(each) for each in requirements]
    while todo:
        asked_for = todo.pop()
        name = re.sub(r"[-_.]+", "-", asked_for.name).lower()
        if name in found or asked_for.marker and not asked_for.marker.evaluate({"extra": ""}):
            continue
        try:
            found[name] = distribution = importlib.metadata.distribution(asked_for.name)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"a bundle with libraries needs {asked_for.name}, which is not installed: "
                              f"{pip_command(asked_for.name)}") from None
        todo += map(Requirement, distribution.requires or ())
    return [found[name] for name in sorted(found)]


def core_installed(python: str) -> dict[str, bytes]:
    """The compiled core that runs here. ConfigError without one, since nothing else computes in a bundle."""
    if python != THIS_PYTHON:
        raise ConfigError(f"--pythons {python}: only this Python's compiled core is here; --wheels FOLDER "
                          "names a folder with a wheel of chat_server for each "
                          f"(`{python_command()} setup.py release` makes them)")
    core, problem = find_core()
    if core is None:
        raise ConfigError("a bundle with libraries needs decode_core, "
                          + (problem or f"which is not installed (`{pip_command('.')}` in a checkout "
                                        "builds it)"))
    if interface_of(core) != INTERFACE:
        raise ConfigError("a bundle with libraries needs decode_core, and the installed one has another "
                          f"version; run `{pip_command('.')}` again")
    return core_package(core)


# what pip fetches


def fetched_libraries(interpreter: str, python: str) -> dict[str, bytes]:
    """The files of what another Python needs; of the versions in requirements.txt if it is here."""
    pinned = program_root() / "requirements.txt"
    with tempfile.TemporaryDirectory(prefix="chat_server-") as folder:
        command = [sys.executable, "-m", "pip", "--python", interpreter, "download", "-q", "--no-input",
                   "--only-binary=:all:", "--disable-pip-version-check", "--dest", folder,
                   *(("-c", str(pinned)) if pinned.is_file() else ()), *REQUIRED]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
            raise ConfigError(f"pip cannot fetch the libraries for Python {python}: {''.join(last)}")
        files = {}
        for wheel in sorted(Path(folder).glob("*.whl")):
            files |= files_of_wheel(wheel)
        return files


def files_of_wheel(wheel: Path) -> dict[str, bytes]:
    """What pip would put into site-packages."""
    data_folder = re.compile(r"^[^/]+\.data/(?:purelib|platlib)/")
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = data_folder.sub("", entry.filename)
            if not entry.is_dir() and wanted(name) and not name.partition("/")[0].endswith(".data"):
                files[name] = archive.read(entry)
    return files


def core_of_wheel(wheels: Path, python: str) -> dict[str, bytes]:
    """The compiled core of chat_server's wheel for a Python. ConfigError unless there is one, made from what
    runs here."""
    tag = f"cp{python.replace('.', '')}"
    machine = PLATFORM.split()[1]
    found = sorted(wheels.glob(f"chat_server-*-{tag}-{tag}-*{machine}.whl"))
    if not found:
        raise ConfigError(f"--wheels {wheels}: there is no chat_server-*-{tag}-{tag}-*{machine}.whl")
    files = files_of_wheel(found[-1])
    name = "chatlm/common/interface.py"
    if files.get(name) != in_program(program_root(), name).read_bytes():
        raise ConfigError(f"--wheels {wheels}: {found[-1].name} was made from another version of the program")
    core = {name: data for name, data in files.items() if name.startswith("decode_core/")}
    if not any(name.endswith(".so") for name in core):
        raise ConfigError(f"--wheels {wheels}: {found[-1].name} has no compiled decode_core")
    return core
