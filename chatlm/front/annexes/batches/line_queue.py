"""Which line of which batch begins next, so that nobody's lines hold up those of others.

A line that is under way has a slot. One that is refused (its key's budget is used up, a queue is full, memory
is short) gives its slot back and waits here; it costs nothing until it may try again.

- Each model has slots of its own: a model that never gets memory holds up its own lines alone.
- A client without a line under way on a model may begin one though all its slots are taken: the answers that
  have these may take an hour. NEWCOMERS may do so at a time.
- A free slot goes to the client with the fewest lines under way on that model, and among these to the one
  that has waited longest. Each client's batches take turns.
- A lane that was refused tries again with one line. Each line that ends lets one more begin.

So a client without a refusal begins at once, or waits at most until as many lines have ended as there are
other clients. In the pool its lines then take their share of the rows (`Dispatcher`)."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


NEWCOMERS = 8
LEAST_REST_S = 0.5    # after a refusal: what is refused at once must not be tried in a loop
LONGEST_REST_S = 30.0  # until it is tried again in any case: the clock may have been set


class WaitingLine(NamedTuple):
    """A request of a batch, before it is read."""

    number: int
    bytes: int


@dataclass(eq=False)
class Lane:
    """The lines of one batch that are for one model."""

    client: str
    batch: str  # its name
    model: str  # the name of the model; "": lines that are for none
    waiting: deque[WaitingLine] = field(default_factory=deque)
    running: int = 0           # lines under way
    window: float = math.inf   # how many may be under way: fewer after a refusal
    rests_until_s: float = 0.0
    turn: int = 0              # when a line of it last began; the lowest has waited longest

    def may_begin(self, now_s: float) -> bool:
        return bool(self.waiting) and self.running < self.window and self.rests_until_s <= now_s


class LineQueue:
    """The lines that wait, of all batches. `room` says how many lines of a model may be under way,
    `blocked_s` for how many seconds a client may begin nothing, and `clock` the time in seconds."""

    def __init__(self, room: Callable[[str], int], blocked_s: Callable[[str], float],
                 clock: Callable[[], float] = time.monotonic):
        self.room = room
        self.blocked_s = blocked_s
        self.clock = clock
        self.lanes: dict[str, dict[tuple[str, str], Lane]] = {}  # of each client, by batch and model
        self.running: Counter[tuple[str, str]] = Counter()       # lines under way, by model and client
        self.of_model: Counter[str] = Counter()                  # and by model
        self.turns = itertools.count(1)
        self.client_turn: dict[str, int] = {}                    # when a line of a client last began

    def add(self, client: str, batch: str, model: str, line: WaitingLine):
        """A line that may begin, after those of its batch that wait already."""
        self._lane(client, batch, model).waiting.append(line)

    def _lane(self, client: str, batch: str, model: str) -> Lane:
        lanes = self.lanes.setdefault(client, {})
        if (batch, model) not in lanes:  # as if it had just had its turn: who comes goes behind who waits
            self.client_turn.setdefault(client, next(self.turns))
            lanes[batch, model] = Lane(client, batch, model, turn=next(self.turns))
        return lanes[batch, model]

    def remove(self, client: str, batch: str):
        """Forget the lines of a batch that wait. Those under way still end with `end` or `put_back`."""
        lanes = self.lanes.get(client, {})
        for key in [key for key in lanes if key[0] == batch]:
            del lanes[key]
        if not lanes:
            self.lanes.pop(client, None)
            self.client_turn.pop(client, None)

    def take(self) -> tuple[Lane, WaitingLine] | None:
        """The line that begins next, which now has a slot; None if none may."""
        lane = min(self._eligible(), default=None, key=lambda lane: (
            self.running[lane.model, lane.client], self.client_turn[lane.client], lane.turn))
        if lane is None:
            return None
        lane.turn = self.client_turn[lane.client] = next(self.turns)
        self._count(lane, +1)
        return lane, lane.waiting.popleft()

    def _eligible(self) -> Iterator[Lane]:
        """The lanes that may begin a line now."""
        now_s = self.clock()
        room: dict[str, int] = {}
        for client, lanes in self.lanes.items():
            ready = [lane for lane in lanes.values() if lane.may_begin(now_s)]
            if not ready or self.blocked_s(client) > 0:
                continue
            for lane in ready:
                if lane.model not in room:
                    room[lane.model] = self.room(lane.model) - self.of_model[lane.model]
                newcomer = not self.running[lane.model, client]
                if room[lane.model] > -NEWCOMERS * newcomer:
                    yield lane

    def _count(self, lane: Lane, change: int):
        lane.running += change
        self.of_model[lane.model] += change
        self.running[lane.model, lane.client] += change
        if not self.of_model[lane.model]:
            del self.of_model[lane.model]
        if not self.running[lane.model, lane.client]:
            del self.running[lane.model, lane.client]

    def end(self, lane: Lane):
        """A line of the lane has its answer: there is room for one more, of this lane or of the one of its
        client that has waited longest."""
        self._count(lane, -1)
        lane.window += 1
        lane.rests_until_s = 0.0
        waiting = [other for other in self.lanes.get(lane.client, {}).values() if other.waiting]
        if waiting:
            min(waiting, key=lambda other: other.turn).rests_until_s = 0.0

    def put_back(self, lane: Lane, line: WaitingLine, rest_s: float):
        """A line was refused for `rest_s` seconds. It goes behind the others of its lane, which may not need
        what it lacks."""
        self._count(lane, -1)
        lane.waiting.append(line)
        lane.window = max(1, lane.running)
        lane.rests_until_s = self.clock() + min(max(rest_s, LEAST_REST_S), LONGEST_REST_S)

    def pause_s(self) -> float | None:
        """Seconds until a line that waits may begin though none ends before; None if there is none such."""
        now_s = self.clock()
        pauses: list[float] = []
        for client, lanes in self.lanes.items():
            waiting = [lane for lane in lanes.values() if lane.waiting]
            if not waiting:
                continue
            blocked_s = self.blocked_s(client)
            if blocked_s > 0:
                pauses.append(blocked_s)
            else:
                pauses += [lane.rests_until_s - now_s for lane in waiting if lane.rests_until_s > now_s]
        return min(max(min(pauses), LEAST_REST_S), LONGEST_REST_S) if pauses else None
