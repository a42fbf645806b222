"""The tasks that read an open body. Each runs in the front for a small body, in a sandbox for a large one.

A new task is one function here and its caller in intake.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.front.api.batch_lines import read_line
from chatlm.front.api.dialects.own import read_variants
from chatlm.front.api.reading import read_answer, read_text

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known, ParsedBody
    from chatlm.front.admission.prompts import PromptMaker
    from chatlm.front.intake.envelope import Envelope


class Reading(NamedTuple):
    """An open body, and the model that reads it."""

    body: Envelope
    known: Known
    prompts: PromptMaker | None = None  # None: there is no tokenizer yet
    client: str = ""

    @property
    def fields(self) -> dict:
        assert self.body.fields is not None, "the fields of this body are in a sandbox"
        return self.body.fields


async def answer(reading: Reading, route: str, changed_by: Seq[str] = ()) -> list[ParsedBody]:
    """Read the body of a route that answers. changed_by: the annexes that may change its prompt."""
    body = reading.body
    parsed = read_answer(route, reading.fields, reading.known, body.before, body.offered)
    return [replace(parsed, changed_by=tuple(changed_by))]


async def line(reading: Reading) -> list[ParsedBody]:
    """Read the body in a line of a batch."""
    assert reading.body.line
    return [reading.body.line.read_body(reading.known)]


async def variants(reading: Reading, indices: Seq[int], seed: int) -> list[ParsedBody]:
    """Read what a comparison asks of one model. indices: the numbers of its answers."""
    return read_variants(reading.fields, indices, seed, reading.known)


async def text(reading: Reading, route: str) -> bytes:
    """The response of a route that needs no worker, after a line that names the fields without effect."""
    assert reading.prompts
    return await read_text(route, reading.fields, reading.known, reading.prompts, reading.client,
                           reading.body.offered, reading.body.before)


TASKS: dict[str, Callable[..., Awaitable[Any]]] = {
    task.__name__: task for task in (answer, line, variants, text)}


class NumberedLine(NamedTuple):
    """A line of a batch file that is not blank."""

    number: int  # from 1; blank lines count too
    text: bytes


class CheckedLine(NamedTuple):
    """What a line of a batch asks for, and what is wrong with it."""

    problem: str                  # ""; or what is wrong
    custom_id: str | None = None  # None: the line is no request of a batch
    url: str | None = None
    model: str | None = None      # the model that it names; "": none


def checked_lines(lines: Iterable[NumberedLine], known: Known | None, refusal: str) -> list[CheckedLine]:
    """Check lines of a batch for one model. known: None: the model loads, so only their form is checked.
    refusal: why this model cannot see pictures."""
    checked = []
    for number, text in lines:
        try:
            read = read_line(number, text)
        except RequestError as error:
            checked.append(CheckedLine(str(error)))
        else:
            problem = read.problem(known, refusal) if known else ""
            checked.append(CheckedLine(problem, read.custom_id, read.url, read.model))
    return checked
