"""Threads that read the database beside the store's, for what may read long.

Clients take turns, and one client never has all of the threads. A reading has a time limit, and ends when its
client leaves; its thread is free for others when it has ended."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from chatlm.common.errors import Overloaded
from chatlm.common.log import log
from chatlm.front.held import MeasuredThreads
from chatlm.front.turns import Turns

T = TypeVar("T")
BUSY_S = 5.0   # how long another program may hold the database
STEPS = 1000   # of SQLite's machine, between two looks at the time


class TooLong(Overloaded):
    """A reading has taken all the time that it may."""


class Reading:
    """What is read in one transaction, for a limited time. connection: it only reads."""

    connection: sqlite3.Connection

    def __init__(self, until_s: float):
        self.until_s = until_s
        self.is_unwanted = False  # its client has left

    def is_over(self) -> bool:
        return self.is_unwanted or time.monotonic() > self.until_s

    def check(self):
        """Raises TooLong if its time is over. For loops that do not ask the database."""
        if self.is_over():
            raise TooLong("the server's database takes too long to be searched now", retry_after_s=10)


class Readers:
    """`threads` threads that read one database."""

    def __init__(self, database: Path, name: str, threads: int = 2):
        self.database = database.absolute()
        self.turns = Turns(threads)
        self.pool = MeasuredThreads(threads, name)
        self.running = set[Reading]()

    async def run(self, work: Callable[[Reading], T], client: str, seconds: float) -> T:
        """What `work` reads, in the turn of its client. Raises TooLong if that takes more than so many
        seconds, Overloaded if the database cannot be read now."""
        give_back = await self.turns.take(client)
        reading = Reading(time.monotonic() + seconds)
        self.running.add(reading)
        answer = asyncio.get_running_loop().run_in_executor(self.pool, self._read, reading, work)
        answer.add_done_callback(lambda ended: give_back())
        answer.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # else it is logged
        answer.add_done_callback(lambda ended: self.running.discard(reading))
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            reading.is_unwanted = True
            raise

    def _read(self, reading: Reading, work: Callable[[Reading], T]) -> T:
        uri = f"file:{quote(str(self.database))}?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)) as connection:
                reading.connection = connection
                connection.set_progress_handler(reading.is_over, STEPS)
                connection.execute("BEGIN")
                return work(reading)
        except sqlite3.OperationalError as error:
            if str(error) == "interrupted":
                reading.check()
            log.error("--database %s: it cannot be read: %s", self.database, error)
            raise Overloaded("the server's database cannot be searched now; its log says why",
                             retry_after_s=10) from error

    def close(self):
        """End what is read."""
        for reading in self.running:
            reading.is_unwanted = True
        self.pool.shutdown(wait=False, cancel_futures=True)
