"""docs/changes.md works two changes through. Here they are made as it says, word by word, in a copy of the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_server import server

ROOT = Path(__file__).resolve().parent.parent
CHANGES = (ROOT / "docs/changes.md").read_text(encoding="utf-8")
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "build-*", "__pycache__", ".pytest_cache")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("git"), reason="git is missing, which applies the diffs")]


def blocks(title: str, language: str) -> list[str]:
    """The fenced blocks in a section of the page."""
    section = CHANGES.split(f"\n### {title}\n")[1].split("\n### ")[0]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [block for found, block in fenced if found == language]


def ran(words: list[str], folder: Path, **more) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CHAT_SERVER_"))}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, **more)


def made(title: str, tmp_path: Path) -> tuple[Path, list[list[str]]]:
    """A copy of the repository after the diffs and commands of a section, and the words of its curl commands."""
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=NOT_COPIED, symlinks=True))
    for diff in blocks(title, "diff"):
        applied = ran(["git", "apply", "-"], copy, input=diff)
        assert applied.returncode == 0, diff + applied.stderr

    curls = []
    for line in "".join(blocks(title, "")).splitlines():
        words = shlex.split(line)
        if words[0] == "curl":
            curls.append(words)
            continue
        assert words[0] == ".venv/bin/python"
        done = ran([sys.executable, *words[1:]], copy)
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    return copy, curls


def answers(curls: list[list[str]], copy: Path, model: Path) -> list[dict]:
    """What a server of the copy answers to each curl."""
    with server(model, script=copy / "chat_server.py") as (_, url):
        asked = [[word.replace("http://127.0.0.1:8000", url) for word in words] for words in curls]
        return [json.loads(ran([*words, "--silent"], copy, check=True).stdout) for words in asked]


def test_the_route_of_the_page_works(tmp_path, default_model_path):
    copy, curls = made("A route, worked through", tmp_path)
    (answer,) = answers(curls, copy, default_model_path)
    assert answer["uptime_s"] >= 0


def test_the_parameter_of_the_page_works(tmp_path, default_model_path):
    copy, curls = made("A sampling parameter, worked through", tmp_path)
    refused = [word.replace('"epsilon_cutoff": 1', '"epsilon_cutoff": 2') for word in curls[0]]
    first, second, error = answers([*curls, refused], copy, default_model_path)
    assert first["seed"] != second["seed"] and first["choices"][0]["text"] == second["choices"][0]["text"] != ""
    assert f"`{error['error']['message']}`" in CHANGES
