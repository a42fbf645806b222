"""Programs of models are judged by whether their tests ran to their end, and leave nothing behind."""

import asyncio
import contextlib
import glob
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import chatlm.terminal.programs as programs
from chatlm.common.errors import ConfigError
from chatlm.terminal.program_runner import MEMORY_BYTES, enter_namespace, remove_folder
from chatlm.terminal.programs import RUNNER, Programs
from judged_programs import ALIKE, GOOD, STRICTER, judged_programs
from nightly import by_day

WITHOUT = RUNNER.replace("main()", "import chatlm.terminal.program_runner as runner; runner.enter_namespace = lambda: False; main()")
QUICK = ("add 0", "add 2", "raises SystemExit(0)", "os._exit(0)", "a main block that exits", "exit()", "a main block", "the function exits",
         "another program in its place", "writes to all files and exits", "an empty folder", "its own check")


BOTH = "in a namespace", "without one"


@pytest.fixture(params=BOTH)
def ways(request, monkeypatch, tmp_path):
    """With what the system offers, and without namespaces; each with an empty folder for temporary files."""
    if request.param == "in a namespace":
        code = "from chatlm.terminal.program_runner import *; print(enter_namespace())"
        if subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout != "True\n":
            pytest.skip("this system allows no namespaces")
    else:
        monkeypatch.setattr(programs, "RUNNER", WITHOUT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "folders"))
    (tmp_path / "folders").mkdir()
    yield request.param
    assert list((tmp_path / "folders").iterdir()) == []


async def verdicts(some):
    runs = Programs()
    found = await asyncio.gather(*(runs(program.program) for program in some))
    return {program.name: verdict for program, verdict in zip(some, found)}


@pytest.mark.parametrize("ways", by_day(BOTH, "in a namespace"), indirect=True)
async def test_a_right_program_ran_its_tests_to_the_end(ways):
    some = [program for program in judged_programs() if program.name in QUICK]
    assert len(some) == len(QUICK) and await verdicts(some) == {program.name: program.right for program in some}


@pytest.mark.slow
async def test_all_recorded_verdicts_hold(ways):
    some = judged_programs()
    assert len(some) > 200 and len({program.name for program in some}) == len(some) and len(STRICTER) > 30 and len(ALIKE) > 60
    assert await verdicts(some) == {program.name: program.right for program in some}


@pytest.mark.slow
@pytest.mark.skipif("NANOCHAT_CHECKOUT" not in os.environ, reason="NANOCHAT_CHECKOUT names no checkout of nanochat")
async def test_nanochat_s_code_gives_the_recorded_verdicts():
    """nanochat's own code gives the verdicts that are recorded for it."""
    path = Path(os.environ["NANOCHAT_CHECKOUT"], "nanochat", "execution.py")
    spec = importlib.util.spec_from_file_location("upstream_execution", path)
    upstream = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    some = judged_programs()
    found = {program.name: upstream.execute_code(program.program).success for program in some}
    assert found == {program.name: program.upstream for program in some}


@pytest.mark.parametrize("program, passes", [
    ("assert __name__ == '__main__'", True), ("raise ValueError", False), ("def f(:", False), ("while True: pass", False), ("import time; time.sleep(60)", False),
    (f"x = bytearray({MEMORY_BYTES})", False), ("import os; os.fork()", False), ("import os; os.kill(os.getppid(), 9)", False), ("input()", False),
    ("import sys; assert 'PATH' in __import__('os').environ and len(__import__('os').environ) < 6", True),
    ("open('x', 'w').write('y' * (64 << 20))", False), ("open('x', 'w').write('y')", True), ("print('x' * 100_000_000)", True), ("\0", False), ("x = '\ud800'", False),
    ("import ctypes, os; ctypes.CDLL(None).kill(os.getpid(), 19)", False), (f"x = '{'y' * 1_000_000}'", True),
    ("import os\nfor n in 'abc': open(n, 'w')\nassert sorted(os.listdir('.')) == ['a', 'b', 'c']", True)])
async def test_a_program_has_limits_and_its_own_folder(program, passes, monkeypatch):
    monkeypatch.setattr(programs, "SECONDS", 60.0 if passes else 2.0)  # what passes may be slow beside others
    assert await Programs()(program) is passes


async def test_nothing_is_said_of_a_program_that_leaves_nothing(capsys):
    assert await Programs()("open('x', 'w').write('y')") is True
    assert capsys.readouterr() == ("", "")


