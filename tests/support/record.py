"""Bits of record: digests of what decode_core computes on x86-64, which every other machine must find too.

A test makes its inputs with `exact`, whose numbers are the same whatever numpy and libm do, and gives its results to `agree`. A change
that is meant to change bits makes the record anew, on x86-64: RECORD_BITS=1 pytest tests/core -k bits_of_record
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

RECORD = Path(__file__).with_suffix(".json")


class Exact(np.random.Generator):
    """Random numbers made of a bit generator's integers by integers, and by floating-point operations that are exact."""

    def words(self, count):
        return self.bit_generator.random_raw(int(count))

    def integers(self, low, high, size=(), dtype=np.int64):
        return (self.words(np.prod(size, dtype=int)) % np.uint64(high - low)).astype(np.int64).reshape(size).__add__(low).astype(dtype)

    def random(self, size, dtype=np.float64):
        return (self.integers(0, 1 << 24, size) / (1 << 24)).astype(dtype)

    def standard_normal(self, size, dtype=np.float64):
        """Nearly: the sum of 12 numbers that are equally likely, in steps of 2^-17."""
        size = size if isinstance(size, tuple) else (size,)
        return (self.integers(-(1 << 16), 1 << 16, (12, *size)).sum(0) / (1 << 17)).astype(dtype)

    def permutation(self, count):
        return np.argsort(self.words(count), kind="stable")


def exact(seed):
    return Exact(np.random.PCG64(seed))


def agree(name, *results):
    """Do these arrays have the bits that x86-64 gave for this name?"""
    digest = hashlib.sha256()
    for result in results:
        digest.update(np.ascontiguousarray(result).tobytes())
    found, record = digest.hexdigest()[:16], json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("RECORD_BITS") == "1":
        RECORD.write_text(json.dumps(record | {name: found}, indent=1, sort_keys=True) + "\n")
    else:
        assert name in record, f"{name}: not recorded yet; on x86-64: RECORD_BITS=1 pytest tests/core -k bits_of_record"
        assert record[name] == found, f"{name}: other bits than on x86-64"
