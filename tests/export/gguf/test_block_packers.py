"""Our blocks have the bytes of ggml's; `tests/support/ggml_blocks.py` recorded them from its library."""

import json

import numpy as np
import pytest

from chatlm.export.gguf.packers import PACKERS, pack
from chatlm.worker.arrays.gguf_types import TYPES, block_of
from chatlm.worker.arrays.packed import dequantize
from ggml_blocks import NEED_IMPORTANCE, ON_GRID, RECORD, SEARCHED, UNSEARCHED, cases, digest, importance

RECORDED = json.loads(RECORD.read_text())


@pytest.mark.parametrize("kind", [kind for kind in SEARCHED + ON_GRID + UNSEARCHED if kind not in NEED_IMPORTANCE])
def test_blocks_are_ggmls(kind):
    for name, rows in cases():
        assert digest(pack(kind, rows)) == RECORDED[f"{kind}, {name}"], name


@pytest.mark.parametrize("kind", SEARCHED + ON_GRID)
def test_blocks_with_importance_are_ggmls(kind):
    for name, rows in cases():
        assert digest(pack(kind, rows, importance())) == RECORDED[f"{kind}, {name}, important"], name


@pytest.mark.parametrize("kind", PACKERS)
def test_rows_packed_alone_or_together_are_the_same(kind):
    rows = next(cases())[1][:5]
    alone = np.vstack([pack(kind, row[None]) for row in rows])
    assert np.array_equal(pack(kind, rows), alone)


@pytest.mark.parametrize("kind", SEARCHED + ON_GRID)
def test_values_come_back_near(kind):
    rows = next(cases())[1]
    block, size = block_of(kind)
    packed = pack(kind, rows)
    assert packed.shape == (len(rows), rows.shape[1] // block * size)
    values = np.asarray(dequantize(TYPES[kind], packed), np.float32).reshape(rows.shape)
    lost = np.linalg.norm(values - rows) / np.linalg.norm(rows)
    bits = 8 * size / block
    assert lost < 1.3 * 2.0**(1 - bits) * 3


def test_importance_moves_the_loss_to_columns_that_matter_less():
    rows = next(cases())[1]
    matters = np.full(512, 1e-3, np.float32)
    matters[::4] = 1
    lost = {}
    for weights in (None, matters):
        values = np.asarray(dequantize(TYPES["Q4_K"], pack("Q4_K", rows, weights)), np.float32).reshape(rows.shape)
        lost[weights is None] = float((np.square(values - rows) * matters).sum())
    assert lost[False] < 0.8 * lost[True]
