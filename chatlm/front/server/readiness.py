"""Is the server well? What /health and /readyz say.

Where the program's files were changed under a running server, what was not imported yet cannot be, and a
worker that dies cannot be started again. So the files are looked at whenever somebody polls."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from chatlm.common.log import log
from chatlm.common.program import why_outdated
from chatlm.front.server.responses import json_response

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.front.pool.catalogue import Catalogue


LOOK_S = 1.0   # between two looks at the program's files, however many clients poll
WAIT_S = 1.0   # for a look; if threads are busy, what the last one has found is said


class Readiness:
    """Whether requests would be served, and whether the program is still the one that was started."""

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue
        self.outdated = ""                           # why the server should be started again
        self.look: asyncio.Future[str] | None = None
        self.looked_s = 0.0

    async def handle_health(self, http: web.Request) -> web.Response:
        """GET /health: 200 if a request would be admitted."""
        status, body = self.catalogue.health()
        if outdated := await self._outdated():
            body = body | {"status": "degraded" if body["ready"] else body["status"], "outdated": outdated}
        return json_response(body, status)

    async def handle_ready(self, http: web.Request) -> web.Response:
        """GET /readyz: 200 if all requests would be served."""
        status, body = self.catalogue.health()
        if status != 200:
            return json_response({"ready": False, "reason": body["status"]}, 503)
        if outdated := await self._outdated():
            return json_response({"ready": False, "reason": "outdated", "message": outdated}, 503)
        return json_response({"ready": True})

    async def _outdated(self) -> str:
        now_s = time.monotonic()
        if self.look is None or self.look.done() and now_s >= self.looked_s + LOOK_S:
            self.looked_s = now_s
            self.look = asyncio.ensure_future(asyncio.to_thread(why_outdated))
        await asyncio.wait({self.look}, timeout=WAIT_S)
        if self.look.done():
            found = self.look.result()
            if found and not self.outdated:
                log.warning("not ready: %s", found)
            self.outdated = found
        return self.outdated
