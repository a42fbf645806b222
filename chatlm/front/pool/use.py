"""When a model was last used, which decides how long it stays in memory."""

from __future__ import annotations

import math
import time


class ModelUse:
    """When requests last used a model; only its dispatcher and its supervisor note that."""

    LATELY_S = 60.0

    def __init__(self):
        self.last_s = time.monotonic()  # when a job last arrived or ended, or a worker became ready
        self.asked_s = -math.inf        # when a request last arrived, other than with low priority

    def note(self):
        self.last_s = time.monotonic()

    def note_asked(self):
        """A request has arrived, other than with low priority."""
        self.asked_s = time.monotonic()

    @property
    def was_asked(self) -> bool:
        """Has a request arrived lately, other than with low priority?"""
        return time.monotonic() - self.asked_s < self.LATELY_S

    def succeed(self, other: ModelUse):
        """Those who have asked for another model ask for this one from now on."""
        self.asked_s = other.asked_s
