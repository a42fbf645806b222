"""The walls between the houses: what import-linter refuses (.importlinter), and what it cannot see, imports
by name."""

import ast
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from chatlm.common.core import decode_core
from chatlm.worker.model.blocks.feed_forward import UNGATED
from chatlm.worker.ops import basic
from chatlm.worker.weights.facts import Facts
from real_server import ask, post, server

ROOT = Path(__file__).resolve().parent.parent
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"


def lint(folder):
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )


def test_every_import_keeps_to_the_walls():
    found = lint(ROOT)
    assert found.returncode == 0 and ", 0 broken" in found.stdout, found.stdout


PLANTED = [  # module, import, the contract that it breaks
    ("front/pool/local_devices", "import chatlm.worker.engine.scheduler", "The two houses never meet"),
    ("worker/engine/engine", "from chatlm.front import aio", "The two houses never meet"),
    ("common/config", "from chatlm import cli", "common below the houses"),
    ("common/text/reader", "import torch", "No tensors in the front"),
    ("cli", "import gguf", "No tensors in the front"),
    ("worker/process", "import aiohttp", "No HTTP in a worker"),
    ("front/intake/tasks", "from aiohttp import web", "No HTTP in what reads bodies"),
    ("front/api/dialects/own", "import aiohttp", "No HTTP in what reads bodies"),
    (
        "front/api/dialects/messages",
        "from chatlm.front.api.dialects import openai",
        "No dialect needs another",
    ),
    ("worker/weights/formats/gguf/file", "import torch", "No torch in a worker on a CPU"),
    (
        "worker/ops/basic",
        "from chatlm.worker.model import batch",
        "A room of the worker house imports only rooms below it",
    ),
    (
        "worker/build",
        "from chatlm.worker.weights.facts import Facts",
        "Only loaders know what files state of a model",
    ),
    (
        "worker/tower",
        "from chatlm.worker.weights.facts import Facts",
        "A room of the worker house imports only rooms below it",
    ),
    (
        "worker/weights/families/plain",
        "from chatlm.worker.weights.formats import sources",
        "What loads a model calls formats, a format asks families",
    ),
    (
        "worker/weights/text/splits",
        "from chatlm.worker.weights.packed import rows",
        "What loads a model calls formats, a format asks families",
    ),
    (
        "worker/weights/formats/gguf/model",
        "from chatlm.worker.weights.formats.folder import tensors",
        "No kind of files needs another",
    ),
    (
        "worker/weights/formats/folder/model",
        "from chatlm.worker.weights.families import gemma4",
        "Only families name a family",
    ),
    (
        "export/rounding",
        "from chatlm.worker.weights.families import plain",
        "Only families name a family",
    ),
    (
        "worker/weights/attic",
        "import os",
        "What loads a model calls formats, a format asks families",
    ),
    (
        "front/admission/prompts",
        "from chatlm.front.api import fields",
        "A room of the front house imports only rooms below it",
    ),
    ("common/errors", "from chatlm.common import log", "A common room imports only rooms below it"),
    ("terminal/chat", "import chat_server", "Nothing imports the script"),
    ("front/pool/dispatcher", "from chatlm.front.pool import files_revision", "What a pool is made of is a line"),
    (
        "worker/engine/limits",
        "from chatlm.worker.engine import planners",
        "What plans the steps of an engine is a line",
    ),
    (
        "worker/engine/kvcache",
        "from chatlm.worker.engine import scheduler",
        "No cycles among the modules of a package",
    ),
    ("worker/attic", "import os", "A room of the worker house imports only rooms below it"),
]  # a new room has to be placed


LINES = "pool-line", "step-line", "weights-layers", "format-layers"  # contracts


def test_lines_of_modules_hold_for_types(tmp_path):
    """Other contracts leave out imports that only types need: where those make a circle, nobody can read one
    part alone."""
    config = tmp_path / "config"
    config.write_text(
        (ROOT / ".importlinter")
        .read_text()
        .replace("exclude_type_checking_imports = True", "exclude_type_checking_imports = False")
    )
    options = [
        "--no-cache",
        "--config",
        str(config),
        *(word for line in LINES for word in ("--contract", line)),
    ]
    code = f"from importlinter.cli import lint_imports_command; lint_imports_command({options!r})"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0 and f"{len(LINES)} kept, 0 broken" in found.stdout, found.stdout


