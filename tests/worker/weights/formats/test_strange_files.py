"""Folders whose small files are odd, endless or meant to break something: a model, or one line that says what is wrong."""

import json
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError, RequestError, cannot_read, printable
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import TextSpec
from chatlm.common.processes import start
from chatlm.common.text.formats import template_of
from chatlm.common.text.load import open_tokenizer
from chatlm.worker import build
from chatlm.worker.weights.adapters.lora import matching
from chatlm.worker.weights.adapters import lora
from chatlm.worker.weights.files.weight_files import weight_files
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.nanochat.checkpoint import read_encoding
from chatlm.worker.weights.text.splits import KNOWN_SPLITS, LLAMA3_SPLIT, NANOCHAT_SPLITS, QWEN2_SPLIT
from families import load, make_model, save
from patching import patch
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata, tensor_info, write_gguf

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
    assert "\n" not in text and len(text) < 1_200
    return text


def rewrite(path, change):
    """Change what a JSON file says, by a function or by keys."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change if isinstance(change, dict) else change(content) or content))


@pytest.mark.parametrize("groups, words", [
    ([1], "config_groups is a list of 1; it must be an object"), (7, "config_groups is 7; it must be an object"),
    ({"a": 1}, "config_groups.a is 1; it must be an object, and so must its `weights`"),
    ({"a": {"weights": [1]}}, "config_groups.a is an object of 1; it must be an object, and so must its `weights`"),
    ({"a": {"targets": [1]}}, "config_groups.a.targets is a list of 1; it must be a list of texts"),
    ({"a": {"weights": {"type": "float", "num_bits": 6}}}, 'the weights of "a" are of type "float" with 6 bits; these packed weights are read'),
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
        numpy.testing.assert_array_equal(found[0] if isinstance(found, tuple) else found, weight.numpy())


def test_scales_that_fit_no_vector_are_named(folder):
    to_fp8(folder, ("input_layernorm.weight",), shape=lambda weight: (2,))
    assert f"the scales of {LAYER}input_layernorm.weight (64,) are (2,); there must be 1" in refusal(folder)


@pytest.mark.parametrize("block", [1 << 30, 1 << 40, 0, -1, 1.5, "x"])
def test_a_block_that_no_matrix_has_is_refused(folder, block):
    to_fp8(folder, block=block)
    assert "weight_block_size[0] is" in refusal(folder) and "an integer from 1 to 1,048,576" in refusal(folder)


def make_socket(path):
    folder = os.open(path.parent, os.O_RDONLY)      # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_pipes_and_devices_are_named_without_waiting(folder, name):
    """Pipes, devices, sockets and folders are named without waiting for them."""
    path = folder / name
    for make, words in ((os.mkfifo, "a pipe"), (make_socket, "a socket"), (lambda path: path.symlink_to("/dev/zero"), "a device"), (os.mkdir, "a folder")):
        path.unlink(missing_ok=True)
        make(path)
        said = refusal(folder)
        assert any(each in said for each in (
            f"{path} is {words}; it must be a regular file", "no model at", "Is a directory", "outside of the model's folder")), said
        (os.rmdir if words == "a folder" else os.unlink)(path)


@pytest.mark.parametrize("name", ["meta_000650.json", "model_000650.pt", "tokenizer.pkl"])
def test_so_are_those_of_a_checkpoint(nanochat_fixtures, tmp_path, name):
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
    path = next((tmp_path / "base").rglob(name))
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path} is a device; it must be a regular file" in refusal(tmp_path / "base")


def test_a_template_must_be_text_of_any_name(folder):
    """A template that is no text is refused, and odd names of templates are borne."""
    (folder / "chat_template.jinja").unlink()
    for templates in ([{"name": ["x"], "template": "x"}], [{"name": {"a": 1}}], [3, None, {}], []):
        rewrite(folder / "tokenizer_config.json", {"chat_template": templates})
        read(folder)
    path = folder / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe{{ 1 }}")
    assert f"{path} is not UTF-8" in refusal(folder)


def test_a_token_s_name_must_be_a_text(folder):
    rewrite(folder / "tokenizer_config.json", {"bos_token": "\ud800", "eos_token": {"content": "\udcff"}})
    read(folder)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_of_endless_texts_is_refused(folder, part):
    def change(content):
        content[part] = {"type": "Sequence", f"{part}s": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
    rewrite(folder / "tokenizer.json", change)
    assert "could make a text 1,099,511,627,776 times as long" in refusal(folder)


def test_a_tokenizer_s_padding_is_not_a_prompt_s(folder):
    """A tokenizer's padding and truncation are not those of prompts."""
    from chatlm.worker.weights.formats.folder.description import hf_text
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


