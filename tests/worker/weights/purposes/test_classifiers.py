"""Causal models that score or label texts, and chat models that have such a part besides: who writes texts, and who is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chat_server
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.worker.weights.preview import preview_folder
from families import MODELS, answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, tiny_config, transformer, write_tokenizer
from retrieval import gguf_of, make_qwen, reranker_folder

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ["reference", pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))]


def with_score(folder, rows=1, **config):
    """The folder with a classifier besides, and other keys in its config (None: without)."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": torch.ones(rows, 64)}, folder / "model.safetensors")
    return changed_config(folder, **config)


def changed_config(folder, **config):
    path = folder / "config.json"
    merged = {key: value for key, value in (json.loads(path.read_text()) | config).items() if value is not None}
    path.write_text(json.dumps(merged))
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama2", "llama3.2", "qwen3"])      # the second is tied, and the third a reranker's family
def test_a_score_beside_a_chat_head_changes_nothing(name, backend, tmp_path, caplog):
    """A score beside the head of a chat model changes nothing."""
    model = make_model(name)
    ours = load(with_score(save(model, tmp_path), rows=3))
    cases = clear_cases(model, lengths=(9, 40), count=16)
    assert ours.ranking is None and ours.text.chat_template and "score.weight is not used: the model writes texts" in caplog.text
    check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases, count=16), cases, count=16)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [7]])
def test_a_head_is_one_whatever_the_config_says(architectures, tmp_path):
    """A head is a head, whatever the config calls the model."""
    ours = load(with_score(save(make_model("llama2"), tmp_path), architectures=architectures))
    assert not ours.architecture.tied and ours.ranking is None


def classifier(name, folder, **config):
    """What transformers saves of a family's classifier."""
    import transformers
    maker = transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    maker.from_config(tiny_config(name, pad_token_id=0, **config)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("name", ["llama2", "llama3.2", "qwen2.5", "gemma2", "mistral", "gpt2"])
def test_a_saved_classifier_is_refused(name, labels, tmp_path):
    """A classifier that transformers saves is refused, and not chatted with."""
    folder = classifier(name, tmp_path, num_labels=labels)
    for look in (load, preview_folder):         # before its weights are downloaded too
        with pytest.raises(ConfigError, match=r"config.json: architectures is \"\w+ForSequenceClassification\"; such a model scores or labels texts and writes none") as caught:
            look(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen3ForTokenClassification", "LlamaForQuestionAnswering", "Qwen2ForRewardModel", "Qwen2ForProcessRewardModel", "LlamaForRewardModelWithGating"])
def test_models_that_write_no_texts_are_refused(name, tmp_path):
    """Other models that write no texts are refused by name."""
    folder = changed_config(save(make_model("qwen3" if "Qwen3" in name else "llama2"), tmp_path), architectures=[name])
    with pytest.raises(ConfigError, match=f'architectures is "{name}"; such a model'):
        load(folder)


def test_an_unnamed_classifier_is_refused(tmp_path):
    folder = classifier("llama3.2", tmp_path, num_labels=1)
    with pytest.raises(ConfigError, match="has score.weight, but no matrix that makes tokens; such a model"):
        load(changed_config(folder, architectures=None))


def test_a_reward_model_is_no_reranker(tmp_path):
    """Skywork-Reward-V2-Qwen3: one row too, but made for a conversation. Its name tells it apart."""
    folder = reranker_folder(tmp_path, make_qwen("Qwen3ForCausalLM", tie_word_embeddings=True))
    with_score(folder, architectures=["Qwen3ForSequenceClassification"], num_labels=1)
    assert load(folder).text.embedder.pooling == "rank"
    with pytest.raises(ConfigError, match="is named as a reward model; such a model scores"):
        load(folder.rename(tmp_path / "Skywork-Reward-V2-Qwen3-0.6B"))


def test_a_reranker_of_several_labels_is_named(tmp_path):
    folder = reranker_folder(tmp_path, make_qwen("Qwen3ForCausalLM", tie_word_embeddings=True))
    with pytest.raises(ConfigError, match=r"score.weight is \(3, 64\); of a reranker it must be \(1, 64\)"):
        load(with_score(folder, rows=3, architectures=["Qwen3ForSequenceClassification"]))


def test_a_gguf_s_classifier_rows_are_refused(tmp_path):
    """A classifier's rows in a GGUF file without a head are refused."""
    rows = np.ones((2, 64), np.float32)
    with pytest.raises(ConfigError, match="has cls.output.weight, but no output.weight and not the qwen3.pooling_type 4"):
        load(gguf_of(tmp_path / "tied.gguf", make_qwen("Qwen3ForCausalLM", tie_word_embeddings=True), classes=rows))
    model = make_model("llama2")
    ours = load(as_gguf(tmp_path / "own.gguf", model, beside={"cls.output.weight": rows}))
    cases = clear_cases(model, lengths=(9,), count=16)
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16)


def test_a_server_says_that_a_classifier_cannot_chat(tmp_path):
    folder = classifier("llama2", tmp_path, num_labels=1)
    assert MODELS["llama2"][0] == "llama"
    done = subprocess.run([sys.executable, str(Path(chat_server.__file__).resolve()), str(folder), "--port", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'architectures is "LlamaForSequenceClassification"' in done.stderr and "Traceback" not in done.stderr
