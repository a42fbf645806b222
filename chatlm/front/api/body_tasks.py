"""The sandbox's tasks for bodies of requests, which import what reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from chatlm.common.messages.protocol import Body, Result, SandboxConfig
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.front.admission.admission import packed_body
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.batch_lines import read_body_of, read_line
from chatlm.front.api.conversation import chained_of
from chatlm.front.api.fields import json_object
from chatlm.front.api.readers import read_answer, read_text, read_variants

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody


class BodyTasks:
    """One method for each task."""

    def __init__(self, config: SandboxConfig):
        self.config = config

    def prepare(self, name: str):
        """Do once what no task should pay for."""
        if name != "named_model":
            _ = self.prompts

    @cached_property
    def prompts(self) -> PromptMaker:
        return PromptMaker(open_tokenizer(self.config.text), self.config.context_length,
                           scored_length=self.config.scored_length)

    def named_model(self, body: bytes) -> Result:
        name = json_object(body).get("model")
        return Result(name[:1000] if isinstance(name, str) else "")

    def read_body(self, reader: str, body: bytes) -> Result:
        return Result([self.admitted(read_answer(reader, json_object(body), self.config.server), {})])

    def chained(self, body: bytes) -> Result:
        """What a body continues: previous_response_id, and the id of a conversation; "" if neither."""
        return Result([*chained_of(json_object(body))])

    def check_line(self, number: int, line: bytes) -> Result:
        """custom_id, url and model of a line of a batch."""
        read = read_line(number, line)
        return Result([read.custom_id, read.url, read.model])

    def read_line(self, number: int, line: bytes) -> Result:
        return Result([self.admitted(read_body_of(read_line(number, line), self.config.server), {})])

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
