"""What a body says before its model is known: that model's name, what the body continues, its pictures.

`open_body` parses a body, in the front or in a sandbox. Nothing else does."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import is_text
from chatlm.front.api.additions import NO_NAMES, NOTHING_ASKED, AddedNames, Asked, take_out
from chatlm.front.api.batch_lines import BatchLine, read_line
from chatlm.front.api.dialect import LONGEST_NAME, Chained, NamedServer, Reference, model_names
from chatlm.front.api.fields import json_object
from chatlm.front.api.picture_parts import Lift, Lifted, fill_in, lift_pictures
from chatlm.front.api.spoken import form_of

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Picture


MOST_SERVERS = 1000  # more tool servers than anybody has
SIZE = struct.Struct("<I")


@dataclass
class Envelope:
    """An open body. The files of its pictures are in `lift`. Where a picture was, `fields` has its index
    there, until `show` replaces the index with the picture's size and digest."""

    fields: dict | None      # None: they stay in the sandbox that opened the body
    model: str               # the name of its model; "" if it has none
    names_model: bool        # does it have a `model` at all, of whatever type?
    chained: Chained
    lift: Lift
    line: BatchLine | None = None    # the line of a batch that has these fields as its body
    before: list | None = None  # the items that the body continues; None: it continues nothing
    servers: tuple[NamedServer, ...] = ()  # the tool servers that it names
    offered: list | None = None  # their tools that its client may have; None: nothing is run for it
    asked: Asked = NOTHING_ASKED  # of annexes
    shown: bool = False

    def show(self, pictures: Seq[Picture]):
        """Put the size and digest of each picture into the fields. Does that once, although several models
        may read them."""
        if pictures and not self.shown and self.fields is not None:
            fill_in(self.fields, pictures, self.before)
            self.shown = True

    def rest(self, size: int, most: int) -> bytes:
        """The fields as JSON, if they take at most `most` bytes without the pictures; else b"".
        size: bytes of the whole body."""
        file_bytes = sum(len(data) for _, data in self.lift.files)
        text_bytes = size - file_bytes * 4 // 3
        if not file_bytes or text_bytes > 2 * most:  # twice: base64 may have line breaks
            return b""
        try:
            text = json.dumps([self.fields, self.before, self.offered]).encode()
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None
        return text if len(text) <= most else b""

    def packed(self, rest: bytes) -> bytes:
        """The envelope for the front. rest: the fields as JSON; b"": they stay here."""
        line = self.line
        problem = self.lift.problem
        head = {"model": self.model[:LONGEST_NAME], "names_model": self.names_model, "chained": self.chained,
                "line": line and [line.number, line.custom_id, line.url, line.id],
                "servers": [server._replace(label=server.label[:LONGEST_NAME], url=server.url[:LONGEST_NAME])
                            for server in self.servers[:MOST_SERVERS]],
                "asked": self.asked,
                "names": [name for name, _ in self.lift.files], "first": self.lift.first,
                "problem": problem and packed_problem(problem)}
        sections = [json.dumps(head).encode(), rest, *(data for _, data in self.lift.files)]
        return b"".join(part for section in sections for part in (SIZE.pack(len(section)), section))


def packed_problem(error: RequestError) -> dict:
    return {"message": str(error)[:1000], "status": error.status, "code": error.code, "param": error.param,
            "words": dict(error.words)}


def unpacked_envelope(data: bytes) -> Envelope:
    """Reverse `Envelope.packed`."""
    sections = []
    begin = 0
    while begin < len(data):
        [size] = SIZE.unpack_from(data, begin)
        begin += SIZE.size
        sections.append(data[begin:begin + size])
        begin += size
    head, rest, *files = sections
    head = json.loads(head)
    fields, before, offered = json.loads(rest) if rest else (None, None, None)
    problem = RequestError(**head["problem"]) if head["problem"] else None
    line = None
    if head["line"]:
        number, custom_id, url, line_id = head["line"]
        line = BatchLine(number, custom_id, url, fields or {}, line_id)
    lift = Lift([*map(Lifted, head["names"], files)], head["first"], problem)
    response, conversation, items = head["chained"]
    chained = Chained(response, conversation, tuple(Reference(*item) for item in items))
    return Envelope(fields, head["model"], head["names_model"], chained, lift, line, before,
                    tuple(NamedServer(*server) for server in head["servers"]), offered,
                    Asked(head["asked"][0], tuple((index, tool) for index, tool in head["asked"][1])))


def open_body(route: str, number: int | None, raw: bytes | bytearray, before: bytes | bytearray = b"null",
              offered: bytes | bytearray = b"null", referenced: bytes | bytearray = b"null",
              names: AddedNames = NO_NAMES) -> Envelope:
    """Parse the body of a request to `route` or, if it has a number, a line of a batch. Raises RequestError
    if it is no JSON object, or no such line. names: of what annexes add to it.

    JSON too: the items that it continues, the tools that it is offered, and the items that its input refers
    to, by their ids."""
    line = None if number is None else read_line(number, bytes(raw))
    fields = line.body if line else json_object(raw)
    items = json.loads(referenced)
    continuing = form_of(route).continuing if items else None
    if continuing:
        continuing.follow(fields, items)
    return make_envelope(fields, route, line, json.loads(before), json.loads(offered), names)


def make_envelope(fields: dict, route: str, line: BatchLine | None = None, before: list | None = None,
                  offered: list | None = None, names: AddedNames = NO_NAMES) -> Envelope:
    """The envelope of fields that are parsed already. Takes the pictures out of them, and what annexes
    add."""
    form = form_of(line.url if line else route)
    name = next(filter(None, map(fields.get, model_names(form.fields))), "")
    chained = Chained()
    servers: tuple[NamedServer, ...] = ()
    if not line:
        chained = form.continuing.chained(fields) if form.continuing else chained
        servers = tuple(form.servers(fields))
    asked = take_out(fields, names)
    return Envelope(
        fields, name if is_text(name) else "", fields.get("model") is not None, chained,
        lift_pictures(fields, before), line, before, servers, offered, asked)
