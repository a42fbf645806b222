"""The adapters that a pool serves along with its model, in all its workers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, without_folders
from chatlm.common.hub.adapter_folders import adapter_at, adapters_in, named_adapters
from chatlm.common.hub.stamps import adapter_stamp
from chatlm.common.log import log
from chatlm.common.messages.protocol import AdapterLoaded, DropAdapter, LoadAdapter
from chatlm.front.pool.folder_scanner import FolderScanner
from chatlm.front.pool.worker import WorkerState

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.adapter_folders import AdapterFiles
    from chatlm.common.hub.stamps import Stamp
    from chatlm.front.pool.worker import Worker


@dataclass(eq=False)
class Adapter:
    """One revision of an adapter's files."""

    id: str
    files: AdapterFiles
    required: bool            # named on the command line: the server does not start without it
    watched: bool = False     # removed when its folder is
    problems: dict[int, str] = field(default_factory=dict)  # number of a worker -> why it cannot use it
    loaded: set[int] = field(default_factory=set)           # numbers of the workers that have it
    nbytes: int = 0           # as reported by a worker
    digest: str = ""          # of its weights
    retired: bool = False     # new answers no longer use it

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def bytes(self) -> int:
        """Bytes in each worker; an estimate until one has read it."""
        return self.nbytes or self.files.nbytes

    @property
    def problem(self) -> str:
        return next(iter(self.problems.values()), "")

    @property
    def public_reason(self) -> str:
        """Why it cannot be served, without the paths of this machine."""
        return without_folders(self.problem)


