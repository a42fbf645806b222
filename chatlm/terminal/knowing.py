"""Collections of documents (vector stores) that a chat with a server at --url asks: the commands /know and
/passages."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any, TYPE_CHECKING
from urllib.parse import quote

import aiohttp

from chatlm.common.config import LIMITS
from chatlm.common.errors import ChatServerError, ConfigError, did_you_mean, shown
from chatlm.common.folder_files import Found, Gone, look, read
from chatlm.terminal.remote import RemotePool
from chatlm.terminal.remote_streams import object_in, refusal, strict_object, whole_body

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.terminal.remote import Pool


POLL_S = 0.5     # between two questions whether files have been read
MOST_NAMED = 5   # passages and problems that a line names
STATES = {"in_progress": "being read", "failed": "failed"}


class Knowing:
    """Which collections of its server a chat asks."""

    def __init__(self, pool: Pool, note: Callable[[str], None]):
        """note: shows a line to the user."""
        self.pool = pool
        self.note = note
        self.asked: dict[str, str] = {}  # names of the collections that are asked, by their ids
        self.search: dict[str, float] = {}  # max_num_results and score_threshold, if the user has set them

    async def take(self, value: str):
        """Do what follows /know: a folder, the name of a collection, `off`, or nothing. Raises ValueError or
        ChatServerError if that cannot be done."""
        pool = self._remote
        if value == "off":
            self.asked.clear()
        elif value and Path(value).expanduser().is_dir():
            store = await self._with_files(Path(value).expanduser().resolve())
            self.asked[store["id"]] = store["name"]
        elif value:
            stores = {str(store["name"]): store for store in await self._rows("v1/vector_stores")}
            if value not in stores:
                raise ValueError(f"{shown(value)} is no folder here, and no collection of the server (it has "
                                 f"{', '.join(stores) or 'none'}){did_you_mean(value, stores)}")
            self.asked[stores[value]["id"]] = value
        else:
            for store in await self._rows("v1/vector_stores"):
                self.note(f"{'*' if store['id'] in self.asked else ' '} {store['name']}: {counts_of(store)}")
        pool.knowledge = wanted(self.asked, self.search)
        names = ", ".join(self.asked.values())
        self.note(f"The chat asks {names}; /know off ends that." if names else
                  "The chat asks no collection: /know FOLDER or /know NAME")

    def limit(self, value: str):
        """Do what follows /passages: how many at most, and perhaps their least score; `off`; or nothing.
        Raises ValueError if that cannot be done."""
        pool = self._remote
        most, _, least = value.partition(" ")
        if value == "off":
            self.search = {}
        elif value:
            if not most.isdecimal() or not 1 <= int(most) <= LIMITS.passages or least and not is_share(least):
                raise ValueError(f"/passages N, from 1 to {LIMITS.passages}; /passages N LEAST, a score from "
                                 "0 to 1; /passages off")
            self.search = {"max_num_results": int(most)}
            if least:
                self.search["score_threshold"] = float(least)
        pool.knowledge = wanted(self.asked, self.search)
        if self.search:
            scored = f" with a score of at least {self.search.get('score_threshold', 0):g}"
            self.note(f"Of collections at most {self.search['max_num_results']} passages{scored} are read.")
        else:
            self.note("Of collections as many passages are read as are worth it.")

    @property
    def _remote(self) -> RemotePool:
        if not isinstance(self.pool, RemotePool):
            raise ValueError("collections are kept by a server with --database and --embedder: "
                             "`chat --url` talks to one")
        return self.pool

    async def _with_files(self, folder: Path) -> dict:
        """The collection with the folder's name, which then has its files as they are now."""
        found = await asyncio.to_thread(look, folder)
        own = (store for store in await self._rows("v1/vector_stores")
               if store["name"] == folder.name and not store.get("read_only"))
        store = next(own, None) or await self._ask("POST", "v1/vector_stores", {"name": folder.name})
        path = f"v1/vector_stores/{quote(store['id'])}"
        there = {file["filename"]: file for file in await self._rows(f"{path}/files")}
        problems = [found.problem] if found.problem else []
        for number, file in enumerate(found.found, 1):
            if not file.reason:
                self.note(f"{number} of {len(found.found)}: {file.path}")
            try:
                await self._bring(path, folder, file, there.get(file.path))
            except Gone:
                problems.append(f"{file.path}: it has changed meanwhile")
            except ChatServerError as error:
                problems.append(f"{file.path}: {error}")
        while (store := await self._ask("GET", path))["status"] == "in_progress":
            await asyncio.sleep(POLL_S)
        failed = [file for file in await self._rows(f"{path}/files") if file["status"] == "failed"]
        problems += [f"{file['filename']}: {object_in(file, 'last_error').get('message')}" for file in failed]
        hint = [f"/know {shown(str(folder))} again tries those that failed again"] if failed else []
        self.note("\n".join([f"{store['name']}: {counts_of(store)}", *shortened(problems), *hint]))
        return store

    async def _bring(self, path: str, folder: Path, found: Found, there: dict | None):
        """Bring a file into a collection, unless it is there with this content."""
        if found.reason:
            raise ConfigError(found.reason)
        data = await asyncio.to_thread(read, folder, found)
        digest = hashlib.sha256(data).hexdigest()
        if there and there["attributes"].get("sha256") == digest and there["status"] != "failed":
            return
        form = aiohttp.FormData(quote_fields=False)  # a name is sent as it is
        form.add_field("purpose", "assistants")
        form.add_field("file", data, filename=found.path)
        file = await self._ask("POST", "v1/files", form)
        await self._ask("POST", f"{path}/files", {"file_id": file["id"], "attributes": {"sha256": digest}})
        if there:
            await self._ask("DELETE", f"{path}/files/{quote(there['id'])}")

    async def _rows(self, path: str) -> list[dict]:
        """All rows of a list, a page after the other."""
        rows: list[dict] = []
        after = ""
        while True:
            page = await self._ask("GET", f"{path}?limit=100{after}")
            rows += page["data"]
            if not page.get("has_more"):
                return rows
            after = f"&after={quote(page['last_id'])}"

    async def _ask(self, method: str, path: str, body: Any = None) -> dict:
        """What the server answers. Raises its error."""
        assert isinstance(self.pool, RemotePool)
        kind = "data" if isinstance(body, aiohttp.FormData) else "json"
        async with await self.pool.ask(method, path, **{kind: body}) as response:
            if response.status >= 300:
                raise await refusal(response)
            found = strict_object(await whole_body(self.pool.url, response))
        if found is None:
            raise ConfigError(f"{self.pool.url} keeps no collections: {path} answers something else")
        return found


