""".ci/changed.py chooses the tests of a change, .ci/executed.py keeps what they execute, and bench/planted.py plants the faults
that measure it. Here for a small program with a history."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / ".ci"), str(ROOT / "bench")]
from changed import Change      # noqa: E402
from cover import CALLERS, Cover     # noqa: E402
from executed import Executed, read_record, read_run, recorded_cases, silent, spine, write_record       # noqa: E402
from call_recorder import program_file     # noqa: E402
from planted import Places, draw_faults     # noqa: E402
from quick_plugin import quick     # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is missing")

FILES = {
    "chatlm/kitchen/soup.py": '''"""Soup."""
from chatlm.pantry import SALT, Pot


class Deep(Pot):
    depth = 3

    def fill(self):
        return SALT + self.depth


def cook():
    """Make it."""
    def stir():
        return 1
    return stir()
''',
    "chatlm/pantry.py": '''SALT = 1
SPICES = {"salt": SALT}


class Pot:
    def fill(self):
        return 0

    def empty(self):
        return None


def season(name):
    return SPICES[name]
''',
    "chatlm/cellar.py": "def lock():\n    return 0\n",
    "tests/kitchen/test_soup.py": "import spoons\n", "tests/kitchen/test_deep.py": "", "tests/page/test_page.py": "",
    "tests/test_spices.py": "import forks\n", "tests/test_layout.py": "", "tests/test_walls.py": "",
    "tests/support/spoons.py": "", "tests/support/forks.py": "def eat():\n    import spoons\n",
    ".ci/spine": "# always\ntests/test_layout.py\ntests/test_walls.py::test_one\n", "static/page.js": "", "chat_server.py": "",
}
EXECUTED = {
    "tests/kitchen/test_soup.py": Executed(2.0, False, frozenset({("chatlm/kitchen/soup.py", "cook")})),
    "tests/kitchen/test_deep.py": Executed(1.0, True, frozenset({("chatlm/kitchen/soup.py", "Deep.fill"), ("chatlm/pantry.py", "Pot.empty")})),
    "tests/page/test_page.py": Executed(0.5, True, frozenset({("chatlm/kitchen/soup.py", "cook")})),
    "tests/test_spices.py": Executed(3.0, False, frozenset({("chatlm/pantry.py", "season")})),
}
OTHERS = frozenset(("chatlm/other.py", f"f{number}") for number in range(400))      # what a module calls that calls much
SPINE = ["tests/test_layout.py", "tests/test_walls.py::test_one"]


def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "init.defaultBranch=main", *words], cwd=folder, check=True,
                   capture_output=True, env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")})


@pytest.fixture
def program(tmp_path):
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    write_record(EXECUTED, tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "It begins")
    return tmp_path


def chosen(program, path, old, new):
    """What is chosen besides the spine after a change of a file, which need not be committed."""
    text = (program / path).read_text() if (program / path).exists() else ""
    assert old in text
    (program / path).parent.mkdir(parents=True, exist_ok=True)
    (program / path).write_text(text.replace(old, new) if old else text + new)
    places = Change("HEAD", program).choose()
    assert set(SPINE) - set(places) <= {place for place in SPINE if place.partition("::")[0] in places}
    return sorted(set(places) - set(SPINE))


SOUP, DEEP, PAGE, SPICES = EXECUTED


@pytest.mark.parametrize("path, old, new, tests", [
    ("chatlm/kitchen/soup.py", "return stir()", "return stir() + 1", [SOUP, PAGE]),
    ("chatlm/kitchen/soup.py", "return 1", "return 2", [SOUP, PAGE]),                   # a function within
    ("chatlm/kitchen/soup.py", "Make it.", "Make it hot.", []),                         # words that nobody runs
    ("chatlm/kitchen/soup.py", "    return stir()", "    # slowly\n    return stir()", []),
    ("chatlm/kitchen/soup.py", "depth = 3", "depth = 4", [DEEP]),                       # a field: the class's methods
    ("chatlm/kitchen/soup.py", "SALT, Pot", "Pot, SALT", []),
    ("chatlm/kitchen/soup.py", "", "\n\ndef taste():\n    return 1\n", []),             # nobody calls it yet
    ("chatlm/kitchen/soup.py", "def cook():", "def cook(hot=True):", [SOUP, PAGE]),
    ("chatlm/pantry.py", "SALT = 1", "SALT = 2", [DEEP, SPICES]),                       # by way of a table, and of an import
    ("chatlm/pantry.py", "return None", "return 0", [DEEP]),
    ("chatlm/pantry.py", "        return 0", "        return 9", [DEEP, SPICES]),      # nobody has recorded it: its file
    ("chatlm/cellar.py", "return 0", "return 1", [*EXECUTED, "tests/test_walls.py"]),   # nor its file: the nearest room
    ("chatlm/pantry.py", "", "\nprint(SALT)\n", [DEEP, SPICES]),                        # a statement that binds nothing
    ("chatlm/kitchen/soup.py", "    def fill", "    def empty(self):\n        return 1\n\n    def fill", [DEEP]),   # overrides the base's
    ("tests/kitchen/test_soup.py", "", "x = 1\n", [SOUP]),
    ("tests/kitchen/test_new.py", "", "x = 1\n", ["tests/kitchen/test_new.py"]),        # nobody has added it
    ("tests/support/forks.py", "", "x = 1\n", [SPICES]),
    ("tests/support/spoons.py", "", "x = 1\n", [SOUP, SPICES]),                         # which forks import
    ("tests/kitchen/conftest.py", "", "x = 1\n", [DEEP, SOUP]),
    ("static/page.js", "", "x = 1\n", [PAGE]),
    ("docs/api.md", "", "words\n", []),
    ("something.new", "", "words\n", [*EXECUTED, "tests/test_walls.py"]),                # no rule knows it
])
def test_a_change_needs_the_tests_that_see_it(program, path, old, new, tests):
    assert set(chosen(program, path, old, new)) == set(tests)


def record_more(program, executed):
    """More modules of tests, with what they execute."""
    for module in executed:
        (program / module).parent.mkdir(parents=True, exist_ok=True)
        (program / module).write_text("")
    write_record(EXECUTED | executed, program)
    git(program, "add", ".")
    git(program, "commit", "-qm", "More tests")


def test_of_many_callers_those_of_the_room_and_the_most_specific_are_chosen(program):
    """Not all of a hundred modules that start a server."""
    cook = ("chatlm/kitchen/soup.py", "cook")
    large = {f"tests/hall/test_{number}.py": Executed(3.0, True, OTHERS | {cook}) for number in range(30)}
    small = {f"tests/hall/test_small_{number}.py": Executed(3.0, True, frozenset({cook})) for number in range(4)}
    own = {f"tests/kitchen/test_own_{number}.py": Executed(3.0, True, OTHERS | {cook}) for number in range(2)}
    record_more(program, large | small | own)
    found = set(chosen(program, "chatlm/kitchen/soup.py", "return 1", "return 2"))
    assert {SOUP, *small, *own} < found and len(found) == CALLERS


@pytest.mark.parametrize("text, is_about_it", [
    ("from chatlm.kitchen.soup import Deep", True), ("from chatlm.kitchen import pan, soup", True), ("import chatlm.kitchen.soup", True),
    ("from chatlm.kitchen.soups import Deep", False), ("from chatlm.hall import soup", False)])
def test_a_module_that_imports_the_file_is_chosen_before_shorter_ones(program, text, is_about_it):
    cook = ("chatlm/kitchen/soup.py", "cook")
    small = {f"tests/hall/test_small_{number}.py": Executed(1.0, True, frozenset({cook})) for number in range(20)}
    record_more(program, small | {"tests/kitchen/test_large.py": Executed(9.0, True, OTHERS | {cook})})
    (program / "tests/kitchen/test_large.py").write_text(f"{text}\n")
    git(program, "commit", "-qam", "It imports")
    found = chosen(program, "chatlm/kitchen/soup.py", "return 1", "return 2")
    assert ("tests/kitchen/test_large.py" in found) is is_about_it


@pytest.mark.parametrize("text", ["from chatlm import cook_slowly", "assert 'the pot boiled over' in log"])
def test_a_module_that_has_the_function_s_name_or_texts_is_chosen_first(program, text):
    """It asks for what the function does; others only call it in passing."""
    slowly = ("chatlm/kitchen/soup.py", "cook_slowly")
    file = program / "chatlm/kitchen/soup.py"
    file.write_text(f"{file.read_text()}\n\ndef cook_slowly():\n    return 'the pot boiled over;'\n")
    small = {f"tests/hall/test_small_{number}.py": Executed(1.0, True, frozenset({slowly})) for number in range(20)}
    record_more(program, small | {"tests/hall/test_large.py": Executed(90.0, True, OTHERS | {slowly})})
    large = program / "tests/hall/test_large.py"
    change = "chatlm/kitchen/soup.py", "'the pot boiled over;'", "'the pot boiled over;' * 2"
    assert "tests/hall/test_large.py" not in chosen(program, *change)
    file.write_text(file.read_text().replace(change[2], change[1]))
    large.write_text(f"{text}\n")
    git(program, "commit", "-qam", "It asks")
    assert "tests/hall/test_large.py" in chosen(program, *change)


def test_a_field_is_seen_by_those_who_mention_it(program):
    """They need not import its class, and those of its other fields need not run."""
    (program / "chatlm/hall.py").write_text("def look(pot):\n    return pot.depth\n\n\ndef leave(pot):\n    return pot\n")
    record_more(program, {f"tests/test_{name}.py": Executed(1.0, False, frozenset({("chatlm/hall.py", name)}))
                           for name in ("look", "leave")})
    assert chosen(program, "chatlm/kitchen/soup.py", "depth = 3", "depth = 4") == [DEEP, "tests/test_look.py"]


def test_what_every_test_reads_needs_what_calls_most(program):
    assert set(chosen(program, "tests/conftest.py", "", "x = 1\n")) == {DEEP, PAGE, SPICES} | {SOUP}


def test_what_calls_most_functions_is_chosen_within_its_seconds(program):
    """The spine's come first, then those that call most in a second."""
    functions = [("chatlm/other.py", f"f{number}") for number in range(9)]
    record_more(program, {"tests/test_walls.py": Executed(1.0, False, frozenset(functions[:1])),
                          "tests/test_all.py": Executed(40.0, False, frozenset(functions)),
                          "tests/test_most.py": Executed(2.0, False, frozenset(functions[:8])),
                          "tests/test_last.py": Executed(8.0, False, frozenset(functions[8:]))})
    chosen = Cover(program, read_record(program)).broad(20.0)
    assert chosen[0] == "tests/test_walls.py" and {"tests/test_most.py", "tests/test_last.py"} < set(chosen)
    assert "tests/test_all.py" not in chosen


