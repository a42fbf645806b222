"""`pip install .` installs all of the program, and a checkout that differs from the installed one says so."""

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import chat_server
from chatlm.common import program
from chatlm.common.processes.start import PROCESS_CODE
from real_server import server

CHECKOUT = Path(chat_server.__file__).resolve().parent
SOURCES = ("chat_server.py", "chatlm", "static", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")
UNCOMPILED = {"CXX": "false", "DECODE_CORE_CUDA": "0"}       # pip succeeds without a compiler, in seconds


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout, which building may write into."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy
        copy(CHECKOUT / name, folder / name)
    return folder


def installed(checkout, folder):
    """The modules and the page of a checkout where pip would put them."""
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", folder], cwd=checkout, check=True, timeout=60,
                   capture_output=True)
    return folder


def files_of(folder, pattern="*"):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts}


def test_an_installation_makes_the_same_bundle(checkout, tmp_path):
    """Everything is installed."""
    site = installed(checkout, tmp_path / "site")
    assert files_of(site / "chatlm", "*.py") == files_of(CHECKOUT / "chatlm", "*.py")
    assert files_of(site / "chatlm/static") == files_of(CHECKOUT / "static")
    assert files_of(site / "decode_core") == files_of(CHECKOUT / "csrc/decode_core", "*.py*")
    assert {path.name for path in site.iterdir()} == {"chat_server.py", "chatlm", "decode_core"}
    # without bytecode, which is that of equal files: test_bundle.py
    code = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from chatlm.common import bundle; bundle.compiled = lambda files: {}; " \
           "bundle.write_bundle(Path(sys.argv[2]), bundle.Wanted(without_core=True))"
    bundles = []
    for folder in (site, CHECKOUT):
        bundles.append(tmp_path / f"{len(bundles)}.pyz")
        subprocess.run([sys.executable, "-S", "-E", "-c", code, folder, bundles[-1]], check=True, cwd=tmp_path, timeout=60)
    assert bundles[0].read_bytes() == bundles[1].read_bytes()


def other_seen(*arguments, **more):
    """What a program says that looks for another chatlm, without the one that may be in site-packages."""
    return subprocess.run([sys.executable, "-S", *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60, **more).stdout.strip()


def test_another_chatlm_that_differs_is_found(checkout, tmp_path):
    """An equal one is not."""
    site = installed(checkout, tmp_path / "site")
    look = "import sys; sys.path[0] = {!r}; from chatlm.common.program import other_program; print(other_program())"
    ours, theirs, environment = look.format(str(checkout)), look.format(str(site)), os.environ | {"PYTHONPATH": str(site)}
    for changed in ("chatlm/common/log.py", "chat_server.py", "chatlm/new.py"):
        assert other_seen("-c", ours, env=environment, cwd="/") == "None"
        assert other_seen("-c", theirs, cwd=checkout) == "None"
        with open(checkout / changed, "a") as file:
            file.write("# an edit\n")
        assert other_seen("-c", ours, env=environment, cwd="/") == str(site)
        assert other_seen("-c", theirs, cwd=checkout) == str(checkout)       # the installation runs, in the checkout's folder
        shutil.copy(checkout / changed, site / changed)


def test_a_differing_checkout_says_so_in_the_log(checkout, tmp_path, nanochat_fixtures):
    """It differs from the installed chatlm, and the log has one line."""
    site = installed(checkout, tmp_path / "site")
    with open(checkout / "chatlm/common/log.py", "a") as file:
        file.write("# an edit\n")
    environment = {name: value for name, value in os.environ.items() if name != "CHAT_SERVER_DIR"} | {"PYTHONPATH": str(site)}
    log = []
    with server(nanochat_fixtures / "gen5", script=checkout / "chat_server.py", env=environment, log=log) as (process, _):
        assert any(f"the chatlm in {checkout} runs; the one in {site} differs" in line for line in log)       # before its address
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert sum("differs" in line for line in log) == 1


def test_a_bundle_looks_for_no_other_chatlm(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "program_root", lambda: Path(__file__))
    monkeypatch.setattr(sys, "path", ["", str(CHECKOUT)])
    assert program.other_program() is None


@pytest.mark.parametrize("safe", ["", "1"])
def test_children_find_pythons_own_modules_first(safe, tmp_path):
    """The root of a checkout comes first; site-packages, the root of an installation, stays behind Python's library, and
    the current folder is nowhere."""
    root, here = tmp_path / "site", tmp_path / "here"
    shutil.copytree(CHECKOUT / "chatlm", root / "chatlm")
    here.mkdir()
    for name in ("ctypes", "threading", "contextlib", "importlib", "chatlm"):
        (here / f"{name}.py").write_text("raise SystemExit('shadowed')")
    (root / "ctypes.py").write_text("raise SystemExit('shadowed')")
    tell = PROCESS_CODE.partition("from chatlm.common")[0] + "print(*sys.path, sep='\\n')"
    for appended in (False, True):
        start = f"import sys; sys.path.append({str(root)!r})\n" * appended
        found = other_seen("-c", start + tell, root, cwd=here, env=os.environ | {"PYTHONPATH": "/first", "PYTHONSAFEPATH": safe}).split("\n")
        assert found.count(str(root)) == 1 and found.index(str(root)) == (len(found) - 1 if appended else 0)
        assert "/first" in found and str(here) not in found


@pytest.mark.slow
def test_pip_installs_a_command_that_serves(checkout, tmp_path, nanochat_fixtures):
    """It serves from another folder."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--no-deps", "--no-build-isolation", checkout]
    subprocess.run(pip, check=True, timeout=150, env=os.environ | UNCOMPILED, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("CHAT_SERVER_DIR", "PYTHONPATH")}
    log = []
    with server(nanochat_fixtures / "gen5", script=venv / "bin/chat-server", python=venv / "bin/python", env=environment, log=log) as (process, url):
        assert b"page.js" in urllib.request.urlopen(url, timeout=20).read()
        assert "differs" not in "".join(log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
