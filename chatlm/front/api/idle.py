"""Conditions under which a field has no effect on an answer. The rows of the tables name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.text.formats import knows_of_thinking, thoughts_of

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known, ParsedBody


def under_a_grammar(parsed: ParsedBody, known: Known) -> bool:
    """The grammar alone decides where the answer ends."""
    return bool(parsed.request.params.grammar)


def never_written(parsed: ParsedBody, known: Known) -> bool:
    """None of the stop tokens can be part of what the grammar allows."""
    params = parsed.request.params
    return bool(params.grammar) and known.never_written.issuperset(params.stop_token_ids)


def in_required_calls(parsed: ParsedBody, known: Known) -> bool:
    """Stop strings are looked for in the content alone, and required calls have none."""
    params = parsed.request.params
    return bool(params.grammar) and params.grammar_param == "tools"


def without_stream(parsed: ParsedBody, known: Known) -> bool:
    return not parsed.stream


def without_thoughts(parsed: ParsedBody, known: Known) -> bool:
    """The model does not mark its thoughts, so none can be counted."""
    return not thoughts_of(known.template)


def without_thinking(parsed: ParsedBody, known: Known) -> bool:
    """Nothing can turn the model's thinking on or off: neither its template nor, for a budget, its marks."""
    if parsed.request.params.thinking_budget is not None:
        return not thoughts_of(known.template)
    return not knows_of_thinking(known.template)


def without_logprobs(parsed: ParsedBody, known: Known) -> bool:
    """Chat Completions refuses such a request."""
    return parsed.request.params.logprobs is None


def without_tool_rounds(parsed: ParsedBody, known: Known) -> bool:
    """The server calls no tools for this answer."""
    return parsed.plan is None


def without_a_database(parsed: ParsedBody, known: Known) -> bool:
    return known.settings.database is None
