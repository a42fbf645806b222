"""The front's side of the process that searches vectors (chatlm/front/annexes/knowledge/vectors/)."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Sequence as Seq
from functools import partial
from pathlib import Path

from chatlm.common.client_words import shutting_down
from chatlm.common.errors import Overloaded
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import (
    PROCESS_COMMAND, exit_in_words, patient, process_environment, start_child)
from chatlm.common.program import why_outdated
from chatlm.front.admission.sandbox import next_message
from chatlm.front.aio import supervised
from chatlm.front.annexes.knowledge.vectors.messages import (
    VECTORS_PIPE, Scan, Scanned, ScanFailed, VectorsConfig)
from chatlm.front.turns import Turns

# of vectors that the process keeps; or a quarter of the memory that is free at its start
VECTORS_BYTES = 1 << 30

ROLE = "chatlm.front.annexes.knowledge.vectors.process:vectors_main"


class VectorScanner:
    """A process that keeps the vectors of stores in memory, and compares them with one vector at a time;
    clients take turns. It is started for the first scan, and ended when there was none for IDLE_S. It reads
    the database itself, so nobody has to tell it what changed.

    If the process ends during a scan, another one does that scan. If that ends too, the client is told to
    come back."""

    PATIENCE_S = 60.0  # longest wait for a reply: a store that does not fit in memory is read from the disk
    IDLE_S = 300.0
    PROCESSES = 2      # give up after so many processes that ended during a scan

    def __init__(self, database: Path, command: Seq[str] = PROCESS_COMMAND):
        self.database = database.absolute()
        self.command = command
        self.turns = Turns()
        self.process: subprocess.Popen[bytes] | None = None
        self.idle: asyncio.TimerHandle | None = None
        self.ending: asyncio.Task[None] | None = None
        self.closed = False

    async def nearest(self, scan: Scan, client: str = "") -> Scanned:
        """The passages nearest to a vector. Raises Overloaded if they cannot be had now."""
        give_back = await self.turns.take(client)
        work = asyncio.ensure_future(self._scanned(scan))  # goes on though its client leaves
        work.add_done_callback(partial(self._end_turn, give_back))
        return await asyncio.shield(work)

    def _end_turn(self, give_back: Callable[[], None], work: asyncio.Future[Scanned]):
        if not work.cancelled():
            work.exception()  # else it is logged if its client has left
        give_back()
        if self.idle:
            self.idle.cancel()
        if not self.closed:
            self.idle = asyncio.get_running_loop().call_later(self.IDLE_S, self._end_idle)

    def _end_idle(self):
        self.ending = asyncio.ensure_future(supervised(
            "ending the process that searches vectors", self._stop_between))

    async def _stop_between(self):
        """End the process between two scans."""
        give_back = await self.turns.take("")
        try:
            await self._stop()
        finally:
            give_back()

    async def _scanned(self, scan: Scan) -> Scanned:
        for left in reversed(range(self.PROCESSES)):
            try:
                reply = await asyncio.wait_for(self._ask(scan), patient(self.PATIENCE_S))
            except asyncio.TimeoutError:
                await self._stop()
                raise Overloaded("searching the vectors takes too long now", retry_after_s=10) from None
            except (asyncio.IncompleteReadError, ConnectionError, BadMessage) as error:
                ended = exit_in_words(await self._stop())
                if self.closed:
                    raise shutting_down() from None
                log.warning("the process that searches vectors ended (%s)%s", ended,
                            ", another one takes its scan" if left else "")
                if not left:
                    raise Overloaded("the process that searches vectors has ended; the server's log says how",
                                     retry_after_s=2) from error
            else:
                if isinstance(reply, Scanned):
                    return reply
                reason = reply.reason if isinstance(reply, ScanFailed) else type(reply).__name__
                log.error("searching vectors failed: %s", reason)
                raise Overloaded("the vectors cannot be searched now; the server's log says why",
                                 retry_after_s=5)
        raise AssertionError("the last process returns or raises")

    async def _ask(self, scan: Scan) -> object:
        if self.closed:
            raise shutting_down()
        if self.process is None:
            await self._start()
        self.writer.write(VECTORS_PIPE.packed(scan))
        await self.writer.drain()
        return await next_message(self.reader, VECTORS_PIPE)

    async def _start(self):
        """Start the process. Raises Overloaded if the program's files have changed."""
        if why := await asyncio.to_thread(why_outdated):
            raise Overloaded(why)
        kept_bytes = min(VECTORS_BYTES, await asyncio.to_thread(available_memory) // 4)
        if self.closed:
            raise shutting_down()
        self.process, ours = start_child(self.command, ROLE, process_environment(1))
        self.reader, self.writer = await asyncio.open_connection(sock=ours)
        self.writer.write(VECTORS_PIPE.packed(VectorsConfig(str(self.database), kept_bytes)))

    async def _stop(self) -> int | None:
        """Kill the process, if any; returns its exit status."""
        process = self.process
        self.process = None
        if process is None:
            return None
        self.writer.close()
        try:
            return await asyncio.to_thread(process.wait, 0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            return await asyncio.to_thread(process.wait)

    async def close(self):
        self.closed = True
        if self.idle:
            self.idle.cancel()
        await self._stop()
