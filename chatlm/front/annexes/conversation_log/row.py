"""--log-conversations: the texts of conversations in the log."""

from __future__ import annotations

from chatlm.common.late import importer
from chatlm.front.annex import Annex

CONVERSATION_LOG = Annex(
    "conversation log", importer("chatlm.front.annexes.conversation_log.watcher:watching"),
    wanted=lambda front: front.settings.log_conversations,
    watch=lambda make, request, state: make(request, state))
