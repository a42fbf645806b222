"""What can be asked of an open body. Each task runs here for a small body, in a sandbox for a large one.

A new task is one function here and its caller in intake.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence as Seq
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.front.api.batch_lines import problem_of, read_body_of, read_line
from chatlm.front.api.readers import read_answer, read_text, read_variants

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


async def answer(reading: Reading, route: str) -> list[ParsedBody]:
    """The body of a route that answers."""
    return [read_answer(route, reading.fields, reading.known, reading.body.before)]


async def line(reading: Reading) -> list[ParsedBody]:
    """The body in a line of a batch."""
    assert reading.body.line
    return [read_body_of(reading.body.line, reading.known)]


async def variants(reading: Reading, indices: Seq[int], seed: int) -> list[ParsedBody]:
    """The questions of some of the answers to compare."""
    return read_variants(reading.fields, indices, seed, reading.known)


async def text(reading: Reading, route: str) -> bytes:
    """What a route that needs no worker answers, after a line with the fields that have no effect."""
    assert reading.prompts
    return await read_text(route, reading.fields, reading.prompts, reading.client)


TASKS: dict[str, Callable[..., Awaitable[Any]]] = {
    task.__name__: task for task in (answer, line, variants, text)}


class NumberedLine(NamedTuple):
    """A line of a file that asks for something."""

    number: int  # from 1; blank lines count too
    text: bytes


class CheckedLine(NamedTuple):
    """A line of a batch, before it is run."""

    problem: str                  # what is wrong with it; "" if nothing
    custom_id: str | None = None  # None: it is no request of a batch
    url: str | None = None
    model: str | None = None      # that it names; "" if none


def checked_lines(lines: Iterable[NumberedLine], known: Known, refusal: str) -> list[CheckedLine]:
    """What each of these lines is, and what is wrong with its body for the model that is known. refusal: why
    this model cannot see pictures."""
    found = []
    for number, text in lines:
        try:
            read = read_line(number, text)
        except RequestError as error:
            found.append(CheckedLine(str(error)))
        else:
            found.append(CheckedLine(problem_of(read, known, refusal), read.custom_id, read.url, read.model))
    return found
