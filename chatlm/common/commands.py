"""Commands that have no Settings: each takes its words, and yields lines to print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Seq
from typing import NamedTuple

OTHER_COMMANDS = "bundle", "store", "export", "push"  # those of the program itself; annexes may have more


class Command(NamedTuple):
    """One of them. It has a --help of its own."""

    name: str
    lines: Callable[[Seq[str]], Iterable[str]]  # imports its modules; raises ChatServerError
