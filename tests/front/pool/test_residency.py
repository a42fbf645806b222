"""Which of several models are in memory, with workers that the test plays and a clock of its own."""

import asyncio
import time

import pytest

from chatlm.front.pool import residency
from chatlm.front.pool.worker import WorkerState
from played_models import Clock, Models


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


async def test_models_load_as_far_as_bytes_suffice(clock):
    """They are loaded when asked for."""
    models = Models(clock, 10, {"a": 4, "b": 6, "c": 1})
    assert models.settle() == ""
    models.ask("a"), models.ask("b")
    assert models.settle() == "ab" and models.residency.used == 10
    models.load("a"), models.load("b")
    models.ask("c")
    assert models.settle() == "ab"      # both answer


async def test_the_longest_idle_model_leaves_first(clock):
    models = Models(clock, 10, {"a": 4, "b": 4, "c": 4})
    models.serve("a"), models.serve("b")
    models.settle(5)
    models.end("a", models.ask("a"))
    models.settle(6)
    models.ask("c")
    assert models.settle() == "ac"


async def test_an_idle_model_keeps_its_place_for_a_load(clock):
    """Once it has been idle for as long as its load took, it leaves for the next request at once."""
    models = Models(clock, 10, {"a": 8, "b": 8})
    models.serve("a", seconds=4)
    job = models.ask("b")
    assert models.settle(3.9) == "a" and not models.by_name["a"].leaving
    models.settle(0.2)
    assert models.settle() == "b"
    models.load("b", seconds=2)
    models.end("b", job)
    models.settle(2.1)
    models.ask("a")
    models.settle()
    assert models.settle() == "a"


async def test_a_request_in_a_pause_makes_it_stay(clock):
    """The idle time begins anew, and the turn ends as if it had never been idle."""
    models = Models(clock, 10, {"a": 8, "b": 8})
    models.serve("a", seconds=4)
    models.ask("b")
    models.settle(3)
    models.end("a", models.ask("a"))
    assert models.settle(3.9) == "a" and not models.by_name["a"].leaving
    models.end("a", models.ask("a"))
    assert models.settle(3.9) == "a" and not models.by_name["a"].leaving
    models.end("a", models.ask("a"))
    models.settle(1.3)      # 12.1 s since its load
    assert models.settle() == "b"


async def test_no_model_leaves_for_too_little_room(clock):
    """No model leaves that does not make enough room."""
    models = Models(clock, 10, {"a": 4, "b": 6, "c": 10})
    models.serve("a")
    running = models.answering("b", seconds=4)
    models.settle(9)
    models.ask("c")
    assert models.settle() == "ab"      # a's time is over, but a alone would not do
    models.end("b", running)
    assert models.settle() == "ab"      # b's is not
    models.settle(3)
    assert models.settle() == "c"


async def test_no_running_answer_is_cut_for_a_load(clock):
    """Two large models take turns."""
    models = Models(clock, 10, {"a": 8, "b": 8})
    job = models.answering("a", seconds=4)
    waiting = models.ask("b")
    assert models.settle(11) == "a" and not models.by_name["a"].leaving     # its 12 s are not over
    models.settle(1.1)
    assert models.by_name["a"].leaving and job.worker is not None           # it drains
    late = models.ask("a", "late")
    assert late.worker is None                                              # and takes nothing new
    assert models.settle(100) == "a" and job.worker is not None             # however long it takes
    models.end("a", job)
    models.settle()
    assert models.settle() == "b"
    models.load("b", seconds=4)
    assert waiting.worker is not None
    assert models.settle(11) == "b" and not models.by_name["b"].leaving
    models.settle(2)
    models.end("b", waiting)
    models.settle()
    assert models.settle() == "a"       # a's late request has its turn
    models.load("a")
    assert late.worker is not None


async def test_a_slow_load_keeps_its_place_as_long(clock):
    """A model that took long to load keeps its place for as long."""
    models = Models(clock, 10, {"a": 8, "b": 8})
    models.answering("a", seconds=60)
    models.ask("b")
    models.settle(179)
    assert not models.by_name["a"].leaving
    models.settle(1.5)
    assert models.by_name["a"].leaving


async def test_a_model_that_the_operator_loaded_stays_for_a_load(clock):
    """Nothing was asked of it."""
    models = Models(clock, 10, {"a": 8, "b": 8})
    models.by_name["a"].is_requested = True
    models.settle()
    models.load("a", seconds=2)
    models.ask("b")
    assert models.settle(1.9) == "a" and not models.by_name["a"].leaving
    models.settle(0.2)
    assert models.settle() == "b"


