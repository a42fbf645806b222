"""The fields of bodies and queries of chats on the server."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from chatlm.common.errors import bad_value
from chatlm.front.api.field_types import INTEGER, TEXT
from chatlm.front.api.fields import A_TEXT, Field, FieldType, object_schema


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
SINCE = Field("after", INTEGER, "the revision up to which you know all (0: nothing)", 0, 2**53)
WAIT = Field("wait", INTEGER, "seconds to wait for a change, if there is none (0)", 0, 60)
COUNT = Field("count", INTEGER, "how many chats you have", 0, math.inf)
WORDS = Field("q", TEXT, "words, all of which a chat must have")
