"""chat_server.py reads from top to bottom: banners in order, and a manual whose names exist."""

import ast
import inspect
import pickle
import re
import symtable
import sys
from pathlib import Path

import chat_server

SOURCE = Path(chat_server.__file__).read_text(encoding="utf-8")
SECTIONS = {
    "shared": ["config", "errors and logs", "messages", "text", "finding a model", "processes"],
    "worker": ["kv cache", "scheduler", "model and steps", "reference ops", "reference sampling, and the choice of kernels", "weights",
               "engine", "ranks", "worker process"],
    "front": ["admission", "pool", "bodies in", "answers out", "server"],
    None: ["command line and terminal"]}
BANNER = re.compile(r"^# -{50}\n# (\d+)\. ([a-z, ]+)(?:: [^\n]*?)?(?:   \[([a-z]+)\])?\n# -{50}\n", re.MULTILINE)


def test_the_banners_are_the_table_of_contents():
    wanted = [(title, house) for house, titles in SECTIONS.items() for title in titles]
    assert [(int(number), title.strip(), house or None) for number, title, house in BANNER.findall(SOURCE)] == \
        [(number, title, house) for number, (title, house) in enumerate(wanted, 1)]


def global_names(table):
    """The names of the module that a function or class uses, at any depth; annotations are not looked at."""
    used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return used.union(*map(global_names, table.get_children()))


def test_neither_house_names_anything_of_the_other():
    starts = [(SOURCE.count("\n", 0, banner.start()) + 1, banner.group(3)) for banner in BANNER.finditer(SOURCE)]
    lines = {line: house for (line, house), (end, _) in zip(starts, [*starts[1:], (SOURCE.count("\n") + 1, None)])
             for line in range(line, end)}
    houses = {}
    for node in ast.parse(SOURCE).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [each.id for target in filter(None, targets) for each in ast.walk(target)
                                                           if isinstance(each, ast.Name)]
        houses |= dict.fromkeys(names, lines.get(node.lineno))
    allowed = {"shared": {"shared"}, "worker": {"shared", "worker"}, "front": {"shared", "front"}}
    wrong = [(table.get_name(), name) for table in symtable.symtable(SOURCE, "chat_server.py", "exec").get_children()
             for name in global_names(table) if houses.get(name) and houses.get(name) not in allowed.get(houses.get(table.get_name()), {None, *SECTIONS})]
    assert len(houses) > 500 and wrong == []


def test_the_life_of_a_request_names_real_functions():
    life = chat_server.__doc__.split("Life of a request")[1].split("Glossary")[0]
    names = re.findall(r"[A-Za-z_]+(?:\.[a-z_]+)?", re.sub(r"(front|worker) process", "", life))
    assert len(names) > 12
    methods = {name for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ClassDef)
               for name in [f"{node.name}.{item.name}" for item in node.body if hasattr(item, "name")] + [item.name for item in node.body if hasattr(item, "name")]}
    unknown = [name for name in names if not hasattr(chat_server, name) and name not in methods]
    assert unknown == []


def test_the_glossary_and_the_signposts_name_what_is_there():
    glossary = chat_server.__doc__.split("Glossary")[1].split("A copy of this file")[0]
    names = re.findall(r"`([A-Za-z_]+)(?:\.[a-z_]+)?`", glossary)
    assert len(names) > 15 and [name for name in names if not hasattr(chat_server, name)] == ["n"]


def test_functions_stay_small():
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(SOURCE))
                     if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    assert lengths[-1] <= 80
    assert lengths[len(lengths) * 9 // 10] <= 40


# A private name of a base class looks free to who writes the subclass: those that are replaced on purpose.
PRIVATE_OVERRIDES = {("RayPool", "_workers"), ("RayPool", "_start_workers"), ("RankZeroOfNodes", "_ended")}


def our_classes():
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("chat_server", "chatlm")]
    return {value for module in modules for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__}


def shape(function):
    """How it is called: each parameter's name, kind and whether it may be left out; and whether it is awaited or iterated."""
    calls = [(each.name, each.kind, each.default is each.empty) for each in inspect.signature(function).parameters.values()]
    return calls, [is_one(function) for is_one in (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)]


def accidents(kind):
    """What a class replaces of a base class and probably does not mean to."""
    for name, own in vars(kind).items():
        base = next((vars(each)[name] for each in kind.__mro__[1:-1] if name in vars(each)), own)
        if base is own or re.fullmatch("__.*__", name):
            continue
        if inspect.isfunction(base) and not (inspect.isfunction(own) and shape(own) == shape(base)):
            yield kind.__name__, name
        elif inspect.isfunction(own) and not inspect.isfunction(base) and base is not None:
            yield kind.__name__, name
        elif name.startswith("_") and inspect.isfunction(own) and (kind.__name__, name) not in PRIVATE_OVERRIDES:
            yield kind.__name__, name


def hidden_methods(node, kind):
    """Methods that an attribute of the same name hides in each object."""
    stored = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
              and isinstance(each.value, ast.Name) and each.value.id == "self"}
    return {(kind.__name__, name) for name in stored if inspect.isfunction(inspect.getattr_static(kind, name, None))}


def test_no_class_replaces_a_method_of_its_base_by_accident():
    classes = our_classes()
    assert len(classes) > 100 and [each for kind in classes for each in accidents(kind)] == []
    nodes = [(node, kind) for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef) for kind in classes if kind.__name__ == node.name]
    assert set().union(*(hidden_methods(node, kind) for node, kind in nodes)) == set()
    for node, _ in nodes:
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
    awaited = {"first_of", "interruptible", "call"}     # these read the results of their tasks
    for function in ast.walk(ast.parse(SOURCE)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and function.name not in awaited:
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if getattr(call.func, "attr", "") in ("create_task", "ensure_future"):
                    work = call.args[0]
                    assert isinstance(work, ast.Call) and work.func.id == "supervised", call.lineno


def test_the_flags_names_are_unique_and_their_settings_cross_a_pipe():
    names = [chat_server.option_field(option) for option in chat_server.OPTIONS]
    assert len(set(names) | {"command", "model", "keys"}) == len(names) + 3
    settings = chat_server.Settings(model="m", port=1)
    assert pickle.loads(pickle.dumps(settings)) == settings != chat_server.Settings()


def test_nothing_names_a_registry_or_a_model_hub():
    for path in Path(chat_server.__file__).parent.rglob("*"):
        ours = not {".venv", "vendor"} & set(path.parts) and not any(part.startswith("build") for part in path.parts)
        if ours and path.suffix in (".py", ".md", ".toml", ".js", ".mjs", ".json", ".html", ".txt"):
            hosts = re.findall(r"(?:py" + r"pi\.org|files\.python" + r"hosted|registry\.npm" + r"js|huggingface\.c" + r"o/)",
                               path.read_text(encoding="utf-8", errors="replace"))
            assert hosts == [], path


def test_what_tests_share_is_in_the_support_folder():
    tests = Path(__file__).parent
    stems = {path.stem for path in tests.rglob("*.py") if path.parent.name != "support"}
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in stems, path


def test_lines_have_at_most_110_columns():
    assert [number for number, line in enumerate(SOURCE.split("\n"), 1) if len(line) > 110] == []
