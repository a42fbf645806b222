"""The front's side of a sandbox: a process with limits, for work that a client can make slow."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.client_words import shutting_down
from chatlm.common.errors import ConfigError, EngineFailure, Overloaded, RequestError
from chatlm.common.log import log
from chatlm.common.messages.protocol import (
    SANDBOX_MODELS, SANDBOX_OUT_OF_MEMORY, SANDBOX_PIPE, Begun, Body, Refused, SandboxConfig,
    SandboxResult, SandboxTask)
from chatlm.common.messages.wire import HEADER, BadMessage, unpacked
from chatlm.common.processes.start import exit_in_words, patient, start_child
from chatlm.common.program import why_outdated
from chatlm.front.turns import Turns

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Pipe


WRITE_BYTES = 1 << 18  # large data is written in pieces of this size, so that others get a turn


async def next_message(reader: asyncio.StreamReader, pipe: Pipe):
    """The next message from a pipe.

    It is read in parts, since readexactly would copy 20 MB twice in one go. A large message is decoded in a
    thread, so that others get a turn."""
    kind, size = pipe.kind_and_size(await reader.readexactly(HEADER.size))
    parts = []
    while size:
        part = await reader.read(min(size, WRITE_BYTES))
        if not part:
            raise asyncio.IncompleteReadError(b"", size)
        parts.append(part)
        size -= len(part)
    body = b"".join(parts)
    if len(body) <= WRITE_BYTES:
        return unpacked(kind, body)
    return await asyncio.to_thread(unpacked, kind, body)


class Sandbox:
    """A process for tasks that a client can make slow. It runs one task at a time, and clients take turns.

    A task that exceeds its processor time or memory is refused. That ends the process, and the next task gets
    a new one. If a process ends before it has begun a task, another one runs that task.

    Tasks with the same ticket are about the same body. The process keeps it open, so the body is sent with
    the first of these tasks, and again only if another task or another process came in between. The process
    checks the ticket itself. If the front were wrong about which body is open, the task would fail; it would
    never get another client's body."""

    PATIENCE_S = 60.0  # longest wait for a reply: a busy machine may give the task no processor
    EXIT_S = 2.0       # longest wait for a process that has closed its pipe to exit
    PROCESSES = 3      # give up after so many processes that ended before they had begun a task
    # Exit statuses of a process that exceeded a limit.
    EXCESS = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL)

    def __init__(self, command: Seq[str], single_use: bool = False):
        """single_use: each task gets a process of its own."""
        self.command = command
        self.turns = Turns()
        self.single_use = single_use
        self.process: subprocess.Popen | None = None
        self.starting = asyncio.Lock()
        self.configs: list[SandboxConfig] = []  # those that the process has, the most recently used last
        self.ticket = 0                         # of the body that the process has open; 0: none
        self.begun = False                      # has the process begun the current task?
        self.closed = False

    async def perform(self, config: SandboxConfig, client: str, name: str, *arguments,
                      bodies: Seq[bytes | bytearray] = (), ticket: int = 0):
        """Run a task and return its value. Raises RequestError if the task refuses or exceeds a limit.
        config: of the model that the task is for. ticket: of `bodies`, if other tasks are about them too."""
        give_back = await self.turns.take(client)
        task = SandboxTask(name, list(arguments), config.number, ticket=ticket)
        return await self.run_to_end(give_back, config, task, bodies)

    async def forget(self, ticket: int):
        """Have the process drop the body with this ticket, if it still has it: nobody will ask for it."""
        give_back = await self.turns.take("")
        if self.closed or self.process is None or ticket != self.ticket:
            give_back()
            return
        config = self.configs[-1]  # of the task that was about this body; any that the process has would do
        await self.run_to_end(give_back, config, SandboxTask("forget", [], config.number), ())

    async def run_to_end(self, give_back: Callable[[], None], config: SandboxConfig, task: SandboxTask,
                         bodies: Seq[bytes | bytearray]):
        """Run a task for whoever has taken the turn, and give the turn back."""
        # the exchange continues even if its client leaves
        exchange = asyncio.ensure_future(self._exchange(config, task, bodies))
        exchange.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # else it is logged
        exchange.add_done_callback(lambda ended: give_back())
        try:
            return await asyncio.shield(exchange)
        finally:
            del exchange  # it holds its exception, whose traceback holds this frame, and so the body

    async def start(self):
        """Start the process unless it is running. Its configuration follows with the first task. Raises
        Overloaded if the program's files have changed."""
        async with self.starting:  # whoever comes meanwhile waits until the process has its pipe
            if self.process is None:
                await self._start()

    async def _start(self):
        if why := await asyncio.to_thread(why_outdated):
            raise Overloaded(why)  # what it would import may not fit
        if self.closed:
            raise shutting_down()
        self.configs = []
        self.ticket = 0
        environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self.process, ours = start_child(self.command, "sandbox", os.environ | environment)
        self.reader, self.writer = await asyncio.open_connection(sock=ours)

    async def _exchange(self, config: SandboxConfig, task: SandboxTask, bodies: Seq[bytes | bytearray]):
        reply = await self._reply(config, task, bodies)
        if self.single_use:
            await self.stop()
        match reply:
            case SandboxResult(value):
                return value
            case Body(data):
                return data
            case Refused(message, _, ConfigError.type):
                raise ConfigError(message)
            case Refused(message, status, code, param, words):
                raise RequestError(message, status=status, code=code, param=param, words=words)
        raise BadMessage(f"unexpected message from a sandbox: {type(reply).__name__}")

    async def _reply(self, config: SandboxConfig, task: SandboxTask, bodies: Seq[bytes | bytearray]):
        """The reply to a task, from another process if one ends before it has begun the task."""
        for attempt in range(1, self.PROCESSES + 1):
            if self.closed:
                raise shutting_down()
            await self.start()
            try:
                return await asyncio.wait_for(self._ask(config, task, bodies), patient(self.PATIENCE_S))
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.TimeoutError, BadMessage) as error:
                code = await self.stop(0.0 if isinstance(error, asyncio.TimeoutError) else self.EXIT_S)
                if self.closed:  # that is what ended the process
                    raise shutting_down() from None
                if code == SANDBOX_OUT_OF_MEMORY or self.begun and code in self.EXCESS:
                    raise RequestError(
                        f"too complex: this takes more than {config.cpu_s:g} s of processor time "
                        f"or {config.memory >> 20} MiB", code="too_complex") from None
                if why := await asyncio.to_thread(why_outdated):  # it has imported half of another program
                    raise Overloaded(why) from error
                if self.begun or attempt == self.PROCESSES:
                    when = "" if self.begun else f" before it began, as {attempt - 1} before it"
                    raise EngineFailure(
                        f"the process that reads requests ended{when} (exit status {code})") from error
                log.warning("a sandbox ended before it began its task, which another one runs (%s)",
                            exit_in_words(code))
        raise AssertionError("the last attempt returns or raises")

    async def _ask(self, config: SandboxConfig, task: SandboxTask, bodies: Seq[bytes | bytearray]):
        """Send a task to the process; returns the reply."""
        self.begun = False
        if task.ticket and task.ticket == self.ticket:
            bodies = ()  # the process has them
        messages: list[Any] = [replace(task, bodies=len(bodies)), *map(Body, bodies)]
        if config not in self.configs:
            messages.insert(0, config)
        self.ticket = task.ticket
        others = [known for known in self.configs if known.number != config.number]
        self.configs = [*others, config][-SANDBOX_MODELS:]
        for message in messages:
            packed = memoryview(SANDBOX_PIPE.packed(message))
            for begin in range(0, len(packed), WRITE_BYTES):
                self.writer.write(packed[begin:begin + WRITE_BYTES])
                await self.writer.drain()
        first = await next_message(self.reader, SANDBOX_PIPE)
        if not isinstance(first, Begun):
            raise BadMessage(f"a sandbox said {type(first).__name__} before it had begun a task")
        self.begun = True
        return await next_message(self.reader, SANDBOX_PIPE)

    async def stop(self, patience_s: float = 0.0) -> int | None:
        """Kill the process, if any, unless it exits within patience_s; returns its exit status."""
        process = self.process
        self.process = None
        if process is None:
            return None
        if writer := getattr(self, "writer", None):  # one that is being started has none yet
            writer.close()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, patience_s)
        process.kill()
        return await asyncio.to_thread(process.wait)

    async def stop_idle(self):
        """Kill the process, if any, once its task is done."""
        give_back = await self.turns.take("")
        try:
            await self.stop()
        finally:
            give_back()

    async def close(self):
        self.closed = True
        await self.stop()


class Sandboxes:
    """Several processes for tasks of one kind. Each task gets one of its own, so a file that breaks a library
    affects no other task. Each client has one task at a time: its long one keeps no other client waiting."""

    def __init__(self, command: Seq[str], places: int):
        self.turns = Turns(places, most=1)
        self.all = [Sandbox(command, single_use=True) for _ in range(places)]
        self.idle = [*self.all]

    async def perform(self, config: SandboxConfig, client: str, name: str, *arguments,
                      bodies: Seq[bytes | bytearray] = ()):
        """Run a task, as `Sandbox.perform` does."""
        give_back = await self.turns.take(client)
        sandbox = self.idle.pop()

        def give_all_back():
            self.idle.append(sandbox)
            give_back()
        task = SandboxTask(name, [*arguments], config.number)
        return await sandbox.run_to_end(give_all_back, config, task, bodies)

    async def close(self):
        await asyncio.gather(*(sandbox.close() for sandbox in self.all))
