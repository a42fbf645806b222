"""The line about the default model: that it only demonstrates, and what fits this machine instead."""

import itertools
import re

import pytest

from chatlm.common.hub.better import BETTER, FAST_ENOUGH, SHARE, MemoryRate, advice_of, better_model, warning_of
from chatlm.common.hub.repository import hub_model


def test_the_largest_that_fits_free_memory_is_named():
    """The largest that fits into a share of free memory is named where speeds are not known, as on a GPU."""
    for needed, _, model in BETTER:
        assert better_model(needed / SHARE + 1, MemoryRate()).name == model
        assert better_model(needed / SHARE - 1, MemoryRate()).name != model
    assert better_model(0, MemoryRate()).name == "" and better_model(1e15, MemoryRate()).name == BETTER[0][2]
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


def reading(bytes_per_s):
    rate = MemoryRate()
    rate.bytes_per_s = bytes_per_s
    return rate


def test_what_is_named_is_fast_enough_here():
    """Two cores that read 20 GB a second: an 8B file would give three tokens a second, experts are by what is active."""
    slow, usual = reading(5e9), reading(20e9)
    assert better_model(10e9, usual).name == "Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf"
    assert better_model(10e9, reading(60e9)).name.endswith("Qwen3-4B-Q4_K_M.gguf")
    assert better_model(1e12, reading(30e9)).name.endswith("Qwen3-30B-A3B-Q4_K_M.gguf")
    for rate in (slow, usual, reading(500e9)):
        for free in (2.2e9, 4e9, 10e9, 1e12):
            better = better_model(free, rate)
            others = [rate.expected_speed(model, size) for needed, size, model in BETTER if needed <= SHARE * free]
            assert better.tokens_per_second in others
            assert better.tokens_per_second >= FAST_ENOUGH or better.tokens_per_second == max(others)


def test_only_the_demonstration_is_called_one():
    assert warning_of("my-model") == "" == warning_of("SmolLM2-1.7B-Instruct")
    assert "demonstration model" in warning_of("SmolLM2-135M-Instruct")
    assert advice_of("my-model", 1e12) == "" == advice_of("SmolLM2-135M-Instruct", 1e6)
    advice = advice_of("SmolLM2-135M-Instruct", 1e12, reading(60e9))
    assert re.fullmatch(r"A better model that fits, about \d+ tokens a second here: .*python chat_server.py "
                        + re.escape(BETTER[0][2]), advice), advice
    assert advice_of("SmolLM2-135M-Instruct", 1e12, MemoryRate()).startswith("A better model that fits: ")


def test_the_memory_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr("chatlm.common.hub.better.read_bandwidth", lambda threads: measured.append(threads) or 1e10)
    rate = MemoryRate()
    rate.measure()
    rate.measure()
    assert len(measured) == 1 and [rate.expected_speed("org/8B", size * 10**9) for size in (3, 7)] == [2.3, 1.0]
