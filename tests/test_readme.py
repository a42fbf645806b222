"""The README is true: its flags are those of the table, and CI runs its commands."""

import contextlib
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import chat_server
from chatlm.common.config import FLAGS, OPTIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_is_in_the_table_with_its_default_and_meaning():
    rows = {row[0]: row for row in re.findall(r"^\| `--([a-z-]+)`[^|]*\| ([^|]*)\| ([^|]*)\| ([^|]*)\|$", README, re.MULTILINE)}
    assert set(rows) == {option.name.split()[0] for option in OPTIONS}
    for option in OPTIONS:
        _, short, default, meaning = (cell.strip() for cell in rows[option.name.split()[0]])
        assert short == (f"`-{option.short}`" if option.short else "")
        assert default == ("" if option.default in (None, (), False) else f"`{option.default}`")
        assert meaning.startswith(option.help)


def test_the_flags_are_grouped_as_in_the_help():
    groups = {}
    for flag in FLAGS:
        if isinstance(flag, str):
            names = groups[flag] = []
        else:
            names.append(flag.name.split()[0])
    for title, names in groups.items():
        table = README.split(f"\n{title}:\n\n")[1].split("\n\n")[0]
        assert re.findall(r"^\| `--([a-z-]+)`", table, re.MULTILINE) == names


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
    assert "## Test" in (ROOT / ".ci/run").read_text() and README.index("## Test") < README.index(commands[1])


def test_the_pictures_and_files_it_names_exist():
    for name in re.findall(r"\]\(([^)]+)\)|`((?:bench|static)/[a-zA-Z.]+)`|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(name)).exists(), name


def test_every_route_is_in_the_readme():
    for route in chat_server.ROUTES:
        assert route.pattern + "`" in README, route


def test_the_second_example_makes_a_bundle_and_runs_it_elsewhere():
    examples = README.split("## Use")[1].split("```")[1].strip().split("\n")
    assert examples[1].startswith("python chat_server.py bundle && scp chat_server.pyz gpu-box: ")
    assert examples[2].startswith("python chat_server.pyz --num-gpus 8 ")


def test_no_sentence_says_that_the_program_is_one_file():
    for name in ("README.md", "SECURITY.md", "chat_server.py", "csrc/README.md", "docs/architecture.md", "pyproject.toml", "setup.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"readable\s+file|copy\s+of\s+(?:this|the)\s+(?:file|script)|top\s+to\s+bottom|reference\s+in\s+the\s+file|not\s+this\s+file", text) == [], name
