"""aiohttp at its first use: the front starts its workers before it spends 0.1 s on importing aiohttp.

A server needs half of aiohttp. The other half are its clients, whose module `aiohttp.connector` reads the
system's certificates twice when it is imported: 55 ms and 3.6 MB, which `import_web` saves."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from chatlm.common.errors import require_library


class LazyModule:
    """A module imported at the first use of one of its names."""

    def __init__(self, name: str, purpose: str):
        self._name = name
        self._purpose = purpose

    def __getattr__(self, attribute: str):
        value = getattr(require_library(self._name, self._purpose), attribute)
        setattr(self, attribute, value)  # the next use finds it here
        return value


class ServerSide(ModuleType):
    """The package aiohttp, whose own code has not run: it has its submodules, and runs its code when
    something else is asked of it."""

    def __getattr__(self, name: str):
        setattr(self, "__class__", ModuleType)
        assert self.__spec__ and self.__spec__.loader
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def import_web():
    """Import aiohttp.web without aiohttp's clients, if this aiohttp allows that; else all of it."""
    if "aiohttp" not in sys.modules:
        with suppress(ImportError, AttributeError, OSError):
            import_server_side()
    return require_library("aiohttp.web", "chat_server")


def import_server_side():
    """Import aiohttp.web into a package whose own code has not run. If that fails, nothing of it stays
    imported."""
    spec = importlib.util.find_spec("aiohttp")
    if spec is None or spec.origin is None:
        return
    version = re.search(r'^__version__ = "([^"]+)"', Path(spec.origin).read_text(), re.MULTILINE)
    if version is None:
        return
    package = importlib.util.module_from_spec(spec)
    setattr(package, "__version__", version[1])  # aiohttp.http asks for it
    sys.modules["aiohttp"] = package
    try:
        importlib.import_module("aiohttp.web")
    except BaseException:
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiohttp"]:
            del sys.modules[name]
        raise
    package.__class__ = ServerSide  # not earlier: its own submodules ask it for each other


if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web
else:
    aiohttp = LazyModule("aiohttp", "chat_server")
    web = LazyModule("aiohttp.web", "chat_server")
