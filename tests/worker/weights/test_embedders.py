"""Models that were trained for embeddings are refused in one line where our vectors would be others."""

import json

import pytest

from chatlm.common.errors import ConfigError
from chatlm.worker.weights.huggingface import hf_text
from families import spec_of_changed_gguf, write_tokenizer

POOLING = {f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")}
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
           {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
           {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]


@pytest.mark.parametrize("changes, words", [
    ({"qwen3.pooling_type": 2}, r"qwen3\.pooling_type is 2 \(cls\): such embeddings are not supported; this server averages"),
    ({"qwen3.pooling_type": 3, "tokenizer.ggml.add_eos_token": True}, r"qwen3\.pooling_type is 3 \(last\)"),       # as Qwen3-Embedding's are
    ({"qwen3.pooling_type": 4}, r"pooling_type is 4 \(rank\)"), ({"qwen3.pooling_type": 9}, r"pooling_type is 9 \(unknown\)"),
    ({"qwen3.pooling_type": True}, r"pooling_type is true \(unknown\)"), ({"qwen3.pooling_type": -1}, r"is -1 \(unknown\)"),
    ({"qwen3.pooling_type": 1, "tokenizer.ggml.add_eos_token": True}, r"tokenizer\.ggml\.add_eos_token is true: such"),
    ({"qwen3.attention.causal": False}, r"qwen3\.attention\.causal is false: such")])
def test_a_gguf_file_whose_vectors_are_made_otherwise_is_refused(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as caught:
        spec_of_changed_gguf(tmp_path, "qwen3", changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"qwen3.pooling_type": 0, "tokenizer.ggml.add_eos_token": True}, {"qwen3.pooling_type": 1},
                                     {"qwen3.attention.causal": True}, {"tokenizer.ggml.add_eos_token": True}])
def test_a_gguf_file_for_chats_or_of_the_mean_is_read(changes, tmp_path):
    assert spec_of_changed_gguf(tmp_path, "qwen3", changes)[0] == "qwen3"


def embedder(folder, modules=MODULES, pooling=POOLING | {"pooling_mode_mean_tokens": True}, ends=False, **more):
    write_tokenizer(folder)
    if ends:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["post_processor"]["single"].append({"SpecialToken": {"id": "<|end|>", "type_id": 0}})
        content["post_processor"]["special_tokens"]["<|end|>"] = {"id": "<|end|>", "ids": [257], "tokens": ["<|end|>"]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "1_Pooling").mkdir()
    for name, content in ({"modules": modules, "1_Pooling/config": pooling} | more).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("changes, words", [
    ({"pooling": POOLING | {"pooling_mode_lasttoken": True}}, '1_Pooling/config.json: pooling_mode is "lasttoken": such embeddings'),
    ({"pooling": POOLING | {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}}, "pooling_mode is a list of 2"),
    ({"pooling": {"pooling_mode": "weightedmean"}}, 'pooling_mode is "weightedmean"'), ({"pooling": POOLING}, "pooling_mode is"), ({"pooling": {"pooling_mode": 5}}, "pooling_mode is 5"),
    ({"modules": [*MODULES, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]}, r"modules.json: \[3\].type is .*Dense"),
    ({"modules": {"a": 1}}, "modules.json holds an object of 1; it must hold a list of objects"),
    ({"config_sentence_transformers": {"default_prompt_name": "query"}}, 'default_prompt_name is "query"'),
    ({"sentence_bert_config": {"do_lower_case": True}}, "do_lower_case is true"),
    ({"ends": True}, "tokenizer.json: the last item of its post_processor is a token")])
def test_a_folder_whose_vectors_are_made_otherwise_is_refused(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as caught:
        hf_text(embedder(tmp_path, **changes), 288)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [
    {}, {"pooling": {"pooling_mode": "mean"}}, {"modules": MODULES[:2]},
    {"config_sentence_transformers": {"default_prompt_name": None, "prompts": {"query": "q: "}}, "sentence_bert_config": {"max_seq_length": 512, "do_lower_case": False}}])
def test_a_folder_of_the_mean_is_read(changes, tmp_path):
    assert hf_text(embedder(tmp_path, **changes), 288).bos_token == 256


def test_a_folder_without_modules_may_end_its_texts_as_it_likes(tmp_path):
    embedder(tmp_path, ends=True)
    (tmp_path / "modules.json").unlink()
    assert hf_text(tmp_path, 288).eos_token == 257
