"""What each of our other processes does first, by its role."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.common.libraries import use_found_libraries
from chatlm.common.messages.wire import Channel
from chatlm.common.processes.connect import admit_front
from chatlm.common.processes.start import NICENESS
from chatlm.common.program import program_root

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Pipe


# The module and function that each of our other processes runs; by name, so that no house imports another.
ROLES = {
    "worker": "chatlm.worker.entry:worker_role",
    "rank": "chatlm.worker.entry:rank_role",
    "survey": "chatlm.worker.entry:survey_role",
    "hub": "chatlm.common.hub.offers:hub_main",
    "sandbox": "chatlm.front.intake.sandboxed:sandbox_main",
    "ray": "chatlm.common.processes.ray:ray_main",
    "preview": "chatlm.worker.weights.preview:preview_main",
    "trial": "chatlm.worker.weights.text.trial:trial_main",
    "doctor": "chatlm.worker.entry:doctor_role",
    "export": "chatlm.export.command:export_main",
    "check": "chatlm.worker.kernels.check:check_main",
    "quantize": "chatlm.worker.entry:quantize_role",
    "imatrix": "chatlm.worker.entry:imatrix_role",
    "vectors": "chatlm.worker.vectors.process:vectors_main",
    "guard": "chatlm.front.tools.guard:guard_main",
}


def run_role(role: str, *arguments: str) -> int:
    """Run one of ROLES in this process; returns its exit status."""
    if program_root().is_file():  # a bundle
        use_found_libraries()
    run = importer(ROLES[role])()
    gc.freeze()  # later collections leave out what was imported, until `give_memory_back` looks at it once
    return run(arguments)


def join_parent(arguments: Seq[str], pipe: Pipe) -> Channel:
    """A child process's first step: ignore signals, which are for the front, set its niceness, and die when
    the front dies.

    arguments: the descriptor of its end of the pipe, or the address where to listen for the front; the
    parent's process id."""
    descriptor, parent = arguments
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal or systemd signals all
        signal.signal(stop, signal.SIG_IGN)
    if nice := os.environ.get(NICENESS):
        os.setpriority(os.PRIO_PROCESS, 0, int(nice))
    share_niceness()
    die_with_parent(int(parent))
    if descriptor.isdigit():
        return Channel(socket.socket(fileno=int(descriptor)), pipe)
    return Channel(admit_front(descriptor), pipe)


def die_with_parent(parent: int):
    """Ask Linux to kill this process when its parent dies; elsewhere only the pipe's end of file ends it."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent had died before the call above
        os._exit(1)


def share_niceness():
    """Give this process's session the niceness of the process. Linux first divides the processor among
    sessions (sched(7), autogroups), and each of our processes has its own."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice > 0:
        with suppress(OSError):  # no such file: not Linux, or without this feature
            Path("/proc/self/autogroup").write_text(str(nice))
