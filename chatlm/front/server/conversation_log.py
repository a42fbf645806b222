"""--log-conversations: the texts of each conversation go to the log when its answer ends."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.common.messages.requests import Piece
from chatlm.front.server.watching import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.common.messages.requests import Event, Request
    from chatlm.front.front import Front


class ConversationLog(Watcher):
    """Collects the texts of one answer. It keeps no tools of its request."""

    def __init__(self, request: Request):
        self.id = request.id
        self.turns = [[message.role, message.content] for message in request.messages or ()]
        self.answers: dict[int, list[str]] = defaultdict(list)  # by choice

    def comes(self, event: Event):
        if isinstance(event, Piece):
            self.answers[event.choice] += [delta.name + delta.text for delta in event.deltas
                                           if delta.kind in ("text", "call")]

    def ends(self):
        turns = self.turns + [["assistant", "".join(texts)] for _, texts in sorted(self.answers.items())]
        log.info("conversation %s %s", self.id, dump(turns).decode(),
                 extra={"fields": {"id": self.id, "turns": turns}})


def watching(front: Front) -> Callable[[Request], Watcher]:
    """What makes the watcher of each answer. A conversation that is temporary is not logged."""
    return lambda request: Watcher() if request.params.temporary else ConversationLog(request)
