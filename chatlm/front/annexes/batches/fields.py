"""The fields of bodies and queries of batches and files."""

from __future__ import annotations

from chatlm.front.api.field_types import INTEGER, TEXT
from chatlm.front.api.fields import Field, FieldType, object_schema
from chatlm.front.api.list_fields import LABELS
from chatlm.front.api.spoken import paths_of_batches

WINDOWS = {"1h": 3600, "6h": 6 * 3600, "12h": 12 * 3600, "24h": 86400, "48h": 2 * 86400, "72h": 3 * 86400,
           "7d": 7 * 86400, "14d": 14 * 86400, "30d": 30 * 86400}  # completion_window -> seconds
EXPIRY = FieldType(
    "an object of created_at and seconds, from 3600 to 2592000", object_schema(
        ["seconds"], anchor={"enum": ["created_at"]},
        seconds={"type": "integer", "minimum": 3600, "maximum": 30 * 86400}),
    lambda value: int(value["seconds"]))
NEW_BATCH = (
    Field("input_file_id", TEXT, "an uploaded file", required=True),
    Field("endpoint", FieldType(" or ".join(paths_of_batches()), {"enum": [*paths_of_batches()]}),
          "the route of all its lines", required=True),
    Field("completion_window", FieldType(", ".join(WINDOWS), {"enum": list(WINDOWS)}),
          "how long it may take (24h); lines that are left then are errors"),
    LABELS,
    Field("output_expires_after", EXPIRY, "for how long its files are kept"),
)
# of files
LAST_SECONDS = Field("expires_after[seconds]", INTEGER, "for how long it is kept", 3600, 30 * 86400)
FILES_LIMIT = Field("limit", INTEGER, "rows of a page (10,000)", 1, 10_000)
UPLOADED = "batch", "assistants", "user_data"  # purposes of files that clients upload
PURPOSES = *UPLOADED, "batch_output"
PURPOSE = Field("purpose", FieldType(", ".join(PURPOSES), {"enum": [*PURPOSES]}), "only these files")
