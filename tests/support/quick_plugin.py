"""What `pytest --quick` runs: the spine (.ci/spine), and of each other function of tests all or some cases, the fewer the longer they take by the record (.ci/executed).

Faults of bench/planted.py were noticed by tests of nearly all modules, and most of these tests are short: bench/RESULTS.md has the figures.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from executed import CASE_SECONDS, recorded_cases, spine

CASES = 4               # of a function, if a case takes CASE_SECONDS; of quicker ones all
ONE_SECONDS = 0.3       # if a case takes longer, there is one
MOST_SECONDS = 0.8      # and then none


def quick(nodes: list[str], seconds: Mapping[str, float], always: list[str]) -> set[str]:
    """Of tests, in their order: all cases of the functions and modules `always`; of other functions, which take so many seconds a case, evenly distributed ones."""
    cases = defaultdict(list)
    for node in nodes:
        cases[node.partition("[")[0]].append(node)
    chosen = set()
    for function, its in cases.items():
        took = seconds.get(function, 0.0)
        if function in always or function.partition("::")[0] in always:
            chosen.update(its)
        elif took <= MOST_SECONDS:
            count = len(its) if took < CASE_SECONDS else min(CASES if took < ONE_SECONDS else 1, len(its))
            chosen.update(its[number * len(its) // count] for number in range(count))
    return chosen


class Quick:
    """A plugin of pytest."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @pytest.hookimpl(trylast=True)          # after pytest has left out what is slow by its mark
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = quick([item.nodeid for item in items], recorded_cases(self.root), spine(self.root))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.write_line(f"Where a case takes {CASE_SECONDS} s these were at most {CASES} of each function of tests, from {ONE_SECONDS} s on one, and above {MOST_SECONDS} s none. "
                                    "All by day: .ci/run, or this command without --quick. CONTRIBUTING.md says what else there is.")
