"""Starting our other processes. Imports little: the first worker is started before anything else happens."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence as Seq
from contextlib import suppress
from pathlib import Path

from chatlm.common.interrupts import ENDS_ON_CTRL_C
from chatlm.common.program import program_descriptors, program_root


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """How many CPUs the cgroup allows (v2 `cpu.max`, v1 `cpu.cfs_*`); infinity without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = " ".join((root / name).read_text() for name in names).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    return math.inf


def physical_cores(cpus: Iterable[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many physical cores the logical `cpus` are on; hyper-threads of one core count once."""
    def core(cpu: int) -> str:
        with suppress(OSError):
            return (root / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        return str(cpu)
    return len({core(cpu) for cpu in cpus})


def threads_per_worker(workers: int) -> int:
    """Physical cores per worker, within the affinity mask and the cgroup quota; at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, int(min(physical_cores(cpus), cpu_quota())) // workers)


def own_threads() -> int:
    """How many threads this process computes with: what its parent has set, else what the machine allows."""
    return int(os.environ.get("OMP_NUM_THREADS") or threads_per_worker(1))


# OpenMP by default spins for milliseconds at each barrier: with one core taken by another program, decoding
# was 25 times slower (1.6, not 40 tok/s). Threads of numpy's BLAS spin for 2^26 ticks of the clock before
# they sleep, which is 28 ms at 2.4 GHz, and do so at once when numpy is imported; 2^4 is the least that it
# accepts. One malloc arena saves 60 MB over one per thread.
CALM_THREADS = {"GOMP_SPINCOUNT": "2000", "OPENBLAS_THREAD_TIMEOUT": "4", "MALLOC_ARENA_MAX": "1"}
NICENESS = "CHAT_SERVER_NICENESS"  # inherited by the processes that we start


def process_environment(threads: int, nice: int | None = None) -> dict[str, str]:
    """nice: None: as nice as this process."""
    return (CALM_THREADS | os.environ
            | {"OMP_NUM_THREADS": str(threads)} | ({} if nice is None else {NICENESS: str(nice)}))


# The command of our processes: `python -c PROCESS_CODE ROOT ROLE ARGUMENTS`, with a role of ROLES. The root
# of the program, a folder or a bundle, replaces the current folder in sys.path, so that modules there
# cannot shadow anything. The root of an installation keeps its position: other packages there must not
# shadow Python's own.
PROCESS_CODE = ENDS_ON_CTRL_C + """
import sys
root = sys.argv.pop(1)
sys.path[:] = filter(None, sys.path)

import importlib.machinery
found = importlib.machinery.PathFinder.find_spec("chatlm")
if not found or found.origin != root + "/chatlm/__init__.py":
    sys.path.insert(0, root)

from chatlm.common.processes.child import run_role
sys.exit(run_role(*sys.argv[1:]))
"""
PROCESS_COMMAND = sys.executable, "-c", PROCESS_CODE, str(program_root())
PROGRAM = program_descriptors()  # to pass to each of our processes


def exit_in_words(status: int | None) -> str:
    """How a process ended: "exit status 1", "killed by SIGSEGV"."""
    if status is None or status >= 0:
        return f"exit status {status}"
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    return f"killed by {name}{', as the system does when memory runs out' if name == 'SIGKILL' else ''}"


def patient(seconds: float, nice: int | None = None) -> float:
    """A time limit for another of our processes, with this niceness or ours. Next to a program that uses all
    of the processor, each step of niceness leaves it 1.25 times less."""
    return seconds * 1.25 ** max(os.getpriority(os.PRIO_PROCESS, 0) if nice is None else nice, 0)


# Processes that were started before they were needed, with their environments; by command and role
AHEAD: dict[tuple[str, ...], tuple[subprocess.Popen, socket.socket, Mapping[str, str]]] = {}
# Flags with which no worker starts, or none like the one that `start_worker_ahead` starts
NOT_AHEAD = (
    "-h", "--help", "--version", "--url", "-n", "--num-", "--tp", "--tensor-", "--pp", "--pipeline-",
    "--distributed", "--ray", "--watch", "--nice", "--device-", "--config", "--models", "--log-format")


def start_worker_ahead(words: Seq[str], without: Seq[str]):
    """Start a worker for the command line `words`, if it probably needs one on a CPU. It imports its
    libraries while this process does. The first `start_child` for a worker returns it, or ends it if its
    environment would be another. without: the names of commands that don't start such a worker."""
    if not {*words}.isdisjoint(without) or any(word.startswith(NOT_AHEAD) for word in words):
        return
    variables = [name for name in os.environ if name.startswith("CHAT_SERVER_")]
    if {*variables} - {"CHAT_SERVER_API_KEY"} or any(Path("/dev").glob("nvidia[0-9]*")):
        return
    environment = process_environment(threads_per_worker(1))
    environment.pop("CHAT_SERVER_API_KEY", None)
    process, ours = start_child(PROCESS_COMMAND, "worker", environment)
    AHEAD[(*PROCESS_COMMAND, "worker")] = process, ours, environment


def end_worker_ahead():
    """End the worker that was started ahead: the command needs none. Of an annex's command that is not known
    before all annexes are imported."""
    while AHEAD:
        _, (process, ours, _) = AHEAD.popitem()
        end_child(process, ours)


def end_child(process: subprocess.Popen, ours: socket.socket):
    ours.close()
    process.kill()
    process.wait()


def start_child(command: Seq[str], role: str,
                environment: Mapping[str, str]) -> tuple[subprocess.Popen, socket.socket]:
    """Start one of our processes; returns it and our end of the pipe to it."""
    if started := AHEAD.pop((*command, role), None):
        process, ours, own = started
        if own == environment:
            return process, ours
        end_child(process, ours)
    ours, theirs = socket.socketpair()
    with theirs:
        command = [*command, role, str(theirs.fileno()), str(os.getpid())]
        return subprocess.Popen(command, pass_fds=[theirs.fileno(), *PROGRAM], stdin=subprocess.DEVNULL,
                                env=environment, start_new_session=True), ours
