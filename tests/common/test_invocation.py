"""What messages tell the user to type: the command and the Python that work here, pasted as they stand."""

import os
import re
import shlex
import shutil
import signal
import site
import subprocess
import sys
import venv
from pathlib import Path

import psutil
import pytest

from chatlm.common import invocation
from chatlm.common.errors import PACKAGES
from nightly import WHOLE
from packed import CHECKOUT, bundled  # noqa: F401
from patching import patch
from real_server import copy_program

SAY = "from chatlm.common.invocation import program_command, pip_command, tool_command; " \
      "print(program_command(), pip_command('x'), tool_command('hf'), sep='\\n')"


def made_venv(folder, *packages):
    """A virtual environment with these packages of ours; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    (packages_folder,) = folder.glob("lib/python*/site-packages")
    for package in packages:
        (ours,) = [found for where in site.getsitepackages() if (found := Path(where, package)).exists()]
        (packages_folder / package).symlink_to(ours)
    return folder / "bin/python"


def said(python, root, cwd, path="/usr/bin"):
    """The three commands that messages of a program at `root` name."""
    done = subprocess.run([python, "-c", SAY], cwd=cwd, capture_output=True, text=True, check=True, timeout=60,
                          env={"PATH": str(path), "PYTHONPATH": str(root)})
    return done.stdout.splitlines()


@pytest.fixture
def program(tmp_path):
    """A copy of the program whose virtual environment has nothing."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    copy_program(folder)
    made_venv(folder / ".venv")
    return folder


def test_a_checkout_is_started_by_this_python(program, tmp_path):
    python = program / ".venv/bin/python"
    (program / ".venv/bin/hf").touch(0o755)
    assert said(python, program, program) == [".venv/bin/python chat_server.py", ".venv/bin/python -m pip install x", ".venv/bin/hf"]
    whole = shlex.quote(str(python))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert said(python, program, elsewhere) == [f"{whole} {shlex.quote(str(program / 'chat_server.py'))}", f"{whole} -m pip install x",
                                                     shlex.quote(str(program / ".venv/bin/hf"))]
    assert said(python, program, python.parent)[1:] == ["./python -m pip install x", "./hf"]
    activated = f"{program}/.venv/bin:/usr/bin"
    assert said(python, program, program, activated) == ["python chat_server.py", "python -m pip install x", "hf"]


def test_a_python_that_is_too_old_is_told_of_a_newer_one(program):
    say = "from chatlm.common.invocation import advice_for_old_python; print(advice_for_old_python())"

    def advice(python):
        done = subprocess.run([python, "-c", say], cwd=program, capture_output=True, text=True, check=True,
                              timeout=60, env={"PATH": "/usr/bin", "PYTHONPATH": str(program)})
        return done.stdout.strip()

    assert advice(sys.executable) == "; run `.venv/bin/python chat_server.py` instead"
    assert advice(program / ".venv/bin/python") == ""


def test_an_installation_is_started_by_its_command(program, tmp_path):
    python = made_venv(tmp_path / "other")
    (packages,) = (tmp_path / "other").glob("lib/python*/site-packages")
    copy_program(packages)
    (python.parent / "chat-server").touch(0o755)
    assert said(python, packages, tmp_path)[0] == "other/bin/chat-server"
    assert said(python, packages, tmp_path, python.parent)[0] == "chat-server"


