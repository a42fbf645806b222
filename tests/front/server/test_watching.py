"""The one generator around an answer: its watchers see each event, its failure and its end, once."""

import asyncio
import contextlib

import pytest

from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.messages.requests import Accepted, Piece
from answers import asked
from chatlm.front.api.answer_state import AnswerState
from chatlm.front.server.metrics import AnswerTimes, Metrics
from chatlm.front.server.watching import Watcher, watched

EVENTS = (Accepted(7), Piece((1,)), Piece((2,)))


class Witness(Watcher):
    """Writes down what it sees. refuses: the event that it cannot bear to have been read."""

    def __init__(self, seen, refuses=None):
        self.seen, self.refuses = seen, refuses

    def comes(self, event):
        self.seen.append(("comes", event))

    def was_read(self, event):
        self.seen.append(("was read", event))
        if event is self.refuses:
            raise Overloaded("no more")

    def fails(self, error):
        self.seen.append(("fails", str(error)))

    def ends(self):
        self.seen.append(("ends", None))


async def events_of(seen, *events, then=None):
    """Events, and then an error, or silence."""
    try:
        for event in events:
            yield event
        if isinstance(then, Exception):
            raise then
        if then:
            await then.wait()
    finally:
        seen.append(("work ends", None))


async def test_an_event_was_read_once_the_next_is_asked_for():
    seen = []
    stream = watched(events_of(seen, *EVENTS), AnswerState(asked()), [Witness(seen)])
    for count, event in enumerate(EVENTS):
        assert await anext(stream) is event and seen[-1] == ("comes", event)
        assert [what for what, _ in seen].count("was read") == count
    assert await anext(stream, None) is None
    assert seen[-3:] == [("was read", EVENTS[-1]), ("work ends", None), ("ends", None)]


async def test_a_reader_that_leaves_ends_the_work_and_is_no_failure():
    seen = []
    stream = watched(events_of(seen, *EVENTS), AnswerState(asked()), [Witness(seen)])
    for _ in range(2):
        await anext(stream)
    await stream.aclose()
    assert seen[-2:] == [("work ends", None), ("ends", None)]
    assert ("was read", EVENTS[1]) not in seen and "fails" not in dict(seen)


async def test_a_reader_that_is_cancelled_ends_the_work():
    seen = []
    stream = watched(events_of(seen, EVENTS[0], then=asyncio.Event()), AnswerState(asked()), [Witness(seen)])
    await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert seen[-2:] == [("work ends", None), ("ends", None)] and "fails" not in dict(seen)


class Broken(Witness):
    """Its end fails."""

    def ends(self):
        super().ends()
        raise OSError("broken watcher")


async def test_all_watchers_see_an_end_that_is_cancelled_too():
    """A server that stops may cancel whoever is ending an answer already, and one watcher may fail."""
    seen = []

    async def slow_to_end():
        try:
            yield EVENTS[0]
        finally:
            await asyncio.Event().wait()

    stream = watched(slow_to_end(), AnswerState(asked()), [Broken(seen), Witness(seen)])
    await anext(stream)
    closing = asyncio.ensure_future(stream.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(OSError, match="broken watcher"):
        await closing
    assert seen == [("comes", EVENTS[0])] * 2 + [("ends", None)] * 2


async def test_all_watchers_see_a_failure_and_the_end():
    seen, others = [], []
    stream = watched(events_of([], EVENTS[0], then=RequestError("broken")), AnswerState(asked()), [Witness(seen), Witness(others)])
    await anext(stream)
    with pytest.raises(RequestError, match="broken"):
        await anext(stream)
    assert seen == others and seen[-2:] == [("fails", "broken"), ("ends", None)]


async def test_what_a_watcher_refuses_ends_the_answer_and_is_no_failure_of_it():
    """So /metrics counts an answer that its budget ends as cancelled, as before."""
    seen, metrics = [], Metrics(None, None, None)
    watchers = [AnswerTimes(metrics, 1), Witness(seen, refuses=EVENTS[1])]
    stream = watched(events_of(seen, *EVENTS), AnswerState(asked()), watchers)
    with pytest.raises(Overloaded, match="no more"):
        async for _ in stream:
            pass
    assert seen[-2:] == [("work ends", None), ("ends", None)] and "fails" not in dict(seen)
    assert metrics.requests["cancelled"] == 1 and metrics.requests.total() == 1


@pytest.mark.parametrize("error, reason", [
    (Overloaded("full"), "refused"), (RequestError("bad"), "refused"), (OSError("ours"), "error"),
    (RequestError("stopped", status=499, code="cancelled"), "cancelled"), (None, "cancelled")])
async def test_the_reason_of_an_end_is_counted(error, reason):
    metrics = Metrics(None, None, None)
    stream = watched(events_of([], *EVENTS, then=error), AnswerState(asked()), [AnswerTimes(metrics, 1)])
    with contextlib.suppress(Exception):
        async for _ in stream:
            pass
    assert metrics.requests == dict.fromkeys(Metrics.REASONS, 0) | {reason: 1}
    assert metrics.ttft.counts and sum(metrics.itl.counts) == 1
