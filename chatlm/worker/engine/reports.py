"""What a worker tells the front of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from chatlm.common.messages.protocol import Stepped
from chatlm.common.messages.requests import Piece
from chatlm.worker.engine.answer import append_delta

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Delta, WorkerEvent
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.engine.engine import Engine


class Reports:
    """The events of steps on their way to the front. Where steps are short, those of several share a message:
    on a machine with few processors each message takes time from the steps, in both processes.

    An answer's first piece and its end wait for nothing; other pieces wait for at most `interval_s`, and
    only while nothing but single tokens is computed. Beside interactive answers those in the background wait
    longer, and make none of the others come sooner."""

    GAUGES_S = 0.1     # between gauges while steps follow each other
    BESIDE_S = 0.25    # between pieces of the background, beside interactive answers
    MOST_KNOWN = 4096  # answers whose first piece was sent

    def __init__(self, channel: Channel, engine: Engine, gauges: Callable[[], dict], interval_s: float):
        self.channel = channel
        self.engine = engine
        self.gauges = gauges
        self.interval_s = interval_s
        self.events: list[tuple[str, WorkerEvent]] = []
        self.begun: set[str] = set()
        self.sent_s = 0.0
        self.gauged_s = 0.0
        self.called_s = 0.0
        self.beside_s = 0.0

    def add(self, events: Iterable[tuple[str, WorkerEvent]]):
        self.events += events

    def send(self):
        """Send what is due. Called once in each step, while it is computed."""
        now_s = time.monotonic()
        running = self.engine.queue.running
        low = {sequence.work.id for sequence in running if sequence.work.background}
        beside = len(low) < len(running)  # interactive answers
        quick = now_s - self.called_s < self.interval_s
        self.called_s = now_s
        held: list[tuple[str, WorkerEvent]] = []
        news = self.events
        if beside and quick and now_s - self.beside_s < self.BESIDE_S:
            held = [(id, event) for id, event in news if id in low and self._goes_on(id, event)]
            news = [(id, event) for id, event in news if not (id in low and self._goes_on(id, event))]
        else:
            self.beside_s = now_s
        if quick and now_s - self.sent_s < self.interval_s and self._may_wait(news, beside):
            return
        shows = not self.engine.busy or now_s - self.gauged_s > self.GAUGES_S
        self.gauged_s = now_s if shows else self.gauged_s
        self.channel.send(Stepped(together(news), self.gauges() if shows else {}))
        if len(self.begun) > self.MOST_KNOWN or not self.engine.busy:
            self.begun.clear()
        self.begun |= {id for id, event in news if type(event) is Piece}
        self.events = held
        self.sent_s = now_s

    def _goes_on(self, id: str, event: WorkerEvent) -> bool:
        return type(event) is Piece and id in self.begun

    def _may_wait(self, news: list[tuple[str, WorkerEvent]], beside: bool) -> bool:
        """beside: interactive answers run beside others, whose prompts are computed in short pieces."""
        queue = self.engine.queue
        return bool(queue.running) and not any(
            not (beside and sequence.work.background) for sequence in queue.waiting) and not any(
            not (beside and sequence.work.background) and sequence.prefilling
            for sequence in queue.running) and all(self._goes_on(id, event) for id, event in news)


def together(events: list[tuple[str, WorkerEvent]]) -> list[tuple[str, WorkerEvent]]:
    """The same with each answer's successive pieces as one. A piece without text, which a stop string may yet
    swallow, is not put into one with text: the front would show its log-probabilities."""
    joined: list[tuple[str, WorkerEvent]] = []
    places: dict[str, int] = {}  # of each answer's last event
    for id, event in events:
        place = places.get(id)
        before = None if place is None else joined[place][1]
        if place is not None and isinstance(before, Piece) and isinstance(event, Piece) and (
                event.deltas or not before.deltas):
            joined[place] = id, before._replace(
                tokens=before.tokens + event.tokens, deltas=with_deltas(before.deltas, event.deltas),
                logprobs=before.logprobs + event.logprobs, spent_s=event.spent_s)
        else:
            places[id] = len(joined)
            joined.append((id, event))
    return joined


def with_deltas(deltas: tuple[Delta, ...], more: tuple[Delta, ...]) -> tuple[Delta, ...]:
    """Both, with text that continues the last one's in one delta."""
    joined = list(deltas)
    for delta in more:
        append_delta(joined, delta)
    return tuple(joined)
