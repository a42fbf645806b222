"""Our processes without the time that their imports take (1.5 s for torch): forked from a process that has imported it all.

A forked process runs the same command with the same environment on the same descriptors. Tests of the start itself
start servers from the command line, whose processes are ordinary ones.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from chatlm.common import core
from chatlm.common.processes import start
from chatlm.common.processes.child import die_with_parent

NUMBER = struct.Struct("i")
# Libraries read these when they are loaded, so each combination of their values has a template of its own.
READ_AT_LOAD = "CHAT_SERVER", "DECODE_CORE", "GOMP", "LD_", "MALLOC", "OMP", "PYTHON", "RAYON", "TORCH"
# A worker that is killed or stopped at an exact moment, and checks its KV cache after every step
DYING = sys.executable, str(Path(__file__).with_name("dying_worker.py"))
templates = {}


def start_child(command, role, environment, original=start.start_child):
    """What start.start_child does. Commands that change torch before it is used get processes of their own."""
    if tuple(command) not in (start.PROCESS_COMMAND, DYING):
        return original(command, role, environment)
    with_torch = role in ("worker", "survey")
    kind = with_torch, *sorted(item for item in environment.items() if item[0].startswith(READ_AT_LOAD))
    if kind not in templates:
        templates[kind] = Template(with_torch, environment)
    ours, theirs = socket.socketpair()
    with theirs:
        return templates[kind].fork([*command, role], environment, theirs.fileno()), ours


class Template:
    """A process that has imported what a role needs, and forks copies of itself that run commands."""

    def __init__(self, with_torch, environment):
        self.lock, self.ended = threading.RLock(), {}       # of processes: the status
        self.orders, orders = socket.socketpair()
        self.ends, ends = socket.socketpair()
        passed = [orders.fileno(), ends.fileno()]
        command = [sys.executable, __file__, *map(str, passed), "torch"[:5 * with_torch]]
        with orders, ends:
            self.process = subprocess.Popen(command, pass_fds=passed, stdin=subprocess.DEVNULL,
                                            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)})

    def fork(self, command, environment, descriptor):
        order = json.dumps([os.getcwd(), command, dict(environment)]).encode()
        with self.lock:
            socket.send_fds(self.orders, [NUMBER.pack(len(order))], [descriptor, 1, 2])
            self.orders.sendall(order)
            return Forked(self, number(self.orders))

    def status(self, pid):
        with self.lock:
            while pid not in self.ended:
                ended = number(self.ends)
                self.ended[ended] = number(self.ends)
            return self.ended[pid]


class Forked:
    """What subprocess.Popen is for a process that it started."""

    def __init__(self, template, pid):
        self.template, self.pid, self.returncode = template, pid, None
        self.end = os.pidfd_open(pid)

    def wait(self, timeout=None):
        if self.returncode is None:
            waiting = select.poll()         # select() takes no descriptor above 1,023
            waiting.register(self.end, select.POLLIN)
            if not waiting.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = self.template.status(self.pid)
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.end, signal.SIGKILL)

    def __del__(self):
        os.close(self.end)


def number(connection):
    if not (read := connection.recv(NUMBER.size, socket.MSG_WAITALL)):
        raise EOFError("the process that forks others has ended")
    return NUMBER.unpack(read)[0]


# In the template

def serve(orders, ends):
    running, poll = {}, select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != orders.fileno():
                pid = running.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                ends.sendall(NUMBER.pack(pid) + NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                continue
            size, descriptors, *_ = socket.recv_fds(orders, NUMBER.size, 3)
            if not size:
                return
            order = json.loads(orders.recv(NUMBER.unpack(size)[0], socket.MSG_WAITALL))
            template = os.getpid()
            if (pid := os.fork()) == 0:
                for each in (orders.fileno(), ends.fileno(), *running):
                    os.close(each)
                become(*order, template, descriptors)
            running[end := os.pidfd_open(pid)] = pid
            poll.register(end, select.POLLIN)
            orders.sendall(NUMBER.pack(pid))
            for each in descriptors:
                os.close(each)


def become(folder, command, environment, parent, descriptors):
    """Run the command in this process."""
    os.setsid()
    pipe, *outputs = descriptors
    for output, usual in zip(outputs, (1, 2)):
        os.dup2(output, usual, inheritable=True)
        os.close(output)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = command[2] if command[1] == "-c" else None
    sys.argv = [*command[1:2], *command[2 + (code is not None):], str(pipe), str(parent)]
    status = 1
    try:
        if code is None:
            sys.path[0] = os.path.dirname(command[1])
            runpy.run_path(command[1], run_name="__main__")
        else:
            exec(code, {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.argv[3]:
        import chatlm.worker.process        # noqa: F401
        core.decode_core()
    else:
        import chatlm.common.processes.ray, chatlm.front.intake.sandboxed      # noqa: E401, F401
    gc.freeze()         # so that no copy looks at, and thereby copies, what it does not change: a third of a worker's start
    serve(*(socket.socket(fileno=int(each)) for each in sys.argv[1:3]))
