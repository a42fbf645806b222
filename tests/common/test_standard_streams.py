"""stdin, stdout and stderr that are closed, or on a full disk."""

import subprocess
import sys
from pathlib import Path

import pytest

import chat_server

SCRIPT = Path(chat_server.__file__).resolve()
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
TRY = """import os, sys; from chatlm.common.standard_streams import repair_streams; repair_streams()
file = open(os.devnull); assert file.fileno() > 2, file.fileno()
import subprocess; assert subprocess.run([sys.executable, "-c", "import os; [os.fstat(number) for number in (0, 1, 2)]"]).returncode == 0
for _ in range(10000): print("é" * 10, file=sys.stderr, flush=True)
print("written", flush=True); sys.stdin.read()"""


def shell(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, cwd=SCRIPT.parent)


@pytest.mark.parametrize("redirected", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-", pytest.param("2>/dev/full", marks=needs_full)])
def test_no_file_takes_a_closed_stream_s_place(redirected):
    """No file takes the place of a closed stream, and stderr never fails."""
    done = shell(f"PYTHONIOENCODING=ascii {sys.executable} -c '{TRY}' {redirected} </dev/null" if "<" not in redirected
                 else f"{sys.executable} -c '{TRY}' {redirected}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (done.stdout == "written\n") == (">&-" not in redirected.replace("2>&-", ""))


@needs_full
def test_an_answer_that_cannot_be_written_is_one_line(nanochat_fixtures):
    done = shell(f"{sys.executable} {SCRIPT} generate {nanochat_fixtures / 'gen5'} --prompt hello --max-tokens 5 >/dev/full")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "chat_server: cannot write the answer: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@needs_full
def test_a_full_disk_is_one_line_in_chat_and_check(nanochat_fixtures):
    """Each ends at once: no message after the first is tried."""
    chat = f"printf 'one\\ntwo\\n' | {sys.executable} {SCRIPT} chat {nanochat_fixtures / 'gen5'} --max-tokens 2"
    for command in (chat, f"{sys.executable} {SCRIPT} check"):
        done = shell(f"{command} >/dev/full")
        assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1] == "chat_server: cannot write the answer: No space left on device"


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize("bundled", [False, True])
def test_an_answer_needs_no_stderr(nanochat_fixtures, tmp_path, bundled):
    program = SCRIPT
    if bundled:
        program = tmp_path / "chat_server.pyz"
        shell(f"{sys.executable} {SCRIPT} bundle {program}")
    words = f"generate {nanochat_fixtures / 'gen5'} --prompt hello --max-tokens 5 --temperature 0"
    plain, *others = (shell(f"{sys.executable} {program} {words} {redirected}") for redirected in ("", "2>&-", "<&- 2>&-", "2>/dev/full"))
    assert plain.stdout and all((done.returncode, done.stdout) == (0, plain.stdout) for done in others)