def test_each_kind_of_forbidden_import_is_found(tmp_path):
    """All are planted at once: a run of the linter takes a second."""
    shutil.copytree(ROOT / "chatlm", tmp_path / "chatlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("chat_server.py", ".importlinter"):
        shutil.copy(ROOT / name, tmp_path)
    for module, line, _ in PLANTED:
        with open(tmp_path / "chatlm" / f"{module}.py", "a") as file:
            file.write(f"{line}\n")
    found = lint(tmp_path)
    broken = found.stdout.partition("Broken contracts")[2]
    assert found.returncode == 1
    for module, line, contract in PLANTED:
        cycle = contract.startswith("No cycles")  # it names its modules within their package
        place = module.rpartition("/")[2] if cycle else f"chatlm.{module.replace('/', '.')}"
        assert contract in broken and place in broken.partition(contract)[2], (module, line, found.stdout)


def read_of_facts(path):
    """What a module reads of something called `facts`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in FACTS:
            owner = node.value
            name = (
                owner.attr
                if isinstance(owner, ast.Attribute)
                else owner.id if isinstance(owner, ast.Name) else ""
            )
            if name == "facts":
                yield f"{path.relative_to(ROOT)}:{node.lineno} reads {name}.{node.attr}"


FACTS = {field.name for field in dataclasses.fields(Facts)} | {
    name for name in vars(Facts) if not name.startswith("_")
}


def test_only_loaders_read_the_facts_of_a_model():
    """Not even without importing them, as `model.facts.width` would. A loader's own modules do."""
    loaders = ROOT / "chatlm/worker/weights"
    readers = [
        path
        for path in (ROOT / "chatlm/worker").rglob("*.py")
        if loaders not in path.parents
    ]
    found = [line for path in readers for line in read_of_facts(path)]
    assert ROOT / "chatlm/worker/build.py" in readers and found == []
    assert [*read_of_facts(loaders / "families/plain.py")]  # so the search finds them


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def annexes_imported(path):
    """The annexes that a module imports, also for types alone, or names in a text as a place of one."""
    for node in ast.walk(tree_of(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names = [node.value]
        for name in names:
            if name.startswith("chatlm.front.annexes."):
                yield name.split(".")[3].partition(":")[0]


def test_nobody_imports_an_annex_for_types_either():
    """Only the table imports rows, and no annex another one."""
    annexes = ROOT / "chatlm/front/annexes"
    folders = {path.name for path in annexes.iterdir() if (path / "row.py").exists()}
    found = []
    for path in [ROOT / "chat_server.py", *(ROOT / "chatlm").rglob("*.py")]:
        own = path.relative_to(annexes).parts[0] if annexes in path.parents else ""
        if own != "__init__.py":
            others = folders & {*annexes_imported(path)} - {own}
            found += [(str(path.relative_to(ROOT)), each) for each in others]
    assert found == [] and len(folders) > 10
    assert {*annexes_imported(annexes / "__init__.py")} == folders  # so the search finds them


LATE = {  # module -> why its functions import modules of ours: all others do that at their head
    "chatlm/commands.py": "a command imports what it needs, and no other command's",
    "chatlm/front/intake/sandboxed.py": "a sandbox imports what reads large bodies, or documents, for the first one",
    "chatlm/worker/entry.py": "a process joins its parent before it imports numpy",
    "chatlm/worker/kernels/choosing.py": "backends need decode_core",
    "chatlm/worker/kernels/devices.py": "a backend needs decode_core, and on GPUs torch",
    "chatlm/worker/kernels/check.py": "without decode_core there is nothing to report",
    "chatlm/worker/kernels/report.py": "what is compared with torch is left out without it",
    "chatlm/worker/ranks/ranks.py": "ranks without decode_core have no compiled meetings",
}


def imports_in_functions(tree):
    """The modules of ours that functions import."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                yield from (name for name in names if name.partition(".")[0] == "chatlm")


def test_modules_of_ours_are_imported_at_the_head():
    """What is imported when it is asked for is named in a table (chatlm/common/late.py), or stands in `LATE`."""
    late = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "chatlm").rglob("*.py")
        if [*imports_in_functions(tree_of(path))]
    }
    assert late == {*LATE}


# In each process: at SIGUSR1 it writes the names of its modules
SPY = """
import os, signal, sys
def tell(*_):
    with open(os.path.join(os.environ["SPY"], f"{os.getpid()}.part"), "w") as file:
        file.write(" ".join(sys.modules))
    os.replace(file.name, os.path.join(os.environ["SPY"], str(os.getpid())))
signal.signal(signal.SIGUSR1, tell)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads command lines in /proc")
def test_no_process_imports_another_house_s_modules(nanochat_fixtures, tmp_path):
    """No process has imported what is for another house."""
    (tmp_path / "sitecustomize.py").write_text(SPY)
    spied = {"SPY": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    with server(nanochat_fixtures / "gen5", "--tp", "2", env=os.environ | spied) as (process, url):
        long = ask("x" * 100, ignored="y" * 100_000, max_tokens=2)  # large: a sandbox reads it
        assert b'"done": true' in post(url + "/chat/completions", long).read()
        front = psutil.Process(process.pid)
        roles = {front.pid: "front"}
        for child in front.children(recursive=True):
            words = child.cmdline()
            roles[child.pid] = next(word for word in words if word in ("worker", "rank", "sandbox"))
        for pid in roles:
            os.kill(pid, signal.SIGUSR1)
        modules = {}
        while missing := [pid for pid in roles if not (tmp_path / str(pid)).exists()]:
            assert all(map(psutil.pid_exists, missing))
    for pid, role in roles.items():
        modules.setdefault(role, set()).update((tmp_path / str(pid)).read_text().split())
    assert set(modules) == {"front", "worker", "rank", "sandbox"}, json.dumps(roles)
    for role, forbidden in {
        "front": ("torch", "numpy", "gguf", "chatlm.worker", "prometheus_client"),
        "sandbox": ("torch", "numpy", "gguf", "aiohttp", "chatlm.worker"),
        "worker": ("aiohttp", "chatlm.front", "chatlm.terminal"),
        "rank": ("aiohttp", "chatlm.front", "chatlm.terminal"),
    }.items():
        assert [
            name
            for name in sorted(modules[role])
            if name.startswith(tuple(f"{each}." for each in forbidden)) or name in forbidden
        ] == [], role
    assert {"numpy", "chatlm.worker.process"} <= modules["worker"] and "aiohttp" in modules["front"]
    assert {"numpy", "chatlm.worker.other_rank"} <= modules[
        "rank"
    ] and "chatlm.worker.process" not in modules["rank"]
    assert ("torch" in modules["worker"] | modules["rank"]) == (decode_core() is None)


def test_a_worker_joins_its_parent_before_libraries():
    """It imports them afterwards."""
    code = (
        "import sys; from chatlm.worker import entry; print(sorted({'torch', 'numpy', 'gguf'} &"
        " sys.modules.keys()))"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split() == ["[]"]


def test_activations_without_gates_have_a_reference():
    """Their names are those that have one."""
    assert set(UNGATED) == set(basic.UNGATED) and not set(UNGATED) & set(basic.GATES)
