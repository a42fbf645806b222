"""The bench of chats that are kept runs, in its small form, and finds nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_small_bench_ends_without_a_loss():
    done = subprocess.run([sys.executable, ROOT / "bench/kept_chats.py", "--small"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 kills" in done.stdout and "none lost" in done.stdout and "5 devices: /livez" in done.stdout
