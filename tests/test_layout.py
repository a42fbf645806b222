"""The program's modules, functions and classes keep their shape."""

import ast
import importlib
import inspect
import pickle
import pkgutil
import re
from functools import cache
from pathlib import Path

import chat_server
import chatlm
from chatlm.common.config import FLAGS, Settings

ROOT = Path(chat_server.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "chat_server.py", *sorted((ROOT / "chatlm").rglob("*.py"))]}


@cache
def trees():
    return {path: ast.parse(text) for path, text in SOURCES.items()}


@cache
def all_nodes():
    return [node for tree in trees().values() for node in ast.walk(tree)]


def nodes(*kinds):
    return [node for node in all_nodes() if isinstance(node, kinds)]


def test_functions_have_at_most_80_lines():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)}
    assert len(lengths) > 80
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def our_classes():
    names = [module.name for module in pkgutil.walk_packages(chatlm.__path__, "chatlm.")]
    modules = [chat_server, *map(importlib.import_module, names)]
    return {value for module in modules for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__}


def shape(function):
    """How it is called: each parameter's name, kind and whether it may be left out; and whether it is awaited or iterated."""
    calls = [(each.name, each.kind, each.default is each.empty) for each in inspect.signature(function).parameters.values()]
    return calls, [is_one(function) for is_one in (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)]


def accidents(kind):
    """What a class replaces of a base class and probably does not mean to."""
    for name, own in vars(kind).items():
        base = next((vars(each)[name] for each in kind.__mro__[1:-1] if name in vars(each)), own)
        if base is own or re.fullmatch("_.*_", name):
            continue
        if inspect.isfunction(base) and not (inspect.isfunction(own) and shape(own) == shape(base)):
            yield kind.__name__, name
        elif inspect.isfunction(own) and not inspect.isroutine(base) and base is not None:     # C's functions have no shape
            yield kind.__name__, name
        elif name.startswith("_") and inspect.isfunction(own):     # a private name looks free to who writes the subclass
            yield kind.__name__, name


def hidden_methods(node, kind):
    """Methods that an attribute of the same name hides in each object."""
    stored = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
              and isinstance(each.value, ast.Name) and each.value.id == "self"}
    return {(kind.__name__, name) for name in stored if inspect.isfunction(inspect.getattr_static(kind, name, None))}


def test_no_class_replaces_a_method_by_accident():
    """The method is its base's."""
    classes = our_classes()
    assert len(classes) > 100 and [each for kind in classes for each in accidents(kind)] == []
    defined = [(node, kind) for node in nodes(ast.ClassDef) for kind in classes if kind.__name__ == node.name]
    assert set().union(*(hidden_methods(node, kind) for node, kind in defined)) == set()
    for node, _ in defined:
        names = [item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and not item.decorator_list]
        assert len(names) == len(set(names)), node.name


def test_the_accidents_that_happen_are_found():
    class Base:
        place = None
        def take(self, job): pass
        async def live(self): pass
        def _go(self): pass
        def ready(self): pass

    class Same(Base):
        def take(self, job): return 1
        async def live(self): return 2
        def place(self, job): pass

    assert list(accidents(Same)) == []
    for body in ({"take": lambda self, nodes: 0}, {"take": lambda self, job=None: 0}, {"live": lambda self: 0}, {"_go": lambda self: 0}, {"ready": True},
                 {"ready": property(lambda self: 0)}):
        assert list(accidents(type("Other", (Same,), body))) == [("Other", *body)]
    [node] = ast.parse("class Base:\n  def __init__(self):\n    self.other, self.take = 1, 2").body
    assert hidden_methods(node, Base) == {("Base", "take")}


def test_every_background_task_is_supervised():
    """If nobody reads a task's exception, the server waits for ever: tasks are `supervised` or awaited."""
    awaited = {"first_of", "all_of", "interruptible", "_run", "nearest", "embedded", "answer_lines", "expect", "_work", "_begin_lines", "_events", "_within_memory", "_outdated", "run_to_end"}     # these read the results of their tasks
    begins_one = re.compile("create_task|ensure_future")
    walked = [node for path, tree in trees().items() if begins_one.search(SOURCES[path]) for node in ast.walk(tree)]
    functions = [node for node in walked if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(functions) > 80
    for function in functions:
        if function.name not in awaited:
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if getattr(call.func, "attr", "") in ("create_task", "ensure_future"):
                    work = call.args[0]
                    assert isinstance(work, ast.Call) and work.func.id == "supervised", call.lineno


def test_flags_have_unique_names():
    """Their settings cross a pipe."""
    names = [flag.field for flag in FLAGS]
    assert len(set(names) | {"command", "model", "keys"}) == len(names) + 3
    settings = Settings(model="m", port=1)
    assert pickle.loads(pickle.dumps(settings)) == settings != Settings()


def test_nothing_names_a_registry_or_a_model_hub():
    for path in ROOT.rglob("*"):
        ours = not {".venv", "vendor"} & set(path.parts) and not any(part.startswith("build") for part in path.parts)
        if ours and path.suffix in (".py", ".md", ".toml", ".js", ".mjs", ".json", ".html", ".txt"):
            hosts = re.findall(r"(?:py" + r"pi\.org|files\.python" + r"hosted|registry\.npm" + r"js|huggingface\.c" + r"o/)",
                               path.read_text(encoding="utf-8", errors="replace"))
            assert hosts == [], path


def test_what_tests_share_is_in_the_support_folder():
    tests = Path(__file__).parent
    stems = {path.stem for path in tests.rglob("*.py") if path.parent.name != "support"}
    for path in tests.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if stems.isdisjoint(re.findall(r"\bfrom\s+(\w+)", text)):       # to parse all takes seconds
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in stems, path


def test_lines_have_at_most_110_columns():
    assert [(path.name, number) for path, text in SOURCES.items() for number, line in enumerate(text.split("\n"), 1) if len(line.partition("  # pyright: ignore")[0]) > 110] == []
