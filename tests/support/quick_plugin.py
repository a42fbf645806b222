"""What `pytest --quick` runs: the spine (.ci/spine), and of each other function of tests some cases, if it needs no other process and no large model.

What a test needs stands in its code, and in that of its fixtures and of what they call in tests/ and bench/: `Needs` follows the names. It follows none into
the program, so a test whose subject starts a process by itself is taken; most of these are short.
"""

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

import pytest

# What names one of these starts a process, or asks one: modules, and parts of the program that tests start it with
PROCESSES = ("subprocess", "multiprocessing", "asyncio.subprocess", "forked", "browsing", "fake_tools", "pools.started", "chatlm.common.processes.start",
             "chatlm.common.hub.packaged", "chatlm.front.pool.pool.make_pool", "chatlm.front.pool.many.many_models")
# The default model, of 135 million parameters; a library that g++ compiles for half a minute
LARGE = "conftest.default_model_path", "chatlm.common.hub.default_model.fetch_default_model", "cuda_backends.Emulated", "test_core_cuda.Emulation"
# What computes with a model
MODELS = "torch", "transformers", "chatlm.worker.engine", "chatlm.worker.build", "engines"
CASES = 2       # of a function of tests; one, if it computes with a model
FIXTURES_OF_ALL = {"explained_statements", "forked_processes", "integrity", "state_home", "state_folders"}


class Needs:
    """The names of what functions reach, by what their code mentions."""

    def __init__(self, root: Path) -> None:
        self.places = tuple(str(root / folder) for folder in ("tests", "bench"))
        self.known: dict[int, tuple[object, set[str]]] = {}     # with what it is of, which must not go: another could have its number

    def of(self, item: pytest.Item) -> set[str]:
        needs = set(self.reached(item.function))
        for name, fixtures in item._fixtureinfo.name2fixturedefs.items():
            if name not in FIXTURES_OF_ALL:
                needs |= self.reached(fixtures[-1].func)
        return needs

    def reached(self, start: object) -> set[str]:
        """Dotted names."""
        if id(start) not in self.known:
            names, todo, done = set(), [start], {}
            while todo:
                value = plain(todo.pop())
                if id(value) in done:
                    continue
                done[id(value)] = value
                names.add(value.__name__ if isinstance(value, ModuleType) else f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}")
                if isinstance(value, FunctionType) and value.__code__.co_filename.startswith(self.places):
                    todo += self.mentioned(value)
                elif isinstance(value, type) and str(getattr(sys.modules.get(value.__module__), "__file__", "")).startswith(self.places):
                    todo += [*vars(value).values(), *value.__bases__]
            self.known[id(start)] = start, names
        return self.known[id(start)][1]

    def mentioned(self, function: FunctionType) -> list[object]:
        """What the names in its code mean: globals, modules that it imports itself, and what a module of tests has."""
        names = {name for code in codes(function.__code__) for name in code.co_names}
        values = [function.__globals__[name] if name in function.__globals__ else sys.modules[name]
                  for name in names if name in function.__globals__ or name in sys.modules]
        values += [vars(module)[name] for module in values if isinstance(module, ModuleType) for name in names if name in vars(module)]
        return values + [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]     # not those without a value yet


def codes(code: CodeType) -> list[CodeType]:
    """With those of the functions in it."""
    return [code, *(inner for each in code.co_consts if isinstance(each, CodeType) for inner in codes(each))]


def plain(value: object) -> object:
    """Without what decorators and fixtures put around a function."""
    while True:
        if isinstance(value, partial):
            value = value.func
        elif isinstance(value, MethodType | staticmethod | classmethod):
            value = value.__func__
        elif "__wrapped__" in getattr(value, "__dict__", ()):
            value = value.__wrapped__
        elif hasattr(type(value), "_get_wrapped_function"):     # a fixture, in pytest 8.4
            value = value._get_wrapped_function()
        else:
            return value


def is_in(names: set[str], parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for name in names for part in parts)


def quick(needs: dict[str, set[str]], always: list[str]) -> set[str]:
    """Of tests, in their order and with what each needs: all of the functions and modules `always`; of other functions evenly distributed cases."""
    cases = defaultdict(list)
    for node in needs:
        cases[node.partition("[")[0]].append(node)
    chosen = set()
    for function, nodes in cases.items():
        needed = set().union(*map(needs.__getitem__, nodes))
        if function in always or function.partition("::")[0] in always:
            chosen.update(nodes)
        elif not is_in(needed, PROCESSES + LARGE):
            count = min(1 if is_in(needed, MODELS) else CASES, len(nodes))
            chosen.update(nodes[number * len(nodes) // count] for number in range(count))
    return chosen


class Quick:
    """A plugin of pytest."""

    def __init__(self, root: Path) -> None:
        self.needs = Needs(root)
        self.always = [line for line in (root / ".ci/spine").read_text().splitlines() if line and not line.startswith("#")]

    @pytest.hookimpl(trylast=True)          # after pytest has left out what is slow by its mark
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = quick({item.nodeid: self.needs.of(item) for item in items}, self.always)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.write_line("These were the spine (.ci/spine), and a few cases of each function of tests that needs no other process. "
                                    "All by day: .ci/run, or this command without --quick. CONTRIBUTING.md says what else there is.")
