"""The README is short and true, and CI runs its commands."""

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


def test_the_readme_is_read_in_minutes():
    """It leads to every other document."""
    assert len(README.encode()) <= 14_000
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("[A-Z]*.md"), ROOT / "bench/RESULTS.md", ROOT / "csrc/README.md"):
        assert f"]({path.relative_to(ROOT)}" in README or path.name == "README.md" == str(path.relative_to(ROOT)), path
    for page in ROOT.glob("docs/*/*.md"):       # pages of a document, which leads to them
        assert f"]({page.relative_to(ROOT / 'docs')})" in page.parent.with_suffix(".md").read_text(encoding="utf-8"), page


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


def test_there_are_exactly_two_set_up_commands():
    """They set up and go; CI runs the second, and all tests with it."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("chat_server.py") and commands[1].endswith("-m pytest -n 3 --dist loadfile --quick")
    assert "## Test" in (ROOT / ".ci/run").read_text()
    assert "tests=${tests% --quick}" in (ROOT / ".ci/run").read_text()
    assert fenced("## Test") == [[commands[1]]]       # all that CI takes from this section


def test_the_readme_s_apis_name_real_routes():
    table = README.split("\n## API\n")[1].split("```")[0]
    named = re.findall(r"`(?:GET |POST )?(/[^`]*)`", table)
    assert len(named) > 20 and set(named) <= {route.pattern for route in ROUTES}


def test_examples_make_a_bundle_and_run_it_elsewhere():
    examples = fenced("## Use")[0]
    (place,) = [number for number, line in enumerate(examples) if " bundle && scp chat_server.pyz gpu-box: " in line]
    assert examples[place + 1].startswith("python3 chat_server.pyz --num-gpus 8 ")


def fenced(heading):
    """The blocks of lines to paste in a section."""
    section = README.split(f"\n{heading}\n")[1].split("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)]


def test_pasted_commands_name_their_python():
    """They are for a fresh clone and name the Python of its environment."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")):
        bare = re.findall(r"(?<![\w/])python (?:chat_server\.py|bench/|docs/|setup\.py).*", path.read_text(encoding="utf-8"))
        assert bare == [], path


def test_the_readme_shows_the_page_first():
    """Then it shows how to run and use it, then models, then figures."""
    order = ["docs/moving.png", "## Run", "## Use", "### With other programs", "## Models", "## API", "## How it compares", "## Test"]
    places = [README.index(f"\n{part}\n" if part.startswith("#") else part) for part in order]
    assert places == sorted(places)


@pytest.mark.parametrize("program", ["Ollama", "LM Studio", "llama-server", "open-webui", "nanochat", "torchchat", "vllm"])
def test_who_comes_from_another_program_has_a_row(program):
    table = README.split("| coming from | ")[1].split("\n\n")[0]
    assert re.search(rf"^\| [^|]*{program}", table, re.MULTILINE)


def test_the_flags_for_newcomers_exist():
    """They are those of the table for who comes from elsewhere."""
    table = README.split("| coming from | ")[1].split("\n\n")[0]
    words = " ".join(line.split(" | ", 1)[1] for line in table.splitlines()[2:])
    assert {*re.findall(r"--([a-z-]+)", words)} <= {name for flag in FLAGS for name in flag.names}


@pytest.mark.parametrize("program", ["open-webui serve", " claude\n", "\ncodex ", "\nOPENAI_API_BASE=", "Continue", "Cursor"])
def test_other_programs_settings_are_there_to_copy(program):
    assert program in README.split("### With other programs")[1].split("\n## ")[0]


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


def test_no_sentence_says_the_program_is_one_file():
    """No sentence says that the program is one file."""
    documents = [path for folder in ("", "docs/**/", "csrc/") for path in ROOT.glob(f"{folder}*.md")]
    for path in (*documents, *(ROOT / name for name in ("chat_server.py", "pyproject.toml", "setup.py"))):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"readable\s+file|copy\s+of\s+(?:this|the)\s+(?:file|script)|top\s+to\s+bottom|reference\s+in\s+the\s+file|not\s+this\s+file",
                          text) == [], path
