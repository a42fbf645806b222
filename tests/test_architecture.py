"""The map, docs/architecture.md and docs/changes.md name what is there: each path exists, and
each name is
defined where they say."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from chatlm.front.annexes import ANNEXES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
MAP = (ROOT / "docs/map.md").read_text(encoding="utf-8")
CHANGES = dict(
    re.findall(
        r"^\| (?!what \|)([a-z][^|]+) \| (.*) \|$",
        (ROOT / "docs/changes.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)
MODULES = [ROOT / "chat_server.py", *sorted((ROOT / "chatlm").rglob("*.py"))]
FILE = re.compile(r"[\w./-]+(?:/|\.(?:py|md|js|css|html|h|def|cpp|ini|toml))")


@cache
def definitions(path: Path) -> set[str]:
    """What a module defines: functions, constants, classes with their methods and attributes."""
    found = set()

    def read(body, prefix):
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = (
                [node.name]
                if hasattr(node, "name")
                else [
                    each.id
                    for target in filter(None, targets)
                    for each in ast.walk(target)
                    if isinstance(each, ast.Name)
                ]
            )
            found.update(prefix + name for name in names)
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{node.name}.")

    read(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def defines(place: Path, name: str) -> bool:
    if place.is_dir():
        return any(defines(path, name) for path in place.rglob("*.py"))
    if place.suffix == ".py":
        return name in definitions(place)
    return (
        re.search(
            rf"\b(?:const|let|function|class|struct|enum class|enum) {name}\b",
            place.read_text(encoding="utf-8"),
        )
        is not None
    )


def named(text: str) -> list[tuple[str, str]]:
    """(place, name) of each name in backticks, which follows its place; a place without names comes with
    ""."""
    found, place = [], ""
    for word in re.findall(r"`([^`\n]+)`", text):
        if FILE.fullmatch(word):
            place = word
            found.append((place, ""))
        elif re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)?", word) and place:
            found.append((place, word))
    return found


def path_of(place: str) -> Path:
    """A module of tests may be named without its folder."""
    return next(ROOT.glob(f"tests/**/{place}"), ROOT / place) if place.startswith("test_") else ROOT / place


def wrong(text: str) -> list[tuple[str, str]]:
    return [
        (place, name)
        for place, name in named(text)
        if not path_of(place).exists() or name and not defines(path_of(place), name)
    ]


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_touches_what_the_table_says(what):
    places = named(CHANGES[what])
    assert len(places) > 1 and wrong(CHANGES[what]) == []


def hunks(text: str) -> list[tuple[str, str, str]]:
    """(file, the lines that a hunk expects in it, those that it leaves) of each hunk in the diffs of a
    document, but for new files."""
    found, path = [], ""
    for block in re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^@@.*\n|^(?=--- )", block, flags=re.MULTILINE):
            lines = part.splitlines()
            if name := re.search(r"^--- (\S+)\n", part):
                path = name[1].removeprefix("a/")
            elif path != "/dev/null" and lines:
                before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " -")
                after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " +")
                found.append((path, before, after))
    return found


def fits(text: str, before: str, after: str) -> bool:
    """A hunk fits if it can be applied, and if it has been: who follows the document runs these tests too."""
    return text.count(before) == 1 or text.count(after) == 1


def test_the_diffs_of_worked_changes_still_fit():
    diffs = hunks((ROOT / "docs/changes.md").read_text(encoding="utf-8"))
    assert len(diffs) > 10
    for path, before, after in diffs:
        assert fits((ROOT / path).read_text(encoding="utf-8"), before, after), (path, before)


def test_a_diff_that_no_longer_fits_is_found():
    ((path, before, after),) = hunks(
        "```diff\n--- a/chat_server.py\n+++ b/chat_server.py\n@@ -1 +1 @@\n kept\n-old\n+new\n```\n"
    )
    assert (path, before, after) == ("chat_server.py", "kept\nold\n", "kept\nnew\n")
    assert fits("kept\nold\n", before, after) and fits("kept\nnew\n", before, after)
    assert not fits("kept\nother\n", before, after) and not fits("kept\nold\nkept\nold\n", before, after)


def test_a_name_that_is_not_there_is_found():
    assert (
        wrong(
            "`chatlm/front/front.py`: `ROUTES`, `Front.handle_answer`; `chatlm/common/`: `FLAGS`;"
            " `static/parts.js`: `TEXT`"
        )
        == []
    )
    assert (
        wrong("`chat_server.py`: `FLAGS`")
        and wrong("`chatlm/front/`: `ModelSpec`")
        and wrong("`chatlm/nowhere.py`")
        and wrong("`static/parts.js`: `ROUTES`")
        and wrong("`csrc/cpu/tiles/tiles.h`: `Nothing`")
        and wrong("`test_nothing.py`")
    )


CHECKED = ["In short", "Processes", "One answer, by room", "Exactness and failover"]
PROSE = [
    "The catalogue",
    "Versions",
    "Downloads",
    "Adapters",
    "Texts beside answers",
    "Prompts beside answers",
    "What is kept",
    "Work that nobody waits for",
    "Prefixes that outlive their worker",
]


@pytest.mark.parametrize("title", PROSE)
def test_names_in_prose_are_in_the_modules_named(title):
    """They are in one of the modules that it names."""
    text = re.sub("`linear`", "", SECTIONS[title])  # an op
    places = {path_of(place) for place, _ in named(text)}
    assert (
        len(places) > 1
        and [name for _, name in named(text) if name and not any(defines(place, name) for place in places)]
        == []
    )


@pytest.mark.parametrize("title", CHECKED)
def test_the_other_sections_name_what_is_there(title):
    text = re.sub(
        "`(Settings|row_invariant|chat|generate)`", "", SECTIONS[title]
    )  # words of users, a name said in passing
    assert named(text) and wrong(text) == []


def test_the_map_names_what_is_there():
    text = re.sub("`(Settings|chat|generate)`", "", MAP)  # words of users, a name said in passing
    assert len(named(text)) > 30 and wrong(text) == []
    drawn = re.findall(
        r"\b[A-Z][a-z]\w+\.\w+|\b[A-Z][a-z]+[A-Z]\w+|\b[a-z]+(?:_[a-z]+)+\b", MAP.split("```")[1]
    )
    known = {"OpenAI"} | {name for path in MODULES for name in definitions(path)}
    assert len(drawn) > 15 and [name for name in drawn if name not in known] == []


def test_the_page_of_loading_names_what_is_there():
    words = named((ROOT / "docs/loading.md").read_text(encoding="utf-8"))
    assert len(words) > 40 and [place for place, _ in words if not path_of(place).exists()] == []
    assert [name for _, name in words if name and not defines(ROOT / "chatlm", name)] == []


def test_steps_of_usual_changes_name_what_is_there():
    text = (ROOT / "docs/changes.md").read_text(encoding="utf-8")
    steps = text.split("\n## Step by step\n")[1].split("\n## ")[0]
    assert len(named(steps)) > 30 and wrong(steps) == []


def test_the_life_of_a_request_names_what_is_there():
    life = SECTIONS["The life of a request"].split("In the front:")[1]
    places = [(place, name) for place, name in named(life) if name]
    assert wrong(life) == [] and len(places) > 40


def test_every_room_is_on_the_map():
    """An annex is in the table of annexes; a folder of a room's folder is in its row."""
    rooms = {
        f"{path.parent.relative_to(ROOT)}/"
        for path in MODULES
        if path.name == "__init__.py" and 1 < len(path.parent.relative_to(ROOT).parts) < 5
    }
    listed = {place for place, _ in named(MAP)}
    assert rooms <= listed


