"""Of mixtures, the importance of each expert's columns is measured, as llama-imatrix does."""

import re

import numpy as np
import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import ModelSource
from chatlm.export.gguf import activations, experts
from chatlm.export.gguf.export import export_gguf
from chatlm.export.gguf.importance import read_importance, write_importance
from chatlm.export.gguf.measure import measure_importance
from chatlm.export.gguf.packers import pack
from chatlm.worker.ops import basic, references
from chatlm.worker.weights.formats.gguf.file import read_gguf
from families import GGUF_MODELS, as_gguf, make_model, save
from imatrix_record import CHUNK, EXPERTS, RECORD, TEXT, write_mixture
from nightly import by_day

LONG = "It was the best of times, and 1859 was near. " * 12


def source_of(path):
    return ModelSource("gguf" if path.is_file() else "hf", path, path.stem, "")


def measured(path, text=TEXT, **settings):
    settings = Settings(context_length=CHUNK, dtype="float32", **settings)
    return measure_importance(source_of(path), settings, text, "text.txt")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "mixture.gguf")[0]


@pytest.mark.parametrize("kernels", ("", "reference"))
def test_sums_and_counts_are_those_of_llama_imatrix(mixture, kernels, choose_kernels):
    choose_kernels(kernels)
    found = measured(mixture).importance
    recorded = read_importance(RECORD)
    assert found.chunks == recorded.chunks and recorded.tensors.keys() - found.tensors.keys() == set()
    for name, sums in recorded.tensors.items():
        ours = found.tensors[name]
        np.testing.assert_allclose(ours.counts, sums.counts, atol=2, err_msg=name)  # two logits are nearly equal
        np.testing.assert_allclose(ours.squares, sums.squares, rtol=0.02, atol=1e-3 * sums.squares.max(), err_msg=name)
    assert recorded.tensors["blk.1.ffn_down_exps.weight"].squares.shape[0] == EXPERTS


def test_equal_experts_read_what_one_for_all_would(tmp_path):
    path, tensors = write_mixture(tmp_path / "same.gguf", same_experts=True)
    found = measured(path)
    sums = found.importance.tensors
    tokens = found.tokens
    for layer in range(2):
        down = sums[f"blk.{layer}.ffn_down_exps.weight"]
        up = sums[f"blk.{layer}.ffn_up_exps.weight"]
        assert up.counts.sum() == down.counts.sum() == 2 * tokens
        router = sums[f"blk.{layer}.ffn_gate_inp.weight"]
        np.testing.assert_allclose(up.squares.sum(0), 2 * router.squares[0], rtol=1e-3)


class Oracle:
    """Replaces the reference of `experts` by one that also adds up the squares of what `down` reads."""

    def __init__(self, monkeypatch):
        self.totals = []
        self.inside = False
        original = basic.experts_reference
        monkeypatch.setitem(references.REFERENCES, "experts", self.watching(original))
        for table in (basic.GATES, basic.UNGATED):
            for name, function in table.items():
                monkeypatch.setitem(table, name, self.counting(function))

    def watching(self, original):
        def experts(*given, **options):
            self.inside = True
            self.totals.append(0.0)
            original(*given, **options)
            self.inside = False
        return experts

    def counting(self, function):
        def activation(*parts):
            hidden = function(*parts)
            if self.inside:
                self.totals[-1] = self.totals[-1] + hidden.double().square().sum(0).numpy()
            return hidden
        return activation


FAMILIES = ("mixtral", "qwen3moe", "gpt-oss", "phimoe", "glm4moe-grouped", "gemma4moe", "nemotron3-latent", "granite-moe-shared")


@pytest.mark.parametrize("name", by_day(FAMILIES, "mixtral", "gpt-oss", "glm4moe-grouped", "nemotron3-latent"))
def test_what_down_reads_is_what_the_op_makes(name, tmp_path, monkeypatch, choose_kernels):
    path = as_gguf(tmp_path / "model.gguf", make_model(name, **GGUF_MODELS[name]))
    kernels = measured(path, LONG)
    choose_kernels("reference")
    oracle = Oracle(monkeypatch)
    found = measured(path, LONG)
    stored = read_gguf(path)[1]
    downs = [key for key in stored if key.endswith("ffn_down_exps.weight")]
    downs.sort(key=lambda key: int(key.split(".")[1]))
    assert downs and found.missing == ()
    for place, key in enumerate(downs):
        expected = sum(oracle.totals[place::len(downs)])
        sums = found.importance.tensors[key]
        np.testing.assert_allclose(sums.squares.sum(0), expected[:sums.squares.shape[1]], rtol=1e-3)
        np.testing.assert_allclose(kernels.importance.tensors[key].squares, sums.squares, rtol=0.05,
                                   atol=0.02 * sums.squares.max())
        assert (sums.counts > 0).any()
    of_all = {key for key in stored if re.search(r"_exps\.weight$", key)}
    assert of_all <= found.importance.tensors.keys()


