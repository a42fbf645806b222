"""What a worker measures of itself, for the front's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.messages.protocol import NO_GAUGES
from chatlm.worker.device_use import DeviceUse

if TYPE_CHECKING:
    from chatlm.worker.engine.engine import Engine
    from chatlm.worker.engine.idle_check import IdleCheck


class Gauges:
    """Each part of the engine reports its own gauges, and so does the device; a gauge that none of them has
    is as in a worker that does not run."""

    def __init__(self, engine: Engine, idle_check: IdleCheck | None = None):
        """idle_check: None if nobody checks the engine."""
        self.engine = engine
        self.idle_check = idle_check
        self.device_use = DeviceUse(engine.device, engine.pids)

    def read(self) -> dict[str, float | None]:
        found = {**NO_GAUGES, **self.engine.gauges(), **self.device_use.gauges()}
        return found | self.idle_check.gauges() if self.idle_check else found
