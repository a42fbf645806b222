"""The routes of the Files API: files of requests for batches, what batches write, and documents for vector
stores."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence as Seq
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from chatlm.common.client_words import overloaded, too_large
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, shown, visible
from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.front.annexes.batches.fields import FILES_LIMIT, LAST_SECONDS, PURPOSE, UPLOADED
from chatlm.front.annexes.batches.limits import MOST_BYTES, MOST_LINES
from chatlm.front.api.batch_lines import storable
from chatlm.front.api.list_fields import AFTER, ORDER
from chatlm.front.intake.budget import BODY_S
from chatlm.front.intake.tasks import CheckedLine, NumberedLine
from chatlm.front.server.inflate import encoding_of
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.stored_lists import (
    DAY_S, now_s, number_in, query_value, require_store, send_page, send_part, take_room)
from chatlm.front.server.streams import BODY_BYTES_PER_S
from chatlm.front.store import batches, file_rows, quota
from chatlm.front.store.file_rows import File, LineRow
from chatlm.front.store.pages import Listed, page_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatlm.front.intake.intake import Intake
    from chatlm.front.intake.opened_body import Caller
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.store.store import Store


INK = re.compile(rb"\S")
LINE_BYTES = 256  # that a line takes besides its text
UPLOADS = 16  # that arrive at a time; a client has a quarter


class FileRoutes:
    """The handlers. `removed` is called when something was deleted."""

    def __init__(self, store: Store | None, bodies: Bodies, keep_days: int,
                 removed: Callable[[], None]):
        self.store = store
        self.bodies = bodies
        self.removed = removed
        self.keep_s = keep_days * DAY_S
        self.uploads = set[Upload]()          # that arrive
        self.arriving: Counter[str] = Counter()

    def uploads_under_way(self) -> list[int]:
        """The files that arrive. In the store's thread: between its pieces of work it knows each."""
        return [file for upload in [*self.uploads] for file in upload.ids]

    async def handle_upload(self, http: web.Request) -> web.Response:
        """POST /v1/files: a form with `purpose` and `file`, in any order."""
        store = require_store(self.store)
        client = REQUEST_LOG.get().client
        if http.content_type != "multipart/form-data":
            raise RequestError("the body must be a form (multipart/form-data) with purpose and file",
                               status=415, code="unsupported_type")
        if encoding_of(http):
            raise RequestError("the form with a file must not be compressed", status=415,
                               code="unsupported_type")
        with self._arrival(client):
            upload = Upload(store, self.bodies.intake, self.bodies.caller())
            self.uploads.add(upload)
            try:
                await upload.begin()
                fields = await upload.receive(http)
                if fields.get("purpose") == "batch":
                    await upload.check_raw()
                file = await store.run(partial(upload.complete, fields, self.keep_s), client=client)
            finally:
                self.uploads.remove(upload)
                if upload.id:
                    self.removed()  # it removes what is not complete
        return json_response(file.body)

    @contextmanager
    def _arrival(self, client: str):
        if self.arriving.total() >= UPLOADS or self.arriving[client] >= UPLOADS // 4:
            raise overloaded("too many files are being uploaded", 10)
        self.arriving[client] += 1
        try:
            yield
        finally:
            self.arriving[client] -= 1

    async def handle_list(self, http: web.Request) -> web.StreamResponse:
        store = require_store(self.store)
        limit = query_value(http, FILES_LIMIT, 10_000)
        ascending = query_value(http, ORDER, "desc") == "asc"
        purpose = query_value(http, PURPOSE, "")
        chosen = f" AND state = {file_rows.THERE}{f' AND purpose = {purpose!r}' if purpose else ''}"
        owner = self.bodies.owner
        after = query_value(http, AFTER, "")

        rows = await store.run(partial(
            file_rows.list_rows, table="files", fields=File._fields, owner=owner, after=after, limit=limit,
            ascending=ascending, more=chosen), client=REQUEST_LOG.get().client)
        bodies = (File(*row).body for row in rows)
        page = await asyncio.to_thread(page_of, (Listed(body["id"], dump(body)) for body in bodies), limit)
        return await send_page(http, self.bodies, page)

    async def found(self, http: web.Request) -> File:
        return await require_store(self.store).run(partial(
            file_rows.file_of_owner, name=http.match_info["id"], owner=self.bodies.owner),
            client=REQUEST_LOG.get().client)

    async def handle_file(self, http: web.Request) -> web.Response:
        return json_response((await self.found(http)).body)

    async def handle_delete(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        owner = self.bodies.owner

        def delete(connection) -> File:
            file = file_rows.file_of_owner(connection, name, owner)
            if batch := batches.reads(connection, file):
                raise RequestError(f"{batch} still needs this file: cancel it first, or wait for its end",
                                   status=409, code="file_in_use", param="id")
            file_rows.delete(connection, file)
            return file
        file = await require_store(self.store).run(delete, client=REQUEST_LOG.get().client)
        self.removed()
        return json_response({"id": file.name, "object": "file", "deleted": True})

    async def handle_content(self, http: web.Request) -> web.StreamResponse:
        store = require_store(self.store)
        file = await self.found(http)
        longest = await store.run(partial(file_rows.longest_line, file=file.id),
                                  client=REQUEST_LOG.get().client)
        with self.bodies.holding() as holding:
            await take_room(holding, 2 * longest + file_rows.PART_BYTES)
            return await self._send_content(http, store, file)

    async def _send_content(self, http: web.Request, store: Store, file: File) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream",
                                               "X-Request-Id": REQUEST_LOG.get().id})
        response.content_length = file.bytes
        await response.prepare(http)
        last = 0
        sent = 0
        while http.method == "GET" and sent < file.bytes:
            part, last = await store.run(partial(file_rows.content, file=file.id, after=last),
                                         client=REQUEST_LOG.get().client)
            if not part:  # it was deleted meanwhile: the client sees that the body is too short
                raise ConnectionResetError("the file was deleted")
            sent += len(part)
            await send_part(http, response, part)
        return response


