"""Ingestion: the files of vector stores become passages with vectors, while nobody else asks.

A file goes through five steps: its bytes are read from the database, a sandbox extracts the text, a thread
cuts it into passages, the embedder makes vectors in the background lane, and one transaction writes all of
them with the file's status. So a file is completed with all its parts, or it has none: after a crash the next
start begins it again. What its owner deletes or cancels meanwhile is noticed by that transaction.

Owners take turns, and so do the stores of one owner."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.common.config import FOLDER, LIMITS
from chatlm.common.errors import ChatServerError, EngineFailure, Overloaded, RequestError
from chatlm.common.log import log
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.api.documents import HTML_BEGINS
from chatlm.front.intake.opened_body import Caller
from chatlm.front.intake.budget import Holding
from chatlm.front.knowledge import stores
from chatlm.front.knowledge.embedding import Chosen, Embedders, packed
from chatlm.front.knowledge.passages import Passage, Strategy, passages_of
from chatlm.front.knowledge.rebuilding import TEXTS, Rebuilding
from chatlm.front.knowledge.stores import Pending, StoreFile
from chatlm.front.server.ledger import Amount, Charge
from chatlm.front.server.stored_lists import now_s
from chatlm.front.server.usage_writer import write
from chatlm.front.store import file_rows, quota

if TYPE_CHECKING:
    from chatlm.front.intake.intake import Intake
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.server.access import Owners
    from chatlm.front.server.ledger import Ledger
    from chatlm.front.store.store import Store


T = TypeVar("T")
AT_ONCE = 2        # files under way: one is read while the other is embedded
TRIES = 3          # of an embedder whose workers die, each time as often as a request allows
CRASHES = 5        # of the server while it reads one file, after which this is given up
LOOK_S = 5.0       # between looks whether files of stores were deleted or have expired
SWEEPING_S = 1.0   # of one of them, before files have a turn
PAUSE_S = 2.0      # of a store whose file must wait, at least
VECTOR_BYTES = 16  # that a window takes in the database besides its vector
UNTEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
# the errors of the extraction for files of another kind; all others are about a damaged file
STRANGE = "unknown_format", "not_installed"


class Text(NamedTuple):
    """The text of a file."""

    text: str
    pages: int | None = None  # None: its format has none
    lacks: str | None = None  # what of the file is not in it


class Failed(Exception):
    """A file cannot be ingested. code: of its last_error; lacks_embedder: it can once there is one."""

    def __init__(self, code: str, message: str, lacks_embedder: bool = False):
        super().__init__(message)
        self.code = code
        self.lacks_embedder = lacks_embedder


def text_in(data: bytes, name: str) -> Text | None:
    """The text of a file that is one, in UTF-8 or UTF-16; None if it must be extracted, or is none."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        with suppress(UnicodeDecodeError):
            return readable(data.decode("utf-16"))
        return None
    begin = data[:4096]
    named_html = re.search(r"(?i)\.x?html?$", name)
    if named_html or b"\0" in begin or b"%PDF-" in begin[:1024] or re.match(HTML_BEGINS, begin, re.DOTALL):
        return None
    with suppress(UnicodeDecodeError):
        return readable(data.decode("utf-8-sig"))
    return None


def readable(text: str) -> Text:
    """A text without control characters, as far as it is read."""
    lacks = None
    if len(text) > LIMITS.extracted_characters:
        lacks = f"only the first {LIMITS.extracted_characters:,} characters"
    text = text[:LIMITS.extracted_characters].replace("\r\n", "\n").replace("\r", "\n")
    return Text(UNTEXT.sub(" ", text), None, lacks)


def cut(text: Text, chosen: Chosen, strategy: Strategy) -> list[Passage]:
    """The passages of a text. A thread calls it: a large text takes a second."""
    marked = text.pages is not None and text.pages > 1
    passages = [*passages_of(text.text, chosen.count, chosen.longest, chosen.special, strategy, marked)]
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