def test_what_is_gone_is_seen_by_those_who_called_it(program):
    (program / "chatlm/kitchen/soup.py").unlink()
    assert set(EXECUTED) - {SPICES} <= set(Change("HEAD", program).choose())


def test_functions_come_first_then_processes_then_the_page(program):
    for path in ("chatlm/kitchen/soup.py", "chatlm/pantry.py"):
        (program / path).write_text((program / path).read_text().replace("return", "return 1 or"))
    order = [place for place in Change("HEAD", program).choose() if place in EXECUTED]
    assert order == [SOUP, SPICES, DEEP, PAGE]


def test_without_a_base_the_last_commit_counts(program):
    (program / "chatlm/pantry.py").write_text(FILES["chatlm/pantry.py"].replace("SPICES[name]", "SPICES.get(name)"))
    git(program, "commit", "-aqm", "Softer")
    assert SPICES in Change(root=program).choose()


def test_the_record_is_read_as_it_was_written(program):
    assert read_record(program) == EXECUTED
    (program / SOUP).unlink()
    write_record({SPICES: EXECUTED[SPICES]}, program)           # the others' files stay; one of a module that is gone does not
    assert read_record(program) == {module: executed for module, executed in EXECUTED.items() if module != SOUP}


@pytest.mark.parametrize("path, file", [
    ("/work/tests/chatlm/cli.py", "chatlm/cli.py"), ("/x/build/lib/chatlm/worker/kernels/report.py", "chatlm/worker/kernels/report.py"),
    ("/x/chat_server.py", "chat_server.py"), ("/home/chatlm/tests/support/pools.py", None), ("/home/chatlm/bench/load.py", None),
    ("/usr/lib/python3.11/json/decoder.py", None),
])
def test_the_program_s_files_are_known_in_any_checkout(path, file):
    """Whatever folder it is in."""
    assert program_file(path) == file


