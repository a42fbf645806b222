"""A real server and `check`, with files of GGUF's smallest types and with those that are refused."""

import json
import os

import numpy
import pytest

import few_bits
import forked
from chatlm.worker.weights.formats.gguf.file import read_gguf
from few_bits import NUMBERS, packed
from real_server import SCRIPT, post, server
from sick_models import diagnose, rewritten
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

UP = "blk.0.ffn_up.weight"
TOKENS = 12


def file_of(folder, kind=None, metadata=None, head=None):
    """A tiny llama whose matrices are of one of the smallest types."""
    path = folder / "tiny.gguf"
    tensors = random_llama()
    path.write_bytes(gguf_bytes({"general.architecture": "llama", **LLAMA_NUMBERS, **small_gguf_metadata("gpt-2"), **(metadata or {})},
                                tensors))
    if not (kind or head):
        return path
    more = {}
    for name, values in tensors.items():
        own = (head or kind) if name == "token_embd.weight" else kind
        if own in NUMBERS and values.ndim == 2:
            more[name] = packed(own, as_trained(own, values)), values.shape, NUMBERS[own]
    return rewritten(path, {}, more=more)


def as_trained(kind, values):
    """Values of few levels: a third of a ternary model's weights are zeros (Ma et al., "The era of 1-bit LLMs", 2024)."""
    if few_bits.BITS[kind] == 1:
        return values
    scale = numpy.abs(values).mean()
    return (numpy.rint(values / scale).clip(-1, 1) * scale).astype(numpy.float32)


def answer(url):
    with post(f"{url}/v1/completions", {"prompt": "hello 1 23", "max_tokens": TOKENS, "temperature": 0, "logprobs": 1,
                                        "ignore_eos": True}) as response:
        choice = json.load(response)["choices"][0]
    return choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]


def floats_of(path):
    """A copy of the file with the values of its blocks in float32."""
    more = {}
    for name, tensor in read_gguf(path)[1].items():
        kind = tensor.tensor_type.name.lower()
        if kind in NUMBERS:
            shape = tuple(reversed(tensor.shape.tolist()))
            more[name] = few_bits.values_of(kind, numpy.array(tensor.data)).reshape(shape), shape, 0
    copy = path.with_name("floats.gguf")
    copy.write_bytes(path.read_bytes())
    return rewritten(copy, {}, more=more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", few_bits.BITS)
def test_a_server_answers_from_a_file_as_from_its_values(kind, tmp_path):
    path = file_of(tmp_path, kind)
    found = []
    for model, flags in ((path, ["--arithmetic", "fine"]), (floats_of(path), ["--dtype", "float32"])):
        with server(model, "--no-drafts", *flags) as (_, url):
            found.append(answer(url))
    (tokens, logprobs), (expected, of_values) = found
    same = next((place for place, pair in enumerate(zip(tokens, expected)) if pair[0] != pair[1]), TOKENS)
    assert same == TOKENS or abs(logprobs[same] - of_values[same]) < 0.05  # two tokens are about equally likely
    numpy.testing.assert_allclose(logprobs[:same], of_values[:same], atol=0.05)
    assert same > 2


def run(*words):
    done = forked.run_command(SCRIPT, [*map(str, words)], os.environ)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("kind", few_bits.BITS)
def test_check_reads_each_type_and_says_what_it_is_for(kind, tmp_path):
    """The head of such a model is of the same type, because it was trained so: no advice to take another."""
    diagnosis = diagnose(file_of(tmp_path, kind), only=["types", "tokenizer", "weights", "round trips"])
    said = [(finding.severity, finding.what) for finding in diagnosis.findings]
    assert diagnosis.refused == "" and not [what for severity, what in said if severity != "note"], said
    assert any(kind.upper() in what and "trained" in what for _, what in said)


def test_a_head_of_one_bit_in_another_model_is_still_named(tmp_path):
    diagnosis = diagnose(file_of(tmp_path, None, head="q1_0"), only=["types"])
    assert [finding.severity for finding in diagnosis.findings] == ["warning"]
    assert "the head token_embd.weight" in diagnosis.findings[0].what and "Q1_0" in diagnosis.findings[0].what


REFUSED = {
    "PQ2_0": ({}, 142, "of type PQ2_0 of PrismML's fork"), "PTQ1_0": ({}, 143, "of type PTQ1_0 of PrismML's fork"),
    "I2_S": ({"general.architecture": "bitnet-b1.58"}, 36, "of type I2_S of Microsoft's fork"),
    "signs": ({"prism.hadamard.version": 1}, None, "Hadamard rotations"),
    "cut": ({"tokenizer.ggml.pre": "no-such-cut"}, None, "no-such-cut")}


@pytest.mark.parametrize("command", ("check", pytest.param("serve", marks=pytest.mark.slow)))
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name_in_one_line(case, command, tmp_path):
    metadata, number, words = REFUSED[case]
    path = file_of(tmp_path, metadata=metadata)
    if number:
        data = path.read_bytes()
        path = other_type(path, data, number)
    status, said, error = run(command, path, *(("--port", "0") if command == "serve" else ()))
    lines = error.strip().splitlines()
    assert status == 2 and words in lines[-1] and "Traceback" not in error + said
    if command == "check":
        assert len(lines) == 1 and str(path) in lines[0]


def other_type(path, data, number):
    """The file, in whose header one tensor has another type."""
    name = UP.encode()
    at = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 2 * 8
    assert data[at:at + 4] == bytes(4)  # F32
    path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4:])
    return path
