"""Reads what tool servers write, so that none of them holds up the event loop.

A small message is read in the event loop, a large one in a sandbox, by the same function (`foreign`). Every
connection has its `LoopShare`: after so many bytes all others come first. `LineSplitter` cuts what comes in
parts into lines, and searches no byte twice."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence as Seq
from typing import Any

from chatlm.common.config import LIMITS, Settings
from chatlm.common.errors import ChatServerError, RequestError
from chatlm.common.messages.protocol import Known, SandboxConfig, SandboxResult
from chatlm.common.messages.requests import TextSpec
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.front.admission.sandbox import Sandbox
from chatlm.front.tools.foreign import Unreadable, messages_in
from chatlm.front.tools.transport import Message

TURN_BYTES = 1 << 16   # of one connection, before all others get a turn
SLICE_BYTES = 1 << 14  # that are cut into lines at once
MESSAGE_WORTH = 200    # bytes: what a message costs beside its length
REST_S = 0.002         # after a turn: who floods us gets no more than a share of the event loop
READ_S = 3.0           # processor time of a sandbox for one message
MEMORY_BYTES = 512 << 20  # of the sandbox
LINE_ENDS = re.compile(rb"\n")
UNREADABLE = "unreadable_message"
EVENT_LINE_ENDS = re.compile(rb"\r\n|\n|\r")


class LoopShare:
    """What one connection has cost the event loop since others last had their turn."""

    def __init__(self):
        self.spent = 0  # bytes

    async def spend(self, size: int):
        """Account for work on `size` bytes; if it was enough, others come first now."""
        self.spent += size
        if self.spent >= TURN_BYTES:
            self.spent = 0
            await asyncio.sleep(REST_S)


def slices(part: bytes) -> Iterator[bytes]:
    """A part of what came, in pieces that hold few lines even if all are empty."""
    return (part[begin:begin + SLICE_BYTES] for begin in range(0, len(part), SLICE_BYTES))


class LineTooLong(Exception):
    """A line has more bytes than allowed."""


class LineSplitter:
    """Cuts bytes that come in parts into lines."""

    def __init__(self, most: int, ends: re.Pattern[bytes] = LINE_ENDS):
        """most: bytes that a line may have."""
        self.most = most
        self.ends = ends
        self.begun: list[bytes] = []  # the parts of the line that has no end yet
        self.size = 0                 # of these
        self.swallows_newline = False  # a \r ended the last line, whose \n may follow

    def take(self, part: bytes) -> list[bytes]:
        """The lines that a part completes. Raises LineTooLong."""
        if self.swallows_newline and part[:1] == b"\n":
            part = part[1:]
        if part:
            self.swallows_newline = self.ends is EVENT_LINE_ENDS and part[-1:] == b"\r"
        *complete, rest = self.ends.split(part)
        if complete:
            complete[0] = b"".join((*self.begun, complete[0]))
            self.begun = []
            self.size = 0
        if rest:
            self.begun.append(rest)
            self.size += len(rest)
        if self.size > self.most or complete and max(map(len, complete)) > self.most:
            raise LineTooLong
        return complete

    @property
    def rest(self) -> bytes:
        """The line that has no end yet."""
        return b"".join(self.begun)


class MessageReader:
    """Reads the messages of all tool servers. They take turns in the sandbox."""

    def __init__(self, characters: int):
        """characters: that the text of a tool's result may have; what is above is cut there."""
        self.characters = characters
        self.config = SandboxConfig(
            Known(Settings(), None), TextSpec("", b""), 0, READ_S, MEMORY_BYTES, nice=5)
        self.sandbox = Sandbox(PROCESS_COMMAND)

    async def read(self, label: str, data: bytes | bytearray, methods: Mapping[int, str],
                   loop_share: LoopShare) -> list[Message]:
        """The messages in what a server has written, as `messages_in` reads them.

        Raises Unreadable if it can't be read within the limits."""
        if len(data) <= LIMITS.inline_bytes:
            await loop_share.spend(len(data) + MESSAGE_WORTH)
            return messages_in(data, methods, self.characters)
        try:
            read: Any = await self.perform(label, "read_message", [*methods.items()], self.characters,
                                           bodies=[data])
            return read
        except ChatServerError as error:
            is_ours = error.code == UNREADABLE
            why = str(error) if is_ours else "it wrote a message that takes too long to read"
            raise Unreadable(why) from None

    async def perform(self, client: str, name: str, *arguments, bodies: Seq[bytes | bytearray]):
        """Run a task about messages in the sandbox."""
        return await self.sandbox.perform(self.config, client, name, *arguments, bodies=bodies)

    async def close(self):
        await self.sandbox.close()


class MessageTasks:
    """The sandbox's task for messages."""

    def prepare(self, name: str, arguments: Seq):
        """Nothing has to be prepared."""

    def read_message(self, methods: list, characters: int, data: bytes) -> SandboxResult:
        try:
            return SandboxResult(messages_in(bytes(data), dict(methods), characters))
        except Unreadable as error:
            raise RequestError(str(error), code=UNREADABLE) from None
