"""The thread that compiles grammars and masks, client after client."""

import threading
from types import SimpleNamespace

import pytest

from chatlm.worker.engine import fair_thread
from chatlm.worker.engine.fair_thread import FairThread


def test_how_long_it_is_behind_follows_from_what_tasks_took(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(fair_thread, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    thread = FairThread("tests")

    def take(seconds):
        now_s[0] += seconds

    for _ in range(100):
        thread.submit("a", take, 2.0).result()
    thread.thread.submit(int).result()  # the mean is noted after the future has its result
    assert thread.mean_s == pytest.approx(2.0, rel=0.01) and thread.behind_s == 0
    thread.submit("a", take, 12.0).result()
    thread.thread.submit(int).result()
    assert thread.mean_s == pytest.approx(3.0, rel=0.01)
    going = threading.Event()
    first = thread.submit("a", going.wait)
    waiting = [thread.submit(client, int) for client in "abc"]
    assert thread.behind_s >= 3 * thread.mean_s
    going.set()
    assert [each.result() for each in (first, *waiting)] == [True, 0, 0, 0]


def test_clients_take_turns_and_a_failure_is_one_task_s():
    thread, going, done = FairThread("tests"), threading.Event(), []
    thread.submit("z", going.wait)
    waiting = [thread.submit(client, done.append, f"{client}{number}") for client in "ab" for number in range(2)]
    failing = thread.submit("c", int, "x")
    cancelled = thread.submit("c", done.append, "never")
    assert cancelled.cancel()
    going.set()
    for each in waiting:
        each.result()
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result()
    assert done == ["a0", "b0", "a1", "b1"]
