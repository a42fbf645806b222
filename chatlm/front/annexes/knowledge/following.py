"""Vector stores of --knowledge: each has the files of a folder of the server, and follows it.

A look lists the folder in a thread and compares it with what the database has of it. Every difference is
one transaction: a file that came or changed is copied into the database, where `Ingest` finds it; one that
went is deleted with its passages. So a look that a kill ends is done again after the next start, and what
was taken over is not. A folder that cannot be listed, or is empty all at once, as where a disk is not
mounted, changes nothing: its store says so."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from chatlm.common.config import FOLDER, FOLDERS_CLIENT
from chatlm.common.errors import ConfigError, Overloaded, RequestError
from chatlm.common.folder_files import Found, Gone, Look, look, read
from chatlm.common.log import log
from chatlm.front.aio import end_tasks, in_own_thread, supervised
from chatlm.front.annexes.knowledge import stores
from chatlm.front.annexes.knowledge.stores import Wanted
from chatlm.front.server.stored_lists import now_s
from chatlm.front.store import file_rows, quota

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts, Store


T = TypeVar("T")
LOOKS_S = 5.0          # between two looks at the folders, at least,
RESTS = 20             # and so many times as long as they took
PATIENCE_S = 60.0      # for a file system that does not answer; then other folders have their turns
PIECE_BYTES = 1 << 20  # of a file in a row of the database
NOTE_BYTES = 2048      # of the rows of a file besides its content


class Known(NamedTuple):
    """A file of a folder as the database has it."""

    stamp: str
    digest: str


class Followed(NamedTuple):
    """A folder and its store."""

    name: str
    folder: Path
    store: int


class Hangs(Exception):
    """The file system of a folder does not answer."""


class Following:
    """The task that has the stores follow their folders."""

    def __init__(self, store: Store, folders: Seq[str], changed: Callable[[], None]):
        """folders: NAME=FOLDER of each; changed: called when there are files to ingest, or deleted ones."""
        self.store = store
        self.folders = folders
        self.changed = changed
        self.followed: list[Followed] = []
        self.trusted = set[int]()     # stores whose stamps this server has seen itself
        self.problems: dict[int, str] = {}
        self.hung: dict[int, asyncio.Future[Any]] = {}  # what the file system of a store has not answered
        self.lock = asyncio.Lock()    # one look at a time
        self.looking_s = 0.0          # that listing the folders took
        self.task: asyncio.Task | None = None

    async def start(self):
        """Make the stores, so that the first request sees them, and begin to follow."""
        names = [text.partition("=")[0] for text in self.folders]
        numbers = await self.store.run(partial(activate, names=names, now=now_s()))
        self.followed = [
            Followed(name, Path(os.path.expanduser(text.partition("=")[2])).absolute(), number)
            for name, text, number in zip(names, self.folders, numbers)]
        if self.followed:
            self.task = asyncio.create_task(supervised("following folders", self.run, lambda error: True))

    async def close(self):
        if self.task:
            await end_tasks([self.task])

    async def run(self):
        while True:
            self.looking_s = 0.0
            for followed in self.followed:
                try:
                    async with self.lock:
                        await self.follow(followed)
                except Hangs:
                    await self._tell(followed, "its file system does not answer: what was read from it stays "
                                               "until it does")
                except RequestError as error:  # more files than a store may have
                    await self._tell(followed, str(error))
                except Overloaded as error:    # a full disk: the next look goes on
                    log.debug("--knowledge %s waits: %s", followed.name, error)
            await asyncio.sleep(self.rest_s)

    @property
    def rest_s(self) -> float:
        """Until the next look: what looking takes of a processor does not grow with the folders."""
        return max(LOOKS_S, RESTS * self.looking_s)

    async def follow(self, followed: Followed):
        """Look at a folder, and take over what has changed. Raises Hangs."""
        known = await self.store.run(partial(known_files, store=followed.store))
        began_s = time.monotonic()
        try:
            seen = await self._answered(followed, partial(look, followed.folder))
            self.looking_s += time.monotonic() - began_s
        except OSError as error:
            await self._tell(followed, f"the folder cannot be read ({error.strerror}): what was read from it "
                                       "stays")
            return
        if known and not seen.found:
            await self._tell(followed, f"the folder is empty: the {len(known)} files that it had stay until "
                                       "there is one again")
            return
        for path in missing(known, seen):
            await self.store.run(partial(forget, store=followed.store, path=path))
            self.changed()
        whole = True
        for found in seen.found:
            before = known.get(found.path)
            if before and before.stamp == found.stamp and (
                    before.digest == found.reason if found.reason else followed.store in self.trusted):
                continue
            whole = await self._take(followed, found, before) and whole
        if whole:
            self.trusted.add(followed.store)
        await self._tell(followed, seen.problem)

    async def _answered(self, followed: Followed, ask: Callable[[], T]) -> T:
        """What the file system says, asked in a thread that does not hold the server's end. Raises Hangs if
        it says nothing, or has not yet answered what it was asked before."""
        before = self.hung.get(followed.store)
        if before and not before.done():
            raise Hangs
        answer = in_own_thread(f"folder {followed.name}", ask)
        done, _ = await asyncio.wait([answer], timeout=PATIENCE_S)
        if not done:
            answer.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self.hung[followed.store] = answer
            raise Hangs
        self.hung.pop(followed.store, None)
        return answer.result()

    async def _take(self, followed: Followed, found: Found, before: Known | None) -> bool:
        """Take over a file, unless its content is the same. False if it has to be looked at again."""
        data = b""
        if not found.reason:
            try:
                data = await self._answered(followed, partial(read, followed.folder, found))
            except Gone:
                return False
            except ConfigError as error:
                found = found._replace(reason=str(error), stamp="")
        digest = found.reason or (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()
        if before and before.digest == digest:
            if before.stamp != found.stamp:
                await self.store.run(partial(restamp, store=followed.store, found=found))
                self.changed()
            return True
        await self.store.run(partial(take, followed=followed, found=found, data=data, digest=digest,
                                     now=now_s()), adds_bytes=len(data) + NOTE_BYTES)
        self.changed()
        return True

    async def _tell(self, followed: Followed, problem: str):
        """Have the store show why its folder is not followed."""
        if self.problems.get(followed.store) == problem:
            return
        if problem:
            log.warning("--knowledge %s: %s", followed.name, problem)
        await self.store.run(partial(note_problem, store=followed.store, problem=problem))
        self.problems[followed.store] = problem


def missing(known: dict[str, Known], seen: Look) -> list[str]:
    """What the database has and the folder has not. Not what may be in folders that could not be listed."""
    there = {found.path for found in seen.found}
    unread = set(seen.unread)
    return [path for path in known
            if path not in there and unread.isdisjoint(places_of(path))]


def places_of(path: str) -> Iterator[str]:
    """A path, and the folders that it is in."""
    while path:
        yield path
        path = path.rpartition("/")[0]


# in the database

def activate(connection: sqlite3.Connection, names: Seq[str], now: int) -> list[int]:
    """The numbers of the stores with these names, made where there are none. Others are no longer seen."""
    connection.execute("UPDATE knowledge_folders SET active = 0 WHERE active = 1")
    numbers = list[int]()
    for name in names:
        row = connection.execute("SELECT store FROM knowledge_folders WHERE name = ?", (name,)).fetchone()
        if row is None:
            made = stores.create_store(connection, FOLDER + name, FOLDERS_CLIENT, {"name": name}, "", now)
            row = (made.number,)
            connection.execute("INSERT INTO knowledge_folders (store, name) VALUES (?, ?)", (*row, name))
        connection.execute("UPDATE knowledge_folders SET active = 1, problem = '' WHERE store = ?", row)
        connection.execute("UPDATE files SET state = ? WHERE owner = ? AND state = ?",  # of a killed server
                           (file_rows.DELETED, FOLDER + name, file_rows.WRITTEN))
        numbers += row
    return numbers


def known_files(connection: sqlite3.Connection, store: int) -> dict[str, Known]:
    return {path: Known(*row) for path, *row in connection.execute(
        "SELECT path, stamp, digest FROM knowledge_folder_files WHERE store = ?", (store,))}


def restamp(connection: sqlite3.Connection, store: int, found: Found):
    """A file was touched, or moved here anew: its content is the same. If it has failed because of the
    server, it is read again."""
    [[file]] = connection.execute("SELECT file FROM knowledge_folder_files WHERE store = ? AND path = ?",
                                  (store, found.path))
    stores.try_again(connection, store, file)
    connection.execute("UPDATE knowledge_folder_files SET stamp = ? WHERE store = ? AND path = ?",
                       (found.stamp, store, found.path))


def note_problem(connection: sqlite3.Connection, store: int, problem: str):
    connection.execute("UPDATE knowledge_folders SET problem = ? WHERE store = ?", (problem, store))


def forget(connection: sqlite3.Connection, store: int, path: str):
    """A file went: so do its passages."""
    row = connection.execute("SELECT file FROM knowledge_folder_files WHERE store = ? AND path = ?",
                             (store, path)).fetchone()
    if row:
        with suppress(LookupError):
            file_rows.delete(connection, file_rows.file_named(connection, *row))
        connection.execute("DELETE FROM knowledge_folder_files WHERE store = ? AND path = ?", (store, path))


def take(connection: sqlite3.Connection, followed: Followed, found: Found, data: bytes, digest: str,
         now: int) -> Parts[None]:
    """Put a file into the store, in place of what it had of this path. One that is not read is there as
    failed, with its reason."""
    owner = FOLDER + followed.name
    reason = found.reason
    if not reason and (refused := quota.refusal(connection, owner, len(data))):
        reason = f"{refused}; the next start of the server tries again"
        data, digest = b"", reason
    file = file_rows.create(connection, owner, found.path, "assistants", now)
    for number, begin in enumerate(range(0, len(data), PIECE_BYTES), 1):
        piece = data[begin:begin + PIECE_BYTES]
        file_rows.add_lines(connection, file.id, [file_rows.LineRow(number, piece)])
        yield
    forget(connection, followed.store, found.path)
    connection.execute("UPDATE files SET state = ?, requests = 0 WHERE id = ?", (file_rows.THERE, file.id))
    [[store]] = connection.execute("SELECT id FROM knowledge_stores WHERE number = ?", (followed.store,))
    wanted = Wanted(file.name, {}, {"type": "auto"}, "file")
    added = stores.add_file(connection, stores.store_of_owner(connection, store, owner), wanted,
                            FOLDERS_CLIENT, now)
    if reason:
        stores.fail(connection, added, "unsupported_file", reason)
    connection.execute("INSERT INTO knowledge_folder_files (store, path, stamp, digest, file) "
                       "VALUES (?, ?, ?, ?, ?)", (followed.store, found.path, found.stamp, digest, file.name))