def test_every_role_is_in_the_table_of_processes():
    start = ast.parse((ROOT / "chatlm/common/processes/child.py").read_text(encoding="utf-8"))
    (roles,) = (
        ast.literal_eval(node.value)
        for node in start.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ROLES"
    )
    rows = re.findall(r"^\| (\w+) \| `([\w/]+)\.py`: `(\w+)` \|", SECTIONS["Processes"], re.MULTILINE)
    places = {role: f"{module.replace('/', '.')}:{function}" for role, module, function in rows if role != "front"}
    of_annexes = {role for role, place in places.items() if place.startswith("chatlm.front.annexes.")}  # named by their places
    assert {role: place for role, place in places.items() if role not in of_annexes} == roles


def test_each_folder_of_tests_is_named_like_what_it_tests():
    for package in ("common", "worker", "front", "export", "terminal"):
        for folder in (path for path in (ROOT / "tests" / package).rglob("*") if any(path.glob("test_*.py"))):
            assert (ROOT / "chatlm" / folder.relative_to(ROOT / "tests")).is_dir(), folder


def test_the_page_of_loading_names_every_class_of_stored_models():
    """And where it says, and how many there are."""
    text = (ROOT / "docs/loading.md").read_text(encoding="utf-8")
    folder = ROOT / "chatlm/worker/weights"
    steps = {"shapes", "storage", "targets", "tensors", "text", "purpose", "draft_head", "report"}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")}
    classes = {
        node.name: (path, node)
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }

    def has(node):
        own = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        return own.union(
            *(has(classes[base.id][1]) for base in node.bases if getattr(base, "id", "") in classes)
        )

    stored = {name: path for name, (path, node) in classes.items() if steps <= has(node)}
    del stored["StoredModel"]
    table = named(text.split("| becomes a |")[1].split("\n\n")[0])
    places = {name: ROOT / place for place, name in table if name in stored}
    [count] = re.findall(r"There are (\w+) classes of these", text)
    assert places == stored and ["one", "two", "three", "four", "five"][len(stored) - 1] == count


def test_children_with_a_pipe_join_their_parent():
    """The others do not, as the section says."""
    joins = {
        role: "join_parent(" in source_of(module, function)
        for role, module, function in re.findall(
            r"^\| (\w+) \| `([\w/.]+)`: `(\w+)` \|", SECTIONS["Processes"], re.MULTILINE
        )
    }
    piped = {
        line.split("|")[1].strip()
        for line in SECTIONS["Processes"].splitlines()
        if re.search(r"_PIPE` \|$", line)
    }
    assert {role for role, joined in joins.items() if joined} == piped


def source_of(module, function):
    """Of a role's function, or of the one that it is made of."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    [found] = [
        node
        for node in ast.walk(tree)
        if getattr(node, "name", "") == function
        or isinstance(node, ast.Assign)
        and getattr(node.targets[0], "id", "") == function
    ]
    if isinstance(found, ast.Assign):
        return source_of("chatlm/worker/entry.py", found.value.args[0].id)
    return ast.unparse(found)


def test_the_map_has_every_annex():
    table = MAP.split("| annex, by its folder | asked for by |")[1].split("\n\n")[0].lower()
    assert [
        annex.name
        for annex in ANNEXES
        if {
            "conversation log": "conversation_log",
        }.get(annex.name, annex.name)
        not in table
    ] == []
