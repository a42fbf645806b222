"""A body on its way: who sent it, and how far it has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Picture
    from chatlm.front.admission.admission import SharedSandbox
    from chatlm.front.admission.sandbox import Sandbox
    from chatlm.front.intake.envelope import Envelope


@dataclass(frozen=True)
class Caller:
    """Who sent a body, and to which route."""

    route: str             # its pattern; of a line of a batch its url
    client: str            # who takes turns
    owner: str             # of KV pages, and of grammars that were checked
    bound: Seq[str] = ()   # models that its API key is limited to; () = all


@dataclass
class Arrival:
    """A body that was opened, here or in a sandbox."""

    caller: Caller
    parts: Seq[bytes | bytearray]  # the body, and what was said before it: what a sandbox is sent
    envelope: Envelope
    number: int | None = None      # of the line of a batch that it is
    ticket: int = 0                # under which a sandbox may still have it; 0: it is here
    sandbox: Sandbox | SharedSandbox | None = None  # which one
    pictures: tuple[Picture, ...] = ()  # that were decoded
    files: Mapping[bytes, bytes] = field(default_factory=dict)  # of these, as they were sent, by digest

    @property
    def is_here(self) -> bool:
        """Is it small enough, without its pictures, to be read in this process?"""
        return self.envelope.fields is not None
