"""The process that runs one program of a model, ends whatever the program started, and says how it went.

The command `eval` starts it by name (see programs.py) and keeps its standard input open. When that closes,
because the command ended or lost patience, the program ends too. What is between the program and everything
else is the strongest thing that the system offers:

- on Linux a namespace of process ids, where possible with one of users: the program cannot name any process
  outside, so no signal of its reaches one, and all processes inside end with the first of them;
- else, on Linux, this process adopts what the program leaves behind, and ends it;
- elsewhere the program's process group ends with it.

Only the standard library, and no threads, which `unshare` refuses."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import select
import signal
import sys
import tempfile
import time
from contextlib import suppress
from typing import BinaryIO, NamedTuple

MEMORY_BYTES = 256 << 20     # upstream's, of addresses, data and the stack
FILE_BYTES = 16 << 20
OPEN_FILES = 64
CPU_S = 6                    # above the time limit, for what outlives this process
GRACE_S = 2.0                # that a process has to say how the program went, after its time
HEADER_BYTES = 8             # before the program on standard input: how long it is

# statuses of process 1 of a namespace
RIGHT = 0
WRONG = 1
NOT_STARTED = 2

CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36

# The program's own process, which sets its limits itself: between fork and exec little is safe to do. What is
# taken away is what nanochat's execution.py takes away, and what starts or signals processes by another name.
# The program runs with nanochat's globals. Only what follows its last line says that it came so far: to a
# pipe whose number is drawn by lot, with a word that nobody can guess.
GUARD = f"""
def run():
    import builtins, faulthandler, functools, os, posix, shutil, signal, subprocess, sys
    head, _, program = sys.stdin.buffer.read().partition(b"\\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if sys.platform != "darwin":
        import resource
        for name, most in (("AS", {MEMORY_BYTES}), ("DATA", {MEMORY_BYTES}), ("STACK", {MEMORY_BYTES}),
                           ("CPU", {CPU_S}), ("FSIZE", {FILE_BYTES}), ("NOFILE", {OPEN_FILES}), ("CORE", 0)):
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    faulthandler.disable()
    os.environ["OMP_NUM_THREADS"] = "1"
    pipe, word = head.split()
    end = functools.partial(os.write, int(pipe), word)
    processes = "kill killpg fork forkpty posix_spawn posix_spawnp pidfd_open"
    files = ("remove unlink rmdir removedirs rename renames replace truncate chmod chown fchmod fchown "
             "lchmod lchown lchflags chroot fchdir chdir getcwd")
    for owner, names in ((builtins, "exit quit help"), (os, "system popen putenv setuid " + files),
                         (os, processes), (posix, processes), (signal, "pidfd_send_signal"),
                         (shutil, "rmtree move chown"), (subprocess, "Popen")):
        for name in names.split():
            if hasattr(owner, name) or owner is os:
                setattr(owner, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None
    sys.path.insert(0, "")
    exec(compile(program.decode("utf-8", "surrogatepass"), "<model>", "exec"), {{"__name__": "__main__"}})
    end()

run()
"""


class ProgramRun(NamedTuple):
    """What is run, where, and for how long; and how it says that it came to its end."""

    source: BinaryIO   # a file that has no name: `head`, and the program
    folder: str
    seconds: float
    pipe: int          # the number of the pipe that it reports to
    word: bytes        # what it reports

    @classmethod
    def prepared(cls, text: bytes, folder: str, seconds: float) -> ProgramRun:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        pipe = OPEN_FILES + secrets.randbelow(max(min(most, 1024) - OPEN_FILES, 1))
        word = secrets.token_hex(16).encode()
        source = tempfile.TemporaryFile(dir=folder)
        source.write(b"%d %s\n" % (pipe, word) + text)
        source.seek(0)  # writes what is not written yet
        return cls(source, folder, seconds, pipe, word)


def main():
    """Run the program on standard input, delete its folder, and write {"right"} or {"problem"} as JSON."""
    folder, seconds = sys.argv[2:]
    try:
        size = int.from_bytes(read_whole(0, HEADER_BYTES), "big")
        program = ProgramRun.prepared(read_whole(0, size), folder, float(seconds))
        found = {"right": run_isolated(program)}
    except Exception as error:
        found = {"problem": f"{type(error).__name__}: {error}"}
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(found).encode() + b"\n")
    remove_folder(folder)


def read_whole(file: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(file, min(size, 1 << 20))
        if not part:
            raise EOFError("the command has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def run_isolated(program: ProgramRun) -> bool:
    """Did the program come to its end, in time and without an error? When this returns, nothing that it
    started is left, as far as the system allows."""
    inside = enter_namespace()
    call_linux("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # so that the program cannot trace or read its parents
    awake = waking_up()
    if inside:
        first = os.fork()
        if first == 0:  # process 1 of the namespace: all others end when it does
            status = NOT_STARTED
            try:
                status = RIGHT if run_program(program, waking_up()) else WRONG
            finally:
                os._exit(status)
        status = wait_for(first, awake, program.seconds + GRACE_S)
        if status is None:
            os.kill(first, signal.SIGKILL)  # which nothing in the namespace can hold up
            os.waitpid(first, 0)
            return False
        if os.waitstatus_to_exitcode(status) == NOT_STARTED:
            raise OSError("the program's process could not be started")
        return os.waitstatus_to_exitcode(status) == RIGHT
    adopts = call_linux("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        return run_program(program, awake)
    finally:
        if adopts:
            end_adopted()


def waking_up() -> int:
    """A pipe that can be read when a child of this process has ended."""
    awake, waking = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(waking, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking)
    return awake


def call_linux(name: str, *arguments: int) -> bool:
    """Call a function of the C library that only Linux has. Did it succeed?"""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None), name, None)
    return function is not None and function(*map(ctypes.c_ulong, arguments)) == 0


def enter_namespace() -> bool:
    """Let this process's children begin a namespace of process ids of their own, if the system allows it."""
    user = os.getuid()
    group = os.getgid()
    if call_linux("unshare", CLONE_NEWUSER | CLONE_NEWPID):
        # ids stay what they are; without this they read as nobody's, which does no harm
        with suppress(OSError):
            for name, text in (("setgroups", "deny"), ("gid_map", f"{group} {group} 1"),
                               ("uid_map", f"{user} {user} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        return True
    return call_linux("unshare", CLONE_NEWPID)


def run_program(program: ProgramRun, awake: int) -> bool:
    """Run it until it ends, its time is over, or the command has gone."""
    report, reporting = os.pipe()
    os.set_blocking(report, False)
    parent = os.getpid()
    process = os.fork()
    if process == 0:
        try:
            become_program(program, reporting, parent)
        finally:
            os._exit(1)
    os.close(reporting)
    try:
        status = wait_for(process, awake, program.seconds)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
    with suppress(BlockingIOError):
        return status == 0 and os.read(report, 1 << 16) == program.word
    return False


def become_program(program: ProgramRun, reporting: int, parent: int):
    """Turn this new process into the program's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    call_linux("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    os.dup2(reporting, program.pipe)
    os.dup2(program.source.fileno(), 0)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.chdir(program.folder)
    os.execve(sys.executable, [sys.executable, "-I", "-c", GUARD], {"PATH": "/usr/bin:/bin"})


def wait_for(process: int, awake: int, seconds: float) -> int | None:
    """The status with which a child ended; None if its time was over or standard input closed. Others,
    which this process has adopted, are reaped meanwhile."""
    deadline_s = time.monotonic() + seconds
    while (left_s := deadline_s - time.monotonic()) > 0:
        ready, _, _ = select.select([0, awake], [], [], left_s)
        if 0 in ready:
            return None
        with suppress(BlockingIOError):
            os.read(awake, 4096)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == process:
                    return ended[1]
    return None


def end_adopted():
    """End the processes that the program left behind: this process has adopted them, and whatever those have
    started comes to it as they end."""
    children = f"/proc/self/task/{os.getpid()}/children"
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        with suppress(OSError), open(children) as file:
            for process in file.read().split():
                os.kill(int(process), signal.SIGKILL)
        try:
            os.waitpid(-1, 0 if os.path.exists(children) else os.WNOHANG)
        except ChildProcessError:
            return


def remove_folder(path: str) -> bool:
    """Delete a folder with all that is in it, however deep: nothing recurses, no path grows long, and one
    folder is open at a time. Is it gone?"""
    with suppress(OSError):
        if os.path.islink(path):
            os.unlink(path)
        walk = Removal(path)
        try:
            while walk.step():
                pass
        finally:
            walk.close()
        os.rmdir(path)
    return not os.path.lexists(path)


class Removal:
    """Deletes what is in a folder: down to a folder without folders, which then goes, and up again by its
    `..`, if that is still where it came from."""

    def __init__(self, path: str):
        self.here = self._open(path, None)   # the folder that is emptied
        self.left = [self._folders()]        # of it and of each folder above it: those that are not gone yet
        self.above: list[tuple[int, int]] = []  # which folders those above it are

    @staticmethod
    def _open(name: str, above: int | None) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            return os.open(name, flags, dir_fd=above)
        except PermissionError:
            os.chmod(name, 0o700, dir_fd=above)
            return os.open(name, flags, dir_fd=above)

    def _folders(self) -> list[str]:
        """Delete the files and the empty folders of this folder; the names of the others."""
        left = []
        with suppress(OSError):
            os.fchmod(self.here, 0o700)
        with os.scandir(self.here) as found:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
        for name, is_folder in entries:
            try:
                if is_folder:
                    os.rmdir(name, dir_fd=self.here)
                else:
                    os.unlink(name, dir_fd=self.here)
            except OSError:
                if is_folder:
                    left.append(name)
        return left

    def step(self) -> bool:
        """Go down into a folder, or up and delete the one that was left. False: all that can go is gone."""
        if self.left[-1]:
            try:
                below = self._open(self.left[-1][-1], self.here)
            except OSError:
                self.left[-1].pop()
                return True
            self.above.append(self._which(self.here))
            os.close(self.here)
            self.here = below
            self.left.append(self._folders())
            return True
        self.left.pop()
        if not self.left:
            return False
        above = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.here)
        os.close(self.here)
        self.here = above
        if self._which(above) != self.above.pop():
            return False  # something has moved the folder meanwhile
        with suppress(OSError):
            os.rmdir(self.left[-1].pop(), dir_fd=above)
        return True

    @staticmethod
    def _which(folder: int) -> tuple[int, int]:
        status = os.fstat(folder)
        return status.st_dev, status.st_ino

    def close(self):
        os.close(self.here)
