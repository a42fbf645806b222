"""A bundle is replaced, deleted or cut short while a server runs from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import psutil
import pytest

from packed import bundled, clean_environment, run  # noqa: F401
from real_server import copy_program, descendants, post, server, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is held by its name in /proc")
CHANGED = "the program has changed since this server started: restart the server"
ASKED = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "max_tokens": 4}


@contextmanager
def running(file, model, **more):
    with server(model, script=file, env=clean_environment(), **more) as (process, url):
        yield process, url


def replaced(file):
    """By another program, as `bundle` and mv do it."""
    other = file.with_name("other")
    other.write_bytes(b"not a program")
    os.replace(other, file)


def cut(file):
    """In place: what comes later is gone, and what had been opened is this file too."""
    os.truncate(file, file.stat().st_size // 2)


def worker_of(process):
    [worker] = [child for child in psutil.Process(process.pid).children(recursive=True)
                if "worker" in child.cmdline()]
    return worker


def text_of(url):
    """(status, text)."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ready_of(url):
    """What /readyz says, once it has looked at the files anew: it does so once a second."""
    deadline_s = time.monotonic() + 30
    while (found := text_of(url + "/readyz"))[0] == 200 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return found[0], json.loads(found[1])


@pytest.mark.parametrize("change", [replaced, lambda file: file.unlink()], ids=["replaced", "deleted"])
def test_a_server_goes_on_with_the_bundle_it_was_started_from(change, bundled, default_model_path, tmp_path):
    file = shutil.copy(bundled, tmp_path / "chat_server.pyz")
    log = []
    with running(file, default_model_path, log=log) as (process, url):
        old = worker_of(process)
        change(file)
        for path, words in (("/v1/runs", '"data"'), ("/metrics", "chat_server_"), ("/", "<base href"),
                            ("/openapi.json", "/v1/batches")):
            status, text = text_of(url + path)
            assert status == 200 and words in text, (path, text)
        for more in ({}, {"padding": "x" * 100_000}, {"response_format": {"type": "json_object"}}):
            assert post(url + "/v1/chat/completions", ASKED | more).status == 200
        old.kill()
        wait_for(process, "(restarting it)", log)
        answer = json.load(post(url + "/v1/chat/completions", ASKED))
        assert answer["usage"]["completion_tokens"] == 4 and worker_of(process).pid != old.pid
        assert CHANGED not in "".join(log)
        assert text_of(url + "/readyz") == (200, '{"ready": true}') and "outdated" not in text_of(url + "/health")[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("kind", ["bundle", "checkout"])
def test_files_that_change_in_place_are_another_program(kind, bundled, default_model_path, tmp_path):
    """A bundle is cut short; in a checkout a module that runs is touched."""
    if kind == "bundle":
        file = changed = shutil.copy(bundled, tmp_path / "chat_server.pyz")
    else:
        file = copy_program(tmp_path)
        changed = tmp_path / "chatlm/front/front.py"
    log = []
    with running(file, default_model_path, log=log) as (process, url):
        assert text_of(url + "/v1/runs")[0] == 200
        assert post(url + "/v1/chat/completions", ASKED).status == 200      # its dialect is loaded now
        if kind == "bundle":
            cut(changed)
        else:
            os.utime(changed, (1, 1))
        status, text = text_of(url + "/metrics")
        assert status == 503 and CHANGED in text
        assert ready_of(url) == (503, {"ready": False, "reason": "outdated", "message": CHANGED})
        status, text = text_of(url + "/health")
        assert (status, json.loads(text)["status"], json.loads(text)["outdated"]) == (200, "degraded", CHANGED)
        for path in ("/v1/runs", "/health", "/"):
            assert text_of(url + path)[0] == 200, path
        assert post(url + "/v1/chat/completions", ASKED).status == 200
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url + "/v1/chat/completions", ASKED | {"padding": "x" * 100_000})
        assert refused.value.code == 503 and CHANGED in refused.value.read().decode()
        worker_of(process).kill()
        wait_for(process, f"({CHANGED})", log)
        status, said = ready_of(url)
        assert status == 503 and said["reason"] in ("outdated", "unavailable")
        assert json.loads(text_of(url + "/health")[1])["outdated"] == CHANGED
        assert "".join(log).count("not ready: " + CHANGED) == 1


@pytest.mark.parametrize("flags", [(), ("--tp", "2")])
def test_all_processes_read_the_one_descriptor(flags, bundled, default_model_path, tmp_path):
    file = shutil.copy(bundled, tmp_path / "chat_server.pyz")
    with server(default_model_path, *flags, script=file, env=clean_environment()) as (process, url):
        post(url + "/v1/chat/completions", ASKED | {"padding": "x" * 100_000}).read()
        ours = [psutil.Process(process.pid), *(child for child in descendants(process))]
        assert len(ours) >= 3
        for each in ours:
            names = []
            for fd in os.listdir(f"/proc/{each.pid}/fd"):
                with suppress(FileNotFoundError):       # it was closed meanwhile
                    names.append(os.readlink(f"/proc/{each.pid}/fd/{fd}"))
            assert names.count(str(file)) == 1, (each.cmdline()[-4:], names)
            assert "/proc/self/fd/" in " ".join(each.cmdline()) or each.pid == process.pid


def test_messages_name_the_file_and_not_the_descriptor(bundled, tmp_path):
    done = run(bundled, "--help")
    assert done.returncode == 0 and "/proc/" not in done.stdout and bundled.name in done.stdout
    verified = run(bundled, "bundle", "--verify")
    assert verified.returncode == 0 and f"{bundled}: the program is what" in verified.stdout, verified


def test_a_closed_input_does_not_take_its_descriptor(bundled):
    """The bundle gets no number that a stream of a process has."""
    done = subprocess.run(["sh", "-c", f"exec '{sys.executable}' '{bundled}' --version <&- 2>&-"],
                          capture_output=True, text=True, timeout=120, env=clean_environment(), cwd="/")
    assert done.returncode == 0 and done.stdout.startswith("chat_server "), done
