"""Regular expressions of JSON schemas and of requests, as llguidance reads them."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Collection, Iterable

from chatlm.common.errors import shown
from chatlm.common.jsontext import whole_unicode


GRAMMAR_LIMITS = {"max_lexer_states": 30_000, "verbose_errors": False}  # 1-2 KB a state; masks up to 25 ms
KNOWN_PATTERNS = 32


@functools.cache
def byte_vocabulary():
    return importlib.import_module("llguidance").LLTokenizer("byte")


def in_slashes(pattern: str) -> str:
    """A regular expression in the form that goes between slashes, on one line."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", pattern).replace("\n", "\\n")


def text_with(pattern: str) -> str:
    """A regular expression that matches a whole text if this one matches anywhere in it."""
    if not (end := re.search(r"(?<!\\)(?:\\\\)*(\$?)\Z", pattern)):
        raise unreadable(pattern, "it ends within an escape")
    first = "^" if pattern.startswith("^") else ""
    last = end[1]
    inside = pattern.removeprefix(first).removesuffix(last) if "|" not in pattern else pattern
    return f"{'' if first else '(?s:.*)'}(?:{inside}){'' if last else '(?s:.*)'}"


def unreadable(pattern: str, reason: str) -> ValueError:
    return ValueError(f"the pattern {shown(pattern)} cannot be read: {reason}")


def check_patterns(patterns: Collection[str]):
    """ValueError with the pattern and the reason if one of a schema's patterns cannot be read. 0.4 ms, and
    10 us for each."""
    if not patterns:
        return
    names = [f"P{number}" for number in range(len(patterns))]
    lines = [f"{name}: /{in_slashes(whole_unicode(text_with(pattern)))}/"
             for name, pattern in zip(names, patterns)]
    error = importlib.import_module("llguidance").LLMatcher.validate_grammar(
        "\n".join((f"start: {' | '.join(names)}", *lines)))
    if error:
        for pattern in patterns:
            searcher(pattern)


def check_regex(pattern: str):
    """The same for a regular expression of a whole text."""
    matcher_of(pattern, pattern)


def is_found(pattern: str, text: str) -> bool:
    """Is a schema's pattern found in this text? ValueError as for check_patterns. 6 us for 8 characters, and
    0.5 ms where the pattern is new."""
    matcher = searcher(pattern).deep_copy()
    letters = text.encode("utf-8", "replace")
    return matcher.try_consume_tokens([*letters]) == len(letters) and matcher.is_accepting()


@functools.lru_cache(KNOWN_PATTERNS)
def searcher(pattern: str):
    """A matcher for texts in which this pattern is found."""
    return matcher_of(text_with(pattern), pattern)


def matcher_of(regex: str, pattern: str):
    """A matcher for whole texts; ValueError about `pattern`, from which the expression was made."""
    # lark_grammar refuses lone surrogates
    pattern = whole_unicode(pattern)
    regex = whole_unicode(regex)
    llguidance = importlib.import_module("llguidance")
    limits = llguidance.LLParserLimits(**GRAMMAR_LIMITS)
    # the pattern alone comes first: what is wrong with it is said in its own terms
    for tried in dict.fromkeys((pattern, regex)):
        matcher = llguidance.LLMatcher(
            byte_vocabulary(), f"start: /{in_slashes(tried)}/", log_level=0, limits=limits)
        error = matcher.get_error() if matcher.is_error() else ""
        if "regex parse error" in error or error and tried == regex:
            raise unreadable(pattern, reason_of(error))
    return matcher


def matches_something(terminal: str, lines: Iterable[str]) -> bool:
    """Is there a text that this terminal of a grammar matches? `lines` define the terminals that it names."""
    llguidance = importlib.import_module("llguidance")
    matcher = llguidance.LLMatcher(byte_vocabulary(), "\n".join((f"start: {terminal}", *lines)), log_level=0,
                                   limits=llguidance.LLParserLimits(**GRAMMAR_LIMITS))
    matcher.compute_bitmask()  # finds out only here that no text goes on
    return not (matcher.is_error() and matcher.get_error().startswith("NoExtension"))


def reason_of(error: str) -> str:
    """What llguidance says is wrong with a regular expression, without the lines that show it."""
    reason = re.search(r"^error: (.+)", error, re.MULTILINE)
    return reason[1] if reason else error.partition("\n")[0]
