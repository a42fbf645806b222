#!/usr/bin/env python3
"""chat_server: a checkpoint becomes a chat site, an OpenAI-compatible API and a terminal chat.

    python chat_server.py                            serve a nanochat checkpoint, else a small default model
    python chat_server.py serve model.gguf           serve a GGUF file or a Hugging Face folder
    python chat_server.py chat                       talk to it here, in the terminal
    python chat_server.py bundle                     make one file of program, page and core: chat_server.pyz
    python chat_server.py store FOLDER               list the prefixes that --prefix-store keeps

This script has the routes and the commands. The rest is the package chatlm beside it: two houses that never
import each other, front and worker, and what both use, common.

The houses

    browser / OpenAI client / chat in the terminal
          | HTTP, server-sent events
    front house: one process, aiohttp, an event loop
          |   reads bodies, renders and tokenizes prompts, queues, routes, streams; never imports torch
          |   `-- sandboxes: processes with time and memory limits, for chat templates, schemas, large bodies
          | one socket pair per worker: typed JSON messages; one has all answers' news of one or several steps
    worker house: one process per replica of the model (per GPU; one on a CPU; or on a Ray cluster)
              loads the weights, then schedules, computes and samples step by step, turns tokens into text;
              never opens a network socket, but for processes that prove to know its secret: a front where
              Ray placed it, and ranks on other machines
          | with --tp or --pp one socket pair per other rank, TCP under torchrun: the steps to compute
    ranks     the worker is rank 0; each has a shard, and they sum in shared memory (or by NCCL or Gloo)

The rooms, each above those that it may import

    chat_server.py            routes, the handlers of answers and streams, the commands
    chatlm/terminal/          chat and generate; a server at --url
    chatlm/export/            models in other formats; to the hub
    chatlm/cli.py             the command line becomes `Settings`; bundling.py: the command `bundle`
    chatlm/front/server/      routes, connections, access, streams, metrics, the page's files
          intake/             a body becomes a request for a model; what a sandbox does
          api/                bodies in: fields and readers; answers out: encoders
          api/dialects/       a file for each API that is spoken
          pool/               workers, queue and failover, here and on Ray
          evals/              tasks on disk, and verdicts on a model's answers to them
          admission/          a request becomes prompts that fit; the sandboxes' front end
          store/              the database
          tools/ *.py         tool servers; tasks that are watched; aiohttp at its first use
    chatlm/worker/*.py        a worker's first code and its loop; device and memory
          doctor/             `check MODEL`: what is wrong with a model
          engine/             schedule, run, postprocess; KV pages, grammars, drafts, the text of an answer
          ranks/              one model in several processes
          weights/            a model's files become tensors; families, shards, adapters
          model/              `Transformer`, and which kernels compute
          model/blocks/       `Model`: an input, layers of two blocks each, a head
          ops/                the reference of each op, and torch's tensors
          arrays/             arrays without torch
    chatlm/export/gguf/       a model as one GGUF file of a smaller type; which weights matter
    chatlm/common/hub/        which model: on this machine, on the hub, or the default one
          processes/          starting processes, torchrun, Ray
          text/               tokenizers, chat templates, reasoning and calls
          messages/           requests, events, and what crosses each pipe
          vision/             pictures in a prompt; beside these: flags, limits, errors, the log

Life of a request

    AccessLog.log > errors_to_responses > Access.guard > Front.handle_answer > Bodies.answer > read_bytes
        > Intake.opened > open_body > Intake.resolve > Intake.decode_pictures > read_answer > read_native
        > native_messages > Answers.begin > WorkerPool.answer > PromptMaker.admit > Tokenizer.render
        > Dispatcher.dispatch > Worker.assign > Pipe.packed                                     front process
        > Inbox.obey > Engine.add > Scheduler.schedule > make_batch > EagerSteps.start
        > Transformer.forward > sample_reference > RunQueue.advance > Answer.push
        > StreamDecoder.push > AnswerReader.push > Delta > Piece > Stepped                     worker process
        > Dispatcher.deliver > Job.take > NativeEncoder.encode | OpenAIEncoder.encode | BlockEncoder.encode
        > EventStream.send                                                                      front process

docs/architecture.md has it with modules and in reading order; docs/changes.md says where to change what. A
large body is opened and read in a sandbox, by the same functions.

Glossary

    page        16 KV slots; a slot holds keys and values of one token, in all layers or in a group of them
                (`LayerGroups`). A worker's cache is a pool of pages.
    owner       who may share KV pages: one API key, or everybody where there are no keys
    client      who takes turns: one API key, or one address where there are no keys
    request     what a client asked, checked: `Request`. It may have several prompts and `n` answers to each.
    job         one answer of a request, in the front: `Job`. It survives the death of its worker.
    assignment  one answer of a request, in a worker: `Assignment`; with tokens and pages a `Sequence`,
                with text an `Answer`
    event       what the reader of an answer gets: `Accepted`, a `Piece` per step of its worker, `Finished`
    delta       what is new in an answer, in order: more of its reasoning, its text or a call: `Delta`
    chunk       the tokens of one sequence computed in one step; a step computes a batch of chunks
    draft       tokens that may come next, looked up in earlier text or forced, and checked in one step
    steps       how a backend runs a step: `EagerSteps` op by op, decode_core's recordings or CUDA graphs
    rank, stage one of the processes that compute a replica together; the ranks that have the same layers
    kernels     the ops a worker uses, each either compiled or the reference: `load_kernels`

A worker that dies is restarted, and its answers continue elsewhere from the tokens they have: the client sees
a pause, not an error. Without decode_core (csrc/) torch computes by the references, several times slower.

Exactness: the next token depends on the logits, the request's parameters, its seed and the token's position
(counter-based noise), never on the rest of the batch. With decode_core on a CPU, a row's logits are identical
to the bit alone or batched, cached or cold, drafted or not, so the same request gives the same tokens
(`row_invariant` in /stats). Elsewhere the last bits may vary with the batch; with decode_core on CUDA they do
not in steps of up to 8 tokens that all draw, so drafts are checked there.
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

import gc

if STARTED:
    gc.disable()  # until `main`, as chatlm.common.memory.uncollected does
if __name__ == "__main__":
    from chatlm.common.streams import repair_streams
    repair_streams()  # first: a pipe to a worker must not take the number of a closed stream
    from chatlm.common.processes.start import start_worker_ahead
    start_worker_ahead(sys.argv[1:])

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Sequence as Seq
from contextlib import suppress
from functools import partial

from chatlm.cli import (
    as_quantize, asks_for_json, hide_api_keys, parse_command_line, parse_store_words, with_kept_words)
from chatlm.common.commands import Command
from chatlm.common.config import Settings
from chatlm.common.errors import ChatServerError, ConfigError, check_library, lack_of_memory, visible
from chatlm.common.hub.better import MEMORY_RATE, advice_of, only_demonstrates
from chatlm.common.interrupts import raised_interrupts
from chatlm.common.log import ProgressDisplay, json_handler, log, output_as_log, start_logging, tell
from chatlm.common.memory import collect_from_now_on, give_memory_back, share_heap, tune_gc
from chatlm.common.processes.launch import torchrun
from chatlm.common.program import other_program, program_root
from chatlm.common.streams import lack_of_space, never_fail, repair_streams
from chatlm.common.tiers import listed_store
from chatlm.front.aio import first_of, stop_signals, supervised
from chatlm.front.annexes import ANNEXES, Annex, database_of, toolbox_of
from chatlm.front.front import create_app, routes_with
from chatlm.front.lazy import import_web
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.local_devices import check_nice, niceness
from chatlm.front.pool.pool import free_memory, make_pool
from chatlm.front.server.access import listen_on, server_urls
from chatlm.front.server.connections import room_for_connections, serving
from chatlm.front.server.host_names import is_loopback
from chatlm.front.server.routes import RouteTable


def announce(catalogue: Catalogue, settings: Settings, port: int):
    """Tell the operator what is served, and where."""
    path = f"{settings.prefix}/" if settings.prefix else ""
    urls = [f"  {url}{path}" for url in server_urls(settings.host, port)]
    for line in catalogue.describe():
        tell(line, file=sys.stdout)
    if not settings.keys and not is_loopback(settings.host):
        tell("Warning: anyone who can reach this port can use the server; --api-key KEY or --host 127.0.0.1 "
             "prevents that", logging.WARNING, sys.stdout)
    for line in ("Application startup complete", *urls):
        tell(line, file=sys.stdout)


async def advise(catalogue: Catalogue):
    """Name a better model than the default one, once nothing is answered: the memory is measured for it."""
    pool = catalogue.pools[0] if catalogue.pools else None
    if pool is None or not only_demonstrates(pool.model_name):
        return
    while pool.dispatcher.running:
        await asyncio.sleep(1.0)
    if all(worker.device.startswith("cpu") for worker in pool.workers):
        await asyncio.to_thread(MEMORY_RATE.measure)
    if advice := advice_of(pool.model_name, free_memory(pool)):
        tell(advice, file=sys.stdout)


def warn_of_another_program():
    """If there are two chatlm packages that differ, log which one runs: each may have half of an edit."""
    with suppress(OSError):
        if other := other_program():
            log.warning("the chatlm in %s runs; the one in %s differs", program_root(), other)


async def serve_forever(settings: Settings, catalogue: Catalogue | None = None,
                        annexes: Seq[Annex] = ANNEXES) -> int:
    """Listen, load, serve until a signal, drain, and stop. Returns the exit status.

    Raises ConfigError if the server cannot start."""
    toolbox = toolbox_of(settings)
    with listen_on(settings.host, settings.port) as listener:
        drain, now = stop_signals()
        if settings.serves_many and not catalogue:
            from chatlm.front.evals.step_work import StepWork  # here, because few servers need it
            from chatlm.front.pool.many import ManyModels
            catalogue = ManyModels(settings, step_work=StepWork)
        catalogue = catalogue or Catalogue(settings, make_pool(settings))
        progress = ProgressDisplay()
        catalogue.on_progress = progress
        try:  # the workers start while a thread imports aiohttp (0.1 s)
            await catalogue.start()
            await asyncio.to_thread(import_web)
            store = await database_of(settings, annexes)
        except Exception:
            await catalogue.close()
            raise
        room = room_for_connections(settings)
        routes = RouteTable(routes_with(annexes), settings.prefix)
        app = create_app(catalogue, settings, store, toolbox, annexes)
        async with serving(app, listener, room, routes.is_polled):
            try:
                catalogue.get_ahead()
                if await first_of(catalogue.wait_ready(), drain.wait()) == 0:
                    progress.close()
                    await asyncio.to_thread(warn_of_another_program)
                    announce(catalogue, settings, listener.getsockname()[1])
                    await asyncio.to_thread(give_memory_back)
                    advising = asyncio.create_task(supervised(
                        "naming a better model", partial(advise, catalogue)))
                    await drain.wait()
                    advising.cancel()
                    tell("Stopping: running answers may finish; a second signal stops now.")
                    await first_of(catalogue.drain(settings.drain_timeout), now.wait())
            finally:
                progress.close()
                await catalogue.close()
    return 2 if store and store.damaged else 0


def bundle_lines(words: Seq[str]) -> Iterator[str]:
    from chatlm.bundling import bundle_lines  # here, like the others: few starts need it
    return bundle_lines(words)


def export_lines(words: Seq[str]) -> Iterator[str]:
    from chatlm.export.command import export_lines
    return export_lines(words)


def push_lines(words: Seq[str]) -> Iterator[str]:
    from chatlm.export.push import push_lines
    return push_lines(words)


COMMANDS = (
    Command("bundle", bundle_lines), Command("export", export_lines), Command("push", push_lines),
    Command("store", lambda words: listed_store(*parse_store_words(words))))


def run_command(settings: Settings, annexes: Seq[Annex] = ANNEXES) -> int:
    """Run a command that has Settings. A process that torchrun started as rank 1 or higher computes that rank
    instead. Returns the exit status."""
    check_library("aiohttp", "chat_server")
    if not settings.url:  # a model is loaded here
        check_library("numpy", "chat_server")
    start = torchrun(settings)
    status = 1
    if start and settings.serves_many:
        raise ConfigError("several models under torchrun: its ranks compute one model")
    if start and start.rank:
        from chatlm.common.processes.torchrun import serve_rank
        return serve_rank(settings, start)
    if (nice := niceness(settings)) is not None:
        check_nice(nice)
    try:
        if settings.command == "serve":
            command = partial(serve_forever, annexes=annexes)
        else:  # import this command's module only
            modules = {"generate": "chat", "compare": "side_by_side", "score": "side_by_side",
                       "eval": "evaluate"}
            functions = {"eval": "evaluate"}
            name = settings.command
            module = importlib.import_module(f"chatlm.terminal.{modules.get(name, name)}")
            command = getattr(module, functions.get(name, name))
        status = asyncio.run(command(settings))
        return status
    finally:
        if start:  # let the other ranks end too; this imports torch
            from chatlm.common.processes.torchrun import RankStore
            with suppress(RuntimeError):
                RankStore().put("over", [time.time(), status])


@raised_interrupts()
def main(argv: Seq[str] | None = None, annexes: Seq[Annex] = ANNEXES) -> int:
    """Run a command. Returns the exit status: 0, 1 (no answer), 2 (ConfigError), 130 (Ctrl-C)."""
    if STARTED:
        collect_from_now_on()
    argv = with_kept_words(sys.argv[1:] if argv is None else argv)
    keys_given = any(word.partition("=")[0] == "--api-key" for word in argv)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's own command line shows the keys
    hidden = keys_given and hide_api_keys() and not by_torchrun
    repair_streams()
    try:
        argv = as_quantize(argv)
        for command in (*COMMANDS, *(annex.command for annex in annexes if annex.command)):
            if argv[:1] == [command.name]:
                for line in command.lines(argv[1:]):
                    print(visible(line))
                return 0
        settings = parse_command_line(argv, os.environ)
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
            return run_command(settings, annexes)
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
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
