"""What a worker measures of itself, for the front's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.messages.protocol import NO_GAUGES
from chatlm.worker.device_use import DeviceUse

if TYPE_CHECKING:
    from chatlm.worker.engine.engine import Engine


class Gauges:
    """Each part of the engine reports its own gauges, and so does the device; a gauge that none of them has
    is as in a worker that does not run."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.device_use = DeviceUse(engine.device, engine.pids)

    def read(self) -> dict[str, float | None]:
        return {**NO_GAUGES, **self.engine.gauges(), **self.device_use.gauges()}
