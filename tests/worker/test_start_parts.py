"""bench/start_parts.py follows a worker's start: it calls what a worker calls."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "start_parts.py"


def test_the_parts_of_a_start_can_be_measured(default_model_path):
    done = subprocess.run([sys.executable, SCRIPT, "--part"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = [name for name, *_ in json.loads(done.stdout)]
    assert {"import numpy", "weights into tiles, KV pages, buffers", "warm-up: a token"} <= {*names}, names
