"""Vector stores, their files and batches of files in the database, and how the API shows them."""

from __future__ import annotations

import heapq
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.front.annexes.knowledge.limits import MOST_WINDOWS, STORES_OF_OWNER
from chatlm.front.annexes.knowledge.tables import TOTALS, make_words, words_table
from chatlm.front.store import file_rows
from chatlm.front.store.file_rows import owns
from chatlm.front.store.gone import place_of_gone

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.annexes.knowledge.passages import Passage
    from chatlm.front.store.store import Parts


DAY_S = 86_400
ACTIVE_S = 60        # last_active is written again only after so long
STATUSES = "in_progress", "completed", "failed", "cancelled"
MOST_CLIENTS = 1000  # that are looked at for the next turn
UNREADABLE = "unsupported_file", "invalid_file"
PURGED_ROWS = 100    # that are looked up at once
PURGED_WINDOWS = 500
MERGED_PAGES = 100   # of an index of words, at once


class VectorStore(NamedTuple):
    """A row of `knowledge_stores`."""

    number: int
    id: str
    owner: str
    client: str
    name: str
    description: str
    metadata: str
    created: int
    last_active: int
    expires_days: int | None
    expires: int | None
    expired: int
    embedder: int | None
    model: str
    chunking: str
    has_words: int
    in_progress: int
    completed: int
    failed: int
    cancelled: int
    windows: int
    bytes: int
    embedder_name: str | None
    problem: str | None  # of its folder; None: it follows none

    def status(self, now: int) -> str:
        if self.is_over(now):
            return "expired"
        return "in_progress" if self.in_progress else "completed"

    def is_over(self, now: int) -> bool:
        return bool(self.expired) or self.expires is not None and self.expires <= now

    def body(self, now: int) -> dict:
        """As the API shows it."""
        expiry = {"anchor": "last_active_at", "days": self.expires_days} if self.expires_days else None
        return {"id": self.id, "object": "vector_store", "created_at": self.created, "name": self.name,
                "description": self.description or None, "usage_bytes": self.bytes,
                "file_counts": counts(self), "status": self.status(now), "expires_after": expiry,
                "expires_at": self.expires, "last_active_at": self.last_active,
                "metadata": json.loads(self.metadata), "embedding_model": self.model or self.embedder_name,
                "read_only": self.problem is not None, "problem": self.problem or None}

    def check_open(self):
        """Raise RequestError 403 if no client may change it."""
        if self.problem is not None:
            raise RequestError(f"the vector store {shown(self.name)} follows a folder of the server "
                               "(--knowledge): you can search it, and only its operator changes it, in "
                               "that folder", status=403, code="read_only", param="id")


class StoreFile(NamedTuple):
    """A row of `knowledge_files`."""

    number: int
    store: int
    file: str
    filename: str
    status: str
    error_code: str | None
    error_message: str | None
    note: str | None
    attributes: str
    chunking: str
    created: int
    tries: int
    bytes: int
    passages: int
    windows: int
    characters: int
    tokens: int
    written: int

    def body(self, store_id: str) -> dict:
        """As the API shows it. `cut` says what its text lacks."""
        error = {"code": self.error_code, "message": self.error_message} if self.error_code else None
        return {"id": self.file, "object": "vector_store.file", "created_at": self.created,
                "vector_store_id": store_id, "status": self.status, "usage_bytes": self.bytes,
                "last_error": error, "attributes": json.loads(self.attributes),
                "chunking_strategy": shown_strategy(json.loads(self.chunking)), "cut": self.note,
                "filename": self.filename}


class FileBatch(NamedTuple):
    """A row of `knowledge_batches`."""

    number: int
    id: str
    store: int
    created: int
    cancelled: int


class Wanted(NamedTuple):
    """A file that a store is to have."""

    file: str
    attributes: Mapping[str, Any]
    chunking: Mapping[str, Any]
    param: str   # where its id stands in the body


class Embedded(NamedTuple):
    """A window: int8 times scale is a vector of length 1."""

    vector: bytes
    scale: float


def read_json(text: str) -> dict:
    return json.loads(text)


def counts(row: VectorStore) -> dict[str, int]:
    by_status = {status: getattr(row, status) for status in STATUSES}
    return {**by_status, "total": sum(by_status.values())}


def shown_strategy(strategy: Mapping[str, Any]) -> dict:
    """A strategy as answers have it: `auto` is none of the static ones."""
    return {"type": "other"} if strategy["type"] == "auto" else dict(strategy)


def not_found(what: str, name: str, param: str = "id") -> RequestError:
    return RequestError(f"there is no {what} {shown(name)}", status=404, code="not_found", param=param)


# stores

STORE = (f"SELECT {', '.join(VectorStore._fields[:-2])}, (SELECT name FROM knowledge_embedders WHERE "
         "knowledge_embedders.number = embedder), (SELECT problem FROM knowledge_folders WHERE "
         "knowledge_folders.store = knowledge_stores.number) FROM knowledge_stores")
