"""Our processes without the time that their imports take (1.5 s for torch): forked from a process that has imported it all.

A forked process runs the same command with the same environment on the same descriptors. A forked front asks the process
that tests to fork its children, which end when it does; for the system they are not its children. Tests of the start
itself start servers from the command line, whose processes are ordinary ones.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import traceback
import types
from pathlib import Path

from chatlm.common import core
from chatlm.common.processes import start
from chatlm.common.hub import huggingface
from chatlm.common.memory import give_memory_back
from chatlm.common.processes.child import die_with_parent, run_role
from patching import replace_everywhere

NUMBER = struct.Struct("i")
# Libraries read these when they are loaded, so each combination of their values has a template of its own.
READ_AT_LOAD = "CHAT_SERVER", "DECODE_CORE", "GOMP", "LD_", "MALLOC", "OMP", "PYTHON", "RAYON", "TORCH"
# These are read later; the first comes from torch, in a process of tests that compiles something
READ_LATER = "TORCHINDUCTOR_CACHE_DIR", start.NICENESS
# A worker that is killed or stopped at an exact moment, and checks its KV cache after every step
DYING = sys.executable, str(Path(__file__).with_name("dying_worker.py"))
GPU_BOX = sys.executable, str(Path(__file__).with_name("gpu_box_worker.py"))
TEMPLATES = {"worker": "torch", "survey": "torch", "doctor": "torch", "quantize": "torch", "imatrix": "torch", "hub": "downloads"}     # of roles; see Template
templates, making = {}, threading.Lock()


def start_child(command, role, environment, original=start.start_child):
    """What start.start_child does. Other commands, which may change a library before it is used, get processes of their own."""
    if tuple(command) not in (start.PROCESS_COMMAND, DYING, GPU_BOX):
        return original(command, role, environment)
    ours, theirs = socket.socketpair()
    with theirs:
        return fork_child([*command, role], environment, os.getcwd(), theirs.fileno()), ours


def fork_child(command, environment, folder, *descriptors):
    what = "box" if tuple(command[:-1]) == GPU_BOX else TEMPLATES.get(command[-1], "")
    template = template_of(what, environment)
    return template.fork(command, environment, folder, *descriptors)


def start_front(script, arguments, environment, forking):
    """(the process of `python SCRIPT arguments`, the pipe's end that has its stdout and stderr). forking: whether its children are forked too."""
    output, theirs = os.pipe()
    with open(theirs, "wb", buffering=0):
        return fork_front(script, arguments, environment, theirs, theirs, forking), output


def run_command(script, arguments, environment, given="", folder=None):
    """What subprocess.run captures of `python SCRIPT arguments`, as text. given: its input."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(given.encode())
        stdin.seek(0)
        status = fork_front(script, arguments, environment, stdout.fileno(), stderr.fileno(), stdin=stdin.fileno(), folder=folder).wait(300)
        return subprocess.CompletedProcess(arguments, status, *(os.pread(file.fileno(), 1 << 30, 0).decode() for file in (stdout, stderr)))


def fork_front(script, arguments, environment, stdout, stderr, forking=True, stdin=None, folder=None, imported=()):
    """stdin: else it has none; the child's terminal if it is one. imported: modules that it will need, too."""
    command = [sys.executable, str(script), *arguments]
    template = template_of(str(script), environment, ("LD_", "MALLOC", "PYTHON"), imported)
    asking, children = children_of_fronts().connect() if forking else (None, {})
    outputs = [stdout, stderr] if stdin is None else [stdout, stderr, stdin]
    with asking or contextlib.nullcontext():
        process = template.fork(command, environment, str(folder or os.getcwd()), asking.fileno() if forking else stdout, *outputs)
    process.forked = children
    return process


def template_of(what, environment, read_at_load=READ_AT_LOAD, imported=()):
    kind = what, imported, *sorted(item for item in environment.items() if item[0].startswith(read_at_load) and item[0] not in READ_LATER)
    with making:
        if kind not in templates:
            templates[kind] = Template(what, environment, imported)
        return templates[kind]


class ChildrenOfFronts:
    """Forks the children that fronts ask for, and kills those whose front has ended. Its thread lives as long as this process: a template
    that it starts would end with it."""

    def __init__(self):
        self.asking = selectors.DefaultSelector()
        threading.Thread(target=self._serve, daemon=True).start()

    def connect(self):
        """The end of a connection that a front gets; its children that have not ended, by process id."""
        ours, fronts = socket.socketpair(type=socket.SOCK_SEQPACKET)
        children = {}
        self.asking.register(ours, selectors.EVENT_READ, children)
        return fronts, children

    def _serve(self):
        while True:
            for key, _ in self.asking.select(1):    # so that it sees what was registered while there was none
                try:
                    self._answer(key.fileobj, key.data)
                except OSError:
                    self._end(key.fileobj, key.data)
                except Exception:
                    traceback.print_exc()
                    self._end(key.fileobj, key.data)

    def _answer(self, connection, children):
        order, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
        try:
            if not order:
                self._end(connection, children)
            elif descriptors:
                command, environment, folder = json.loads(order)
                pid = 0
                if usual(environment):
                    child = fork_child(command, environment, folder, *descriptors)
                    child.role = command[-1]
                    pid = child.pid
                    children[pid] = child
                connection.send(NUMBER.pack(pid))
            else:
                connection.send(NUMBER.pack(children.pop(NUMBER.unpack(order)[0]).wait()))
        finally:
            for each in descriptors:
                os.close(each)

    def _end(self, connection, children):
        self.asking.unregister(connection)
        connection.close()
        for child in children.values():
            child.kill()


def usual(environment):
    """Whether its template is worth its start and its memory."""
    return all(os.environ.get(name) == value for name, value in environment.items() if name.startswith("CHAT_SERVER"))


@functools.cache
def children_of_fronts():
    return ChildrenOfFronts()


class Template:
    """A process that has imported what a role needs, and forks copies of itself that run commands.

    what: "torch" for workers, "box" for those of a GPU box, which load torch itself, "downloads", "" for other children, or the path of chat_server.py for
    fronts. imported: more modules that fronts need."""

    def __init__(self, what, environment, imported=()):
        self.lock, self.ended = threading.RLock(), {}       # the status by which of its forks it is: process ids come round
        self.orders, orders = socket.socketpair()
        self.ends, ends = socket.socketpair()
        passed = [orders.fileno(), ends.fileno()]
        command = [sys.executable, __file__, *map(str, passed), what, *imported]
        with orders, ends:
            self.process = subprocess.Popen(command, pass_fds=passed, stdin=subprocess.DEVNULL,
                                            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)})

    def fork(self, command, environment, folder, descriptor, stdout=1, stderr=2, *stdin):
        order = json.dumps([folder, command, dict(environment)]).encode()
        with self.lock:
            socket.send_fds(self.orders, [NUMBER.pack(len(order))], [descriptor, stdout, stderr, *stdin])
            self.orders.sendall(order)
            return Forked(self, number(self.orders), number(self.orders))

    def status(self, which):
        with self.lock:
            while which not in self.ended:
                ended = number(self.ends)
                self.ended[ended] = number(self.ends)
            return self.ended[which]


