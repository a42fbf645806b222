#!/usr/bin/env python3
"""chat_server: a checkpoint becomes a chat site, an OpenAI-compatible API and a terminal chat.

    python chat_server.py                            serve a nanochat checkpoint, else a small default model
    python chat_server.py serve model.gguf           serve a GGUF file or a Hugging Face folder
    python chat_server.py chat                       talk to it here, in the terminal
    python chat_server.py bundle                     make one file of program, page and core: chat_server.pyz
    python chat_server.py store FOLDER               list the prefixes that --prefix-store keeps

This script chooses a command and runs it. The rest is the package chatlm beside it: two houses that never
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

    chat_server.py            the start, and the end of all commands
    chatlm/commands.py        a row for each command
    chatlm/terminal/          chat and generate; a server at --url
    chatlm/export/            models in other formats; to the hub
    chatlm/cli.py             the command line becomes `Settings`; bundling.py: the command `bundle`
    chatlm/front/*.py         serve.py: a server's start and end; front.py: its core; annexes.py: all else
          chats/              chats of an owner for all his devices
          knowledge/          vector stores: files become passages, which are searched
          server/             routes, connections, access, streams, metrics, the page's files
          intake/             a body becomes a request for a model; what a sandbox does
          documents/          the text of documents, a module for each format
          api/                bodies in: fields and readers; answers out: encoders
          api/dialects/       a file for each API that is spoken
          pool/               workers, queue and failover, here and on Ray
          evals/              tasks on disk, and verdicts on a model's answers to them
          admission/          a request becomes prompts that fit; the sandboxes' front end
          store/              the database
          tools/              tool servers
    chatlm/worker/*.py        a worker's first code and its loop; device and memory
          vectors/            the process that finds vectors near to a question's
          doctor/             `check MODEL`: what is wrong with a model
          engine/             schedule, run, postprocess; KV pages, grammars, drafts, the text of an answer
          ranks/              one model in several processes
          weights/            the steps of loading: a model's files become tensors
          weights/adapters/   LoRA: merged at load, or served beside its base
          weights/towers/     what sees pictures
          weights/loaded/     a model but for its weights; shares of ranks and stages
          weights/formats/    a reader for each kind of files
          weights/purposes/   models that embed, rank or label texts
          weights/families/   a row for each family
          weights/files/      safetensors and torch.save by themselves
          weights/packed/     packed matrices
          weights/text/       tokenizers
          kernels/            which kernels compute a model, compiled ones or references
          model/              `Transformer`: one forward for every family
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
        > Inbox.obey > Engine.add > Scheduler.schedule > make_batch > EagerRunner.start
        > Transformer.forward > sample_reference > RunQueue.advance > Answer.push
        > StreamDecoder.push > AnswerReader.push > Delta > Piece > Stepped                     worker process
        > Dispatcher.deliver > Job.take > NativeEncoder.encode | OpenAIEncoder.encode | BlockEncoder.encode
        > EventStream.send                                                                      front process

docs/architecture.md has it with modules and in reading order; docs/changes.md says where to change what. A
large body is opened and read in a sandbox, by the same functions.

Glossary: what a word means, its class, and the module where that lives

    page        16 KV slots; a slot holds keys and values of one token, in all layers or in a group of them.
                A worker's cache is a pool of pages. `PagePool`, chatlm/worker/engine/kvcache.py
    owner       who may share KV pages: one API key, or everybody where there are no keys. A `Caller` has it,
                chatlm/front/intake/opened_body.py
    client      who takes turns: one API key, or one address where there are no keys. A `Caller` has it too,
                chatlm/front/intake/opened_body.py
    request     what a client asked, checked: `Request`, chatlm/common/messages/requests.py. It may have
                several prompts and `n` answers to each.
    choice      the number of one of these answers, as in OpenAI's `choices`: `Choice`,
                chatlm/front/api/encode.py
    job         one answer of a request, in the front: `Job`, chatlm/front/pool/worker.py. It survives the
                death of its worker.
    assignment  one answer of a request, in a worker: `Assignment`; with tokens and pages a `Sequence`,
                chatlm/worker/engine/sequence.py
    event       what the reader of an answer gets: `Accepted`, a `Piece` per step of its worker, `Finished`,
                chatlm/common/messages/requests.py
    delta       what is new in an answer, in order: more of its reasoning, its text or a call: `Delta`,
                chatlm/common/messages/requests.py
    step        what a worker computes at once, a batch of chunks: `EngineStep`, chatlm/worker/engine/step.py
    chunk       the tokens of one sequence computed in one step: `Chunk`, chatlm/worker/engine/sequence.py
    batch       what the model reads in a step: `Batch`, chatlm/worker/model/batch.py
    draft       tokens that may come next, looked up in earlier text or forced, and checked in one step:
                `Draft`, chatlm/worker/engine/drafts.py
    part        what an engine has beside its core, for a flag, the model or requests: `EnginePart`,
                chatlm/worker/engine/part.py
    rank, stage  one of the processes that compute a replica together; the ranks that have the same layers:
                `RankZero`, chatlm/worker/ranks/ranks.py; `Stage`, chatlm/worker/ranks/runners.py
    kernels     the ops a worker uses, each either compiled or the reference, and how a step runs on them:
                `Kernels` and `StepRunner`, chatlm/worker/kernels/kernels.py
    model       what a Transformer computes: `Model`, chatlm/worker/model/blocks/model.py
    served model  a model of a server, with its names and its workers: `ServedModel`,
                chatlm/front/pool/models.py
    revision    of a model's files: no answer goes on with others. `FilesRevision`,
                chatlm/front/pool/files_revision.py
    checkpoint  of a training run, by the number of its training step: `CheckpointFiles`,
                chatlm/common/hub/run_checkpoints.py
    layout      how a picture is cut into tiles and stands in a prompt: `PictureLayout`,
                chatlm/common/vision/layout.py

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
