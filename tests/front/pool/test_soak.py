"""bench/soak.py for two minutes: workers die, clients vanish, connections break, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(360)
def test_two_minutes_of_kills_and_vanishing_clients_loses_no_answer_and_no_page(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, SCRIPT, "--seconds", "120", "--log", tmp_path / "log"], env=environment, capture_output=True,
                           text=True, timeout=330)
    assert ended.returncode == 0, ended.stdout + ended.stderr + (tmp_path / "log").read_text()[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["lost"] == found["leaked_pages"] == 0
    assert found["killed"] > 0 and found["restarts"] > 0 and found["vanished"] > 0 and found["resumed"] > 0 and found["answers"] > 20
