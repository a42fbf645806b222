"""What a body says before its model is known: that model's name, what it continues, its pictures.

`open_body` parses a body, here or in a sandbox; nothing else does."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import is_text
from chatlm.front.api.batch_lines import Line, read_line
from chatlm.front.api.conversation import chained_of
from chatlm.front.api.fields import json_object
from chatlm.front.api.picture_parts import Lift, Lifted, fill_in, lift_pictures
from chatlm.front.api.tables import BODY_FIELDS

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Picture


KEPT_ROUTE = "/v1/responses"
MODEL_NAMES = {  # route -> the fields that may name its model, the first that does counts
    route: ("model", *(field.name for field in fields if field.means == "model"))
    for route, fields in BODY_FIELDS.items()}
LONGEST_NAME = 1000  # the start of a very long name is as unknown as all of it
SIZE = struct.Struct("<I")


class Chained(NamedTuple):
    """What a body continues; "" for what it does not name."""

    response: str = ""      # previous_response_id
    conversation: str = ""  # its id


@dataclass
class Envelope:
    """A body that is open. The files of its pictures are in `lift`; its fields have their numbers in their
    places until `show` says what each is."""

    fields: dict | None      # None: they are left in the sandbox that opened the body
    model: str               # the name of its model; "" if it has none
    names_model: bool        # is there any `model`, whatever that is?
    chained: Chained
    lift: Lift
    line: Line | None = None    # of a batch, whose body the fields are
    before: list | None = None  # the items that the body continues; None: it continues nothing
    shown: bool = False

    def show(self, pictures: Seq[Picture]):
        """Say of each picture in the fields what it is, once: several models may read them."""
        if pictures and not self.shown and self.fields is not None:
            fill_in(self.fields, pictures, self.before)
            self.shown = True

    def rest(self, size: int, most: int) -> bytes:
        """The fields as JSON, if at most `most` bytes of a body of this size are left without its pictures;
        else b""."""
        files = sum(len(data) for _, data in self.lift.files)
        text_bytes = size - files * 4 // 3
        if not files or text_bytes > 2 * most:  # base64 may have line breaks
            return b""
        try:
            text = json.dumps([self.fields, self.before]).encode()
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None
        return text if len(text) <= most else b""

    def packed(self, rest: bytes) -> bytes:
        """For the front. rest: the fields as JSON; b"": they stay here."""
        line = self.line
        problem = self.lift.problem
        head = {"model": self.model[:LONGEST_NAME], "names_model": self.names_model, "chained": self.chained,
                "line": line and [line.number, line.custom_id, line.url, line.id],
                "names": [name for name, _ in self.lift.files], "first": self.lift.first,
                "problem": problem and packed_problem(problem)}
        sections = [json.dumps(head).encode(), rest, *(data for _, data in self.lift.files)]
        return b"".join(part for section in sections for part in (SIZE.pack(len(section)), section))


def packed_problem(error: RequestError) -> dict:
    return {"message": str(error)[:1000], "status": error.status, "code": error.code, "param": error.param,
            "words": dict(error.words)}


def unpacked_envelope(data: bytes) -> Envelope:
    """What `Envelope.packed` packed."""
    sections = []
    begin = 0
    while begin < len(data):
        [size] = SIZE.unpack_from(data, begin)
        begin += SIZE.size
        sections.append(data[begin:begin + size])
        begin += size
    head, rest, *files = sections
    head = json.loads(head)
    fields, before = json.loads(rest) if rest else (None, None)
    problem = RequestError(**head["problem"]) if head["problem"] else None
    line = None
    if head["line"]:
        number, custom_id, url, line_id = head["line"]
        line = Line(number, custom_id, url, fields or {}, line_id)
    lift = Lift([*map(Lifted, head["names"], files)], head["first"], problem)
    return Envelope(fields, head["model"], head["names_model"], Chained(*head["chained"]), lift, line, before)


def open_body(route: str, number: int | None, raw: bytes | bytearray,
              before: bytes | bytearray | None = None) -> Envelope:
    """The body of a request to `route` or, with a number, of that line of a batch. before: a JSON list of the
    items that it continues. RequestError if it is no JSON object, or no such line."""
    line = None if number is None else read_line(number, bytes(raw))
    fields = line.body if line else json_object(raw)
    return envelope_of(fields, route, line, None if before is None else json.loads(before))


def envelope_of(fields: dict, route: str, line: Line | None = None, before: list | None = None) -> Envelope:
    """The envelope of fields that are parsed already. They lose their pictures."""
    route = line.url if line else route
    name = next(filter(None, map(fields.get, MODEL_NAMES[route])), "")
    continues = route == KEPT_ROUTE and not line
    return Envelope(
        fields, name if is_text(name) else "", fields.get("model") is not None,
        Chained(*chained_of(fields)) if continues else Chained(), lift_pictures(fields, before), line, before)
