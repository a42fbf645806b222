"""Keeps a pool's workers and the front's tokenizer and template on one revision of the model's files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, EngineFailure
from chatlm.common.hub.stamps import Changed, which_changed
from chatlm.common.log import log
from chatlm.common.messages.protocol import ModelCard
from chatlm.common.messages.requests import TextSpec
from chatlm.front.pool.worker import WorkerState

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource
    from chatlm.front.pool.dispatcher import Dispatcher
    from chatlm.front.pool.worker import Worker


# stands for the card until a worker has said what model it has
NO_CARD = ModelCard(TextSpec("", b""), "loading", 0, (), {}, False)


class FilesRevision:
    """Which revision of the model's files a pool serves. Files may change at any time, but no answer ever
    continues with other weights, and no prompt is rendered for files that the workers do not have.

    So before a worker reads the model, its files are compared with the revision of the other workers. These
    keep the old revision until no answer is left. Then all workers and the front switch to the new one. If no
    worker has the old revision any more, its answers end with an error.

    With several models, a model whose files have changed gets a new pool instead, since it may need more
    memory."""

    LOOK_S = 0.5  # between two checks whether other workers still need the old revision

    def __init__(self, workers: Seq[Worker], dispatcher: Dispatcher):
        self.workers = workers
        self.dispatcher = dispatcher
        self.number = 0
        self.card = NO_CARD
        self.opened = asyncio.Event()  # set while there is a tokenizer for this revision
        self.cannot_open = ""          # why the workers' files give no tokenizer; "": they do
        self.closed = False            # True: no worker starts any more

    def note_card(self, card: ModelCard):
        """Note what the headers of the files say, or what a worker has read."""
        self.card = card

    def rename(self, name: str):
        self.card = replace(self.card, name=name)

    def note_opened(self):
        self.cannot_open = ""
        self.opened.set()

    def note_unusable(self, reason: str):
        """Its files give no tokenizer."""
        self.cannot_open = reason

    def close(self):
        self.closed = True

    async def may_read(self, worker: Worker) -> ConfigError | None:
        """Wait until a worker may read the current files. Returns why, if this pool may not serve them."""
        waits = False
        placement = worker.placement
        if not placement.renews and placement.source and await asyncio.to_thread(placement.is_gone):
            return Changed(which_changed(placement.source))
        while not self.closed:
            source = await asyncio.to_thread(placement.changed_source)
            if source is None:
                break
            if not placement.renews:
                return Changed(which_changed(placement.source or source))
            holders = [other for other in self.workers if other is not worker
                       and other.state in (WorkerState.LOADING, WorkerState.READY)]
            if not (holders and self.dispatcher.is_needed):
                self.renew(source)
                break
            if not waits:
                log.warning("%s waits: the model's files have changed, and the other workers keep the old "
                            "version until no answer is left", worker.where)
            waits = True
            await asyncio.sleep(self.LOOK_S)
        return None

    def renew(self, source: ModelSource | None):
        """Switch all workers and the front to the current files."""
        log.warning("the model's files have changed; reading them again")
        self.number += 1
        self.opened.clear()
        self.card = replace(self.card, kernels={})
        self.cannot_open = ""
        self.dispatcher.fail(
            EngineFailure("the model's files have changed since this answer began, and no worker has the old "
                          "version: ask again"), *self.dispatcher.jobs.values())
        for worker in self.workers:
            worker.placement.source = source
            if worker.state in (WorkerState.LOADING, WorkerState.READY):
                worker.become(WorkerState.UNLOADED)
                worker.kill()

    def refuse(self, worker: Worker) -> ConfigError | None:
        """A worker has read another revision: the files changed meanwhile, or a Ray node has other files.
        Returns why the worker is left out; None if all others switch to its revision."""
        placement = worker.placement
        if not placement.renews and placement.source:
            return Changed(which_changed(placement.source))
        if any(other.state is WorkerState.READY for other in self.workers):
            return ConfigError("its model files differ from those of the other workers")
        self.renew(None)
        return None


def has_other_files(card: ModelCard, known: ModelCard) -> bool:
    """Were two cards read from different files?"""
    return (card.text, card.facts.digest) != (known.text, known.facts.digest)
