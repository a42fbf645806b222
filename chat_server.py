#!/usr/bin/env python3
"""chat_server: a checkpoint becomes a chat site, an OpenAI-compatible API and a terminal chat.

    python chat_server.py                            serve a nanochat checkpoint, else a small default model
    python chat_server.py serve model.gguf           serve a GGUF file or a Hugging Face folder
    python chat_server.py chat                       talk to it here, in the terminal
    python chat_server.py bundle                     make one file of program, page and core: chat_server.pyz
    python chat_server.py store FOLDER               list the prefixes that --prefix-store keeps

This script chooses a command and runs it. The rest is the package chatlm beside it: two houses that never
import each other, front (one process: HTTP, prompts, the queue; no tensors) and worker (one process for each
replica of a model: weights, steps, the text of answers; no HTTP), and what both use, common. The front starts
workers, and sandboxes for what a client could make slow, by name; they speak over socket pairs.

docs/map.md is the program on one page: the trip of a request, what is where, and a glossary.
docs/architecture.md says how the parts work together, docs/changes.md where to change what.
"""

from __future__ import annotations

import signal
import sys

# Until `main`, Ctrl-C ends the program at once: nothing has to be cleaned up
STARTED = __name__ == "__main__" or sys.argv[0].endswith("chat-server")
if STARTED and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util

if importlib.util.find_spec("chatlm") is None:
    print("chat_server: the package chatlm is not beside this file. In the checkout, `python chat_server.py "
          "bundle` makes chat_server.pyz, the one file to copy", file=sys.stderr)
    sys.exit(2)
if sys.version_info < (3, 10):  # before the imports, which would fail with tracebacks
    from chatlm.common.invocation import advice_for_old_python
    print(f"chat_server needs Python 3.10 or newer, and this is {sys.version.split()[0]}"
          f"{advice_for_old_python()}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    from chatlm.common.standard_streams import repair_streams
    repair_streams()  # first: a pipe to a worker must not take the number of a closed stream
    from chatlm.commands import WITHOUT_WORKER_AHEAD
    from chatlm.common.processes.start import start_worker_ahead
    start_worker_ahead(sys.argv[1:], WITHOUT_WORKER_AHEAD)

import gc
import logging
import os
import time
from collections.abc import Awaitable, Sequence as Seq
from contextlib import suppress

from chatlm.cli import asks_for_json, hide_api_keys, parse_command_line, with_kept_words
from chatlm.commands import program_of
from chatlm.common.commands import Application, Command, chosen_command
from chatlm.common.config import Settings
from chatlm.common.errors import ChatServerError, ConfigError, check_library, lack_of_memory, visible
from chatlm.common.interrupts import raised_interrupts
from chatlm.common.log import json_handler, log, output_as_log, start_logging, tell
from chatlm.common.memory import share_heap, tune_gc
from chatlm.common.processes.launch import torchrun
from chatlm.common.processes.start import end_worker_ahead
from chatlm.common.processes.torchrun import RankStore, serve_rank
from chatlm.common.standard_streams import lack_of_space, never_fail, repair_streams
from chatlm.front.aio import run_loop
from chatlm.front.annexes import ANNEXES, Annex
from chatlm.front.held import measured_loop
from chatlm.front.pool.local_devices import check_nice, niceness


def run_command(command: Command, settings: Settings, program: Application) -> int:
    """Run a command that has Settings. A process that torchrun started as rank 1 or higher computes that rank
    instead. Returns the exit status."""
    run = command.run
    assert run, f"{command.name} has no Settings"
    check_library("aiohttp", "chat_server")
    if not settings.url:  # a model is loaded here
        check_library("numpy", "chat_server")
    ranks = torchrun(settings)
    status = 1
    if ranks and settings.serves_many:
        raise ConfigError("several models under torchrun: its ranks compute one model")
    if ranks and ranks.rank:
        return serve_rank(settings, ranks)
    if (nice := niceness(settings)) is not None:
        check_nice(nice)

    def start() -> Awaitable[int]:
        running = run(settings, program)
        if STARTED:
            gc.freeze()  # later collections leave out what was imported
        return running

    try:
        status = run_loop(start, measured_loop)
        return status
    finally:
        if ranks:  # let the other ranks end too; this imports torch
            with suppress(RuntimeError):
                RankStore().put("over", [time.time(), status])


def main(argv: Seq[str] | None = None, annexes: Seq[Annex] = ANNEXES) -> int:
    """Run a command. Returns the exit status: 0, 1 (no answer), 2 (ConfigError), 130 (Ctrl-C)."""
    try:
        with raised_interrupts():
            return run_line(argv, annexes)
    except KeyboardInterrupt:  # at any moment, also while a command line is read or an error told
        return 130


def run_line(argv: Seq[str] | None, annexes: Seq[Annex]) -> int:
    """Run the command that a command line names, and tell its errors. Returns the exit status."""
    program = program_of(annexes)
    argv = with_kept_words(sys.argv[1:] if argv is None else argv, program.commands)
    keys_given = any(word.partition("=")[0] == "--api-key" for word in argv)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's own command line shows the keys
    hidden = keys_given and hide_api_keys() and not by_torchrun
    repair_streams()
    try:
        command, words = chosen_command(argv, program.commands)
        if not command.worker_ahead:
            end_worker_ahead()
        if command.lines:
            for line in command.lines(words, program):
                print(visible(line))
            return 0
        settings = parse_command_line(argv, os.environ, program.commands)
        os.environ.pop("CHAT_SERVER_API_KEY", None)  # no process that we start may read it
        start_logging(settings)
        if keys_given:
            log.warning("--api-key: other users of this machine %s read the key in the process list; "
                        "use CHAT_SERVER_API_KEY or --api-key-file instead",
                        "could until now" if hidden else "can")
        if settings.command == "serve":
            tune_gc()
            share_heap()
            never_fail("stdout")
        with output_as_log():
            return run_command(command, settings, program)
    except BrokenPipeError:  # as in `generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        error = lack_of_memory(error) or lack_of_space(error) or error
        if not logging.root.handlers and asks_for_json(argv, os.environ):  # the flags were wrong
            start_logging(Settings(log_format="json"))
        logging.shutdown()  # so that the reason is the last line
        if not isinstance(error, ChatServerError):
            if not json_handler():
                raise
            log.critical("unexpected error", exc_info=error)
            return 1
        wrong_use = isinstance(error, ConfigError)
        tell(f"chat_server: {'' if wrong_use else 'error: '}{error}", logging.ERROR)
        return 2 if wrong_use else 1


if __name__ == "__main__":
    sys.exit(main())
