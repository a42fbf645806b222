"""Types of one, two and three bits: random blocks of files as `gguf` and `few_bits` read them, products within their bound, and one row's bits everywhere."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings as bounds, strategies as st

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
few_bits = pytest.importorskip("few_bits", exc_type=ImportError, reason="gguf is not installed")
from instruction_sets import ISAS  # noqa: E402
from nightly import WHOLE, by_day  # noqa: E402

WIDE = [name for name in ISAS if name.startswith("amx-")]
# Where the float16 of a block lie: any finite number may stand there
SCALES = {"q2_k": (80, 82), "q3_k": (108,), "iq3_s": (0,), "iq3_xxs": (0,), "iq2_s": (0,), "iq2_xs": (0,), "iq2_xxs": (0,), "iq1_s": (0,),
          "iq1_m": (), "tq1_0": (52,), "tq2_0": (64,), "nvfp4": (), "q1_0": (0,), "q2_0": (0,), "q2_0_g128": (0,)}


def blocks_of(kind, rows, columns, seed, constant, exponent):
    """Random bytes, or `constant` in all; float16 scales of about 2^exponent."""
    code, dice = compiled.tiles.KINDS[kind], np.random.default_rng(seed)
    count = columns // compiled.tiles.COLUMNS[kind]
    blocks = dice.integers(0, 256, (rows, count, compiled._core.row_bytes(code, columns) // count), np.uint8)
    if constant is not None:
        blocks[:] = constant
    for place in SCALES[kind]:
        scales = dice.uniform(-2, 2, blocks.shape[:2]) * 2.0 ** exponent
        blocks[:, :, place:place + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    if kind == "iq1_m":
        blocks[:, :, 55] &= 0xBF            # of d, whose upper bits lie here, no infinity
    return blocks.reshape(rows, -1)


@bounds(max_examples=25 if WHOLE else 6, deadline=None)
@example(seed=0, rows=35, blocks=3, texts=25, constant=0, exponent=0, spread=4.0)             # the largest magnitudes of q3_k, of two tiles together
@example(seed=1, rows=32, blocks=1, texts=17, constant=None, exponent=0, spread=0.0)
@given(seed=st.integers(0, 1 << 20), rows=st.sampled_from([1, 7, 16, 19, 35]), blocks=st.integers(1, 6), texts=st.sampled_from([1, 2, 5, 9, 17, 137]),
       constant=st.sampled_from([None, None, None, 0, 255, 0x55, 0xAA]), exponent=st.integers(-10, 6), spread=st.sampled_from([0.0, 4.0]))
@pytest.mark.parametrize("kind", SCALES)
def test_tiles_multiply_as_the_reference_says(kind, seed, rows, blocks, texts, constant, exponent, spread):
    """Tiles multiply as the reference says, with the same bits everywhere."""
    K, dice = 256 * blocks, np.random.default_rng(seed)
    raw = blocks_of(kind, rows, K, seed, constant, exponent)
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, rows, K)
    matrix.fill(raw, kind)
    w = few_bits.values_of(kind, raw)
    np.testing.assert_array_equal(matrix.dequantize(), w)
    x = (dice.standard_normal((texts, K)) * np.exp(spread * dice.standard_normal((texts, K)))).astype(np.float32)
    before, found = compiled.info()["isa"], {False: set(), True: set()}
    try:
        for isa in ISAS:
            compiled.set_isa(isa)
            for fine in found:
                out, alone = np.empty((texts, rows), np.float32), np.empty((1, rows), np.float32)
                compiled.multiply(x, matrix, out=out, fine=fine)
                compiled.multiply(x[-1:], matrix, out=alone, fine=fine)
                np.testing.assert_array_equal(alone[0], out[-1])
                found[fine].add(out.tobytes())
    finally:
        compiled.set_isa(before)
    assert len(found[False]) == len(found[True]) == 1
    # x has 16 bits in each 32 or 256 columns: half a step is wrong at most, and float32 sums add their own
    together = 32 if kind in ("tq1_0", "tq2_0", "nvfp4", *few_bits.BITS) else 256
    amax = np.repeat(np.abs(x.reshape(texts, -1, together)).max(-1), together, 1)
    bound = (amax / 127 / 256 + 1e-5 * np.abs(x)) @ np.abs(w.astype(np.float64)).T
    if kind == "q2_k":                      # scale and minimum are added apart, and may cancel
        bound += 1e-5 * amax @ np.full(w.shape, 130 * 2.0 ** exponent).T
    assert (np.abs(out - x.astype(np.float64) @ w.astype(np.float64).T) <= bound + 1e-30).all()


@pytest.mark.parametrize("threads", by_day([1, 2], 2))
@pytest.mark.parametrize("kind", ["iq3_xxs", "iq2_xs", "iq1_m", "q2_k", "q3_k", "q1_0", "q2_0"])
@pytest.mark.parametrize("isa", [compiled.info()["isa"], *WIDE], ids=["best", *WIDE])
def test_rows_keep_their_bits_however_divided(isa, kind, threads):
    """Rows of a step keep their bits, however they are divided."""
    N, K, most, before = 80, 512, 200, (compiled.info()["threads"], compiled.info()["isa"])
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, N, K)
    matrix.fill(blocks_of(kind, N, K, 3, None, -8), kind)
    table = np.random.default_rng(4).standard_normal((most, K)).astype(np.float32)
    table[::7] *= np.exp(2 * np.random.default_rng(5).standard_normal(K)).astype(np.float32)
    program, x, out = compiled.Program(most, 4), np.zeros((most, K), np.float32), np.zeros((most, N), np.float32)
    program.embed(table, program.token_ids, x)
    program.linear(x, matrix, out)
    try:
        compiled.set_threads(threads)
        alone = np.empty((most, N), np.float32)
        for row in range(most):
            compiled.multiply(table[row:row + 1], matrix, out=alone[row:row + 1])
        compiled.set_isa(isa)
        for T in (40, 88, 129, most):                   # chunks of 40 or 24, 88 or 48, 72, 72 or 56 rows
            out[:] = 0
            pages = list(range(-(-T // 16)))
            program.finish(program.start(list(range(T)), [-1] * T, [0, T], [T], [pages], []))
            np.testing.assert_array_equal(out[:T], alone[:T])
    finally:
        compiled.set_threads(before[0])
        compiled.set_isa(before[1])


@pytest.mark.parametrize("kind", SCALES)
def test_types_of_files_become_q8_0_on_cuda(kind):
    """Types that only files have become Q8_0 on CUDA."""
    weights = pytest.importorskip("chatlm.worker.kernels.weights", exc_type=ImportError)
    tensors = [SimpleNamespace(tensor_type=SimpleNamespace(name=kind.upper()))]
    assert weights.becomes(tensors, [64]) == [kind.upper()]
    on_cuda = kind.upper() if kind in ("q2_k", "q3_k") else "Q8_0"
    assert weights.becomes(tensors, [64], weights.KEPT_ON_CUDA) == [on_cuda]
