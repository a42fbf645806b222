"""Each function in the numbered steps of docs/architecture.md's life of a request runs for such a request, on a server as it starts by default."""

import json
import os
import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from real_server import server

from chatlm.common.core import decode_core

ROOT = Path(__file__).resolve().parent.parent
LIFE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("\n## The life of a request\n")[1].split("\n### ")[0]
ALTERNATIVES = {"Worker.cost"}      # of several workers
# every process of the program notes the functions that it calls, again and again, in a file of the folder, and forgets them once `asking` is there
NOTES = '''
import os, sys, threading, time
called, folder = set(), os.environ["NOTES_OF_CALLS"]

def note(frame, event, argument):
    if event == "call" and "chatlm" in frame.f_code.co_filename:
        called.add(frame.f_code)

def write():
    name, forgot = f"{folder}/{os.getpid()}", False
    while True:
        if not forgot and os.path.exists(folder + "/asking"):
            forgot, name = True, name + ".asked"
            called.clear()
        with open(name + ".part", "w") as file:
            file.writelines(f"{code.co_filename} {code.co_qualname}\\n" for code in list(called))
        os.rename(name + ".part", name + ".calls")
        time.sleep(0.05)

threading.setprofile(note)
sys.setprofile(note)
threading.Thread(target=write, daemon=True).start()
'''


def named_steps() -> list[tuple[str, str]]:
    """(module, function) of each function in the numbered steps; a class stands for what it makes."""
    found, place = [], ""
    for line in re.findall(r"^\d+\. .*$", LIFE, re.MULTILINE):
        for word in re.findall(r"`([^`]+)`", line):
            if "/" in word:
                place = word
            elif re.fullmatch(r"(?:[A-Z]\w+\.)?[a-z_]\w*", word) and word not in ALTERNATIVES:
                found.append((place, word))
    return found


def until(what, seconds: float = 60.0):
    """What it returns once that is true, or at the end."""
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 and newer name methods with their class")
@pytest.mark.skipif(decode_core() is None, reason="not built")
def test_each_step_of_a_request_runs(tmp_path, default_model_path):
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    notes = tmp_path / "notes"
    notes.mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path), "NOTES_OF_CALLS": str(notes)}
    steps = named_steps()
    assert len(steps) > 50

    def missing() -> list[tuple[str, str]]:
        lines = [line.split(" ", 1) for file in notes.glob("*.asked.calls") for line in file.read_text().splitlines()]
        ran = {(path[path.rindex("chatlm/"):], name) for path, name in lines if "chatlm/" in path}
        return [step for step in steps if step not in ran]

    with server(default_model_path, env=env) as (_, url):
        (notes / "asking").touch()
        assert until(lambda: len(list(notes.glob("*.asked.calls"))) >= 3)       # front, worker, sandbox
        body = json.dumps({"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 8}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body), timeout=120) as answer:
            assert b'"done": true' in answer.read()
        until(lambda: not missing())
    assert missing() == []