def test_a_record_that_ended_too_early_is_told(program):
    """Its module imports several files and calls nothing of them."""
    for name in "abc":
        (program / f"chatlm/{name}.py").write_text("def f(): pass\n")
    for module in (SOUP, SPICES, DEEP):
        (program / module).write_text("".join(f"from chatlm.{name} import f\n" for name in "abc"))
    run = {SOUP: EXECUTED[SOUP], SPICES: Executed(1.0, False, frozenset({("chatlm/b.py", "f")}))}
    assert silent(run, program) == [SOUP]


def test_what_tests_execute_is_recorded_in_all_processes(tmp_path, monkeypatch):
    """In a thread, in a process that is killed, in a fork, by a fixture of the session, and after a recursion without end, which would
    end a profile; what an import runs is not."""
    (tmp_path / "chatlm").mkdir()
    (tmp_path / "chatlm/__init__.py").write_text("")
    (tmp_path / "chatlm/room.py").write_text("""
def at_import(): pass
at_import()
def called(): pass
def in_thread(): pass
def in_process(): pass
def in_fork(): pass
def in_fixture(): pass
def deep(depth): return deep(depth + 1)
def in_later_test(): pass
class Box:
    def open(self):
        def inner(): pass
        return inner()
""")
    (tmp_path / "conftest.py").write_text("""
import pytest
from chatlm import room

@pytest.fixture(scope="session")
def made():
    room.in_fixture()
    room.called()
""")
    (tmp_path / "test_one.py").write_text("""
import os, subprocess, sys, threading
import pytest
from chatlm import room

def test_calls(made):
    room.Box().open()
    thread = threading.Thread(target=room.in_thread)
    thread.start()
    thread.join()
    if not (child := os.fork()):
        room.in_fork()
        os._exit(0)
    os.waitpid(child, 0)

def test_recursion():
    with pytest.raises(RecursionError):
        room.deep(0)

def test_after_recursion():
    room.in_later_test()

def test_processes():
    code = "import os, signal; from chatlm import room; room.in_process(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code])
""")
    (tmp_path / "test_two.py").write_text("""
import time
import pytest

@pytest.fixture(scope="module")
def shared():
    time.sleep(1.5)

def test_made(made, shared):
    pass

@pytest.mark.parametrize("s", [1.5, 1.6])
def test_long(s):
    time.sleep(s)
""")
    (tmp_path / "record_executed.pth").write_text(f"import os; os.environ.get('RECORD_EXECUTED_NAME') and "
                                                  f"exec(open({str(ROOT / 'tests/support/call_recorder.py')!r}).read(), {{'__name__': 'executed'}})\n")
    (tmp_path / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(tmp_path)!r})\n")
    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-p", "call_recorder_plugin", "."],
                   cwd=tmp_path, check=True, timeout=150,
                   env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests/support'}", "RECORD_EXECUTED": str(tmp_path / "run"),
                                     "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    monkeypatch.setattr("executed.CASE_SECONDS", 1.2)
    run = read_run(tmp_path / "run")
    assert run["test_two.py"].cases.keys() == {"test_long"} and run["test_two.py"].cases["test_long"] >= 1.55
    functions = {module: {name for _, name in executed.functions} for module, executed in run.items()}
    fixture, deep = {"in_fixture", "called"}, {"deep", "in_later_test"}
    assert functions == {"test_one.py": {"Box.open", "in_thread", "in_fork", "in_process", *deep} | fixture, "test_two.py": fixture}
    assert [run[module].processes for module in ("test_one.py", "test_two.py")] == [True, False]


