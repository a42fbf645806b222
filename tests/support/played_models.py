"""Models that take turns in memory, with workers that the test plays and a clock of its own."""

import asyncio
from functools import partial

from chatlm.common.messages.protocol import CacheEmptied, EmptyCache
from chatlm.common.messages.requests import Ended, Usage
from chatlm.front.pool.residency import MemoryShare, Residency
from chatlm.front.pool.worker import Job, WorkerState
from answers import asked
from pools import played_pool


class Clock:
    """time.monotonic, as the test sets it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Models:
    """Places of played models, by name, under a budget."""

    def __init__(self, clock, budget, sizes, **options):
        self.clock, self.residency = clock, Residency(budget)
        self.by_name = {}
        for name, size in sizes.items():
            pool = played_pool(memory=partial(self._share, name, size, **options.get(name, {})))
            pool.supervisor.unload()
            self.by_name[name] = pool.memory
            self.residency.shares.append(pool.memory)

    def _share(self, name, size, pool, **options):
        return MemoryShare(name, pool, size, note_jobs=self.residency.changed.set, **options)

    def settle(self, seconds=0.0):
        self.clock.now += seconds
        self.residency.settle(self.clock.now)
        return self.inside()

    def inside(self):
        return "".join(name for name, place in self.by_name.items() if place.taken)

    def ask(self, name, request="r", **options):
        """A request comes, and waits; returns what its reader would iterate."""
        dispatcher = self.by_name[name].pool.dispatcher
        job = Job(asked(request, prompts=((1, 2, 3),), max_tokens=4, **options), (1, 2, 3), 4, asyncio.Queue(), self.clock.now)
        dispatcher._submit([job])
        return job

    def load(self, name, seconds=1.0):
        """Its worker has loaded."""
        self.begin_load(name)
        self.clock.now += seconds
        self.end_load(name, seconds)

    def begin_load(self, name):
        [worker] = self.by_name[name].pool.workers
        worker.become(WorkerState.LOADING)

    def end_load(self, name, seconds):
        [worker] = self.by_name[name].pool.workers
        worker.become(WorkerState.READY)
        supervisor = self.by_name[name].pool.supervisor
        supervisor.load_s = seconds
        self.by_name[name].pool.dispatcher.use.last_s = self.clock.now
        self.by_name[name].pool.dispatcher.dispatch()

    def end(self, name, job):
        pool = self.by_name[name].pool
        pool.dispatcher.deliver(pool.workers[0], [(job.worker_id, Ended("stop", None, Usage(), 0.0))])

    def emptied(self, name, able=True):
        """Its worker, which was asked for its KV pages' memory, answers."""
        pool = self.by_name[name].pool
        assert isinstance(pool.workers[0].sent.pop(), EmptyCache)
        pool.supervisor.handle(pool.workers[0], CacheEmptied(able))

    def answering(self, name, request="r", seconds=1.0):
        """An answer under way of a model that had to load."""
        job = self.ask(name, request)
        self.settle()
        self.load(name, seconds)
        return job

    def serve(self, name, request="r", seconds=1.0):
        """A whole answer of a model that had to load."""
        self.end(name, self.answering(name, request, seconds))
