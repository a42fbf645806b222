"""When a model was last used, which decides how long it stays in memory."""

from __future__ import annotations

import math
import time


class ModelUse:
    """When requests last used a model. Only its dispatcher and its supervisor note that."""

    LATELY_S = 60.0

    def __init__(self):
        self.last_s = time.monotonic()  # when a job last arrived or ended, or a worker became ready
        self.request_s = -math.inf      # when a request last arrived, other than with low priority

    def note(self):
        self.last_s = time.monotonic()

    def note_request(self):
        """A request has arrived, other than with low priority."""
        self.request_s = time.monotonic()

    @property
    def was_requested(self) -> bool:
        """Has a request arrived lately, other than with low priority?"""
        return time.monotonic() - self.request_s < self.LATELY_S

    def succeed(self, other: ModelUse):
        """Take over from another model: its requests will be for this one from now on."""
        self.request_s = other.request_s
