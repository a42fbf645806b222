"""Finds the fields of a body that have no effect, for the response's header X-Ignored-Fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.text.tokenizer import PROMPT_VARIABLES
from chatlm.front.api.fields import value_at

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known, ParsedBody
    from chatlm.front.api.fields import Field


def unread(body: Mapping, fields: Seq[Field]) -> Iterator[str]:
    """The fields that nothing reads: unknown ones, unknown members of objects (`options.mirostat`), and those
    that another field with the same meaning overrides."""
    known = {field.name: field for field in fields}
    for name, value in body.items():
        if value is not None and name not in known:
            yield name
        elif isinstance(value, dict) and (members := known[name].members):
            yield from (f"{name}.{member}" for member, inner in value.items()
                        if inner is not None and member not in members)
    meanings = {field.name: field.means or field.name for field in fields if body.get(field.name) is not None}
    last = {meaning: name for name, meaning in meanings.items()}  # of several names, the last one is read
    yield from (name for name, meaning in meanings.items() if last[meaning] != name)


OFF = ("none", "disabled", "false", "False")  # values that ask for nothing


def idle_fields(body: Mapping, fields: Seq[Field], parsed: ParsedBody, known: Known,
                above: str = "") -> Iterator[str]:
    """The fields that have no effect on this answer, by the conditions in their rows. above: a prefix of
    their names."""
    rows = {field.name: field for field in fields}
    for name in filter(rows.__contains__, body):
        for member, is_idle in rows[name].idle.items():
            path = f"{name}.{member}" if member else name
            value = value_at(body, path)
            if value and value not in OFF and is_idle(parsed, known):
                yield above + path


def idle_variables(body: Mapping, parsed: ParsedBody, known: Known) -> Iterator[str]:
    """The variables in `chat_template_kwargs` that the template does not name, or that it has from other
    fields."""
    for name in body.get("chat_template_kwargs") or {}:
        is_in_template = re.search(rf"\b{re.escape(name)}\b", known.template)
        if name in PROMPT_VARIABLES or name != "thinking_budget" and not is_in_template:
            yield f"chat_template_kwargs.{name}"
