"""Raised and lowered text in a line: without a sign of it, 10 with a raised 6 would read 106."""

from __future__ import annotations

import re

# what is raised for its looks alone
WORDS = re.compile(r"(?i)st|nd|rd|th|er|re|ère|ème|tm|º|ª|®|™|\[.*\]", re.DOTALL)


def raised(text: str, after: str = "") -> str:
    """Raised text, as 10^6. after: what follows it."""
    if not text.strip() or WORDS.fullmatch(text.strip()):
        return text
    return mark("^", text, after)


def lowered(text: str, before: str = "", after: str = "") -> str:
    """Lowered text, as x_i. Digits behind a letter stay as they are: H2O. before, after: what stands beside
    it."""
    inner = text.strip()
    if not inner or inner.isdigit() and before[-1:].isalpha() and not after[:1].isdigit():
        return text
    return mark("_", text, after)


def mark(sign: str, text: str, after: str) -> str:
    inner = text.strip()
    plain = re.fullmatch(r"[+\-−–]?\w+([.,]\d+)?", inner)
    return sign + (inner if plain and not after[:1].isalnum() else f"({inner})")
