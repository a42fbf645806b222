"""Keeps a pool's workers and the front's tokenizer and template on one version of the model's files."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, EngineFailure, Overloaded, without_folders
from chatlm.common.hub.stamps import Changed, which_changed
from chatlm.common.log import log
from chatlm.front.pool.worker import State

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ModelCard
    from chatlm.common.messages.requests import ModelSource
    from chatlm.front.pool.supervisor import Supervisor
    from chatlm.front.pool.worker import Worker


class Version:
    """Files may change while a model is served. No answer ever continues with other weights, and no prompt is
    rendered for files other than those that the workers have. So before a worker reads the model, its files
    are compared with the version of the other workers. These keep the old version until no answer is left;
    then all workers and the front switch to the new one. If no worker has the old version any more, its
    answers end with an error.

    One of several models gets a new pool instead when its files change, since it may need more memory."""

    LOOK_S = 0.5       # between two checks whether other workers still need the old version
    PATIENCE_S = 60.0  # how long a request waits for a new version

    def __init__(self, supervisor: Supervisor):
        self.supervisor, self.number = supervisor, 0
        self.opened = asyncio.Event()  # set when there is a tokenizer for this version

    async def may_read(self, worker: Worker) -> bool:
        """Wait until a worker may read the current files. False if this pool may not serve them."""
        supervisor, waits, placement = self.supervisor, False, worker.placement
        if not placement.renews and placement.source and await asyncio.to_thread(placement.gone):
            supervisor.leave_out(worker, Changed(which_changed(placement.source)))
            return False
        while not supervisor.closing and (source := await asyncio.to_thread(placement.now)):
            holders = [other for other in supervisor.workers if other is not worker
                       and other.state in (State.LOADING, State.READY)]
            if not placement.renews:
                supervisor.leave_out(worker, Changed(which_changed(placement.source or source)))
                return False
            if not (holders and supervisor.dispatcher.jobs):
                self.renew(source)
                break
            if not waits:
                log.warning("%s waits: the model's files have changed, and the other workers keep the old "
                            "version until no answer is left", worker.where)
            waits = True
            await asyncio.sleep(self.LOOK_S)
        return True

    def renew(self, source: ModelSource | None):
        """Switch all workers and the front to the current files."""
        supervisor = self.supervisor
        log.warning("the model's files have changed; reading them again")
        self.number += 1
        self.opened.clear()
        supervisor.card, supervisor.prepared = replace(supervisor.card, kernels={}), False
        supervisor.cannot_open = ""
        supervisor.dispatcher.fail(
            EngineFailure("the model's files have changed since this answer began, and no worker has the old "
                          "version: ask again"), *supervisor.dispatcher.jobs.values())
        for worker in supervisor.workers:
            worker.placement.source = source
            if worker.state in (State.LOADING, State.READY):
                worker.become(State.UNLOADED)
                worker.kill()

    def refuse(self, worker: Worker):
        """A worker has read another version: the files changed meanwhile, or a Ray node has other files."""
        placement = worker.placement
        if not placement.renews and placement.source:
            self.supervisor.leave_out(worker, Changed(which_changed(placement.source)))
            worker.kill()
        elif self.supervisor.ready_workers:
            self.supervisor.leave_out(worker, ConfigError("its model files differ from those of the other "
                                                          "workers"))
            worker.kill()
        else:
            self.renew(None)

    async def current(self):
        """Wait until the tokenizer belongs to the version that the workers have or will read. Overloaded if
        that takes too long, or if no worker can read it."""
        supervisor = self.supervisor
        may_be_old = supervisor.asleep and supervisor.prepared or supervisor.cannot_open
        for worker in supervisor.workers[:1] if may_be_old else ():
            if worker.placement.renews and (source := await asyncio.to_thread(worker.placement.now)):
                self.renew(source)
                supervisor.load_for_request()
        deadline_s = time.monotonic() + self.PATIENCE_S
        while supervisor.became_ready.is_set() and not supervisor.prepared:
            if reason := supervisor.cannot_open or supervisor.in_vain:
                raise Overloaded("the model's files have changed, and the new ones cannot be loaded: "
                                 f"{without_folders(reason)}", retry_after_s=10)
            if time.monotonic() > deadline_s:
                raise Overloaded("the model's files have changed, and it is still loading "
                                 f"({supervisor.loading[0]})", retry_after_s=10)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.opened.wait(), min(self.LOOK_S, self.PATIENCE_S))


def of_other_files(card: ModelCard, known: ModelCard) -> bool:
    return (card.text, card.facts.digest) != (known.text, known.facts.digest)