# what a program starts, and what it leaves


def is_held(path):
    """Does a process hold the lock of this file?"""
    return subprocess.run(["flock", "--nonblock", str(path), "true"]).returncode != 0


FORKS = """
import ctypes, fcntl, os, time
held = open({path!r}, 'w')
fcntl.flock(held, fcntl.LOCK_EX)
fork = ctypes.CDLL(None).fork
if fork() == 0:
    os.setsid()
    if fork() == 0:
        os.setsid()
        while True: time.sleep(1)
    while True: time.sleep(1)
"""
SPAWNS = """
import ctypes, fcntl, os
held = open({path!r}, 'w')
fcntl.flock(held, fcntl.LOCK_EX)
os.set_inheritable(held.fileno(), True)
libc, attributes, process = ctypes.CDLL(None), ctypes.create_string_buffer(1024), ctypes.c_int()
libc.posix_spawnattr_init(attributes)
libc.posix_spawnattr_setflags(attributes, 0x80)  # POSIX_SPAWN_SETSID
words = (ctypes.c_char_p * 3)(b'sleep', b'600', None)
assert libc.posix_spawn(ctypes.byref(process), b'/bin/sleep', None, attributes, words, None) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends what left its session")
@pytest.mark.parametrize("ways, program, ends", by_day(
    itertools.product(BOTH, [FORKS, SPAWNS], ["", "raise ValueError", "while True: pass", "os._exit(0)", "ctypes.CDLL(None).abort()"]),
    (BOTH[0], FORKS, "while True: pass"), (BOTH[0], SPAWNS, ""), (BOTH[1], FORKS, "raise ValueError"), (BOTH[1], SPAWNS, "os._exit(0)"),
    (BOTH[1], FORKS, "ctypes.CDLL(None).abort()")), indirect=["ways"])
async def test_processes_in_own_sessions_end_too(ways, tmp_path, monkeypatch, program, ends):
    """Processes in sessions of their own end with the program."""
    monkeypatch.setattr(programs, "SECONDS", 3.0 if "while" in ends else 60.0)
    path = tmp_path / "held"
    assert await Programs()(program.format(path=str(path)) + ends) is (ends == "")
    assert path.exists() and not is_held(path)


SIGNAL = """
import ctypes
libc = ctypes.CDLL(None)
pidfd = libc.syscall(434, {process}, 0)                         # pidfd_open
assert pidfd >= 0 and libc.syscall(424, pidfd, 0, None, 0) == 0  # pidfd_send_signal
"""


@pytest.mark.parametrize("ways", ["in a namespace"], indirect=True)
async def test_a_program_signals_nothing_outside(ways):
    """A program in a namespace cannot signal what is outside."""
    assert await Programs()(SIGNAL.format(process="__import__('os').getpid()")) is True
    assert await Programs()(SIGNAL.format(process=os.getpid())) is False
    everything = "import ctypes\nctypes.CDLL(None).kill(-1, 9)"  # all that it can see: nothing but itself and process 1
    assert await Programs()(everything) is True
    assert await Programs()("import os\nassert os.getppid() == 1") is True


async def test_a_program_that_ends_its_runner_is_wrong(ways):
    """A program that ends its runner is wrong and leaves nothing."""
    parent = "import ctypes, os, time\nctypes.CDLL(None).kill(os.getppid(), 9)\ntime.sleep(0.2)"
    assert await Programs()(parent) is (ways == "in a namespace")  # there its parent takes no signals from it


TRACES = "import ctypes, os\nlibc = ctypes.CDLL(None)\nassert libc.ptrace(16, os.getppid(), 0, 0) == 0\n"
STOPS = "import ctypes, os\nassert ctypes.CDLL(None).kill(os.getppid(), 19) == 0\n"


@pytest.mark.parametrize("ways, program, ends", by_day(
    itertools.product(BOTH, [TRACES, STOPS], ["while True: pass", "os._exit(0)", ""]),
    (BOTH[0], TRACES, "while True: pass"), (BOTH[0], STOPS, ""), (BOTH[1], TRACES, "os._exit(0)"), (BOTH[1], STOPS, "")), indirect=["ways"])
async def test_a_program_holds_up_no_other(ways, monkeypatch, program, ends):
    monkeypatch.setattr(programs, "SECONDS", 1.0)
    monkeypatch.setattr(programs, "PATIENCE_S", 3.0)
    verdict = await Programs()(program + ends)
    assert verdict is False or (ends, program) == ("", STOPS) and ways == "in a namespace"   # process 1 takes no signals


DEEP = """
import os
here = os.open('.', 0)
for n in range(1200):
    os.mkdir('a', 0o700, dir_fd=here)
    os.close(os.open('file', os.O_CREAT, dir_fd=here))
    below = os.open('a', 0, dir_fd=here)
    os.close(here)
    here = below
