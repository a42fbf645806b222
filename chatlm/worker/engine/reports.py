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
    """The events of steps on their way to the front. Where steps are short, several share a message: on a
    machine with few processors each message takes time from the steps, in both processes.

    An answer's first piece and its end wait for nothing. Other pieces wait for at most `interval_s`, and only
    while nothing but single tokens is computed. Beside interactive answers the pieces of the background wait
    longer, and have no message sent for their sake."""

    GAUGES_S = 0.1     # between gauges while steps follow each other
    BESIDE_S = 0.25    # between pieces of the background, beside interactive answers
    MOST_KNOWN = 4096  # answers whose first piece was sent

    def __init__(self, channel: Channel, engine: Engine, gauges: Callable[[], dict], interval_s: float):
        self.channel = channel
        self.engine = engine
        self.gauges = gauges
        self.interval_s = interval_s
        self.events: list[tuple[str, WorkerEvent]] = []
        self.begun: set[str] = set()  # answers whose first piece was sent
        self.called_s = 0.0  # when `send` was last called,
        self.sent_s = 0.0    # when it last sent something,
        self.gauged_s = 0.0  # when that had gauges,
        self.beside_s = 0.0  # and when no piece of the background was held back

    def add(self, events: Iterable[tuple[str, WorkerEvent]]):
        self.events += events

    def send(self):
        """Send what is due. Called once in each step, while it is computed."""
        now_s = time.monotonic()
        running = self.engine.queue.running
        background = {sequence.work.id for sequence in running if sequence.work.background}
        beside = len(background) < len(running)  # interactive answers
        quick = now_s - self.called_s < self.interval_s
        self.called_s = now_s
        held: list[tuple[str, WorkerEvent]] = []
        news = self.events
        if beside and quick and now_s - self.beside_s < self.BESIDE_S:
            held = [(id, event) for id, event in news if id in background and self._continues(id, event)]
            news = [(id, event) for id, event in news
                    if not (id in background and self._continues(id, event))]
        else:
            self.beside_s = now_s
        if quick and now_s - self.sent_s < self.interval_s and self._may_wait(news, beside):
            return
        self.channel.send(Stepped(together(news), self._due_gauges(now_s)))
        if len(self.begun) > self.MOST_KNOWN or not self.engine.busy:
            self.begun.clear()
        self.begun |= {id for id, event in news if type(event) is Piece}
        self.events = held
        self.sent_s = now_s

    def _due_gauges(self, now_s: float) -> dict:
        """The gauges, if nothing is computed or they are old; else none."""
        if self.engine.busy and now_s - self.gauged_s <= self.GAUGES_S:
            return {}
        self.gauged_s = now_s
        return self.gauges()

    def _continues(self, id: str, event: WorkerEvent) -> bool:
        """Is it a piece of an answer that has begun, and no end?"""
        return type(event) is Piece and id in self.begun

    def _may_wait(self, news: list[tuple[str, WorkerEvent]], beside: bool) -> bool:
        """May these events wait for those of the next steps, which will soon come?

        Not while a prompt is queued or computed: its steps take long. Prompts of the background do not count
        `beside` interactive answers, since they are then computed in short pieces."""
        queue = self.engine.queue
        if not queue.running:
            return False
        for sequence in queue.waiting:
            if not (beside and sequence.work.background):
                return False
        for sequence in queue.running:
            if sequence.prefilling and not (beside and sequence.work.background):
                return False
        return all(self._continues(id, event) for id, event in news)


def together(events: list[tuple[str, WorkerEvent]]) -> list[tuple[str, WorkerEvent]]:
    """The same events with each answer's successive pieces as one.

    A piece without text, which a stop string may yet swallow, is not joined with a later one that has text:
    the front would show its log-probabilities."""
    joined: list[tuple[str, WorkerEvent]] = []
    places: dict[str, int] = {}  # of each answer's last event
    for id, event in events:
        place = places.get(id, len(joined))
        before = joined[place][1] if place < len(joined) else None
        if isinstance(before, Piece) and isinstance(event, Piece) and (event.deltas or not before.deltas):
            joined[place] = id, before._replace(
                tokens=before.tokens + event.tokens, deltas=with_deltas(before.deltas, event.deltas),
                logprobs=before.logprobs + event.logprobs, spent_s=event.spent_s)
        else:
            places[id] = len(joined)
            joined.append((id, event))
    return joined


def with_deltas(deltas: tuple[Delta, ...], more: tuple[Delta, ...]) -> tuple[Delta, ...]:
    """Both, with successive texts of the same kind in one delta."""
    joined = list(deltas)
    for delta in more:
        append_delta(joined, delta)
    return tuple(joined)
