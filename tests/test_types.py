"""pyright finds no error in what is ours. By hand, in the checkout: `basedpyright`; pyproject.toml has its
settings."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# Errors that it must find: without them, silence could mean that it has read nothing, or knows no types
PLANTED = """\
from decode_core import _core
from chatlm.common.config import Settings
Settings().port.upper()
_core.set_threads("all")
from chatlm.front.annexes import BATCH_ROUTES, FILE_ROUTES, Annex, load_files, load_rounds
from chatlm.front.api.errors import OPENAI
from chatlm.front.front import RoomRoutes
from chatlm.front.server.batches import BatchRoutes
from chatlm.front.server.page import PAGE_ROUTES, PageFiles
from chatlm.front.server.routes import Route
RoomRoutes(lambda front: front.page, PAGE_ROUTES)
Annex("files", load_files, FILE_ROUTES)
RoomRoutes(lambda front: front.models, PAGE_ROUTES)
Annex("rounds", load_rounds, BATCH_ROUTES)
Route("GET", "/x", OPENAI, PageFiles.handle_nothing, "x")
ROWS: tuple[Route[PageFiles], ...] = (Route("GET", "/x", OPENAI, BatchRoutes.handle_list, "x"),)
MORE: tuple[Route[BatchRoutes], ...] = (Route("GET", "/x", OPENAI, lambda room, http: room.handle_nothing(http), "x"),)
Annex("files", load_files, close=lambda files: files.end())
from chatlm.front.api.additions import ServerTool
Annex("files", load_files, tools=(ServerTool("x", "x", {}, lambda files, call: files.run(call)),))
Annex("files", load_files, prompt=lambda files, parsed, caller, pool: files.prompted(parsed))
Annex("files", load_files, tables=lambda: (1,))
from chatlm.common.commands import Command
Command("x", "which is x", run=lambda settings: None)
Command("x", "which is x", lines=lambda words: ())
"""
FAULTS = 3, 4, 13, 14, 15, 16, 17, 18, 20, 21, 22, 24, 25  # its lines


@pytest.mark.timeout(420)  # a minute, and several on a busy machine
@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed")
def test_the_type_checker_finds_only_planted_errors(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["basedpyright"]
    (tmp_path / "planted.py").write_text(PLANTED)
    paths = {
        name: [str(ROOT / path) for path in settings[name]] for name in ("include", "exclude", "extraPaths")
    }
    config = settings | {
        "include": [*paths["include"], str(tmp_path / "planted.py")],
        "exclude": paths["exclude"],
        "extraPaths": [str(ROOT), *paths["extraPaths"]],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "basedpyright",
            "--outputjson",
            "--pythonpath",
            sys.executable,
            "-p",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    report = json.loads(run.stdout)
    errors = [
        f"{Path(each['file']).name}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    ]
    planted = [each.partition(": ")[0] for each in errors if each.startswith("planted.py")]
    assert planted == [f"planted.py:{line}" for line in FAULTS] and len(errors) == len(planted), "\n".join(
        errors
    )
    assert report["summary"]["filesAnalyzed"] > 100


def ignores(text):
    """(The rule in brackets, what comes after it) of each comment that a type checker obeys."""
    return re.findall(r"#\s*(?:pyright|type):\s*(?:ignore|basic|strict|off)([^\s,#]*)(.*)", text)


def test_what_types_must_overlook_has_a_reason():
    """The type checker must overlook it."""
    paths = [
        ROOT / "chat_server.py",
        *(ROOT / "chatlm").rglob("*.py"),
        *(ROOT / "csrc/decode_core").glob("*.py*"),
    ]
    found = [(path.name, *ignore) for path in paths for ignore in ignores(path.read_text(encoding="utf-8"))]
    assert [
        each for each in found if not re.fullmatch(r"\[report\w+\]", each[1]) or len(each[2].split()) < 3
    ] == []
    assert ignores("x  # pyright: ignore[reportX]  we know why\ny  # type: ignore\n# pyright: basic") == [
        ("[reportX]", "  we know why"),
        ("", ""),
        ("", ""),
    ]