async def test_one_change_after_a_quiet_time_waits_for_nothing(clock):
    """As somebody does who asks another model now and then."""
    models = Models(clock, 10, {"a": 8, "b": 8})
    models.settle()
    for name in "abababab":
        models.settle(7)
        asked_s = clock.now
        models.ask(name)
        models.settle()
        models.settle()
        assert models.inside() == name and clock.now == asked_s
        models.load(name, 1.5)
        [job] = models.by_name[name].pool.dispatcher.jobs.values()
        models.end(name, job)


async def test_who_waits_longest_comes_first(clock):
    """Small ones do not take what it waits for."""
    models = Models(clock, 10, {"a": 8, "b": 9, "c": 2, "d": 1})
    job = models.answering("a")
    models.ask("b")
    models.settle(11)
    assert models.by_name["a"].leaving
    models.ask("c")
    assert models.settle(0.1) == "a"        # 2 are free, but b needs 9 of 10
    models.ask("d")
    assert models.settle(0.1) == "ad"       # 1 will be left over
    models.end("a", job)
    models.settle()
    assert models.settle() == "bd"


PAGED = {name: {"cache": 3} for name in "ab"}


async def test_idle_kv_pages_go_before_weights(clock):
    """They go alone where they suffice."""
    models = Models(clock, 16, {"a": 8, "b": 8, "c": 2}, **PAGED)
    a, b = models.by_name["a"], models.by_name["b"]
    models.serve("a"), models.serve("b")
    models.settle(12)
    models.ask("c")
    assert models.settle() == "ab" and a.emptying and not b.emptying    # a was not used for longest
    assert models.settle() == "ab" and models.residency.used == 16      # its worker has not answered
    models.emptied("a")
    assert models.settle() == "abc" and models.residency.used == 15
    models.load("c")
    job = models.ask("a")
    assert job.worker is None and a.waits       # it needs 3, of which 1 is free
    models.settle()
    models.emptied("b")
    models.settle()
    assert job.worker is not None and b.emptied and a.serves and models.inside() == "abc" and models.residency.used == 15
    models.end("a", job)
    models.ask("b")
    assert models.settle(0.9) == "abc" and a.serves     # it keeps its pages as long as a place
    models.settle(0.2)
    assert a.emptying


async def test_weights_go_where_kv_pages_do_not_suffice(clock):
    """Only those models lose theirs."""
    models = Models(clock, 16, {"a": 8, "b": 8, "c": 10, "d": 16}, **PAGED)
    models.serve("a"), models.serve("b")
    models.settle(12)
    job = models.ask("c")
    models.settle()
    models.emptied("b")
    assert models.settle() == "bc" and models.by_name["b"].held_bytes == 5     # a left whole
    models.load("c")
    models.end("c", job)
    models.ask("d")
    models.settle(12)
    assert models.settle() == "d" and not models.by_name["b"].emptied


async def test_a_model_that_keeps_its_pages_leaves_whole(clock):
    """Its worker keeps its KV pages, and is not asked again."""
    models = Models(clock, 10, {"a": 8, "c": 4}, a=PAGED["a"])
    for _ in range(2):
        models.serve("a")
        models.settle(12)
        job = models.ask("c")
        if models.by_name["a"].empties:
            models.settle()
            models.emptied("a", able=False)
        models.settle()
        assert models.settle() == "c" and not models.by_name["a"].empties
        models.load("c")
        models.end("c", job)
        models.settle(12)


async def test_a_request_waits_while_kv_pages_go(clock):
    """A worker that dies then changes nothing."""
    models = Models(clock, 10, {"a": 8, "c": 4}, a=PAGED["a"])
    a = models.by_name["a"]
    models.serve("a")
    models.settle(12)
    models.ask("c")
    models.settle()
    models.settle(1)
    job = models.ask("a")
    [worker] = a.pool.workers
    worker.become(WorkerState.DEAD)
    a.pool.dispatcher.requeue(worker)
    assert models.settle(1) == "ac" and job.worker is None and a.held_bytes == 5
    worker.become(WorkerState.LOADING)
    worker.become(WorkerState.READY)
    models.settle()     # it is asked anew, for it has taken pages to warm up
    models.emptied("a")
    assert models.settle() == "ac" and job.worker is None
    models.load("c")
    models.settle(12)   # c's time is over, but its request is not answered yet
    assert models.by_name["c"].leaving and job.worker is None


