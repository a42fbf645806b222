"""Garbage collections leave out what was imported."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(code):
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_what_became_garbage_since_is_still_found():
    """Once, when memory is given back; a process that froze nothing freezes nothing then."""
    code = """if True:
        import gc, json, weakref
        from chatlm.common.memory import give_memory_back
        class Knot: pass
        give_memory_back()
        found = [gc.get_freeze_count()]
        knot = Knot()
        knot.itself = knot
        gc.freeze()
        seen = weakref.ref(knot)
        del knot
        gc.collect()
        found.append(seen() is None)
        give_memory_back()
        print(json.dumps([*found, seen() is None, gc.get_freeze_count() > 0, gc.isenabled()]))"""
    assert run(code) == [0, False, True, True, True]


def test_the_front_and_its_children_leave_out_what_was_imported(nanochat_fixtures, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import atexit, gc, sys\natexit.register(lambda: print(gc.get_freeze_count() > 0, file=sys.stderr))\n")
    ours = {"PYTHONPATH": str(tmp_path)}
    words = ["generate", str(nanochat_fixtures / "gen5"), "-p", "a", "--max-tokens", "1"]
    front = subprocess.run([sys.executable, "chat_server.py", *words], capture_output=True, text=True, cwd=ROOT, env=ours, timeout=60)
    assert front.returncode == 0 and front.stderr.splitlines()[-1] == "True", front.stderr
    role = "import sys, socket, os; from chatlm.common.processes.child import run_role; ours, theirs = socket.socketpair(); ours.close(); " \
           "print(run_role('worker', str(theirs.detach()), str(os.getppid())))"
    worker = subprocess.run([sys.executable, "-c", role], capture_output=True, text=True, cwd=ROOT, env=ours, timeout=60)
    assert worker.stdout.split() == ["0"] and worker.stderr.split() == ["True"], worker.stderr
