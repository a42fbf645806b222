"""The fields of bodies and queries of the routes that need --database."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from chatlm.common.errors import bad_value
from chatlm.front.api.field_types import INTEGER, METADATA, SWITCH, TEXT
from chatlm.front.api.fields import A_TEXT, Field, FieldType, list_schema, object_schema
from chatlm.front.api.knowledge_fields import KNOWLEDGE_FIELDS
from chatlm.front.api.spoken import paths_of_batches

ENDPOINTS = paths_of_batches()
WINDOWS = {"1h": 3600, "6h": 6 * 3600, "12h": 12 * 3600, "24h": 86400, "48h": 2 * 86400, "72h": 3 * 86400,
           "7d": 7 * 86400, "14d": 14 * 86400, "30d": 30 * 86400}  # completion_window -> seconds
LAST_SECONDS = Field("expires_after[seconds]", INTEGER, "for how long it is kept", 3600, 30 * 86400)
EXPIRY = FieldType(
    "an object of created_at and seconds, from 3600 to 2592000", object_schema(
        ["seconds"], anchor={"enum": ["created_at"]},
        seconds={"type": "integer", "minimum": 3600, "maximum": 30 * 86400}),
    lambda value: int(value["seconds"]))
MOST_ITEMS = 20
ITEMS = FieldType(f"a list of at most {MOST_ITEMS} items",
                  list_schema({"type": "object"}, maxItems=MOST_ITEMS))
SOME_ITEMS = Field("items", ITEMS, "messages, calls, their outputs and reasoning")
LABELS = Field("metadata", METADATA, "comes back in the answer")
STORE_FIELDS: dict[str, tuple[Field, ...]] = {
    "/v1/batches": (
        Field("input_file_id", TEXT, "an uploaded file", required=True),
        Field("endpoint", FieldType(" or ".join(ENDPOINTS), {"enum": list(ENDPOINTS)}),
              "the route of all its lines", required=True),
        Field("completion_window", FieldType(", ".join(WINDOWS), {"enum": list(WINDOWS)}),
              "how long it may take (24h); lines that are left then are errors"),
        LABELS,
        Field("output_expires_after", EXPIRY, "for how long its files are kept"),
    ),
    "/v1/conversations": (SOME_ITEMS, LABELS),
    "/v1/conversations/{id}": (LABELS._replace(required=True, cleared={}),),
    "/v1/conversations/{id}/items": (SOME_ITEMS._replace(required=True),),
    **KNOWLEDGE_FIELDS,
}


def as_place(value: Mapping) -> dict[str, str]:
    for name in PLACE_NAMES:
        if not re.fullmatch("[0-9a-f]{32}", value[name]):
            raise bad_value(f"chat.{name}", value[name], "32 hexadecimal digits")
    return {name: value[name] for name in PLACE_NAMES}


PLACE_NAMES = "id", "node", "parent"
# of a body whose answer goes into a chat
CHAT_PLACE = Field("chat", FieldType(
    "an object of id (a chat of yours on this server), node (the answer's id) and parent (its question), "
    "each 32 hexadecimal digits", object_schema(
        [*PLACE_NAMES], **dict.fromkeys(PLACE_NAMES, A_TEXT)), as_place),
    "the server writes the answer into this chat, and goes on when its client has left; needs stream: true")
# of queries
AFTER = Field("after", TEXT, "the id of the last row of the page before")
ORDER = Field("order", FieldType('"asc" or "desc"', {"enum": ["asc", "desc"]}),
              "by time; desc = newest first")
LIMIT = Field("limit", INTEGER, "rows of a page (20)", 1, 100)
FILES_LIMIT = Field("limit", INTEGER, "rows of a page (10,000)", 1, 10_000)
UPLOADED = "batch", "assistants", "user_data"  # purposes of files that clients upload
PURPOSES = *UPLOADED, "batch_output"
PURPOSE = Field("purpose", FieldType(", ".join(PURPOSES), {"enum": [*PURPOSES]}), "only these files")
STREAM = Field("stream", SWITCH, "true: the events of a response that runs in the background")
SINCE = Field("after", INTEGER, "the revision up to which you know all (0: nothing)", 0, 2**53)
WAIT = Field("wait", INTEGER, "seconds to wait for a change, if there is none (0)", 0, 60)
COUNT = Field("count", INTEGER, "how many chats you have", 0, math.inf)
WORDS = Field("q", TEXT, "words, all of which a chat must have")
STARTING_AFTER = Field("starting_after", INTEGER, "the sequence_number of an event: send those after it", 0,
                       math.inf)
