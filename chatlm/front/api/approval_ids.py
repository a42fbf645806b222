"""The ids of approval requests: which tool each is about, until when it can be answered, and a MAC, by which
a server knows its own."""

from __future__ import annotations

import hashlib
import hmac
import re

from chatlm.common.messages.tool_rounds import ApprovalMark

PREFIX = "mcpr_"
DIGEST_CHARACTERS = 16  # of the tool; at the end
UNIQUE_CHARACTERS = 16
MAC_CHARACTERS = 13
AN_APPROVAL_ID = re.compile(
    f"{PREFIX}([0-9a-f]{{{UNIQUE_CHARACTERS}}})([0-9a-f]{{8}})([0-9a-f]{{{MAC_CHARACTERS}}})"
    f"([0-9a-f]{{{DIGEST_CHARACTERS}}})")


def approval_id(mark: ApprovalMark, unique: str, digest: str) -> str:
    """The id of a request to approve of a call. unique: hexadecimal, of the item that asks. digest: of the
    tool."""
    unique = unique[:UNIQUE_CHARACTERS]
    until = f"{mark.until_s:08x}"
    return f"{PREFIX}{unique}{until}{mac_of(mark.key, unique + until + digest)}{digest}"


def mac_of(key: str, text: str) -> str:
    return hmac.new(bytes.fromhex(key), text.encode(), hashlib.sha256).hexdigest()[:MAC_CHARACTERS]


def digest_in(name: str) -> str:
    """The digest of the tool that an approval request is about."""
    return name[-DIGEST_CHARACTERS:]


def until_of(name: str, key: str) -> int | None:
    """Until when the request with this id can be answered, in seconds since 1970. None if it was not made
    with this key."""
    found = AN_APPROVAL_ID.fullmatch(name)
    if found is None:
        return None
    unique, until, mac, digest = found.groups()
    return int(until, 16) if hmac.compare_digest(mac, mac_of(key, unique + until + digest)) else None