def test_planted_faults_follow_from_the_seed(tmp_path):
    """Each is in a function of its own, and changes what Python runs."""
    for room in ("front/pool", "common/text"):
        shutil.copytree(ROOT / "chatlm" / room, tmp_path / "chatlm" / room)
    faults = draw_faults(tmp_path, 40, seed=3)
    assert faults == draw_faults(tmp_path, 40, seed=3) != draw_faults(tmp_path, 40, seed=4)
    assert len({(fault.path, fault.function) for fault in faults}) == 40
    assert {fault.kind for fault in faults} == {"operator", "constant", "condition", "order", "missing call"}
    assert len({fault.path.rpartition("/")[0] for fault in faults}) == 2


@pytest.mark.parametrize("text, faults", [
    ("def f(x):\n    return x < 1\n", {"x <= 1", "x < 2"}),
    ("def f(x):\n    log.info(x + 1)\n    raise ValueError(x + 1)\n", set()),           # words for people
    ("def f(x, y=1):\n    '''1'''\n    z: Literal[2] = x\n    return z\n", set()),      # no defaults, words, or types
    ("def f(x):\n    if x:\n        x.close()\n", {"if (not (x)):", "        pass"}),
    ("def f(x):\n    a = x\n    b = a\n", {"    b = a\n    a = x"}),
    ("def f(x):\n    a = x\n    b = x\n", set()),                                       # neither needs the other
])
def test_faults_are_planted_where_they_change_something(text, faults, tmp_path):
    planted = [fault for found in Places("a.py", text).found.values() for fault in found]
    for fault in planted:
        (tmp_path / "a.py").write_text(text)
        fault.plant(tmp_path)
        assert any(words in (tmp_path / "a.py").read_text() for words in faults)
    assert len(planted) == len(faults)


