"""Batches: their routes, and the work on their lines, which nobody waits for."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TYPE_CHECKING

from aiohttp import web

from chatlm.common.client_words import rate_limited
from chatlm.common.config import LIMITS
from chatlm.common.errors import ChatServerError, EngineFailure, Overloaded, RequestError
from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.annexes.batches.fields import WINDOWS
from chatlm.front.annexes.batches.file_routes import FileRoutes
from chatlm.front.annexes.batches.limits import MOST_UNFINISHED
from chatlm.front.annexes.batches.line_queue import Lane, LineQueue, WaitingLine
from chatlm.front.annexes.batches.row import BATCHES
from chatlm.front.api.batch_lines import BatchLine, bad_line_result, lasting_body, line_id
from chatlm.front.api.errors import failed_answer
from chatlm.front.api.list_fields import AFTER, LIMIT
from chatlm.front.api.spoken import answer_encoder
from chatlm.front.intake.budget import Holding
from chatlm.front.intake.intake import loaded_tokenizer
from chatlm.front.intake.opened_body import Caller
from chatlm.front.server.ledger import Amount, Charge, Ledger
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.stored_lists import now_s, query_value, send_page, require_store
from chatlm.front.server.usage_writer import write
from chatlm.front.store import batches, file_rows, quota
from chatlm.front.store.batches import BatchRow
from chatlm.front.store.pages import Listed, ListPage, page_of

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.front import Front
    from chatlm.front.intake.intake import Intake
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.server.access import Owners
    from chatlm.front.server.answering import Answers
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.store.file_rows import LineRow
    from chatlm.front.store.store import Parts, Store


TRIES = 3         # for an answer during which workers died, each time as often as a request allows
SPARE = 8         # lines under way beyond a model's rows, so that none of these is empty
PAGE_LINES = 200  # of a batch that wait in memory
LOOK_S = 0.5      # between looks whether the server stops
BEGIN_S = 30.0    # between looks for batches that may begin
EXPIRY_BYTES = 256 << 10  # that the results of as many lines take as expire at once
BATCH_BYTES = 4096  # that a batch takes besides its metadata and its files
EXPIRED_LINES = 100   # at once
EXPIRED = "batch_expired", "This request could not be executed before the completion window expired."


class BatchRoutes:
    """The handlers, and the tasks that work on batches while the server runs."""

    def __init__(self, store: Store | None, catalogue: Catalogue, bodies: Bodies, owners: Owners,
                 answers: Answers, ledger: Ledger, removed: Callable[[], None]):
        """removed: called when something was deleted."""
        self.store = store
        self.bodies = bodies
        self.files = FileRoutes(store, bodies, catalogue.settings.keep_days, removed)
        self.worker = BatchWorker(store, catalogue, bodies.intake, owners, answers, ledger,
                                  self.files) if store else None

    @classmethod
    def of(cls, front: Front) -> BatchRoutes:
        room = cls(front.store, front.catalogue, front.bodies, front.owners, front.answers, front.ledger,
                   front.removed)
        if front.sweeper:
            front.sweeper.marks.append(room.forget)
        return room

    async def start(self):
        if self.worker:
            self.worker.task = asyncio.create_task(supervised(
                "working on batches", self.worker.run, failed=lambda error: True))

    async def close(self):
        if self.worker and self.worker.task:
            await end_tasks([self.worker.task])

    def forget(self, connection: sqlite3.Connection):
        """Mark what has expired as deleted."""
        batches.forget(connection, now_s(), self.files.keep_s, self.files.uploads_under_way())

    def wake_up(self):
        if self.worker:
            self.worker.wake.set()

    async def handle_create(self, http: web.Request) -> web.Response:
        store = require_store(self.store)
        owner = self.bodies.owner
        client = REQUEST_LOG.get().client
        values = await self.bodies.small(http)
        window = values.get("completion_window", "24h")
        metadata = json.dumps(values["metadata"]) if "metadata" in values else None

        def create(connection) -> dict:
            quota.check(connection, owner, client=client)
            source = file_rows.file_of_owner(connection, values["input_file_id"], owner, "input_file_id")
            if source.purpose != "batch":
                raise RequestError(f"the purpose of {source.name} is {source.purpose}, not batch",
                                   code="invalid_value", param="input_file_id")
            mine = batches.unfinished_of(connection, owner, client)
            if mine >= MOST_UNFINISHED:
                raise rate_limited(f"{mine} of your batches are not finished", 60)
            now = now_s()
            return batches.shown_batch(connection, batches.create(
                connection, owner, client, source, values["endpoint"], window, now, now + WINDOWS[window],
                metadata, values.get("output_expires_after", self.files.keep_s)))
        body = await store.run(create, adds_bytes=BATCH_BYTES + len(metadata or ""), client=client)
        self.wake_up()
        return json_response(body)

    async def handle_list(self, http: web.Request) -> web.StreamResponse:
        limit = query_value(http, LIMIT, 20)
        owner = self.bodies.owner
        after = query_value(http, AFTER, "")

        def read(connection) -> Parts[ListPage]:
            rows = yield from file_rows.list_rows(connection, "batches", BatchRow._fields, owner, after,
                                                  limit)
            bodies = (batches.shown_batch(connection, BatchRow(*row)) for row in rows)
            return page_of((Listed(body["id"], dump(body)) for body in bodies), limit)
        page = await require_store(self.store).run(read, client=REQUEST_LOG.get().client)
        return await send_page(http, self.bodies, page)

    async def handle_batch(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        owner = self.bodies.owner

        def read(connection) -> dict:
            return batches.shown_batch(connection, batches.batch_of_owner(connection, name, owner))

        return json_response(await require_store(self.store).run(read, client=REQUEST_LOG.get().client))

    async def handle_cancel(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        owner = self.bodies.owner
        now = now_s()
        body = await require_store(self.store).run(lambda connection: batches.shown_batch(
            connection, batches.cancel(connection, name, owner, now)), client=REQUEST_LOG.get().client)
        if self.worker and (stop := self.worker.stops.get(name)):
            stop.set()
        self.wake_up()
        return json_response(body)


def files_of(front: Front) -> FileRoutes:
    return front.room(BATCHES).files


class UnderWay:
    """The state of a batch while its lines are answered."""

    def __init__(self, batch: BatchRow, client: str, created: int):
        self.batch = batch
        self.client = client
        self.created = created          # when its input was uploaded
        self.tasks: set[asyncio.Task[None]] = set()
        self.left = 0                   # lines read from the store that have no result yet
        self.changed = asyncio.Event()  # set when a line has ended
        self.failure: BaseException | None = None


class BatchWorker:
    """Answers the lines of all unfinished batches at the same time. As many lines are under way as the
    workers have rows. `LineQueue` chooses the line that begins next."""

    def __init__(self, store: Store, catalogue: Catalogue, intake: Intake, owners: Owners,
                 answers: Answers, ledger: Ledger, uploads: FileRoutes):
        self.store = store
        self.catalogue = catalogue
        self.intake = intake
        self.owners = owners
        self.answers = answers
        self.ledger = ledger
        self.files = uploads
        self.line_queue = LineQueue(self._room, ledger.budgets.wait_s if ledger.budgets else lambda client: 0)
        self.timer: asyncio.TimerHandle | None = None  # fires when a refused line may try again
        self.wake = asyncio.Event()
        self.looked_s = 0.0
        self.stops: dict[str, asyncio.Event] = {}  # by batch under way: set when it is cancelled
        self.under_way: dict[str, UnderWay] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.task: asyncio.Task | None = None

    async def run(self):
        """Work until the server stops. Lines that have no result then are answered after its next start."""
        try:
            await self.catalogue.wait_ready()
            while not self.catalogue.draining:
                if self.wake.is_set() or time.monotonic() - self.looked_s > BEGIN_S:
                    self.wake.clear()
                    self.looked_s = time.monotonic()
                    for batch in await self._stored(batches.unfinished):
                        self._begin(batch)
                    self._begin_lines()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), LOOK_S)
        finally:
            await end_tasks(self.tasks.values())
            if self.timer:
                self.timer.cancel()

    async def _stored(self, function: Callable[[Any], Any],
                      then: Callable[[Any], None] = lambda found: None, adds_bytes: int = 0,
                      client: str = "") -> Any:
        """Run `function` in the store, and try again while the store cannot be used, as on a full disk. When
        it is done, call `then` with its result, even if this coroutine was cancelled meanwhile."""
        async def work() -> Any:
            found = await self.store.run(function, adds_bytes, client)
            then(found)
            return found
        while True:
            try:
                return await asyncio.shield(work())
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s)

    def _begin(self, batch: BatchRow):
        client = self.owners.client_of(batch.owner, batch.client)
        waits = client is None and time.time() < batch.expires  # its key is gone; wait until it expires
        if batch.name in self.tasks or waits:
            return

        def forget(ended: asyncio.Task):
            del self.tasks[batch.name]
            del self.stops[batch.name]

        self.stops[batch.name] = asyncio.Event()
        task = asyncio.create_task(supervised(
            f"working on {batch.name}", partial(self._work, batch, client or ""), failed=lambda error: True))
        self.tasks[batch.name] = task
        task.add_done_callback(forget)

    async def _work(self, batch: BatchRow, client: str):
        """Bring a batch to its end, from whatever state it is in."""
        batch = await self._stored(partial(batches.batch_named, name=batch.name), client=client)
        if batch.status == "validating":
            has_begun = await self._stored(partial(batches.begin, batch=batch, now=now_s()), client=client)
            if not has_begun:
                return
        stop = self.stops[batch.name]
        status = "completed"
        if batch.status == "cancelling":
            stop.set()
        lines = asyncio.ensure_future(self._answer_all(batch, client))
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([lines, stopped], timeout=max(0.0, batch.expires - time.time()),
                               return_when=asyncio.FIRST_COMPLETED)
            if not lines.done():
                status = "cancelled" if stop.is_set() else "expired"
        finally:
            await end_tasks([stopped] if lines.done() else [stopped, lines])
        if status == "completed":
            lines.result()  # raises the failure, if there was one
        if status == "expired":
            expire = partial(self._expire_some, batch)
            while await self._stored(expire, adds_bytes=EXPIRY_BYTES, client=client):
                pass
        await self._stored(lambda connection: self._end(connection, batch, status), client=client)

    @staticmethod
    def _end(connection, batch: BatchRow, status: str):
        # it may have been cancelled since the last line was recorded
        if batches.batch_named(connection, batch.name).status == "cancelling":
            status = "cancelled"
        batches.end(connection, batch, status, now_s())
        log.info("%s is %s", batch.name, status)

    @staticmethod
    def _expire_some(batch: BatchRow, connection) -> Parts[bool]:
        """Give some lines without a result the result that their time is over. False if there are none."""
        if batches.batch_named(connection, batch.name).status != "in_progress":
            return False
        lines = yield from batches.waiting_lines(connection, batch, 0, EXPIRED_LINES)
        results = []
        for number, _, _ in lines:
            row = batches.line(connection, batch, number)
            error = RequestError(EXPIRED[1], code=EXPIRED[0])
            results.append((number, encoded(bad_line_result(number, error, row.custom_id)), True))
        batches.record(connection, batch, results)
        return bool(lines)

    async def _answer_all(self, batch: BatchRow, client: str):
        """Answer and record all lines that have no result. Only a few of them wait in memory at a time."""
        source = await self._stored(partial(file_rows.file_named, name=batch.input), client=client)
        mine = UnderWay(batch, client, source.created)
        self.under_way[batch.name] = mine
        last = 0
        more = True
        try:
            while more or mine.left:
                if more and mine.left < PAGE_LINES // 2:
                    page = await self._stored(partial(
                        batches.waiting_lines, batch=batch, after=last, most=PAGE_LINES), client=client)
                    more = len(page) == PAGE_LINES
                    last = page[-1].number if page else last
                    self._queue(mine, page)
                    continue
                await mine.changed.wait()
                mine.changed.clear()
                if mine.failure:
                    raise mine.failure
        finally:
            self.line_queue.remove(client, batch.name)
            await end_tasks(mine.tasks)
            del self.under_way[batch.name]

    def _queue(self, mine: UnderWay, page: Seq[batches.Waiting]):
        """Let lines wait for their turns."""
        models: dict[str, str] = {}
        for line in page:
            if line.model not in models:
                models[line.model] = self._model_of(line.model, mine.client)
            self.line_queue.add(mine.client, mine.batch.name, models[line.model],
                                WaitingLine(line.number, line.bytes))
        mine.left += len(page)
        self._begin_lines()

    def _bound(self, client: str) -> Seq[str]:
        """The models that a client's key is limited to; () if it is not limited."""
        return next((key.models for key in self.catalogue.settings.keys if key.name == client), ())

    def _model_of(self, name: str, client: str) -> str:
        """The name of the model that will answer a line; "" if there is no such model now."""
        try:
            return self.catalogue.find(name, self._bound(client)).model.name
        except ChatServerError:
            return ""

    def _room(self, model: str) -> int:
        """How many lines of a model may be under way. Few, while the model is not in memory."""
        workers = ()
        with suppress(ChatServerError):
            if model:
                workers = self.catalogue.find(model).pool.supervisor.ready_workers
        return SPARE + sum(worker.rows for worker in workers)

    def _begin_lines(self):
        """Begin all lines that may begin, and come back when a refused one may try again."""
        while taken := self.line_queue.take():
            lane, line = taken
            mine = self.under_way[lane.batch]
            task = asyncio.create_task(self._answer_one(mine, line))
            mine.tasks.add(task)
            task.add_done_callback(partial(self._end_line, mine, lane, line))
        if self.timer:
            self.timer.cancel()
            self.timer = None
        pause_s = self.line_queue.pause_s()
        if pause_s is not None:
            self.timer = asyncio.get_running_loop().call_later(pause_s, self._begin_lines)

    def _end_line(self, mine: UnderWay, lane: Lane, line: WaitingLine, task: asyncio.Task[None]):
        """A line's task has ended: the line has its result, or was refused and gives its slot back."""
        mine.tasks.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if isinstance(error, Overloaded):
            self.line_queue.put_back(lane, line, error.retry_after_s)
        else:
            self.line_queue.end(lane)
            mine.left -= 1
            mine.failure = mine.failure or error
            mine.changed.set()
        self._begin_lines()

    async def _answer_one(self, mine: UnderWay, line: WaitingLine):
        """Answer a line and record the result. Raises Overloaded if there is no room for it now."""
        charges = list[Charge]()
        with Holding(self.intake.budget, mine.client) as holding:
            if line.bytes > LIMITS.inline_bytes:
                holding.keep(line.bytes)
            row = await self._stored(partial(batches.line, batch=mine.batch, number=line.number),
                                     client=mine.client)
            try:
                await self._record(mine.batch, await self._result(row, mine, charges), charges)
            finally:
                for charge in charges:
                    self.ledger.release(charge)

    async def _result(self, row: LineRow, mine: UnderWay, charges: list[Charge]) -> tuple[int, bytes, bool]:
        """The result of a line: (number, text, whether it is an error)."""
        endpoint = mine.batch.endpoint
        error = await self._stored(partial(quota.refusal, owner=mine.batch.owner), client=mine.client)
        if not error:
            problem = row.problem
            if not problem and row.url != endpoint:
                problem = batches.wrong_url(row.number, row.url or "", endpoint)
            if problem:
                error = RequestError(problem, code="invalid_line")
        if error:
            return row.number, encoded(bad_line_result(row.number, error, row.custom_id)), True
        status, body = await self._answer(row, mine, charges)
        line = BatchLine(row.number, row.custom_id or "", endpoint, {}, line_id(row.number, row.text.strip()))
        return row.number, encoded(line.result(status, body)), status != 200

    async def _record(self, batch: BatchRow, result: tuple[int, bytes, bool], charges: Seq[Charge]):
        """Record a result together with what it used, so that a line which is answered again after a crash is
        charged once. A result that comes too late, because its batch was cancelled, costs nothing."""
        used = [self.ledger.used_by(charge) for charge in charges]

        def record(connection) -> bool:
            recorded = batches.record(connection, batch, [result])
            if recorded:
                write(connection, used)
            return recorded

        def count(recorded: bool):
            for charge, (row, amount) in zip(charges, used):
                self.ledger.count(charge, row, amount if recorded else Amount())
        await self._stored(record, count, adds_bytes=len(result[1]), client=batch.client)

    async def _answer(self, row: LineRow, mine: UnderWay, charges: list[Charge]) -> tuple[int, dict]:
        """The answer to a line: (status, body). Tries up to TRIES times if workers fail. Raises Overloaded if
        there is no room for it now."""
        for left in reversed(range(TRIES)):
            try:
                with Holding(self.intake.budget, mine.client) as holding:
                    return 200, await self._once(row, mine, holding, charges)
            except Overloaded:
                raise
            except RequestError as error:
                return failed_answer(error)
            except Exception as error:
                if self.catalogue.draining:
                    raise asyncio.CancelledError from None  # the next start answers it
                if not left:
                    return failed_answer(error)
        raise AssertionError

    async def _once(self, row: LineRow, mine: UnderWay, holding: Holding, charges: list[Charge]) -> dict:
        client = mine.client
        caller = Caller(row.url or "", client, self.owners.of_pages(client), self._bound(client),
                        mine.batch.owner)
        served = await self.intake.resolve(row.model or "", caller.bound, holding)
        async with self.intake.opened(caller, row.text.strip(), number=row.number,
                                      opener=served.pool.admission) as opened_body:
            parsed = await self.intake.line(opened_body, served, holding)
        request = parsed.request
        params = replace(request.params, client=client, owner=caller.owner)
        encoder = answer_encoder(parsed, served.name, loaded_tokenizer(served.pool))
        # a new id, because two batches may have the same line
        request = replace(request, id=secrets.token_hex(16), params=params, low_priority=True)
        del parsed, opened_body
        if self.ledger.budgets:
            self.ledger.budgets.check_line(client, (request, served.pool.context_length))
        own = list[Charge]()
        try:
            async with self.answers.begin(served.pool, request, served.name, later=own,
                                          state=encoder.state) as (_, events):
                whole = await encoder.collect_all(events, partial(self._hold_more, holding, len(row.text)))
        except BaseException:
            for charge in own:  # a failed try costs nothing
                self.ledger.release(charge)
            raise
        charges += own
        if len(whole) > LIMITS.inline_bytes:
            body = await asyncio.to_thread(json.loads, whole)
        else:
            body = json.loads(whole)
        return lasting_body(body, mine.created)

    @staticmethod
    def _hold_more(holding: Holding, line_bytes: int, size: int):
        """Account for `size` more bytes of an answer.

        Raises Overloaded if other requests hold the memory now, and EngineFailure if there would not be
        enough for this line alone, so that a line's result does not depend on the moment."""
        try:
            holding.grow(size)
        except Overloaded as error:
            text = line_bytes if line_bytes > LIMITS.inline_bytes else 0
            if holding.size + size + text > holding.budget.per_client:
                raise EngineFailure(str(error)) from None
            raise


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace") + b"\n"
