"""Which decode_core is installed, and what it says of itself."""

from __future__ import annotations

import functools
import importlib
import os
import shutil


SEAM = 12  # version of Backend and for_decode_core; a core with another version is not used


@functools.cache
def installed_core():
    """The compiled core of any version (`pip install .` in the checkout builds it), or None."""
    if os.environ.get("CHAT_SERVER_KERNELS") == "reference":
        return None
    try:
        return importlib.import_module("decode_core")
    except ImportError:
        return None


def decode_core():
    """The compiled core, or None if it is not installed or its SEAM differs from ours."""
    core = installed_core()
    return core if getattr(core, "SEAM", None) == SEAM else None


def kernels_line() -> str:
    """Which compiled core runs, or how to get one: for the start-up log, /stats and --version."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = "" if found else "install a C++ compiler (Debian: apt install g++), then "
    build = f"so slower reference ops run; {compiler}`pip install .` in the checkout builds it"
    if core := decode_core():
        info = core.info()
        return (f"decode_core runs with {info['isa']} instructions"
                + ", compiled with CUDA too" * info["cuda_compiled"])
    if os.environ.get("CHAT_SERVER_KERNELS") == "reference":
        return "CHAT_SERVER_KERNELS=reference, so slower reference ops run"
    if core := installed_core():
        version = getattr(core, "SEAM", "unknown")
        return f"decode_core has another version (seam {version} instead of {SEAM}), {build} again"
    return f"decode_core is not installed, {build}"
