"""--log-conversations: the texts of each conversation go to the log when its answer ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.front.server.watching import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.common.messages.requests import Request
    from chatlm.front.api.answer_state import AnswerState
    from chatlm.front.front import Front


class ConversationLog(Watcher):
    """Logs the texts of one answer when it ends. It keeps no tools of its request."""

    def __init__(self, request: Request, state: AnswerState):
        self.id = request.id
        self.turns = [[message.role, message.content] for message in request.messages or ()]
        self.state = state

    def ends(self):
        texts = ["".join([part.name + part.text for part in choice.parts if part.kind in ("text", "call")])
                 for choice in self.state.choices if choice.parts or choice.token_ids]
        turns = self.turns + [["assistant", text] for text in texts]
        log.info("conversation %s %s", self.id, dump(turns).decode(),
                 extra={"fields": {"id": self.id, "turns": turns}})


def watching(front: Front) -> Callable[[Request, AnswerState], Watcher]:
    """What makes the watcher of each answer. A conversation that is temporary is not logged."""
    return lambda request, state: (
        Watcher() if request.params.temporary else ConversationLog(request, state))