def test_a_bundle_is_started_by_its_file(program, bundled):
    shutil.copy(bundled, program / "chat_server.pyz")
    done = subprocess.run([program / ".venv/bin/python", "chat_server.pyz", "chat", "--help"], cwd=program, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: .venv/bin/python chat_server.pyz chat [MODEL] [flags]") and \
        "\n  .venv/bin/python chat_server.pyz chat --continue" in done.stdout


COMMANDS = ["--port", "0"], ["chat"], ["check"], ["generate", "-p", "Hello"]


def test_missing_libraries_name_the_environment(program, tmp_path):
    """A Python that lacks libraries names the environment beside the script."""
    wrong = made_venv(tmp_path / "wrong")
    for words in COMMANDS if WHOLE else COMMANDS[:2]:
        done = subprocess.run([wrong, "chat_server.py", *words], cwd=program, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
                              env={"PATH": "/usr/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and "Traceback" not in done.stderr and f"{wrong} -m pip install" in last, done.stderr
    shutil.rmtree(program / ".venv")
    made_venv(program / ".venv", *PACKAGES)
    for words in COMMANDS if WHOLE else COMMANDS[2:]:
        done = subprocess.run([wrong, "chat_server.py", *words], cwd=program, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
                              env={"PATH": "/usr/bin", "HOME": str(tmp_path)})
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and "Traceback" not in done.stderr and "`.venv/bin/python chat_server.py`" in last, done.stderr
        assert "pip install" not in last


def test_a_managed_python_gets_an_environment(monkeypatch, tmp_path):
    """A system's Python that takes no packages gets an environment."""
    patch(monkeypatch, invocation, "root_of_program", lambda: tmp_path)
    patch(monkeypatch, invocation, "is_managed", lambda: True)
    (tmp_path / "requirements.txt").touch()
    assert "`python3 -m venv .venv && .venv/bin/pip install --no-compile -c requirements.txt .`" in invocation.install_advice("aiohttp")
    (tmp_path / "requirements.txt").unlink()
    assert ".venv/bin/pip install aiohttp numpy`" in invocation.install_advice("aiohttp", "numpy")


def old_python():
    """A Python 3.9 of this machine, or None."""
    beside = Path(sys.base_prefix).parent.glob("3.9.*/bin/python3.9")     # where pyenv has several
    for python in filter(None, (*map(str, beside), shutil.which("python3.9"))):
        if subprocess.run([python, "--version"], capture_output=True).returncode == 0:
            return python
    return None


@pytest.mark.skipif(old_python() is None, reason="there is no Python 3.9")
def test_an_old_python_names_the_environment(program):
    """The one beside the script."""
    done = subprocess.run([old_python(), "chat_server.py"], cwd=program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("chat_server needs Python 3.10 or newer, and this is 3.9.")
    assert done.stderr.endswith("; run `.venv/bin/python chat_server.py` instead\n")


# Ctrl-C


ENTRY = "import sys; sys.argv[0] = '/x/bin/chat-server'; from chat_server import main; sys.exit(main())"
STARTS = {"script": [CHECKOUT / "chat_server.py"], "command": ["-c", ENTRY]}


def interrupted(start, words, module, ignored=False):
    """(exit status, rest of stderr) of a program that gets Ctrl-C as soon as it has imported a module, and that nothing of it is left."""
    mark = f"{os.getpid()} {start} {module}"
    process = subprocess.Popen([sys.executable, "-X", "importtime", *map(str, STARTS[start]), *words], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"TEST_MARK": mark},
                               preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None)
    try:
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == module:
                break
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:      # a server that does not end would keep its port
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    wait_until_nothing_has(mark)
    # a second process of the program imports too, so a line of these times may be torn
    times = re.compile(r"import time:.*|(?!.*(Interrupt|Error))[\w.:| ]*")
    return process.returncode, "".join(line for line in rest.splitlines(True) if not times.fullmatch(line.rstrip("\n")))


def wait_until_nothing_has(mark):
    left = [each for each in psutil.process_iter() if mark in marks_of(each)]
    assert psutil.wait_procs(left, timeout=30)[1] == []


def marks_of(process):
    try:
        return process.environ().get("TEST_MARK", "")
    except psutil.Error:
        return ""


@pytest.mark.parametrize("start, words, module", [
    ("script", [], "chatlm.common.errors"), ("script", ["chat"], "asyncio"), ("script", ["generate", "-p", "Hello"], "chatlm.cli"),
    ("script", ["check"], "chatlm.front.annexes"), ("command", ["chat"], "chatlm.cli")])
def test_ctrl_c_during_a_start_ends_it_silently(start, words, module):
    status, rest = interrupted(start, words, module)
    assert status in (-signal.SIGINT, 130) and rest == ""       # 130: the command itself was already there to end


@pytest.mark.parametrize("function, words", [
    ("program_of", []), ("with_kept_words", ["chat"]), ("hide_api_keys", ["check", "--api-key", "x"]), ("end_worker_ahead", ["check"]),
    ("parse_command_line", []), ("tell", ["--no-such-flag"])])
def test_ctrl_c_at_any_moment_of_a_command_ends_it_silently(function, words):
    """While each of these runs: until the command starts, and while an error is told."""
    code = ENTRY.replace("sys.exit(main())", f"import chat_server, signal; sys.argv[1:] = {words}; "
                         f"chat_server.{function} = lambda *_: signal.raise_signal(signal.SIGINT); sys.exit(main())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_where_ctrl_c_is_ignored_it_stays_so():
    assert interrupted("script", ["--version"], "chatlm.cli", ignored=True) == (0, "")


STALLED = """
import os, sys, time
if sys.orig_argv[-1] == "check" and "-c" in sys.orig_argv:
    with open(os.environ["TEST_MARK"], "w"):
        time.sleep(60)
"""


def test_ctrl_c_while_the_process_of_a_check_starts(tmp_path):
    """Before code of ours runs in it. It neither says anything nor stays."""
    (tmp_path / "sitecustomize.py").write_text(STALLED)
    os.mkfifo(started := str(tmp_path / "started"))
    process = subprocess.Popen([sys.executable, CHECKOUT / "chat_server.py", "check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=os.environ | {"PYTHONPATH": str(tmp_path), "TEST_MARK": started})
    with open(started):         # as soon as the other process is there
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode in (130, -signal.SIGINT)
    wait_until_nothing_has(started)


def test_ctrl_c_ends_a_kernel_check_without_traceback():
    process = subprocess.Popen([sys.executable, CHECKOUT / "chat_server.py", "check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert process.stdout.readline().startswith("chat_server ")
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode in (130, -signal.SIGINT)