class PoolAdapters:
    """The adapters of a pool. Every worker loads all of them when it starts, and each new one when it comes.
    Pipes keep their order, so an answer with the adapter may follow at once.

    A new revision of an adapter replaces the old one once it is loaded. Running answers finish with the old
    one, which is dropped after them."""

    def __init__(self, settings: Settings, workers: Seq[Worker],
                 names_in_use: Callable[[], Seq[str]] = lambda: ()):
        """names_in_use: returns the names that an adapter may not have. Raises ConfigError for faults of
        --adapter that show without reading weights."""
        self.settings = settings
        self.workers = workers
        named, self.folders = named_adapters(settings.adapter)
        self.all: dict[str, Adapter] = {}      # by id: all that a worker may still have
        self.serving: dict[str, Adapter] = {}  # by name
        self.removed: set[str] = set()         # names of adapters whose files were removed
        self.uses: Counter[str] = Counter()    # id -> number of requests that use it
        self.numbers = itertools.count(1)
        self.started = False                   # True: no problem of an adapter ends the server any more
        self.names_in_use = names_in_use
        self.admit: Callable[[int], None] = lambda nbytes: None  # see ask_for_room
        for files in named:
            self.serve(files, required=True)
        self.watch = AdapterWatch(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters in all workers."""
        return len(self.workers) * sum(adapter.bytes for adapter in self.all.values())

    def ask_for_room(self, admit: Callable[[int], None]):
        """From now on, call this before adapters take that many more bytes. It raises ConfigError if there is
        no room."""
        self.admit = admit

    def avoid_names(self, names_in_use: Callable[[], Seq[str]]):
        """From now on, these are the names that an adapter may not have: see refuse_names."""
        self.names_in_use = names_in_use
        self.refuse_names()

    def refuse_names(self):
        """Raise ConfigError if a required adapter has the model's name. Others with that name are not
        served."""
        for name in {*self.serving} & {*self.names_in_use()}:
            if self.serving[name].required:
                folder = self.serving[name].files.path
                raise ConfigError(f"--adapter {name}={folder}: the model has the name {name}")
            log.error("the adapter %s is not served: the model has this name", name)
            self.retire(self.serving[name])

    def serve(self, files: AdapterFiles, required: bool = False, watched: bool = False):
        """Have all workers load an adapter. Answers use it once a worker has it; or at once, if there is no
        older revision that they could use."""
        adapter = Adapter(f"{files.name}#{next(self.numbers)}", files, required, watched)
        self.all[adapter.id] = adapter
        ready = [worker for worker in self.workers if worker.state is WorkerState.READY]
        older = self.serving.get(adapter.name)
        if not ready or older and not any(worker.gpu in older.loaded for worker in ready):
            self._switch(adapter)
        for worker in ready:
            worker.send(self._loading(adapter))

    def _loading(self, adapter: Adapter) -> LoadAdapter:
        """The message to load an adapter. Ray nodes have their own copies of the files, which are only
        compared by digest."""
        files = adapter.files
        stamp = () if self.settings.ray_address else files.stamp
        return LoadAdapter(adapter.id, str(files.path), stamp, adapter.digest)

    def _switch(self, adapter: Adapter):
        if older := self.serving.get(adapter.name):
            self.retire(older)
        self.serving[adapter.name] = adapter
        self.removed.discard(adapter.name)

    def retire(self, adapter: Adapter):
        """New answers no longer use it."""
        adapter.retired = True
        if self.serving.get(adapter.name) is adapter:
            del self.serving[adapter.name]

    @contextmanager
    def holding(self, adapter_id: str) -> Iterator[None]:
        """A request uses this revision, from when its model is looked up until its answers have ended."""
        self.uses[adapter_id] += 1
        try:
            yield
        finally:
            self.uses[adapter_id] -= 1
            if not self.uses[adapter_id]:
                del self.uses[adapter_id]

    def drop_unused(self):
        """Have the workers drop retired adapters that no request uses."""
        retired = [adapter for adapter in self.all.values() if adapter.retired]
        for adapter in (adapter for adapter in retired if adapter.id not in self.uses):
            del self.all[adapter.id]
            for worker in self.workers:
                if worker.state is WorkerState.READY:
                    worker.send(DropAdapter(adapter.id))

    def send_all(self, worker: Worker):
        """Send all adapters to a worker that has just become ready."""
        for adapter in self.all.values():
            adapter.loaded.discard(worker.gpu)
            worker.send(self._loading(adapter))

    def may_run(self, worker: Worker, adapter_id: str) -> bool:
        """Should a worker get answers with this adapter? Yes if it has the adapter, or if no other worker
        has it."""
        adapter = self.all.get(adapter_id)
        if adapter is None or worker.gpu in adapter.loaded:
            return True
        ready = [other for other in self.workers if other.state is WorkerState.READY]
        return not any(other.gpu in adapter.loaded for other in ready)

    def note(self, worker: Worker, message: AdapterLoaded) -> ConfigError | None:
        """Note what a worker reports about an adapter. Returns a ConfigError if the server cannot start."""
        adapter = self.all.get(message.id)
        if adapter is None:
            return None
        more = message.nbytes - adapter.bytes
        problem = message.problem
        if not problem and more > 0:
            problem = self.no_room(more)
        if not problem:
            adapter.problems.pop(worker.gpu, None)
            adapter.loaded.add(worker.gpu)
            adapter.nbytes = message.nbytes
            adapter.digest = message.digest
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
        """Why adapters may not take that many more bytes in each worker; "" if they may."""
        try:
            self.admit(len(self.workers) * nbytes)
        except ConfigError as error:
            return f"with it the model does not fit: {error}"
        return ""

    def _note_problem(self, adapter: Adapter, problem: str):
        """Log the problem once, until the files change."""
        folder = adapter.files.path
        older = self.serving.get(adapter.name)
        stays = bool(older and older is not adapter and older.loaded)
        stamp = adapter.files.stamp
        if self.watch.scanner.refuse(stamp, for_good=adapter_stamp(folder) == stamp):
            log.error("the adapter %s cannot be served%s: %s", adapter.name,
                      " (its older version stays)" if stays else "", problem)
        if stays:
            self.retire(adapter)
        elif older is not adapter:
            self._switch(adapter)  # requests get the reason

    @property
    def settled(self) -> bool:
        """Has a worker reported for each adapter whether it can be served?"""
        return all(adapter.loaded or adapter.problems for adapter in self.serving.values())


class AdapterWatch:
    """Keeps a pool's adapters up to date with a folder: one of --adapter, or those adapters below --models
    that were made for the pool's model."""

    WATCH_S = 3.0  # between two scans

    def __init__(self, adapters: PoolAdapters):
        self.adapters = adapters
        self.scanner = FolderScanner(lambda: adapters_in(*adapters.folders), self._revisions, self.WATCH_S)
        if adapters.folders:
            self.scanner.compare(adapters_in(*adapters.folders))
        for files in self.scanner.there.values():
            if files.name not in adapters.serving:
                adapters.serve(files, watched=True)

    def _revisions(self) -> list[Stamp]:
        return [adapter.files.stamp for adapter in self.adapters.all.values()
                if not adapter.retired and (adapter.loaded or not adapter.problems)]

    async def run(self):
        await self.scanner.run(self.update)

    async def update(self, settled: Iterable[AdapterFiles]):
        adapters = self.adapters
        there = self.scanner.there
        for adapter in [adapter for adapter in adapters.serving.values() if adapter.watched]:
            if adapter.files.path not in there:
                log.info("the adapter %s was removed", adapter.name)
                adapters.retire(adapter)
                adapters.removed.add(adapter.name)
        for files in settled:
            same = adapters.serving.get(files.name)
            free = files.name not in adapters.names_in_use() and (not same or same.files.path == files.path)
            if free and self.fits(files):
                adapters.serve(files, watched=True)

    def follow(self, adapter: Adapter) -> bool:
        """Serve an adapter's current files, if they are not the revision that a worker was told to load.
        Returns whether they are served."""
        adapters = self.adapters
        now = adapter_at(adapter.files.path, adapter.name)
        if (not now.stamp or adapters.settings.ray_address or now.stamp == adapter.files.stamp
                or self.scanner.refused.get(now.stamp)):
            return False
        if all(other.files.stamp != now.stamp for other in adapters.all.values()):
            if not self.fits(now):
                return False
            log.info("the files of the adapter %s have changed; reading them again", adapter.name)
            adapters.serve(now, adapter.required, adapter.watched)
        return True

    def fits(self, files: AdapterFiles) -> bool:
        """Is there room for an adapter beside what is served? If not, that is logged once."""
        problem = self.adapters.no_room(files.nbytes)
        if problem and self.scanner.refuse(files.stamp, for_good=False):
            stays = " (its older version stays)" if files.name in self.adapters.serving else ""
            log.error("the adapter %s is not served%s: %s", files.name, stays, problem)
        return not problem
