"""Finds out what a model is and needs, in a process that reads the headers of its files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.messages.protocol import (
    SURVEY_PIPE, Crashed, Loading, SurveyConfig, Surveyed, Unusable)
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import (
    exit_in_words, patient, process_environment, start_child, threads_per_worker)
from chatlm.front.admission.sandbox import next_message

if TYPE_CHECKING:
    import subprocess


class Survey:
    """One process that surveys models, one after another. It is started for the first one, and again if a
    model has crashed it."""

    PATIENCE_S = 300.0

    def __init__(self, command: Seq[str]):
        self.command = command
        self.turn = asyncio.Lock()
        self.process: subprocess.Popen | None = None

    async def of(self, config: SurveyConfig) -> Surveyed:
        """Survey a model. Raises ConfigError if it cannot be served."""
        config = replace(config, settings=replace(config.settings, keys=(), api_key=()))
        source = config.source
        async with self.turn:
            try:
                message = await asyncio.wait_for(self._ask(config), patient(self.PATIENCE_S))
            except (asyncio.IncompleteReadError, asyncio.TimeoutError, ConnectionError, BadMessage) as error:
                status = await self._end()
                late = isinstance(error, asyncio.TimeoutError)
                raise ConfigError(f"{source.path}: reading its headers "
                                  f"{'takes too long' if late else 'ended with ' + exit_in_words(status)}"
                                  ) from None
        match message:
            case Surveyed():
                return message
            case Unusable(text):
                raise ConfigError(text)
            case Crashed(error):
                raise ConfigError(f"{source.path}: {error}")
        raise ConfigError(f"{source.path}: unexpected message from the survey: {type(message).__name__}")

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
