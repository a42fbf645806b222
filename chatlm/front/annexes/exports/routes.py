"""The routes with which an operator exports a served model into the folder of --export-folder.

A request gives names, never paths: of a model that is served, and of the new folder."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError, bad_value, shown, without_folders
from chatlm.common.processes.start import PROCESS_COMMAND, PROGRAM, exit_in_words
from chatlm.front.server.responses import REQUEST_LOG, json_response

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.front.front import Front
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.models import ServedModel
    from chatlm.front.server.bodies import Bodies

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
ALLOWED = "1 to 100 letters, digits, dots, - and _, with a letter or digit first"


class ExportRoutes:
    """The handlers. One export runs at a time."""

    def __init__(self, catalogue: Catalogue, bodies: Bodies):
        self.catalogue = catalogue
        self.bodies = bodies
        self.process: asyncio.subprocess.Process | None = None
        self.busy = False

    @classmethod
    def of(cls, front: Front) -> ExportRoutes:
        return cls(front.catalogue, front.bodies)

    async def close(self):
        """End a running export, which removes what it has written."""
        if self.process and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()

    def _folder(self) -> Path:
        folder = self.catalogue.settings.export_folder
        if folder is None:
            raise RequestError("the server was started without --export-folder, so it exports nothing",
                               status=403, code="not_available")
        return Path(folder).expanduser()

    async def handle_list(self, http: web.Request) -> web.Response:
        """GET /models/exports: the names in the folder."""
        folder = self._folder()
        names = await asyncio.to_thread(lambda: sorted(os.listdir(folder)) if folder.is_dir() else [])
        return json_response({"object": "list", "data": [
            {"object": "export", "name": name} for name in names if not name.startswith(".")]})

    async def handle_export(self, http: web.Request) -> web.Response:
        """POST /models/export: answers once the folder is there. If the client leaves, the export ends."""
        values = await self.bodies.small(http)
        folder = self._folder()
        name = values["name"]
        if not re.fullmatch(NAME, name):
            raise bad_value("name", name, ALLOWED)
        served = self.catalogue.find(values["model"], REQUEST_LOG.get().bound)
        source = source_of(served.model)
        if served.adapter or source is None:
            raise RequestError(f"{shown(served.name)} has no files of its own that could be exported",
                               param="model", code="not_available")
        if self.busy:
            raise RequestError("another export is running; try again once it has ended", status=409,
                               code="exporting")
        self.busy = True
        try:
            await self._export(served.model.settings, source.path, folder, name)
        finally:
            self.busy = False
        return json_response({"object": "export", "model": served.name, "name": name})

    async def _export(self, settings: Settings, model: Path, folder: Path, name: str):
        """Run `export` in a process of its own."""
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        words = [str(os.getpid()), str(model), "-o", str(folder / name)]
        for adapter in settings.lora:
            words += ["--lora", adapter]
        if settings.softcap is not None:
            words += ["--softcap", str(settings.softcap)]
        process = await asyncio.create_subprocess_exec(
            *PROCESS_COMMAND, "export", *words, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, pass_fds=PROGRAM)
        self.process = process
        try:
            _, output = await process.communicate()
        finally:
            if process.returncode is None:  # the client has left; the next export waits until all is removed
                await self.close()
        if process.returncode:
            lines = output.decode("utf-8", "replace").strip().splitlines()
            reason = exit_in_words(process.returncode)
            if process.returncode == 2 and lines:
                reason = lines[-1]
            raise RequestError(f"not exported: {without_folders(reason)}", code="not_exported")


def source_of(model: ServedModel) -> ModelSource | None:
    """The files of a model; None if it has failed before they were found."""
    return model.source or (model.pool.source if model.pool else None)