def test_a_tokenizer_that_adds_much_is_refused(folder):
    """A tokenizer that puts much before each text is refused."""
    rewrite(folder / "tokenizer.json", {"normalizer": {"type": "Prepend", "prepend": "x" * 1000}})
    assert "could make a text 1,001 times as long" in refusal(folder)
    rewrite(folder / "tokenizer.json", {"normalizer": None, "post_processor": {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 1000, "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256] * 1000, "tokens": ["<s>"] * 1000}}}})
    assert "its post_processor adds 1,000,000 tokens to each text; 64 are the most allowed" in refusal(folder)


def splitting(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


@pytest.mark.parametrize("change", [
    splitting("(a+)+$"), splitting("(.*)*(.*)*x!"), splitting(r"(\w+\s?)+\.$"), splitting("((ab|a|b)*)*c"),
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "( *)*,"}, "content": ","}}])
def test_a_tokenizer_with_slow_patterns_is_refused(folder, change):
    """A tokenizer whose expressions take years is refused."""
    rewrite(folder / "tokenizer.json", change)
    assert f"{folder / 'tokenizer.json'}: its regular expressions give up on a short text" in refusal(folder)


def test_a_pattern_that_gives_up_refuses_that_text(folder):
    """An expression that gives up at a client's text refuses that text."""
    rewrite(folder / "tokenizer.json", splitting("(a+)+$"))
    tokenizer = open_tokenizer(TextSpec("hf", (folder / "tokenizer.json").read_bytes()))
    assert tokenizer.encode("aaa")
    with pytest.raises(RequestError, match="the text cannot be tokenized"):
        tokenizer.encode("a" * 40 + "!")


def test_a_tokenizer_that_fails_its_trial_is_refused(folder, monkeypatch):
    rewrite(folder / "tokenizer.json", splitting("a+"))
    read(folder)
    patch(monkeypatch, start, "PROCESS_COMMAND", (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGPROF)"))
    assert "tokenizer.json: a short text takes more than 5 s of processor time or 2,048 MiB" in refusal(folder)


def test_published_expressions_need_no_trial(folder, monkeypatch):
    patch(monkeypatch, start, "PROCESS_COMMAND", (sys.executable, "-c", "print('tried'); exit(1)"))
    path = folder / "tokenizer.json"
    for pattern in (LLAMA3_SPLIT, QWEN2_SPLIT.replace(r"\r", "\r").replace(r"\n", "\n")):
        rewrite(path, splitting(pattern))
        read(folder)
    text = path.read_text()
    for other in (splitting(LLAMA3_SPLIT + "|x+"), text.replace('"Regex": ', '"Regex": "(a+)+$", "Regex": '),
                  text.replace('"Regex"', r'"\u0052egex"'), text.replace('"Regex": ', r'"R\u0065gex": "x", "Regex" : '),
                  splitting(LLAMA3_SPLIT) | {"normalizer": {"type": "Sequence", "normalizers": [
                      {"type": "Replace", "pattern": {"Regex": r"\p{N}"}, "content": "x"}] * 9}}):
        path.write_text(text if isinstance(other, dict) else other)
        if isinstance(other, dict):
            rewrite(path, other)
        assert "tokenizer.json: tried" in refusal(folder)
    path.write_text(text)
    rewrite(path, {"model": json.loads(text)["model"] | {"vocab": json.loads(text)["model"]["vocab"] | {"Regex": 260}}})
    read(folder)  # a token of that name
    assert set(NANOCHAT_SPLITS) < KNOWN_SPLITS


def test_the_model_s_set_of_two_numbered_ones_is_read(tmp_path):
    """Of two numbered sets without an index, the model's is read."""
    for name in ("consolidated-00001-of-00002", "model-00001-of-00002", "model-00002-of-00002"):
        (tmp_path / f"{name}.safetensors").touch()
    assert [path.name[:11] for path in weight_files(tmp_path)] == ["model-00001", "model-00002"]


def test_a_checkpoint_s_own_expression_is_tried_too(nanochat_fixtures, tmp_path):
    path = next(shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base").rglob("tokenizer.pkl"))
    pattern, ranks, specials = read_encoding(path.read_bytes())
    assert pattern in NANOCHAT_SPLITS
    for other, fault in ((r"\p{L}+|.", None), (r"(?:a|a)*+b|(?:(?!x)a|a)*$(?<=b)", "give up")):
        state = {"name": "x", "pat_str": other, "mergeable_ranks": ranks, "special_tokens": specials}
        path.write_bytes(b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81" + pickle.dumps(state, 4)[2:-1] + b"b.")
        if fault:
            assert f"{path}: its regular expressions give up on a short text" in refusal(tmp_path / "base")
        else:
            read(tmp_path / "base")


# --- adapters ------------------------------------------------------------------------------------------


def adapter(folder, good, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config))
    weight = load_file(good / "model.safetensors")[LAYER + "self_attn.q_proj.weight"]
    name = f"base_model.model.{LAYER}self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": torch.ones(4, weight.shape[1]), f"{name}B.weight": torch.ones(weight.shape[0], 4)}, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.mark.parametrize("config, words", [
    ({"rank_pattern": {"[": 4}}, '"[" is not a regular expression'), ({"alpha_pattern": {"(": 4}}, '"(" is not a regular expression'),
    ({"target_modules": "*"}, '"*" is not a regular expression'), ({"target_modules": "(?P<a"}, "is not a regular expression"),
    ({"target_modules": 7}, "target_modules is 7; it must be"), ({"target_modules": [7]}, "target_modules[0] is 7; it must be a text"),
    ({"rank_pattern": {"q_proj": "x"}}, 'rank_pattern.q_proj is "x"'), ({"rank_pattern": [1]}, "rank_pattern is a list of 1; it must be an object"),
    ({"target_modules": "v_.*"}, "is not among the target_modules"), ({"target_modules": "x" * 5000}, "is not among the target_modules"),
    ({"rank_pattern": {"(.*)*(.*)*(.*)*x!": 4}}, "takes more than 1 s or too much memory")])
def test_adapter_patterns_are_checked_and_bounded(folder, good, tmp_path, monkeypatch, config, words):
    if "takes" in words:
        patch(monkeypatch, lora, "PATTERN_SECONDS", 1)
    assert words in refusal(folder, lora=[adapter(tmp_path / "lora", good, **config)])


@pytest.mark.parametrize("config, scaling", [
    ({}, 2), ({"target_modules": "all-linear"}, 2), ({"target_modules": r".*\.q_proj"}, 2), ({"target_modules": r"model\.layers\.0\.self_attn\.q_proj"}, 2),
    ({"alpha_pattern": {"q_proj": 16}}, 4), ({"alpha_pattern": {r"self_attn\.[qk]_proj": 16, "q_proj": 4}}, 4), ({"alpha_pattern": {r"layers\..*\.q_proj": 4}}, 1),
    ({"alpha_pattern": {"_proj": 16, "proj": 16}}, 2)])
def test_patterns_choose_as_peft_s_do(folder, good, tmp_path, config, scaling):
    plain, changed = (read(folder, lora=lora)["0.qkv"] for lora in ([], [adapter(tmp_path / "lora", good, **config)]))
    numpy.testing.assert_allclose(changed[0] - plain[0], numpy.full_like(plain[0], 4.0 * scaling), rtol=1e-5, atol=1e-5)


def test_a_pattern_matches_alike_in_another_process(tmp_path):
    texts = ["a.b", "aab", "", "b"]
    for patterns in (["a+.?b", "a.b"], ["aa?.b|aab", "a.b"], ["a.b", "a.b"]):
        assert matching(tmp_path, patterns, texts) == [{"a.b", "aab"}] * 2
    assert matching(tmp_path, ["b"], texts, r"(?:.*\.)?") == [{"a.b", "b"}] and matching(tmp_path, [], texts) == []


def test_the_slow_one_of_many_patterns_is_named(tmp_path, monkeypatch):
    """Of many patterns the one that takes years is named, and all have one time."""
    patch(monkeypatch, lora, "PATTERN_SECONDS", 1)
    with pytest.raises(ConfigError, match=r'"\(a\*\)\*b" takes more than 1 s'):
        matching(tmp_path, ["a*", *["b+"] * 300, "(a*)*b", "a+"], ["a" * 40])


def test_names_without_end_are_cut_in_errors(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"x" * 1_000_000: torch.zeros(2)}, folder / "model.safetensors")
    assert "unknown " + "x" * 200 + "..." in refusal(folder)
    rewrite(folder / "config.json", {"model_type": "y" * 1_000_000})
    assert f"this server cannot run {'y' * 60} yet" in refusal(folder)
    assert printable("a " * 3) == "a " * 3 and printable("/" + "p/" * 300) == "/" + "p/" * 300


# --- cut files, and missing ones -----------------------------------------------------------------------


def cut(path, size):
    """Keep the first `size` bytes, or all but some; returns how many there are now, in words."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    return f"{path} is truncated: it has {path.stat().st_size:,} bytes, and "


@pytest.mark.parametrize("size", [0, 5, 8, 300, -100_000, -1])
def test_a_cut_safetensors_file_says_its_right_length(folder, size):
    path = folder / "model.safetensors"
    whole, header = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    said, text = cut(path, size), refusal(folder)
    assert text == said + ("the length of its header alone takes 8" if 0 <= size < 8 else f"its header ends at byte {header:,}" if 0 <= size < header
                           else f"its tensors end at byte {whole:,}") + "; copy or download it again"


def test_so_does_a_cut_adapter(folder, good, tmp_path):
    path = Path(adapter(tmp_path / "lora", good), "adapter_model.safetensors")
    whole = path.stat().st_size
    assert cut(path, whole // 2) + f"its tensors end at byte {whole:,}" in refusal(folder, lora=[str(path.parent)])


@pytest.mark.parametrize("size", [0, 3, 1000, -200_000, -30, -1])
def test_a_cut_checkpoint_lacks_its_end(nanochat_fixtures, tmp_path, size):
    path = next(shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base").rglob("model_*.pt"))
    assert cut(path, size) + "the table of contents at its end is missing" in refusal(tmp_path / "base")


@pytest.mark.parametrize("size", [1, 4, 23, 200, 5000, -500_000, -1])
def test_a_cut_gguf_says_how_long_it_should_be(tmp_path, size):
    path = write_gguf(tmp_path / "tiny.gguf", random_llama(), LLAMA_NUMBERS)
    whole = path.stat().st_size
    said, text = cut(path, size), refusal(path)
    assert text.startswith(said + ("the header of a GGUF file alone takes 24" if 0 < size < 24 else "its header goes on to byte " if size > 0
                                   else 'the tensor "blk.0.ffn_down.weight" ends at byte ' + f"{whole:,}")), text


SMALL = {"tokenizer.pkl": "the pickle in it does not end"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json",
                                  "meta_000650.json", "tokenizer.pkl"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_cut_small_file_is_named(good, nanochat_fixtures, tmp_path, name, share):
    source = nanochat_fixtures / "gen5" if name in ("meta_000650.json", "tokenizer.pkl") else good
    folder = shutil.copytree(source, tmp_path / "model")
    path = next(folder.rglob(name), folder / name)
    if not path.exists():
        path.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert cut(path, int(path.stat().st_size * share)) + SMALL.get(name, "the JSON object in it does not end") in refusal(folder)


@pytest.mark.parametrize("text", ["<html>}", '{"a": 1,}', "[1", "\0\0\0", '{"a": 1}}', "null"])
def test_other_damage_is_not_called_truncated(folder, text):
    (folder / "config.json").write_text(text)
    assert "truncated" not in refusal(folder)


def test_a_file_that_cannot_be_read_is_named_once(tmp_path):
    for words in ("No such file or directory: {}", "[Errno 2] No such file or directory: '{}'", 'No such file or directory: "{}"'):
        assert str(cannot_read(tmp_path, OSError(words.format(tmp_path)))).count(str(tmp_path)) == 1
    for name in ("zero.gguf", "zero"):
        (tmp_path / name).symlink_to("/dev/zero")
        assert refusal(tmp_path / name) == f"{tmp_path / name} is a device; it must be a regular file"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model_000650.pt", "tiny.gguf"])
def test_a_git_pointer_is_named_with_its_file_s_size(good, nanochat_fixtures, tmp_path, name):
    """A pointer of Git's is named with the size of what it stands for."""
    source = nanochat_fixtures / "gen5" if name == "model_000650.pt" else good
    folder = shutil.copytree(source, tmp_path / "model")
    path = next(folder.rglob(name), folder / name)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4711471\n")
    assert f"{path} is only Git LFS's pointer to a file of 4,711,471 bytes; run `git lfs pull`" in refusal(path if name == "tiny.gguf" else folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model_000650.pt", "tiny.gguf"])
def test_weights_that_are_a_pipe_are_not_waited_for(good, nanochat_fixtures, tmp_path, name):
    folder = shutil.copytree(nanochat_fixtures / "gen5" if name == "model_000650.pt" else good, tmp_path / "model")
    path = next(folder.rglob(name), folder / name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{path} is a pipe; it must be a regular file" in refusal(path if name == "tiny.gguf" else folder)


@pytest.fixture
def shards(good, tmp_path):
    """A model in three files, and their names."""
    folder = shutil.copytree(good, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file(dict([*tensors.items()][number::3]), folder / name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {tensor: names[i % 3] for i, tensor in enumerate(tensors)}}))
    return folder, names


def test_shards_are_one_model_without_an_index_too(shards, good):
    """Shards are one model with and without an index, and each may be cut."""
    folder, names = shards
    expected = read(good)
    for index in (True, False):
        if not index:
            (folder / "model.safetensors.index.json").unlink()
        found = read(folder)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["embed"], expected["embed"], rtol=0, atol=0)
    whole = (folder / names[1]).stat().st_size
    assert cut(folder / names[1], -7) + f"its tensors end at byte {whole:,}" in refusal(folder)


def test_a_whole_file_beside_an_index_is_the_model(shards, good, caplog):
    """A whole file beside an index of absent shards is the model."""
    folder, names = shards
    expected = read(good)
    shutil.copy(good / "model.safetensors", folder)
    for name in names:      # one after another
        (folder / name).unlink()
        found = read(folder)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["embed"], expected["embed"], rtol=0, atol=0)
        assert "model.safetensors.index.json names files that are not all there: model.safetensors is used" in caplog.text
        caplog.clear()
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is truncated: it has 0 bytes" in refusal(folder)


