"""Folders whose small files are odd, endless or meant to break something: a model, or one line that says what is wrong."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.errors import ConfigError, printable
from chatlm.worker.weights.lora import matching
from families import load, make_model, save
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(make_model("llama2"), tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def read(path, **changes):
    """The model's tensors, all read."""
    model = load(path, **changes)
    return {name: given.read() for name, given in model.tensors.items()}


def refusal(path, **changes):
    with pytest.raises(ConfigError) as caught:
        read(path, **changes)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def rewrite(path, change):
    """Change what a JSON file says, by a function or by keys."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change if isinstance(change, dict) else change(content) or content))


@pytest.mark.parametrize("groups, words", [
    ([1], "config_groups is a list of 1; it must be an object"), (7, "config_groups is 7; it must be an object"),
    ({"a": 1}, "config_groups.a is 1; it must be an object whose `weights` is one"),
    ({"a": {"weights": [1]}}, "config_groups.a is an object of 1; it must be an object whose `weights` is one"),
    ({}, 'quant_method is "compressed-tensors"; only FP8 is supported'), ({"a": {}}, "only FP8 is supported"),
    ({"a": {"weights": {"type": "float", "num_bits": 8, "block_structure": [1 << 40, 1]}}}, "weight_block_size[0] is 1099511627776; it must be"),
    ({"a": {"weights": {"type": "float", "num_bits": 8, "block_structure": "128x128"}}}, "weight_block_size is \"128x128\"; it must be a list of 2")])
def test_groups_of_another_shape_are_named(folder, groups, words):
    to_fp8(folder)
    rewrite(folder / "config.json", {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}})
    assert words in refusal(folder)


def to_fp8(folder, names=("proj.weight",), scales=torch.float32, shape=lambda weight: (1,) * weight.ndim, block=128):
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith(names):
            tensors |= {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full(shape(weight), 2.0).to(scales)}
    save_file(tensors, folder / "model.safetensors")
    rewrite(folder / "config.json", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}})
    return tensors


@pytest.mark.parametrize("names, shape", [(("proj.weight",), lambda weight: (1, 1)), (("norm.weight",), lambda weight: (1,)),
                                          (("norm.weight",), lambda weight: tuple(weight.shape))])
@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e4m3fn])
def test_vectors_and_scales_may_be_fp8_too(folder, names, shape, scales):
    made = to_fp8(folder, names, scales, shape)
    for ours, theirs in (("0.attention_norm", "input_layernorm"), ("0.output", "self_attn.o_proj"), ("0.down", "mlp.down_proj")):
        weight = made[f"{LAYER}{theirs}.weight"].float() * (2 if f"{theirs}.weight".endswith(names) else 1)
        found = next(tensor for name, tensor in read(folder).items() if name.startswith(ours))
        torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, weight, rtol=0, atol=0)


def test_scales_that_fit_no_vector_are_named(folder):
    to_fp8(folder, ("input_layernorm.weight",), shape=lambda weight: (2,))
    assert f"the scales of {LAYER}input_layernorm.weight (64,) are (2,); there must be 1" in refusal(folder)


@pytest.mark.parametrize("block", [1 << 30, 1 << 40, 0, -1, 1.5, "x"])
def test_a_block_that_no_matrix_has_is_refused(folder, block):
    to_fp8(folder, block=block)
    assert "weight_block_size[0] is" in refusal(folder) and "an integer from 1 to 1,048,576" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_pipes_devices_and_folders_are_named_and_nobody_waits_for_them(folder, name):
    path = folder / name
    for make, words in ((os.mkfifo, "a pipe"), (lambda path: path.symlink_to("/dev/zero"), "a device"), (os.mkdir, "a folder")):
        path.unlink(missing_ok=True)
        make(path)
        said = refusal(folder)
        assert f"{path} is {words}; it must be a regular file" in said or "no model at" in said or "Is a directory" in said, said
        (os.rmdir if words == "a folder" else os.unlink)(path)


@pytest.mark.parametrize("name", ["meta_000650.json", "model_000650.pt"])
def test_so_are_those_of_a_checkpoint(nanochat_fixtures, tmp_path, name):
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
    path = next((tmp_path / "base").rglob(name))
    path.unlink()
    path.symlink_to("/dev/zero")
    assert str(path) in refusal(tmp_path / "base")


def test_a_template_that_is_no_text_and_odd_names_of_templates(folder):
    (folder / "chat_template.jinja").unlink()
    for templates in ([{"name": ["x"], "template": "x"}], [{"name": {"a": 1}}], [3, None, {}], []):
        rewrite(folder / "tokenizer_config.json", {"chat_template": templates})
        read(folder)
    path = folder / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe{{ 1 }}")
    assert f"{path} is not UTF-8" in refusal(folder)


def test_a_token_s_name_that_is_no_text_is_no_token(folder):
    rewrite(folder / "tokenizer_config.json", {"bos_token": "\ud800", "eos_token": {"content": "\udcff"}})
    read(folder)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_texts_endless_is_refused(folder, part):
    def change(content):
        content[part] = {"type": "Sequence", f"{part}s": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
    rewrite(folder / "tokenizer.json", change)
    assert "could make a text 1,099,511,627,776 times as long" in refusal(folder)


def test_a_tokenizer_s_padding_and_truncation_are_not_those_of_prompts(folder):
    from chatlm.common.text.load import open_tokenizer
    from chatlm.worker.weights.huggingface import hf_text
    expected = open_tokenizer(hf_text(folder, 288)).encode("some words to encode")
    rewrite(folder / "tokenizer.json", {
        "padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}})
    assert open_tokenizer(hf_text(folder, 288)).encode("some words to encode") == expected


def test_a_rotary_base_that_turns_nothing_is_refused(tmp_path):
    for numbers in ({}, {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                        "llama.rope.scaling.original_context_length": 64}):
        path = write_gguf(tmp_path / "tiny.gguf", random_llama(), LLAMA_NUMBERS | {"llama.rope.freq_base": 1.0} | numbers)
        assert "llama.rope.freq_base is 1.0; it must be a finite number from 2" in refusal(path)


# --- adapters ------------------------------------------------------------------------------------------


def adapter(folder, good, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config))
    weight = load_file(good / "model.safetensors")[LAYER + "self_attn.q_proj.weight"]
    name = f"base_model.model.{LAYER}self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": torch.ones(4, weight.shape[1]), f"{name}B.weight": torch.ones(weight.shape[0], 4)}, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.mark.parametrize("config, words", [
    ({"rank_pattern": {"[": 4}}, '"[" is no regular expression'), ({"alpha_pattern": {"(": 4}}, '"(" is no regular expression'),
    ({"target_modules": "*"}, '"*" is no regular expression'), ({"target_modules": "(?P<a"}, "is no regular expression"),
    ({"target_modules": 7}, "target_modules is 7; it must be"), ({"target_modules": [7]}, "target_modules[0] is 7; it must be a text"),
    ({"rank_pattern": {"q_proj": "x"}}, 'rank_pattern.q_proj is "x"'), ({"rank_pattern": [1]}, "rank_pattern is a list of 1; it must be an object"),
    ({"target_modules": "v_.*"}, "is not among the target_modules"), ({"target_modules": "x" * 5000}, "is not among the target_modules"),
    ({"rank_pattern": {"(.*)*(.*)*(.*)*x!": 4}}, "takes more than 5 s or too much memory")])
def test_patterns_of_adapters_are_checked_and_bounded_in_time(folder, good, tmp_path, config, words):
    assert words in refusal(folder, lora=[adapter(tmp_path / "lora", good, **config)])


@pytest.mark.parametrize("config, scaling", [
    ({}, 2), ({"target_modules": "all-linear"}, 2), ({"target_modules": r".*\.q_proj"}, 2), ({"target_modules": r"model\.layers\.0\.self_attn\.q_proj"}, 2),
    ({"alpha_pattern": {"q_proj": 16}}, 4), ({"alpha_pattern": {r"self_attn\.[qk]_proj": 16, "q_proj": 4}}, 4), ({"alpha_pattern": {r"layers\..*\.q_proj": 4}}, 1),
    ({"alpha_pattern": {"_proj": 16, "proj": 16}}, 2)])
def test_patterns_choose_as_peft_s_do(folder, good, tmp_path, config, scaling):
    plain, changed = (read(folder, lora=lora)["0.qkv"] for lora in ([], [adapter(tmp_path / "lora", good, **config)]))
    torch.testing.assert_close(changed[0] - plain[0], torch.full_like(plain[0], 4.0 * scaling))


def test_a_pattern_matches_in_another_process_as_in_this_one(tmp_path):
    texts = ["a.b", "aab", "", "b"]
    assert matching(tmp_path, "a+.?b", texts) == {"a.b", "aab"} and matching(tmp_path, "a.b", texts) == {"a.b", "aab"}
    assert matching(tmp_path, "b", texts, r"(?:.*\.)?") == {"a.b", "b"}


def test_names_without_end_are_cut_in_errors(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"x" * 1_000_000: torch.zeros(2)}, folder / "model.safetensors")
    assert "unknown " + "x" * 200 + "..." in refusal(folder)
    rewrite(folder / "config.json", {"model_type": "y" * 1_000_000})
    assert 'model_type is "yyyy' in refusal(folder)
    assert printable("a " * 3) == "a " * 3 and printable("/" + "p/" * 300) == "/" + "p/" * 300
