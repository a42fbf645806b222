"""What a body says before its model is known: that model's name, what the body continues, its pictures.

`open_body` parses a body, in the front or in a sandbox. Nothing else does."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.common.jsontext import is_text
from chatlm.front.api.additions import NO_NAMES, NOTHING_ASKED, AddedNames, Asked, take_out
from chatlm.front.api.batch_lines import Line, read_line
from chatlm.front.api.mcp_messages import servers_of_message
from chatlm.front.api.mcp_tools import NamedServer, servers_of_response
from chatlm.front.api.message_readers import Reference, continued_ids, follow_references, references_in
from chatlm.front.api.fields import json_object, within_limit
from chatlm.front.api.picture_parts import Lift, Lifted, fill_in, lift_pictures
from chatlm.front.api.tables import BODY_FIELDS

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Picture


KEPT_ROUTE = "/v1/responses"
MODEL_NAMES = {  # route -> the fields that may name its model; the first one that is set counts
    route: ("model", *(field.name for field in fields if field.means == "model"))
    for route, fields in BODY_FIELDS.items()}
NAMED_SERVERS = {  # route -> finds the tool servers that its body names
    KEPT_ROUTE: servers_of_response, "/v1/messages": servers_of_message,
    "/v1/messages/count_tokens": servers_of_message}
LONGEST_NAME = 1000  # a longer name is cut: its start is just as unknown
MOST_SERVERS = 1000  # more tool servers than anybody has
MOST_REFERENCES = 4096  # of a body, to kept items
SIZE = struct.Struct("<I")


class Chained(NamedTuple):
    """What a body continues; "" or () for what it does not name."""

    response: str = ""      # previous_response_id
    conversation: str = ""  # its id
    items: Seq[Reference] = ()  # those of kept responses to which its input refers


@dataclass
class Envelope:
    """An open body. The files of its pictures are in `lift`. Where a picture was, `fields` has its index
    there, until `show` replaces the index with the picture's size and digest."""

    fields: dict | None      # None: they stay in the sandbox that opened the body
    model: str               # the name of its model; "" if it has none
    names_model: bool        # does it have a `model` at all, of whatever type?
    chained: Chained
    lift: Lift
    line: Line | None = None    # the line of a batch that has these fields as its body
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
        line = Line(number, custom_id, url, fields or {}, line_id)
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
    if items:
        follow_references(fields, items)
    return make_envelope(fields, route, line, json.loads(before), json.loads(offered), names)


def make_envelope(fields: dict, route: str, line: Line | None = None, before: list | None = None,
                  offered: list | None = None, names: AddedNames = NO_NAMES) -> Envelope:
    """The envelope of fields that are parsed already. Takes the pictures out of them, and what annexes
    add."""
    route = line.url if line else route
    name = next(filter(None, map(fields.get, MODEL_NAMES[route])), "")
    chained = Chained()
    servers: tuple[NamedServer, ...] = ()
    if route == KEPT_ROUTE and not line:
        chained = Chained(*continued_ids(fields), checked_references(fields))
    if route in NAMED_SERVERS and not line:
        servers = tuple(NAMED_SERVERS[route](fields))
    asked = take_out(fields, names)
    return Envelope(
        fields, name if is_text(name) else "", fields.get("model") is not None, chained,
        lift_pictures(fields, before), line, before, servers, offered, asked)


def checked_references(fields: dict) -> tuple[Reference, ...]:
    """The references in the input of a response. Raises RequestError for too many, and for two to one
    item."""
    references = (*references_in(fields),)
    within_limit("items of type item_reference", len(references), MOST_REFERENCES, "input")
    first: dict[str, int] = {}
    for index, name in references:
        before = first.setdefault(name, index)
        if before != index:
            raise RequestError(f"input[{index}] and input[{before}] refer to the same item, {shown(name)}",
                               code="invalid_value", param=f"input[{index}]")
    return tuple(reference._replace(id=reference.id[:LONGEST_NAME]) for reference in references)