FILE = f"SELECT {', '.join(StoreFile._fields)} FROM knowledge_files"
BATCH = f"SELECT {', '.join(FileBatch._fields)} FROM knowledge_batches"


def store_of_owner(connection: sqlite3.Connection, name: str, owner: str) -> VectorStore:
    """The store with this id, if this owner may see it. Raises RequestError 404 if there is none."""
    row = connection.execute(f"{STORE} WHERE id = ? AND deleted = 0", (name,)).fetchone()
    if row is None or not owns(owner, row[2]) and not is_followed(connection, row[0]):
        raise not_found("vector store", name)
    return VectorStore(*row)


def is_followed(connection: sqlite3.Connection, number: int) -> bool:
    """Does this server have a folder for the store, so that all clients see it?"""
    return bool(connection.execute("SELECT 1 FROM knowledge_folders WHERE store = ? AND active = 1",
                                   (number,)).fetchone())


def usable_store(connection: sqlite3.Connection, name: str, owner: str, now: int) -> VectorStore:
    """The same, but RequestError 400 for one that has expired."""
    store = store_of_owner(connection, name, owner)
    if store.is_over(now):
        raise RequestError(f"the vector store {store.id} has expired: make another one", code="expired",
                           param="id")
    return store


def stores_of_owner(connection: sqlite3.Connection, owner: str, after: str, before: str,
                    ascending: bool) -> Iterator[VectorStore]:
    """Its stores in order, behind `after` and in front of `before`."""
    place = ""
    values: list[Any] = []
    for param, name, later in ("after", after, ascending), ("before", before, not ascending):
        if name:
            place += f" AND number {'>' if later else '<'} ?"
            values.append(store_place(connection, name, owner, param))
    direction = order(ascending, before, after)
    own = connection.execute(f"{STORE} WHERE owner = ? AND deleted = 0{place} ORDER BY number {direction}",
                             [owner, *values])
    followed = [row for number, in connection.execute(
        "SELECT store FROM knowledge_folders INDEXED BY knowledge_folders_active WHERE active = 1").fetchall()
        for row in connection.execute(f"{STORE} WHERE number = ? AND deleted = 0{place}", [number, *values])]
    backwards = direction == "DESC"
    followed.sort(reverse=backwards)
    return map(VectorStore._make, heapq.merge(own, followed, key=itemgetter(0), reverse=backwards))


def store_place(connection: sqlite3.Connection, name: str, owner: str, param: str) -> int:
    """Where a store is in the list of its owner, or was. Raises RequestError if it is not known."""
    with suppress(RequestError):
        return store_of_owner(connection, name, owner).number
    found = place_of_gone(connection, "stores", name)
    if found is None or not owns(owner, found[1]):
        raise bad_value(param, name, "the id of a row of the list")
    return found[0]


def order(ascending: bool, before: str, after: str) -> str:
    """The direction in which rows are read. A page in front of `before` alone ends at it, so it is read
    backwards."""
    forwards = ascending if after or not before else not ascending
    return "ASC" if forwards else "DESC"


def file_place(connection: sqlite3.Connection, store: VectorStore, name: str, param: str) -> int:
    """Where a file is in the list of its store, or was. Raises RequestError if it is not known."""
    row = (connection.execute("SELECT number FROM knowledge_files WHERE file = ? AND store = ? "
                              "AND deleted = 0", (name, store.number)).fetchone()
           or place_of_gone(connection, f"store {store.number}", name))
    if row is None:
        raise bad_value(param, name, "the id of a row of the list")
    return row[0]


def create_store(connection: sqlite3.Connection, owner: str, client: str, values: Mapping[str, Any],
                 model: str, now: int) -> VectorStore:
    """A new store without files. Raises RequestError if its owner has too many."""
    held = connection.execute("SELECT COUNT(*) FROM knowledge_stores WHERE owner = ? AND deleted = 0",
                              (owner,)).fetchone()[0]
    if held >= STORES_OF_OWNER:
        raise RequestError(f"you have {held} vector stores, as many as one may have: delete some", status=403,
                           code="too_many_vector_stores")
    days = values.get("expires_after")
    name = f"vs_{secrets.token_hex(16)}"
    cursor = connection.execute(
        "INSERT INTO knowledge_stores (id, owner, client, name, description, metadata, created, last_active, "
        "expires_days, expires, chunking, model) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (name, owner, client, values.get("name", ""), values.get("description", ""),
         json.dumps(values.get("metadata", {})), now, now, days, days and now + days * DAY_S,
         json.dumps(values.get("chunking_strategy", {"type": "auto"})), model))
    number = cursor.lastrowid or 0
    if make_words(connection, number):
        connection.execute("UPDATE knowledge_stores SET has_words = 1 WHERE number = ?", (number,))
    return store_of_owner(connection, name, owner)


