"""The revision of a model's files for which requests are read."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.errors import Overloaded, without_folders

if TYPE_CHECKING:
    from chatlm.front.pool.supervisor import Supervisor


class ServedRevision:
    """The revision of a pool's files as requests see it. A request is read for one revision, and admitted
    only if that is still the current one: see FilesRevision."""

    LOOK_S = 0.5       # between two checks whether it can be loaded at all
    PATIENCE_S = 60.0  # how long a request waits for a new revision

    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor
        self.revision = supervisor.revision

    @property
    def number(self) -> int:
        return self.revision.number

    async def current(self):
        """Wait until the tokenizer belongs to the revision that the workers have or will read. Overloaded if
        that takes too long, or if no worker can read it."""
        supervisor = self.supervisor
        revision = self.revision
        may_be_old = supervisor.asleep and supervisor.prepared or revision.cannot_open
        if may_be_old and supervisor.workers and supervisor.workers[0].placement.renews:
            source = await asyncio.to_thread(supervisor.workers[0].placement.changed_source)
            if source:
                revision.renew(source)
                supervisor.load_for_request()
        deadline_s = time.monotonic() + self.PATIENCE_S
        while supervisor.became_ready.is_set() and not supervisor.prepared:
            if reason := revision.cannot_open or supervisor.why_unservable:
                raise Overloaded("the model's files have changed, and the new ones cannot be loaded: "
                                 f"{without_folders(reason)}", retry_after_s=10)
            if time.monotonic() > deadline_s:
                raise Overloaded("the model's files have changed, and it is still loading "
                                 f"({supervisor.loading[0]})", retry_after_s=10)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(revision.opened.wait(), min(self.LOOK_S, self.PATIENCE_S))
