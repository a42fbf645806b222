"""The commands `compare` and `score`: several models with the same question or text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence as Seq
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TYPE_CHECKING
from urllib.parse import quote

from chatlm.common.config import LIMITS, ModelEntry
from chatlm.common.errors import ConfigError, visible
from chatlm.common.files import read_text_of
from chatlm.common.jsontext import as_json, dump
from chatlm.common.log import ProgressDisplay
from chatlm.common.messages.requests import Delta
from chatlm.front.api.encode import calculator_member
from chatlm.front.comparison import Comparison, compared_models_of, with_ids
from chatlm.front.evals.bits import score_text
from chatlm.front.evals.scores import PoolScorer
from chatlm.front.intake.budget import Holding
from chatlm.front.intake.intake import Intake, loaded_tokenizer
from chatlm.front.intake.opened_body import Caller
from chatlm.front.pool.many import many_models
from chatlm.front.server.describe import kind_of
from chatlm.terminal.calculator import MarkedText, calls_of_event
from chatlm.terminal.chat import NO_ROLES, duration, prompt_text
from chatlm.terminal.conversation import PARAMETERS
from chatlm.terminal.remote import RemotePool, identified, open_pool
from chatlm.terminal.remote_streams import compared_at

if TYPE_CHECKING:
    from chatlm.common.config import Settings


class Column:
    """One of the compared answers, as far as it has arrived."""

    def __init__(self):
        self.parts = {"token": "", "reasoning": ""}
        self.calls: list[dict] = []         # of the calculator, in its text
        self.marks = MarkedText()
        self.new = ""                       # text that has not been shown yet
        self.began = False                  # has its name been shown?
        self.end: dict[str, Any] = {}
        self.differs: dict | None = None

    def note(self) -> str:
        """The note below its text."""
        if "error" in self.end:
            return f"failed: {self.end['error']['message']}"
        count = self.end["usage"]["completion_tokens"]
        words = [f"{count} tokens, {self.end['finish_reason']}"]
        if self.differs:
            first, own = ("the end" if value is None else f"{value:.1%}"
                          for value in self.differs["probabilities"])
            words.append(f"differs from the first answer from token {self.differs['position']} on: "
                         f"{first} there, {own} here")
        return "; ".join(words)

    def as_json(self) -> str:
        differs = self.differs and {name: self.differs[name] for name in ("position", "probabilities")}
        more = {"reasoning": self.parts["reasoning"]} if self.parts["reasoning"] else {}
        more |= calculator_member(self.calls)
        return as_json({"text": self.parts["token"], **more, **self.end, "differs": differs})

    def take(self, event: Mapping):
        """Note what is new of it."""
        for name in self.parts.keys() & event.keys():
            self.parts[name] += event[name]
        said = [Delta("text", event.get("token", ""))]
        for call in calls_of_event(event.get("calculator")):
            self.calls.append(call)
            said.append(Delta("calculator", as_json(call)))
        self.new += "".join(map(self.marks.push, said)) if sys.stdout.isatty() else event.get("token", "")


async def compare(settings: Settings) -> int:
    """The `compare` command: prints the answers one below the other; returns 1 if one failed."""
    names = [entry.path for entry in settings.several]
    if not 2 <= len(names) <= LIMITS.compared:
        raise ConfigError(f"compare takes 2 to {LIMITS.compared} MODELs, not {len(names)}; the "
                          "question comes after -p")
    if len({*names}) < len(names):
        raise ConfigError("compare: each MODEL must be different; /v1/compare takes `variants` of one")
    text = prompt_text(settings)
    columns = [Column() for _ in names]
    turn = 0
    messages = []
    if settings.system:
        messages.append({"role": "system", "content": settings.system})
    messages.append({"role": "user", "content": text})
    parameters = {name: getattr(settings, name) for name in PARAMETERS}
    body = {"models": names, "messages": messages,
            **{name: value for name, value in parameters.items() if value is not None}}
    async with aclosing(answers_of(settings, body)) as events:
        async for event in events:
            if "done" in event:
                break
            content = event.get("differs", event)
            column = columns[content["index"]]
            if "differs" in event:
                column.differs = content
            elif "finish_reason" in event:
                column.end = {name: value for name, value in event.items() if name != "index"}
            column.take(event)
            while turn < len(columns) and not settings.json and show(columns[turn], names[turn]):
                turn += 1
    if settings.json:
        print("\n".join(column.as_json() for column in columns), flush=True)
    return int(any("error" in column.end for column in columns))


def show(column: Column, name: str) -> bool:
    """Print the new part of an answer; True once it is complete."""
    new = column.new
    column.new = ""
    if not column.began and (new or column.end):
        column.began = True
        print(f"== {visible(name)}", flush=True)
    new = visible(new) if sys.stdout.isatty() else new
    print(new, end="" if not column.end else "\n", flush=True)
    if column.end:
        print(visible(column.note()), file=sys.stderr)
    return bool(column.end)


def as_wanted(body: dict, settings: Settings, kinds: Seq[str]) -> dict:
    """The body of /v1/compare: if all of the models are for texts, and --conversation does not say otherwise,
    the question is a text that they continue."""
    in_turns = settings.conversation
    if in_turns is None:
        in_turns = any(kind != "text" for kind in kinds)
    if in_turns:
        return body
    if settings.system:
        print(NO_ROLES, file=sys.stderr)
    return {"prompt": body["messages"][-1]["content"],
            **{name: value for name, value in body.items() if name != "messages"}}


async def answers_of(settings: Settings, body: dict) -> AsyncGenerator[dict, None]:
    """The events of /v1/compare, from the server at --url or from models loaded here."""
    if settings.url:
        remote = RemotePool(replace(settings, model=None))
        try:
            await remote.start()
            entries = [await remote.get(f"v1/models/{quote(name)}") for name in body["models"]]
            body = as_wanted(body, settings, [str(entry.get("type")) for entry in entries])
            async with aclosing(compared_at(remote, body)) as events:
                async for event in events:
                    yield event
        finally:
            await remote.close()
        return
    models = many_models(settings)
    intake = Intake(models)
    models.on_progress = progress = ProgressDisplay()
    try:
        await models.start()
        await models.wait_ready()
        progress.close()

        kinds = [kind_of(loaded_tokenizer(models.find(name).pool)) for name in body["models"]]
        body = as_wanted(body, settings, kinds)

        with Holding(intake.budget, "") as holding:
            caller = Caller("/v1/compare", client="", owner="")
            async with intake.opened(caller, dump(body), times=LIMITS.compared) as opened_body:
                compared, _ = await compared_models_of(intake, opened_body, holding)
            compared = with_ids(compared, lambda works: [request for _, request in works])
            async with Comparison(compared) as comparison:
                async for event in comparison.events():
                    yield event
    finally:
        progress.close()
        await models.close()


async def score(settings: Settings) -> int:
    """The `score` command: prints a line for each model."""
    if settings.text is None:
        raise ConfigError("score needs --text FILE, the text to score")
    text = read_text_of(settings.text, "--text")
    for entry in settings.several or (ModelEntry(""),):
        one_model = replace(settings, model=entry.path or None, several=())
        async with open_pool(one_model) as pool:
            assert not isinstance(pool, RemotePool)  # the command has no --url
            name = entry.path or pool.model_name
            began_s = time.monotonic()
            scored = await score_text(PoolScorer(pool), text)
        if settings.json:
            print(json.dumps({"model": name, **pool.checkpoint, **scored.as_json()}), flush=True)
        else:
            shown = visible(identified(name, pool.checkpoint))
            print(f"{scored.bits_per_byte:.4f} bits per byte: {shown}", flush=True)
        print(f"{scored.tokens:,} tokens of {scored.bytes:,} bytes in "
              f"{duration(time.monotonic() - began_s)}", file=sys.stderr)
    return 0
