"""GGUF's smallest types: Q1_0, the two layouts of Q2_0, and types of forks, which are refused by name."""

from pathlib import Path

import numpy
import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.default_model import fetch_default_model
from chatlm.common.hub.find import resolve_model
from chatlm.worker.arrays.gguf_types import TYPES
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.formats.gguf.file import read_gguf, read_gguf_file
from chatlm.worker.weights.load import open_model
import few_bits
from engines import forward_logits, tensors_of
from few_bits import COLUMNS, NUMBERS, packed, values_of
from sick_models import diagnose, rewritten
from sick_weights import wide_gguf
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

UP = "blk.0.ffn_up.weight"


def load(path, dtype="float32"):
    settings = Settings(model=str(path), dtype=dtype)
    return open_model(resolve_model(settings), settings)


def file_of(folder, kinds, metadata=None, tensors=None):
    """A tiny llama whose tensors are of these kinds, by a part of their names."""
    path = Path(folder) / "tiny.gguf"
    tensors = tensors or random_llama()
    path.write_bytes(gguf_bytes({"general.architecture": "llama", **LLAMA_NUMBERS, **small_gguf_metadata("gpt-2"), **(metadata or {})}, tensors))
    more = {}
    for name, values in tensors.items():
        kind = next((kind for part, kind in kinds.items() if part in name and values.ndim == 2), None)
        if kind:
            more[name] = packed(kind, values), values.shape, NUMBERS[kind]
    return rewritten(path, {}, more=more)


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", few_bits.BITS)
def test_the_reference_unpacks_every_byte(kind):
    raw = numpy.random.default_rng(3).integers(0, 256, (7, 3 * (2 + COLUMNS[kind] * few_bits.BITS[kind] // 8)), numpy.uint8)
    raw.reshape(21, -1)[:, :2] = numpy.linspace(-3, 3, 21).astype("<f2").view(numpy.uint8).reshape(21, 2)
    numpy.testing.assert_array_equal(dequantize(TYPES[kind.upper()], raw).reshape(7, -1), values_of(kind, raw))


@pytest.mark.parametrize("kind", few_bits.BITS)
def test_a_file_of_one_type_is_held_as_it_is(tmp_path, kind):
    path = file_of(tmp_path, {"blk.": kind, "token_embd": kind})
    _, stored = read_gguf(path)
    assert {tensor.tensor_type.name for tensor in stored.values()} == {"F32", kind.upper()}
    plain = random_llama()
    for name, tensor in stored.items():
        if tensor.tensor_type.name != "F32":
            numpy.testing.assert_array_equal(tensor.data, packed(kind, plain[name]))
    model = load(path, None)
    if decode_core():
        assert "re-quantized" not in model.description and not model.grows
        assert tensors_of(model)["0.down"].kind == kind


def logits_of(path, ids, dtype):
    """All logits of a text, with decode_core where it is; with "float32" from the dequantized weights."""
    model = load(path, dtype)
    count, pages = len(ids), -(-len(ids) // 16)
    batch = Batch(token_ids=ids, previous_token_ids=[-1, *ids[:-1]], starts=[0, count], lengths=[count], tables=[list(range(pages))],
                  logit_rows=list(range(count)))
    limits = {"max_tokens": count, "max_rows": count}
    kernels = load_kernels("cpu", model.architecture, fine=True, **limits)     # many layers of one bit make much of a rounded x
    return forward_logits(Transformer(model.architecture, dict(model.tensors), kernels, num_pages=pages, device="cpu", dtype=dtype, **limits), batch)


MIXED = {"attn_q": "q1_0", "attn_k": "q2_0", "attn_v": "q1_0", "attn_output": "q2_0", "ffn_gate": "q2_0", "ffn_up": "q1_0", "ffn_down": "q1_0",
         "token_embd": "q2_0"}
OLDER = {part: kind.replace("q2_0", "q2_0_g128") for part, kind in MIXED.items()}


@pytest.mark.parametrize("kinds", [MIXED, OLDER], ids=["llama.cpp's", "PrismML's older files'"])
def test_a_mixed_file_computes_its_values(tmp_path, kinds):
    """q, k and v of one matrix differ; logits beside those of the values in float32."""
    path = file_of(tmp_path, kinds)
    assert_near(path, file_of_values(path), list(range(3, 43)))


def file_of_values(path):
    """The same file with float32 values, unpacked by the tests' own reader."""
    _, stored = read_gguf(path)
    more = {}
    for name, tensor in stored.items():
        kind = tensor.tensor_type.name.lower()
        if kind in NUMBERS:
            shape = tuple(reversed(tensor.shape.tolist()))
            more[name] = values_of(kind, numpy.array(tensor.data)).reshape(shape), shape, 0
    copy = path.with_name("values.gguf")
    copy.write_bytes(path.read_bytes())
    return rewritten(copy, {}, more=more)


def assert_near(path, values, ids):
    exact, ours = logits_of(values, ids, "float32"), logits_of(path, ids, None)
    assert (ours - exact).abs().max() < 0.02 * exact.abs().max()
    assert torch.isfinite(ours).all() and exact.std() > 0


@pytest.mark.slow
def test_the_default_model_in_one_and_two_bits_computes_its_values(tmp_path):
    """Its rows of 576 are no multiple of 128, so only the down projections can be Q1_0."""
    whole = fetch_default_model()
    _, stored = read_gguf(whole)
    more = {}
    for name, tensor in stored.items():
        kind = "q1_0" if "ffn_down" in name else "q2_0"
        if tensor.tensor_type.name == "Q4_1":
            shape = tuple(reversed(tensor.shape.tolist()))
            more[name] = packed(kind, dequantize(tensor.tensor_type, numpy.array(tensor.data)).reshape(shape)), shape, NUMBERS[kind]
    assert len(more) > 100
    path = tmp_path / "small.gguf"
    path.write_bytes(whole.read_bytes())
    rewritten(path, {}, more=more)
    assert {tensor.tensor_type.name for tensor in read_gguf(path)[1].values()} >= {"Q1_0", "Q2_0"}
    assert_near(path, file_of_values(path), list(range(1000, 1040)))


def test_two_layouts_in_one_file_are_refused(tmp_path):
    found = refusal(file_of(tmp_path, {"ffn_up": "q2_0", "ffn_down": "q2_0_g128"}))
    assert "blk.0.ffn_down.weight" in found and "type 42" in found and "fit neither, or other tensors have the other" in found


def test_a_distance_that_fits_neither_layout_is_refused(tmp_path):
    """As a file has it whose tensors overlap, or whose type has a third layout."""
    rows = packed("q2_0", random_llama()[UP])
    path = rewritten(file_of(tmp_path, {}), {}, more={UP: (rows[:-10], (512, 256), 42)})
    found = refusal(path)
    assert UP in found and "a scale for 64 weights (llama.cpp) or for 128 (older files of PrismML's fork)" in found


def test_tensors_too_small_to_tell_the_layout_are_refused(tmp_path):
    """36 and 34 bytes are both 64 with what fills them up."""
    path = rewritten(file_of(tmp_path, {}), {}, more={"blk.0.more.weight": (numpy.zeros(36, numpy.uint8), (1, 128), 42),
                                                      "blk.0.rest.weight": (numpy.zeros(8, numpy.float32), (8,), 0)})
    assert "the file does not tell which" in refusal(path)


@pytest.mark.parametrize("kind", ["q2_0", "q2_0_g128"])
def test_a_small_tensor_has_the_layout_of_the_others(tmp_path, kind):
    path = file_of(tmp_path, {"ffn_down": kind})
    rewritten(path, {}, more={"blk.0.more.weight": (numpy.zeros(36, numpy.uint8), (1, 128), 42),
                              "blk.0.rest.weight": (numpy.zeros(8, numpy.float32), (8,), 0)})
    _, stored = read_gguf_file(path)
    assert stored["blk.0.more.weight"].tensor_type.name == kind.upper()


@pytest.mark.parametrize("kind", ["q2_0", "q2_0_g128"])
@pytest.mark.parametrize("end", [b"", bytes(1), bytes(4096)])
def test_the_last_tensor_ends_with_the_file_or_before(tmp_path, kind, end):
    """Some writers do not fill up the last tensor, and anything may follow it."""
    tensors = random_llama() | {"blk.0.last.weight": numpy.ones((3, 128), numpy.float32)}
    path = file_of(tmp_path, {"ffn_down": kind, "last": kind}, tensors=tensors)
    whole = path.read_bytes()
    tensor = read_gguf_file(path)[1]["blk.0.last.weight"]
    path.write_bytes(whole[:tensor.data_offset + tensor.n_bytes] + end)
    assert read_gguf_file(path)[1]["blk.0.last.weight"].tensor_type.name == kind.upper()


def test_a_truncated_file_of_q2_0_is_named(tmp_path):
    path = file_of(tmp_path, {"ffn_up": "q2_0", "ffn_down": "q2_0"})
    whole = path.read_bytes()
    tensor = read_gguf_file(path)[1]["blk.0.ffn_down.weight"]
    for size in (len(whole) - 64, tensor.data_offset + 100):
        path.write_bytes(whole[:size])
        assert "is truncated" in refusal(path)


@pytest.mark.parametrize("kind", few_bits.BITS)
def test_a_scale_that_is_nan_is_named(tmp_path, kind):
    rows = packed(kind, random_llama()[UP])
    rows.reshape(-1, 2 + COLUMNS[kind] * few_bits.BITS[kind] // 8)[-3, :2] = numpy.array([0x7E00], "<u2").view(numpy.uint8)
    path = rewritten(file_of(tmp_path, {}), {}, more={UP: (rows, (512, 256), NUMBERS[kind])})
    model = load(path, None)
    with pytest.raises(ConfigError, match=f"{UP} has a {kind.upper()} scale that is NaN or infinite"):
        Transformer(model.architecture, dict(model.tensors), load_kernels("cpu", model.architecture, max_tokens=8, max_rows=8), num_pages=1,
                    device="cpu", dtype=None, max_tokens=8, max_rows=8)


@pytest.mark.parametrize("number, kind", [(41, 128), (42, 64)])
def test_rows_that_are_not_whole_blocks_are_refused(tmp_path, number, kind):
    path = rewritten(file_of(tmp_path, {}), {}, more={"blk.0.more.weight": (numpy.zeros(64, numpy.uint8), (4, 96), number)})
    assert f'"blk.0.more.weight" has rows of 96; its type needs a multiple of {kind}' in refusal(path)


@pytest.mark.parametrize("number, architecture, words", [
    (142, "qwen3", "is of type PQ2_0 of PrismML's fork of llama.cpp (IQ2_TN of ik_llama.cpp), which this program does not read"),
    (143, "llama", "is of type PTQ1_0 of PrismML's fork of llama.cpp (IQ1_TN of ik_llama.cpp), which this program does not read"),
    (36, "bitnet-b1.58", "is of type I2_S of Microsoft's fork of llama.cpp, which this program does not read"),
    (36, "llama", "is of type IQ4_NL_4_4, whose rows are mixed for one kind of CPU")])
def test_types_of_forks_are_refused_by_name(tmp_path, number, architecture, words):
    path = file_of(tmp_path, {}, {"general.architecture": architecture})
    with pytest.raises(ConfigError) as caught:
        rewritten(path, {}, more={UP: (numpy.zeros(512 * 64, numpy.uint8), (512, 256), number)})
        load(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["prism.hadamard.version", "prism.hadamard.block_size"])
def test_files_with_hadamard_rotations_are_refused(tmp_path, key):
    path = file_of(tmp_path, {"blk.": "q1_0"}, {})
    rewritten(path, {key: 1})
    assert f'it has the key "{key}": its weights need the Hadamard rotations of PrismML' in refusal(path)


def test_a_bitnet_model_is_refused_by_name(tmp_path):
    assert "cannot run bitnet: its ternary weights" in refusal(file_of(tmp_path, {}, {"general.architecture": "bitnet"}))
