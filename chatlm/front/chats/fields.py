"""The query parameters of the routes of chats, and the schemas of their bodies."""

from __future__ import annotations

import math

from chatlm.front.api.field_types import INTEGER, TEXT
from chatlm.front.api.fields import Field

SINCE = Field("after", INTEGER, "the revision up to which you know all (0: nothing)", 0, 2**53)
WAIT = Field("wait", INTEGER, "seconds to wait for a change, if there is none (0)", 0, 60)
COUNT = Field("count", INTEGER, "how many chats you have", 0, math.inf)
QUESTION = Field("q", TEXT, "words, all of which a chat must have")
