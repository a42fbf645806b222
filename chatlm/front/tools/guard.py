"""The process between the front and a tool server's program: it starts the program, limits it, and ends it.

The program inherits the guard's stdin, stdout and stderr, so the front speaks with it directly. When the
front closes its end of a pipe, or dies, even by SIGKILL, the guard ends the program and its descendants."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from pathlib import Path

LIMITS = (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 256),
    (resource.RLIMIT_AS, 4 << 30),  # node reserves 1.05 GB
)
GRACE_S = 2.0  # between closing the program's stdin, SIGTERM and SIGKILL
NOT_STARTED = 127  # the exit status if there is no such program, as in a shell
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def guard_main(arguments: Seq[str]) -> int:
    """The role: `guard DESCRIPTOR`. The descriptor is a pipe with one line, a JSON object with command, env
    and cwd, so that no secret is in the process list. Its end of file ends the program."""
    [descriptor] = arguments
    pipe = int(descriptor)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal signals its whole group
        signal.signal(stop, signal.SIG_IGN)
    wanted = json.loads(read_line(pipe))
    adopt_orphans()
    for limit, value in LIMITS:
        with suppress(OSError, ValueError):  # a limit that is already lower stays
            resource.setrlimit(limit, (value, value))
    try:
        program = start_program(wanted["command"], wanted["env"], wanted["cwd"])
    except OSError as error:
        print(f"{error.filename or wanted['command'][0]}: {error.strerror}", file=sys.stderr)
        return NOT_STARTED
    for standard in (0, 1, 2):  # else the front would never see the end of the program's output
        os.close(standard)
    wait_for_end(pipe, program)
    status = program.poll()
    end_all(program.pid)
    return 1 if status is None else status


def read_line(pipe: int) -> bytes:
    """The bytes up to the first line's end."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(pipe, 1)
        if not byte:
            raise SystemExit(0)  # the front has left before it said what to start
        line += byte
    return line


def adopt_orphans():
    """Become the parent of all processes whose own parent, a descendant of this process, has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def start_program(command: Seq[str], env: Mapping[str, str], cwd: str | None) -> subprocess.Popen:
    """Start the program in a session of its own. Linux kills it if the guard is killed."""
    def die_with_guard():
        for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(stop, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(command, env=dict(env), cwd=cwd, start_new_session=True,
                            preexec_fn=die_with_guard)


def wait_for_end(pipe: int, program: subprocess.Popen):
    """Return once the program has ended, or the front wants it to end."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    try:
        ended = os.pidfd_open(program.pid)
        poll.register(ended, select.POLLIN)
        wait_ms = None
    except (AttributeError, OSError):  # not Linux, or an old one
        wait_ms = 200
    while program.poll() is None:
        for descriptor, _ in poll.poll(wait_ms):
            if descriptor == pipe and not os.read(pipe, 1024):
                return


def end_all(group: int):
    """End the program's group and all descendants of this process: SIGTERM, and after GRACE_S SIGKILL."""
    signal_all(group, signal.SIGTERM)
    end_s = time.monotonic() + GRACE_S
    while time.monotonic() < end_s and reap():
        time.sleep(0.01)
    for _ in range(100):  # a process may start others while it is being killed
        signal_all(group, signal.SIGKILL)
        if not reap():
            return
        time.sleep(0.01)


def signal_all(group: int, number: int):
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
    for child in descendants():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(child, number)


def reap() -> bool:
    """Collect children that have ended. Returns whether others still run."""
    with suppress(ChildProcessError):
        while True:
            child, _ = os.waitpid(-1, os.WNOHANG)
            if not child:
                return True
    return False


def descendants() -> list[int]:
    """The processes below this one, by /proc. Those that have ended but are not collected count too."""
    found = []
    waiting = [os.getpid()]
    while waiting:
        for child in children_of(waiting.pop()):
            found.append(child)
            waiting.append(child)
    return found


def children_of(process: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            with suppress(OSError):
                yield from map(int, (task / "children").read_text().split())
