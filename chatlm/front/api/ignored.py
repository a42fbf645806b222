"""Finds the fields of a body that have no effect, for the response's header X-Ignored-Fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.text.formats import knows_of_thinking, thoughts_of
from chatlm.front.api.field_types import BUDGETS, EFFORT_BUDGETS, LOGPROBS_OF_TEXT
from chatlm.front.api.fields import header_words, member_of
from chatlm.front.api.tables import BODY_FIELDS

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
    read = {meaning: name for name, meaning in meanings.items()}
    yield from (name for name, meaning in meanings.items() if read[meaning] != name)


class Idle(NamedTuple):
    """Fields that are read but have no effect in some requests."""

    names: tuple[str, ...]
    when: Callable[[ParsedBody, Known], object]


IDLE = (
    # the grammar alone decides where the answer ends
    Idle(("ignore_eos", "min_tokens", "stop_on_repetition"),
         lambda parsed, known: parsed.request.params.grammar),
    Idle(("stop_token_ids",), lambda parsed, known: parsed.request.params.grammar
         and known.never_written.issuperset(parsed.request.params.stop_token_ids)),
    # required calls have no content beside them, in which alone stop strings are looked for
    Idle(("stop", "stop_sequences", "options.stop"), lambda parsed, known:
         parsed.request.params.grammar and parsed.request.params.grammar_param == "tools"),
    Idle(("resumable", "progress", "stream_options"), lambda parsed, known: not parsed.stream),
    Idle(BUDGETS, lambda parsed, known: not thoughts_of(known.template)),
    Idle((*EFFORT_BUDGETS, "thinking.type", "enable_thinking"), lambda parsed, known: not (
        thoughts_of(known.template) if parsed.request.params.thinking_budget is not None
        else knows_of_thinking(known.template))),
    Idle(("raw_scores", "return_text", "truncate"),  # TEI's
         lambda parsed, known: parsed.api in ("rerank", "llama rerank")),
    Idle(("return_documents",), lambda parsed, known: parsed.api == "tei rerank"),
    Idle(("instruction",), lambda parsed, known: parsed.api == "cosines"),
    Idle(("store",), lambda parsed, known: parsed.api == "responses" and known.settings.database is None),
    Idle(("input_type",),  # the model has no prompt for these
         lambda parsed, known: parsed.request.retrieval and not parsed.request.retrieval.prompt),
    # Chat Completions refuses it
    Idle(("top_logprobs",), lambda parsed, known: parsed.request.params.logprobs is None),
    Idle(("system", "think"),  # a text to continue has no conversation around it
         lambda parsed, known: parsed.api == "ollama generate" and parsed.request.prompts),
)
OFF = ("none", "disabled", "false", "False")  # values that ask for nothing


def idle(body: Mapping, parsed: ParsedBody, known: Known) -> Iterator[str]:
    """The fields that have no effect on this answer."""
    for names, when in IDLE:
        sent = [name for name in names if (value := member_of(body, name)) and value not in OFF]
        yield from sent if sent and when(parsed, known) else ()
    if parsed.api == "responses":
        yield from (f"include.{name}" for name in body.get("include") or () if name != LOGPROBS_OF_TEXT)
    if parsed.api in ("native", "chat", "functions"):
        variables = body.get("chat_template_kwargs") or {}
        yield from (f"chat_template_kwargs.{name}" for name in variables if name != "thinking_budget"
                    and not re.search(rf"\b{re.escape(name)}\b", known.template))


def ignored_fields(route: str, body: Mapping, parsed: ParsedBody, known: Known) -> tuple[str, ...]:
    """The fields of a body that was read into `parsed` that have no effect on its answer."""
    if parsed.api != "native" and route == "/chat/completions":  # see read_native_body
        route = "/v1/chat/completions"
    names = [*unread(body, BODY_FIELDS[route]), *idle(body, parsed, known)]
    return header_words(dict.fromkeys(names))
