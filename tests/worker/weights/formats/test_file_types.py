"""What a GGUF file's quantization is called, in the file and in /api/show."""

import json

import gguf
import numpy
import pytest

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.export.gguf.mixes import MIXES
from chatlm.worker.weights.formats.gguf.file_types import FILE_TYPES, quantization_of
from chatlm.worker.weights.load import open_model
from real_server import get, post, server
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf

NAMES = {int(number): number.name.partition("_")[2] for number in gguf.LlamaFileType if number != 1024}


def test_the_numbers_are_llama_cpps():
    assert FILE_TYPES == NAMES
    assert set(MIXES) <= set(FILE_TYPES.values())


def rows_of_q5(tensors):
    """Matrices as a small model's Q4_K_M has most of them."""
    kind = gguf.GGMLQuantizationType.Q5_0
    return {name: (gguf.quantize(tensor.astype(numpy.float32), kind), kind) if tensor.ndim > 1 else tensor
            for name, tensor in tensors.items()}


def small_file(path, **more):
    return write_gguf(path, rows_of_q5(random_llama()), LLAMA_NUMBERS, small_gguf_metadata("gpt-2", **more))


@pytest.mark.parametrize("more, level", [
    ({"general.file_type": 15}, "Q4_K_M"), ({"general.file_type": 30}, "IQ4_XS"), ({}, "Q5_0"),
    ({"general.file_type": 999}, "Q5_0"), ({"general.file_type": "Q4_K_M"}, "Q5_0")])
def test_the_file_says_it_or_most_of_its_weights(tmp_path, more, level):
    path = small_file(tmp_path / "m.gguf", **more)
    settings = Settings(model=str(path))
    assert open_model(resolve_model(settings), settings).quantization == level


def test_a_file_without_tensors_has_none():
    assert quantization_of({}, []) == ""


@pytest.mark.parametrize("flags, level", [((), "Q4_K_M"), (("--dtype", "float32"), "F32")])
def test_ollamas_and_lm_studios_clients_see_it(tmp_path, flags, level):
    with server(small_file(tmp_path / "m.gguf", **{"general.file_type": 15}), *flags) as (_, url):
        with post(f"{url}/api/show", {"model": "default"}) as response:
            shown = json.load(response)
        assert shown["details"]["quantization_level"] == level
        (listed,) = get(f"{url}/api/v0/models")["data"]
        assert listed["quantization"] == level
