"""bench/hostile.py, small: after each attack the server serves everybody else as before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "hostile.py"
# A few kinds of large bodies are enough here. The rest starts servers of its own, or does nothing when small.
ATTACKS = [
    "14 patterns in a format", "18 patterns in a format", "26 patterns in tools", "64 patterns in a format",
    "a slow schema", "16 schemas", "7 M token ids with", "prompts of a token id", "500,000 parts",
    "an earlier call", "lists within", "spellings", "idle connections", "come and go", "nobody reads",
    "slow headers", "slow bodies", "do not speak HTTP", "but a byte", "whole answers", "echoed", "left",
    "other origins", "another key", "cannot take", "line ends", "unknown members", "/api/show", "quotation marks", "/v1/compare", "compressed bodies"]
FEW = ["other origins"]
TOOLS = ["tool servers"]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("attacks", [FEW, ATTACKS, TOOLS], ids=["few", "all", "tools"])
def test_no_attack_ends_a_process(attacks, tmp_path, default_model_path):
    """No attack ends a server or a worker, nor leaves anything behind."""
    command = [sys.executable, SCRIPT, "--scale", "0.1", "--seconds", "1" if attacks is FEW else "3", "--json", tmp_path / "rows"]
    command += ["--only", *attacks]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {row["attack"]: row for row in json.loads((tmp_path / "rows").read_text())}
    assert all(any(word in name for name in rows) for word in attacks)
    for name, row in rows.items():
        assert row["served"] and not row["died"] and not row["restarts"] and not row["leaked_pages"], row
        assert not row["refused"] and not row["failed"], row
        assert row["log_bytes"] < 100_000 and sum(row["memory_mb"]) < 500, row
    if attacks is TOOLS:
        assert all(set(row["got"]) <= {"200", "400", "no answer"} for row in rows.values()), rows
    else:
        assert set(rows["pages of other origins"]["got"]) == {"403"}
