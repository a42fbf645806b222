"""The adapters that are served beside a model, in all its workers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, without_folders
from chatlm.common.hub.adapters import adapter_at, adapters_in, named_adapters
from chatlm.common.hub.stamps import adapter_stamp
from chatlm.common.log import log
from chatlm.common.messages.protocol import AdapterLoaded, DropAdapter, LoadAdapter
from chatlm.front.pool.sightings import Sightings
from chatlm.front.pool.worker import State

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.adapters import AdapterFiles
    from chatlm.common.hub.stamps import Stamp
    from chatlm.front.pool.worker import Worker


@dataclass(eq=False)
class Adapter:
    """One version of an adapter's files."""

    id: str
    files: AdapterFiles
    required: bool            # by the command line: without it the server does not start
    watched: bool = False     # it goes when its folder does
    problems: dict[int, str] = field(default_factory=dict)  # worker's number -> why it cannot compute it
    loaded: set[int] = field(default_factory=set)  # workers' numbers
    nbytes: int = 0           # as reported by a worker
    digest: str = ""          # of its weights
    retired: bool = False     # new answers do not take it any more

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def bytes(self) -> int:
        """In a worker; an estimate until one has read it."""
        return self.nbytes or self.files.nbytes

    @property
    def problem(self) -> str:
        return next(iter(self.problems.values()), "")

    @property
    def public_problem(self) -> str:
        """Without the paths of this machine."""
        return without_folders(self.problem)


class PoolAdapters:
    """The adapters of a pool. Every worker loads each of them, and all when it starts; pipes keep order,
    so an answer may follow at once. A new version of an adapter takes the old one's place once it is loaded;
    answers under way end on the old one, which is dropped when the last of them has ended."""

    def __init__(self, settings: Settings, workers: Seq[Worker]):
        """ConfigError for what --adapter says, as far as that can be seen without reading weights."""
        self.settings, self.workers = settings, workers
        named, self.folders = named_adapters(settings.adapter)
        self.all: dict[str, Adapter] = {}      # by id; those that a worker may still have
        self.serving: dict[str, Adapter] = {}  # by name
        self.gone: set[str] = set()            # names of those that went with their files
        self.held: Counter[str] = Counter()    # ids -> how many requests have them
        self.numbers = itertools.count(1)
        self.started = False                   # then no problem ends the server
        self.taken: Callable[[], Seq[str]] = lambda: ()  # names that an adapter may not have
        self.admit: Callable[[int], None] = lambda nbytes: None  # ConfigError: no room for more
        for files in named:
            self.serve(files, required=True)
        self.watch = AdapterWatch(self)

    @property
    def nbytes(self) -> int:
        """What all of them take in all workers."""
        return len(self.workers) * sum(adapter.bytes for adapter in self.all.values())

    def refuse_names(self):
        """ConfigError if an adapter is called as the model is."""
        for name in {*self.serving} & {*self.taken()}:
            if self.serving[name].required:
                folder = self.serving[name].files.path
                raise ConfigError(f"--adapter {name}={folder}: the model is called {name}")
            log.error("the adapter %s is not served: the model has this name", name)
            self.retire(self.serving[name])

    def serve(self, files: AdapterFiles, required: bool = False, watched: bool = False):
        """Have all workers load it; answers take it once one has, unless none has an older version."""
        adapter = Adapter(f"{files.name}#{next(self.numbers)}", files, required, watched)
        self.all[adapter.id] = adapter
        ready = [worker for worker in self.workers if worker.state is State.READY]
        older = self.serving.get(adapter.name)
        if not ready or older and not any(worker.gpu in older.loaded for worker in ready):
            self._switch(adapter)
        for worker in ready:
            worker.send(self._loading(adapter))

    def _loading(self, adapter: Adapter) -> LoadAdapter:
        """Nodes of Ray have their own copies of the files, which are compared by digest alone."""
        files = adapter.files
        stamp = () if self.settings.ray_address else files.stamp
        return LoadAdapter(adapter.id, str(files.path), stamp, adapter.digest)

    def _switch(self, adapter: Adapter):
        if older := self.serving.get(adapter.name):
            self.retire(older)
        self.serving[adapter.name] = adapter
        self.gone.discard(adapter.name)

    def retire(self, adapter: Adapter):
        """No new answer takes it."""
        adapter.retired = True
        if self.serving.get(adapter.name) is adapter:
            del self.serving[adapter.name]

    @contextmanager
    def holding(self, adapter_id: str) -> Iterator[None]:
        """A request has this version, from when its model is looked up until its answers have ended."""
        self.held[adapter_id] += 1
        try:
            yield
        finally:
            self.held[adapter_id] -= 1
            if not self.held[adapter_id]:
                del self.held[adapter_id]

    def drop_unused(self):
        """Have the workers forget retired adapters that no request has."""
        retired = [adapter for adapter in self.all.values() if adapter.retired]
        for adapter in (adapter for adapter in retired if adapter.id not in self.held):
            del self.all[adapter.id]
            for worker in self.workers:
                if worker.state is State.READY:
                    worker.send(DropAdapter(adapter.id))

    def greet(self, worker: Worker):
        """A worker is ready, and has no adapter yet."""
        for adapter in self.all.values():
            adapter.loaded.discard(worker.gpu)
            worker.send(self._loading(adapter))

    def able(self, worker: Worker, adapter_id: str) -> bool:
        """Should a worker get answers with this adapter: has it the adapter, or has no other?"""
        adapter = self.all.get(adapter_id)
        if adapter is None or worker.gpu in adapter.loaded:
            return True
        return not any(other.gpu in adapter.loaded for other in self.workers if other.state is State.READY)

    def note(self, worker: Worker, message: AdapterLoaded) -> ConfigError | None:
        """What a worker says of an adapter; a ConfigError if the server cannot start with it."""
        if (adapter := self.all.get(message.id)) is None:
            return None
        more = message.nbytes - adapter.bytes
        problem = message.problem or more > 0 and self.no_room(more)
        if not problem:
            adapter.problems.pop(worker.gpu, None)
            adapter.loaded.add(worker.gpu)
            adapter.nbytes, adapter.digest = message.nbytes, message.digest
            if not adapter.retired and self.serving.get(adapter.name) is not adapter:
                self._switch(adapter)
            log.info("the adapter %s: %.1f MB from %s", adapter.name, message.nbytes / 1e6,
                     adapter.files.path)
            return None
        adapter.loaded.discard(worker.gpu)
        if not adapter.retired and self.watch.follow(adapter):
            return None
        adapter.problems[worker.gpu] = problem
        if adapter.required and not self.started:
            return ConfigError(f"--adapter {adapter.name}: {problem}")
        if not message.problem:
            worker.send(DropAdapter(adapter.id))
        if not adapter.retired:
            self._note_problem(adapter, problem)
        return None

    def no_room(self, nbytes: int) -> str:
        """Why an adapter may not take that many more bytes in each worker; "" if it may."""
        try:
            self.admit(len(self.workers) * nbytes)
        except ConfigError as error:
            return f"with it the model does not fit: {error}"
        return ""

    def _note_problem(self, adapter: Adapter, problem: str):
        """One line, until its files change."""
        folder, older = adapter.files.path, self.serving.get(adapter.name)
        stays = bool(older and older is not adapter and older.loaded)
        stamp = adapter.files.stamp
        if self.watch.sightings.refuse(stamp, for_good=adapter_stamp(folder) == stamp):
            log.error("the adapter %s cannot be served%s: %s", adapter.name,
                      " (its older version stays)" if stays else "", problem)
        if stays:
            self.retire(adapter)
        elif older is not adapter:
            self._switch(adapter)  # requests get the reason

    @property
    def settled(self) -> bool:
        """Has a worker said of each whether it can be served?"""
        return all(adapter.loaded or adapter.problems for adapter in self.serving.values())


