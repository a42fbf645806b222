"""Downloads models from the hub. Each model has one download, which all who ask for it share.

A download outlives the request that began it. To cancel it, its process (the role `hub`) is ended. What was
written stays in the cache, and the next download of the model continues there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence as Seq
from contextlib import asynccontextmanager
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, Overloaded, RequestError
from chatlm.common.hub.offers import delete_model, joined_name, named_model
from chatlm.common.log import log
from chatlm.common.messages.protocol import (
    HUB_PIPE, Crashed, HubFetch, HubFetched, HubOffers, HubProgress, HubQuestion, Offer, Unusable)
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import PROCESS_COMMAND, exit_in_words, process_environment, start_child
from chatlm.front.admission.sandbox import next_message
from chatlm.front.aio import end_tasks, supervised

if TYPE_CHECKING:
    from pathlib import Path

    from chatlm.common.config import Settings
    from chatlm.front.pool.catalogue import Catalogue


class HubProcess:
    """A process of the role `hub`, for one question or one download."""

    def __init__(self, command: Seq[str]):
        self.command = command

    @asynccontextmanager
    async def answers(self, message) -> AsyncIterator[AsyncIterator[Any]]:
        """Start it with a message, and yield an iterator of what it answers. Leaving the `with` block ends
        it."""
        process, ours = start_child(self.command, "hub", process_environment(1))
        writer = None
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
            writer.write(HUB_PIPE.packed(message))

            async def received() -> AsyncIterator[Any]:
                try:
                    while True:
                        yield await next_message(reader, HUB_PIPE)
                except (asyncio.IncompleteReadError, ConnectionError, BadMessage):
                    status = await asyncio.to_thread(process.wait)
                    raise EngineFailure(f"the process for the hub ended: {exit_in_words(status)}") from None
            yield received()
        finally:
            process.kill()
            if writer:
                writer.close()
            else:
                ours.close()
            await asyncio.shield(asyncio.to_thread(process.wait))

    async def result(self, message):
        """Its only answer. Raises ConfigError if that is a refusal."""
        async with self.answers(message) as answers:
            return checked_answer(await anext(answers))


def checked_answer(message):
    """A message from the process. Raises ConfigError or EngineFailure if it reports an error."""
    match message:
        case Unusable(text):
            raise ConfigError(text)
        case Crashed(error):
            log.error("the process for the hub failed: %s\n%s", error, message.traceback)
            kind = error.partition(":")[0]
            raise EngineFailure(f"the process for the hub failed ({kind}); the server's log has the details")
    return message


class Download:
    """A model on its way into the cache, and then into the catalogue."""

    RUNNING = ("waiting", "looking", "downloading", "checking", "opening")

    def __init__(self, name: str, asked: str, on_change: Callable[[], None] = lambda: None):
        """name: its name at the hub. asked: the name in the request, such as a short one."""
        self.name = name
        self.asked = asked
        self.on_change = on_change
        self.state = "waiting"
        self.done = 0
        self.whole = 0
        self.error = ""     # why it failed
        self.note = ""      # what the operator has to do to use it
        self.served = False
        self.usable = True  # False: no server like this one could serve it, and `note` says why
        self.stays = False  # True: it continues when all who follow it have left
        self.followers = 0
        self.task: asyncio.Task | None = None
        self._changed = asyncio.Event()

    @property
    def running(self) -> bool:
        return self.state in self.RUNNING

    @property
    def missing(self) -> int:
        return max(0, self.whole - self.done) if self.running else 0

    def become(self, state: str, **changes):
        self.state = state
        for name, value in changes.items():
            setattr(self, name, value)
        self._changed.set()
        self._changed = asyncio.Event()
        self.on_change()

    async def states(self) -> AsyncIterator[dict]:
        """Yield its body now and after each change, until it has ended. A slow reader misses some."""
        while True:
            changed = self._changed
            running = self.running
            yield self.body
            if not running:
                return
            await changed.wait()

    @property
    def body(self) -> dict:
        body = {"model": self.name, "state": self.state, "done": self.done, "bytes": self.whole}
        if self.error:
            body["error"] = self.error
        body["served"] = self.served
        if self.note:
            body["note"] = self.note
        return body


class Downloads:
    """The downloads of a server, by the names that models have at the hub."""

    MOST_RUNNING = 2
    MOST_WAITING = 50
    MOST_KEPT = 50
    QUESTION_S = 90.0
    MOST_QUESTIONS = 8

    def __init__(self, settings: Settings, catalogue: Catalogue, command: Seq[str] = PROCESS_COMMAND):
        self.settings = settings
        self.catalogue = catalogue
        self.process = HubProcess(command)
        self.known: dict[str, Download] = {}
        self.running = asyncio.Semaphore(self.MOST_RUNNING)
        self.asking = asyncio.Semaphore(2)
        self.questions = 0
        self.planning = asyncio.Lock()  # one download at a time is checked against the free room
        self.deleting: set[str] = set()
        self._changed = asyncio.Event()

    def check_allowed(self):
        if not self.settings.downloads:
            raise RequestError("this server downloads no models (--no-downloads)", status=403,
                               code="downloads_off")

    async def ask(self, kind: str, text: str) -> tuple[Offer, ...]:
        """Ask the hub what it has. Raises ConfigError if it does not answer."""
        if self.questions >= self.MOST_QUESTIONS:
            raise Overloaded("the hub is being asked already", retry_after_s=2)
        self.questions += 1
        try:
            async with self.asking:
                answer = await asyncio.wait_for(
                    self.process.result(HubQuestion(kind, text)), self.QUESTION_S)
        except asyncio.TimeoutError:
            raise ConfigError(f"the hub did not answer within {self.QUESTION_S:g} s") from None
        finally:
            self.questions -= 1
        assert isinstance(answer, HubOffers)
        return answer.offers

    def start(self, asked: str) -> Download:
        """Start the download of a model, or join the one that runs. Raises RequestError for what is no name
        of a model."""
        self.check_allowed()
        name = joined_name(*named_model(asked))
        download = self.known.get(name)
        if download and download.running:
            return download
        if name.partition(":")[0] in self.deleting:
            raise Overloaded(f"{name} is being deleted", retry_after_s=2)
        if sum(each.running for each in self.known.values()) >= self.MOST_WAITING:
            raise Overloaded("too many downloads are waiting", retry_after_s=60)
        self.known.pop(name, None)  # the newest is the last
        self.known[name] = download = Download(name, asked, self._note_change)
        for old in [each for each in self.known.values() if not each.running][:-self.MOST_KEPT]:
            del self.known[old.name]
        download.task = asyncio.create_task(supervised(
            f"downloading {name}", lambda: self._run(download), lambda error: self._failed(download, error)))
        return download

    def _note_change(self):
        self._changed.set()
        self._changed = asyncio.Event()

    async def states(self) -> AsyncIterator[dict]:
        """Yield the body of each download, and again after each change, until none is running."""
        shown: dict[str, dict] = {}
        while True:
            changed = self._changed
            for download in [*self.known.values()]:
                body = download.body
                if shown.get(download.name) != body:
                    shown[download.name] = body
                    yield body
            if not any(each.running for each in self.known.values()):
                return
            await changed.wait()

    @asynccontextmanager
    async def following(self, download: Download) -> AsyncIterator[AsyncIterator[dict]]:
        """Follow a download for a `with` block; yields its states. It ends when the last follower leaves,
        unless it `stays`."""
        download.followers += 1
        try:
            yield download.states()
        finally:
            download.followers -= 1
            if not (download.followers or download.stays):
                await asyncio.shield(self.cancel(download.name))

    async def _run(self, download: Download):
        try:
            async with self.running:
                path = await self._fetch(download)
            download.become("opening")
            download.note = await self.catalogue.source.take_in(
                download.name, path, () if download.asked == download.name else (download.asked,))
            download.usable = not download.note or not self.settings.serves_many
            log.info("downloaded %s%s", download.name, download.note and f": {download.note}")
            download.become("done", served=not download.note)
        except asyncio.CancelledError:
            download.become("cancelled")
            raise
        except ChatServerError as error:
            log.warning("the download of %s failed: %s", download.name, error)
            download.become("failed", error=str(error))

    def _failed(self, download: Download, error: Exception) -> bool:
        download.become("failed", error="internal error; the server's log has the details")
        return False

    async def _fetch(self, download: Download) -> Path:
        planned = False
        await self.planning.acquire()
        try:
            reserved = sum(each.missing for each in self.known.values() if each is not download)
            download.become("looking")
            message = HubFetch(download.name, self.settings.models_disk, reserved)
            async with self.process.answers(message) as answers:
                async for answer in answers:
                    match checked_answer(answer):
                        case HubProgress(stage, done, whole):
                            word = stage.partition(" ")[0]
                            download.become(word if word in Download.RUNNING else "downloading",
                                            done=done, whole=whole)
                            if whole and not planned:
                                planned = True
                                self.planning.release()
                        case HubFetched(path):
                            download.become(download.state, done=download.whole)
                            return path
            raise EngineFailure("the process for the hub ended")
        finally:
            if not planned:
                self.planning.release()

    async def cancel(self, name: str) -> bool:
        """End a download. What was written stays. Returns False if none with this name is running."""
        download = self.known.get(joined_name(*named_model(name)))
        if not (download and download.running and download.task):
            return False
        if download.state == "opening":  # all of it is here already
            await asyncio.wait([download.task])
            return False
        await end_tasks([download.task])
        if download.running:  # it had not begun
            download.become("cancelled")
        return True

    async def delete(self, name: str) -> int:
        """End a model's download, stop serving it, and remove it from the cache; returns how many bytes that
        freed. Raises RequestError 409 if the command line names it, ConfigError if it is not in the cache."""
        self.check_allowed()
        repository, file = named_model(name)
        self.catalogue.source.leave_out(repository, file)
        self.deleting.add(repository)
        try:
            for each in [*self.known]:
                if each == joined_name(repository, file) or not file and each.startswith(repository + ":"):
                    await self.cancel(each)
                    self.known.pop(each, None)
            freed = await asyncio.to_thread(delete_model, repository, file)
            self.catalogue.source.leave_out(repository, file)  # one that was just being opened
            log.info("deleted %s (%s bytes)", joined_name(repository, file), f"{freed:,}")
            return freed
        finally:
            self.deleting.discard(repository)

    async def close(self):
        await end_tasks([each.task for each in self.known.values() if each.task])
