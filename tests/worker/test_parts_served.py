"""Parts of the engine that a worker imports while it runs: slowly, while killed, or after their files changed."""

import json
import os
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from real_server import copy_program, post, server

PARTS = {"embedding": ("/v1/embeddings", {"input": "a"}), "grammars": ("/v1/completions", {
    "prompt": "a", "max_tokens": 4, "guided_choice": ["yes", "no"]})}
CHAT = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
# A worker notes when it imports one of these modules, and waits then until it may go on.
SLOW = """
import os, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("chatlm.worker.engine.embedding", "chatlm.worker.engine.grammars"):
            folder = os.environ["SLOW"]
            with open(os.path.join(folder, "imports"), "a") as file:
                print(os.getpid(), name, file=file, flush=True)
            while not os.path.exists(os.path.join(folder, "go on")):
                time.sleep(0.01)
if "worker" in sys.argv or "worker" in getattr(sys, "orig_argv", ()):
    sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def slow(tmp_path):
    """The environment of processes that import parts slowly."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    return os.environ | {"SLOW": str(tmp_path), "PYTHONPATH": str(tmp_path)}


def workers_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "worker" in child.cmdline()]


def imports(folder):
    noted = folder / "imports"
    return [line.split() for line in noted.read_text().splitlines()] if noted.exists() else []


def ask(url, path, body):
    with post(url + path, body) as response:
        return response.status, json.load(response)


def wait_for_imports(folder, count):
    while len(imports(folder)) < count:
        pass


@pytest.mark.parametrize("part", PARTS)
def test_fifty_requests_share_a_slow_import_and_others_are_answered(part, nanochat_fixtures, slow, tmp_path):
    path, body = PARTS[part]
    with server(nanochat_fixtures / "gen5", env=slow) as (process, url), ThreadPoolExecutor(50) as clients:
        asking = [clients.submit(ask, url, path, body) for _ in range(50)]
        wait_for_imports(tmp_path, 1)
        assert ask(url, *CHAT)[0] == 200
        assert not any(each.done() for each in asking)
        (tmp_path / "go on").touch()
        answers = [each.result(120) for each in asking]
        assert [status for status, _ in answers] == [200] * 50
        assert len(imports(tmp_path)) == 1 and len(workers_of(process)) == 1


def test_a_worker_that_is_killed_while_it_imports_a_part_is_replaced(nanochat_fixtures, slow, tmp_path):
    """The answers that waited come from the next one."""
    with server(nanochat_fixtures / "gen5", env=slow) as (process, url), ThreadPoolExecutor(9) as clients:
        asking = [clients.submit(ask, url, *PARTS["embedding"]) for _ in range(8)]
        wait_for_imports(tmp_path, 1)
        [worker] = workers_of(process)
        worker.kill()
        wait_for_imports(tmp_path, 2)
        assert clients.submit(ask, url, *CHAT).result(120)[0] == 200
        (tmp_path / "go on").touch()
        vectors = [each.result(120)[1]["data"][0]["embedding"] for each in asking]
        assert all(vector == vectors[0] for vector in vectors)
        assert len({pid for pid, _ in imports(tmp_path)}) == 2


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", ["removed", "replaced", "half written"])
def test_a_part_whose_file_was_changed_answers_503(part, change, nanochat_fixtures, tmp_path):
    """Other answers go on, and the worker lives."""
    script = copy_program(tmp_path)
    path, body = PARTS[part]
    with server(nanochat_fixtures / "gen5", script=script) as (process, url):
        assert ask(url, *CHAT)[0] == 200        # the front has the dialects, and what makes grammars
        no_choice = {"prompt": "a", "guided_choice": []}
        for place, refused in ((path, body | {"model": 5}), ("/v1/completions", no_choice)):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(url, place, refused)
        file = script.parent / "chatlm/worker/engine" / f"{part}.py"
        if change == "removed":
            file.unlink()
        else:
            text = file.read_text()
            file.write_text(text + "\nNEWER = True\n" if change == "replaced" else text[:len(text) // 2])
        [worker] = workers_of(process)
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(url, path, body)
            assert caught.value.code == 503
            said = json.load(caught.value)["error"]["message"]
            assert "the program has changed since this server started" in said
        assert ask(url, *CHAT)[0] == 200
        assert workers_of(process) == [worker]
