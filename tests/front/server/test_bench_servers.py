"""bench/servers.py: a server is ready when it is used, and nothing of it is left afterwards, whatever happens."""

import argparse
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

BENCH = Path(__file__).resolve().parents[3] / "bench"
sys.path.insert(0, str(BENCH))

import contestants      # noqa: E402
from servers import NotReady, Refused, Server, our_server, started      # noqa: E402

SMALL = "--kv-cache-memory", "16M"
# a server that answers 503 for ever, does not end on SIGTERM, and has a child that does not either
STUBBORN = """
import http.server, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('born', flush=True); time.sleep(1000)"])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(200 if self.path == "/livez" else 503)

http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture
def born(monkeypatch):
    """The servers that a test starts."""
    servers = []

    def keep(server, *arguments, original=Server.__init__, **more):
        original(server, *arguments, **more)
        servers.append(server)

    monkeypatch.setattr(Server, "__init__", keep)
    return servers


def test_our_server_answers_and_leaves_nothing(nanochat_fixtures):
    with our_server(nanochat_fixtures / "gen5", *SMALL) as server:
        family = server.processes()
        assert server.get("/health")["status"] == "ok" and server.ready_s > 0 and len(family) > 1
        answer = server.post("/v1/completions", {"prompt": "cat", "max_tokens": 4})
        assert answer["choices"][0]["finish_reason"]
        assert server.processor_s() > 0
        with pytest.raises(Refused, match="chat_server answers 400: .*max_tokens"):
            server.post("/v1/completions", {"prompt": "cat", "max_tokens": "x"})
    assert server.process.returncode == 0 and not any(process.is_running() for process in family)


def test_a_stopped_server_is_gone_after_an_error(nanochat_fixtures):
    with pytest.raises(ZeroDivisionError):
        with our_server(nanochat_fixtures / "gen5", *SMALL) as server:
            family = server.processes()
            family[-1].kill()
            server.signal_all(signal.SIGSTOP)
            1 / 0
    assert not any(process.is_running() for process in family)


def test_a_server_that_fails_shows_its_last_words():
    with pytest.raises(NotReady, match=r"(?s)chat_server ended with status 2: .*no-such-model.*no-such-model"):
        with our_server("/no-such-model.gguf"):
            raise AssertionError("it is ready")


def test_one_that_is_never_ready_is_killed(born):
    with pytest.raises(NotReady, match=r"(?s)mule is not ready after 2 s: .*born"):
        with started([sys.executable, "-c", STUBBORN], "mule", limit_s=2, stop_limit_s=0.1):
            raise AssertionError("it is ready")
    (server,) = born
    assert server.process.returncode == -signal.SIGKILL
    assert not [process for process in psutil.process_iter(["cmdline"]) if server.command[-1] in (process.info["cmdline"] or ())]


def test_a_stubborn_server_and_its_children_are_killed():
    with started([sys.executable, "-c", STUBBORN], ready="/livez", stop_limit_s=0.1) as server:
        family = server.processes()
        assert len(family) == 2
    assert not any(process.is_running() for process in family)


def test_a_script_ends_its_server_on_sigterm(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(BENCH)!r})
        from servers import started
        with started([sys.executable, "-c", {STUBBORN!r}], ready="/livez", stop_limit_s=0.1) as server:
            print(*(process.pid for process in server.processes()), flush=True)
            time.sleep(1000)
        """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    bench = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    with bench.stdout:
        family = [psutil.Process(int(word)) for word in bench.stdout.readline().split()]
        bench.terminate()
        assert bench.wait(60) == 128 + signal.SIGTERM
    assert len(family) == 2 and not any(process.is_running() for process in family)


def test_a_named_log_is_continued(tmp_path, nanochat_fixtures):
    log = tmp_path / "log"
    log.write_text("before\n")
    with our_server(nanochat_fixtures / "gen5", *SMALL, log=log) as server:
        assert "importing libraries" in server.last_words()
    assert log.read_text().startswith("before\n")


def test_a_server_of_others_is_measured_and_left_running(nanochat_fixtures):
    """bench/compare.py --url: its processor time counts, and it goes on."""
    with our_server(nanochat_fixtures / "gen1", *SMALL) as server:
        name, url, model = contestants.running_server(f"mine={server.url},gen1")
        other = contestants.server_of(contestants.Running(name, url=url, served_name=model), None, None, {})
        other.wait_until_ready(0)
        before_s = other.processor_s()
        server.post("/v1/completions", {"prompt": "a b c " * 50, "max_tokens": 100, "ignore_eos": True})
        assert other.processor_s() > before_s > 0
        other.terminate(), other.stop()
        assert server.alive and server.get("/health")["ready"]
    for wrong in ("mine", "mine=http://example.org:80", "=http://127.0.0.1:1", "mine=http://127.0.0.1"):
        with pytest.raises(argparse.ArgumentTypeError, match="it must be NAME=http"):
            contestants.running_server(wrong)
