""".ci/changed.py chooses the tests of a change, `--quick` those that need no other process, and bench/planted.py plants the faults that judge both."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / ".ci"), str(ROOT / "bench")]
from changed import Change      # noqa: E402
from planted import Places, draw_faults     # noqa: E402
import quick_plugin     # noqa: E402

SOUP, DEEP, SPICES, PAGE = "tests/kitchen/test_soups.py", "tests/kitchen/test_deep.py", "tests/test_spices.py", "tests/page/test_page.py"
FILES = {
    "chatlm/kitchen/soup.py": "from chatlm.pantry import season\n\n\ndef cook():\n    return season('salt')\n",
    "chatlm/pantry.py": "SPICES = {'salt': 1}\n\n\ndef season(name):\n    return SPICES[name]\n",
    SOUP: "from chatlm.kitchen.soup import cook\n", DEEP: "import spoons\n", SPICES: "from chatlm.pantry import season\n", PAGE: "",
    "tests/support/spoons.py": "from chatlm.kitchen import soup\n", "tests/test_walls.py": "", "static/page.js": "", "docs/page.md": "",
    ".ci/spine": "# always\ntests/test_walls.py::test_one\n",
}


def git(folder, *words):
    settings = "user.name=x", "user.email=x@y", "commit.gpgsign=false"
    words = ["git", *(word for each in settings for word in ("-c", each)), *words]
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not shutil.which("git"), reason="git is missing")
@pytest.mark.parametrize("path, old, new, first", [
    ("chatlm/kitchen/soup.py", "'salt'", "'pepper'", [SOUP]),
    ("chatlm/pantry.py", "[name]", "[name.lower()]", [SPICES]),
    ("chatlm/pantry.py", "return", "# why\n    return", []),                # nothing that runs
    ("tests/support/spoons.py", "soup", "soup as soups", [DEEP]),
    (SPICES, "season", "season as seasoned", [SPICES]),
    ("static/page.js", "", "let x", [PAGE]),
    ("docs/page.md", "", "more", []),
])
def test_a_change_needs_first_what_is_nearest_to_it(tmp_path, path, old, new, first):
    """And the spine, whatever changed."""
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / path).write_text(FILES[path].replace(old, new, 1) if old else new)
    chosen = Change("HEAD", tmp_path).choose()
    spine = "tests/test_walls.py::test_one"
    assert chosen[:len(first)] == first and (spine in chosen or "tests/test_walls.py" in chosen)
    assert first or chosen == [spine]
    git(tmp_path, "commit", "-qam", "two")
    assert Change(root=tmp_path).choose() == chosen       # the last commit, where nothing is followed


def alone():
    return os.getpid()


def child():
    return subprocess.run(["true"], check=True)


class Child:
    def start(self):
        return child()


def through_a_class():
    return Child().start()


def test_quick_takes_some_cases_of_what_needs_no_other_process():
    needs = quick_plugin.Needs(ROOT)
    reached = {function.__name__: needs.reached(function) for function in (alone, child, through_a_class)}
    nodes = {f"a.py::test_alone[{number}]": reached["alone"] for number in range(40)}
    nodes |= {"a.py::test_child": reached["child"], "a.py::test_class": reached["through_a_class"]}
    nodes |= {f"a.py::test_model[{number}]": {"torch.nn"} for number in range(3)}
    assert quick_plugin.quick(nodes, []) == {*(f"a.py::test_alone[{number}]" for number in (0, 20)), "a.py::test_model[0]"}
    assert quick_plugin.quick(nodes, ["a.py"]) == {*nodes}
    assert "a.py::test_child" in quick_plugin.quick(nodes, ["a.py::test_child"])


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
