"""Runs a process that makes a file, for the commands `quantize` and `imatrix`."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, EngineFailure, printable
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.local import no_progress
from chatlm.common.hub.stamps import files_with
from chatlm.common.log import ProgressDisplay
from chatlm.common.messages.protocol import Crashed, Loading, Unusable
from chatlm.common.messages.quantizing import FileWritten
from chatlm.common.new_files import refuse_inputs
from chatlm.common.processes.start import (
    PROCESS_COMMAND, exit_in_words, process_environment, start_child, threads_per_worker)
from chatlm.front.admission.sandbox import next_message
from chatlm.terminal.output_path import output_path

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.quantizing import ImatrixConfig, QuantizeConfig
    from chatlm.common.messages.wire import Pipe


async def make_file(settings: Settings, role: str, pipe: Pipe,
                    config: type[QuantizeConfig] | type[ImatrixConfig]) -> int:
    """Run the role's process and show what it has made: 0. ConfigError for what it refuses."""
    if settings.model is None:
        raise ConfigError(f"{role} needs MODEL")
    if settings.output is None:
        raise ConfigError(f"{role} needs -o FILE")
    output = output_path(settings.output)
    progress = ProgressDisplay()
    try:
        source = resolve_model(settings, progress)
        others = [Path(name).expanduser() for name in (settings.imatrix, settings.text) if name]
        refuse_inputs(output, [*files_with(source.path, settings), *others])
        threads = threads_per_worker(1) or os.cpu_count() or 1
        message = config(replace(settings, keys=(), api_key=()), source, str(output), threads)
        written = await result_of(role, pipe, message, progress if progress.bar else no_progress)
    finally:
        progress.close()
    for line in written.lines:
        print(printable(line))
    return 0


async def result_of(role: str, pipe: Pipe, message: QuantizeConfig | ImatrixConfig, progress) -> FileWritten:
    """What the process says at the end. It is killed if this is cancelled, as by Ctrl-C."""
    # numpy's threads would spin beside those of the kernels; what uses numpy has threads of its own
    environment = process_environment(message.threads) | {"OPENBLAS_NUM_THREADS": "1"}
    process, ours = start_child(PROCESS_COMMAND, role, environment)
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        writer.write(pipe.packed(message))
        while True:
            match await next_message(reader, pipe):
                case FileWritten() as written:
                    return written
                case Loading(stage, fraction):
                    progress(stage, fraction)
                case Unusable(text):
                    raise ConfigError(text)
                case Crashed(error):
                    raise EngineFailure(error)
    except (asyncio.IncompleteReadError, ConnectionError):
        status = await asyncio.to_thread(process.wait)
        if status == -getattr(signal, "SIGBUS", 0):  # a mapped file lacks what it had
            raise ConfigError("the model's files became shorter while they were read") from None
        raise EngineFailure(f"{role}: the process ended, {exit_in_words(status)}") from None
    finally:
        writer.close()
        process.kill()
        await asyncio.to_thread(process.wait)
