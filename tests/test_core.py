"""What a default server has not loaded: the annexes of its front, and the parts of its worker."""

import json
import os
import signal
import sys
import urllib.error
import urllib.request

import psutil
import pytest

from chatlm.front.annexes import ANNEXES
from real_server import post, server

# Of the front and the sandboxes, after answers by three APIs
ABSENT = """
    chatlm.bundling chatlm.common.processes.ray chatlm.export chatlm.front.pool.downloads
    chatlm.front.server.approvals chatlm.front.server.line_queue chatlm.front.server.batches
    chatlm.front.server.compare chatlm.front.server.conversation_log
    chatlm.front.server.conversations chatlm.front.server.downloading chatlm.front.server.exporting
    chatlm.front.server.file_routes chatlm.front.server.metric_families chatlm.front.server.rounds
    chatlm.front.server.runs chatlm.front.server.tooling chatlm.front.server.usage chatlm.terminal
    prometheus_client sqlite3
""".split()
# Of the worker, after these answers
ABSENT_IN_WORKER = """
    chatlm.common.processes.ray chatlm.export chatlm.front chatlm.worker.doctor
    chatlm.worker.other_rank chatlm.worker.kernels.check chatlm.worker.kernels.cpu_proof
    chatlm.worker.kernels.cuda_backend chatlm.worker.kernels.cuda_runner
    chatlm.worker.kernels.product_proof chatlm.worker.kernels.proof
    chatlm.worker.kernels.random_blocks chatlm.worker.kernels.report chatlm.worker.kernels.timing
    chatlm.worker.survey llguidance torch
""".split()
# In each process: at SIGUSR1 it writes the names of its modules, and what its event loop has imported
SPY = """
import os, signal, sys, threading
class Finder:
    names = []
    def find_spec(self, name, path=None, target=None):
        if threading.current_thread() is threading.main_thread():
            self.names.append(name)
sys.meta_path.insert(0, Finder())
def tell(*_):
    with open(os.path.join(os.environ["SPY"], f"{os.getpid()}.part"), "w") as file:
        print(*sys.modules, file=file)
        print(*Finder.names, file=file)
    os.replace(file.name, os.path.join(os.environ["SPY"], str(os.getpid())))
signal.signal(signal.SIGUSR1, tell)
"""
MESSAGES = [{"role": "user", "content": "Hello"}]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads command lines in /proc")


@pytest.fixture
def spied(tmp_path):
    """The environment of processes that say what they have imported."""
    (tmp_path / "sitecustomize.py").write_text(SPY)
    return os.environ | {"SPY": str(tmp_path), "PYTHONPATH": str(tmp_path)}


def children_of(process, role):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in children if role in child.cmdline()]


def modules_of(process, folder):
    """Of the front and its sandboxes, as they are now."""
    return modules_in([process.pid, *children_of(process, "sandbox")], folder)


def modules_in(pids, folder):
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    while not all((folder / str(pid)).exists() for pid in pids):
        assert all(map(psutil.pid_exists, pids))
    written = [(folder / str(pid)).read_text().splitlines() for pid in pids]
    return {name for modules, _ in written for name in modules.split()}


def imported_by_the_loop(process, folder):
    """What the event loop of the front has imported so far."""
    modules_of(process, folder)
    names = (folder / str(process.pid)).read_text().splitlines()[1].split()
    (folder / str(process.pid)).unlink()
    return names


def packages_of(modules):
    """They, and the packages that they are in."""
    return {name.rsplit(".", cut)[0] for name in modules for cut in range(name.count(".") + 1)}


def test_a_default_server_loads_no_annex(default_model_path, spied, tmp_path):
    """It has answered by three APIs, read a large body, shown its page, and refused a path and a method."""
    words = {"messages": MESSAGES, "max_tokens": 2}
    with server(default_model_path, env=spied) as (process, url):
        for path in ("/chat/completions", "/v1/chat/completions", "/v1/messages"):
            assert post(url + path, words).status == 200
        assert post(url + "/chat/completions", words | {"resumable": True}).status == 200
        assert post(url + "/chat/completions", words | {"ignored": "x" * 100_000}).status == 200
        for path in ("/", "/static/chat.js", "/health", "/stats", "/stats/history", "/v1/models"):
            assert urllib.request.urlopen(url + path, timeout=60).status == 200
        for method, path in (("GET", "/v1/batchez"), ("DELETE", "/v1/batches")):
            with pytest.raises(urllib.error.HTTPError, match="404|405"):
                urllib.request.urlopen(urllib.request.Request(url + path, method=method), timeout=60)
        modules = modules_of(process, tmp_path)
        described = json.load(urllib.request.urlopen(url + "/openapi.json", timeout=60))["paths"]
        workers = children_of(process, "worker")
        assert len(workers) == 1
        in_worker = packages_of(modules_in(workers, tmp_path))
    packages = packages_of(modules)
    assert packages.isdisjoint(ABSENT), packages & {*ABSENT}
    assert "chatlm.worker.weights.families.plain" in in_worker
    assert in_worker.isdisjoint(ABSENT_IN_WORKER), in_worker & {*ABSENT_IN_WORKER}
    assert {row.pattern for annex in ANNEXES for row in annex.routes} <= {*described}


def test_the_first_request_opens_its_room_alone(nanochat_fixtures, spied, tmp_path):
    with server(nanochat_fixtures / "gen5", env=spied) as (process, url):
        with pytest.raises(urllib.error.HTTPError, match="404"):       # it runs without --database
            urllib.request.urlopen(url + "/v1/batches", timeout=60)
        modules = modules_of(process, tmp_path)
    assert "chatlm.front.server.batches" in modules
    assert not {"chatlm.front.server.runs", "chatlm.front.server.tooling"} & modules


def test_what_opens_late_is_imported_off_the_event_loop(default_model_path, spied, tmp_path):
    """Dialects, what makes grammars of formats and of calls, and rooms."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = {"name": "add", "parameters": schema}
    chat, short = {"messages": MESSAGES}, {"max_tokens": 2}
    bodies = [
        ("/v1/chat/completions", chat | short | {"tools": [{"type": "function", "function": tool}]}),
        ("/v1/chat/completions", chat | {"max_tokens": 20, "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}),
        ("/v1/completions", {"prompt": "a", "guided_choice": ["yes", "no"]} | short),
        ("/v1/messages", chat | short), ("/v1/embeddings", {"input": "a"}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 16}),
        ("/api/chat", chat | {"stream": False, "options": {"num_predict": 2}}),
        ("/v1/compare", chat | short | {"models": ["default", "default"]}),
        ("/tokenize", {"content": "a"}), ("/models/load", {})]
    with server(default_model_path, env=spied) as (process, url):
        before = len(imported_by_the_loop(process, tmp_path))
        for path, body in bodies:
            assert post(url + path, body).status == 200
        for path in ("/v1/usage", "/v1/runs", "/v1/tools", "/metrics", "/openapi.json"):
            assert urllib.request.urlopen(url + path, timeout=60).status == 200
        imported = imported_by_the_loop(process, tmp_path)[before:]
    assert [name for name in imported if name.startswith("chatlm")] == []
