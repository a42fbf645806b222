"""What the README says is so, and what it has to paste works."""

import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import chat_server
from chatlm.common.config import FLAGS
from chatlm.front.front import ROUTES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("minor", range(10, 15))
def test_what_is_pinned_runs_on_every_claimed_python(minor):
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text() and "Python 3.10 or newer" in README
    rows = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    meant = [row for row in rows if row.marker is None or row.marker.evaluate({"python_version": f"3.{minor}"})]
    assert len({row.name for row in meant}) == len(meant) and {"torch", "numpy"} <= {row.name for row in meant}
    for row in meant:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.metadata(row.name)
            if found["Version"].split("+")[0] in str(row.specifier):
                assert f"3.{minor}.0" in SpecifierSet(found["Requires-Python"] or ""), row


def test_the_readme_s_apis_name_real_routes():
    table = README.split("\n## API\n")[1].split("```")[0]
    named = re.findall(r"`(?:GET |POST )?(/[^`]*)`", table)
    assert len(named) > 20 and set(named) <= {route.pattern for route in ROUTES}


def fenced(heading):
    """The blocks of lines to paste in a section."""
    section = README.split(f"\n{heading}\n")[1].split("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)]


def test_pasted_commands_name_their_python():
    """They are for a fresh clone and name the Python of its environment."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")):
        bare = re.findall(r"(?<![\w/])python (?:chat_server\.py|bench/|docs/|setup\.py).*", path.read_text(encoding="utf-8"))
        assert bare == [], path


def test_the_network_s_key_is_made_and_asked_for(tmp_path, default_model_path):
    (lines,) = [block for block in fenced("## Use") if block[0].startswith("[ -s ~/chat-key.txt ]")]
    script = "\n".join(lines)
    program = f"exec {sys.executable} {ROOT}/chat_server.py {default_model_path} --port 0 --host 127.0.0.1"
    environment = os.environ | {"HOME": str(tmp_path)}
    process = subprocess.Popen(["bash", "-c", script.replace(".venv/bin/python chat_server.py", program)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        key = process.stdout.readline().strip()
        url = next(line.strip() for line in process.stdout if "http://" in line)
        assert key == (tmp_path / "chat-key.txt").read_text().strip() and (tmp_path / "chat-key.txt").stat().st_mode & 0o077 == 0
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/v1/models", timeout=60)
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}), timeout=60) as answer:
            assert b"SmolLM2" in answer.read()
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
    # pasted again, it is the same key, for the server too
    again = subprocess.run(["bash", "-c", script.replace(".venv/bin/python chat_server.py", "printenv CHAT_SERVER_API_KEY")], capture_output=True, text=True, env=environment)
    assert again.stdout.splitlines() == [key, key]
