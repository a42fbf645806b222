"""The fields of bodies and queries of kept responses and conversations."""

from __future__ import annotations

import math

from chatlm.front.api.field_types import INTEGER, SWITCH
from chatlm.front.api.fields import Field, FieldType, list_schema
from chatlm.front.api.list_fields import LABELS

MOST_ITEMS = 20
ITEMS = FieldType(f"a list of at most {MOST_ITEMS} items",
                  list_schema({"type": "object"}, maxItems=MOST_ITEMS))
SOME_ITEMS = Field("items", ITEMS, "messages, calls, their outputs and reasoning")
CONVERSATION = (SOME_ITEMS, LABELS)
CHANGES = (LABELS._replace(required=True, cleared={}),)
MORE_ITEMS = (SOME_ITEMS._replace(required=True),)
# of queries
STREAM = Field("stream", SWITCH, "true: the events of a response that runs in the background")
STARTING_AFTER = Field("starting_after", INTEGER, "the sequence_number of an event: send those after it", 0,
                       math.inf)
