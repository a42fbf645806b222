"""The table of checks: a new one is a row here, and a function of its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from chatlm.worker.doctor import template, tokenizer
from chatlm.worker.doctor.findings import Findings
from chatlm.worker.doctor.patient import Patient


class Check(NamedTuple):
    """A check: its name is shown beside what it finds, and must not change."""

    name: str
    function: Callable[[Patient], Findings]
    limit_s: float = 60.0         # of the processor; a check that takes longer is ended, which is an error
    memory: int | None = 4 << 30  # bytes of addresses that it may take in addition; None: any, to map files
    needs: Callable[[Patient], bool] = lambda patient: True  # else it does not apply, and is not run


OF_TEXT: tuple[Check, ...] = (
    Check("vocabulary", tokenizer.check_vocabulary), Check("added tokens", tokenizer.check_added_tokens),
    Check("ends", tokenizer.check_ends), Check("pre-tokenizer", tokenizer.check_pre_tokenizer),
    Check("merges", tokenizer.check_merges), Check("round trips", tokenizer.check_round_trips),
    Check("reach", tokenizer.check_reach), Check("likeness", tokenizer.check_likeness),
    Check("template", template.check_template, limit_s=20.0))

OF_WEIGHTS: tuple[Check, ...] = ()  # weights, their original, and what they need

CHECKS = (*OF_TEXT, *OF_WEIGHTS)
