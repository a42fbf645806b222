"""Pictures are resized as Pillow does it, to the bit."""

import numpy as np
import pytest

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