async def test_a_pinned_model_is_loaded_and_stays(clock):
    """It is loaded at once."""
    models = Models(clock, 10, {"a": 8, "b": 8, "c": 2}, a={"pinned": True})
    assert models.settle() == "a"
    models.load("a")
    models.ask("b"), models.ask("c")
    models.settle(100)
    assert models.inside() == "ac"


async def test_an_idle_model_leaves_after_its_own_time(clock):
    models = Models(clock, 10, {"a": 2, "b": 2}, a={"idle_s": 30})
    models.serve("a"), models.serve("b")
    assert models.settle(29) == "ab"
    models.settle(3)
    assert models.settle() == "b"


async def test_idle_time_begins_with_the_last_answer_s_end(clock):
    models = Models(clock, 10, {"a": 2, "b": 2}, a={"idle_s": 30})
    models.serve("a"), models.serve("b")
    job = models.ask("a")
    assert models.settle(100) == "ab"
    models.end("a", job)
    assert models.settle(29) == "ab"
    models.settle(3)
    assert models.settle() == "b"


async def test_a_model_that_dies_leaving_comes_back(clock):
    """It comes back for its answer."""
    models = Models(clock, 10, {"a": 8, "b": 8})
    job = models.answering("a")
    waiting = models.ask("b")
    models.settle(11)
    [worker] = models.by_name["a"].pool.workers
    worker.become(WorkerState.DEAD)
    models.by_name["a"].pool.dispatcher.requeue(worker)
    models.settle(0.1)
    assert models.settle() == "b"
    models.load("b")
    models.end("b", waiting)
    models.settle(11)
    assert models.settle() == "a"
    models.load("a")
    assert job.worker is not None and job.failovers == 1


async def test_a_request_after_lost_pages_is_seen_at_once(clock):
    """The clock stands still, so only what wakes the loop can."""
    models = Models(clock, 10, {"a": 8, "c": 4}, a=PAGED["a"])
    models.serve("a")
    models.settle(12)
    job = models.ask("c")
    models.settle()
    models.emptied("a")
    models.settle()
    models.load("c")
    models.end("c", job)
    models.by_name["c"].leave()
    models.settle()
    models.residency.changed.clear()
    assert models.inside() == "a" and models.by_name["a"].emptied
    turns = asyncio.create_task(models.residency.run())
    await asyncio.sleep(0)
    job = models.ask("a")
    for _ in range(20):
        await asyncio.sleep(0)
    turns.cancel()
    assert job.worker is not None


async def test_a_dead_worker_s_answer_is_seen_at_once(clock):
    """Who gives models their turns sees it."""
    models = Models(clock, 10, {"a": 8})
    models.answering("a")
    models.residency.changed.clear()
    [worker] = models.by_name["a"].pool.workers
    worker.become(WorkerState.DEAD)
    models.by_name["a"].pool.dispatcher.requeue(worker)
    assert models.residency.changed.is_set()


async def test_a_background_model_leaves_first(clock):
    """It computes for low priority only; an idle one that was asked stays."""
    models = Models(clock, 10, {"asked": 5, "scored": 5, "new": 5})
    models.serve("asked")
    models.serve("scored")
    job = models.ask("scored", low_priority=True)
    models.settle(12)
    models.ask("new")
    models.settle()
    assert models.by_name["scored"].leaving and not models.by_name["asked"].leaving and job.worker is not None


async def test_an_adapter_makes_others_leave(clock):
    """It comes to a loaded model; they leave until the bytes suffice."""
    models = Models(clock, 10, {"a": 5, "b": 5}, **PAGED)
    models.serve("a"), models.serve("b")
    models.settle(12)
    models.by_name["b"].own_size += 1
    assert models.residency.used == 11 and models.settle() == "ab" and models.by_name["a"].emptying
    models.emptied("a")
    assert models.settle() == "ab" and models.residency.used == 8
    job = models.ask("b")
    models.by_name["b"].own_size += 3
    models.settle()
    assert models.settle() == "b" and models.residency.used == 9 and job.worker is not None


def test_bytes_are_shown_in_units_that_fit():
    assert residency.shown_bytes(225_882_296) == "225.9 MB" and residency.shown_bytes(16_208_175_513) == "16.21 GB"
