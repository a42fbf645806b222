"""A worker's loop: what a front asks is done, in turn, and what fails is survived or not."""

from types import SimpleNamespace

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import CacheEmptied, EmptyCache, NewAnswer, NewPrompt, NewRequest, Ping, Ready, Stepped
from chatlm.common.messages.requests import AnswerParams, Ended, Failed, SamplingParams
from chatlm.common.messages.wire import BadMessage
from chatlm.worker.engine.warm_up import WarmUp
from chatlm.worker import loop
from chatlm.worker.loop import WorkerLoop
from engines import make_engine
from worker_front import Front

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = SimpleNamespace(settings=Settings(stream_interval=0), device="cpu")


def asking(name, prompt=(1, 2, 3), tokens=4):
    params = AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True)
    return [NewRequest(name, params), NewPrompt(name, 0, prompt), NewAnswer(name, name, 0, 0, tokens)]


@pytest.fixture
def engine(nanochat_fixtures):
    return make_engine(nanochat_fixtures / "gen5", max_batch=4)


@torch.inference_mode()
def run(front, engine, warm_up=None):
    loop = WorkerLoop(front, engine, CONFIG, warm_up)
    with pytest.raises(EOFError):
        loop.run()
    return loop


def broken(engine, monkeypatch, times):
    """The next steps of the engine fail, so many of them."""
    start, left = engine.runner.start, [times]

    def fail(batch, rows):
        if left[0]:
            left[0] -= 1
            raise ValueError("a bad step")
        return start(batch, rows)

    monkeypatch.setattr(engine.runner, "start", fail)


def test_a_failed_step_costs_only_its_answer(engine, monkeypatch):
    """A failed step costs the answer in it, and the next answer is whole."""
    broken(engine, monkeypatch, 1)
    front = Front(asking("lost"), asking("whole"))
    run(front, engine)
    failed, ended = [dict(front.events)[name] for name in ("lost", "whole")]
    assert isinstance(failed, Failed) and "(ValueError)" in failed.message and isinstance(ended, Ended)


def test_a_worker_survives_three_failed_steps(engine, monkeypatch):
    """A worker survives three failed steps in a row, and not four."""
    broken(engine, monkeypatch, 4)
    front = Front(*(asking(str(number)) for number in range(4)))
    loop = WorkerLoop(front, engine, CONFIG)
    with torch.inference_mode(), pytest.raises(ValueError, match="a bad step"):
        loop.run()
    assert loop.failures == 4 and len([event for _, event in front.events if isinstance(event, Failed)]) == 3


def test_a_computed_step_forgives_failed_ones(engine, monkeypatch):
    front = Front(*(asking(str(number)) for number in range(6)))
    start = engine.runner.start

    def fail_first(batch, rows):
        if len(front.batches) % 2 and batch.lengths[0] == 3:
            raise ValueError("a bad step")
        return start(batch, rows)

    monkeypatch.setattr(engine.runner, "start", fail_first)
    loop = run(front, engine)
    ends = dict(front.events)
    assert [isinstance(ends[str(number)], Failed) for number in range(6)] == [True, False] * 3 and loop.failures == 0


def test_an_error_of_the_gpu_ends_the_worker_at_once(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "start", lambda batch, rows: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal access")))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="illegal access"):
        WorkerLoop(Front(asking("a")), engine, CONFIG).run()


def test_the_cache_is_emptied_when_nothing_runs(engine):
    prompt = tuple(range(3, 60))
    front = Front([*asking("a", prompt), EmptyCache()], [Ping()])
    run(front, engine)
    ended = next(i for i, message in enumerate(front.sent) if isinstance(message, Stepped) and any(isinstance(event, Ended) for _, event in message.events))
    [emptied] = [i for i, message in enumerate(front.sent) if isinstance(message, CacheEmptied)]
    assert front.sent[emptied] == CacheEmptied(True) and abs(ended - emptied) == 1 and not engine.pool.index


def test_a_worker_warms_up_while_nobody_asks(engine):
    """A worker warms up while nobody asks, and leaves that to what is asked."""
    with torch.inference_mode():
        alone, asked = WarmUp(engine), WarmUp(engine)
        alone.begin()
        asked.begin()
    due = len(alone.left)
    front = Front([Ping()])
    run(front, engine, alone)
    assert due == 2 and not alone.is_due and not front.events         # nobody hears of it
    loop = WorkerLoop(Front(asking("a")), engine, CONFIG, asked)
    loop.channel.receive = lambda wait, patience_s=None, receive=loop.channel.receive: receive(True)
    with torch.inference_mode():
        loop.turn()
    assert not asked.left


@torch.inference_mode()
def test_a_warm_up_waits_for_the_next_answer(engine, monkeypatch):
    """What makes only later answers faster is made once nobody has asked for some seconds; steps are run at once."""
    warm_up, asked = WarmUp(engine), []
    warm_up.left = [(1, 1)]
    monkeypatch.setattr(type(engine.answers), "may_be_faster", property(lambda answers: not asked[3:]))
    monkeypatch.setattr(engine.answers, "make_faster", lambda: asked.append("made"))
    worker = WorkerLoop(Front(), engine, CONFIG, warm_up)
    worker.idle_check.is_due = False       # it would come first

    def receive(wait, patience_s=None):
        asked.append((wait, patience_s))
        return [Ping()] if len(asked) == 2 else []

    worker.channel.receive = receive
    for _ in range(3):
        worker.turn()
    assert asked == [(False, None), (True, warm_up.REST_S), (True, warm_up.REST_S), "made"]


def test_ready_has_every_gauge_and_kernel_fault(engine):
    front = Front()
    WorkerLoop(front, engine, CONFIG).report_ready()
    [ready] = front.sent
    assert isinstance(ready, Ready) and ready.gauges["kv_pages_total"] == engine.pool.num_pages and ready.gauges["memory_used"] > 0


def test_a_message_that_no_front_sends_is_refused(engine):
    with pytest.raises(BadMessage, match="CacheEmptied"):
        WorkerLoop(Front([CacheEmptied(True)]), engine, CONFIG).run()


@pytest.mark.parametrize("turns", [([],) * 4, (asking("first"), asking("second"))], ids=["nobody asks", "somebody asks"])
def test_memory_that_only_loading_needed_is_returned_once(engine, monkeypatch, turns):
    """That is after the warm-up, or after the answers that came instead; it keeps nobody from the first answer."""
    given, warm_up = [], WarmUp(engine)
    with torch.inference_mode():
        warm_up.begin()
    front = Front(*turns)
    if turns[0]:        # the first messages are there before the warm-up goes on
        monkeypatch.setattr(front, "receive", lambda wait, patience_s=None, receive=front.receive: receive(wait or len(front.batches) == len(turns)))
    monkeypatch.setattr(loop, "give_memory_back", lambda: given.append((warm_up.is_due, len([*front.events]))))
    run(front, engine, warm_up)
    ends = len([event for _, event in front.events if isinstance(event, Ended)])
    assert ends == sum(map(bool, turns))
    [(still_due, events_before)] = given
    assert not still_due and bool(events_before) == bool(ends)
