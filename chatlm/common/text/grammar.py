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


JSON_STYLE = {  # leaves the model no choice of whitespace
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: dict, param: str, start: str = "start: object") -> str:
    """A grammar for llguidance: `start`, in which `object` follows this JSON schema. RequestError, about the
    field `param`, if it is too large; check_grammar decides whether it is valid."""
    return schema_grammar({"object": schema}, param, start)


def schema_grammar(schemas: Mapping[str, dict], param: str, start: str) -> str:
    """A grammar for llguidance: `start`, and a rule for each of these JSON schemas."""
    try:
        return lark_grammar("\n".join([start, *(
            f"{name}: %json {schema_json({**schema, 'x-guidance': JSON_STYLE})}"
            for name, schema in schemas.items())]), param)
    except RecursionError:
        raise unusable_schema("it is nested too deeply", param) from None
    except ValueError as error:
        raise unusable_schema(str(error), param) from None


def schema_json(schema: Mapping) -> str:
    """A schema as JSON for a grammar, in which lone surrogates stay, for lark_grammar to see, and what
    with_markers would take for a marker is escaped. ValueError for numbers that JSON does not have."""
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False).replace("<[", "\\u003c[")
    except ValueError:
        raise ValueError("it has a number that is not finite, such as NaN or 1e999") from None


def in_slashes(pattern: str) -> str:
    """A regular expression as it is written between slashes, on one line."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", pattern).replace("\n", "\\n")


def lark_grammar(grammar: str, param: str) -> str:
    """The grammar; RequestError if it is too large or no whole Unicode, or nothing can enforce it."""
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(
            "this server cannot constrain answers: the Python package llguidance is not installed there",
            code="unsupported_response_format", param=param)
    if len(grammar) > LIMITS.grammar_characters:
        raise unusable_schema(
            f"as a grammar it must have at most {LIMITS.grammar_characters} characters", param)
    if surrogate := A_MARK.search(grammar):
        raise unusable_schema(
            f"it has a lone surrogate, {json.dumps(surrogate[0])}, which no text has", param)
    return grammar


def unusable_schema(reason: str, param: str) -> RequestError:
    return RequestError(f"{param} cannot be enforced: {reason}", code="invalid_json_schema", param=param)


@functools.cache
def byte_vocabulary():
    return importlib.import_module("llguidance").LLTokenizer("byte")


def check_grammar(source: str, param: str):
    """RequestError, about the field `param`, if no answer can match the grammar or it costs too much.

    The check itself may take long, and as much memory as the same grammar takes in a worker."""
    llguidance, vocabulary = importlib.import_module("llguidance"), byte_vocabulary()
    source = with_markers(source, {})
    limits, before = llguidance.LLParserLimits(**GRAMMAR_LIMITS), heap_bytes()
    matcher = llguidance.LLMatcher(vocabulary, source, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error().partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
        raise unusable_schema(
            "no value satisfies it" if reason.startswith("NoExtension") else reason[:300], param)
    if heap_bytes() - before > LIMITS.grammar_bytes:
        raise unusable_schema(
            f"it is too complex: following it takes more than {LIMITS.grammar_bytes >> 20} MiB", param)


GRAMMAR_LIMITS = {"max_lexer_states": 30_000, "verbose_errors": False}  # 1-2 KB a state; masks up to 25 ms