def test_a_shard_that_is_missing_is_named_once(shards):
    folder, names = shards
    (folder / names[1]).unlink()
    has = f"which is missing; it has {names[0]}, {names[2]}"
    assert refusal(folder) == f"{folder}: model.safetensors.index.json names {names[1]}, {has}"
    (folder / "model.safetensors.index.json").unlink()
    assert refusal(folder) == f"{folder}: according to the name of {names[0]} it must have {names[1]}, {has}"
    (folder / names[0]).rename(folder / "other.safetensors")
    (folder / names[2]).unlink()
    assert refusal(folder) == f"{folder}: it must have model.safetensors, which is missing; it has other.safetensors"


def test_weights_in_another_format_are_named(folder, good, tmp_path):
    """Weights in another format are named, and so is an adapter."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = refusal(folder)
    assert "has a config.json, but no *.safetensors; pytorch_model.bin is in a format that this server does not read" in text
    assert "nanochat" not in text
    path = adapter(tmp_path / "lora", good)
    assert f"{path} is an adapter: give the model that it is for, and --lora {path}" in refusal(path)
    weights = good / "model.safetensors"
    assert f"{weights} is a part of a model: give its folder, {good}" in refusal(weights)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "config.json").unlink()
    assert f"{folder} has model.safetensors, but no config.json" in refusal(folder)


def test_a_missing_tokenizer_json_says_what_is_there(folder):
    (folder / "tokenizer.json").unlink()
    assert f"{folder} has no tokenizer.json; it has chat_template.jinja, config.json" in refusal(folder)
    (folder / "spiece.model").touch()
    assert f"{folder} has no tokenizer.json; it has spiece.model, which this server does not read. transformers can write one" in refusal(folder)


def test_a_newer_type_is_not_called_truncated(tmp_path):
    path = tmp_path / "new.gguf"
    path.write_bytes(gguf_bytes(LLAMA_NUMBERS | small_gguf_metadata("gpt-2"), random_llama(),
                                infos={"blk.0.ffn_up.weight": tensor_info("blk.0.ffn_up.weight", (512, 256), 200, 0)}))
    assert 'the tensor "blk.0.ffn_up.weight" is of type 200, which this program does not know; it knows F32, ' in refusal(path)


# --- templates -----------------------------------------------------------------------------------------


def test_a_template_is_found_in_json_too(folder, caplog):
    """A template is found in chat_template.json too, and a list without a default is logged."""
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load(folder).text.chat_template == "{{ messages }}"
    rewrite(folder / "tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "x"}, {"name": "other", "template": "y"}]})
    assert load(folder).text.chat_template is None
    assert 'tokenizer_config.json has chat templates named "rag", "other", but none named "default": they are not used' in caplog.text
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    assert load(folder).text.chat_template == "{{ 1 }}"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert template_of("{{ 1 }}", "{{ tools }}") == load(folder).text.chat_template
    metadata = small_gguf_metadata("gpt-2") | {"tokenizer.chat_template.rag": "x"}
    metadata.pop("tokenizer.chat_template", None)
    gguf_text(Path("a.gguf"), metadata)
    assert 'a.gguf has chat templates named "rag", but none named "default"' in caplog.text


def test_a_model_without_a_template_cannot_chat(folder):
    """A model without a template says at start that it cannot chat."""
    settings = Settings(model=str(folder), kv_cache_memory=4 << 20)
    (folder / "chat_template.jinja").unlink()
    model, engine = build.build_engine(resolve_model(settings), settings, torch.device("cpu"))
    assert not engine.tokenizer.has_chat_template and "It has no chat template, so it cannot chat" in model.notes[-1]


def test_a_gguf_that_is_no_model_says_what_it_is(tmp_path):
    path = tmp_path / "mmproj-x.gguf"
    path.write_bytes(gguf_bytes(LLAMA_NUMBERS | small_gguf_metadata("gpt-2") | {"general.type": "mmproj"}, random_llama()))
    assert 'is not a model: its general.type is "mmproj"' in refusal(path)
