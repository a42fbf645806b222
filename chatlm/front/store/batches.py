"""Batches in the store: each line of their input has one result, in the file of outputs or of errors."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence as Seq
from contextlib import suppress
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.front.store import file_rows
from chatlm.front.store.file_rows import LineRow

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts


RUNNING = "validating", "in_progress"  # of a batch that goes on after a restart, as does
UNFINISHED = (*RUNNING, "cancelling")  # one that only has to be ended
SHOWN_PROBLEMS = 100                   # of a batch without a line that can be run
TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
         "cancelled_at")


class BatchRow(NamedTuple):
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
    client: str  # who made it: the name of a key

    def body(self, written: Mapping[str, int]) -> dict:
        """The batch as the API shows it. written: the lines of its output files, by name."""
        errors = None
        if self.problems:
            errors = {"object": "list", "data": json.loads(self.problems)}
        counts = {"total": self.total, "completed": self.completed, "failed": self.failed}
        return {
            "id": self.name,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": None,
            "errors": errors,
            "input_file_id": self.input,
            "completion_window": self.window,
            "status": self.status,
            "output_file_id": self.output if written.get(self.output) else None,
            "error_file_id": self.errors if written.get(self.errors) else None,
            "created_at": self.created,
            "expires_at": self.expires,
            **dict.fromkeys(TIMES),
            **json.loads(self.times),
            "request_counts": counts,
            "metadata": json.loads(self.metadata) if self.metadata else None,
        }


COLUMNS = ", ".join(BatchRow._fields)


def create(connection: sqlite3.Connection, owner: str, client: str, source: file_rows.File, endpoint: str,
           window: str, now: int, expires: int, metadata: str | None, lasts: int | None) -> BatchRow:
    name = f"batch_{secrets.token_hex(16)}"
    output, errors = (file_rows.create(connection, owner, f"{name}_{what}.jsonl", "batch_output", now)
                      for what in ("output", "error"))
    connection.execute(
        "INSERT INTO batches (name, owner, endpoint, window, metadata, input, output, errors, status, total, "
        "created, expires, lasts, client) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?, ?, ?, ?)",
        (name, owner, endpoint, window, metadata, source.name, output.name, errors.name, source.requests, now,
         expires, lasts, client))
    return batch_named(connection, name)


def batch_named(connection: sqlite3.Connection, name: str) -> BatchRow:
    """The batch with this name. Raises LookupError if there is none."""
    row = connection.execute(f"SELECT {COLUMNS} FROM batches WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise LookupError(name)
    return BatchRow(*row)


def batch_of_owner(connection: sqlite3.Connection, name: str, owner: str) -> BatchRow:
    """The batch with this name, if this owner may see it. Raises RequestError 404 if there is none."""
    with suppress(LookupError):
        batch = batch_named(connection, name)
        if file_rows.owns(owner, batch.owner):
            return batch
    raise RequestError(f"there is no batch {shown(name)}", status=404, code="not_found", param="id")


def shown_batch(connection: sqlite3.Connection, batch: BatchRow) -> dict:
    written = connection.execute("SELECT name, requests FROM files WHERE name IN (?, ?) AND state = ?",
                                 (batch.output, batch.errors, file_rows.THERE))
    return batch.body(dict(written.fetchall()))


def unfinished(connection: sqlite3.Connection) -> list[BatchRow]:
    """The batches that are not finished, the oldest first."""
    return [BatchRow(*row) for row in connection.execute(
        f"SELECT {COLUMNS} FROM batches WHERE status IN (?, ?, ?) ORDER BY id", UNFINISHED)]


def unfinished_of(connection: sqlite3.Connection, owner: str, client: str) -> int:
    """How many batches that belong to an owner, or that a client has made, are not finished."""
    return connection.execute(
        "SELECT COUNT(*) FROM batches WHERE status IN (?, ?, ?) AND (owner = ? OR client = ?)",
        (*UNFINISHED, owner, client)).fetchone()[0]


def reads(connection: sqlite3.Connection, file: file_rows.File) -> str | None:
    """The name of an unfinished batch that needs a file; None if there is none."""
    row = connection.execute("SELECT name FROM batches WHERE input = ? AND status IN (?, ?, ?) LIMIT 1",
                             (file.name, *UNFINISHED)).fetchone()
    return row and row[0]


def set_status(connection: sqlite3.Connection, batch: BatchRow, status: str, now: int, *passed: str):
    """Give a batch a status, and note the time. passed: statuses that it passes through at the same time."""
    times = json.loads(batch_named(connection, batch.name).times)
    times |= {f"{each}_at": now for each in (*passed, status)}
    connection.execute("UPDATE batches SET status = ?, times = ? WHERE id = ?",
                       (status, json.dumps(times), batch.id))


def begin(connection: sqlite3.Connection, batch: BatchRow, now: int) -> Parts[bool]:
    """Validate a batch's input. Returns False if the batch has failed, because none of its lines can be
    run."""
    source = file_rows.file_named(connection, batch.input)
    problems = list[dict]()
    last = -1
    while rows := connection.execute(
            "SELECT number, problem, url FROM lines WHERE file = ? AND number > ? ORDER BY number LIMIT ?",
            (source.id, last, SHOWN_PROBLEMS)).fetchall():
        for number, problem, url in rows:
            if problem is None and url == batch.endpoint:
                set_status(connection, batch, "in_progress", now)
                return True
            if problem or url:  # else it is blank
                problems.append({"code": "invalid_line", "line": number, "param": None,
                                 "message": problem or wrong_url(number, url, batch.endpoint)})
        del problems[SHOWN_PROBLEMS:]
        last = rows[-1][0]
        yield
    connection.execute("UPDATE batches SET problems = ?, failed = total WHERE id = ?",
                       (json.dumps(problems), batch.id))
    end(connection, batch, "failed", now)
    return False


def wrong_url(number: int, url: str, endpoint: str) -> str:
    return f"line {number:,}: url must be the endpoint of the batch, {endpoint}, not {shown(url)}"


class Waiting(NamedTuple):
    """A request without a result."""

    number: int
    model: str   # the model that its body names; "" for a line that cannot be run
    bytes: int   # of its text


def waiting_lines(connection: sqlite3.Connection, batch: BatchRow, after: int,
                  most: int) -> Parts[list[Waiting]]:
    """The first `most` requests after line `after` that have no result."""
    source, output, errors = (file_rows.file_named(connection, name).id
                              for name in (batch.input, batch.output, batch.errors))
    found = list[Waiting]()
    while len(found) < most and (rows := connection.execute(
            "SELECT number, CASE WHEN problem IS NULL THEN COALESCE(model, '') ELSE '' END, LENGTH(text), "
            "(custom_id IS NOT NULL OR problem IS NOT NULL) "
            "AND NOT EXISTS (SELECT 1 FROM lines WHERE file = ? AND number = asked.number) "
            "AND NOT EXISTS (SELECT 1 FROM lines WHERE file = ? AND number = asked.number) "
            "FROM lines AS asked WHERE file = ? AND number > ? ORDER BY number LIMIT ?",
            (output, errors, source, after, file_rows.PART_LINES)).fetchall()):
        found += [Waiting(*row) for *row, waits in rows if waits]
        after = rows[-1][0]
        yield
    return found[:most]


def line(connection: sqlite3.Connection, batch: BatchRow, number: int) -> LineRow:
    source = file_rows.file_named(connection, batch.input)
    return LineRow(*connection.execute("SELECT number, text, custom_id, url, model, problem FROM lines "
                                   "WHERE file = ? AND number = ?", (source.id, number)).fetchone())


def record(connection: sqlite3.Connection, batch: BatchRow, results: Seq[tuple[int, bytes, bool]]) -> bool:
    """Write results of lines: (number, text, whether it is an error). Writes nothing and returns False if the
    batch is no longer in progress."""
    if batch_named(connection, batch.name).status != "in_progress":
        return False
    for name, failures in (batch.output, False), (batch.errors, True):
        rows = [LineRow(number, text) for number, text, failed in results if failed is failures]
        if rows:
            file_rows.add_lines(connection, file_rows.file_named(connection, name).id, rows)
            column = "failed" if failures else "completed"
            connection.execute(f"UPDATE batches SET {column} = {column} + ? WHERE id = ?",
                               (len(rows), batch.id))
    return True


def cancel(connection: sqlite3.Connection, name: str, owner: str, now: int) -> BatchRow:
    """Cancel a batch. Raises RequestError 409 if it is finished."""
    batch = batch_of_owner(connection, name, owner)
    if batch.status not in UNFINISHED:
        raise RequestError(f"a batch whose status is {batch.status} cannot be cancelled", status=409,
                           code="batch_is_over", param="id")
    if batch.status != "cancelling":
        set_status(connection, batch, "cancelling", now)
    return batch_named(connection, name)


def end(connection: sqlite3.Connection, batch: BatchRow, status: str, now: int):
    """Finish a batch: show its output files, and remove those without a line."""
    if status == "failed":
        set_status(connection, batch, status, now)
    else:
        set_status(connection, batch, status, now, "finalizing")
    connection.execute("UPDATE batches SET ended = ? WHERE id = ?", (now, batch.id))
    expires = None if batch.lasts is None else now + batch.lasts
    for name in (batch.output, batch.errors):
        file = file_rows.file_named(connection, name)
        connection.execute("UPDATE files SET state = ?, expires = ? WHERE id = ?",
                           (file_rows.THERE if file.requests else file_rows.DELETED, expires, file.id))


def forget(connection: sqlite3.Connection, now: int, keep_s: int, uploads: Seq[int]):
    """Delete batches and files that have expired, and files whose upload broke off. uploads: the files that
    are being uploaded now."""
    connection.execute("DELETE FROM batches WHERE ended < ?", (now - keep_s,))
    connection.execute(
        f"UPDATE files SET state = {file_rows.DELETED} WHERE state = {file_rows.THERE} AND expires < ? "
        "AND name NOT IN (SELECT input FROM batches WHERE status IN (?, ?, ?))", (now, *UNFINISHED))
    marks = ", ".join("?" * len(uploads))
    connection.execute(
        f"UPDATE files SET state = {file_rows.DELETED} WHERE state = {file_rows.WRITTEN} "
        f"AND purpose = 'batch' AND id NOT IN ({marks})", uploads)
