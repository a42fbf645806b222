"""A real server in a process of its own: started, asked over HTTP, and ended."""

import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil

import chat_server
from forked import start_front

SCRIPT = Path(chat_server.__file__).resolve()


def copy_program(folder):
    """chat_server.py with chatlm and static/, and nothing else of the checkout; returns the script."""
    for name in ("chatlm", "static"):
        shutil.copytree(SCRIPT.parent / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.copy(SCRIPT, folder))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Output:
    """The lines that a process writes, taken from its pipe as they come: it would wait once 64 KB were unread."""

    def __init__(self, pipe):
        self.pipe, self.lines = pipe, queue.SimpleQueue()
        self.thread = threading.Thread(target=self._drain, daemon=True)
        self.thread.start()

    def _drain(self):
        with self.pipe:
            for line in self.pipe:
                self.lines.put(line)
        self.lines.put(None)

    def __iter__(self):
        while (line := self.lines.get()) is not None:
            yield line
        self.lines.put(None)  # for who reads on


@contextmanager
def server(*arguments, script=SCRIPT, python=sys.executable, env=None, log=None, forked=True):
    """A running server: yields (process, url) once it is ready, and kills it at the end. forked: its processes need not be started by Python and
    import everything anew ("front": except its children, which then are its children for the system too)."""
    arguments = [*map(str, arguments), "--port", "0", "--host", "127.0.0.1"]
    environment = os.environ if env is None else env
    usual = (script, python, environment.get("PYTHONPATH")) == (SCRIPT, sys.executable, os.environ.get("PYTHONPATH"))
    if forked and usual and sys.platform == "linux":
        process, output = start_front(script, arguments, environment, forked != "front")
        process.stdout = Output(os.fdopen(output))
    else:
        process = subprocess.Popen([python, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        process.stdout = Output(process.stdout)
    try:
        yield process, wait_for(process, r"(http://127\.0\.0\.1:\d+)", log)
    finally:
        process.kill()
        process.wait()
        process.stdout.thread.join(10)  # until its workers have ended too


def wait_for(process, pattern, log=None):
    """Read the log up to a line that matches, and return its first group. Fails with the log if the process
    ends first."""
    log = [] if log is None else log
    for line in process.stdout:
        log.append(line)
        if match := re.search(pattern, line):
            return match[1] if match.groups() else line
    raise AssertionError(f"the server ended without {pattern!r}:\n{''.join(log)}")


def get(url):
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def events(response):
    return [json.loads(line[6:]) for line in response if line.startswith(b"data: ")]


def ask(text, **changes):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | changes


def descendants(process):
    """Of a server, forked or not."""
    parents = [psutil.Process(pid) for pid in (process.pid, *getattr(process, "forked", ())) if psutil.pid_exists(pid)]
    return [*parents[1:], *(child for parent in parents for child in parent.children(recursive=True))]


def children_of_role(process, role):
    """The processes of a forked server that do this, such as "worker"."""
    return [child for child in [*process.forked.values()] if child.role == role and child.poll() is None]


def gone(processes):
    """Whether all of them end within 10 s."""
    return not psutil.wait_procs(processes, timeout=10)[1]
