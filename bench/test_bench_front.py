"""bench/load_front.py, small: nothing is lost, and readers that do not read are dropped. Nothing is asserted
about its delays."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(*flags):
    command = [sys.executable, Path(__file__).with_name("load_front.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_many_streams_lose_nothing():
    assert "lost events: 0; streams without their end: 0" in run("--streams", 50, "--seconds", 1, "--workers", 2)


@pytest.mark.slow
def test_readers_that_do_not_read_are_dropped():
    """The others lose nothing."""
    printed = run("--streams", 5, "--seconds", 3, "--slow-readers", 2, "--piece-bytes", 300_000)
    assert "lost events: 0; streams without their end: 0" in printed
    assert re.search(r"dropped before their end: 2 of 2", printed)
