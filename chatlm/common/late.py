"""What is imported when it is needed, named by its module: a table of rows knows the names of all, and imports
those that are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def importer(place: str) -> Callable[[], Any]:
    """A function that imports a thing and returns it. place: MODULE:NAME."""
    module, _, name = place.partition(":")
    return lambda: getattr(importlib.import_module(module), name)
