"""What is imported when it is needed: tables of rows name modules, and only those asked for are imported."""
from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def importer(place: str) -> Callable[[], Any]:
    """A function that imports a thing and returns it. place: MODULE:NAME."""
    module, _, name = place.partition(":")
    return lambda: getattr(importlib.import_module(module), name)