class AdapterWatch:
    """Has a pool serve the adapters below a folder as they are there now: its own, or the share in --models
    that was made for its model."""

    WATCH_S = 3.0  # between two looks

    def __init__(self, adapters: PoolAdapters):
        self.adapters = adapters
        self.sightings = Sightings(lambda: adapters_in(*adapters.folders), self._versions, self.WATCH_S)
        if adapters.folders:
            self.sightings.compare(adapters_in(*adapters.folders))
        for files in self.sightings.there.values():
            if files.name not in adapters.serving:
                adapters.serve(files, watched=True)

    def _versions(self) -> list[Stamp]:
        return [adapter.files.stamp for adapter in self.adapters.all.values()
                if not adapter.retired and (adapter.loaded or not adapter.problems)]

    async def run(self):
        await self.sightings.run(self.update)

    async def update(self, settled: Iterable[AdapterFiles]):
        adapters, there = self.adapters, self.sightings.there
        for adapter in [adapter for adapter in adapters.serving.values() if adapter.watched]:
            if adapter.files.path not in there:
                log.info("the adapter %s has gone", adapter.name)
                adapters.retire(adapter)
                adapters.gone.add(adapter.name)
        for files in settled:
            same = adapters.serving.get(files.name)
            free = files.name not in adapters.taken() and (not same or same.files.path == files.path)
            if free and self.fits(files):
                adapters.serve(files, watched=True)

    def follow(self, adapter: Adapter) -> bool:
        """Serve the files that an adapter's folder has now, if a worker did not find those of its version."""
        adapters, now = self.adapters, adapter_at(adapter.files.path, adapter.name)
        if (not now.stamp or adapters.settings.ray_address or now.stamp == adapter.files.stamp
                or self.sightings.refused.get(now.stamp)):
            return False
        if all(other.files.stamp != now.stamp for other in adapters.all.values()):
            if not self.fits(now):
                return False
            log.info("the files of the adapter %s have changed: they are read again", adapter.name)
            adapters.serve(now, adapter.required, adapter.watched)
        return True

    def fits(self, files: AdapterFiles) -> bool:
        """Is there room for it beside what is served? If not, that is logged once."""
        problem = self.adapters.no_room(files.nbytes)
        if problem and self.sightings.refuse(files.stamp, for_good=False):
            stays = " (its older version stays)" if files.name in self.adapters.serving else ""
            log.error("the adapter %s is not served%s: %s", files.name, stays, problem)
        return not problem
