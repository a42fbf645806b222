"""The story of loading (docs/loading.md), told of every format."""

import gc
import shutil
import weakref
from pathlib import Path

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.worker.weights.load import open_model
from families import make_model, save, write_tokenizer
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf
from tiny_nanogpt import ARGS, random_state, write, write_meta

FIXTURES = Path(__file__).parents[2] / "fixtures"
FORMATS = "gguf", "hf", "litgpt", "nanochat", "nanogpt"


@pytest.fixture
def model_of_format(tmp_path):
    """A function from a kind of files to a tiny model of them."""
    def make(kind):
        if kind == "gguf":
            return write_gguf(tmp_path / "tiny.gguf", random_llama(), LLAMA_NUMBERS)
        if kind == "hf":
            return save(make_model("llama3.2"), tmp_path / "tiny")
        if kind == "litgpt":
            folder = shutil.copytree(FIXTURES / "litgpt/llama3", tmp_path / "llama3")
            write_tokenizer(folder)
            return folder
        if kind == "nanochat":
            return FIXTURES / "nanochat/gen4"
        write_meta(write(tmp_path / "tiny", random_state(ARGS), ARGS) / "meta.pkl")
        return tmp_path / "tiny"
    return make


def opened(path, **settings):
    settings = Settings(model=str(path), **settings)
    return open_model(resolve_model(settings), settings)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_goes_through_the_same_story(kind, model_of_format):
    path = model_of_format(kind)
    source = resolve_model(Settings(model=str(path)))
    model = opened(path)
    assert source.kind == kind
    assert f", {len(model.architecture.layers)} layers, width {model.architecture.width}" in model.description
    assert model.tensors.keys() == {*model.architecture.shapes()} - ({"head"} if model.architecture.tied else set())
    assert model.text.kind and model.family and model.adaptable.names[0] == model.name


@pytest.mark.parametrize("kind", FORMATS)
def test_what_adapters_need_keeps_no_tensor(kind, model_of_format):
    """What later adapters need of a model keeps none of its tensors."""
    model = opened(model_of_format(kind))
    adaptable = model.adaptable
    mapped = [weakref.ref(array) for tensor in model.tensors.values() for array in tensor.mapped]
    assert len(mapped) > 5 and all(array() is not None for array in mapped)
    del model
    gc.collect()
    assert [array() for array in mapped if array() is not None] == []
    assert adaptable.slices() and adaptable.sources


@pytest.mark.parametrize("kind", FORMATS)
def test_a_context_beyond_the_model_s_is_refused(kind, model_of_format):
    path = model_of_format(kind)
    longest = opened(path).context_length
    assert opened(path, context_length=32).context_length == 32
    with pytest.raises(ConfigError, match=f"--context-length {longest + 1} is more than the model's {longest}"):
        opened(path, context_length=longest + 1)
