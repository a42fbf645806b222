"""No test outlives its time limit."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"
HANGING = """
import asyncio, time

async def busy():
    while True:
        time.sleep(0.5)             # the limit is raised here, and ends this task alone
        await asyncio.sleep(0)

async def test_waits_for_what_never_comes():
    task = asyncio.create_task(busy())
    while True:
        await asyncio.sleep(0.01)
"""


def test_a_limit_that_ends_another_task_ends_the_test_too(tmp_path):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "lasting_timeouts", "-p", "no:cacheprovider", "--timeout=1", tmp_path]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(SUPPORT)}, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "1 failed" in done.stdout and "Timeout" in done.stdout
