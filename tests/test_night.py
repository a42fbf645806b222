"""The night's parts (.ci/night) together run every test module once, and .ci/report.py says what they found."""

import re
import subprocess
import sys
from collections import Counter
from modulefinder import ModuleFinder
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("words", [["tonight"], ["nightly", "5/4"], ["nightly", "1/2"]])
def test_a_word_that_ci_does_not_know_is_refused(words):
    done = subprocess.run(["bash", ROOT / ".ci/run", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "usage: .ci/run [changed" in done.stderr


def test_kernels_pass_again_once_a_source_changes(tmp_path):
    """CI leaves out the sanitizers and aarch64 only while every file that they read is as it was when they passed."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, copy], check=True)
    (copy / ".ci/run").write_text((ROOT / ".ci/run").read_text())
    (copy / ".ci/kernels").unlink(missing_ok=True)

    def sources():
        return subprocess.run(["bash", ".ci/run", "sources"], cwd=copy, capture_output=True, text=True, check=True).stdout.strip()
    digest = sources()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    (copy / ".ci/kernels").write_text(digest + "\n")
    assert sources() == "passed"
    with open(copy / "README.md", "a") as readme:
        readme.write("more\n")
    assert sources() == "passed"
    for name in ("csrc/ops.h", "csrc/sanitize.sh", "tests/core/test_core_tiles.py", "tests/support/record.json", "setup.py"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b"\n")
        assert sources() not in ("passed", digest), name
        (copy / name).write_bytes(before)
    assert sources() == "passed"


def words_of(name):
    """The files that a list of .ci/run names."""
    words = re.search(rf"^{name}=\((.*?)\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE | re.DOTALL)[1]
    return subprocess.run(["bash", "-c", f"printf '%s\\n' {' '.join(words.split())}"], capture_output=True, text=True, check=True).stdout.split()


def test_kernel_tests_read_nothing_that_ci_does_not_watch():
    """What CI leaves out until a source changes imports those sources alone."""
    tests = words_of("KERNEL_TESTS")
    assert len(tests) == 10
    finder = ModuleFinder([str(ROOT / folder) for folder in ("", "csrc", "tests/support")])      # finds nothing that is installed
    for path in tests:
        finder.load_file(str(ROOT / path))
    seen = {Path(module.__file__) for module in finder.modules.values() if module.__file__}
    watched = [ROOT / name for name in words_of("KERNEL_SOURCES")]
    packages = {path for path in seen if path.name == "__init__.py" and len(path.read_bytes()) < 500}       # they say what is in them, and do nothing
    assert {path for path in seen - packages if not {path, *path.parents} & {*watched}} == set()


def test_a_night_with_a_failed_test_fails(tmp_path):
    """It is told in rows."""
    (tmp_path / "test_it.py").write_text(TESTS)
    xml = tmp_path / "night.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", tmp_path, f"--junitxml={xml}", tmp_path], capture_output=True)
    done = subprocess.run([sys.executable, ROOT / ".ci/report.py", f"kernels={xml}"], capture_output=True, text=True)
    row, reason = done.stdout.splitlines()
    assert done.returncode == 1 and row.startswith("| kernels | 20") and row.endswith("| 1 | 1 | 2 | 0 |")
    assert reason == "- skipped 2: no GPU here"
