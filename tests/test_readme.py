"""The README is short and true, and CI runs its commands."""

import contextlib
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import chat_server

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_minutes_and_leads_to_every_other_document():
    assert len(README.encode()) <= 14_000
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("[A-Z]*.md"), ROOT / "bench/RESULTS.md", ROOT / "csrc/README.md"):
        assert f"]({path.relative_to(ROOT)}" in README or path.name == "README.md" == str(path.relative_to(ROOT)), path


@pytest.mark.parametrize("minor", range(10, 15))
def test_what_is_pinned_runs_on_every_python_that_is_claimed(minor):
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text() and "Python 3.10 or newer" in README
    rows = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    meant = [row for row in rows if row.marker is None or row.marker.evaluate({"python_version": f"3.{minor}"})]
    assert len({row.name for row in meant}) == len(meant) and {"torch", "numpy"} <= {row.name for row in meant}
    for row in meant:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.metadata(row.name)
            if found["Version"].split("+")[0] in str(row.specifier):
                assert f"3.{minor}.0" in SpecifierSet(found["Requires-Python"] or ""), row


def test_there_are_exactly_two_set_up_and_go_commands_and_ci_runs_the_second():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("chat_server.py") and commands[1].endswith("-m pytest -n 2 --dist loadfile")
    assert "## Test" in (ROOT / ".ci/run").read_text()
    fenced = re.findall(r"^```\n(.*?)^```", README.split("\n## Test\n")[1].split("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert fenced == [f"{commands[1]}\n"]       # all that CI takes from this section


def test_its_table_of_apis_names_routes_that_exist():
    table = README.split("\n## API\n")[1].split("```")[0]
    named = re.findall(r"`(?:GET |POST )?(/[^`]*)`", table)
    assert len(named) > 20 and set(named) <= {route.pattern for route in chat_server.ROUTES}


def test_the_second_example_makes_a_bundle_and_runs_it_elsewhere():
    examples = README.split("## Use")[1].split("```")[1].strip().split("\n")
    assert examples[1].startswith("python chat_server.py bundle && scp chat_server.pyz gpu-box: ")
    assert examples[2].startswith("python chat_server.pyz --num-gpus 8 ")


def test_no_sentence_says_that_the_program_is_one_file():
    documents = [path for folder in ("", "docs/", "csrc/") for path in ROOT.glob(f"{folder}*.md")]
    for path in (*documents, *(ROOT / name for name in ("chat_server.py", "pyproject.toml", "setup.py"))):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"readable\s+file|copy\s+of\s+(?:this|the)\s+(?:file|script)|top\s+to\s+bottom|reference\s+in\s+the\s+file|not\s+this\s+file",
                          text) == [], path
