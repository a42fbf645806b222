"""The README is true: its flags are those of the table, and CI runs its commands."""

import re
from pathlib import Path

import chat_server

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_is_in_the_table_with_its_default_and_meaning():
    rows = {row[0]: row for row in re.findall(r"^\| `--([a-z-]+)`[^|]*\| ([^|]*)\| ([^|]*)\| ([^|]*)\|$", README, re.MULTILINE)}
    assert set(rows) == {option.name.split()[0] for option in chat_server.OPTIONS}
    for option in chat_server.OPTIONS:
        _, short, default, meaning = (cell.strip() for cell in rows[option.name.split()[0]])
        assert short == (f"`-{option.short}`" if option.short else "")
        assert default == ("" if option.default in (None, (), False) else f"`{option.default}`")
        assert meaning.startswith(option.help)


def test_there_are_exactly_two_set_up_and_go_commands_and_ci_runs_the_second():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("chat_server.py") and commands[1].endswith("-m pytest")
    assert "## Test" in (ROOT / ".ci/run").read_text() and README.index("## Test") < README.index(commands[1])


def test_the_pictures_and_files_it_names_exist():
    for name in re.findall(r"\]\(([^)]+)\)|`((?:bench|static)/[a-zA-Z.]+)`", README):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_every_route_is_in_the_readme():
    for route in chat_server.ROUTES:
        assert route.pattern + "`" in README, route
