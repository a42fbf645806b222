"""What `pytest --quick` runs: the spine (.ci/spine), and of each other function of tests some cases, unless by the record (.ci/executed) they are slow.

Faults of bench/planted.py were noticed by tests of nearly all modules, and most of these tests are short: bench/RESULTS.md has the figures.
"""

from collections import defaultdict
from pathlib import Path

import pytest

from executed import read_record, spine

CASES = 4           # of a function
SECONDS = 1.0       # that a case may take


def quick(nodes: list[str], slow: set[str], always: list[str]) -> set[str]:
    """Of tests, in their order: all cases of the functions and modules `always`, and evenly distributed CASES of others that are not slow."""
    cases = defaultdict(list)
    for node in nodes:
        cases[node.partition("[")[0]].append(node)
    chosen = set()
    for function, its in cases.items():
        if function in always or function.partition("::")[0] in always:
            chosen.update(its)
        elif function not in slow:
            count = min(CASES, len(its))
            chosen.update(its[number * len(its) // count] for number in range(count))
    return chosen


def slow_functions(root: Path) -> set[str]:
    """By the record; what it does not have yet is not slow."""
    return {f"{module}::{function}" for module, executed in read_record(root).items() for function, seconds in executed.slow.items() if seconds > SECONDS}


class Quick:
    """A plugin of pytest."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts = 0, 0

    @pytest.hookimpl(trylast=True)          # after pytest has left out what is slow by its mark
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = quick([item.nodeid for item in items], slow_functions(self.root), spine(self.root))
        self.counts = len(chosen), len(items)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]

    def pytest_terminal_summary(self, terminalreporter) -> None:
        count, of = self.counts
        terminalreporter.write_line(f"{f'These were {count} of {of} tests' if of else 'These were some tests'}: at most {CASES} cases of each function, "
                                    f"and none that takes more than {SECONDS:.0f} s. All by day: .ci/run, or this command without --quick. "
                                    "CONTRIBUTING.md says what else there is.")
