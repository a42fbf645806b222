"""Makes findings, as checks yield them: the examination adds the check's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence as Seq

from chatlm.common.messages.doctor import SEVERITIES, Finding

Findings = Iterable[Finding]
MOST_SHOWN = 3  # examples in a sentence
LONGEST_SHOWN = 60  # characters of one


def error(what: str, where: str = "", advice: str = "", **facts) -> Finding:
    """The model answers wrongly, or not at all, with this: `check` ends with status 1."""
    return Finding("", "error", what, where, advice, facts or None)


def warning(what: str, where: str = "", advice: str = "", **facts) -> Finding:
    """The model may answer worse with this than it could."""
    return Finding("", "warning", what, where, advice, facts or None)


def note(what: str, where: str = "", advice: str = "", **facts) -> Finding:
    """Nothing is wrong, but an operator should know this."""
    return Finding("", "note", what, where, advice, facts or None)


def quoted(text: str) -> str:
    """Text from a model for a sentence: short, in quotes, as people read it."""
    text = json.dumps(text, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def worst(findings: Findings) -> str:
    """The worst severity among findings; "" if there are none."""
    found = {finding.severity for finding in findings}
    return next((severity for severity in SEVERITIES if severity in found), "")


def examples(items: Seq, most: int = MOST_SHOWN) -> str:
    """Some items in words: "a, b, c and 4 more"."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
