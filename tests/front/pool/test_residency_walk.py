"""A random walk over everything that can happen to models that take turns in memory, with workers that the test plays."""

import time

from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from chatlm.common.errors import ConfigError
from chatlm.front.pool.residency import NEXT_MEMORY_STATES, MemoryShare, MemoryState
from chatlm.front.pool.worker import CacheState, WorkerState
from nightly import WHOLE
from played_models import Clock, Models

NAMES = "abcd"
BUDGET = 10
ROUNDS = 60         # of fair turns, in each of which 10 s pass: what waits then waits for ever


class Process:
    """A worker's process, which exits some time after it was killed."""

    def __init__(self):
        self.killed = self.gone = False

    def poll(self):
        return -9 if self.gone else None

    def kill(self):
        self.killed = True


class Walk(RuleBasedStateMachine):
    """Every step is something that clients, the operator, workers or the system do; the residency looks after each."""

    def __init__(self):
        super().__init__()
        self.clock, self.monotonic, self.jobs, self.requests = Clock(), time.monotonic, [], 0
        self.grown = 0      # bytes of adapters that have come to models in memory
        time.monotonic = self.clock.monotonic

    def teardown(self):
        try:
            if hasattr(self, "models"):
                self.everything_ends()
        finally:
            time.monotonic = self.monotonic

    @initialize(sizes=strategies.lists(strategies.integers(1, 8), min_size=4, max_size=4), pinned=strategies.booleans(),
                idle=strategies.sampled_from((0.0, 15.0)))
    def begin(self, sizes, pinned, idle):
        options = {name: {"cache": min(size - 1, 3), "idle_s": idle} for name, size in zip(NAMES, sizes)}
        options["a"] |= {"pinned": pinned, "idle_s": 0.0}
        self.models = Models(self.clock, BUDGET, dict(zip(NAMES, sizes)), **options)
        places, self.models.residency.shares = self.models.residency.shares, []
        for place in places:
            try:
                self.models.residency.admit(place)
            except ConfigError:     # it could never be loaded: requests for it are refused
                del self.models.by_name[place.name]
        self.settle()

    def settle(self, seconds=0.0):
        self.models.settle(seconds)

    def place(self, number) -> MemoryShare:
        return [*self.models.by_name.values()][number % len(self.models.by_name)]

    @rule(number=strategies.integers(0, 3), low=strategies.booleans())
    def a_request_comes(self, number, low):
        self.requests += 1
        self.jobs.append(self.models.ask(self.place(number).name, f"r{self.requests}", low_priority=low))
        self.settle()

    @rule(number=strategies.integers(0, 3))
    def the_operator_loads(self, number):
        place = self.place(number)
        place.is_requested = not place.serves
        self.settle()

    @rule(number=strategies.integers(0, 3))
    def the_operator_unloads(self, number):
        place = self.place(number)
        place.is_requested = False
        place.leave()
        self.settle()

    @rule(seconds=strategies.sampled_from((0.1, 3.0, 11.0, 40.0)))
    def time_passes(self, seconds):
        self.settle(seconds)

    @rule(number=strategies.integers(0, 3), seconds=strategies.sampled_from((0.5, 5.0, 30.0)))
    def a_worker_loads(self, number, seconds):
        self.load(self.place(number), seconds)
        self.settle()

    def load(self, place, seconds):
        [worker] = place.pool.workers
        if place.pool.supervisor.wanted.is_set() and worker.state in (WorkerState.UNLOADED, WorkerState.DEAD, WorkerState.LOADING):
            if worker.process is None or worker.process.gone:
                worker.process, worker.cache = Process(), CacheState.HELD
                self.models.load(place.name, seconds)

    @rule(number=strategies.integers(0, 20))
    def an_answer_ends(self, number):
        running = [job for job in self.jobs if job.worker is not None]
        if running:
            self.end(running[number % len(running)])
            self.settle()

    def end(self, job):
        name = next(name for name, place in self.models.by_name.items() if place.pool.workers[0] is job.worker)
        self.jobs.remove(job)
        self.models.end(name, job)

    @rule(number=strategies.integers(0, 3))
    def a_worker_dies(self, number):
        [worker] = self.place(number).pool.workers
        if worker.state is WorkerState.READY:
            worker.process.gone = True
            worker.become(WorkerState.DEAD)
            self.place(number).pool.dispatcher.requeue(worker)
            for job in self.jobs:
                job.failovers = min(job.failovers, 1)   # or they are given up one day
            self.settle()

    @rule(number=strategies.integers(0, 3), able=strategies.sampled_from((True, True, True, False)))
    def a_worker_says_whether_its_pages_are_empty(self, number, able):
        [worker] = self.place(number).pool.workers
        if worker.state is WorkerState.READY and worker.cache is CacheState.ASKED:
            worker.cache = CacheState.EMPTY if able else CacheState.UNABLE
            self.settle()

    @rule(number=strategies.integers(0, 3), more=strategies.integers(1, 2))
    def an_adapter_comes(self, number, more):
        place = self.place(number)
        try:
            self.models.residency.admit(place, more)
        except ConfigError:     # it is refused
            return
        place.own_size += more
        self.grown += more if place.taken else 0
        self.settle()

    @rule()
    def killed_processes_exit(self):
        for place in self.models.by_name.values():
            [worker] = place.pool.workers
            if worker.process and worker.process.killed:
                worker.process.gone = True
        self.settle()

    @invariant()
    def the_bytes_are_within_the_budget(self):
        if hasattr(self, "models"):
            self.grown = self.grown if self.models.residency.used > BUDGET else 0     # till others have left
            assert self.models.residency.used <= BUDGET + self.grown
            held = [place.size - (place.cache if worker.cache is CacheState.EMPTY else 0) for place in self.models.by_name.values()
                    for worker in place.pool.workers if worker.process and not worker.process.gone]
            assert sum(held) <= BUDGET + self.grown, "processes hold more than the places count"

    @invariant()
    def no_answer_was_cut(self):
        for job in self.jobs:
            assert job.worker is None or job.worker.state is WorkerState.READY, "its worker was ended"

    def everything_ends(self):
        """From here on all that should happen does happen."""
        for _ in range(ROUNDS):     # workers that were ended or asked for their pages are slow
            for place in self.models.by_name.values():
                self.load(place, 1.0)
            self.the_bytes_are_within_the_budget()
            self.killed_processes_exit()
            for number in range(len(self.models.by_name)):
                self.a_worker_says_whether_its_pages_are_empty(number, True)
            for job in [job for job in self.jobs if job.worker is not None]:
                self.end(job)
            self.settle(10.0)
        assert self.models.residency.used <= BUDGET
        assert not self.jobs, f"requests that wait for ever: {[(job.id, place.memory_state) for job in self.jobs for place in self.models.by_name.values()]}"


def test_no_request_waits_for_ever():
    """Whatever happens, no answer is cut and the bytes suffice."""
    run_state_machine_as_test(Walk, settings=settings(max_examples=60 if WHOLE else 20, stateful_step_count=40, deadline=None, derandomize=True))


def test_each_stay_can_be_left_and_reached():
    reached = {stay for following in NEXT_MEMORY_STATES.values() for stay in following}
    assert reached == {*NEXT_MEMORY_STATES} == {*MemoryState} and all(NEXT_MEMORY_STATES.values())
