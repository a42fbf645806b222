"""Finds out what a model is and needs, in a process that reads the headers of its files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.memory import available_memory, own_bytes
from chatlm.common.messages.protocol import (
    SURVEY_PIPE, Crashed, Loading, SurveyConfig, Surveyed, Unusable)
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import (
    exit_in_words, patient, process_environment, start_child, threads_per_worker)
from chatlm.front.admission.sandbox import next_message

if TYPE_CHECKING:
    import subprocess


class TooMuchMemory(Exception):
    """The process takes more memory than the headers of a model need."""


class Survey:
    """One process that surveys models, one after another. It is started for the first one, and again if a
    model has crashed it.

    Each model has a limit of time and of memory. What exceeds one is refused with the process, so that the
    next model is read by another: a file may ask for any amount of either. Until the survey is closed, the
    time that was lost on such models is taken from the later ones, so that many do not hold up a start."""

    # of one model; one with a tekken.json of 131,072 tokens takes 1.6 s and 0.2 GB
    PATIENCE_S = 60.0
    LEAST_S = 5.0
    MOST_BYTES = 4 << 30   # or half of what is free, but not less than
    LEAST_BYTES = 1 << 30
    LOOK_S = 0.05          # between two looks at its memory

    def __init__(self, command: Seq[str]):
        self.command = command
        self.turn = asyncio.Lock()
        self.process: subprocess.Popen | None = None
        self.lost_s = 0.0  # on models that took too long

    @property
    def patience_s(self) -> float:
        """The limit of time of the next model."""
        return min(self.PATIENCE_S, max(self.PATIENCE_S - self.lost_s, self.LEAST_S))

    async def of(self, config: SurveyConfig) -> Surveyed:
        """Survey a model. Raises ConfigError if it cannot be served."""
        config = replace(config, settings=replace(config.settings, keys=(), api_key=()))
        source = config.source
        async with self.turn:
            limit_s = self.patience_s
            try:
                message = await asyncio.wait_for(self._within_memory(config), patient(limit_s))
            except asyncio.CancelledError:  # an answer that nobody reads must not be the next model's
                await self._end()
                raise
            except TooMuchMemory as error:
                await self._end()
                raise ConfigError(f"{source.path}: {error}") from None
            except asyncio.TimeoutError:
                await self._end()
                self.lost_s += limit_s
                raise ConfigError(f"{source.path}: reading its headers takes too long: more than "
                                  f"{limit_s:g} s") from None
            except (asyncio.IncompleteReadError, ConnectionError, BadMessage):
                status = await self._end()
                raise ConfigError(
                    f"{source.path}: reading its headers ended with {exit_in_words(status)}") from None
        match message:
            case Surveyed():
                return message
            case Unusable(text):
                raise ConfigError(text)
            case Crashed(error):
                raise ConfigError(f"{source.path}: {error}")
        raise ConfigError(f"{source.path}: unexpected message from the survey: {type(message).__name__}")

    async def _within_memory(self, config: SurveyConfig):
        """`_ask`, while somebody looks at the memory of the process. One library call may take all of it, and
        would let no thread of the process itself look."""
        most = max(self.LEAST_BYTES, min(self.MOST_BYTES, available_memory() // 2))
        asking = asyncio.ensure_future(self._ask(config))
        try:
            while not (await asyncio.wait([asking], timeout=self.LOOK_S))[0]:
                if self.process and own_bytes(self.process.pid) > most:
                    raise TooMuchMemory(f"reading its headers takes more than {most >> 20:,} MiB of memory")
            return asking.result()
        finally:
            asking.cancel()

    async def _ask(self, config: SurveyConfig):
        if self.process is None:
            environment = process_environment(threads_per_worker(1))
            self.process, ours = start_child(self.command, "survey", environment)
            self.reader, self.writer = await asyncio.open_connection(sock=ours)
        self.writer.write(SURVEY_PIPE.packed(config))
        while True:
            message = await next_message(self.reader, SURVEY_PIPE)
            if not isinstance(message, Loading):
                return message

    async def _end(self) -> int | None:
        process = self.process
        self.process = None
        if process is None:
            return None
        self.writer.close()
        process.kill()
        return await asyncio.to_thread(process.wait)

    async def close(self):
        """End the process. It is started again when it is needed."""
        async with self.turn:
            await self._end()
            self.lost_s = 0.0
