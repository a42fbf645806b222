"""The check of an engine's counts in production: while nobody asks, a short part at a time."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from chatlm.common.log import log
from chatlm.common.messages.protocol import BROKEN_INVARIANTS
from chatlm.worker.engine.integrity import integrity_slices

if TYPE_CHECKING:
    from collections.abc import Iterator
    from chatlm.worker.engine.engine import Engine
    from chatlm.worker.engine.integrity import Slice


class IdleCheck:
    """Looks at the whole engine once after it has been loaded, and then every EVERY_S if it has done
    something.

    Whatever the engine does meanwhile ends a check, which then begins anew. A broken invariant is a bug of
    ours. It is counted once, and logged if it is the first of its kind; the engine goes on, since most leave
    answers as they are, and a restart would end all of them."""

    EVERY_S = 5.0
    MOST_KNOWN = 1000  # broken invariants that are told apart; later ones are not counted

    def __init__(self, engine: Engine):
        self.engine = engine
        self.slices: Iterator[Slice] | None = None  # of the check that goes on
        self.is_due = True   # has the engine done anything since the last one?
        self.due_s = 0.0     # when the next one may begin
        self.ended = 0       # checks that came to their end
        self.broken = Counter[str]()  # by what was looked at
        self.known = set[str]()       # those that were counted

    def gauges(self) -> dict[str, float]:
        return {"integrity_checks": self.ended,
                **{gauge: self.broken[name] for name, gauge in BROKEN_INVARIANTS.items()}}

    @property
    def wait_s(self) -> float | None:
        """How long until it has something to do; None: until the engine has done something."""
        return max(self.due_s - time.monotonic(), 0.0) if self.is_due else None

    def interrupt(self):
        """The engine may have changed: begin anew what goes on."""
        self.slices = None

    def note_work(self):
        """The engine has work to do."""
        self.interrupt()
        self.is_due = True

    def more(self) -> bool:
        """Look at the next part. True if it was the last one."""
        try:
            return self._more()
        except Exception as error:  # what it reads is broken; its text may be a client's
            self._note("answers", [f"the check failed with {type(error).__name__}"])
            return self._end()

    def _more(self) -> bool:
        if self.slices is None:
            self.slices = integrity_slices(self.engine)
        found = next(self.slices, None)
        if found is None:
            return self._end()
        self._note(*found)
        return False

    def _end(self) -> bool:
        self.slices = None
        self.is_due = False
        self.due_s = time.monotonic() + self.EVERY_S
        self.ended += 1
        return True

    def _note(self, name: str, faults: list[str]):
        room = self.MOST_KNOWN - len(self.known)
        new = [fault for fault in dict.fromkeys(faults) if fault not in self.known][:room]
        if new and not self.broken[name]:
            log.error("a broken invariant of the engine's %s, which is a bug of this program: %s. The engine "
                      "goes on; chat_server_broken_invariants_total in /metrics counts others", name, new[0])
        self.known.update(new)
        self.broken[name] += len(new)
