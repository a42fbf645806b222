"""Ingestion: the files of vector stores become passages with vectors, while nobody else asks.

A file goes through five steps: its bytes are read from the database, a sandbox extracts the text, a thread
cuts it into passages, the embedder makes the vectors of some passages at a time, in the background lane, and
these are written. At last the file's status says that it is completed, and it is searched. After a crash the
next start removes what was written of a file, and begins it again. What its owner deletes or cancels
meanwhile is noticed before each writing.

Clients take turns: for the files that are under way, for reading one, and for each time that the embedder is
asked. So do the stores of one client."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence as Seq
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import FOLDER, LIMITS
from chatlm.common.errors import ChatServerError, EngineFailure, Overloaded, RequestError
from chatlm.common.log import log
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.annexes.knowledge import stores
from chatlm.front.annexes.knowledge.embedding import Chosen, Embedders, packed
from chatlm.front.annexes.knowledge.languages import unread_language
from chatlm.front.annexes.knowledge.passages import MOST_PIECES, Passage, Strategy, TooManyPieces, passages_of
from chatlm.front.annexes.knowledge.rebuilding import TEXTS, Rebuilding
from chatlm.front.annexes.knowledge.stores import Pending, StoreFile
from chatlm.front.documents.texts import Text, plain_text
from chatlm.front.intake.budget import Holding
from chatlm.front.intake.opened_body import Caller
from chatlm.front.server.ledger import Amount, Charge
from chatlm.front.server.stored_lists import now_s
from chatlm.front.server.usage_writer import write
from chatlm.front.store import file_rows, quota
from chatlm.front.turns import Turns

if TYPE_CHECKING:
    from chatlm.front.intake.intake import Intake
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.server.access import Owners
    from chatlm.front.server.ledger import Ledger
    from chatlm.front.store.store import Store


AT_ONCE = 2        # files under way: one is read while the other is embedded
MOST_AT_ONCE = 8   # with those of clients who else would have none
TRIED_STORES = 20  # of a client, that are looked at for the next turn
TRIES = 3          # of an embedder whose workers die, each time as often as a request allows
CRASHES = 5        # of the server while it reads one file, after which this is given up
LOOK_S = 5.0       # between looks whether files of stores were deleted or have expired
SWEEPING_S = 10.0  # of one of them, before its end is told
PAUSE_S = 2.0      # of a store whose file must wait, at least
PASSAGE_BYTES = 500  # that a passage takes in memory besides its texts
VECTOR_BYTES = 16  # that a window takes in the database besides its vector
# the errors of the extraction for files of another kind; all others are about a damaged file
STRANGE = "unknown_format", "not_installed"


class Failed(Exception):
    """A file cannot be ingested. code: of its last_error; lacks_embedder: it can once there is one."""

    def __init__(self, code: str, message: str, lacks_embedder: bool = False):
        super().__init__(message)
        self.code = code
        self.lacks_embedder = lacks_embedder


def cut(text: Text, chosen: Chosen, strategy: Strategy) -> list[Passage]:
    """The passages of a text. A thread calls it: a large text takes a second. Raises Failed."""
    marked = text.pages is not None and text.pages > 1
    try:
        passages = [*passages_of(text.text, chosen.count, chosen.longest, chosen.special, strategy, marked)]
    except TooManyPieces:
        most = f"{MOST_PIECES:,} sentences and headings"
        raise Failed("invalid_file", f"the file has more than {most}") from None
    if text.pages == 1:
        passages = [passage._replace(page=1) for passage in passages]
    return passages


def how_again(store: Pending) -> str:
    """How one has a file read again that was given up."""
    if store.owner.startswith(FOLDER):
        return "To have it read again, change it in its folder, or touch it"
    return "To have it read again, add it to the vector store again"


def strategy_of(chunking: dict) -> Strategy:
    if chunking["type"] == "auto":
        return Strategy()
    static = chunking["static"]
    return Strategy(static["max_chunk_size_tokens"], static["chunk_overlap_tokens"], by_headings=False)


def slices_of(passages: Seq[Passage]) -> Iterator[list[Passage]]:
    """Passages that are embedded together: with about TEXTS windows."""
    part = list[Passage]()
    size = 0
    for passage in passages:
        part.append(passage)
        size += len(passage.windows)
        if size >= TEXTS:
            yield part
            part = []
            size = 0
    if part:
        yield part


class UnderWay(NamedTuple):
    """A file that is ingested."""

    store: Pending
    file: StoreFile
    client: str   # who pays


class Ingest:
    """The tasks that ingest files, and that remove what was deleted."""

    def __init__(self, store: Store, catalogue: Catalogue, intake: Intake, owners: Owners,
                 embedders: Embedders, ledger: Ledger):
        self.store = store
        self._stored = store.run_patiently
        self.catalogue = catalogue
        self.intake = intake
        self.owners = owners
        self.embedders = embedders
        self.ledger = ledger
        self.wake = asyncio.Event()
        self.removing = asyncio.Event()                 # something was deleted
        self.tasks: dict[int, asyncio.Task[None]] = {}  # by the file under way
        self.working: Counter[str] = Counter()          # files under way, by who has added them
        self.last: dict[str, float] = {}                # when each of these had the last turn
        self.cursors: dict[str, int] = {}               # and the number of the store that had it
        self.seen = ""                                  # the client up to whom all were looked at
        self.reading = Turns()                          # one file at a time is read by this process
        self.embedding = Turns(AT_ONCE, AT_ONCE)
        self.paused: dict[tuple[int, str], float] = {}  # of a store, the files of a client -> until when
        self.rebuilding = Rebuilding(self._stored, owners, embedders)
        self.totals: dict[str, int] = {}                # of all stores, at the last look
        self.running: list[asyncio.Task] = []

    def start(self):
        for what, work in ("ingesting files", self.run), ("removing what was deleted", self.sweep):
            self.running.append(asyncio.create_task(supervised(what, work, failed=lambda error: True)))

    async def close(self):
        await end_tasks(self.running)

    def wake_up(self):
        """There are files to be ingested, or deleted ones."""
        self.wake.set()
        self.removing.set()

    async def run(self):
        """Work until the server stops. Files that are under way then are begun again after its next start."""
        try:
            self.totals = await self._stored(stores.totals)
            await self.catalogue.wait_ready()
            while not self.catalogue.draining:
                self.wake.clear()
                await self._take_again()
                await self._begin_files()
                if not self.tasks and await self.rebuilding.step():
                    self.wake.set()
                self.totals = await self._stored(stores.totals)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), self._rest_s())
        finally:
            await end_tasks(self.tasks.values())

    def _rest_s(self) -> float:
        """Until the next look: at a store that has paused, or at what has expired."""
        soon = min(self.paused.values(), default=time.monotonic() + LOOK_S) - time.monotonic()
        return min(max(soon, 0.05), LOOK_S)

    # which file is next

    async def _take_again(self):
        """Have files read that have failed for want of an embedder, where there is one now."""
        last = 0, ""
        while pending := await self._stored(partial(stores.without_embedder, store=last[0], client=last[1])):
            last = pending.store, pending.client
            client = self.owners.client_of(pending.owner, pending.client)
            with suppress(ChatServerError):
                if client is not None and self.embedders.choose(pending.model,
                                                                self.embedders.bound_of(client)):
                    await self._stored(partial(stores.take_again, pending=pending))

    async def _begin_files(self):
        """Begin as many files as may be under way: of those who have the fewest, and had no turn for the
        longest time."""
        now = time.monotonic()
        self.paused = {pair: until for pair, until in self.paused.items() if until > now}
        names = await self._stored(partial(stores.waiting_clients, after=self.seen))
        self.seen = names[-1] if len(names) == stores.MOST_CLIENTS else ""
        for name in sorted(names, key=lambda name: (self.working[name], self.last.get(name, 0.0))):
            while self._has_room(name) and (under_way := await self._next_of(name)):
                self._begin(under_way)
        if len(self.last) > 10_000:
            self.last.clear()
            self.cursors.clear()

    def _has_room(self, name: str) -> bool:
        """May one more file that this client has added be under way?"""
        most = AT_ONCE if self.working[name] else MOST_AT_ONCE
        return len(self.tasks) < most and not self.catalogue.draining

    async def _next_of(self, name: str) -> UnderWay | None:
        """The next file that a client has added to stores, which take turns; None if none can be ingested
        now."""
        for _ in range(TRIED_STORES):
            store = await self._stored(partial(stores.next_pending, client=name,
                                               after=self.cursors.get(name, 0)))
            if store is None:
                return None
            self.cursors[name] = store.store
            client = self.owners.client_of(store.owner, name)
            if client is None or (store.store, name) in self.paused:  # None: its key is gone, so it waits
                continue
            file = await self._stored(partial(stores.claim, pending=store, busy=[*self.tasks]))
            if file:
                return UnderWay(store, file, client)
        return None

    def _begin(self, under_way: UnderWay):
        number = under_way.file.number
        name = under_way.store.client

        def end(ended: asyncio.Task):
            del self.tasks[number]
            self.working[name] -= 1
            if not self.working[name]:
                del self.working[name]
            self.wake.set()

        self.working[name] += 1
        self.last[name] = time.monotonic()
        task = asyncio.create_task(supervised(f"ingesting {under_way.file.file}",
                                              partial(self._work, under_way)))
        self.tasks[number] = task
        task.add_done_callback(end)

    async def _work(self, under_way: UnderWay):
        """Ingest a file, or say why not."""
        store, file, client = under_way
        try:
            if file.tries >= CRASHES:
                raise Failed("server_error", f"the server has ended {file.tries} times while it read this "
                             f"file, so it is not read by itself again. {how_again(store)}")
            await self._ingest(under_way)
            return
        except Failed as error:
            failure = error
        except RequestError as error:
            failure = Failed("server_error", str(error))
        except Overloaded as error:
            self.paused[store.store, store.client] = time.monotonic() + max(error.retry_after_s, PAUSE_S)
            return
        except ChatServerError as error:
            failure = Failed("server_error", str(error))
        except Exception as error:
            log.error("ingesting %s failed: %s", file.file, error, exc_info=error)
            failure = Failed("server_error", "the server had an error while it read this file")
        log.info("%s of %s is failed: %s", file.file, store.id, failure)
        await self._stored(partial(stores.clear_parts, file=file), client=client)
        await self._stored(partial(stores.fail, file=file, code=failure.code, message=str(failure),
                                   lacks_embedder=failure.lacks_embedder), client=client)

    # one file

    async def _ingest(self, under_way: UnderWay):
        store, file, client = under_way
        chosen = self._embedder(store, client)
        if file.written:  # by a server that has ended meanwhile, or before a pause
            await self._stored(partial(stores.clear_parts, file=file), client=client)
        with Holding(self.intake.budget, client) as holding:
            text, passages = await self._read(under_way, chosen, holding)
            if not passages:
                raise Failed("invalid_file", "the file has no text")
            await self._stored(partial(stores.check_windows, file=file, windows=sum(
                len(passage.windows) for passage in passages)), client=client)
            charges = list[Charge]()
            try:
                if await self._embed(under_way, chosen, passages, charges):
                    await self._complete(under_way, chosen, text, passages, charges)
                else:  # it is not wanted any more
                    await self._stored(partial(stores.clear_parts, file=file), client=client)
            finally:
                for charge in charges:
                    self.ledger.release(charge)

    async def _read(self, under_way: UnderWay, chosen: Chosen,
                    holding: Holding) -> tuple[Text, list[Passage]]:
        """The text of a file and its passages, for which `holding` then accounts. If the server dies
        meanwhile, that counts against the file, and against no other: embedding, which takes most of the
        time, is done by other processes."""
        _, file, client = under_way
        give_back = await self.reading.take(client)
        try:
            await self._stored(partial(stores.begin_try, file=file), client=client)
            tries = file.tries  # of a reading that has neither ended nor killed the server
            try:
                text = await self._text(under_way, holding)
                if notice := await asyncio.to_thread(unread_language, text.text, chosen.served.name):
                    log.warning("%s of %s: %s", file.file, under_way.store.id, notice)
                    text = text._replace(lacks="; ".join(filter(None, [text.lacks, notice])))
                strategy = strategy_of(stores.read_json(file.chunking))
                passages = await asyncio.to_thread(cut, text, chosen, strategy)
                tries = 0
                holding.keep(PASSAGE_BYTES * len(passages) + 3 * len(text.text))
                return text, passages
            finally:
                with suppress(ChatServerError):  # else this counts as a death
                    await self.store.run(partial(stores.end_try, file=file, tries=tries), client=client)
        finally:
            give_back()

    def _embedder(self, store: Pending, client: str) -> Chosen:
        try:
            return self.embedders.choose(store.model, self.embedders.bound_of(client))
        except RequestError as error:
            raise Failed("server_error", f"{error}. The file is read as soon as there is such a model",
                         lacks_embedder=True) from None

    async def _text(self, under_way: UnderWay, holding: Holding) -> Text:
        """The text of a file. `holding` holds its bytes while it is read."""
        _, file, client = under_way
        try:
            source = await self._stored(partial(file_rows.file_named, name=file.file), client=client)
        except LookupError:
            raise Failed("invalid_file", "the file was deleted") from None
        if source.bytes > LIMITS.inline_bytes:
            room = min(2 * source.bytes, holding.budget.per_client)
            await holding.wait_for(room)
        data = bytearray()
        last = 0
        while len(data) < source.bytes:
            part, last = await self._stored(partial(file_rows.content, file=source.id, after=last),
                                            client=client)
            if not part:
                raise Failed("invalid_file", "the file was deleted")
            data += part
        if not data:
            raise Failed("invalid_file", "the file is empty")
        text = await asyncio.to_thread(plain_text, bytes(data), source.filename)
        if text is None:
            text = await self._extracted(under_way, source.filename, data)
        holding.give_back_beyond(0)
        return text

    async def _extracted(self, under_way: UnderWay, name: str, data: bytearray) -> Text:
        client = under_way.client
        caller = Caller("", client, self.owners.of_pages(client), self.embedders.bound_of(client),
                        under_way.store.owner)
        for left in reversed(range(TRIES)):
            try:
                return Text(*await self.intake.extract(caller, name, "", data))
            except RequestError as error:
                code = "unsupported_file" if error.code in STRANGE else "invalid_file"
                message = str(error)
                raise Failed(code, message) from None
            except EngineFailure:
                if not left:
                    raise
        raise AssertionError

    async def _embed(self, under_way: UnderWay, chosen: Chosen, passages: Seq[Passage],
                     charges: list[Charge]) -> bool:
        """Make and write the vectors of all passages, some at a time. False if the file is no longer
        wanted."""
        _, file, client = under_way
        for part in slices_of(passages):
            if not await self._stored(partial(stores.is_wanted, file=file), client=client):
                return False
            texts = [window for passage in part for window in passage.windows]
            give_back = await self.embedding.take(client)
            try:
                found = await self._asked(client, chosen, texts, charges)
            finally:
                give_back()
            vectors = await asyncio.to_thread(lambda: [*map(packed, found)])
            if not await self._written(under_way, chosen, part, vectors):
                return False
        return True

    async def _written(self, under_way: UnderWay, chosen: Chosen, passages: Seq[Passage],
                       vectors: Seq[stores.Embedded]) -> bool:
        """Write passages with their vectors. False if the file is no longer wanted. Raises RequestError if
        its owner may not keep so much."""
        store, file, client = under_way
        size = sum(2 * len(passage.text.encode()) for passage in passages)
        size += sum(len(vector.vector) + VECTOR_BYTES for vector in vectors)
        embedder = await self._stored(partial(
            stores.embedder_number, digest=chosen.digest, name=chosen.served.name,
            dimensions=chosen.dimensions), client=client)

        def write_parts(connection):
            if refused := quota.refusal(connection, store.owner, size):
                raise refused
            return stores.add_parts(connection, file, passages, vectors, embedder)
        return await self._stored(write_parts, adds_bytes=size, client=client)

    async def _asked(self, client: str, chosen: Chosen, texts: list[str],
                     charges: list[Charge]) -> list[tuple[float, ...]]:
        owner = self.owners.of_pages(client)
        for left in reversed(range(TRIES)):
            try:
                return await self.embedders.vectors(chosen, texts, client, owner, later=charges)
            except (Overloaded, RequestError):
                raise
            except ChatServerError as error:
                if self.catalogue.draining:
                    raise asyncio.CancelledError from None  # the next start ingests it
                if not left:
                    raise Failed("server_error", f"the embedder has failed: {error}") from None
        raise AssertionError

    async def _complete(self, under_way: UnderWay, chosen: Chosen, text: Text, passages: Seq[Passage],
                        charges: Seq[Charge]):
        """Have a file be searched, and note what it has cost in the same transaction. Of one that is no
        longer wanted, nothing is charged."""
        store, file, client = under_way
        used = [self.ledger.used_by(charge) for charge in charges]

        def complete(connection) -> bool:
            embedder = stores.embedder_number(connection, chosen.digest, chosen.served.name,
                                              chosen.dimensions)
            done = stores.complete(connection, file, passages, embedder, len(text.text), text.lacks)
            if done:
                write(connection, used)
            return done

        done = await self._stored(complete, client=client)
        for charge, (row, amount) in zip(charges, used):
            self.ledger.count(charge, row, amount if done else Amount())
        log.debug("%s of %s: %d passages", file.file, store.id, len(passages))

    # what was deleted

    async def sweep(self):
        """Empty stores that have expired, and remove what was deleted, until the server stops."""
        await self.catalogue.wait_ready()
        while True:
            self.removing.clear()
            await self._stored(partial(stores.expire, now=now_s()))
            has_removed = True
            while has_removed:
                until_s = time.monotonic() + SWEEPING_S
                has_removed = await self._stored(partial(stores.purge, until_s=until_s, busy=[*self.tasks]))
                if has_removed:
                    self.totals = await self._stored(stores.totals)
                    await self.store.clear_log()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.removing.wait(), LOOK_S)
