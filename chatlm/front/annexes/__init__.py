"""The annexes of the front: what a server has beside its core. Each is the folder of its row; this table
alone imports rows, and nobody else anything of an annex."""

from __future__ import annotations

from typing import Any

from chatlm.front.annex import Annex
from chatlm.front.annexes.batches.row import BATCHES, FILES
from chatlm.front.annexes.chats.row import CHATS
from chatlm.front.annexes.compare.row import COMPARE
from chatlm.front.annexes.conversation_log.row import CONVERSATION_LOG
from chatlm.front.annexes.downloads.row import DOWNLOADS
from chatlm.front.annexes.exports.row import EXPORTS
from chatlm.front.annexes.kept.row import CONVERSATIONS, KEPT
from chatlm.front.annexes.knowledge.row import KNOWLEDGE
from chatlm.front.annexes.metrics.row import METRICS
from chatlm.front.annexes.runs.row import RUNS
from chatlm.front.annexes.tools.row import ROUNDS, TOOLS
from chatlm.front.annexes.usage.row import USAGE

# They start in this order, and are closed in it. The `around` of one is within those of the rows after it
ANNEXES: tuple[Annex[Any], ...] = (
    BATCHES, FILES, CHATS, KNOWLEDGE, DOWNLOADS, EXPORTS, METRICS, USAGE, CONVERSATION_LOG, COMPARE, RUNS,
    TOOLS, ROUNDS, KEPT, CONVERSATIONS)
