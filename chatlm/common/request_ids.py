"""Ids of requests: those that clients may choose, and those that the server makes for parts of a request."""

from __future__ import annotations

import re

from chatlm.common.errors import RequestError, shown

MARK = "~"  # before the number of a part: no id of a client has it


def id_of_client(sent: str) -> str:
    """What the server takes of an id that a client sends; "" if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]", "", sent)[:64]


def id_of_part(request_id: str, number: int) -> str:
    """The id of a part of a request: a round of its answer, or one of the answers that it compares. No client
    can choose it."""
    return f"{request_id}{MARK}{number}"


def id_of_whole(part_id: str) -> str:
    """The id of the request that a part belongs to; a request's own id unchanged."""
    return part_id.partition(MARK)[0]


def is_unguessable(request_id: str) -> bool:
    """Was it made by the server, by chance? A client may have chosen such an id too, at its own risk."""
    return re.fullmatch("[0-9a-f]{32}", id_of_whole(request_id)) is not None


def duplicate_id(request_id: str) -> RequestError:
    return RequestError(f"a request with the id {shown(request_id)} is already running", status=409,
                        code="duplicate_id")
