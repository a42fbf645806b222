"""Runs programs that a model wrote, for HumanEval: in processes with limits, which are no sandbox.

Such a program may read what this user may read and use the network: `--confirm-run-unsafe-code` says so, and
no server has this module. What is bounded is accidents: time, memory, files, processes, output.

A program is right if its tests ran to their end. nanochat's execution.py asks whether its process ended with
status 0, and so calls a program right that ends before its tests (`raise SystemExit(0)`, `os._exit(0)`, or a
main block that does): here that is wrong, on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from contextlib import suppress

from chatlm.common.errors import ConfigError, shown
from chatlm.common.log import tell
from chatlm.common.program import program_place
from chatlm.terminal.program_runner import HEADER_BYTES, remove_folder

SECONDS = 5.0  # upstream's limit
PATIENCE_S = 20.0  # that a runner has beyond that: to start, and to end what a program left
AT_ONCE = max((os.cpu_count() or 2) // 2, 1)
RUNNER = ("import sys; sys.path.insert(0, sys.argv[1]); "
          "from chatlm.terminal.program_runner import main; main()")


class Programs:
    """Runs one program a process, a few at a time."""

    def __init__(self):
        self.free = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, program: str) -> bool:
        """Does it come to its end, in time and without an error? ConfigError if no program can run here."""
        async with self.free:
            try:
                folder = tempfile.mkdtemp(prefix="program-")
            except OSError as error:
                raise ConfigError(f"programs need a temporary folder: {error.strerror}") from None
            try:
                return await self._run(program.encode("utf-8", "surrogatepass"), folder)
            finally:
                # the runner has done that, unless something ended it
                if not await asyncio.to_thread(remove_folder, folder):
                    tell(f"{folder} could not be deleted: a program that ran there is in the way")

    async def _run(self, program: bytes, folder: str) -> bool:
        try:
            runner = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-c", RUNNER, str(program_place()), folder, str(SECONDS),
                start_new_session=True, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        except OSError as error:
            raise ConfigError(f"cannot start {sys.executable}: {error.strerror}") from None
        assert runner.stdin and runner.stdout
        said = b""
        try:
            runner.stdin.write(len(program).to_bytes(HEADER_BYTES, "big") + program)
            said = await asyncio.wait_for(runner.stdout.readline(), SECONDS + PATIENCE_S)
        except asyncio.TimeoutError:
            runner.kill()  # without a namespace the program can hold it up
        finally:
            runner.stdin.close()  # it ends the program, if that still runs, deletes the folder, and ends
            await ended(runner)
        if not said:
            return False  # something ended it, as the program may where there are no namespaces
        found = json.loads(said)
        if "problem" in found:
            raise ConfigError(f"cannot run programs here: {shown(found['problem'])}")
        return found["right"] is True


async def ended(runner: asyncio.subprocess.Process):
    """Wait until a runner has ended by itself, or end it."""
    try:
        await asyncio.wait_for(runner.wait(), PATIENCE_S)
    except asyncio.TimeoutError:
        runner.kill()
        await runner.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(runner.pid, signal.SIGKILL)
