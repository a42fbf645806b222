"""Adapters that are being read, and the answers that wait for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, named
from chatlm.common.log import log
from chatlm.common.messages.protocol import AdapterLoaded

if TYPE_CHECKING:
    from chatlm.common.hub.stamps import Stamp
    from chatlm.worker.engine.engine import Engine
    from chatlm.worker.engine.sequence import Assignment


class LoadingAdapters:
    """A thread of the engine reads one adapter after another while steps continue. An answer that needs one
    of them waits here until it is read. Then it goes to the engine, even if reading has failed: the engine
    refuses it."""

    def __init__(self, engine: Engine, tell: Callable[[AdapterLoaded], None]):
        """tell: sends the front what came of an adapter."""
        self.engine = engine
        self.tell = tell
        self.folders: dict[str, str] = {}  # of the adapters being read, by id, in order
        self.dropped: set[str] = set()     # those to drop once they are read
        self.waiting: dict[str, list[Assignment]] = {}  # answers by the id of the adapter they need

    def load(self, adapter_id: str, folder: str, stamp: Stamp, digest: str):
        self.folders[adapter_id] = folder
        self.engine.read_adapter(adapter_id, Path(folder), stamp, digest)

    def drop(self, adapter_id: str):
        """Drop an adapter, at once or as soon as it is read."""
        if adapter_id in self.folders:
            self.dropped.add(adapter_id)
        else:
            self.engine.drop_adapter(adapter_id)

    def hold(self, work: Assignment) -> bool:
        """Keep an answer here if its adapter is being read; False if it may start now."""
        adapter_id = work.params.adapter
        if adapter_id not in self.folders:
            return False
        self.waiting.setdefault(adapter_id, []).append(work)
        return True

    def holds(self, answer_id: str) -> bool:
        return any(work.id == answer_id for works in self.waiting.values() for work in works)

    def cancel(self, answer_id: str) -> bool:
        """Forget a waiting answer; False if none with this id waits."""
        if not self.holds(answer_id):
            return False
        for works in self.waiting.values():
            works[:] = [work for work in works if work.id != answer_id]
        return True

    def finish(self):
        """Tell the front which adapters have been read since, and start the answers that waited for them."""
        for adapter_id in [*self.folders]:
            if not self.engine.has_read_adapter(adapter_id):
                break  # they are read one at a time
            folder = self.folders.pop(adapter_id)
            self.tell(self._outcome(adapter_id, folder))
            if adapter_id in self.dropped:
                self.dropped.remove(adapter_id)
                self.engine.drop_adapter(adapter_id)
            for work in self.waiting.pop(adapter_id, ()):
                self.engine.add(work)

    def _outcome(self, adapter_id: str, folder: str) -> AdapterLoaded:
        try:
            nbytes, digest = self.engine.accept_adapter(adapter_id)
        except ConfigError as error:
            return AdapterLoaded(adapter_id, str(error))
        except Exception as error:  # a file broken in an unexpected way affects no other answer
            log.exception("an adapter could not be loaded")
            return AdapterLoaded(adapter_id, f"{folder}: {named(error)}")
        return AdapterLoaded(adapter_id, "", nbytes, digest)