def update_store(connection: sqlite3.Connection, store: VectorStore, values: Mapping[str, Any], now: int):
    """Change what a body names."""
    changes: dict[str, Any] = {"last_active": now}
    if "name" in values:
        changes["name"] = values["name"]
    if "metadata" in values:
        changes["metadata"] = json.dumps(values["metadata"])
    days = values.get("expires_after", store.expires_days)
    changes["expires_days"] = days
    changes["expires"] = days and now + days * DAY_S
    names = ", ".join(f"{column} = ?" for column in changes)
    connection.execute(f"UPDATE knowledge_stores SET {names} WHERE number = ?",
                       (*changes.values(), store.number))


def note_use(connection: sqlite3.Connection, store: VectorStore, now: int):
    """It was used now: it lasts longer."""
    if now - store.last_active >= ACTIVE_S:
        update_store(connection, store, {}, now)


def delete_store(connection: sqlite3.Connection, store: VectorStore):
    """Nobody sees it from now on; `purge` removes what it has."""
    connection.execute("UPDATE knowledge_stores SET deleted = 1 WHERE number = ?", (store.number,))


def expire(connection: sqlite3.Connection, now: int) -> Parts[None]:
    """Empty the stores whose time is over. They are shown until their owners delete them."""
    while row := connection.execute("SELECT number FROM knowledge_stores WHERE deleted = 0 AND expired = 0 "
                                    "AND expires <= ? LIMIT 1", (now,)).fetchone():
        for file in connection.execute("SELECT number FROM knowledge_files WHERE store = ? AND deleted = 0",
                                       row).fetchall():
            connection.execute("UPDATE knowledge_files SET deleted = 1 WHERE number = ?", file)
            yield
        connection.execute("UPDATE knowledge_stores SET expired = 1 WHERE number = ?", row)
        yield


# files

def check_file(connection: sqlite3.Connection, wanted: Wanted, owner: str) -> file_rows.File:
    """The uploaded file that a store of this owner is to have. Raises RequestError if it may not."""
    file = file_rows.file_of_owner(connection, wanted.file, owner, wanted.param)
    if file.purpose in ("batch", "batch_output"):
        raise RequestError(f"the purpose of {file.name} is {file.purpose}, not assistants or user_data",
                           code="invalid_value", param=wanted.param)
    return file


def check_room(connection: sqlite3.Connection, store: int, added: int, param: str):
    """Raises RequestError if a store would have too many files."""
    held = connection.execute(
        "SELECT in_progress + completed + failed + cancelled FROM knowledge_stores WHERE number = ?",
        (store,)).fetchone()[0]
    if held + added > LIMITS.store_files:
        raise RequestError(f"the vector store has {held:,} files, and may have {LIMITS.store_files:,}",
                           status=403, code="too_many_files", param=param)


def add_file(connection: sqlite3.Connection, store: VectorStore, wanted: Wanted, client: str,
             now: int) -> StoreFile:
    """Have a store get a file, again if it has it. client: who adds it, and pays for it. Raises RequestError
    if it may not."""
    file = check_file(connection, wanted, store.owner)
    connection.execute("UPDATE knowledge_files SET deleted = 1 WHERE store = ? AND file = ? AND deleted = 0",
                       (store.number, file.name))
    check_room(connection, store.number, 1, wanted.param)
    cursor = connection.execute(
        "INSERT INTO knowledge_files (store, file, filename, attributes, chunking, client, created) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (store.number, file.name, file.filename, json.dumps(wanted.attributes), json.dumps(wanted.chunking),
         client, now))
    return file_numbered(connection, cursor.lastrowid or 0)


def add_files(connection: sqlite3.Connection, store: VectorStore, wanted: Seq[Wanted], client: str,
              now: int) -> Parts[list[StoreFile]]:
    """Have a store get files that were checked, but for those that were deleted since."""
    added = list[StoreFile]()
    for each in wanted:
        with suppress(RequestError):
            added.append(add_file(connection, store, each, client, now))
        yield
    return added


def check_files(connection: sqlite3.Connection, wanted: Seq[Wanted], owner: str) -> Parts[None]:
    """Raises RequestError if a store of this owner may not have one of these."""
    for each in wanted:
        check_file(connection, each, owner)
        yield


def file_numbered(connection: sqlite3.Connection, number: int) -> StoreFile:
    """Raises LookupError if it is gone."""
    row = connection.execute(f"{FILE} WHERE number = ? AND deleted = 0",
                             (number,)).fetchone()
    if row is None:
        raise LookupError(number)
    return StoreFile(*row)


def file_of_store(connection: sqlite3.Connection, store: VectorStore, name: str) -> StoreFile:
    """A file by its id. Raises RequestError 404 if the store does not have it."""
    row = connection.execute(f"{FILE} WHERE store = ? AND file = ? "
                             "AND deleted = 0", (store.number, name)).fetchone()
    if row is None:
        raise not_found(f"file of {store.id}", name, "file_id")
    return StoreFile(*row)