@pytest.mark.parametrize("name", ("qwen3moe", "gemma4moe"))
def test_a_folders_experts_have_the_names_of_its_file(name, tmp_path):
    path = as_gguf(tmp_path / "model.gguf", make_model(name, **GGUF_MODELS[name]))
    folder = save(make_model(name, **GGUF_MODELS[name]), tmp_path / "folder")
    found = [{key: sums.squares.shape for key, sums in measured(each, LONG).importance.tensors.items() if "_exps." in key}
             for each in (path, folder)]
    assert found[0] == found[1] and all(shape[0] > 1 for shape in found[0].values())


def test_many_flushes_find_what_one_does(mixture, monkeypatch):
    whole = measured(mixture).importance
    monkeypatch.setattr(experts, "MOST_WAITING", 1)
    for name, sums in measured(mixture).importance.tensors.items():
        np.testing.assert_allclose(sums.squares, whole.tensors[name].squares, rtol=1e-5)
        assert np.array_equal(sums.counts, whole.tensors[name].counts)


def test_many_threads_find_what_one_does(mixture, monkeypatch):
    found = []
    for threads in (1, 5):
        monkeypatch.setattr(experts, "own_threads", lambda: threads)
        found.append(measured(mixture).importance)
    for name, sums in found[0].tensors.items():
        np.testing.assert_allclose(sums.squares, found[1].tensors[name].squares, rtol=1e-5)


def test_measured_experts_are_packed_by_their_own_importance(mixture, tmp_path):
    found = measured(mixture, LONG[:150]).importance
    write_importance(found, tmp_path / "imatrix.gguf")
    export_gguf(source_of(mixture), tmp_path / "out.gguf", type="Q4_0", imatrix=tmp_path / "imatrix.gguf")
    original = read_gguf(mixture)[1]
    for name, tensor in read_gguf(tmp_path / "out.gguf")[1].items():
        if name.endswith("up_exps.weight") and tensor.tensor_type.name == "Q4_0":
            for packed, rows, means in zip(tensor.data, original[name].data, found.tensors[name].means):
                assert np.array_equal(packed, pack("Q4_0", np.array(rows), means))


def test_activations_are_the_references():
    x, y = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 5
    assert activations.GATES.keys() == basic.GATES.keys() and activations.UNGATED.keys() == basic.UNGATED.keys()
    for name, function in activations.GATES.items():
        np.testing.assert_allclose(function(x.numpy(), y.numpy()), basic.GATES[name](x, y).numpy(), atol=1e-4, err_msg=name)
    for name, function in activations.UNGATED.items():
        np.testing.assert_allclose(function(x.numpy()), basic.UNGATED[name](x).numpy(), atol=1e-5, err_msg=name)


ROUTERS = (
    dict(chosen=3), dict(chosen=1), dict(chosen=16), dict(chosen=2, jitter=0.01), dict(chosen=4, sigmoids=True),
    dict(chosen=4, sigmoids=True, groups=(4, 2)), dict(chosen=4, sigmoids=True, groups=(4, 1), biased=True),
    dict(chosen=6, sigmoids=True, groups=(8, 8), biased=True),
    dict(chosen=3, groups=(4, 2)), dict(chosen=4, groups=(8, 3), group_best=1), dict(chosen=2, groups=(2, 1), group_best=2))


@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("ties", (False, True))
def test_the_experts_of_a_token_are_those_of_the_reference(options, ties):
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 16, generator=random)
    if ties:
        logits = (logits * 2).round() / 2
    options = dict(options)
    bias = torch.randn(16, generator=random) if options.pop("biased", False) else None
    if "jitter" in options:
        ids, _ = basic.sparse_routes(logits, options["jitter"])
    elif options.get("sigmoids"):
        ids, _ = basic.sigmoid_routes(logits, options["chosen"], True, bias, options.get("groups", (1, 1)))
    else:
        ids, _ = basic.routes(logits, options["chosen"], True, options.get("groups", (1, 1)), group_best=options.get("group_best", 2))
    expected = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    found = experts.chosen_experts(logits.numpy(), options | {"correction_bias": None if bias is None else bias.numpy()})
    assert np.array_equal(found, expected.numpy())


def test_a_folder_whose_layers_have_other_numbers_in_a_file_is_refused(tmp_path):
    folder = save(make_model("nemotron3-latent", **GGUF_MODELS["nemotron3-latent"]), tmp_path / "folder")
    with pytest.raises(ConfigError, match="numbers the layers otherwise") as refused:
        measured(folder, LONG)
    assert "\n" not in str(refused.value)
