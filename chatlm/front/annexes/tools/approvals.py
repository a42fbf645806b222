"""Approvals of calls: a call runs once at most, however often and by whatever path its approval is sent."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterator, Sequence as Seq
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.errors import ChatServerError, RequestError, shown
from chatlm.common.jsontext import whole_unicode
from chatlm.common.log import log
from chatlm.common.messages.tool_rounds import ApprovalMark
from chatlm.front.api.approval_ids import until_of
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.stored_lists import DAY_S, now_s
from chatlm.front.store import approvals
from chatlm.front.store.approvals import ROW_BYTES, Use

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.server.access import Owners
    from chatlm.front.store.store import Store
    from chatlm.front.tools.results import ToolResult

NOTED_S = DAY_S          # how long an approval request can be answered on a server without --database
MOST_NOTED = 100_000     # uses that such a server remembers
SHOWN_CHARACTERS = 1000  # of a result, to whoever sends its approval again


class KeptUses:
    """The uses of approvals in the store: they survive the server."""

    def __init__(self, store: Store):
        self.store = store

    async def secret(self) -> bytes:
        return await self.store.run(approvals.secret)

    def may_be_known(self, until_s: int) -> bool:
        return True

    async def find(self, client: str, owner: str, name: str) -> Use | None:
        return await self.store.run(partial(approvals.use_of, owner=owner, name=name), client=client)

    async def begin(self, client: str, owner: str, name: str, use: Use, until_s: int) -> Use | None:
        return await self.store.run(partial(
            approvals.begin, owner=owner, name=name, use=use, expires=until_s), ROW_BYTES, client)

    async def end(self, client: str, owner: str, name: str, use: Use):
        await self.store.run(partial(approvals.end, owner=owner, name=name, use=use), len(use.result), client)


class NotedUses:
    """The uses of approvals in memory. Those of an earlier process have another secret: they are unknown.

    Uses are forgotten once their approvals can be used no more. Beyond MOST_NOTED the older half is
    forgotten, and approvals that are as old are unknown from then on."""

    def __init__(self, most: int = MOST_NOTED):
        self.most = most
        # (owner, name) -> (until when the approval counts, its use)
        self.noted: dict[tuple[str, str], tuple[int, Use]] = {}
        self.unknown_until_s = 0  # an approval that counts until then may have been forgotten

    async def secret(self) -> bytes:
        return secrets.token_bytes(32)

    def may_be_known(self, until_s: int) -> bool:
        return until_s > self.unknown_until_s

    async def find(self, client: str, owner: str, name: str) -> Use | None:
        noted = self.noted.get((owner, name))
        return noted and noted[1]

    async def begin(self, client: str, owner: str, name: str, use: Use, until_s: int) -> Use | None:
        known = await self.find(client, owner, name)
        if known is None:
            self.noted[owner, name] = until_s, use
            self._forget(use.began)
        return known

    async def end(self, client: str, owner: str, name: str, use: Use):
        if (owner, name) in self.noted:
            self.noted[owner, name] = self.noted[owner, name][0], use

    def _forget(self, now: int):
        if len(self.noted) <= self.most:
            return
        newest_first = sorted(self.noted.items(), key=lambda item: item[1][0], reverse=True)
        kept = [item for item in newest_first[:self.most // 2] if item[1][0] >= now]
        left_out = newest_first[len(kept):]
        self.unknown_until_s = max(self.unknown_until_s, left_out[0][1][0])
        self.noted = {key: value for key, value in kept if self.may_be_known(value[0])}


class Approvals:
    """Which approvals can be used. Every path by which one may come leads here: an item of the input, an
    item_reference, previous_response_id, a conversation.

    An approval request that this server has asked is known by its id (`approval_id`). Its use is noted before
    the call begins; from then on the approval is used, whatever becomes of the call."""

    def __init__(self, store: Store | None, owners: Owners, settings: Settings):
        self.uses = KeptUses(store) if store else NotedUses()
        self.owners = owners
        self.has_keys = bool(settings.keys)
        self.lasts_s = settings.keep_days * DAY_S if store else NOTED_S
        self.secret = b""
        self.running: set[tuple[str, str]] = set()  # (owner, id) of those that running answers have

    async def open(self):
        self.secret = await self.uses.secret()

    def owner_of(self, client: str) -> str:
        """Who may use the approvals that a client is asked for; without keys, whoever knows one."""
        return self.owners.of_texts(client) if self.has_keys else ""

    def mark_for(self, client: str) -> ApprovalMark:
        """What the ids of a client's approval requests are made with now."""
        return ApprovalMark(key_of(self.secret, self.owner_of(client)), now_s() + self.lasts_s)

    @contextmanager
    def in_use(self, client: str, names: Seq[str]) -> Iterator[None]:
        """Have an answer make the calls of approvals. Raises RequestError 400 for one that this server did
        not ask for, and 409 for one that another running answer has."""
        owner = self.owner_of(client)
        mine = {(owner, name) for name in names}
        for name in names:
            self._until(owner, name)
        for _, name in mine & self.running:
            raise used_approval(name, "an answer that still runs makes this call; wait for its end, and "
                                      "continue from there")
        self.running |= mine
        try:
            yield
        finally:
            self.running -= mine

    def _until(self, owner: str, name: str) -> int:
        until_s = until_of(name, key_of(self.secret, owner))
        if until_s is None or until_s < time.time() or not self.uses.may_be_known(until_s):
            days = f"{self.lasts_s // DAY_S} days" if self.lasts_s > DAY_S else "day"
            restart = "" if isinstance(self.uses, KeptUses) else ", or has restarted since (--database)"
            raise RequestError(f"the approval request {shown(name)} is unknown: this server did not ask for "
                               f"it in the last {days}, or asked another key{restart}; let the model call "
                               "the tool again", code="unknown_approval", param="input")
        return until_s

    async def check_unused(self, client: str, names: Seq[str]):
        """Raise RequestError 409 if the call of one of these approvals has begun before."""
        owner = self.owner_of(client)
        for name in names:
            use = await self.uses.find(client, owner, name)
            if use:
                raise used_approval(name, why_used(use))

    async def begin(self, client: str, name: str, response: str) -> Use:
        """Note that the call of an approval begins now. response: the name of the response that makes it, if
        that will be kept. Raises RequestError 409 if it has begun before."""
        owner = self.owner_of(client)
        use = Use(now_s(), response)
        before = await self.uses.begin(client, owner, name, use, self._until(owner, name))
        if before:
            raise used_approval(name, why_used(before))
        return use

    async def end(self, client: str, name: str, use: Use, result: ToolResult):
        """Note the result of a call."""
        text = whole_unicode(result.text)[:SHOWN_CHARACTERS]
        ended = use._replace(ended=now_s(), failed=result.is_error, result=text)
        try:
            await self.uses.end(client, self.owner_of(client), name, ended)
        except ChatServerError as error:  # a full disk. The call was made, so its answer goes on
            log.warning("the result of an approved call is not kept: %s", error)


def key_of(secret: bytes, owner: str) -> str:
    """What the ids of an owner's approval requests are made with."""
    return hmac.new(secret, owner.encode(), hashlib.sha256).hexdigest()


def why_used(use: Use) -> str:
    """What is known of a call, in words."""
    began = f"its call began at {moment(use.began)}"
    if use.ended is None:
        return f"{began}, and nothing is known of its result: the answer or the server ended before it did"
    kept = f" (continue {use.response}, which has it)" if use.response else ""
    what = "failed" if use.failed else "has ended"
    return f"{began} and {what}{kept}; its result is: {use.result}"


def moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def used_approval(name: str, why: str) -> RequestError:
    REQUEST_LOG.get().headers["X-Should-Retry"] = "false"  # OpenAI's client tries again after a 409
    return RequestError(f"the approval request {shown(name)} is used already: {why}", status=409,
                        code="approval_used", param="input")