def files_of_store(connection: sqlite3.Connection, store: VectorStore, after: str, before: str,
                   ascending: bool, status: str = "", batch: int | None = None) -> Iterator[StoreFile]:
    """Its files in order, behind `after` and in front of `before`. status: only these; batch: only its."""
    source = "knowledge_files AS f"
    place = "f.number"
    condition = "f.store = ? AND f.deleted = 0"
    values: list[Any] = [store.number]
    if batch is not None:
        source = "knowledge_batch_files AS mine CROSS JOIN knowledge_files AS f ON f.number = mine.file"
        place = "mine.file"
        condition = "mine.batch = ? AND f.deleted = 0"
        values = [batch]
    for param, name, later in ("after", after, ascending), ("before", before, not ascending):
        if name:
            condition += f" AND {place} {'>' if later else '<'} ?"
            values.append(file_place(connection, store, name, param))
    if status:
        condition += " AND f.status = ?"
        values.append(status)
    columns = ", ".join(f"f.{column}" for column in StoreFile._fields)
    rows = connection.execute(f"SELECT {columns} FROM {source} WHERE {condition} "
                              f"ORDER BY {place} {order(ascending, before, after)}", values)
    return map(StoreFile._make, rows)


def set_attributes(connection: sqlite3.Connection, file: StoreFile, attributes: Mapping[str, Any]):
    connection.execute("UPDATE knowledge_files SET attributes = ? WHERE number = ?",
                       (json.dumps(attributes), file.number))


def remove_file(connection: sqlite3.Connection, file: StoreFile):
    """Take a file out of its store; `purge` removes its texts."""
    connection.execute("UPDATE knowledge_files SET deleted = 1 WHERE number = ?", (file.number,))


def passages_after(connection: sqlite3.Connection, file: StoreFile,
                   place: int) -> Iterator[tuple[int, str, int, int | None, str]]:
    """(place, text, start, page, heading) of the passages of a file from a place on."""
    return connection.execute("SELECT place, text, start, page, heading FROM knowledge_passages "
                              "WHERE file = ? AND place >= ? "
                              "ORDER BY place", (file.number, place))


# batches

def create_batch(connection: sqlite3.Connection, store: VectorStore, wanted: Seq[Wanted], client: str,
                 now: int) -> Parts[FileBatch]:
    """Have a store get all files of a batch. Raises RequestError, before it has any, if it may not have
    one."""
    yield from check_files(connection, wanted, store.owner)
    check_room(connection, store.number, len(wanted), wanted[0].param)
    name = f"vsfb_{secrets.token_hex(16)}"
    connection.execute("INSERT INTO knowledge_batches (id, store, created) VALUES (?, ?, ?)",
                       (name, store.number, now))
    batch = batch_of_store(connection, store, name)
    for each in wanted:
        for file in (yield from add_files(connection, store, [each], client, now)):
            connection.execute("INSERT INTO knowledge_batch_files (batch, file) VALUES (?, ?)",
                               (batch.number, file.number))
    return batch


def batch_of_store(connection: sqlite3.Connection, store: VectorStore, name: str) -> FileBatch:
    """A batch by its id. Raises RequestError 404 if the store has none."""
    row = connection.execute(f"{BATCH} WHERE id = ? AND store = ?",
                             (name, store.number)).fetchone()
    if row is None:
        raise not_found(f"file batch of {store.id}", name, "batch_id")
    return FileBatch(*row)


def shown_batch(connection: sqlite3.Connection, store: VectorStore, batch: FileBatch) -> dict:
    """As the API shows it. Files that were taken out of the store since are counted as cancelled."""
    sums = ", ".join(f"IFNULL(SUM(now = '{status}'), 0)" for status in STATUSES)
    row = connection.execute(
        f"SELECT {sums} FROM (SELECT CASE WHEN deleted THEN 'cancelled' ELSE status END AS now "
        "FROM knowledge_batch_files JOIN knowledge_files ON knowledge_files.number = "
        "knowledge_batch_files.file WHERE batch = ?)", (batch.number,)).fetchone()
    by_status = dict(zip(STATUSES, row))
    status = "completed"
    if by_status["in_progress"]:
        status = "in_progress"
    elif batch.cancelled:
        status = "cancelled"
    elif by_status["failed"] and not by_status["completed"]:
        status = "failed"
    return {"id": batch.id, "object": "vector_store.files_batch", "created_at": batch.created,
            "vector_store_id": store.id, "status": status,
            "file_counts": {**by_status, "total": sum(by_status.values())}}


