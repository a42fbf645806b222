"""Importance is measured from the model's own activations, and files of it are llama.cpp's."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import ModelSource
from chatlm.export.gguf.export import export_gguf
from chatlm.export.gguf.importance import Importance, SquareSums, read_importance, write_importance
from chatlm.export.gguf.measure import measure_importance
from chatlm.export.gguf.packers import pack
from chatlm.worker.arrays.gguf_types import TYPES
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.weights.formats.gguf.file import read_gguf
from generations import GENERATIONS
from nightly import by_day
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf

FIXTURES = Path(__file__).parents[2] / "fixtures" / "nanochat"
TEXT = "It was the best of times, it was the worst of times, and 1859 was near. " * 20


def source_of(path):
    return ModelSource("gguf", Path(path), Path(path).stem, "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path, random_llama(), LLAMA_NUMBERS)
    return path


def measured(source, text=TEXT, **more):
    return measure_importance(source, Settings(context_length=64), text, "text.txt", **more)


def some_importance(columns=256, experts=1):
    squares = np.random.default_rng(1).random((experts, columns), np.float32) * 100
    return Importance({"blk.0.ffn_up.weight": SquareSums(squares, np.full(experts, 50, np.float32))}, ("book.txt",), 3, 64)


def test_a_file_comes_back_and_the_gguf_package_reads_it(tmp_path):
    importance = some_importance(experts=2)
    write_importance(importance, tmp_path / "imatrix.gguf")
    found = read_importance(tmp_path / "imatrix.gguf")
    sums = found.tensors["blk.0.ffn_up.weight"]
    assert np.array_equal(sums.squares, importance.tensors["blk.0.ffn_up.weight"].squares)
    assert (found.datasets, found.chunks, found.chunk_tokens) == (("book.txt",), 3, 64)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes == {"blk.0.ffn_up.weight.in_sum2": [256, 2], "blk.0.ffn_up.weight.counts": [1, 2]}
    assert reader.fields["general.type"].contents() == "imatrix"


def test_a_matrix_that_no_token_used_counts_as_usual():
    sums = SquareSums(np.array([[2, 4], [0, 0]], np.float32), np.array([2, 0], np.float32))
    assert sums.means.tolist() == [[1, 2], [1, 1]]


def old_file(path, entries, tail=b""):
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    path.write_bytes(data + tail)
    return path


def test_the_older_format_is_read(tmp_path):
    tail = struct.pack("<ii", 7, 5) + b"a.txt"
    found = read_importance(old_file(tmp_path / "old.dat", [("blk.0.ffn_up.weight", 4, [8, 16])], tail))
    assert found.tensors["blk.0.ffn_up.weight"].means.tolist() == [[2, 4]]
    assert (found.chunks, found.datasets) == (7, ("a.txt",))


@pytest.mark.parametrize("data, words", (
    (b"", "neither a GGUF file nor"), (b"GGUF", "is truncated"), (b"\xff" * 100, "neither a GGUF file nor"),
    (struct.pack("<i", 1) + struct.pack("<i", 3) + b"abc" + struct.pack("<ii", 1, 1 << 30), "neither a GGUF file nor"),
    (b"It was the best of times", "neither a GGUF file nor")))
def test_what_is_no_file_of_importance_is_refused_in_one_line(data, words, tmp_path):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as refused:
        read_importance(path)
    assert "\n" not in str(refused.value)


def test_a_model_is_no_file_of_importance(model):
    with pytest.raises(ConfigError, match="general.type is 'model', not imatrix|not imatrix"):
        read_importance(model)


def test_importance_that_is_not_finite_is_refused(tmp_path):
    importance = some_importance()
    importance.tensors["blk.0.ffn_up.weight"].squares[0, 3] = np.inf
    write_importance(importance, tmp_path / "imatrix.gguf")
    with pytest.raises(ConfigError, match="not finite"):
        read_importance(tmp_path / "imatrix.gguf")


def test_importance_of_another_model_is_refused(model, tmp_path):
    write_importance(some_importance(columns=128), tmp_path / "imatrix.gguf")
    with pytest.raises(ConfigError, match="of another model: .*128 columns there and 256"):
        export_gguf(source_of(model), tmp_path / "out.gguf", type="Q4_0", imatrix=tmp_path / "imatrix.gguf")
    other = Importance({"blk.90.ffn_up.weight": SquareSums(np.ones((1, 256), np.float32), np.ones(1, np.float32))})
    write_importance(other, tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match="none of its tensors is in this one"):
        export_gguf(source_of(model), tmp_path / "out.gguf", type="Q4_0", imatrix=tmp_path / "other.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("kind", ("Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"))
def test_a_type_that_needs_importance_says_so(kind, model, tmp_path):
    with pytest.raises(ConfigError, match=f"--type {kind} needs --imatrix"):
        export_gguf(source_of(model), tmp_path / "out.gguf", type=kind)
    few = Importance({"blk.0.ffn_up.weight": SquareSums(np.ones((1, 256), np.float32), np.ones(1, np.float32))})
    write_importance(few, tmp_path / "few.gguf")
    with pytest.raises(ConfigError, match=f"--type {kind} needs --imatrix, which has none of .*blk.0"):
        export_gguf(source_of(model), tmp_path / "out.gguf", type=kind, imatrix=tmp_path / "few.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_matrices_without_importance_are_counted(model, tmp_path):
    few = Importance({"blk.0.ffn_up.weight": SquareSums(np.ones((1, 256), np.float32), np.ones(1, np.float32))})
    write_importance(few, tmp_path / "few.gguf")
    made = export_gguf(source_of(model), tmp_path / "few-used.gguf", type="Q4_0", imatrix=tmp_path / "few.gguf")
    quantized = [tensor for tensor in read_gguf(made.path)[1].values() if tensor.tensor_type.name not in ("F32", "F16")]
    assert made.without == len(quantized) - 1 > 1
    assert not export_gguf(source_of(model), tmp_path / "none-used.gguf", type="Q4_0").without


@pytest.mark.parametrize("kind", by_day(("IQ3_S", "IQ3_M"), "IQ3_S"))
def test_iq3_does_without_importance(kind, model, tmp_path):
    export_gguf(source_of(model), tmp_path / "out.gguf", type=kind)
    assert read_gguf(tmp_path / "out.gguf")[1]["blk.0.ffn_up.weight"].tensor_type.name == "IQ3_S"


@pytest.mark.parametrize("kind", by_day(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_M", "IQ3_XXS"), "IQ1_S"))
def test_a_file_of_few_bits_is_near_its_original(kind, model, tmp_path):
    """As near as such types can be: random weights lose about as much as they have bits too few."""
    found = measured(source_of(model)).importance
    write_importance(found, tmp_path / "imatrix.gguf")
    export_gguf(source_of(model), tmp_path / "out.gguf", type=kind, imatrix=tmp_path / "imatrix.gguf")
    stored = read_gguf(tmp_path / "out.gguf")[1]
    original = random_llama()
    most = 0.7 if kind.startswith("IQ1") else 0.5
    for name in ("ffn_up", "attn_q"):
        tensor = stored[f"blk.0.{name}.weight"]
        assert tensor.tensor_type.name.startswith("IQ")
        values = original[tensor.name]
        means = found.tensors[tensor.name].means
        lost = np.square(dequantize(tensor.tensor_type, tensor.data).reshape(values.shape) - values) * means
        assert lost.sum() < most**2 * (np.square(values) * means).sum()


def test_each_expert_is_packed_by_its_own_importance(tmp_path):
    random = np.random.default_rng(3)
    experts = random.standard_normal((3, 8, 64)).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", {"blk.0.ffn_up_exps.weight": experts}, LLAMA_NUMBERS | {"llama.expert_count": 3})
    sums = SquareSums(random.random((3, 64), np.float32), np.array([4, 0, 9], np.float32))
    write_importance(Importance({"blk.0.ffn_up_exps.weight": sums}), tmp_path / "imatrix.gguf")
    export_gguf(source_of(tmp_path / "model.gguf"), tmp_path / "out.gguf", type="Q4_0", imatrix=tmp_path / "imatrix.gguf")
    stored = read_gguf(tmp_path / "out.gguf")[1]["blk.0.ffn_up_exps.weight"].data
    for packed, rows, means in zip(stored, experts, sums.means):
        assert np.array_equal(packed, pack("Q4_0", rows, means))


def inputs_by_hand(tensors, ids):
    """What the tiny llama's first products read, (T, 256) float64: the norm of the embedding."""
    x = tensors["token_embd.weight"][ids].astype(np.float64)
    return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * tensors["blk.0.attn_norm.weight"]


