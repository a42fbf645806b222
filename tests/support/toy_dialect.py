"""A dialect of the tests, as one would add it: this file, and a row as in toy_row.py. It writes lines."""

from chatlm.common.jsontext import dump
from chatlm.common.messages.requests import AnswerParams, Message, Piece
from chatlm.front.api import idle
from chatlm.front.api.dialect import Dialect, Form, TextForm
from chatlm.front.api.encode import Encoder
from chatlm.front.api.field_types import INTEGER, SWITCH, TEXT
from chatlm.front.api.fields import Field, parse_fields
from chatlm.front.api.readers import openai_request, parsed_body
from chatlm.front.api.tables import STOPS

SAY = Field("say", TEXT, "what to answer", required=True)
TOY_FIELDS = (
    SAY,
    Field("who", TEXT, "the model", means="model"),
    Field("most", INTEGER, "most tokens of the answer", 1, 99, means="max_tokens"),
    Field("lines", SWITCH, "send it as it comes", means="stream"),
    STOPS._replace(name="until", means="stop"),
    Field("loud", SWITCH, "in capitals", idle={"": idle.without_stream}),
)


def read(body, terms):
    values = parse_fields(body, TOY_FIELDS)
    messages = (Message("user", values["say"]),)
    request = openai_request(values, terms.known.settings, AnswerParams(), messages=messages)
    return parsed_body("toy", values, terms.known, request, {"loud": values.get("loud", False)})


async def count(body, terms):
    text = parse_fields(body, (SAY,))["say"]
    return dump({"tokens": len(terms.prompts.tokenizer.encode(text))})


class ToyEncoder(Encoder):
    """A line for each piece of an answer, and one for its end."""

    ping = b"~\n"
    content_type = "text/x-toy"

    def encode(self, event):
        if isinstance(event, Piece):
            text = event.text.upper() if self.parsed.details["loud"] else event.text
            return b"+%s\n" % dump(text)
        return b".%s\n" % event.reason.encode()

    @staticmethod
    def lone_failure(error):
        return b"!%s\n" % dump(str(error))

    def completion(self):
        yield dump({"model": self.model, "said": self.state.choices[0].text()})


DIALECT = Dialect({
    "/toy/say": Form(TOY_FIELDS, read, ToyEncoder),
    "/toy/count": TextForm((SAY,), count)})
