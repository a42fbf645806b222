"""What a model takes is known before its weights are read: the bytes of its replicas, and of each one's ranks."""

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.protocol import SurveyConfig
from chatlm.worker.build import build_transformer
from chatlm.worker.kernels import choosing
from chatlm.worker.ranks.alone import PlannedRank
from chatlm.worker.survey import surveyed
from chatlm.worker.weights.load import open_model
from families import make_model, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """4 layers, 4 query heads, 2 heads of keys."""
    return save(make_model("qwen3"), tmp_path_factory.mktemp("qwen3"))


def survey(settings, budget=1 << 30, **more):
    return surveyed(SurveyConfig(settings, resolve_model(settings), "cpu", budget, **more))


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_the_bytes_of_all_ranks_are_counted(folder, tp, pp, monkeypatch):
    """Among four ranks two have the same head of keys, and each has its own buffers."""
    monkeypatch.setattr(choosing, "decode_core", lambda: None)   # it would record steps, for which the ranks have to meet
    settings = Settings(model=str(folder), dtype="float32", kv_cache_memory=1 << 20, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    found, source = survey(settings), resolve_model(settings)
    ranks = [build_transformer(open_model(source, settings, CPU), source, settings, CPU, lambda *progress: None, PlannedRank(settings, rank))[1]
             for rank in range(tp * pp)]
    weights = sum(rank.weights_bytes for rank in ranks)
    assert weights <= found.weights <= 1.3 * weights       # the first rank has most
    activations = sum(buffer.nbytes for rank in ranks for buffer in rank.buffers.values())
    assert activations <= found.activations <= 1.3 * activations
    cache = sum(rank.cache.nbytes for rank in ranks)
    assert 0.7 * cache <= found.cache <= 1.3 * cache


def test_a_model_that_cannot_be_divided_says_why(folder):
    with pytest.raises(ConfigError, match="cannot be divided among 64 ranks"):
        survey(Settings(model=str(folder), tensor_parallel_size=64))


@pytest.mark.parametrize("replicas", [1, 3])
def test_all_replicas_pages_fit_beside_weights(folder, replicas):
    """The pages of all replicas fit next to weights and processes."""
    settings, process_bytes = Settings(model=str(folder), dtype="float32", max_batch=8), 3 << 20
    own = survey(settings)
    room = 200 << 10    # that is left to the pages of each, less than an eighth of it all
    budget = replicas * (own.weights + own.activations + process_bytes + room)
    found = survey(settings, budget, replicas=replicas, process_bytes=process_bytes)
    taken = replicas * (found.weights + found.activations + found.cache + process_bytes)
    assert 0 < found.cache and taken <= budget
