"""The one generator around an answer: here its events become its state, and whoever counts, charges, logs or
limits it watches them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence as Seq
from contextlib import ExitStack
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import PartSays

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Event
    from chatlm.front.api.answer_state import AnswerState


class Watcher:
    """Sees one answer pass, by four hooks that do nothing here."""

    def comes(self, event: Event):
        """The reader is about to get an event; or a part of the worker's engine says something (PartSays)."""

    def was_read(self, event: Event):
        """The reader has sent an event: it asks for the next one. What this raises ends the answer."""

    def fails(self, error: Exception):
        """The reader is about to get an error instead of an event."""

    def ends(self):
        """It has ended, well or not, or its reader has left. Its work has ended too."""


async def watched(events: AsyncGenerator[Event, None], state: AnswerState,
                  watchers: Seq[Watcher] = ()) -> AsyncGenerator[Event, None]:
    """Pass an answer's events on, after each was folded into its state and shown to the watchers, in their
    order. What parts of the worker's engine say is for the watchers alone. Closing it closes the events."""
    fold = state.fold
    try:
        while True:
            try:
                event = await anext(events)
            except StopAsyncIteration:
                return
            except Exception as error:
                for watcher in watchers:
                    watcher.fails(error)
                raise
            fold(event)
            for watcher in watchers:
                watcher.comes(event)
            if isinstance(event, PartSays):
                continue
            yield event
            for watcher in watchers:
                watcher.was_read(event)
    finally:
        with ExitStack() as all_end:  # whatever is raised or cancelled meanwhile
            for watcher in reversed(watchers):
                all_end.callback(watcher.ends)
            await events.aclose()
