"""bench/soak.py for two minutes: workers die, clients vanish, connections break, models change, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(360)
def test_two_minutes_of_kills_lose_no_answer(tmp_path):
    """Clients vanish; no page is lost either."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, SCRIPT, "--seconds", "120", "--log", tmp_path / "log"], env=environment, capture_output=True,
                           text=True, timeout=330)
    assert ended.returncode == 0, ended.stdout + ended.stderr + (tmp_path / "log").read_text()[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["lost"] == found["leaked_pages"] == 0
    assert found["integrity_checks"]["passed"] > 100 and found["integrity_checks"]["faults"] == 0
    assert found["killed"] > 0 and found["restarts"] > 0 and found["vanished"] > 0 and found["resumed"] > 0 and found["answers"] > 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_minutes_of_changes_give_no_wrong_text(tmp_path):
    """Models change, workers are killed, servers start again."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, SCRIPT, "--changing", "--seconds", "120", "--clients", "6", "--log", tmp_path / "log"], env=environment,
                           capture_output=True, text=True, timeout=570)
    assert ended.returncode == 0, ended.stdout + ended.stderr + (tmp_path / "log").read_text()[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["lost"] == found["leaked_pages"] == 0 and found["restarts of the server"] == 2
    assert found["integrity_checks"]["passed"] > 20 and found["integrity_checks"]["faults"] == 0
    assert found["killed"] > 0 and found["changes of files"] > 5 and found["comparisons"] > 0 and found["answers"] > 20
