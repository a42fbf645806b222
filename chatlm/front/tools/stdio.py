"""A tool server that is a program: one JSON object per line on its stdin and stdout."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.common.processes.start import PROCESS_COMMAND, PROGRAM, exit_in_words
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.tools.config import ServerConfig
from chatlm.front.tools.foreign import Unreadable
from chatlm.front.tools.reading import LineSplitter, LineTooLong, LoopShare, MessageReader, slices
from chatlm.front.tools.transport import MESSAGE_BYTES, Hear, Message, ServerGone, packed, result_of

KEPT_VARIABLES = ("HOME", "PATH", "LANG", "USER", "TMPDIR")
# Which our own Python needs besides
PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")
STDERR_CHARACTERS = 2_000  # of the end of what the program wrote there, kept for the reason of a failure
CLOSE_S = 1.0              # a program that ends when its stdin ends has this long
END_S = 5.0                # and then its guard has this long to end it
READ_BYTES = 1 << 16


def variables(*names: str) -> dict[str, str]:
    """Those of our environment's variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


class StdioTransport:
    """A running program, with requests that wait for their responses."""

    leaving_cancels = False

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int, hear: Hear, label: str,
                 reader: MessageReader):
        """lifeline: our end of the guard's pipe; closing it ends the program."""
        self.process = process
        self.lifeline: int | None = lifeline
        self.hear = hear
        self.label = label
        self.reader = reader
        self.waiting: dict[int, asyncio.Future] = {}  # by the id of the request
        self.methods: dict[int, str] = {}             # of the same
        self.stderr = ""
        self.reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.draining = asyncio.ensure_future(supervised("reading a tool server's log", self._drain_stderr))
        self.reading = asyncio.ensure_future(supervised("reading from a tool server", self._read))
        self.writing = asyncio.Lock()

    @classmethod
    async def start(cls, config: ServerConfig, hear: Hear, reader: MessageReader) -> StdioTransport:
        """Start the program in its guard."""
        theirs, ours = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *PROCESS_COMMAND, "guard", str(theirs), pass_fds=[theirs, *PROGRAM], start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                env=variables(*KEPT_VARIABLES, *PYTHON_VARIABLES), limit=READ_BYTES)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        transport = cls(process, ours, hear, config.label, reader)
        env = variables(*KEPT_VARIABLES) | dict(config.env)  # never our keys and tokens
        wanted = {"command": config.command, "env": env, "cwd": config.cwd}
        try:
            await asyncio.to_thread(write_all, ours, dump(wanted) + b"\n")
        except BaseException:
            await transport.close()
            raise
        return transport

    def speak(self, version: str, is_modern: bool):
        """Messages on stdio are the same in all revisions."""

    async def request(self, message: Message, headers: Mapping[str, str]) -> Any:
        response = asyncio.get_running_loop().create_future()
        self.waiting[message["id"]] = response
        self.methods[message["id"]] = message["method"]
        try:
            await self.send(message)
            return result_of(await response)
        finally:
            del self.waiting[message["id"]]
            del self.methods[message["id"]]

    async def send(self, message: Message):
        if self.reason.done():
            raise ServerGone(self.reason.result())
        assert self.process.stdin
        try:
            async with self.writing:  # a program that does not read holds up only its own callers
                self.process.stdin.write(packed(message) + b"\n")
                await self.process.stdin.drain()
        except (OSError, RuntimeError):
            raise ServerGone(await self.ended()) from None

    async def ended(self) -> str:
        return await asyncio.shield(self.reason)

    async def _read(self):
        """Read messages until the program's output ends or breaks the rules, then fail all who wait."""
        assert self.process.stdout
        why = ""
        loop_share = LoopShare()
        lines = LineSplitter(MESSAGE_BYTES)
        try:
            while part := await self.process.stdout.read(READ_BYTES):
                for piece in slices(part):
                    await loop_share.spend(len(piece))
                    for line in lines.take(piece):
                        if line.strip():
                            await self._take(line, loop_share)
        except LineTooLong:
            why = f"it wrote a line of more than {MESSAGE_BYTES:,} bytes"
        except Unreadable as error:
            why = str(error)
        except OSError as error:
            why = f"its output can't be read: {error.strerror}"
        self._let_go()
        if not why:
            why = await self._exit_in_words()
        self._end(why)
        with suppress(OSError):  # what it still writes, until it has ended: else its pipe would stay open
            while part := await self.process.stdout.read(READ_BYTES):
                await loop_share.spend(len(part))

    async def _take(self, line: bytes, loop_share: LoopShare):
        messages = await self.reader.read(self.label, line, self.methods, loop_share)
        if not messages:
            log.debug("tool server %s wrote a line that is no message: %r", self.label, line[:200])
        for message in messages:
            if "method" in message:
                self.hear(message)
                continue
            response = self.waiting.get(message["id"])
            if response and not response.done():  # an answer that is late or comes twice is ignored
                response.set_result(message)

    async def _exit_in_words(self) -> str:
        """How the program ended, with the end of what it wrote to stderr."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(exited(self.process), END_S)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.draining), CLOSE_S)
        said = self.stderr.strip()
        status = exit_in_words(self.process.returncode)
        return f"it ended ({status}){': ' if said else ''}{said}"

    async def _drain_stderr(self):
        assert self.process.stderr
        loop_share = LoopShare()
        while part := await self.process.stderr.read(READ_BYTES):
            await loop_share.spend(len(part))
            text = part.decode("utf-8", "replace")
            self.stderr = (self.stderr + text)[-STDERR_CHARACTERS:]
            log.debug("tool server %s: %s", self.label, text.rstrip())

    def _end(self, why: str):
        if not self.reason.done():
            self.reason.set_result(why)
        for response in self.waiting.values():
            if not response.done():
                response.set_exception(ServerGone(why, unknown_outcome=True))

    def _let_go(self):
        """Close our end of the guard's pipe: the program ends, however stubborn it is."""
        if self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None

    async def close(self):
        """Close the program's stdin, wait a moment, and then have its guard end it."""
        self._end("it was stopped")
        if self.process.stdin:
            self.process.stdin.close()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(exited(self.process), CLOSE_S)
        self._let_go()
        try:
            await asyncio.wait_for(exited(self.process), END_S)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()  # Linux then kills the program, and what it has started is its parent's
        await end_tasks([self.reading, self.draining])


def write_all(descriptor: int, data: bytes):
    """Write to a pipe. An end that has gone is no error here: reading the program's output will show it."""
    with suppress(OSError):
        while data:
            data = data[os.write(descriptor, data):]


async def exited(process: asyncio.subprocess.Process):
    """Return once the process has ended. Process.wait() would also wait for its pipes, which a grandchild may
    keep open."""
    while process.returncode is None:
        await asyncio.sleep(0.02)
