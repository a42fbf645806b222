"""The sandbox's tasks for bodies of requests, which import what reads them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Body, Result, SandboxConfig
from chatlm.common.messages.requests import Message, Picture
from chatlm.common.text.load import open_tokenizer
from chatlm.front.admission.crossing import packed_body
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.batch_lines import problem_of, read_body_of, read_line
from chatlm.front.api.conversation import chained_of
from chatlm.front.api.fields import json_object
from chatlm.front.api.picture_parts import fill_in, lift_pictures, packed_lift
from chatlm.front.api.readers import read_answer, read_text, read_variants

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody


class BodyTasks:
    """One method for each task."""

    def __init__(self, config: SandboxConfig):
        self.config = config

    def prepare(self, name: str):
        """Do once what no task should pay for."""
        if name not in ("named_model", "check_lines"):
            _ = self.prompts

    @cached_property
    def prompts(self) -> PromptMaker:
        tokenizer = open_tokenizer(self.config.text)
        tokenizer.forms = self.config.forms
        return PromptMaker(tokenizer, self.config.context_length,
                           scored_length=self.config.scored_length)

    def named_model(self, body: bytes) -> Result:
        name = json_object(body).get("model")
        return Result(name[:1000] if isinstance(name, str) else "")

    def lift_pictures(self, refusal: str, body: bytes) -> Body:
        found = lift_pictures(fields := json_object(body), refusal)
        return Body(packed_lift(fields, found))

    def chained(self, body: bytes) -> Result:
        """What a body continues: previous_response_id, and the id of a conversation; "" if neither."""
        return Result([*chained_of(json_object(body))])

    def check_lines(self, numbers: Seq[int], refusal: str, lines: bytes) -> Result:
        """Of each of these lines of a batch, which have these numbers, [custom_id, url, model, what is wrong
        with its body for this model], or only what is wrong with it."""
        found = []
        for number, line in zip(numbers, lines.split(b"\n")):
            try:
                read = read_line(number, line)
                found.append([read.custom_id, read.url, read.model, problem_of(
                    read, self.config.server, refusal)])
            except RequestError as error:
                found.append([str(error)])
        return Result(found)

    def read_line(self, number: int, identity: str, pictures: Seq, line: bytes) -> Result:
        line = json.dumps(fields_of(line, pictures)).encode() if pictures else line
        read = read_body_of(read_line(number, line, identity), self.config.server)
        return Result([self.admitted(read, {})])

    def read_body(self, reader: str, pictures: Seq, body: bytes) -> Result:
        return Result([self.admitted(read_answer(reader, fields_of(body, pictures), self.config.server), {})])

    def read_variants(self, indices: Seq[int], seed: int, pictures: Seq, body: bytes) -> Result:
        fields, rendered = fields_of(body, pictures), {}
        read = read_variants(fields, indices, seed, self.config.server)
        return Result([self.admitted(parsed, rendered) for parsed in read])

    def admitted(self, parsed: ParsedBody, rendered: dict) -> list:
        """A body whose prompts fit, packed."""
        admitted, lasting = asyncio.run(self.prompts.admit(parsed.request, rendered)), parsed.lasting()
        request = replace(lasting.request, dropped_messages=admitted.dropped_messages,
                          pictures=admitted.pictures)
        if self.config.server.settings.log_conversations and request.messages is not None:
            texts = tuple(Message(message.role, message.content) for message in parsed.request.messages or ())
            request = replace(request, messages=texts)
        return packed_body(replace(lasting, request=request), admitted.prompt_ids or ())

    def answer_text(self, route: str, pictures: Seq, body: bytes) -> Body:
        return Body(asyncio.run(read_text(route, fields_of(body, pictures), self.prompts)))


def fields_of(body: bytes, pictures: Seq) -> dict:
    """A body's fields, with (width, height, digest in base64) of the pictures that were lifted out of it."""
    fields = json_object(body)
    fill_in(fields, [Picture(width, height, b"", base64.b64decode(digest))
                     for width, height, digest in pictures])
    return fields
