"""bench/quality.py, small: the quality cost of the compiled arithmetic, without the rounding of weights."""

from pathlib import Path

import pytest

pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
import quality

MODEL = str(quality.ROOT / "tests" / "fixtures" / "nanochat" / "gen5")


def mean_kl(flags, rows):
    """KL from float32 on the weights that the server holds to the server, over one chunk."""
    ours = quality.Ours(MODEL, flags.split(), rows)
    chunks = quality.cut(ours.engine.tokenizer, Path(quality.ROOT / "README.md").read_text(), 1)
    judges = [quality.on_checkpoint(MODEL, flags.split()), quality.on_own_weights(ours.engine.transformer)]
    return quality.compare(judges, [ours], chunks)[-1]["mean KL"]


# by day floats, and of the types the one with the most parts: a type takes 4 s
@pytest.mark.parametrize("flags, most", [("--dtype float32", 1e-11), ("", 1e-7), ("--quantize q2_k", 3e-4),
                                         *(pytest.param(f"--quantize {kind}", 3e-4, marks=pytest.mark.slow) for kind in (
                                             "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4", "q3_k"))])
def test_compiled_arithmetic_is_near_float32(flags, most):
    """It has its own weights, and decodes as it prefills."""
    assert mean_kl(flags, rows=1) == mean_kl(flags, rows=32) < most
