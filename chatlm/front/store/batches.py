"""Batches in the store: each line of their input has one result, in the file of outputs or of errors."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.front.store import files
from chatlm.front.store.files import Row

if TYPE_CHECKING:
    import sqlite3


RUNNING = "validating", "in_progress"  # of a batch that goes on after a restart, as does
UNFINISHED = (*RUNNING, "cancelling")  # one that only has to be ended
SHOWN_PROBLEMS = 100                   # of a batch without a line that can be run
TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
         "cancelled_at")


class Batch(NamedTuple):
    """A row of `batches`."""

    id: int
    name: str
    owner: str
    endpoint: str
    window: str
    metadata: str | None
    input: str
    output: str
    errors: str
    status: str
    total: int
    completed: int
    failed: int
    created: int
    expires: int
    ended: int | None
    times: str
    problems: str | None
    lasts: int | None

    def body(self, written: Mapping[str, int]) -> dict:
        """As the API shows it. written: how many lines its files have, of those that are there."""
        problems = json.loads(self.problems) if self.problems else None
        return {"id": self.name, "object": "batch", "endpoint": self.endpoint, "model": None,
                "errors": {"object": "list", "data": problems} if problems else None,
                "input_file_id": self.input, "completion_window": self.window, "status": self.status,
                "output_file_id": self.output if written.get(self.output) else None,
                "error_file_id": self.errors if written.get(self.errors) else None,
                "created_at": self.created, "expires_at": self.expires,
                **dict.fromkeys(TIMES), **json.loads(self.times),
                "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
                "metadata": json.loads(self.metadata) if self.metadata else None}


COLUMNS = ", ".join(Batch._fields)


def create(connection: sqlite3.Connection, owner: str, source: files.File, endpoint: str, window: str,
           now: int, expires: int, metadata: str | None, lasts: int | None) -> Batch:
    name = f"batch_{secrets.token_hex(16)}"
    output, errors = (files.create(connection, owner, f"{name}_{what}.jsonl", "batch_output", now)
                      for what in ("output", "error"))
    connection.execute(
        "INSERT INTO batches (name, owner, endpoint, window, metadata, input, output, errors, status, total, "
        "created, expires, lasts) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?, ?, ?)",
        (name, owner, endpoint, window, metadata, source.name, output.name, errors.name, source.requests, now,
         expires, lasts))
    return named(connection, name)


def named(connection: sqlite3.Connection, name: str) -> Batch:
    """LookupError if there is none."""
    row = connection.execute(f"SELECT {COLUMNS} FROM batches WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise LookupError(name)
    return Batch(*row)


def found(connection: sqlite3.Connection, name: str, owner: str) -> Batch:
    """The batch with this name that this owner may see; RequestError 404 if there is none."""
    try:
        if files.owns(owner, (batch := named(connection, name)).owner):
            return batch
    except LookupError:
        pass
    raise RequestError(f"there is no batch {shown(name)}", status=404, code="not_found", param="id")


def shown_batch(connection: sqlite3.Connection, batch: Batch) -> dict:
    written = connection.execute("SELECT name, requests FROM files WHERE name IN (?, ?) AND state = ?",
                                 (batch.output, batch.errors, files.THERE))
    return batch.body(dict(written.fetchall()))


def unfinished(connection: sqlite3.Connection) -> list[Batch]:
    """Those that have something to do, the oldest first."""
    return [Batch(*row) for row in connection.execute(
        f"SELECT {COLUMNS} FROM batches WHERE status IN (?, ?, ?) ORDER BY id", UNFINISHED)]


def unfinished_of(connection: sqlite3.Connection, owner: str) -> int:
    """How many batches of an owner have something to do."""
    return connection.execute("SELECT COUNT(*) FROM batches WHERE status IN (?, ?, ?) AND owner = ?",
                              (*UNFINISHED, owner)).fetchone()[0]


def reads(connection: sqlite3.Connection, file: files.File) -> str | None:
    """The name of an unfinished batch that needs a file; None if there is none."""
    row = connection.execute("SELECT name FROM batches WHERE input = ? AND status IN (?, ?, ?)",
                             (file.name, *UNFINISHED)).fetchone()
    return row and row[0]


def set_status(connection: sqlite3.Connection, batch: Batch, status: str, now: int, *passed: str):
    """passed: statuses that it goes through at the same moment."""
    times = json.loads(named(connection, batch.name).times)
    times |= {f"{each}_at": now for each in (*passed, status)}
    connection.execute("UPDATE batches SET status = ?, times = ? WHERE id = ?",
                       (status, json.dumps(times), batch.id))


def begin(connection: sqlite3.Connection, batch: Batch, now: int) -> bool:
    """Validate its input; False if it has failed, since no line of it can be run."""
    source = files.named(connection, batch.input)
    bad = connection.execute(
        "SELECT number, problem, url FROM lines WHERE file = ? AND (problem IS NOT NULL OR url <> ?) "
        "ORDER BY number", (source.id, batch.endpoint)).fetchall()
    if len(bad) < batch.total:
        set_status(connection, batch, "in_progress", now)
        return True
    problems = [{"code": "invalid_line", "line": number, "param": None,
                 "message": problem or wrong_url(number, url, batch.endpoint)}
                for number, problem, url in bad[:SHOWN_PROBLEMS]]
    connection.execute("UPDATE batches SET problems = ?, failed = total WHERE id = ?",
                       (json.dumps(problems), batch.id))
    end(connection, batch, "failed", now)
    return False


def wrong_url(number: int, url: str, endpoint: str) -> str:
    return f"line {number:,}: url must be the endpoint of the batch, {endpoint}, not {shown(url)}"


class Waiting(NamedTuple):
    """A request without a result."""

    number: int
    model: str   # that its body names; "" for a line that cannot be run
    bytes: int   # of its text


def waiting_lines(connection: sqlite3.Connection, batch: Batch, after: int, most: int) -> list[Waiting]:
    """The first requests without a result of those after line `after`."""
    source, output, errors = (files.named(connection, name).id
                              for name in (batch.input, batch.output, batch.errors))
    return [Waiting(*row) for row in connection.execute(
        "SELECT number, CASE WHEN problem IS NULL THEN COALESCE(model, '') ELSE '' END, LENGTH(text) "
        "FROM lines AS asked WHERE file = ? AND number > ? "
        "AND (custom_id IS NOT NULL OR problem IS NOT NULL) "
        "AND NOT EXISTS (SELECT 1 FROM lines WHERE file = ? AND number = asked.number) "
        "AND NOT EXISTS (SELECT 1 FROM lines WHERE file = ? AND number = asked.number) "
        "ORDER BY number LIMIT ?", (source, after, output, errors, most))]


def line(connection: sqlite3.Connection, batch: Batch, number: int) -> Row:
    source = files.named(connection, batch.input)
    return Row(*connection.execute("SELECT number, text, custom_id, url, model, problem FROM lines "
                                   "WHERE file = ? AND number = ?", (source.id, number)).fetchone())


def record(connection: sqlite3.Connection, batch: Batch, results: Seq[tuple[int, bytes, bool]]) -> bool:
    """Note (number, text, whether it is an error) of lines, unless the batch is no longer in progress; is
    it?"""
    if named(connection, batch.name).status != "in_progress":
        return False
    for name, failures in (batch.output, False), (batch.errors, True):
        rows = [Row(number, text) for number, text, failed in results if failed is failures]
        if rows:
            files.add_lines(connection, files.named(connection, name).id, rows)
            column = "failed" if failures else "completed"
            connection.execute(f"UPDATE batches SET {column} = {column} + ? WHERE id = ?",
                               (len(rows), batch.id))
    return True


def cancel(connection: sqlite3.Connection, name: str, owner: str, now: int) -> Batch:
    """RequestError 409 if it is over."""
    batch = found(connection, name, owner)
    if batch.status not in UNFINISHED:
        raise RequestError(f"a batch whose status is {batch.status} cannot be cancelled", status=409,
                           code="batch_is_over", param="id")
    if batch.status != "cancelling":
        set_status(connection, batch, "cancelling", now)
    return named(connection, name)


def end(connection: sqlite3.Connection, batch: Batch, status: str, now: int):
    """Its files can be seen now; one without a line is removed."""
    set_status(connection, batch, status, now, *(() if status == "failed" else ("finalizing",)))
    connection.execute("UPDATE batches SET ended = ? WHERE id = ?", (now, batch.id))
    expires = None if batch.lasts is None else now + batch.lasts
    for name in (batch.output, batch.errors):
        file = files.named(connection, name)
        connection.execute("UPDATE files SET state = ?, expires = ? WHERE id = ?",
                           (files.THERE if file.requests else files.DELETED, expires, file.id))


def forget(connection: sqlite3.Connection, now: int, keep_s: int, uploads: Seq[int]):
    """Delete what has expired, and uploads that ended early. uploads: files that are being uploaded."""
    connection.execute("DELETE FROM batches WHERE ended < ?", (now - keep_s,))
    connection.execute(
        f"UPDATE files SET state = {files.DELETED} WHERE state = {files.THERE} AND expires < ? AND name NOT "
        "IN (SELECT input FROM batches WHERE status IN (?, ?, ?))", (now, *UNFINISHED))
    marks = ", ".join("?" * len(uploads))
    connection.execute(
        f"UPDATE files SET state = {files.DELETED} WHERE state = {files.WRITTEN} AND purpose = 'batch' "
        f"AND id NOT IN ({marks})", uploads)
