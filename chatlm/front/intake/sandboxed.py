"""The sandbox process. It runs tasks that a client could make slow, with limits on time and memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, TYPE_CHECKING

from chatlm.common.client_words import too_large_to_count
from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError, RequestError
from chatlm.common.late import importer
from chatlm.common.memory import give_memory_back, limit_memory
from chatlm.common.messages.protocol import (
    SANDBOX_MODELS, SANDBOX_OUT_OF_MEMORY, SANDBOX_OUTDATED, SANDBOX_PIPE, Begun, Refused, SandboxResult,
    SandboxConfig)
from chatlm.common.processes.child import join_parent
from chatlm.common.program import stamp_at_start, why_outdated
from chatlm.common.text.grammar import byte_vocabulary, check_grammar
from chatlm.common.text.tokenizer import compile_chat_template, fill_template
from chatlm.front.api.picture_files import PictureTasks
from chatlm.front.api.tool_calls import CallTasks
from chatlm.front.tools.reading import MessageTasks

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import SandboxTask
    from chatlm.common.messages.wire import Channel
    from chatlm.front.intake.envelope import Envelope


# task -> the attribute of Tasks that runs it; Tasks itself runs all others
PLACES = {**dict.fromkeys(("open", "read", "forget", "check_lines"), "bodies"), "extract": "documents",
          "decode_picture": "pictures", "read_message": "messages", "read_call": "calls"}
PREPARE_S = 5.0  # processor seconds a sandbox may take to compile a template or open a tokenizer


class OpenBodyCache:
    """Keeps the open body of one ticket, whichever model its tasks are for."""

    def __init__(self):
        self.ticket = 0
        self.body: Envelope | None = None

    def keep_only(self, ticket: int):
        """A task with this ticket has come: drop the open body if it has another ticket."""
        if not ticket or ticket != self.ticket:
            self.body = None
        self.ticket = ticket


class Tasks:
    """The tasks of a sandbox, for one model. Each imports what it needs: most sandboxes only fill in
    templates, and should start fast and stay small."""

    def __init__(self, config: SandboxConfig, cache: OpenBodyCache):
        self.config = config
        self.cache = cache

    def task(self, name: str) -> Callable[..., Any]:
        """The function of a task. That of an annex has the name of its module before it, and a colon."""
        if ":" in name:
            return partial(sandboxed, importer(name)())
        place = getattr(self, PLACES[name]) if name in PLACES else self
        return getattr(place, name)

    @cached_property
    def template(self):
        return compile_chat_template(self.config.text.chat_template or "")

    @cached_property
    def bodies(self):
        from chatlm.front.intake.body_tasks import BodyTasks
        return BodyTasks(self.config, self.cache)

    @cached_property
    def documents(self):
        from chatlm.front.documents.extract import DocumentTasks
        return DocumentTasks(self.config.cpu_s)

    @cached_property
    def pictures(self):
        return PictureTasks()

    @cached_property
    def messages(self):
        return MessageTasks()

    @cached_property
    def calls(self):
        return CallTasks()

    def prepare(self, name: str, arguments: Seq):
        """Do once what no task should pay for: jinja computes a template's constants when it compiles it."""
        if name == "fill_template":
            _ = self.template
        elif name == "check_grammar":
            byte_vocabulary()
        elif name in PLACES:
            getattr(self, PLACES[name]).prepare(name, arguments)

    def fill_template(self, arguments: dict) -> SandboxResult:
        text = fill_template(self.template, arguments)
        if len(text) > LIMITS.rendered_characters:  # checked here because the front's event loop reads it
            raise too_large_to_count(f"the chat template turns the messages into {len(text)} characters, "
                                     f"at most {LIMITS.rendered_characters} are allowed", "messages")
        return SandboxResult(text)

    def check_grammar(self, source: str, param: str) -> SandboxResult:
        return SandboxResult(check_grammar(source, param))


def sandboxed(function: Callable[..., Any], *arguments) -> SandboxResult:
    return SandboxResult(function(*arguments))


def sandbox_main(arguments: Seq[str]) -> int:
    """Run the role `sandbox FD PARENT`: perform tasks until the front is gone."""
    stamp_at_start()  # before any module that only some tasks import
    channel = join_parent(arguments, SANDBOX_PIPE)
    with suppress(EOFError, ConnectionError):
        [config] = channel.receive(wait=True, most=1)
        limit_memory(config.memory)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process whatever code is running
        cache = OpenBodyCache()
        models = {config.number: Tasks(config, cache)}  # the most recently used last
        give_memory_back()
        niceness = config.nice
        while True:
            [message] = run_task(channel.receive, True, 1)  # pyright: ignore[reportGeneralTypeIssues]  receiving refuses no message
            if isinstance(message, SandboxConfig):
                models.pop(message.number, None)
                models[message.number] = Tasks(message, cache)
                for number in [*models][:-SANDBOX_MODELS]:
                    del models[number]
                continue
            tasks = models.pop(message.model)
            models[message.model] = tasks
            cache.keep_only(message.ticket)
            reply = perform(message, tasks, channel, config.cpu_s, niceness)
            niceness = 0
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.connection.sendall(reply)
    return 0


def perform(task: SandboxTask, tasks: Tasks, channel: Channel, cpu_s: float, niceness: int = 0) -> bytes:
    """Receive the bodies of a task and run it, within `cpu_s` seconds of processor time. Returns the packed
    reply.

    niceness: how much nicer the process is from now on. What it imports before the first task is ours, and
    as urgent as whoever waits for it; only what a client could make slow yields to others."""
    known = len(sys.modules)
    bodies = []
    for _ in range(task.bodies):
        bodies += run_task(channel.receive, True, 1)  # pyright: ignore[reportOperatorIssue]  receiving refuses no body
    channel.send(Begun())
    signal.setitimer(signal.ITIMER_PROF, PREPARE_S)
    run_task(tasks.prepare, task.name, task.arguments)  # an error shows when the task itself fails
    os.nice(niceness)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    result = run_task(tasks.task(task.name), *task.arguments, *(message.data for message in bodies))
    if len(sys.modules) > known and why_outdated():
        os._exit(SANDBOX_OUTDATED)  # what it has imported may not fit the rest; the front tells its client
    reply = SANDBOX_PIPE.packed(result)  # pyright: ignore[reportGeneralTypeIssues]  no task returns anything else
    if len(reply) > getattr(SandboxResult, "MAX_BYTES"):
        reply = SANDBOX_PIPE.packed(
            Refused("too complex: the result is too large", 400, "too_complex", None))
    return reply


def run_task(task: Callable[..., Any], *arguments):
    """The task's result; a Refused message if it raises an error that the client may see."""
    try:
        return task(*arguments)
    except RequestError as error:
        return Refused(str(error)[:1000], error.status, error.code, error.param, {**error.words})
    except ConfigError as error:
        return Refused(str(error)[:1000], 500, error.type, None)
    except MemoryError:
        os._exit(SANDBOX_OUT_OF_MEMORY)
