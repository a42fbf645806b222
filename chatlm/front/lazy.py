"""aiohttp at its first use: the front starts its workers before it spends 0.2 s on importing aiohttp."""

from __future__ import annotations

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


if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web
else:
    aiohttp = LazyModule("aiohttp", "chat_server")
    web = LazyModule("aiohttp.web", "chat_server")
