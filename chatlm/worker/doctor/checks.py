"""The table of checks. A new check is a row here and a function in its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from chatlm.worker.doctor import template, tokenizer
from chatlm.worker.doctor.against import check_against
from chatlm.worker.doctor.findings import Findings
from chatlm.worker.doctor.fit import check_fit, check_speed
from chatlm.worker.doctor.forward import check_forward, is_trained
from chatlm.worker.doctor.examined_model import ExaminedModel
from chatlm.worker.doctor.stated import check_head, check_rope, check_types
from chatlm.worker.doctor.weights import check_weights


class Check(NamedTuple):
    """A check. Its name is shown beside its findings, and must not change."""

    name: str
    function: Callable[[ExaminedModel], Findings]
    limit_s: float = 60.0         # of the processor; a check that takes longer is ended, which is an error
    memory: int | None = 4 << 30  # bytes of addresses that it may take in addition; None: any, to map files
    needs: Callable[[ExaminedModel], bool] = lambda examined: True  # else it does not apply, and is not run


OF_TEXT: tuple[Check, ...] = (
    Check("tokenizer", tokenizer.check_kind),
    Check("vocabulary", tokenizer.check_vocabulary), Check("added tokens", tokenizer.check_added_tokens),
    Check("ends", tokenizer.check_ends), Check("pre-tokenizer", tokenizer.check_pre_tokenizer),
    Check("merges", tokenizer.check_merges), Check("round trips", tokenizer.check_round_trips),
    Check("reach", tokenizer.check_reach), Check("likeness", tokenizer.check_likeness),
    Check("template", template.check_template, limit_s=20.0))

OF_WEIGHTS = (  # weights, their original, and what they need
    Check("weights", check_weights, 1200.0, None),
    Check("types", check_types, memory=None),
    Check("rotary scaling", check_rope, memory=None),
    Check("head", check_head, 300.0, None),
    Check("memory", check_fit, memory=None),
    Check("speed", check_speed, 300.0, None),
    Check("forward", check_forward, 3600.0, None, is_trained),
    Check("against", check_against, 1200.0, None, lambda examined: examined.original is not None),
)

CHECKS = (*OF_TEXT, *OF_WEIGHTS)
