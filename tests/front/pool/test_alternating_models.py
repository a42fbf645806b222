"""Models that are asked again and again although memory holds one of them: clients, loads and the clock are played."""

import itertools
import time
from dataclasses import dataclass

import pytest

from chatlm.front.pool.worker import WorkerState
from played_models import Clock, Models

STEP_S = 0.05       # of the played clock; the residency looks every 0.1 s or sooner
START_S = 0.3       # between the models: a process ends, another begins; no worker counts it as its load
WINDOW_S = 30.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


@dataclass
class Answer:
    name: str
    asked_s: float
    begin_s: float = 0.0
    end_s: float = 0.0

    @property
    def wait_s(self):
        return self.begin_s - self.asked_s


class Play:
    """Clients that ask, each its model, again after each answer; workers that load and answer in their time."""

    def __init__(self, clock, load_s, answer_s=0.3):
        """load_s: by model. The budget has room for any one of them."""
        self.clock = clock
        self.load_s = load_s
        self.answer_s = answer_s
        self.models = Models(clock, 10, dict.fromkeys(load_s, 8))
        self.models.settle()
        self.clients = []
        self.loading_since_s = {}
        self.answers = []           # all that have ended

    def client(self, name, pause_s=0.0, first_s=0.0, **options):
        """Begins first_s from now, and pauses after each answer."""
        self.clients.append(Client(self, name, pause_s, self.clock.now + first_s, options))

    def play(self, seconds=WINDOW_S):
        end_s = self.clock.now + seconds
        while self.clock.now < end_s:
            for client in self.clients:
                client.step()
            self.models.settle(STEP_S)
            for name in self.load_s:
                self._load(name)

    def _load(self, name):
        pool = self.models.by_name[name].pool
        [worker] = pool.workers
        if not pool.supervisor.wanted.is_set() or worker.state is WorkerState.READY:
            self.loading_since_s.pop(name, None)
            return
        took_s = self.clock.now - self.loading_since_s.setdefault(name, self.clock.now)
        if worker.state is WorkerState.UNLOADED and took_s >= START_S:
            self.models.begin_load(name)
        if took_s >= START_S + self.load_s[name]:
            self.models.end_load(name, self.load_s[name])

    @property
    def changes(self):
        return sum(before.name != after.name for before, after in itertools.pairwise(self.by_begin))

    @property
    def by_begin(self):
        return sorted(self.answers, key=lambda answer: answer.begin_s)

    @property
    def computed_share(self):
        """The share of the time from the first answer's begin in which at least one was computed."""
        computed_s = until_s = 0.0
        for answer in self.by_begin:
            computed_s += max(answer.end_s - max(answer.begin_s, until_s), 0.0)
            until_s = max(until_s, answer.end_s)
        return computed_s / (until_s - self.by_begin[0].begin_s)

    def longest_wait_s(self, name=""):
        """Of an answer of a model, or of all; those that still wait count too."""
        waits_s = [answer.wait_s for answer in self.answers if name in ("", answer.name)]
        waits_s += [self.clock.now - client.answer.asked_s for client in self.clients
                    if client.job and client.job.worker is None and name in ("", client.name)]
        return max(waits_s)


class Client:
    numbers = itertools.count()

    def __init__(self, play, name, pause_s, next_s, options):
        self.play = play
        self.name = name
        self.pause_s = pause_s
        self.next_s = next_s
        self.options = options
        self.job = None
        self.answer = None

    def step(self):
        now = self.play.clock.now
        if self.job is None and now >= self.next_s:
            self.job = self.play.models.ask(self.name, f"r{next(self.numbers)}", **self.options)
            self.answer = Answer(self.name, now)
        if self.job is None or self.job.worker is None:
            return
        self.answer.begin_s = self.answer.begin_s or now
        if now - self.answer.begin_s >= self.play.answer_s:
            self.play.models.end(self.name, self.job)
            self.answer.end_s = now
            self.play.answers.append(self.answer)
            self.job = None
            self.next_s = now + self.pause_s


LOADS = [{"a": 0.6, "b": 0.6}, {"a": 0.6, "b": 2.0}, {"a": 3.0, "b": 3.0}]


@pytest.mark.parametrize("load_s", LOADS)
@pytest.mark.parametrize("each", [1, 4])
async def test_two_models_asked_without_pause_mostly_answer(clock, load_s, each):
    """At least half of the time is answers, and nobody waits longer than 20 s."""
    play = Play(clock, load_s)
    clock.now += 60     # a quiet time before changes nothing
    for name in list(load_s) * each:
        play.client(name)
    play.play()
    print(load_s, each, play.changes, play.computed_share, play.longest_wait_s())
    assert play.computed_share >= 0.5
    assert play.longest_wait_s() <= 20
    assert {answer.name for answer in play.answers[-200:]} == {"a", "b"}