@pytest.mark.parametrize("kernels", ("", "reference"))
def test_sums_are_those_of_the_inputs(model, kernels, choose_kernels):
    choose_kernels(kernels)
    from chatlm.common.text.load import open_tokenizer
    from chatlm.worker.weights.load import open_model
    source = source_of(model)
    text = open_model(source, Settings()).text
    ids = [*open_tokenizer(text).encode(TEXT)]
    if text.add_bos:
        ids = [text.bos_token, *ids]
    ids = ids[:len(ids) // 64 * 64]
    if text.add_bos:
        ids[::64] = [text.bos_token] * len(ids[::64])
    found = measured(source).importance
    expected = np.square(inputs_by_hand(random_llama(), ids)).sum(0)
    for name in ("attn_q", "attn_k", "attn_v"):
        sums = found.tensors[f"blk.0.{name}.weight"]
        assert sums.counts.tolist() == [len(ids)]
        np.testing.assert_allclose(sums.squares[0], expected, rtol=2e-2)
    assert found.tensors.keys() == {f"blk.0.{name}.weight" for name in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    assert found.tensors["blk.0.ffn_down.weight"].squares.shape == (1, 512)


def test_kernels_and_references_measure_the_same(model, choose_kernels):
    choose_kernels("")
    ours = measured(source_of(model)).importance
    choose_kernels("reference")
    theirs = measured(source_of(model)).importance
    for name, sums in ours.tensors.items():
        np.testing.assert_allclose(sums.means, theirs.tensors[name].means, rtol=0.05, atol=0.02 * sums.means.max())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_nanochats_matrices_are_measured_and_used(generation, tmp_path):
    source = resolve_model(Settings(model=str(FIXTURES / generation)))
    found = measured(source)
    assert found.missing == ()
    write_importance(found.importance, tmp_path / "imatrix.gguf")
    for name, options in (("with", {"imatrix": tmp_path / "imatrix.gguf"}), ("without", {})):
        export_gguf(source, tmp_path / f"{name}.gguf", type="Q4_0", **options)
    original = read_gguf_floats(source, tmp_path)
    lost = {}
    for name in ("with", "without"):
        stored = read_gguf(tmp_path / f"{name}.gguf")[1]
        lost[name] = sum(weighted_loss(stored[tensor], original[tensor], found.importance.tensors[tensor])
                         for tensor in found.importance.tensors if stored[tensor].tensor_type.name == "Q4_0")
    assert 0 < lost["with"] < lost["without"]


def read_gguf_floats(source, folder):
    export_gguf(source, folder / "floats.gguf", type="F32")
    return {name: tensor.data for name, tensor in read_gguf(folder / "floats.gguf")[1].items()}


def weighted_loss(tensor, original, sums):
    values = dequantize(TYPES[tensor.tensor_type.name], tensor.data).reshape(original.shape)
    return float((np.square(values - original) * sums.means).sum())


def test_chunks_bound_what_is_read(model):
    found = measured(source_of(model), chunks=2)
    assert found.tokens == 128 and found.importance.chunks == 2 and found.importance.chunk_tokens == 64


def test_a_text_that_is_too_short_is_refused(model):
    with pytest.raises(ConfigError, match="the text has .* tokens; give at least 32"):
        measured(source_of(model), text="Too short.")
