"""Finds the library of decode_core, the compiled kernels, in a bundle or installed, and describes it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Any

from chatlm.common.errors import error_text
from chatlm.common.interface import INTERFACE
from chatlm.common.invocation import pip_command
from chatlm.common.unpack import UnfitCore, load_bundled_core


def device_files() -> int:
    """How many NVIDIA GPUs this machine has."""
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia*"))


def torch_installed() -> bool:
    """It computes on GPUs, and what decode_core cannot."""
    return importlib.util.find_spec("torch") is not None


@functools.cache
def find_core() -> tuple[Any, str]:
    """(the compiled library or None, why the bundle's is not used or ""). A bundle's own library comes first,
    then the one that `pip install .` in a checkout builds and installs; of any version."""
    problem = ""
    try:
        if core := load_bundled_core(INTERFACE):
            return core, ""
    except UnfitCore as error:
        problem = f"the bundle's decode_core {error}"
    try:
        return importlib.import_module("decode_core._core"), problem
    except Exception as error:  # for example from a library for another machine
        if reason := re.search("isa: (.*)", str(error)):
            problem = f"DECODE_CORE_ISA={os.environ.get('DECODE_CORE_ISA')}: {reason[1]}"
        elif compiled_half() or not isinstance(error, ImportError):
            problem = f"the installed decode_core cannot be loaded ({error_text(error)})"
        return None, problem


def compiled_half() -> list[Path]:
    """The library of the decode_core that Python would import; none if it was built without a compiler."""
    spec = importlib.util.find_spec("decode_core")
    libraries = []
    for folder in (spec and spec.submodule_search_locations) or ():
        libraries += Path(folder).glob("_core.*.so")
    return libraries


@functools.cache
def installed_core():
    """The compiled core of any version, or None."""
    return None if os.environ.get("CHAT_SERVER_KERNELS") == "reference" else find_core()[0]


def decode_core():
    """The compiled library, or None if there is none or it has another interface than this program needs."""
    core = installed_core()
    return core if interface_of(core) == INTERFACE else None


def versions(core) -> str:
    """In words, the interface of a library of another version, and ours."""
    return f"interface {interface_of(core) or 'unknown'} instead of {INTERFACE}"


def interface_of(core) -> int | None:
    """Libraries that were compiled before November 2026 have none."""
    return getattr(core, "INTERFACE", None)


def core_package(core) -> dict[str, bytes]:
    """The files of the installed package that has this library, by name."""
    library = Path(core.__file__)
    paths = library, library.with_name("__init__.py")
    return {f"decode_core/{path.name}": path.read_bytes() for path in paths}


def core_info(core) -> dict:
    """What was compiled and what runs.

    left_out_isas: those that the library was compiled without, whatever this CPU offers; missed_isa: the one
    of them that this CPU would choose, or "". amx_refused: why the AMX of this CPU cannot be used; "" if it
    can, or if the CPU has none."""
    no_amx_here = core.amx_refusal_of(0, 0, 0)
    return {"isa": core.isa(), "offered_isas": core.offered_isas(), "left_out_isas": core.left_out_isas(),
            "missed_isa": core.missed_isa(),
            "features": [name for name in core.CPU_FEATURES if core.cpu_has(name)],
            "amx_refused": "" if core.amx_refusal() == no_amx_here else core.amx_refusal(),
            "threads": core.get_threads(), "cuda_compiled": core.cuda_compiled}


def refused_isa() -> str:
    """Why decode_core cannot run with the instructions that DECODE_CORE_ISA requests; "" if it can."""
    problem = "" if os.environ.get("CHAT_SERVER_KERNELS") == "reference" else find_core()[1]
    return problem if problem.startswith("DECODE_CORE_ISA=") else ""


def as_expected(line: str) -> bool:
    """Whether a `kernels_line` names nothing that this machine misses, refuses or leaves unused."""
    return bool(re.fullmatch(r"decode_core runs with \S+ instructions( \(compiled without [^()]*\))?"
                             "(, compiled with CUDA too)?", line))


def lacks() -> str:
    """The instruction sets that decode_core was compiled without, as one for a single kind of CPU; "" if
    none."""
    core = decode_core()
    return ", ".join(core.left_out_isas()) if core else ""


def unused_core() -> str:
    """Why an existing compiled core is not used; "" if it is used or not wanted, or if there is none."""
    wanted = os.environ.get("CHAT_SERVER_KERNELS") != "reference"
    return kernels_line() if wanted and decode_core() is None and any(find_core()) else ""


def kernels_line() -> str:
    """Which compiled core runs, or how to get one: for the start-up log, /stats and --version."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    first = "" if compiler else "install a C++ compiler (Debian: apt install g++), then "
    instead = ("so slower reference ops run" if torch_installed() else
               f"and there is no torch to compute instead ({pip_command('torch')})")
    build = f"{instead}; {first}`{pip_command('.')}` in the checkout builds it"
    if os.environ.get("CHAT_SERVER_KERNELS") == "reference":
        return f"CHAT_SERVER_KERNELS=reference, {instead}"
    problem = find_core()[1]
    if refused := refused_isa():
        return refused
    if core := decode_core():
        info = core_info(core)
        unused = 0 if torch_installed() else device_files()
        line = f"decode_core runs with {info['isa']} instructions"
        if missed := info["missed_isa"]:
            line += (f"; this CPU has {missed}, which it was compiled without: "
                     f"`DECODE_CORE_SETS=all {pip_command('.')}` in the checkout brings it")
        elif left_out := lacks():
            line += f" (compiled without {left_out})"
        if unused:
            line += f"; {unused} GPU(s) are not used, because torch is not installed"
        elif device_files() and not info["cuda_compiled"]:
            line += ("; it has no CUDA kernels, so torch computes on the GPU: "
                     f"`DECODE_CORE_CUDA=1 {pip_command('.')}` in the checkout, where nvcc is, compiles them")
        if info["amx_refused"]:
            line += f" ({info['amx_refused']})"
        if info["cuda_compiled"] and device_files():
            line += ", compiled with CUDA too"
        if problem:
            line += f"; it is the installed one, because {problem}"
        return line
    if problem:
        return f"{problem}, {instead}"
    if core := installed_core():
        return f"decode_core has another version ({versions(core)}), {build} again"
    return f"decode_core is not installed, {build}"
