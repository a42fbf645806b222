"""Several answers to one request: each has a job, a row and its own noise; the reader has one queue of
events."""

import collections
import contextlib
import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest

from chatlm.common.errors import EngineFailure, Overloaded, RequestError
from chatlm.common.messages.protocol import WORKER_PIPE, NewAnswer
from chatlm.common.messages.requests import Failed, Finished, Piece, PromptScores, SamplingParams, TokenLogprob
from chatlm.common.messages.wire import HEADER, unpacked
from chatlm.front.pool.worker import Job
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.inbox import Inbox
from answers import asked, ending, said
from nightly import by_day
from pools import PlayedWorker, played_pool, work_of


class KeepingWorker(PlayedWorker):
    """Keeps what a worker's engine would get; the test says what the engine made of it."""

    taking = True

    def __init__(self, pool):
        super().__init__(pool)
        self.works, self.cancelled = {}, []
        keep = lambda work: self.works.__setitem__(work.id, work)       # noqa: E731
        self.inbox = Inbox(SimpleNamespace(add=keep, cancel=self.cancelled.append))

    def can_take(self, job):
        return self.taking

    def send(self, message):
        self.sent.append(type(message).__name__)
        frame = WORKER_PIPE.packed(message)
        kind, size = WORKER_PIPE.kind_and_size(frame[:HEADER.size])
        self.inbox.obey(unpacked(kind, frame[HEADER.size:]))

    def says(self, name, token, reason=None):
        piece = said(chr(token), tokens=(token,))
        failure = [(name, Failed("the model failed"))]
        self.pool.dispatcher.deliver(self, failure if reason == "error" else ending(name, piece, reason) if reason else [(name, piece)])


@pytest.fixture
async def pool():
    return played_pool(KeepingWorker, max_batch=8, max_concurrent_per_key=2)


def request(**more):
    return asked("a", **{"prompts": ((1, 2),), "sampling": SamplingParams(seed=5), "client": "me"} | more)


async def with_its_first_token(pool, **more):
    """The events of a request, read up to the first answer's first token."""
    events = pool.answer(request(**more))
    await anext(events)
    pool.workers[0].says("a", 65)
    await anext(events)
    return events


async def test_other_choices_start_after_the_prompt(pool):
    """The first one computes it, and is that of n=1."""
    (worker,) = pool.workers
    events = pool.answer(request(n=3))
    assert (await anext(events)).prompt_tokens == 2
    assert list(worker.works) == ["a"]
    worker.says("a", 65)
    assert (await anext(events)).choice == 0
    assert [work.sampling for work in worker.works.values()] == [SamplingParams(seed=5, choice=choice) for choice in range(3)]
    await events.aclose()
    assert sorted(worker.cancelled) == ["a", "a#1", "a#2"] and not pool.dispatcher.jobs and not worker.jobs
    alone = pool.answer(request())
    await anext(alone)
    assert worker.works["a"].sampling == SamplingParams(seed=5)
    await alone.aclose()


async def test_what_answers_share_crosses_the_pipe_once(pool):
    (worker,) = pool.workers
    bias = tuple((token, 1.0) for token in range(200))
    events = pool.answer(request(n=4, prompts=((1,) * 30, (2,) * 30), sampling=SamplingParams(seed=5, logit_bias=bias)))
    await anext(events)
    for name in ("a", "a#4"):
        worker.says(name, 65)
        await anext(events)
    await events.aclose()
    kinds = collections.Counter(worker.sent)
    assert (kinds["NewRequest"], kinds["NewPrompt"], kinds["NewAnswer"], kinds["EndOfRequest"]) == (1, 2, 8, 1)
    assert all(work.sampling.logit_bias == bias for work in worker.works.values())
    assert {work.prompt_ids for work in worker.works.values()} == {(1,) * 30, (2,) * 30}
    assert not worker.sent_prompts and not worker.inbox.requests


async def test_events_name_their_choice(pool):
    """They end with the last one."""
    (worker,) = pool.workers
    events = pool.answer(request(n=2, prompts=((1,), (2, 3))))
    await anext(events)
    assert list(worker.works) == ["a", "a#2"] and worker.works["a#2"].prompt_ids == (2, 3)
    for name, token in (("a", 65), ("a#2", 67)):
        worker.says(name, token, "stop")
    for _ in range(4):
        await anext(events)             # the reader has seen both first answers, so both others run
    for name, token in (("a#3", 68), ("a#1", 66)):
        worker.says(name, token, "stop")
    rest = [event async for event in events]
    assert [(type(event), event.choice) for event in rest] == [(Piece, 3), (Finished, 3), (Piece, 1), (Finished, 1)]
    assert rest[1].usage.prompt_tokens == 2 and rest[3].usage.prompt_tokens == 1
    assert {work.sampling.choice for name, work in worker.works.items() if name in ("a#1", "a#3")} == {1}


