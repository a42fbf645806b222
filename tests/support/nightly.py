"""Parameters of a test of which CI runs some, and the night all."""

import os

import pytest

# Whether tests draw all their random cases: `.ci/run nightly` asks for it
WHOLE = os.environ.get("DECODE_CORE_TEST_SHARE") == "1"


def by_day(values, *kept):
    """`values` (tuples are a case's arguments); those that are not among `kept` are marked slow."""
    values, kept = list(values), list(kept)
    assert all(each in values for each in kept), [each for each in kept if each not in values]
    return [each if each in kept else pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.slow)
            for each in values]
