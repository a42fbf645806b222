"""The fields that bodies and queries of several lists have."""

from __future__ import annotations

from chatlm.front.api.field_types import INTEGER, METADATA, TEXT
from chatlm.front.api.fields import Field, FieldType

LABELS = Field("metadata", METADATA, "comes back in the answer")
# of queries
AFTER = Field("after", TEXT, "the id of the last row of the page before")
ORDER = Field("order", FieldType('"asc" or "desc"', {"enum": ["asc", "desc"]}),
              "by time; desc = newest first")
LIMIT = Field("limit", INTEGER, "rows of a page (20)", 1, 100)
