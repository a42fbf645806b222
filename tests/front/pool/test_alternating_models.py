"""Models asked again and again while memory holds one of them. Clients, loads and clock are played."""

import itertools
import math
import time
from collections import Counter
from dataclasses import dataclass

import pytest

from chatlm.front.pool.worker import WorkerState
from played_models import Clock, Models

STEP_S = 0.05       # of the played clock; the residency looks every 0.1 s or sooner
START_S = 0.3       # between the models: a process ends, another begins; no worker counts it as its load
WINDOW_S = 30.0     # what a person sees of it


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
    """Clients that ask, each its model, again after each answer; workers that load and answer."""

    def __init__(self, clock, load_s, answer_s=0.3, step_s=STEP_S):
        """load_s: by model. The budget has room for any one of them."""
        self.clock = clock
        self.step_s = step_s
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
            self.models.settle(self.step_s)
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


@pytest.mark.parametrize("load_s", [{"a": 0.6, "b": 0.6}, {"a": 0.6, "b": 2.0}, {"a": 3.0, "b": 3.0}])
@pytest.mark.parametrize("each", [1, 4])
async def test_two_models_asked_without_pause_mostly_answer(clock, load_s, each):
    """At least half of the time is answers, and nobody waits longer than 20 s."""
    play = Play(clock, load_s)
    play.play(60)       # a quiet minute earns nothing
    for name in list(load_s) * each:
        play.client(name)
    play.play()
    assert play.computed_share >= 0.5
    assert play.longest_wait_s() <= 20
    assert {answer.name for answer in play.answers} == {"a", "b"}


async def test_a_seldom_asked_model_gets_its_turn(clock):
    """It is done with its turn as soon as it is idle for a load's time."""
    play = Play(clock, {"a": 0.6, "b": 0.6})
    play.client("a")
    play.client("b", pause_s=5, first_s=5)
    play.play()
    assert play.computed_share >= 0.5
    assert play.longest_wait_s("b") <= START_S + 0.6 + 2 * play.answer_s
    assert play.longest_wait_s("a") <= 2 * (START_S + 0.6) + 0.6 + 2 * play.answer_s


async def test_a_question_to_another_model_waits_for_its_load_alone(clock):
    """The model in memory has been idle, for longer than its load took."""
    play = Play(clock, {"a": 3.0, "b": 3.0})
    play.client("a", pause_s=12)
    play.client("b", pause_s=12, first_s=6.5)
    play.play(120)
    assert play.changes >= 12
    assert play.longest_wait_s() <= START_S + 3.0 + 0.4      # the clock's steps, and looks between them


@pytest.mark.parametrize("load_s", [0.6, 300.0])
async def test_three_models_asked_without_pause_all_answer(clock, load_s):
    """Loads of minutes make nobody wait for hours."""
    play = Play(clock, dict.fromkeys("abc", load_s), answer_s=load_s / 3, step_s=load_s / 20)
    for name in "aabbc":
        play.client(name)
    play.play(100 * load_s)
    counts = Counter(answer.name for answer in play.answers)
    assert min(counts[name] for name in "abc") >= max(counts.values()) / 5
    assert play.computed_share >= 0.5
    assert play.longest_wait_s() <= 12 * load_s


async def test_requests_in_the_background_take_no_turns_from_others(clock):
    """They get what interactive requests leave, and are answered in a pause."""
    play = Play(clock, {"a": 0.6, "b": 0.6})
    play.client("a")
    play.client("b", low_priority=True)
    play.play()
    assert {answer.name for answer in play.answers} == {"a"}
    play.clients[0].pause_s = math.inf
    play.play()
    assert {answer.name for answer in play.answers[-20:]} == {"b"}
