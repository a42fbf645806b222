"""The line about the default model: that it only demonstrates, and what fits this machine instead."""

import itertools
import re

import pytest

from chatlm.common.hub.better import BETTER, SHARE, better_model, warning_of
from chatlm.common.hub.huggingface import hub_model


def test_the_largest_that_fits_free_memory_is_named():
    """The largest that fits into a share of free memory is named."""
    for needed, _, model in BETTER:
        assert better_model(needed / SHARE + 1) == model
        assert better_model(needed / SHARE - 1) != model
    assert better_model(0) == "" and better_model(1e15) == BETTER[0][2]
    assert all(more > less for (more, *_), (less, *_) in itertools.pairwise(BETTER))


@pytest.mark.parametrize("model", [model for *_, model in BETTER])
def test_each_row_names_a_file_of_its_size(model):
    """Each is a file of a repository whose size fits its row."""
    repository, file = hub_model(model)
    assert file.startswith(repository.split("/")[1].removesuffix("-GGUF")) and re.search(r"-(Q8_0|Q4_K_M)\.gguf$", file)
    billions = float(re.search(r"-(\d+(?:\.\d+)?)B", file)[1])
    weights = billions * 1e9 * (8.5 if "Q8_0" in file else 4.9) / 8
    needed, size = next((needed, size) for needed, size, each in BETTER if each == model)
    assert weights < needed < weights + 2.5e9
    assert 0.9 * weights < size < 1.15 * weights + 2e8


def test_only_the_demonstration_is_called_one():
    assert warning_of("my-model", 1e12) == "" == warning_of("SmolLM2-1.7B-Instruct", 1e12)
    assert warning_of("SmolLM2-135M-Instruct", 1e12).endswith(f"python chat_server.py {BETTER[0][2]}")
    assert "chat_server.py" not in warning_of("SmolLM2-135M-Instruct", 1e6)
