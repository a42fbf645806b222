"""The role `check`: what runs on this machine, and whether each op is as its reference."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence as Seq
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy

from chatlm import __version__
from chatlm.common.core import core_info, decode_core, installed_core, interface_of, kernels_line, unused_core
from chatlm.common.interface import INTERFACE
from chatlm.common.processes.start import threads_per_worker


def machine_report() -> str:
    def line_of(path: str, words: str) -> str:
        with suppress(OSError):
            for line in Path(path).read_text(errors="replace").splitlines():
                if line.startswith(words):
                    return line.partition(":")[2].strip()
        return ""

    theirs = interface_of(installed_core()) or "none"
    info = core_info(core) if (core := decode_core()) else {}
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    isa = " ".join([info.get("isa") or "instructions unknown", *info.get("features", ())])
    cpu = line_of("/proc/cpuinfo", "model name") or os.uname().machine
    return "\n".join((
        f"chat_server {__version__} (interface {INTERFACE}), decode_core (interface {theirs}); "
        f"{kernels_line()}",
        f"{f'torch {torch.__version__}' if torch else 'no torch'}, numpy {numpy.__version__}, "
        f"Python {sys.version.split()[0]}",
        f"CUDA of torch: {torch and torch.version.cuda or 'none'}; "
        f"driver: {line_of('/proc/driver/nvidia/version', 'NVRM') or 'none'}",
        f"{os.uname().sysname}, {cpu}, {isa}, {threads_per_worker(1)} threads"))


def check_main(arguments: Seq[str]) -> int:
    """The role `check`: print a report to paste into an issue.

    Returns 0, or 1 if an op differs from its reference or if decode_core is installed but does not load."""
    print(machine_report(), flush=True)
    if decode_core() is None:
        print("no compiled kernels here, so there is nothing to compare")
        return 1 if unused_core() else 0
    from chatlm.worker.kernels.report import Report
    say = partial(print, flush=True)
    return 0 if Report(threads_per_worker(1), say).run() else 1
