"""Pictures are resized as Pillow does it, to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from chatlm.worker.arrays.resize import FILTERS, resized

SIZES = [((64, 48), (31, 17)), ((31, 17), (64, 48)), ((1152, 864), (2048, 1536)), ((2048, 1536), (512, 512)), ((1, 1), (7, 5)), ((7, 5), (1, 1)),
         ((3000, 3), (512, 512)), ((100, 90), (100, 45)), ((100, 90), (33, 90)), ((50, 50), (50, 50)), ((257, 511), (896, 896))]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size, wanted", SIZES)
def test_resized_pictures_equal_pillows(size, wanted, name):
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    noise[: size[1] // 2] = np.where(noise[: size[1] // 2] > 127, 255, 0)       # edges, where sums leave 0 to 255
    theirs = np.asarray(Image.fromarray(noise).resize(wanted, getattr(Image.Resampling, name.upper())))
    assert np.array_equal(resized(noise, *wanted, name), theirs)


SIDES = st.integers(1, 40) | st.integers(100, 400)


@settings(max_examples=150, deadline=None)
@given(size=st.tuples(SIDES, SIDES), wanted=st.tuples(SIDES, SIDES), lost=st.none() | st.integers(-1, 1), name=st.sampled_from(sorted(FILTERS)))
def test_every_size_is_resized_in_pillow_s_order(size, wanted, lost, name):
    Image = pytest.importorskip("PIL.Image", minversion="13")
    if lost is not None:        # near the border between the orders
        wanted = max(1, size[0] - max(0, (size[1] - wanted[1]) // 2) + lost), wanted[1]
    noise = np.random.default_rng(1).integers(0, 2, (size[1], size[0], 3), np.uint8) * 255
    theirs = np.asarray(Image.fromarray(noise).resize(wanted, getattr(Image.Resampling, name.upper())))
    assert np.array_equal(resized(noise, *wanted, name), theirs)
