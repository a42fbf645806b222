"""Garbage collections pause while modules are imported, and go on afterwards."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(code):
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_they_go_on_after_an_import_that_fails():
    code = """if True:
        import gc, json
        from chatlm.common.memory import uncollected
        found = []
        try:
            with uncollected():
                found.append(gc.isenabled())
                import no_such_module
        except ImportError:
            found.append(gc.isenabled())
        print(json.dumps([*found, gc.get_freeze_count() > 0]))"""
    assert run(code) == [False, True, True]


def test_what_became_garbage_since_is_still_found():
    """Once, when memory is given back; a process that froze nothing freezes nothing then."""
    code = """if True:
        import gc, json, weakref
        from chatlm.common.memory import give_memory_back, uncollected
        class Knot: pass
        give_memory_back()
        found = [gc.get_freeze_count()]
        with uncollected():
            knot = Knot()
            knot.itself = knot
        seen = weakref.ref(knot)
        del knot
        gc.collect()
        found.append(seen() is None)
        give_memory_back()
        print(json.dumps([*found, seen() is None, gc.get_freeze_count() > 0, gc.isenabled()]))"""
    assert run(code) == [0, False, True, True, True]


def test_the_front_and_its_children_collect_once_they_run(tmp_path):
    """Whatever a process of ours imports, it comes to its work with collections on."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, gc, sys\natexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 0, file=sys.stderr))\n")
    ours = {"PYTHONPATH": str(tmp_path)}
    front = subprocess.run([sys.executable, "chat_server.py", "--version"], capture_output=True, text=True, cwd=ROOT, env=ours, timeout=60)
    assert front.stdout and front.stderr.split() == ["True", "True"]
    role = "import sys, socket, os; from chatlm.common.processes.child import run_role; ours, theirs = socket.socketpair(); ours.close(); " \
           "print(run_role('worker', str(theirs.detach()), str(os.getppid())))"
    worker = subprocess.run([sys.executable, "-c", role], capture_output=True, text=True, cwd=ROOT, env=ours, timeout=60)
    assert worker.stdout.split() == ["0"] and worker.stderr.split() == ["True", "True"], worker.stderr
