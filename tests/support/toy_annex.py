"""An annex of the tests that uses all that a row may have. As a program: chat_server with this annex."""

import sys
from dataclasses import replace

import chat_server
from chatlm.common.commands import Command
from chatlm.common.errors import ConfigError, RequestError
from chatlm.common.messages.requests import Message, PartSays
from chatlm.front.annex import Annex, with_database
from chatlm.front.annexes import ANNEXES
from chatlm.front.api.additions import AddedField, ServerTool
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.field_types import INTEGER, TEXT
from chatlm.front.api.fields import Field
from chatlm.front.server.responses import json_response
from chatlm.front.server.routes import Route
from chatlm.front.server.watching import Watcher

WORDS = Field("toy", TEXT, "words that the toy puts before the question")
TIMES = Field("times", INTEGER, "how often the toy says it", 1, 3)


class Toy:
    """Its room. `did`: what happened to it."""

    def __init__(self, front):
        self.front = front
        self.did = ["made"]
        self.counts = []            # what the part of the engine said

    async def start(self):
        self.did.append("started")

    async def close(self):
        self.did.append("closed")

    async def handle_look(self, http):
        kept = await self.front.store.run(lambda db: db.execute("SELECT owner, text FROM toys").fetchall())
        return json_response({"did": self.did, "kept": kept})

    async def prompted(self, parsed, caller, pool):
        words = parsed.added.get("toy")
        if words is None:                                   # it is asked for its tool alone
            return parsed
        if words == "unwanted":
            raise RequestError("the toy does not say this", param="toy")
        self.did.append(f"prompted of {caller.route}")
        if self.front.store:
            await self.front.store.run(lambda db: db.execute(
                "INSERT INTO toys (owner, text) VALUES (?, ?)", (caller.owner, words)))
        messages = (Message("system", words), *(parsed.request.messages or ()))
        return replace(parsed, request=replace(parsed.request, messages=messages))

    def prepared(self, parsed):
        self.did.append("prepared")
        return replace(parsed, request=replace(parsed.request, max_tokens=3))

    def around(self, begin, ask):
        self.did.append(f"around {ask.model}")
        return begin(ask)

    def watch(self, request, state):
        return Counts(self.counts)

    async def echo(self, call):
        from chatlm.front.tools.results import ToolResult
        if call.arguments.get("text") == "unsaid":
            raise RequestError("The toy can't say that")
        return ToolResult(str(call.arguments.get("text")) * call.options.get("times", 1))

    def metric_families(self, families):
        yield families.GaugeMetricFamily("toy_uses", "what it did", len(self.did))


class Counts(Watcher):
    def __init__(self, counts):
        self.counts = counts

    def comes(self, event):
        if isinstance(event, PartSays):
            self.counts.append((event.part, event.choice, *event.value))


def toy_tables():
    from chatlm.front.store.schema import counted
    return ("CREATE TABLE toys (id INTEGER PRIMARY KEY, owner TEXT NOT NULL, text TEXT NOT NULL);",
            counted("toys", "512 + LENGTH(CAST({row}.text AS BLOB))"))


def toy_lines(words):
    if not words:
        raise ConfigError("toy: WORDS are missing")
    yield from words


TOY_COMMAND = Command("toy", "which says its words", "WORDS", lines=lambda words, program: toy_lines(words))
TOY_ROUTES: tuple[Route[Toy], ...] = (
    Route("GET", "/toy", OPENAI, lambda toy, http: toy.handle_look(http), "what the toy did"),
)
TOY = Annex(
    "toy", lambda: Toy, TOY_ROUTES, with_database, lambda toy: toy.start(), lambda toy: toy.close(),
    fields=(AddedField(WORDS, ("/chat/completions", "/v1/chat/completions", "/v1/responses")),),
    tools=(ServerTool("echo", "Say it.", {"type": "object", "properties": {"text": {"type": "string"}}},
                      lambda toy, call: toy.echo(call), (TIMES,)),),
    needs="--database", prompt=lambda toy, parsed, caller, pool: toy.prompted(parsed, caller, pool),
    joins=lambda parsed: "toy" in parsed.added, prepare=lambda toy, parsed: toy.prepared(parsed),
    around=lambda toy, begin, ask: toy.around(begin, ask), tables=toy_tables, part="counter",
    watch=lambda toy, request, state: toy.watch(request, state),
    command=TOY_COMMAND, metrics=lambda toy, families: toy.metric_families(families))
# the same on a server without a database, and without the tables
FREE = replace(TOY, wanted=lambda front: True, tables=None)

if __name__ == "__main__":
    # its workers are those of any server
    sys.exit(chat_server.main(annexes=(*ANNEXES, replace(TOY, part=""))))