async def test_a_choice_that_fails_ends_all(pool):
    (worker,) = pool.workers
    events = await with_its_first_token(pool, n=3)
    pool.dispatcher.deliver(worker, [("a#1", Failed("the model failed"))])
    with pytest.raises(EngineFailure, match="the model failed"):
        async for _ in events:
            pass
    assert not pool.dispatcher.jobs and not worker.jobs and not len(pool.dispatcher.pending)


@pytest.mark.parametrize("changes", [dict(logprobs=1), dict(max_tokens=0, prompt_logprobs=1)])
async def test_an_answer_that_fails_is_an_error(pool, changes):
    """It is not taken for an end."""
    events = pool.answer(request(**changes))
    await anext(events)
    pool.dispatcher.deliver(pool.workers[0], [("a", Failed("the grammar became too large"))])
    with pytest.raises(EngineFailure, match="too large"):
        await anext(events)


async def test_the_request_s_id_cancels_all_its_choices(pool):
    """They count as one for the client."""
    (worker,) = pool.workers
    events = await with_its_first_token(pool, n=3)
    second = pool.answer(replace(request(), id="b"))
    await anext(second)
    with pytest.raises(Overloaded):
        await anext(pool.answer(replace(request(), id="c")))
    assert pool.cancel("a") and not pool.cancel("nobody")
    assert sorted(worker.cancelled) == ["a", "a#1", "a#2"]
    with pytest.raises(RequestError, match="cancelled"):
        async for _ in events:
            pass
    await second.aclose()


async def test_a_dead_worker_costs_no_answer_its_place(pool):
    (worker,) = pool.workers
    events = await with_its_first_token(pool, n=2)
    worker.says("a#1", 66)
    worker.taking = False
    pool.dispatcher.requeue(worker)
    worker.works, worker.taking = {}, True
    pool.dispatcher.dispatch()
    assert {name: (work.sampling.choice, work.resumed_ids) for name, work in worker.works.items()} == {"a": (0, (65,)), "a#1": (1, (66,))}
    await events.aclose()


async def test_max_tokens_0_wants_only_prompt_scores(pool):
    """A resumed answer does not score again."""
    (worker,) = pool.workers
    events = pool.answer(request(max_tokens=0, prompt_logprobs=1))
    await anext(events)
    assert (worker.works["a"].max_tokens, worker.works["a"].params.prompt_logprobs) == (1, 1)
    scores = (TokenLogprob(1, None), TokenLogprob(2, -1.0))
    for score in scores:            # as they are computed
        pool.dispatcher.deliver(worker, [("a", PromptScores((score,)))])
    assert [message.scored for message in pool.dispatcher.jobs["a"].messages(None) if isinstance(message, NewAnswer)] == [2]
    pool.dispatcher.deliver(worker, ending("a", said("A", tokens=(65,)), "length", "max_tokens"))
    *scored, last, done = [event async for event in events]
    assert scored == [PromptScores(scores[:1]), PromptScores(scores[1:])] and last == Piece()
    assert (done.usage.completion_tokens, done.reason, done.stop_reason) == (0, "length", "max_tokens")
    job = Job(request(prompt_logprobs=1), (1, 2), 5, None, 0.0, output_ids=[65])
    work = work_of(job)
    assert not Sequence(work, [*work.prompt_ids, *work.resumed_ids], 9).scoring


async def test_an_answer_that_fills_the_context_says_so(pool):
    events = pool.answer(request(prompts=((1,) * 60,), max_tokens=50))
    await anext(events)
    assert pool.workers[0].works["a"].max_tokens == 4
    for token in (65, 66, 67):
        pool.workers[0].says("a", token)
    pool.dispatcher.deliver(pool.workers[0], ending("a", said("D", tokens=(68,)), "length", "max_tokens"))
    assert [event async for event in events][-1].stop_reason == "context_length"


async def ended_as(pool, how):
    """An answer that ends, fails, is cancelled, or whose reader leaves after the first token."""
    (worker,) = pool.workers
    async with contextlib.aclosing(pool.answer(request(max_tokens=9))) as events:
        await anext(events)
        worker.says("a", 65, "stop" if how == "ends" else "error" if how == "fails" else None)
        if how == "is cancelled":
            pool.cancel("a")
        with contextlib.suppress(EngineFailure, RequestError):
            while how != "is left" and not isinstance(await anext(events), Finished):
                pass


@pytest.mark.parametrize("how", by_day(["ends", "fails", "is cancelled", "is left"], "fails", "is left"))
async def test_no_answer_stays_in_memory(pool, how):
    """Nothing does, whatever becomes of it."""
    await ended_as(pool, how)                   # caches that are filled once
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(50):
            await ended_as(pool, how)
        pool.workers[0].recent.clear(), pool.workers[0].works.clear(), pool.workers[0].cancelled.clear()
        assert len(gc.get_objects()) - before < 50 and gc.collect() == 0
    finally:
        gc.enable()