class Ingest:
    """The task that ingests files, and removes what was deleted."""

    def __init__(self, store: Store, catalogue: Catalogue, intake: Intake, owners: Owners,
                 embedders: Embedders, ledger: Ledger):
        self.store = store
        self.catalogue = catalogue
        self.intake = intake
        self.owners = owners
        self.embedders = embedders
        self.ledger = ledger
        self.wake = asyncio.Event()
        self.tasks: dict[int, asyncio.Task[None]] = {}  # by the file under way
        self.working: Counter[str] = Counter()          # files under way, by owner
        self.last: dict[str | int, float] = {}          # when an owner and a store had their last turn
        self.reading = asyncio.Lock()                   # one file at a time is read by this process
        self.paused: dict[int, float] = {}              # store -> until when
        self.rebuilding = Rebuilding(self._stored, owners, embedders)
        self.totals: dict[str, int] = {}                # of all stores, at the last look
        self.dirty = False                              # texts were removed that the -wal may still have
        self.task: asyncio.Task | None = None

    def start(self):
        self.task = asyncio.create_task(supervised("ingesting files", self.run, failed=lambda error: True))

    async def close(self):
        if self.task:
            await end_tasks([self.task])

    async def run(self):
        """Work until the server stops. Files that are under way then are begun again after its next start."""
        try:
            self.totals = await self._stored(stores.totals)
            await self.catalogue.wait_ready()
            while not self.catalogue.draining:
                self.wake.clear()
                await self._take_again()
                await self._begin_files()
                await self._sweep()
                if not self.tasks and await self.rebuilding.step():
                    self.wake.set()
                self.totals = await self._stored(stores.totals)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), self._rest_s())
        finally:
            await end_tasks(self.tasks.values())

    def _rest_s(self) -> float:
        """Until the next look: at a store that has paused, or at what was deleted."""
        soon = min(self.paused.values(), default=time.monotonic() + LOOK_S) - time.monotonic()
        return min(max(soon, 0.05), LOOK_S)

    async def _stored(self, function: Callable[[Any], T], adds_bytes: int = 0) -> T:
        """Run `function` in the store, and try again while the store cannot be used, as on a full disk."""
        while True:
            try:
                return await self.store.run(function, adds_bytes)
            except Overloaded as error:
                if self.store.closed:
                    raise
                await asyncio.sleep(error.retry_after_s)

    # which file is next

    async def _take_again(self):
        """Have files read that have failed for want of an embedder, where there is one now."""
        for store in await self._stored(stores.without_embedder):
            client = self.owners.client_of(store.owner, store.client)
            with suppress(ChatServerError):
                if client is not None and self.embedders.choose(store.model,
                                                                self.embedders.bound_of(client)):
                    await self._stored(partial(stores.take_again, store=store.store))

    async def _begin_files(self):
        now = time.monotonic()
        self.paused = {store: until for store, until in self.paused.items() if until > now}
        empty = set[int]()
        while len(self.tasks) < AT_ONCE and not self.catalogue.draining:
            waiting = [each for each in await self._stored(stores.pending)
                       if each.store not in self.paused and each.store not in empty]
            if not waiting:
                return
            turn = min(waiting, key=lambda each: (
                self.working[each.owner], self.last.get(each.owner, 0.0), self.last.get(each.store, 0.0),
                each.store))
            client = self.owners.client_of(turn.owner, turn.client)
            file = None
            if client is not None:  # else its key is gone: it waits
                file = await self._stored(partial(stores.claim, store=turn.store, busy=[*self.tasks]))
            if file is None:
                empty.add(turn.store)
                continue
            self.last[turn.owner] = self.last[turn.store] = time.monotonic()
            self._begin(turn, file, client or "")
        if len(self.last) > 10_000:
            self.last.clear()

    def _begin(self, turn: Pending, file: StoreFile, client: str):
        def end(ended: asyncio.Task):
            del self.tasks[file.number]
            self.working[turn.owner] -= 1
            self.wake.set()

        self.working[turn.owner] += 1
        task = asyncio.create_task(supervised(f"ingesting {file.file}",
                                              partial(self._work, turn, file, client)))
        self.tasks[file.number] = task
        task.add_done_callback(end)

    async def _work(self, turn: Pending, file: StoreFile, client: str):
        """Ingest a file, or say why not."""
        try:
            if file.tries >= CRASHES:
                raise Failed("server_error", f"the server has ended {file.tries} times while it read this "
                             f"file, so it is not read by itself again. {how_again(turn)}")
            await self._ingest(turn, file, client)
            return
        except Failed as error:
            failure = error
        except RequestError as error:
            failure = Failed("server_error", str(error))
        except Overloaded as error:
            self.paused[turn.store] = time.monotonic() + max(error.retry_after_s, PAUSE_S)
            return
        except ChatServerError as error:
            failure = Failed("server_error", str(error))
        except Exception as error:
            log.error("ingesting %s failed: %s", file.file, error, exc_info=error)
            failure = Failed("server_error", "the server had an error while it read this file")
        log.info("%s of %s is failed: %s", file.file, turn.id, failure)
        await self._stored(partial(stores.fail, file=file, code=failure.code, message=str(failure),
                                   lacks_embedder=failure.lacks_embedder))

    # one file

    async def _ingest(self, turn: Pending, file: StoreFile, client: str):
        chosen = self._embedder(turn, client)
        with Holding(self.intake.budget, client) as holding:
            text, passages = await self._read(turn, file, client, chosen, holding)
            if not passages:
                raise Failed("invalid_file", "the file has no text")
            if not await self._stored(partial(stores.is_wanted, file=file)):
                return
            charges = list[Charge]()
            try:
                vectors = await self._vectors(turn, file, client, chosen, passages, charges)
                await self._complete(turn, file, text, passages, vectors, charges)
            finally:
                for charge in charges:
                    self.ledger.release(charge)

    async def _read(self, turn: Pending, file: StoreFile, client: str, chosen: Chosen,
                    holding: Holding) -> tuple[Text, list[Passage]]:
        """The text of a file and its passages. If the server dies meanwhile, that counts against the file,
        and against no other: embedding, which takes most of the time, is done by other processes."""
        async with self.reading:
            await self._stored(partial(stores.begin_try, file=file))
            tries = file.tries  # of a reading that has neither ended nor killed the server
            try:
                text = await self._text(turn, file, client, holding)
                strategy = strategy_of(stores.read_json(file.chunking))
                passages = await asyncio.to_thread(cut, text, chosen, strategy)
                tries = 0
                return text, passages
            finally:
                with suppress(ChatServerError):  # else this counts as a death
                    await self.store.run(partial(stores.end_try, file=file, tries=tries))

    def _embedder(self, turn: Pending, client: str) -> Chosen:
        try:
            return self.embedders.choose(turn.model, self.embedders.bound_of(client))
        except RequestError as error:
            raise Failed("server_error", f"{error}. The file is read as soon as there is such a model",
                         lacks_embedder=True) from None

    async def _text(self, turn: Pending, file: StoreFile, client: str, holding: Holding) -> Text:
        """The text of a file. `holding` holds its bytes while it is read."""
        try:
            source = await self._stored(partial(file_rows.file_named, name=file.file))
        except LookupError:
            raise Failed("invalid_file", "the file was deleted") from None
        if source.bytes > LIMITS.inline_bytes:
            room = min(2 * source.bytes, holding.budget.per_client)
            await holding.wait_for(room)
        data = bytearray()
        last = 0
        while len(data) < source.bytes:
            part, last = await self._stored(partial(file_rows.content, file=source.id, after=last))
            if not part:
                raise Failed("invalid_file", "the file was deleted")
            data += part
        if not data:
            raise Failed("invalid_file", "the file is empty")
        text = await asyncio.to_thread(text_in, bytes(data), source.filename)
        if text is None:
            text = await self._extracted(turn, client, source.filename, data)
        holding.give_back_beyond(0)
        return text

    async def _extracted(self, turn: Pending, client: str, name: str, data: bytearray) -> Text:
        caller = Caller("", client, self.owners.of_pages(client), self.embedders.bound_of(client), turn.owner)
        for left in reversed(range(TRIES)):
            try:
                return Text(*await self.intake.extract(caller, name, "", data))
            except RequestError as error:
                code = "unsupported_file" if error.code in STRANGE else "invalid_file"
                message = str(error)
                if error.code == "unknown_format":
                    message += ", nor is it text in UTF-8 or UTF-16"
                raise Failed(code, message) from None
            except EngineFailure:
                if not left:
                    raise
        raise AssertionError

    async def _vectors(self, turn: Pending, file: StoreFile, client: str, chosen: Chosen,
                       passages: list[Passage], charges: list[Charge]) -> list[stores.Embedded]:
        texts = [window for passage in passages for window in passage.windows]
        if len(texts) > LIMITS.store_windows:
            raise Failed("invalid_file", f"the file has more than {LIMITS.store_windows:,} windows of text")
        vectors = list[stores.Embedded]()
        for begin in range(0, len(texts), TEXTS):
            if begin and not await self._stored(partial(stores.is_wanted, file=file)):
                break
            part = texts[begin:begin + TEXTS]
            found = await self._asked(turn, client, chosen, part, charges)
            vectors += await asyncio.to_thread(lambda: [*map(packed, found)])
        return vectors

    async def _asked(self, turn: Pending, client: str, chosen: Chosen, texts: list[str],
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

    async def _complete(self, turn: Pending, file: StoreFile, text: Text, passages: list[Passage],
                        vectors: list[stores.Embedded], charges: list[Charge]):
        """Write all of a file in one transaction, together with what it has cost. Of one that is no longer
        wanted, nothing is written or charged."""
        if len(vectors) < sum(len(passage.windows) for passage in passages):
            return
        chosen = self._embedder(turn, self.owners.client_of(turn.owner, turn.client) or "")
        used = [self.ledger.used_by(charge) for charge in charges]
        size = sum(2 * len(passage.text.encode()) for passage in passages)
        size += sum(len(vector.vector) + VECTOR_BYTES for vector in vectors)

        def complete(connection) -> bool:
            if refused := quota.refusal(connection, turn.owner, size):
                raise refused
            embedder = stores.embedder_number(connection, chosen.digest, chosen.served.name,
                                              chosen.dimensions)
            done = stores.complete(connection, file, passages, vectors, embedder, len(text.text), text.lacks)
            if done:
                write(connection, used)
            return done

        done = await self._stored(complete, adds_bytes=size)
        for charge, (row, amount) in zip(charges, used):
            self.ledger.count(charge, row, amount if done else Amount())
        log.debug("%s of %s: %d passages, %d windows", file.file, turn.id, len(passages), len(vectors))

    # what was deleted

    async def _sweep(self):
        """Empty stores that have expired, and remove what was deleted, in small pieces."""
        until_s = time.monotonic() + SWEEPING_S
        now = now_s()
        await self._stored(partial(stores.expire, now=now))
        while await self._stored(stores.purge):
            self.dirty = True
            if time.monotonic() > until_s:
                self.wake.set()  # so that the next round goes on here
                return
        if self.dirty and not self.tasks:
            self.dirty = False
            await self.store.clear_log()
