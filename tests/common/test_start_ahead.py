"""A worker's process that is started before it is needed."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import chat_server
from chatlm.commands import WITHOUT_WORKER_AHEAD
from chatlm.common.processes import start
from chatlm.front.annex import Annex
import forked
from toy_command import COUNT, COUNTING

pytestmark = pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="a GPU's worker is not started ahead")
SCRIPT = Path(__file__).resolve().parents[2] / "chat_server.py"
ROLE = *start.PROCESS_COMMAND, "worker"


def environment(threads):
    return {name: value for name, value in start.process_environment(threads).items() if name != "CHAT_SERVER_API_KEY"}


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    [original] = forked.start_child.__defaults__        # other tests' processes are forked
    monkeypatch.setattr(start, "start_child", original)
    for name in [name for name in os.environ if name.startswith("CHAT_SERVER_")]:
        monkeypatch.delenv(name)
    yield
    for process, ours, _ in start.AHEAD.values():
        ours.close()
        assert process.wait(60) == 0            # its parent has hung up
    start.AHEAD.clear()


def test_the_first_worker_is_the_one_started_ahead(monkeypatch):
    """The key is not in its environment."""
    monkeypatch.setenv("CHAT_SERVER_API_KEY", "secret")
    start.start_worker_ahead(["model.gguf", "--port", "8080"], WITHOUT_WORKER_AHEAD)
    started, ours, _ = start.AHEAD[ROLE]
    assert "CHAT_SERVER_API_KEY" not in psutil.Process(started.pid).environ()
    monkeypatch.delenv("CHAT_SERVER_API_KEY")
    process, connection = start.start_child(start.PROCESS_COMMAND, "worker", environment(start.threads_per_worker(1)))
    assert (process, connection) == (started, ours) and start.AHEAD == {}
    connection.close()
    assert process.wait(60) == 0


def test_one_with_another_environment_is_replaced():
    start.start_worker_ahead([], WITHOUT_WORKER_AHEAD)
    started, _, _ = start.AHEAD[ROLE]
    process, connection = start.start_child(start.PROCESS_COMMAND, "worker", environment(77))
    assert process.pid != started.pid and started.returncode is not None
    connection.close()
    assert process.wait(60) == 0


def test_a_command_that_turns_out_to_need_none_ends_it(monkeypatch):
    """One of an annex: its name is known once all annexes are imported."""
    monkeypatch.setattr("sys.argv", ["chat_server.py", "count"])
    start.start_worker_ahead(["count", "a.gguf"], WITHOUT_WORKER_AHEAD)
    started, _, _ = start.AHEAD[ROLE]
    seen = []
    command = COUNT._replace(run=None, lines=lambda words, program: seen.append(started.poll()) or ())
    counting = Annex("counting", COUNTING.load, command=command)
    assert chat_server.main(["count", "a.gguf"], annexes=(counting,)) == 0
    assert seen == [-signal.SIGKILL] and start.AHEAD == {}


def test_odd_variables_start_none_ahead(monkeypatch):
    """None is started ahead where variables may change how workers start."""
    monkeypatch.setenv("CHAT_SERVER_NUM_WORKERS", "2")
    start.start_worker_ahead([], WITHOUT_WORKER_AHEAD)
    assert start.AHEAD == {}


@pytest.mark.parametrize("words", [
    ["--help"], ["check"], ["store", "x"], ["serve", "--num-workers", "2"], ["--num-gpus=2"],
    ["chat", "--url", "x"], ["--config", "a.toml"], ["--prefix", "/talk", "embed", "a"]])
def test_none_is_started_ahead_without_need(words):
    """None is started ahead where none or another is needed."""
    start.start_worker_ahead(words, WITHOUT_WORKER_AHEAD)
    assert start.AHEAD == {}


@pytest.mark.parametrize("word", ["checkpoints/small.gguf", "storefront.gguf"])
def test_a_model_may_begin_like_a_command(word):
    start.start_worker_ahead([word], WITHOUT_WORKER_AHEAD)
    assert [*start.AHEAD] == [ROLE]


def test_a_worker_ends_with_a_server_that_failed():
    marked = {**os.environ, "TEST_MARK": str(os.getpid())}
    done = subprocess.run([sys.executable, SCRIPT, "--port", "99999"], capture_output=True, text=True, env=marked, timeout=60)
    assert done.returncode == 2 and "99999" in done.stderr and "Traceback" not in done.stderr
    left = [process for process in psutil.process_iter() if f"TEST_MARK={os.getpid()}" in environment_of(process)]
    assert psutil.wait_procs(left, timeout=60)[1] == []


def environment_of(process):
    with contextlib.suppress(OSError, psutil.Error):
        return Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")
    return []


def test_idle_threads_of_a_process_sleep_unless_its_operator_says_otherwise(monkeypatch):
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT", raising=False)
    assert start.process_environment(2)["OPENBLAS_THREAD_TIMEOUT"] == "4"
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "20")
    assert start.process_environment(2)["OPENBLAS_THREAD_TIMEOUT"] == "20"
