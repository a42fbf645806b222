"""The doctor's checks of weights, of a model against its original, and of memory and speed here."""

import copy
import hashlib
import shutil
from pathlib import Path

import numpy
import pytest

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.worker.doctor import fit, tensor_statistics
from chatlm.worker.doctor.against import distances, other_arithmetic
from chatlm.worker.doctor.checks import OF_WEIGHTS
from chatlm.worker.doctor.layers import profile, strange_levels
from chatlm.worker.doctor.examined_model import ExaminedModel
from chatlm.worker.doctor.tensor_statistics import TensorStatistics
from chatlm.worker.weights.formats.gguf import description as gguf
from chatlm.worker.weights.formats.gguf.header import FileHeader
from chatlm.worker.weights.formats.gguf.texts import Texts
from families import as_gguf, make_model, save
from patching import patch
from sick_models import chatml_gguf, diagnose, rewritten, small_folder, small_gguf
from sick_weights import OF_WEIGHTS as FAULTS, bytes_of, default_copy

WITHOUT_ORIGINAL = [fault for fault in FAULTS if not fault.against]
NAMES = [check.name for check in OF_WEIGHTS if check.name != "speed"]


@pytest.fixture(scope="module")
def default_file(tmp_path_factory):
    return default_copy(tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def drawn():
    return {}


@pytest.fixture(scope="module")
def texts():
    return {}


@pytest.fixture(scope="module")
def spelled():
    return []


@pytest.fixture(autouse=True)
def each_list_once(spelled, monkeypatch):
    """A long list of strings that has been read before is not read again: all copies of the default model have its vocabulary."""
    def read_once(header, count, read=FileHeader.texts):
        for known in spelled:
            size = len(known.spelled)
            if len(known) == count and bytes(header.buffer[header.at:header.at + size]) == known.spelled:
                header.take(size)
                return known
        spelled.append(read(header, count))
        return spelled[-1]
    monkeypatch.setattr(FileHeader, "texts", read_once)


@pytest.fixture
def each_tensor_once(drawn, texts, monkeypatch):
    """A tensor whose bytes were read before has its statistics, a vocabulary its tokenizer: a fault changes few of the default model's 272 tensors."""
    def draw_once(statistics, tensor, heads, every, draw=tensor_statistics.measure_tensor):
        digest = hashlib.blake2b()
        for part in tensor.mapped:
            digest.update(numpy.ascontiguousarray(part).view(numpy.uint8))
        key = statistics.name, statistics.part, statistics.layer, statistics.index, statistics.shape, heads, every, digest.digest()
        if not tensor.mapped or key not in drawn:
            drawn[key] = draw(statistics, tensor, heads, every)
        return copy.deepcopy(drawn[key])
    monkeypatch.setattr(tensor_statistics, "measure_tensor", draw_once)

    def read_once(path, metadata, read=gguf.kept_texts):
        tokens = metadata["tokenizer.ggml.tokens"]
        key = tokens.spelled if isinstance(tokens, Texts) else repr(tokens)
        if key not in texts:
            texts[key] = read(path, metadata)
        return texts[key]
    patch(monkeypatch, gguf, "kept_texts", read_once)


@pytest.mark.parametrize("fault", WITHOUT_ORIGINAL, ids=lambda fault: fault.name)
def test_each_fault_of_weights_is_found(fault, tmp_path, each_tensor_once):
    diagnosis = diagnose(fault.mutate(fault.make(tmp_path)), only=fault.finds or NAMES)
    assert diagnosis.finds(fault), [finding.what for finding in diagnosis.findings]
    for path in tmp_path.glob("*.gguf"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.against], ids=lambda fault: fault.name)
def test_each_fault_is_found_with_the_original(fault, tmp_path):
    diagnosis = diagnose(fault.mutate(fault.make(tmp_path)), only=fault.finds, against=fault.against())
    assert diagnosis.finds(fault), [finding.what for finding in diagnosis.findings]
    assert not [finding for finding in diagnosis.findings if "itself failed" in finding.what]


