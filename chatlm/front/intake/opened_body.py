"""A body on its way: who sent it, and how far it has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatlm.front.api.additions import NOTHING_ADDED, Added

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Picture
    from chatlm.front.admission.sandbox import Sandbox
    from chatlm.front.intake.envelope import Envelope


@dataclass(frozen=True)
class Caller:
    """Who sent a body, and to which route."""

    route: str            # the route's pattern; for a line of a batch, its url
    client: str           # takes turns with other clients
    owner: str            # owns KV pages and checked grammars
    bound: Seq[str] = ()  # the models that the API key is limited to; (): all
    texts: str = ""       # owns what it leaves in the store


@dataclass
class OpenedBody:
    """A body that has been opened, in this process or in a sandbox."""

    caller: Caller
    parts: Seq[bytes | bytearray]  # what a sandbox is sent: the body, then what open_body has besides
    envelope: Envelope
    added: Added = NOTHING_ADDED   # what it asks of annexes
    number: int | None = None      # its line number, if it is a line of a batch
    ticket: int = 0                # identifies the body that a sandbox keeps open; 0: it is open here
    sandbox: Sandbox | None = None      # the one that keeps it open
    pictures: tuple[Picture, ...] = ()  # the decoded ones
    files: Mapping[bytes, bytes] = field(default_factory=dict)  # digest -> the picture's file as it was sent

    @property
    def is_here(self) -> bool:
        """Is it small enough, without its pictures, to be read in this process?"""
        return self.envelope.fields is not None