def wanted(asked: dict[str, str], search: dict[str, float]) -> dict:
    """The member `knowledge` of a body, which is what the page sends too; {} where nothing is asked."""
    return {"knowledge": {"stores": [*asked], **search}} if asked else {}


def is_share(text: str) -> bool:
    """Is it a number from 0 to 1?"""
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def counts_of(store: dict) -> str:
    """For example: 40 files, 2 failed."""
    counts = store["file_counts"]
    total = counts["completed"]
    parts = [f"{total:,} {'file' if total == 1 else 'files'}"]
    parts += [f"{counts[name]:,} {words}" for name, words in STATES.items() if counts[name]]
    return ", ".join(parts)


def shortened(lines: list[str]) -> list[str]:
    more = len(lines) - MOST_NAMED
    return [*lines[:MOST_NAMED], *([f"and {more:,} more"] if more > 0 else [])]


def passages_line(given: dict) -> str:
    """What an answer was given: 3 of 40 parts were read: [1] pump.pdf, page 3; ..."""
    passages = given.get("passages") or []
    named = [f"[{passage.get('index')}] {passage.get('filename')}"
             + (f", page {passage['page']}" if passage.get("page") else "") for passage in passages]
    line = f"{given.get('read', 0):,} of {given.get('of', 0):,} parts were read"
    return f"{line}: {'; '.join(shortened(named))}" if named else line
