"""The sandbox process: tasks that a client can make slow, with limits on time and memory."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError, RequestError
from chatlm.common.memory import give_memory_back, limit_memory
from chatlm.common.messages.protocol import (
    SANDBOX_MODELS, SANDBOX_PIPE, Begun, Body, Refused, Result, SandboxConfig)
from chatlm.common.messages.requests import Message
from chatlm.common.processes.start import join_parent
from chatlm.common.text.grammar import check_grammar
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.tokenizer import compile_chat_template, fill_template
from chatlm.front.admission.admission import Sandbox, packed_body
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.fields import json_object
from chatlm.front.api.readers import read_answer, read_text, read_variants

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody


TASKS_OF_BODIES = "named_model", "read_body", "read_variants", "answer_text"
PREPARE_S = 5.0  # processor seconds a sandbox may take to compile a template or open a tokenizer


class Tasks:
    """The tasks of a sandbox: one method each."""

    def __init__(self, config: SandboxConfig):
        self.config = config

    @cached_property
    def prompts(self) -> PromptMaker:
        return PromptMaker(open_tokenizer(self.config.text), self.config.context_length,
                           scored_length=self.config.scored_length)

    @cached_property
    def template(self):
        return compile_chat_template(self.config.text.chat_template or "")

    def prepare(self, name: str):
        """Do once what no task should pay for: jinja computes a template's constants when it compiles it."""
        if name == "fill_template":
            _ = self.template
        elif name not in ("check_grammar", "named_model"):
            _ = self.prompts

    def fill_template(self, arguments: dict) -> Result:
        text = fill_template(self.template, arguments)
        if len(text) > LIMITS.rendered_characters:  # checked here because the front's event loop reads it
            raise RequestError(f"the chat template turns the messages into {len(text):,} characters; "
                               f"at most {LIMITS.rendered_characters:,} are allowed",
                               code="context_length_exceeded", param="messages")
        return Result(text)

    def check_grammar(self, source: str, param: str) -> Result:
        return Result(check_grammar(source, param))

    def named_model(self, body: bytes) -> Result:
        name = json_object(body).get("model")
        return Result(name[:1000] if isinstance(name, str) else "")

    def read_body(self, reader: str, body: bytes) -> Result:
        return Result([self.admitted(read_answer(reader, json_object(body), self.config.server), {})])

    def read_variants(self, indices: Seq[int], seed: int, body: bytes) -> Result:
        read, rendered = read_variants(json_object(body), indices, seed, self.config.server), {}
        return Result([self.admitted(parsed, rendered) for parsed in read])

    def admitted(self, parsed: ParsedBody, rendered: dict) -> list:
        """A body whose prompts fit, packed."""
        admitted, lasting = asyncio.run(self.prompts.admit(parsed.request, rendered)), parsed.lasting()
        request = replace(lasting.request, dropped_messages=admitted.dropped_messages)
        if self.config.server.settings.log_conversations and request.messages is not None:
            texts = tuple(Message(message.role, message.content) for message in parsed.request.messages or ())
            request = replace(request, messages=texts)
        return packed_body(replace(lasting, request=request), admitted.prompt_ids or ())

    def answer_text(self, route: str, body: bytes) -> Body:
        return Body(asyncio.run(read_text(route, json_object(body), self.prompts)))


def sandbox_main(arguments: Seq[str]) -> int:
    """The role `sandbox FD PARENT`: run tasks until the front is gone."""
    channel = join_parent(arguments, SANDBOX_PIPE)
    with suppress(EOFError, ConnectionError):
        [config] = channel.receive(wait=True, most=1)
        os.nice(config.nice)
        limit_memory(config.memory)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process whatever code is running
        models = {config.number: Tasks(config)}  # the last used last
        give_memory_back()
        while True:
            [task] = run_task(channel.receive, True, 1)  # pyright: ignore[reportGeneralTypeIssues]  it refuses no message
            if isinstance(task, SandboxConfig):
                models.pop(task.number, None)
                models[task.number] = Tasks(task)
                for number in [*models][:-SANDBOX_MODELS]:
                    del models[number]
                continue
            models[task.model] = tasks = models.pop(task.model)
            bodies = run_task(channel.receive, True, 1) if task.name in TASKS_OF_BODIES else []
            channel.send(Begun())
            signal.setitimer(signal.ITIMER_PROF, PREPARE_S)
            run_task(tasks.prepare, task.name)  # an error shows when the task itself fails
            signal.setitimer(signal.ITIMER_PROF, config.cpu_s)
            reply = SANDBOX_PIPE.packed(run_task(getattr(tasks, task.name), *task.arguments,
                                               *(message.data for message in bodies)))  # pyright: ignore[reportGeneralTypeIssues]  nor any of these
            if len(reply) > getattr(Result, "MAX_BYTES"):
                reply = SANDBOX_PIPE.packed(
                    Refused("too complex: the result is too large", 400, "too_complex", None))
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.connection.sendall(reply)
    return 0


def run_task(task: Callable[..., Any], *arguments):
    try:
        return task(*arguments)
    except RequestError as error:
        return Refused(str(error)[:1000], error.status, error.code, error.param)
    except ConfigError as error:
        return Refused(str(error)[:1000], 500, error.type, None)
    except MemoryError:
        os._exit(Sandbox.OUT_OF_MEMORY)
