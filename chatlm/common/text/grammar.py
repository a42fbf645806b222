"""Grammars for llguidance, and the check that one compiles."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
from collections.abc import Mapping

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.common.memory import heap_bytes
from chatlm.common.text.formats import A_MARK, with_markers
from chatlm.common.text.notations import JSON, Notation
from chatlm.common.text.patterns import GRAMMAR_LIMITS, byte_vocabulary, check_patterns
from chatlm.common.text.schema_rules import JSON_TERMINALS, SchemaRules
from chatlm.common.text.schemas import schema_object


def json_grammar(schema: dict | bool, param: str, start: str = "start: object") -> str:
    """A grammar for llguidance: `start`, in which `object` follows this JSON schema. RequestError, about the
    field `param`, if it is too large; check_grammar decides whether it is valid."""
    return schema_grammar({"object": schema}, param, start)


def schema_grammar(schemas: Mapping[str, dict | bool], param: str, start: str,
                   notation: Notation | None = None) -> str:
    """A grammar for llguidance: `start`, and a rule for each of these JSON schemas; with a notation they are
    of functions' parameters."""
    require_llguidance(param)
    lines = [start, JSON_TERMINALS]
    left = LIMITS.grammar_characters
    try:
        for index, (name, schema) in enumerate(schemas.items()):
            schema = schema_object(schema)
            rules = SchemaRules(f"s{index}", schema, notation or JSON)
            if (rule := rules.arguments(schema) if notation else rules.rule(schema)) is None:
                raise ValueError("no value satisfies it")
            check_patterns(rules.patterns)
            added = [f"{name}: {rule}", *rules.lines]
            lines += added
            left -= sum(map(len, added))
            if left < 0:  # the rest is not worth while
                break
    except RecursionError:
        raise unusable_schema("it is nested too deeply", param) from None
    except (ValueError, LookupError) as error:
        raise unusable_schema(str(error), param) from None
    return lark_grammar("\n".join(lines), param)


def lark_grammar(grammar: str, param: str) -> str:
    """The grammar; RequestError if it is too large, not valid Unicode, or impossible to enforce."""
    require_llguidance(param)
    if len(grammar) > LIMITS.grammar_characters:
        raise unusable_schema(
            f"as a grammar it must have at most {LIMITS.grammar_characters} characters", param)
    if surrogate := A_MARK.search(grammar):
        raise unusable_schema(
            f"it has a lone surrogate, {json.dumps(surrogate[0])}, which no text has", param)
    return grammar


@functools.cache
def has_llguidance() -> bool:
    """Looked for once: that takes a millisecond, and a body may have hundreds of schemas."""
    return importlib.util.find_spec("llguidance") is not None


def require_llguidance(param: str):
    """RequestError, about the field `param`, if this server cannot constrain answers."""
    if not has_llguidance():
        raise RequestError(
            "this server cannot constrain answers: the Python package llguidance is not installed there",
            code="unsupported_response_format", param=param)


def unusable_schema(reason: str, param: str) -> RequestError:
    return RequestError(f"{param} cannot be enforced: {reason}", code="invalid_json_schema", param=param)


def check_grammar(source: str, param: str):
    """RequestError, about the field `param`, if no answer can match the grammar or it costs too much.

    The check itself may take long, and as much memory as the same grammar takes in a worker."""
    llguidance = importlib.import_module("llguidance")
    vocabulary = byte_vocabulary()
    source = with_markers(source, {})
    limits = llguidance.LLParserLimits(**GRAMMAR_LIMITS)
    before = heap_bytes()
    # a terminal that nothing matches is found only where an answer comes to it, so each is tried alone too
    alone = [f"start: {name}\n{name}: {text}" for name, text in INTERSECTION.findall(source)]
    for tried in (*alone, source):
        matcher = llguidance.LLMatcher(vocabulary, tried, log_level=0, limits=limits)
        matcher.compute_bitmask()
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
            raise unusable_schema(
                "no value satisfies it" if reason.startswith("NoExtension") else reason[:300], param)
    if heap_bytes() - before > LIMITS.grammar_bytes:
        raise unusable_schema(
            f"it is too complex: following it takes more than {LIMITS.grammar_bytes >> 20} MiB", param)


INTERSECTION = re.compile(r"^([A-Z][A-Z0-9_]*): (\(.* & .*\) & ~.*)$", re.MULTILINE)  # of several conditions