class Forked:
    """What subprocess.Popen is for a process that it started. which: by what the template knows it."""

    def __init__(self, template, pid, which):
        self.template, self.pid, self.which, self.returncode = template, pid, which, None
        try:
            self.end = os.pidfd_open(pid)
        except ProcessLookupError:      # it has ended already, and the template knows how
            self.end = os.open(os.devnull, os.O_RDONLY)     # can be read at once, as what has ended

    def wait(self, timeout=None):
        if self.returncode is None:
            waiting = select.poll()         # select() takes no descriptor above 1,023
            waiting.register(self.end, select.POLLIN)
            if not waiting.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            with self.template.lock:    # another thread may have asked: a status is told once
                if self.returncode is None:
                    self.returncode = self.template.status(self.which)
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def send_signal(self, number):
        with contextlib.suppress(OSError):      # of one that has ended
            signal.pidfd_send_signal(self.end, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __del__(self):
        os.close(self.end)


class Asking:
    """A front's connection to the process that forks its children."""

    def __init__(self, descriptor):
        self.lock, self.connection = threading.RLock(), socket.socket(fileno=descriptor)

    def start_child(self, command, role, environment, original=start.start_child):
        """What start.start_child does."""
        if tuple(command) != start.PROCESS_COMMAND:
            return original(command, role, environment)
        ours, theirs = socket.socketpair()
        with theirs, self.lock:
            order = json.dumps([[*command, role], dict(environment), os.getcwd()]).encode()
            socket.send_fds(self.connection, [order], [theirs.fileno(), 1, 2])
            if pid := number(self.connection):
                return Forked(self, pid, pid), ours
        ours.close()
        return original(command, role, environment)

    def status(self, pid):
        with self.lock:
            self.connection.send(NUMBER.pack(pid))
            return number(self.connection)


def number(connection):
    if not (read := connection.recv(NUMBER.size, socket.MSG_WAITALL)):
        raise EOFError("the process that forks others has ended")
    return NUMBER.unpack(read)[0]


# In the template

def serve(orders, ends, become):
    running, poll, which = {}, select.poll(), 0
    poll.register(orders, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != orders.fileno():
                pid, ended = running.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                ends.sendall(NUMBER.pack(ended) + NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                continue
            size, descriptors, *_ = socket.recv_fds(orders, NUMBER.size, 4)
            if not size:
                return
            order = json.loads(orders.recv(NUMBER.unpack(size)[0], socket.MSG_WAITALL))
            template = os.getpid()
            if (pid := os.fork()) == 0:
                for each in (orders.fileno(), ends.fileno(), *running):
                    os.close(each)
                become(*order, template, descriptors)
            which += 1
            running[end := os.pidfd_open(pid)] = pid, which
            poll.register(end, select.POLLIN)
            orders.sendall(NUMBER.pack(pid) + NUMBER.pack(which))
            for each in descriptors:
                os.close(each)


def take_over(folder, environment, descriptors):
    os.setsid()
    for given, usual in zip(descriptors, (1, 2, 0)):
        os.dup2(given, usual, inheritable=True)
        os.close(given)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


def become_front(code):
    """A function that runs chat_server.py, whose code is compiled, in this process."""
    def become(folder, command, environment, parent, descriptors):
        take_over(folder, environment, descriptors[1:])
        if stat.S_ISSOCK(os.fstat(descriptors[0]).st_mode):
            replace_everywhere(start, "start_child", Asking(descriptors[0]).start_child)
            replace_everywhere(start, "start_worker_ahead", lambda *words: None)     # to import what a forked worker has
        else:
            os.close(descriptors[0])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = command[1:]
        sys.path[0] = os.path.dirname(command[1])
        # as Python opens them: those of the template remember what it had there
        sys.stdin = sys.__stdin__ = open(0, closefd=False)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = command[1]
        status = 1
        try:
            exec(code, vars(main))
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return become


def become_child(folder, command, environment, parent, descriptors):
    """Run the command in this process."""
    pipe, *outputs = descriptors
    take_over(folder, environment, outputs)
    code = command[2] if command[1] == "-c" else None
    sys.argv = [*command[1:2], *command[2 + (code is not None):], str(pipe), str(parent)]
    if command[-1] == "hub":
        huggingface.subprocess = types.SimpleNamespace(run=run_preview, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired)
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


def run_preview(command, **_):
    """What subprocess.run captures of the role `preview`, which a fork of this process runs."""
    output, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            os.dup2(theirs, 1)
            status = run_role(*command[len(start.PROCESS_COMMAND):])
            sys.stdout.flush()
        finally:
            os._exit(status)
    os.close(theirs)
    with open(output, "rb") as said:
        stdout = said.read()
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stdout)


def import_all(*names):
    """Those that are not installed are left out."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    what, become = sys.argv[3], become_child
    if what in ("torch", "box"):
        import_all("chatlm.worker.process", "chatlm.worker.entry", "chatlm.worker.survey", *(f"chatlm.worker.weights.{name}" for name in (
            "formats.gguf.model", "towers.mmproj", "formats.nanochat.checkpoint", "files.torch_file", "formats.folder.model", "text.named_tokens",
            "text.trial")))
        if core.decode_core():
            import_all("chatlm.worker.kernels.cpu_backend", "chatlm.worker.kernels.weights")
        importlib.import_module("chatlm.worker.weights.loaded.digest").code_digest()       # of the code that all of them run
        import_all(*(["torch"] if what == "box" else ()))
    elif what not in ("", "downloads"):
        import_all("chat_server", "chatlm.front.serve", *sys.argv[4:])
        become = become_front(compile(Path(what).read_bytes(), what, "exec"))
    else:
        import_all("chatlm.common.hub.offers", "chatlm.common.processes.ray", "chatlm.front.intake.sandboxed", "chatlm.front.intake.body_tasks")
        # half of what the hub's library imports; the library itself looks for its folder when it is loaded
        import_all("filelock", "httpx2", "tqdm.auto", "yaml", "jinja2", "jinja2.ext", "jinja2.sandbox", *(["chatlm.worker.weights.preview"] if what else ()))
    import_all("safetensors", "tokenizers", "tiktoken")
    # No copy collects or trims again what is here: it would also copy it by that. Each worker's `give_memory_back` did.
    give_memory_back()
    gc.freeze()
    gc.unfreeze, gc.get_freeze_count = lambda: None, lambda: 0
    serve(*(socket.socket(fileno=int(each)) for each in sys.argv[1:3]), become)