def requests_of(data: bytes, first: int) -> Iterator[NumberedLine]:
    """The lines that are not blank; `first` is the number of the first line. Blank ones cost no more than the
    search for what is none."""
    start = 0
    number = first
    while inked := INK.search(data, start):
        begin = data.rfind(b"\n", start, inked.start()) + 1 or start
        end = data.find(b"\n", inked.start()) + 1 or len(data)
        number += data.count(b"\n", start, begin)
        yield NumberedLine(number, data[begin:end])
        start = end
        number += 1


class Upload:
    """A file that arrives. The lines of one for batches are checked and stored as they come, never more than
    a few at a time in memory. Any other file is stored as it is, in parts. If its form says only behind the
    file that this is for batches, it is stored first and checked then."""

    FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")  # those that are read
    FIELD_BYTES = 1000      # of one of these
    OTHER_BYTES = 64 << 10  # of all parts of the form but the file
    PARTS = 100

    def __init__(self, store: Store, intake: Intake, caller: Caller):
        self.store = store
        self.intake = intake
        self.caller = caller
        self.id = 0                   # its row in the store
        self.raw = 0                  # that of a file which is still to be checked
        self.is_raw = False           # it is stored as it is
        self.filename: str | None = None
        self.size = 0                 # bytes of the file that have come
        self.other_bytes = 0          # of the other parts, with their headers
        self.parts = 0
        self.number = 0               # lines, with blank ones
        self.requests = 0             # lines that ask for something
        self.bad = 0                  # of these, those that cannot be run as they are
        self.first_problem = ""
        self.waited_s = 0.0           # for the client
        self.rows: list[LineRow] = []           # that are still to be stored
        self.custom_ids: set[bytes] = set()  # digests of those so far

    @property
    def ids(self) -> list[int]:
        """Its rows in the store."""
        return [self.id, self.raw]

    async def begin(self):
        """Make its file. RequestError if its owner has no room left."""
        def create(connection):
            quota.check(connection, self.caller.texts, client=self.caller.client)
            self.id = file_rows.create(connection, self.caller.texts, "", "batch", now_s()).id
        await self.store.run(create, adds_bytes=LINE_BYTES, client=self.caller.client)

    async def receive(self, http: web.Request) -> dict[str, str]:
        """Read the form; returns its small fields. RequestError if it is broken, too large or too slow."""
        fields: dict[str, str] = {}
        try:
            form = await http.multipart()
            while (part := await self._timed(form.next())) is not None:
                self._count(part)
                name = getattr(part, "name", None)
                if name == "file" and self.filename is None:
                    self.filename = visible((part.filename or "file").replace("\n", " "))[:255]
                    if fields.get("purpose") == "batch":
                        await self._receive_lines(self._chunks(part, MOST_BYTES))
                    else:
                        await self._receive_raw(part, fields.get("purpose"))
                elif name and name != "file":
                    value = await self._field(part, name)
                    if name in self.FIELDS:
                        fields[name] = value.decode("utf-8", "replace").strip()
                else:
                    raise RequestError("the form must have one file, called file", param="file")
        except (ValueError, AssertionError, EOFError, RuntimeError, web.RequestPayloadError,
                aiohttp.http.HttpProcessingError) as error:  # RuntimeError: of a field _charset_
            log.debug("a form: %s", error)
            raise RequestError("the form cannot be read: it is no complete multipart/form-data with the "
                               "boundary of its Content-Type") from None
        return fields

    def _count(self, part):
        """Count a part of the form, whatever it is called. RequestError if there are too many."""
        self.parts += 1
        if self.parts > self.PARTS:
            raise RequestError(f"the form has more than {self.PARTS} parts")
        self._count_other(sum(len(name) + len(value) for name, value in part.headers.items()))

    def _count_other(self, size: int):
        self.other_bytes += size
        if self.other_bytes > self.OTHER_BYTES:
            raise too_large(self.OTHER_BYTES, "all fields of the form but the file", "form_too_large")

    async def _field(self, part, name: str) -> bytes:
        """What a field has; of one that is not read, the last bytes."""
        value = b""
        while chunk := await self._timed(part.read_chunk(self.FIELD_BYTES)):
            self._count_other(len(chunk))
            value = value + chunk if name in self.FIELDS else chunk
            if len(value) > self.FIELD_BYTES:
                raise RequestError(f"{shown(name)} has more than {self.FIELD_BYTES} bytes", param=name[:60])
        return value

    async def _timed(self, reading):
        """RequestError 408 if the client pauses for BODY_S or is too slow."""
        began_s = time.monotonic()
        try:
            value = await asyncio.wait_for(reading, BODY_S)
        except asyncio.TimeoutError:
            raise RequestError(f"no part of the body arrived for {BODY_S:g} s",
                               status=408, code="body_timeout") from None
        self.waited_s += time.monotonic() - began_s
        if self.waited_s > BODY_S + self.size / BODY_BYTES_PER_S:
            raise RequestError(f"the body arrives at less than {BODY_BYTES_PER_S:,} bytes per second",
                               status=408, code="body_timeout")
        return value

    async def _receive_raw(self, part, purpose: str | None):
        """Store a file as it is, in parts. purpose: None if the form has not said it yet."""
        self.is_raw = True
        most = MOST_BYTES if purpose is None else LIMITS.document_bytes
        rest = bytearray()
        async for chunk in self._chunks(part, most):
            rest += chunk
            if len(rest) >= file_rows.PART_BYTES:
                self._add_part(bytes(rest))
                await self._store()
                rest.clear()
        if rest:
            self._add_part(bytes(rest))
        await self._store()

    def _add_part(self, data: bytes):
        self.number += 1
        self.rows.append(LineRow(self.number, data))

    async def check_raw(self):
        """Check and store the lines of a file that has come before its purpose."""
        if not self.is_raw:
            return
        self.is_raw = False
        self.raw = self.id
        self.number = 0

        def create(connection):
            self.id = file_rows.create(connection, self.caller.texts, "", "batch", now_s()).id
        await self.store.run(create, adds_bytes=LINE_BYTES, client=self.caller.client)

        async def parts() -> AsyncIterator[bytes]:
            last = 0
            while True:
                part, last = await self.store.run(partial(file_rows.content, file=self.raw, after=last),
                                                  client=self.caller.client)
                if not part:
                    return
                yield part
        await self._receive_lines(parts())  # whose file stays incomplete, so it is removed

    async def _receive_lines(self, chunks: AsyncIterator[bytes]):
        rest = bytearray()
        async for chunk in chunks:
            rest += chunk
            if b"\n" in chunk:
                whole = rest.rfind(b"\n") + 1
                await self._take(bytes(rest[:whole]))
                del rest[:whole]
            if len(rest) > LIMITS.body_bytes:
                raise RequestError(f"line {self.number + 1:,} has more than {LIMITS.body_bytes:,} bytes",
                                   status=413, code="line_too_long", param="file")
        if rest:
            await self._take(bytes(rest))
        await self._store()

    async def _chunks(self, part, most: int) -> AsyncIterator[bytes]:
        while chunk := await self._timed(part.read_chunk(file_rows.PART_BYTES // 8)):
            self.size += len(chunk)
            if self.size > most:
                raise too_large(most, "the file", "file_too_large", "file")
            yield chunk

    async def _take(self, data: bytes):
        """Check and store the requests in these whole lines, a few at a time: they may have two bytes
        each."""
        requests = requests_of(data, self.number + 1)
        self.number += data.count(b"\n") + (not data.endswith(b"\n"))
        while lines := [*islice(requests, file_rows.PART_LINES)]:
            await self._take_some(lines)

    async def _take_some(self, lines: Seq[NumberedLine]):
        self.requests += len(lines)
        if self.requests > MOST_LINES:
            raise RequestError(f"the file has more than {MOST_LINES:,} lines",
                               status=413, code="too_many_lines", param="file")
        found = await self.intake.check_lines(
            self.caller, [line._replace(text=line.text.strip()) for line in lines])
        self.rows += map(self._row, lines, found)
        size = sum(len(each.text) for each in self.rows)
        if len(self.rows) >= file_rows.PART_LINES or size > file_rows.PART_BYTES:
            await self._store()
        await asyncio.sleep(0)  # others get a turn

    async def _store(self):
        rows = self.rows
        self.rows = []
        if rows:
            await self.store.run(partial(file_rows.add_lines, file=self.id, rows=rows),
                                 adds_bytes=sum(len(row.text) + LINE_BYTES for row in rows),
                                 client=self.caller.client)

    def _row(self, line: NumberedLine, checked: CheckedLine) -> LineRow:
        """The line with what is wrong with it. What is wrong with the body of a request is only noted: when
        it is run, another model may be here."""
        number, text = line
        problem, custom_id, url, model = checked
        if custom_id is None:
            self._note(problem)
            return LineRow(number, text, problem=storable(problem))
        digest = hashlib.blake2b(custom_id.encode("utf-8", "replace"), digest_size=12).digest()
        if digest in self.custom_ids:
            problem = f"line {number:,}: an earlier line has its custom_id, {shown(custom_id)}"
            self._note(problem)
            return LineRow(number, text, custom_id, url, model, problem)
        self.custom_ids.add(digest)
        if problem:
            self._note(f"line {number:,}: {problem}")
        return LineRow(number, text, custom_id, url, model)

    def _note(self, problem: str):
        self.bad += 1
        self.first_problem = self.first_problem or problem

    def complete(self, fields: dict[str, str], keep_s: int, connection) -> File:
        """It can be seen now. RequestError if the form lacks something."""
        if self.filename is None:
            raise RequestError("file is missing", code="missing_required_parameter", param="file")
        purpose = fields.get("purpose", "")
        if purpose not in UPLOADED:
            raise bad_value("purpose", purpose, ", ".join(f'"{each}"' for each in UPLOADED))
        if self.is_raw and self.size > LIMITS.document_bytes:
            raise too_large(LIMITS.document_bytes, "the file", "file_too_large", "file")
        if not self.requests and not self.is_raw:
            raise RequestError("the file has no lines", code="empty_file", param="file")
        if not self.size:
            raise RequestError("the file is empty", code="empty_file", param="file")
        lasts = None if self.is_raw else keep_s  # a document is kept until it is deleted
        if (text := fields.get("expires_after[seconds]")) is not None:
            if fields.get("expires_after[anchor]", "created_at") != "created_at":
                raise bad_value("expires_after[anchor]", fields["expires_after[anchor]"], '"created_at"')
            lasts = LAST_SECONDS.read(number_in(text))
        note = self.first_problem and (
            f"{self.bad:,} of {self.requests:,} lines cannot be run as they are; the first: "
            f"{self.first_problem[:400]}")
        connection.execute(
            "UPDATE files SET filename = ?, purpose = ?, state = ?, note = ?, expires = created + ? "
            "WHERE id = ?",
            (self.filename, purpose, file_rows.THERE, note or None, lasts, self.id))
        row = connection.execute("SELECT name FROM files WHERE id = ?", (self.id,)).fetchone()
        log.debug("file %s: %d lines, %d bad", row[0], self.requests, self.bad)
        return file_rows.file_named(connection, row[0])
