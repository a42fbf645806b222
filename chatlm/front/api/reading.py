"""Reads a body as the dialect of its path does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.front.admission.retrieval_prompts import check_task
from chatlm.front.api.dialect import Terms, TextForm, TextTerms
from chatlm.front.api.fields import header_words
from chatlm.front.api.ignored import idle_fields, unread
from chatlm.front.api.spoken import answer_form, form_of, path_of_form

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known, ParsedBody
    from chatlm.front.admission.prompts import PromptMaker
    from chatlm.front.api.dialect import Form


def read_answer(path: str, body: dict, known: Known, before: Seq | None = None,
                offered: Seq[Mapping] | None = None) -> ParsedBody:
    """Read a body that a model answers. before: the items that it continues; None: it continues nothing.
    offered: the tools that the server may run for it; None: it runs none."""
    path = path_of_form(path, names_model=body.get("model") is not None)
    form = answer_form(path)
    if known.infill is not None:  # of a model that is still loading, nobody knows what it can do
        check_task(known.embedder, form.task(known))
    parsed = form.read(body, Terms(known, before, offered))
    return replace(parsed, form=path, ignored_fields=ignored_fields(form, body, parsed, known))


def ignored_fields(form: Form, body: Mapping, parsed: ParsedBody, known: Known) -> tuple[str, ...]:
    """The fields of a body, which was read into `parsed`, that have no effect on its answer."""
    names = [*unread(body, form.fields), *idle_fields(body, form.fields, parsed, known),
             *form.idle(body, parsed, known)]
    return header_words(dict.fromkeys(names))


async def read_text(path: str, body: dict, known: Known, prompts: PromptMaker, client: str = "",
                    offered: Seq[Mapping] | None = None, before: Seq | None = None) -> bytes:
    """Read any other body. Returns a line with the fields that have no effect, followed by the text.
    offered, before: as for `read_answer`."""
    form = form_of(path)
    assert isinstance(form, TextForm)
    text = await form.read(body, TextTerms(known, prompts, client, offered, before))
    ignored = [*unread(body, form.fields), *form.idle(body, known)]
    return b"%s\n%s" % (", ".join(header_words(ignored)).encode(), text)
