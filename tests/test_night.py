"""The night's parts (.ci/night) together run every test module once, and .ci/report.py says what they found."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = dict(re.findall(r"^(\d): (.*)$", (ROOT / ".ci/night").read_text(), re.MULTILINE))
TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 0
@pytest.mark.parametrize("one", (1, 2))
def test_needy(one): pytest.skip("no GPU here")
"""


def modules_of(path):
    return {path} if path.suffix == ".py" else {*path.rglob("test_*.py")}


def test_every_test_module_is_in_one_part_of_a_night():
    found = Counter()
    for part in PARTS.values():
        for pattern in part.split():
            paths = [*ROOT.glob(pattern)]
            assert paths, pattern
            found.update(module for path in paths for module in modules_of(path))
    modules = {module for folder in ("tests", "bench") for module in modules_of(ROOT / folder)}
    assert len(PARTS) == 4 and len(modules) > 100
    assert found.keys() == modules and set(found.values()) == {1}


def test_a_night_with_a_failed_test_fails(tmp_path):
    """It is told in rows."""
    (tmp_path / "test_it.py").write_text(TESTS)
    xml = tmp_path / "night.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", tmp_path, f"--junitxml={xml}", tmp_path], capture_output=True)
    done = subprocess.run([sys.executable, ROOT / ".ci/report.py", f"kernels={xml}"], capture_output=True, text=True)
    row, reason = done.stdout.splitlines()
    assert done.returncode == 1 and row.startswith("| kernels | 20") and row.endswith("| 1 | 1 | 2 | 0 |")
    assert reason == "- skipped 2: no GPU here"
