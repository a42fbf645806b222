"""The instruction sets that decode_core's tests run on: those that this CPU offers, and those that exist for tests alone, which
DECODE_CORE_TEST_SETS=1 compiles."""

import os

from chatlm.worker.kernels import compiled

from nightly import by_day

ISAS = [*compiled._core.offered_isas(), *compiled._core.isas_for_tests()]
if os.environ.get("DECODE_CORE_CHECKED_ISAS") == "1":
    # setup.py compiles the sanitizers' checks into the portable sources and those of the widest instructions (widest_here). What runs
    # through the others would say under sanitizers what it says without.
    unchecked = {"amx", "amx-always", "avxvnni-evex", *(["avx2", "avxvnni"] if "avx512" in ISAS else [])}
    ISAS = [name for name in ISAS if name not in unchecked]

def some(isas):
    """Of these by day the widest and portable code: that all give the same bits is what each kernel has a test of besides."""
    return by_day(isas, *{isas[0], "portable"} & {*isas})


SOME_ISAS = some(ISAS)


def each_isa():
    """Set one after the other; the last line that a failed test has printed is the one that it failed on."""
    for name in ISAS:
        compiled.set_isa(name)
        print(f"on {name}")
        yield name
