"""What a dialect is: the kinds of bodies of an API, each with its fields, its reader and its encoder.

A dialect is one file in chatlm/front/api/dialects/, imported for the first body that needs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple, TYPE_CHECKING


if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import KeptItem, Known, ParsedBody
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.admission.prompts import PromptMaker
    from chatlm.front.api.encode import Encoder
    from chatlm.front.api.fields import Field


class Terms(NamedTuple):
    """On what terms a body with an answer is read, besides what it says itself."""

    known: Known
    before: Seq | None = None            # the items that it continues; None: it continues nothing
    offered: Seq[Mapping] | None = None  # the tools that the server may run for it; None: it runs none


class TextTerms(NamedTuple):
    """The same for a body whose answer needs no worker."""

    known: Known
    prompts: PromptMaker
    client: str = ""                     # takes turns with other clients
    offered: Seq[Mapping] | None = None
    before: Seq | None = None


LONGEST_NAME = 1000  # of a model, an item or a tool server; a longer one is cut: its start is as unknown


class NamedServer(NamedTuple):
    """A tool server that a body names, not checked yet."""

    param: str               # where the body names it
    label: str
    url: str = ""            # that the body says it has; "": it says none
    must_run: bool = False   # refuse the body if it does not run: the answer itself could not say so


class Reference(NamedTuple):
    """An item of the input that stands for an item of a kept response."""

    index: int  # in the input
    id: str     # of the item that it stands for


class Chained(NamedTuple):
    """What a body continues; "" or () for what it does not name."""

    response: str = ""      # previous_response_id
    conversation: str = ""  # its id
    items: Seq[Reference] = ()  # those of kept responses to which its input refers


class Continuing(NamedTuple):
    """How bodies continue what is kept. Both are asked of bodies that nobody has checked."""

    chained: Callable[[Mapping], Chained]
    follow: Callable[[dict, Mapping[str, dict]], None]  # puts items, by their ids, where it refers to them


class KeptAnswer(NamedTuple):
    """An answer as it is kept."""

    items: Seq[KeptItem]  # what a later body can continue or refer to
    body: bytes           # the whole answer


# Renders the answer of an encoder, which has ended unless a status says why not, perhaps with an error
Keep = Callable[[Any, str, "ChatServerError | None"], KeptAnswer]


def answers(known: Known) -> str:
    return "answer"


def nothing_more(*_) -> Iterator[str]:
    return iter(())


def names_no_servers(body: Mapping) -> Iterable[NamedServer]:
    return ()


def unstreamed(body: dict) -> dict:
    return body | {"stream": False}


@dataclass(frozen=True)
class Form:
    """A kind of body that a model answers."""

    fields: tuple[Field, ...]
    read: Callable[[dict, Terms], ParsedBody]
    encoder: Callable[[ParsedBody, str, Tokenizer | None], Encoder]  # its class: frames, pings, whole bodies
    task: Callable[[Known], str] = answers  # what its model must be able to do: answer, embed or rank
    # what else of a body has no effect on this answer, besides fields by their rows
    idle: Callable[[Mapping, ParsedBody, Known], Iterator[str]] = nothing_more
    # the tool servers that a body names; of dialects whose answers may have calls that the server runs
    servers: Callable[[Mapping], Iterable[NamedServer]] = names_no_servers
    continuing: Continuing | None = None
    alone: Callable[[dict], dict] = unstreamed  # a body without what concerns more than its answer
    keep: Keep | None = None  # renders an answer as it is kept; None: none is


@dataclass(frozen=True)
class TextForm:
    """A kind of body whose answer is a text that needs no worker."""

    fields: tuple[Field, ...]
    read: Callable[[dict, TextTerms], Awaitable[bytes]]
    idle: Callable[[Mapping, Known], Iterator[str]] = nothing_more
    servers: Callable[[Mapping], Iterable[NamedServer]] = names_no_servers
    continuing: Continuing | None = None


class Dialect(NamedTuple):
    """The forms of a dialect, by their paths. Two paths may have one form."""

    forms: Mapping[str, Form | TextForm]


def model_names(fields: Iterable[Field]) -> tuple[str, ...]:
    """The fields that may name a body's model; the first one that is set counts."""
    return ("model", *(field.name for field in fields if field.means == "model"))


def may_run_tools(form: Form | TextForm) -> bool:
    """May the server itself run tools for such a body?"""
    return form.servers is not names_no_servers
