"""Starts the servers that the other scripts measure, chat_server's and others', and ends them with all their processes.

    with our_server(model, "--no-drafts") as server:        # python chat_server.py model --no-drafts
        server.post("/v1/completions", {"prompt": "One, two,", "max_tokens": 4})
    with started([binary, "-m", model, "-t", "2"], "llama-server") as server:
        ...

A server gets `--host 127.0.0.1 --port N` with a free port, and counts as ready once it answers a GET of `ready` with 200. What it writes goes
to a file. If it ends, or takes too long, NotReady has the last of that. However the block ends, the whole tree of processes is gone after it.

bench/contestants.py has those of bench/compare.py. The tests have tests/support/real_server.py, which gives them the log line by line.
"""

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 300.0       # a large model may have to be read from disk
STOP_LIMIT_S = 30.0         # after SIGTERM; what then still runs is killed
ASK_LIMIT_S = 600.0


class NotReady(Exception):
    """A server ended, or did not become ready in time; with its command and the last that it wrote."""


class Refused(Exception):
    """A server answered with an error."""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A process that serves, the processes that it starts, and its address.

    `log`: a path; without one the file has no name. `more` is for Popen."""

    def __init__(self, command, name="server", *, port=None, ready="/health", log=None, **more):
        self.name = name
        self.command = [*map(str, command)]
        if port is None:        # else the command names it already
            port = free_port()
            self.command += ["--host", "127.0.0.1", "--port", str(port)]
        self.url = f"http://127.0.0.1:{port}"
        self.ready_path = ready
        self.log = open(log, "ab+") if log else tempfile.TemporaryFile()
        self.began_s = time.perf_counter()
        self.ready_s = None     # from its start
        self.process = subprocess.Popen(self.command, **{"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log} | more)

    @property
    def alive(self):
        return self.process.poll() is None

    def last_words(self):
        file = self.log.fileno()
        size = os.fstat(file).st_size
        return os.pread(file, 3000, max(0, size - 3000)).decode("utf-8", "replace")      # a seek would move where the server writes

    def wait_until_ready(self, limit_s=START_LIMIT_S):
        while not self._answers():
            took_s = time.perf_counter() - self.began_s
            if took_s > limit_s or not self.alive:
                ended = f"is not ready after {took_s:.0f} s" if self.alive else f"ended with status {self.process.returncode}"
                raise NotReady(f"{self.name} {ended}: {shlex.join(self.command)}\n{self.last_words()}")
            time.sleep(0.005)
        self.ready_s = time.perf_counter() - self.began_s

    def _answers(self):
        with contextlib.suppress(OSError, http.client.HTTPException):       # an HTTPError is an OSError
            with urllib.request.urlopen(self.url + self.ready_path, timeout=5):
                return True
        return False

    # what it is asked

    def open(self, path, body=None, timeout_s=ASK_LIMIT_S):
        """The response to a GET, or to a POST of a body as JSON, for instance to read a stream. Refused if its status is an error."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            raise Refused(f"{self.name} answers {error.code}: {error.read().decode('utf-8', 'replace')[:2000]}") from None

    def get(self, path):
        with self.open(path) as response:
            return json.load(response)

    def post(self, path, body):
        with self.open(path, body) as response:
            return json.load(response)

    # its processes

    @property
    def front(self):
        return psutil.Process(self.process.pid)

    def processes(self):
        """Its own process first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.front, *self.front.children(recursive=True)]
        return []

    def processor_s(self):
        """Processor seconds of all its processes, including those that have ended and were waited for."""
        total_s = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total_s += times.user + times.system + times.children_user + times.children_system
        return total_s

    def signal_all(self, number):
        """A signal for each process, its own first: a front that is stopped starts no more workers."""
        if self.alive:
            self.process.send_signal(number)
        for process in self.processes()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def stop(self, limit_s=STOP_LIMIT_S):
        """End it as an operator would; kill what is left of its processes."""
        family = self.processes()
        self.signal_all(signal.SIGCONT)         # one that is stopped cannot end
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(limit_s)
        for process in dict.fromkeys([*family, *self.processes()]):      # its own first: it would start new workers
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()      # psutil knows a process from another that got its number
        self.process.wait()
        psutil.wait_procs(family, timeout=10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self.log.close()


@contextlib.contextmanager
def started(command, name="server", *, limit_s=START_LIMIT_S, stop_limit_s=STOP_LIMIT_S, **more):
    """A server that is ready; `more` is for Server. At the end of the block, also after an error or SIGTERM, it is ended."""
    end_on_sigterm()
    server = Server(command, name, **more)
    try:
        server.wait_until_ready(limit_s)
        yield server
    finally:
        server.stop(stop_limit_s)


def our_server(*words, name="chat_server", **more):
    """chat_server of this checkout with these words, which is ready."""
    return started([sys.executable, ROOT / "chat_server.py", *words], name, **more)


def end_on_sigterm():
    """Let SIGTERM raise SystemExit, unless the program handles it: by default the process would end without ending its servers."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