@pytest.mark.parametrize("name", ["llama3.1", "gemma3", "mixtral", "qwen3.5", "gpt-oss"])
def test_random_weights_of_other_families_are_fine(name, tmp_path):
    """Nothing is concluded from weights without any structure."""
    diagnosis = diagnose(save(make_model(name), tmp_path / name), only=[*NAMES, "speed"])
    assert (diagnosis.serious, diagnosis.refused) == ([], "")


def test_a_folder_and_its_gguf_have_one_statistic(tmp_path):
    """Up to the order of rows, which llama.cpp changes."""
    model, drawn = make_model("llama3.2"), []
    as_gguf(tmp_path / "model.gguf", model)
    for path in (save(model, tmp_path / "folder"), tmp_path / "model.gguf"):
        settings = Settings(model=str(path))
        found = tensor_statistics.all_statistics(ExaminedModel(resolve_model(settings), settings).floats)
        drawn.append({(one.layer, one.part, one.index): one for one in found})
    assert drawn[0].keys() == drawn[1].keys()
    for key, one in drawn[0].items():
        numpy.testing.assert_allclose(one.level, drawn[1][key].level, rtol=1e-5)
        numpy.testing.assert_allclose(one.rows, drawn[1][key].rows, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama3.2", "gpt-oss", "qwen3.5"])
def test_a_folder_and_its_gguf_are_mutual_originals(name, tmp_path):
    """Whatever the order of rows in each."""
    model, both = make_model(name), []
    as_gguf(tmp_path / "model.gguf", model)
    for path in (save(model, tmp_path / "folder"), tmp_path / "model.gguf"):
        settings = Settings(model=str(path))
        both.append(ExaminedModel(resolve_model(settings), settings).floats)
    assert [*other_arithmetic(*both)] == []
    far = distances(*both)
    assert len(far) > 8 and max(far.values()) < 1e-6


def test_a_bias_s_statistics_is_of_its_own_tensor(tmp_path):
    """q, k and v of a file are one vector here; each is read alone."""
    as_gguf(tmp_path / "model.gguf", make_model("qwen2.5"))
    settings = Settings(model=str(tmp_path / "model.gguf"))
    drawn = tensor_statistics.all_statistics(ExaminedModel(resolve_model(settings), settings).floats)
    biases = [one for one in drawn if one.part == "qkv_bias"]
    assert biases and all(one.values.shape == one.shape for one in biases)


def test_a_sampled_large_model_is_reported_so(default_file, monkeypatch):
    monkeypatch.setattr("chatlm.worker.doctor.weights.MOST_VALUES", 40_000_000)
    monkeypatch.setattr(tensor_statistics, "MOST_VALUES", 40_000_000)
    monkeypatch.setattr(tensor_statistics, "CHUNK", 1 << 16)
    diagnosis = diagnose(default_file, only=["weights"])
    assert [(finding.severity, finding.what) for finding in diagnosis.findings] == [
        ("note", "about 25 % of the 0.1 billion weights were read")]


def test_only_the_strangest_of_neighbours_is_named():
    kind = [TensorStatistics("w", "down", layer, 0, (4, 4), rows=numpy.full(4, 1.0 + layer / 50)) for layer in range(12)]
    kind[6].rows *= 25.0
    assert [(found.statistics.layer, round(numpy.exp(found.log_factor))) for found in strange_levels(kind)] == [(6, 5)]


def test_flat_profiles_are_no_correlations():
    """Profiles are correlations, and flat ones are none."""
    dice = numpy.random.default_rng(1)
    values = numpy.exp(dice.standard_normal(100))
    assert profile(values) @ profile(values**3) == pytest.approx(1)
    assert profile(numpy.ones(100)) is None and profile(numpy.full(100, numpy.nan)) is None


def against(path, original):
    return [(finding.severity, finding.what) for finding in diagnose(path, only=["against"], against=original).findings]


def test_a_model_is_its_own_original(tmp_path):
    path = chatml_gguf(tmp_path)
    (_, far), (severity, predicted) = against(path, shutil.copy(path, tmp_path / "copy.gguf"))
    assert far.endswith("half are at most 0.0%")
    assert severity == "note" and "mean KL 0 nats" in predicted and "the same at 100.0%" in predicted


def test_what_is_not_the_original_s_is_named(tmp_path):
    original = chatml_gguf(tmp_path)
    other = rewritten(Path(shutil.copy(original, tmp_path / "other.gguf")), {"llama.rope.freq_base": 5000.0})
    with bytes_of(other, "blk.0.ffn_down.weight") as rows:
        rows.view(numpy.float32)[:] = rows.view(numpy.float32)[::-1].copy()
    said = against(other, original)
    assert said[0] == ("error", "layers.0.mixer.rope.base is 5,000; the original's is 10,000")
    assert said[1][0] == "error" and said[1][1].startswith("0.down is 14") and "of its length away" in said[1][1]


def test_the_kind_of_tensor_that_costs_is_named(tmp_path):
    from safetensors.torch import load_file, save_file
    original = save(make_model("llama3.1"), tmp_path / "original")
    other = Path(shutil.copytree(original, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(state | {name: state[name].flip(0).contiguous()}, other / "model.safetensors")
    said = against(other, original)
    assert said[0][0] == "error" and said[0][1].startswith("1.down is 1")
    assert [what.partition("regain: ")[2] for _, what in said if "regain" in what] == ["feed-forward down 100%"], said


def test_what_each_tensor_costs_is_named(tmp_path):
    from safetensors.torch import load_file, save_file
    original = save(make_model("llama3.1"), tmp_path / "original")
    other = Path(shutil.copytree(original, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    much, little = "model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"
    save_file(state | {much: state[much] * 0.6, little: state[little] * 0.99}, other / "model.safetensors")
    [finding] = [finding for finding in diagnose(other, only=["against"], against=original).findings
                 if "regained_by_tensor" in (finding.facts or {})]
    costs = finding.facts["regained_by_tensor"]
    assert finding.what.startswith("the original's tensor alone regains most for: 1.down 9") and [*costs] == ["1.down", "2.output"]
    assert costs["1.down"] > 0.9 > 0.1 > costs["2.output"]


def test_an_original_of_another_shape_is_refused(tmp_path, nanochat_fixtures, default_file):
    """An original of another vocabulary or shape is refused."""
    path = small_gguf(tmp_path)
    [(severity, what)] = against(path, sorted(nanochat_fixtures.iterdir())[0])
    assert severity == "error" and "another vocabulary" in what
    said = against(path, default_file)
    assert said[-1] == ("error", "the original's tensors have other shapes, so the two cannot be compared")


def test_memory_grows_and_helpful_flags_are_named(default_file, monkeypatch):
    """Memory grows with the context, and flags that help are named."""
    [fits] = diagnose(default_file, only=["memory"]).findings
    assert fits.severity == "note" and list(fits.facts["needed"]) == ["4096", "8192"]
    assert fits.facts["needed"]["8192"] > fits.facts["needed"]["4096"]
    monkeypatch.setattr(fit, "available_memory", lambda: 250_000_000)
    [narrow] = diagnose(default_file, only=["memory"]).findings
    assert 4096 <= narrow.facts["longest"] < 8192
    assert f"--context-length {narrow.facts['longest']}" in narrow.advice and "--kv-cache-dtype q8_0" in narrow.advice
    monkeypatch.setattr(fit, "available_memory", lambda: 50_000_000)
    [lacks] = diagnose(default_file, only=["memory"]).findings
    assert lacks.severity == "error"


def test_speed_is_tried_or_estimated(default_file, monkeypatch):
    [tried] = diagnose(default_file, only=["speed"]).findings
    assert tried.facts["measured"] and tried.facts["tokens_per_s"] > 0
    monkeypatch.setattr(fit, "TRIED_BYTES", 0)
    [estimated] = diagnose(default_file, only=["speed"]).findings
    assert not estimated.facts["measured"] and "estimated: a token reads 96.6 MB" in estimated.what


def test_floats_are_advised_to_be_quantized(tmp_path):
    [finding] = diagnose(small_folder(tmp_path), only=["speed"]).findings
    assert finding.advice.startswith("--quantize q4_0 is faster")