def cancel_batch(connection: sqlite3.Connection, batch: FileBatch) -> Parts[None]:
    """Cancel those of its files that are not there yet."""
    waiting = connection.execute(
        "SELECT mine.file FROM knowledge_batch_files AS mine JOIN knowledge_files ON number = mine.file "
        "WHERE batch = ? AND status = 'in_progress' AND deleted = 0", (batch.number,)).fetchall()
    if waiting:
        connection.execute("UPDATE knowledge_batches SET cancelled = 1 WHERE number = ?", (batch.number,))
    for file in waiting:
        connection.execute("UPDATE knowledge_files SET status = 'cancelled' WHERE number = ? "
                           "AND status = 'in_progress'", file)
        yield


# ingestion

class Pending(NamedTuple):
    """A store, and who has added files to it that are to be ingested."""

    store: int
    id: str
    owner: str
    client: str
    model: str


# Files that are to be ingested, unless their store is expired or deleted
WAITING = ("FROM knowledge_files INDEXED BY knowledge_files_waiting "
           "WHERE status = 'in_progress' AND deleted = 0")


def waiting_clients(connection: sqlite3.Connection, after: str) -> list[str]:
    """The next ones who have added files that are to be ingested."""
    found = list[str]()
    query = f"SELECT client {WAITING} AND client > ? ORDER BY client LIMIT 1"
    row = connection.execute(query, (after,)).fetchone()
    while row and len(found) < MOST_CLIENTS:
        found += row
        row = connection.execute(query, row).fetchone()
    return found


def next_pending(connection: sqlite3.Connection, client: str, after: int) -> Parts[Pending | None]:
    """The next store with files of a client that are to be ingested: behind a number, or else the first."""
    for last in (after, 0):
        row: tuple[int] | None = (last,)
        while row := connection.execute(f"SELECT store {WAITING} AND client = ? AND store > ? ORDER BY store "
                                        "LIMIT 1", (client, *row)).fetchone():
            found = connection.execute("SELECT number, id, owner, model FROM knowledge_stores "
                                       "WHERE number = ? AND deleted = 0 AND expired = 0", row).fetchone()
            if found:
                number, name, owner, model = found
                return Pending(number, name, owner, client, model)
            yield
    return None


def claim(connection: sqlite3.Connection, pending: Pending, busy: Seq[int]) -> StoreFile | None:
    """The first file of a client in a store that waits to be ingested; None if there is none. busy: files
    that are under way."""
    marks = ", ".join("?" * len(busy))
    row = connection.execute(
        f"SELECT {', '.join(StoreFile._fields)} {WAITING} AND client = ? AND store = ? "
        f"AND number NOT IN ({marks}) ORDER BY number LIMIT 1",
        (pending.client, pending.store, *busy)).fetchone()
    return row and StoreFile(*row)


def begin_try(connection: sqlite3.Connection, file: StoreFile):
    """Count that it is read now: what the server reads when it dies again and again is given up some time."""
    connection.execute("UPDATE knowledge_files SET tries = tries + 1 WHERE number = ?", (file.number,))


def end_try(connection: sqlite3.Connection, file: StoreFile, tries: int):
    """The server has survived it. tries: what is held against the file from now on."""
    connection.execute("UPDATE knowledge_files SET tries = ? WHERE number = ?", (tries, file.number))


def is_wanted(connection: sqlite3.Connection, file: StoreFile) -> bool:
    """Is it still to be ingested?"""
    return connection.execute(
        "SELECT 1 FROM knowledge_files JOIN knowledge_stores ON knowledge_stores.number = store "
        "WHERE knowledge_files.number = ? AND status = 'in_progress' AND knowledge_files.deleted = 0 "
        "AND knowledge_stores.deleted = 0 AND expired = 0", (file.number,)).fetchone() is not None


def fail(connection: sqlite3.Connection, file: StoreFile, code: str, message: str,
         lacks_embedder: bool = False):
    """A file cannot be ingested. lacks_embedder: until there is one."""
    if is_wanted(connection, file):
        connection.execute("UPDATE knowledge_files SET status = 'failed', error_code = ?, error_message = ?, "
                           "lacks_embedder = ? WHERE number = ?",
                           (code, message[:1000], lacks_embedder, file.number))


AGAIN = ("UPDATE knowledge_files SET status = 'in_progress', error_code = NULL, error_message = NULL, "
         "tries = 0, lacks_embedder = 0 WHERE ")


def without_embedder(connection: sqlite3.Connection, store: int, client: str) -> Pending | None:
    """The next store and client, behind these, whose files wait for an embedder."""
    row = connection.execute(
        "SELECT s.number, id, owner, f.client, model FROM knowledge_files AS f INDEXED BY "
        "knowledge_files_without_embedder CROSS JOIN knowledge_stores AS s ON s.number = f.store "
        "AND s.deleted = 0 AND expired = 0 WHERE lacks_embedder = 1 AND (f.store, f.client) > (?, ?) "
        "AND f.deleted = 0 ORDER BY f.store, f.client LIMIT 1", (store, client)).fetchone()
    return row and Pending(*row)