"""


async def test_a_folder_goes_however_deep_it_is(ways, monkeypatch):
    monkeypatch.setattr(programs, "SECONDS", 60.0)
    assert await Programs()(DEEP) is True
    odd = "import os\nfor n in range(20):\n    os.makedirs(f'{n}/x')\n    os.symlink('/', f'{n}/root')\n    os.mkfifo(f'{n}/fifo')\nos.mkdir('none', 0)\nos.mkdir(b'\\xff')"
    assert await Programs()(odd) is True


def test_removing_a_folder_takes_no_other_along(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").write_text("kept")
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "mine").symlink_to(tmp_path / "mine")
    (folder / "a" / "b" / "file").symlink_to(tmp_path / "mine" / "kept")
    assert remove_folder(str(folder)) and not folder.exists() and (tmp_path / "mine" / "kept").read_text() == "kept"
    assert remove_folder(str(folder))       # it is gone already
    folder.symlink_to(tmp_path / "mine")
    assert remove_folder(str(folder)) and (tmp_path / "mine" / "kept").exists()
    (tmp_path / "file").write_text("")
    assert not remove_folder(str(tmp_path / "file"))


async def test_a_broken_off_run_ends_its_program(ways, tmp_path):
    path = tmp_path / "held"
    running = asyncio.create_task(Programs()(FORKS.format(path=str(path)) + "while True: pass"))
    while not (path.exists() and is_held(path)):
        await asyncio.sleep(0.02)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert not is_held(path)


def test_a_killed_command_takes_its_programs_along(ways, tmp_path):
    path, code = tmp_path / "held", (
        "import asyncio, sys, tempfile; tempfile.tempdir = sys.argv[1]; import chatlm.terminal.programs as programs; programs.RUNNER = sys.argv[2]; "
        "asyncio.run(programs.Programs()(sys.argv[3]))")
    words = str(tmp_path / "folders"), programs.RUNNER, FORKS.format(path=str(path)) + "while True: pass"
    with subprocess.Popen([sys.executable, "-c", code, *words]) as command:
        while not (path.exists() and is_held(path)):
            time.sleep(0.02)
        command.kill()
    while is_held(path) or list((tmp_path / "folders").iterdir()):  # the test's limit of time ends this
        time.sleep(0.02)


async def test_a_machine_without_sandboxes_judges_nothing(monkeypatch, tmp_path):
    """A machine that can run none is named and no program is judged."""
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="programs need a temporary folder: No such file"):
        await Programs()(GOOD)
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(programs.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ConfigError, match="cannot start .*no-python: No such file"):
        await Programs()(GOOD)
    monkeypatch.undo()
    broken = RUNNER.replace("main()", "import chatlm.terminal.program_runner as r; r.run_program = r.enter_namespace = None; main()")
    monkeypatch.setattr(programs, "RUNNER", broken)
    with pytest.raises(ConfigError, match="cannot run programs here: .*TypeError"):
        await Programs()(GOOD)


async def test_a_full_disk_is_not_the_program_s_fault(ways, monkeypatch, small_disk):
    folder, sized = small_disk
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert await Programs()(GOOD) is True
    with pytest.raises(ConfigError, match="cannot run programs here: .*No space left on device"):
        await Programs()(f"x = '{'y' * 100_000}'")
    (folder / "filling").write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize))
    with pytest.raises(ConfigError, match="No space left on device"):
        await Programs()(GOOD)
    assert os.listdir(folder) == ["filling"]


async def test_a_failed_fork_is_not_the_program_s_fault(ways, monkeypatch):
    """A process that cannot be started is not the program's fault."""
    broken = programs.RUNNER.replace("; main()", "; import chatlm.terminal.program_runner as r; r.run_program = None; main()")
    monkeypatch.setattr(programs, "RUNNER", broken)
    with pytest.raises(ConfigError, match="cannot run programs here: "):
        await Programs()(GOOD)
