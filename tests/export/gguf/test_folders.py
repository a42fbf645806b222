"""A Hugging Face folder of a plain family becomes a GGUF file that computes the same."""

import json

import numpy as np
import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import ModelSource
from chatlm.common.text.load import open_tokenizer
from chatlm.export.gguf.export import export_gguf
from chatlm.export.gguf.measure import measure_importance
from chatlm.worker.doctor.hard_texts import HARD_TEXTS
from chatlm.worker.doctor.running import ready, step
from chatlm.worker.weights.gguf_file import read_gguf
from chatlm.worker.weights.load import open_model
from families import make_model, save

IDS = [*range(5, 45)]
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
FOLDERS = {"llama2": {}, "llama3.2": {}, "llama3.1": {}, "qwen2": {"use_sliding_window": False, "layer_types": None},
           "qwen3": {"rope_parameters": PLAIN}}


def folder_source(path):
    return resolve_model(Settings(model=str(path)))


def file_source(path):
    return ModelSource("gguf", path, "written", "")


def logits(source):
    settings = Settings(arithmetic="fine", dtype="float32")
    transformer = ready(open_model(source, settings), settings, 64)
    return transformer.arrays.numpy(step(transformer, IDS, 0, len(IDS), range(len(IDS)))).copy()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_computes_the_folders_bits(name, tmp_path):
    source = folder_source(save(make_model(name, **FOLDERS[name]), tmp_path / "folder"))
    export_gguf(source, tmp_path / "out.gguf", type="F32")
    expected = logits(source)
    found = logits(file_source(tmp_path / "out.gguf"))
    if name == "llama3.1":  # its frequencies come back through float32 factors
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    else:
        assert np.array_equal(found, expected)


def test_the_tokenizer_and_the_template_come_back(tmp_path):
    source = folder_source(save(make_model("qwen3", **FOLDERS["qwen3"]), tmp_path / "folder"))
    export_gguf(source, tmp_path / "out.gguf", type="F16")
    ours, theirs = (open_model(each, Settings()).text for each in (source, file_source(tmp_path / "out.gguf")))
    tokenizers = open_tokenizer(ours), open_tokenizer(theirs)
    for text in HARD_TEXTS:
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text), text
    assert (ours.chat_template, ours.bos_token, ours.eos_token) == (theirs.chat_template, theirs.bos_token, theirs.eos_token)


@pytest.mark.parametrize("name", FOLDERS)
def test_importance_of_a_folder_is_that_of_its_file(name, tmp_path):
    source = folder_source(save(make_model(name, **FOLDERS[name]), tmp_path / "folder"))
    export_gguf(source, tmp_path / "out.gguf", type="F32")
    settings = Settings(context_length=64, dtype="float32")
    text = "It was the best of times, it was the worst of times. " * 20
    ours, theirs = (measure_importance(each, settings, text, "text.txt").importance
                    for each in (source, file_source(tmp_path / "out.gguf")))
    assert ours.tensors.keys() == theirs.tensors.keys() and "blk.3.ffn_down.weight" in ours.tensors
    for tensor, sums in ours.tensors.items():
        np.testing.assert_allclose(sums.means, theirs.tensors[tensor].means, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ("gemma3", "phi3", "gpt-oss"))
def test_a_folder_of_another_family_is_refused_in_one_line(name, tmp_path):
    source = folder_source(save(make_model(name), tmp_path / "folder"))
    with pytest.raises(ConfigError, match="convert the folder with llama.cpp's") as refused:
        export_gguf(source, tmp_path / "out.gguf", type="Q8_0")
    assert "\n" not in str(refused.value) and not (tmp_path / "out.gguf").exists()


def test_what_a_file_cannot_say_is_refused(tmp_path):
    folder = save(make_model("llama3.2"), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="would be .* in a GGUF file"):
        export_gguf(folder_source(folder), tmp_path / "out.gguf", type="Q8_0")


def test_rows_beyond_the_tokenizer_are_marked_as_unused(tmp_path):
    source = folder_source(save(make_model("llama3.2"), tmp_path / "folder"))
    export_gguf(source, tmp_path / "out.gguf", type="Q8_0")
    metadata, stored = read_gguf(tmp_path / "out.gguf")
    assert len(metadata["tokenizer.ggml.tokens"]) == stored["token_embd.weight"].shape[1]
    assert all((kind == 5) == token.startswith("[PAD") for token, kind in zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]))