def take_again(connection: sqlite3.Connection, pending: Pending) -> Parts[None]:
    """There is an embedder for a client's files in a store: those that had none are read."""
    for row in connection.execute("SELECT number FROM knowledge_files WHERE store = ? AND client = ? "
                                  "AND lacks_embedder = 1 AND deleted = 0",
                                  (pending.store, pending.client)).fetchall():
        connection.execute(f"{AGAIN} number = ?", row)
        yield


def try_again(connection: sqlite3.Connection, store: int, file: str):
    """Read a file again that has failed because of the server."""
    connection.execute(f"{AGAIN} store = ? AND file = ? AND deleted = 0 AND status = 'failed' "
                       "AND error_code = 'server_error'", (store, file))


def embedder_number(connection: sqlite3.Connection, digest: str, name: str, dimensions: int) -> int:
    connection.execute("INSERT INTO knowledge_embedders (digest, name, dimensions) VALUES (?, ?, ?) "
                       "ON CONFLICT (digest) DO UPDATE SET name = excluded.name", (digest, name, dimensions))
    return connection.execute("SELECT number FROM knowledge_embedders WHERE digest = ?",
                              (digest,)).fetchone()[0]


def add_parts(connection: sqlite3.Connection, file: StoreFile, passages: Seq[Passage],
              vectors: Seq[Embedded], embedder: int) -> Parts[bool]:
    """Write the next passages of a file. They are searched once it is completed. Returns False as soon as it
    is no longer wanted."""
    waiting = iter(vectors)
    for passage in passages:
        if not is_wanted(connection, file):
            return False
        (has_words,) = connection.execute("SELECT has_words FROM knowledge_stores WHERE number = ?",
                                          (file.store,)).fetchone()
        number = connection.execute(
            "INSERT INTO knowledge_passages (store, file, place, heading, start, page, tokens, text) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (file.store, file.number, passage.place, passage.heading, passage.start, passage.page,
             passage.tokens, passage.text)).lastrowid
        own = [*islice(waiting, len(passage.windows))]
        connection.executemany(
            "INSERT INTO knowledge_windows (store, file, passage, embedder, vector, scale) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            [(file.store, file.number, number, embedder, *window) for window in own])
        if has_words:
            connection.execute(f"INSERT INTO {words_table(file.store)} (rowid, heading, text) "
                               "VALUES (?, ?, ?)", (number, passage.heading, passage.text))
        size = len(passage.text.encode()) + len(passage.heading.encode())
        size += sum(len(window.vector) + 8 for window in own)
        connection.execute("UPDATE knowledge_files SET written = written + 1, bytes = bytes + ? "
                           "WHERE number = ?", (size, file.number))
        yield
    return True


def clear_parts(connection: sqlite3.Connection, file: StoreFile) -> Parts[None]:
    """Remove what was written of a file that is not completed."""
    yield from purge_passages(connection, file.number, file.store)
    connection.execute("UPDATE knowledge_files SET written = 0, bytes = 0 WHERE number = ?", (file.number,))


def complete(connection: sqlite3.Connection, file: StoreFile, passages: Seq[Passage], embedder: int,
             characters: int, note: str | None) -> bool:
    """All parts of a file are written: it is searched from now on. Returns False if it is no longer wanted.
    Raises RequestError if its store would have too many windows."""
    if not is_wanted(connection, file):
        return False
    windows = sum(len(passage.windows) for passage in passages)
    check_windows(connection, file, windows)
    connection.execute("UPDATE knowledge_stores SET embedder = ? WHERE number = ? AND embedder IS NULL",
                       (embedder, file.store))
    connection.execute(
        "UPDATE knowledge_files SET status = 'completed', written = 0, passages = ?, windows = ?, "
        "characters = ?, tokens = ?, note = ? WHERE number = ?",
        (len(passages), windows, characters, sum(passage.tokens for passage in passages), note, file.number))
    return True


def check_windows(connection: sqlite3.Connection, file: StoreFile, windows: int):
    """Raises RequestError if the store of a file would have too many windows with its own."""
    (held,) = connection.execute("SELECT windows FROM knowledge_stores WHERE number = ?",
                                 (file.store,)).fetchone()
    if held + windows > MOST_WINDOWS:
        raise RequestError(f"its vector store has {held:,} windows of text, and with the {windows:,} of this "
                           f"file it would have more than {MOST_WINDOWS:,}")


# another embedder

class Foreign(NamedTuple):
    """A store as it is compared with the embedder of today."""

    store: int
    owner: str
    client: str
    model: str
    digest: str   # of the embedder whose windows are searched


class Bare(NamedTuple):
    """A passage without windows of an embedder."""

    number: int
    heading: str
    text: str
    place: int


def embedded_stores(connection: sqlite3.Connection, after: int, most: int) -> list[Foreign]:
    """Stores behind a number whose windows are searched, and which have no older ones."""
    return [Foreign(*row) for row in connection.execute(
        "SELECT s.number, owner, client, model, digest FROM knowledge_stores AS s NOT INDEXED "
        "CROSS JOIN knowledge_embedders AS e ON e.number = embedder WHERE s.number > ? AND deleted = 0 "
        "AND expired = 0 AND old_windows = 0 ORDER BY s.number LIMIT ?", (after, most))]


def bare_passages(connection: sqlite3.Connection, store: int, embedder: int, file: int,
                  place: int) -> Parts[tuple[int, list[Bare]]]:
    """(a completed file, some of its passages without windows of an embedder): of the file with this number
    those behind a place, else those of the next file; (0, []) if there is no other file."""
    row: tuple[int] | None = (file,)
    while row:
        found = connection.execute(
            "SELECT number, heading, text, place, EXISTS (SELECT 1 FROM knowledge_windows "
            "WHERE passage = p.number AND embedder = ?) FROM knowledge_passages AS p "
            "WHERE file = ? AND place > ? ORDER BY place LIMIT ?",
            (embedder, *row, place, PURGED_ROWS)).fetchall()
        bare = [Bare(*each) for *each, has_windows in found if not has_windows]
        if bare:
            return row[0], bare
        if found:
            place = found[-1][3]
        else:
            place = -1
            row = connection.execute("SELECT number FROM knowledge_files WHERE store = ? AND deleted = 0 "
                                     "AND number > ? AND status = 'completed' ORDER BY number LIMIT 1",
                                     (store, *row)).fetchone()
        yield
    return 0, []


def add_windows(connection: sqlite3.Connection, store: int, file: int, embedder: int,
                windows: Seq[tuple[int, Embedded]]):
    """Give passages of a file windows beside those that they have, unless the file was deleted. windows: with
    the numbers of their passages."""
    if connection.execute("SELECT 1 FROM knowledge_files WHERE number = ? AND deleted = 0",
                          (file,)).fetchone():
        connection.executemany(
            "INSERT INTO knowledge_windows (store, file, passage, embedder, vector, scale) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            [(store, file, passage, embedder, *window) for passage, window in windows])


def search_with(connection: sqlite3.Connection, store: int, embedder: int) -> Parts[None]:
    """All passages of a store have windows of another embedder: these are searched from now on."""
    for file in connection.execute("SELECT number FROM knowledge_files WHERE store = ? AND deleted = 0 "
                                   "AND status = 'completed'", (store,)).fetchall():
        connection.execute(
            "UPDATE knowledge_files SET "
            "windows = (SELECT COUNT(*) FROM knowledge_windows WHERE file = ?2 AND embedder = ?1), "
            "bytes = (SELECT IFNULL(SUM(LENGTH(CAST(text AS BLOB)) + LENGTH(CAST(heading AS BLOB))), 0) "
            "FROM knowledge_passages WHERE file = ?2) + (SELECT IFNULL(SUM(LENGTH(vector) + 8), 0) "
            "FROM knowledge_windows WHERE file = ?2 AND embedder = ?1) WHERE number = ?2",
            (embedder, *file))
        yield
    connection.execute("UPDATE knowledge_stores SET embedder = ?, old_windows = 1 WHERE number = ?",
                       (embedder, store))


def purge_windows(connection: sqlite3.Connection, store: int, embedder: int) -> Parts[None]:
    """Remove the windows of a store that are of other embedders than this."""
    for other in "<", ">":
        while connection.execute(
                "DELETE FROM knowledge_windows WHERE number IN (SELECT number FROM knowledge_windows "
                f"WHERE store = ? AND embedder {other} ? LIMIT ?)",
                (store, embedder, PURGED_WINDOWS)).rowcount:
            yield
    connection.execute("UPDATE knowledge_stores SET old_windows = 0 WHERE number = ?", (store,))


def totals(connection: sqlite3.Connection) -> dict[str, int]:
    """Files by their status, and bytes, of all stores."""
    row = connection.execute(f"SELECT {', '.join(TOTALS)} FROM knowledge_totals WHERE number = 1").fetchone()
    return dict(zip(TOTALS, row))


# what was deleted

def purge(connection: sqlite3.Connection, until_s: float, busy: Seq[int]) -> Parts[bool]:
    """Remove what was deleted, until that time. False if there was nothing. busy: files that are ingested."""
    has_removed = False
    while work := purge_next(connection, busy):
        has_removed = True
        yield from work
        yield
        if time.monotonic() > until_s:
            break
    return has_removed


def purge_next(connection: sqlite3.Connection, busy: Seq[int]) -> Parts[None] | None:
    """What removes the next thing that was deleted; None if there is none."""
    row = connection.execute("SELECT number FROM knowledge_stores WHERE deleted = 1 LIMIT 1").fetchone()
    if row:
        return purge_store(connection, *row)
    row = connection.execute(
        "SELECT number, store FROM knowledge_files INDEXED BY knowledge_files_deleted WHERE deleted = 1 "
        "LIMIT 1").fetchone()
    if row:
        return purge_file(connection, *row)
    row = connection.execute("SELECT number, embedder FROM knowledge_stores INDEXED BY knowledge_stores_old "
                             "WHERE old_windows > 0 LIMIT 1").fetchone()
    if row:
        return purge_windows(connection, *row)
    row = connection.execute("SELECT number, expired FROM knowledge_stores INDEXED BY "
                             "knowledge_stores_stale WHERE stale_words > 0 LIMIT 1").fetchone()
    if row:
        return merge_words(connection, *row)
    marks = ", ".join("?" * len(busy))
    row = connection.execute(f"{FILE} INDEXED BY knowledge_files_left WHERE written > 0 AND status IN "
                             f"('failed', 'cancelled') AND number NOT IN ({marks}) LIMIT 1", busy).fetchone()
    return row and clear_parts(connection, StoreFile(*row))


def purge_store(connection: sqlite3.Connection, store: int) -> Parts[None]:
    """Remove a store that was deleted, with all that it has."""
    for [file] in connection.execute("SELECT number FROM knowledge_files WHERE store = ?",
                                     (store,)).fetchall():
        yield from purge_file(connection, file, store)
    if connection.execute("SELECT has_words FROM knowledge_stores WHERE number = ?", (store,)).fetchone()[0]:
        yield from drop_words(connection, store)
    connection.execute("DELETE FROM knowledge_batches WHERE store = ?", (store,))
    connection.execute("DELETE FROM knowledge_stores WHERE number = ?", (store,))


def purge_file(connection: sqlite3.Connection, file: int, store: int) -> Parts[None]:
    """Remove a file that was deleted, and the batches whose last one it is."""
    yield from purge_passages(connection, file, store)
    batches = connection.execute("SELECT batch FROM knowledge_batch_files WHERE file = ?", (file,)).fetchall()
    connection.execute("DELETE FROM knowledge_batch_files WHERE file = ?", (file,))
    for batch in batches:
        connection.execute("DELETE FROM knowledge_batches WHERE number = ?1 AND NOT EXISTS "
                           "(SELECT 1 FROM knowledge_batch_files WHERE batch = ?1)", batch)
    connection.execute("DELETE FROM knowledge_files WHERE number = ?", (file,))


def purge_passages(connection: sqlite3.Connection, file: int, store: int) -> Parts[None]:
    """Remove the passages of a file, their windows and words."""
    is_gone, has_words = connection.execute("SELECT deleted, has_words FROM knowledge_stores "
                                            "WHERE number = ?", (store,)).fetchone() or (1, 0)
    while passages := connection.execute(
            "SELECT number, heading, text FROM knowledge_passages WHERE file = ? ORDER BY place LIMIT ?",
            (file, PURGED_ROWS)).fetchall():
        for number, heading, text in passages:
            connection.execute("DELETE FROM knowledge_windows WHERE passage = ?", (number,))
            if has_words and not is_gone:  # the table of a deleted store goes as a whole
                table = words_table(store)
                connection.execute(f"INSERT INTO {table} ({table}, rowid, heading, text) "
                                   "VALUES ('delete', ?, ?, ?)", (number, heading, text))
                connection.execute("UPDATE knowledge_stores SET stale_words = 1 WHERE number = ?", (store,))
            connection.execute("DELETE FROM knowledge_passages WHERE number = ?", (number,))
            yield


def drop_words(connection: sqlite3.Connection, store: int) -> Parts[None]:
    """Remove a store's index of words. Its pages are first removed from the table in which FTS5 has them,
    since to drop that at once takes long."""
    table = words_table(store)
    last = -1
    while pages := connection.execute(f"SELECT id FROM {table}_data WHERE id > ? ORDER BY id LIMIT ?",
                                      (last, MERGED_PAGES)).fetchall():
        connection.executemany(f"DELETE FROM {table}_data WHERE id = ?", pages)
        [last] = pages[-1]
        yield
    connection.execute(f"DROP TABLE {table}")
    connection.execute("UPDATE knowledge_stores SET has_words = 0, stale_words = 0 WHERE number = ?",
                       (store,))


def merge_words(connection: sqlite3.Connection, store: int, expired: int) -> Parts[None]:
    """Merge a store's index of words into one, after which words of deleted texts are gone from it. SQLite
    keeps them until then, even with secure_delete."""
    if expired:
        yield from drop_words(connection, store)
        return
    connection.execute("UPDATE knowledge_stores SET stale_words = 2 WHERE number = ?", (store,))
    table = words_table(store)
    pages = -MERGED_PAGES  # below 0: begin to merge all
    changed = 2
    while changed > 1:
        before = connection.total_changes
        connection.execute(f"INSERT INTO {table} ({table}, rank) VALUES ('merge', ?)", (pages,))
        changed = connection.total_changes - before if pages > 0 else 2
        pages = MERGED_PAGES
        yield
    connection.execute("UPDATE knowledge_stores SET stale_words = 0 WHERE number = ? AND stale_words = 2",
                       (store,))
