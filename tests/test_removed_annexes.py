"""A copy of the program without the folder of an annex is a server without that annex, and lacks nothing else."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from real_server import ask, copy_program, post, server

ROOT = Path(__file__).resolve().parent.parent
ANNEXES = Path("chatlm/front/annexes")
NAMES = sorted(path.parent.name for path in (ROOT / ANNEXES).glob("*/row.py"))
ROWS = """
import json
from chatlm.front.annexes import ANNEXES
print(json.dumps({row.name: {"routes": [(route.method, route.pattern) for route in row.routes], "fields": [each.field.name for each in row.fields]} for row in ANNEXES}))
"""
FAMILIES = {"knowledge": "chat_server_ingest_files"}  # of annexes that are open in these servers
# Tests of the core that import no annex
OF_THE_CORE = ("tests/front/pool/test_workers.py", "tests/front/pool/test_failover.py", "tests/front/api/test_streamed_text.py",
               "tests/front/api/test_nulls.py")


def remove(folder, names):
    """Remove annexes from a copy: their folders, and their lines of the table."""
    table = folder / ANNEXES / "__init__.py"
    text = source = table.read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("chatlm.front.annexes.") and node.module.split(".")[3] in names:
            text = text.replace(ast.get_source_segment(source, node) + "\n", "")
            for alias in node.names:
                text = re.sub(rf"(?<=[\s(]){alias.name}(?:, ?|(?=\)))", "", text)
    table.write_text(text)
    for name in names:
        shutil.rmtree(folder / ANNEXES / name)


def rows_of(folder):
    return json.loads(subprocess.run([sys.executable, "-c", ROWS], cwd=folder, capture_output=True, text=True, check=True).stdout)


def status_of(url, method, pattern):
    path = re.sub(r"{\w+}", "0" * 32, pattern)
    request = urllib.request.Request(url + path, None if method == "GET" else b"{}", {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def told(url, path):
    with urllib.request.urlopen(url + path, timeout=60) as response:
        return response.read().decode()


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_a_copy_without_an_annex_serves_all_else(name, nanochat_fixtures, tmp_path):
    script = copy_program(tmp_path)
    names = NAMES if name == "all" else [name]
    remove(tmp_path, names)
    rows, left = rows_of(ROOT), rows_of(tmp_path)
    lost = [row for annex, row in rows.items() if annex not in left]
    assert lost and len(left) + len(lost) == len(rows)
    routes = [tuple(route) for row in lost for route in row["routes"]]
    with server(nanochat_fixtures / "gen5", "--database", tmp_path / "store.db", script=script) as (process, url):
        for path in ("/chat/completions", "/v1/chat/completions", "/v1/responses"):
            body = {"input": "Hello", "max_output_tokens": 16, "store": False} if path == "/v1/responses" else ask("Hello", max_tokens=2)
            assert post(url + path, body).status == 200
        assert {route: status for route in routes if (status := status_of(url, *route)) != 404} == {}
        described = json.loads(told(url, "/openapi.json"))["paths"]
        assert [route for route in routes if route[0].lower() in described.get(route[1], ())] == []
        fields = described["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert [field for row in lost for field in row["fields"] if field in fields] == [] and "messages" in fields
        for annex in left:
            for method, pattern in left[annex]["routes"]:
                assert method.lower() in described[pattern]
        if "metrics" in left:
            shown = told(url, "/metrics")
            assert "chat_server_queued" in shown
            assert [family for annex, family in FAMILIES.items() if (family in shown) != (annex not in names)] == []
        assert process.poll() is None


@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed")
def test_the_bare_core_passes_its_own_tests_and_the_type_checker(tmp_path):
    """Modules that are gone are there empty: the type checker would find those of an installed program."""
    copy_program(tmp_path)
    remove(tmp_path, NAMES)
    for name in ("tests", "pyproject.toml", "csrc"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *OF_THE_CORE], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:]
    for module in (ROOT / ANNEXES).rglob("*.py"):
        empty = tmp_path / module.relative_to(ROOT)
        if not empty.exists():
            empty.parent.mkdir(parents=True, exist_ok=True)
            empty.write_text("")
    checked = subprocess.run([sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable], cwd=tmp_path, capture_output=True, text=True,
                             timeout=400)
    report = json.loads(checked.stdout)
    assert [each for each in report["generalDiagnostics"] if each["severity"] == "error"] == [] and report["summary"]["filesAnalyzed"] > 100
