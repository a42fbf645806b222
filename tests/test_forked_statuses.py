"""How forked processes of tests ended (tests/support/forked.py), although process ids come again: a day of tests starts more than 32,768."""

import os
from pathlib import Path

import pytest

import forked

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")     # the system gives the next number


def test_a_process_with_the_number_of_an_earlier_one_has_its_own_status(tmp_path):
    if not os.access(LAST_PID, os.W_OK):
        pytest.skip("process ids cannot be chosen here")
    script = tmp_path / "ends.py"
    script.write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    with open(os.devnull, "w") as nothing:
        def end_with(status):
            process = forked.fork_front(script, [str(status)], os.environ, nothing.fileno(), nothing.fileno(), forking=False)
            return process.pid, process.wait(60)
        pid, status = end_with(3)
        assert status == 3
        for wanted in range(4, 100):        # another process may take the number first
            LAST_PID.write_text(str(pid - 1))
            again, status = end_with(wanted)
            assert status == wanted
            if again == pid:
                return
    pytest.skip("others took the number each time")