def test_quick_takes_some_cases_of_each_function():
    """Of the quickest all, of those that take longer one, of slow ones none; and all of what runs always."""
    cases = [f"tests/test_soup.py::test_salt[{number}]" for number in range(9)]
    others = ["tests/test_soup.py::test_cooks", "tests/test_soup.py::test_one[a]", "tests/test_soup.py::test_one[b]"]

    def chosen(salt_s, *always):
        return quick([*cases, *others], {"tests/test_soup.py::test_salt": salt_s, "tests/test_soup.py::test_cooks": 1.1}, [*always])
    assert chosen(0.0) == {*cases, *others[1:]}
    assert chosen(0.05) == {cases[0], cases[2], cases[4], cases[6], *others[1:]}
    assert chosen(0.7) == {cases[0], *others[1:]}
    assert chosen(1.1) == {*others[1:]}
    assert chosen(1.1, "tests/test_soup.py::test_salt") == {*cases, *others[1:]}
    assert chosen(1.1, "tests/test_soup.py") == {*cases, *others}


def test_what_quick_takes_calls_nearly_all_that_is_recorded():
    """And all of the spine is in it, however slow."""
    record, always = read_record(ROOT), spine(ROOT)
    nodes = [f"{module}::{name}" for module in record for name in re.findall(r"^(?:async )?def (test_\w+)", (ROOT / module).read_text(), re.MULTILINE)]
    chosen = quick(nodes, recorded_cases(ROOT), always)
    assert all(any(node in (place, f"{place}::{node.partition('::')[2]}") for node in chosen) for place in always)
    called = frozenset().union(*(record[module].functions for module in {node.partition("::")[0] for node in chosen}))
    assert len(called) >= 0.9 * len(frozenset().union(*(executed.functions for executed in record.values())))


def test_pytest_runs_some_cases_and_says_how_to_run_the_rest():
    """What two processes collect has to be the same, or xdist stops."""
    def said(*words):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/common/test_schema_rules.py", *words]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RECORD_"))}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150).stdout.splitlines()
    nodes = [line for line in said("--collect-only", "-q") if "::" in line]
    some = quick(nodes, recorded_cases(ROOT), spine(ROOT))
    assert 0 < len(some) < len(nodes)
    lines = said("--quick", "-n", "2")
    assert f" {len(some)} passed" in lines[-1] and any(".ci/run" in line for line in lines)


def test_how_long_cases_take_is_in_the_record(program):
    executed = Executed(9.0, False, frozenset({("chatlm/pantry.py", "f")}), {"test_salt": 1.5, "test_cooks": 0.11})
    record_more(program, {SOUP: executed})
    assert read_record(program)[SOUP] == executed
    assert recorded_cases(program) == {f"{SOUP}::test_salt": 1.5, f"{SOUP}::test_cooks": 0.11}
