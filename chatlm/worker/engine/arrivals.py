"""Answers that are the first to need a part of the engine: they wait until it has been imported and made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Seq
from concurrent.futures import Future
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import error_text
from chatlm.common.log import log
from chatlm.common.messages.requests import Failed
from chatlm.worker.engine.drawn import failure_of, failure_text
from chatlm.worker.engine.part import EnginePart, LatePart

if TYPE_CHECKING:
    from chatlm.worker.engine.fair_thread import FairThread
    from chatlm.worker.engine.sequence import Sequence


class Arrival(NamedTuple):
    sequence: Sequence
    missing: Seq[LatePart[Any]]
    made: Future            # the thread has them, or has failed
    ready: Future           # the sequence may run


class Arrivals:
    """The sequences are queued, and sit out steps. A thread makes their parts; the parts see them in the
    thread that computes, like any others. Those that come while a part is being made share what comes of it:
    an import that takes long to fail is not tried again for each."""

    def __init__(self, thread: FairThread):
        self.thread = thread
        self.waiting: list[Arrival] = []

    def begin(self, sequence: Sequence, missing: Seq[LatePart[Any]]):
        made = self._under_way(missing) or self.thread.submit(sequence.work.params.client, make_all, missing)
        arrival = Arrival(sequence, missing, made, Future())
        sequence.output.preparing = arrival.ready
        self.waiting.append(arrival)

    def _under_way(self, missing: Seq[LatePart[Any]]) -> Future | None:
        """The making of the same parts that others wait for."""
        for arrival in self.waiting:
            if arrival.missing == missing and not arrival.made.done():
                return arrival.made
        return None

    @property
    def preparing(self) -> list[Future]:
        return [arrival.made for arrival in self.waiting]

    def arrived(self) -> Iterator[tuple[Sequence, Failed | None]]:
        """The sequences whose parts have been made, once each, with what ends those that cannot be computed.
        Those that have ended meanwhile are left out."""
        for arrival in [each for each in self.waiting if each.made.done()]:
            self.waiting.remove(arrival)
            if not arrival.sequence.finished:
                arrival.ready.set_result(None)
                yield arrival.sequence, self._failure(arrival)

    def _failure(self, arrival: Arrival) -> Failed | None:
        error = arrival.made.exception()
        if error:
            log.warning("an answer lacks a part of the engine: %s", error_text(error))
            return failure_of(error)
        fault = why_not([late.loaded for late in arrival.missing], arrival.sequence)
        return Failed(fault) if fault else None


def make_all(missing: Seq[LatePart[Any]]):
    for late in missing:
        late.get()


def why_not(parts: Seq[Any], sequence: Sequence) -> str:
    """Show a new sequence to the parts that have hooks. Why it cannot be computed; "" if it can. What a part
    raises fails only this answer."""
    for part in parts:
        try:
            if isinstance(part, EnginePart) and (fault := part.comes(sequence)):
                return fault
        except Exception as error:
            log.exception("a part of the engine failed")
            return failure_text(error)
    return ""
