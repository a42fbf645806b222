"""A Hugging Face folder of a plain family becomes a GGUF file that computes the same."""

import json
from pathlib import Path

import numpy as np
import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import Message, ModelSource
from chatlm.common.text.load import open_tokenizer
from chatlm.export.gguf.export import export_gguf
from chatlm.export.gguf.measure import measure_importance
from chatlm.worker.doctor.hard_texts import HARD_TEXTS
from chatlm.worker.doctor.running import ready, step
from chatlm.worker.weights.formats.gguf.file import read_gguf
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.text.folder_tokenizers import folder_tokenizer
from chatlm.worker.weights.text.sentencepiece_file import read_sentencepiece
from families import make_model, save

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tokenizers"
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


def with_rope(folder, **rope):
    """A folder's source, once its config.json has these rope_parameters."""
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (folder / "config.json").write_text(json.dumps(config))
    return folder_source(folder)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
USUAL = 0.1 * np.log(4) + 1


@pytest.mark.parametrize("rope", (
    YARN, YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, YARN | {"attention_factor": USUAL},
    YARN | {"attn_factor": 1.2, "extrapolation_factor": 1.0}, {"rope_type": "linear", "factor": 2.5}), ids=str)
def test_scaled_rotations_come_back(rope, tmp_path):
    source = with_rope(save(make_model("llama3.2"), tmp_path / "folder"), **rope)
    export_gguf(source, tmp_path / "out.gguf", type="F32")
    metadata, _ = read_gguf(tmp_path / "out.gguf")
    assert metadata["llama.rope.scaling.type"] == rope["rope_type"]
    assert metadata["llama.rope.scaling.factor"] == rope["factor"]
    assert np.array_equal(logits(file_source(tmp_path / "out.gguf")), logits(source))


@pytest.mark.parametrize("rope", (
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, YARN | {"truncate": False}, YARN | {"attention_factor": 2.0}), ids=str)
def test_what_a_file_cannot_say_is_refused(rope, tmp_path):
    source = with_rope(save(make_model("llama3.2"), tmp_path / "folder"), **rope)
    with pytest.raises(ConfigError, match="would be .* in a GGUF file") as refused:
        export_gguf(source, tmp_path / "out.gguf", type="Q8_0")
    assert "\n" not in str(refused.value) and not (tmp_path / "out.gguf").exists()


SENTENCEPIECE = FIXTURES / "llama.model"
OPTIONS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
           "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"}
MORE = 6  # rows of the model beyond the pieces


def sentencepiece_folder(folder, options=OPTIONS, model=SENTENCEPIECE, added=()):
    """A llama with a tokenizer.model, and no tokenizer.json."""
    size = len(read_sentencepiece(model).pieces)
    save(make_model("llama2", vocab_size=size + MORE), folder)
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    if added:
        (folder / "added_tokens.json").write_text(json.dumps({name: size + i for i, name in enumerate(added)}))
    return folder


@pytest.mark.parametrize("options", (OPTIONS, OPTIONS | {"add_prefix_space": False}), ids=("usual", "no prefix"))
def test_a_sentencepiece_tokenizer_comes_back(options, tmp_path):
    source = folder_source(sentencepiece_folder(tmp_path / "folder", options))
    export_gguf(source, tmp_path / "out.gguf", type="F32")
    metadata, _ = read_gguf(tmp_path / "out.gguf")
    model = read_sentencepiece(SENTENCEPIECE)
    count = len(model.pieces)
    assert list(metadata["tokenizer.ggml.tokens"]) == [*model.pieces, *(f"[PAD{count + i}]" for i in range(MORE))]
    np.testing.assert_array_equal(metadata["tokenizer.ggml.scores"], np.float32([*model.scores, *[-10000.0] * MORE]))
    assert list(metadata["tokenizer.ggml.token_type"]) == [*model.types, *[5] * MORE]
    ours, theirs = (open_model(each, Settings()).text for each in (source, file_source(tmp_path / "out.gguf")))
    tokenizers = open_tokenizer(ours), open_tokenizer(theirs)
    for text in (*HARD_TEXTS, "It was the best of times."):
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text), text
    chat = [Message("user", "Hi  there"), Message("assistant", " yes")]
    assert tokenizers[0].render(chat) == tokenizers[1].render(chat)
    assert np.array_equal(logits(file_source(tmp_path / "out.gguf")), logits(source))


def test_a_tokenizer_json_made_of_sentencepiece_comes_back(tmp_path):
    folder = sentencepiece_folder(tmp_path / "folder")
    (folder / "tokenizer.json").write_bytes(folder_tokenizer(folder, OPTIONS)[1])
    (folder / "tokenizer.model").unlink()
    export_gguf(folder_source(folder), tmp_path / "out.gguf", type="Q8_0")
    ours, theirs = (open_tokenizer(open_model(each, Settings()).text)
                    for each in (folder_source(folder), file_source(tmp_path / "out.gguf")))
    for text in (*HARD_TEXTS, "It was the best of times."):
        assert ours.encode(text) == theirs.encode(text), text


def test_a_space_that_files_put_after_special_tokens_is_said(tmp_path, caplog):
    source = folder_source(sentencepiece_folder(tmp_path / "folder", OPTIONS | {
        "legacy": False, "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}))
    export_gguf(source, tmp_path / "out.gguf", type="Q8_0")
    assert "after special tokens, and before a text that begins with a space" in caplog.text
    ours, theirs = (open_tokenizer(open_model(each, Settings()).text) for each in (source, file_source(tmp_path / "out.gguf")))
    assert ours.encode("It was") == theirs.encode("It was") and ours.encode(" It") != theirs.encode(" It")


def broken_added(folder, data):
    (folder / "added_tokens.json").write_text(data)


@pytest.mark.parametrize("change, words", (
    (lambda folder: (folder / "tokenizer.model").write_bytes(FIXTURES.joinpath("unigram.model").read_bytes()), "unigram"),
    (lambda folder: broken_added(folder, '{"<x>": "three"}'), "there must be ids of tokens"),
    (lambda folder: broken_added(folder, '{"<x>": 99999}'), "has the id 99999, and the model has"),
    (lambda folder: broken_added(folder, '{"<x>": -1}'), "there must be ids of tokens"),
    (lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(OPTIONS | {"added_tokens_decoder": {"x": {"content": 3}}})),
     "there must be ids of tokens"),
    (lambda folder: (folder / "tokenizer.model").write_bytes(b"\xff" * 40), "is no model of sentencepiece")),
    ids=("unigram", "no number", "too large", "negative", "decoder", "broken"))
def test_a_sentencepiece_folder_that_cannot_be_written_is_refused_in_one_line(change, words, tmp_path):
    folder = sentencepiece_folder(tmp_path / "folder")
    change(folder)
    with pytest.raises(ConfigError) as refused:
        export_gguf(folder_source(folder), tmp_path / "out.gguf", type="Q8_0")
    assert words in str(refused.value) and "\n" not in str(refused.value) and not (tmp_path / "out.gguf").exists()


def test_rows_beyond_the_tokenizer_are_marked_as_unused(tmp_path):
    source = folder_source(save(make_model("llama3.2"), tmp_path / "folder"))
    export_gguf(source, tmp_path / "out.gguf", type="Q8_0")
    metadata, stored = read_gguf(tmp_path / "out.gguf")
    assert len(metadata["tokenizer.ggml.tokens"]) == stored["token_embd.weight"].shape[1]
    assert all((kind == 5) == token.startswith("[PAD") for token, kind in zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]))
