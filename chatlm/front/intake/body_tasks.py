"""The sandbox's tasks that read request bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence as Seq
from dataclasses import replace
from functools import cached_property
from typing import Any, TYPE_CHECKING

from chatlm.common.messages.protocol import Body, SandboxResult, SandboxConfig
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.additions import AddedNames
from chatlm.front.intake.crossing import packed_body, unpacked_sizes
from chatlm.front.intake.envelope import open_body
from chatlm.front.intake.tasks import TASKS, NumberedLine, Reading, checked_lines

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.front.intake.envelope import Envelope
    from chatlm.front.intake.sandboxed import OpenBodyCache


class BodyTasks:
    """One method for each task, for one model. The open body is in the cache."""

    def __init__(self, config: SandboxConfig, cache: OpenBodyCache):
        self.config = config
        self.cache = cache

    def prepare(self, name: str, arguments: Seq):
        """Do once what no task should pay for."""
        if name == "read":
            _ = self.prompts

    @cached_property
    def prompts(self) -> PromptMaker:
        tokenizer = open_tokenizer(self.config.text)
        tokenizer.forms = self.config.forms
        return PromptMaker(tokenizer, self.config.context_length,
                           scored_length=self.config.scored_length)

    def open(self, route: str, number: int | None, most: int, names: Seq, *bodies: bytes) -> Body:
        """What the front needs to choose a model; also the fields, if they take at most `most` bytes without
        their pictures."""
        envelope = self._opened(route, number, names, bodies)
        rest = envelope.rest(sum(map(len, bodies)), most)
        data = envelope.packed(rest)
        envelope.lift.files = []  # the front decodes them
        if rest:
            self.cache.body = None  # the front reads it
        return Body(data)

    def _opened(self, route: str, number: int | None, names: Seq, bodies: Seq[bytes]) -> Envelope:
        """The open body of a task. A body that was sent is always opened anew. If none was sent, it is the
        one in the cache, which then has this task's ticket (`OpenBodyCache.keep_only`). names: as in
        AddedNames."""
        if bodies:
            self.cache.body = open_body(route, number, *bodies, names=AddedNames(*names))
        assert self.cache.body, "the front thinks that this process has the body"
        return self.cache.body

    def forget(self) -> SandboxResult:
        """Do nothing: a task without a ticket has already cleared the cache."""
        return SandboxResult(None)

    def read(self, route: str, number: int | None, names: Seq, sizes: Seq, client: str, task: str,
             arguments: Seq, *bodies: bytes) -> Body | SandboxResult:
        """Run one of TASKS on a body. sizes: of its pictures, which the front has decoded."""
        envelope = self._opened(route, number, names, bodies)
        envelope.show(unpacked_sizes(sizes))
        reading = Reading(envelope, self.config.server, self.prompts, client)
        return asyncio.run(self._read(reading, TASKS[task], arguments))

    async def _read(self, reading: Reading, task: Callable[..., Awaitable[Any]],
                    arguments: Seq) -> Body | SandboxResult:
        result = await task(reading, *arguments)
        if isinstance(result, bytes):
            return Body(result)
        rendered: dict = {}
        return SandboxResult([await self._admitted(parsed, rendered) for parsed in result])

    async def _admitted(self, parsed: ParsedBody, rendered: dict) -> list:
        """Make a body's prompts, check that they fit, and pack all of it. Prompts that annexes may change
        stay as they are. rendered: what several answers to one conversation share."""
        if parsed.changed_by:
            return [parsed, None]
        admitted = await self.prompts.admit(parsed.request, rendered)
        lasting = parsed.lasting()
        request = replace(lasting.request, dropped_messages=admitted.dropped_messages,
                          pictures=admitted.pictures)
        if parsed.plan:  # each round renders them again, with the results of calls
            request = replace(request, messages=parsed.request.messages, tools=parsed.request.tools,
                              template_options=parsed.request.template_options)
        elif self.config.server.settings.log_conversations and request.messages is not None:
            texts = tuple(Message(message.role, message.content) for message in parsed.request.messages or ())
            request = replace(request, messages=texts)
        return packed_body(replace(lasting, request=request), admitted.prompt_ids or ())

    def check_lines(self, numbers: Seq[int], refusal: str, lines: bytes) -> SandboxResult:
        numbered = map(NumberedLine, numbers, lines.split(b"\n"))
        return SandboxResult([[*checked] for checked in checked_lines(numbered, self.config.server, refusal)])
