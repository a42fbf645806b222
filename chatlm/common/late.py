"""What is imported when it is needed: rows name it, and only the rows that are asked for import something."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any


def importer(place: str) -> Callable[[], Any]:
    """A function that imports a thing and returns it. place: MODULE:NAME, or MODULE:CLASS.NAME.

    Threads may call it at the same time. Where a request asks, `imported_later` calls it."""
    module, _, name = place.partition(":")
    return lambda: operator.attrgetter(name)(importlib.import_module(module))
