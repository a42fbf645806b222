"""nanoGPT's checkpoints, against its own formula (github.com/karpathy/nanoGPT, model.py) written out here."""

import json
import pickle
import sys
import urllib.error
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError, RequestError
from chatlm.common.hub.folder import find_models
from chatlm.common.hub.stamps import files_of
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from families import answers, check, kernels_of, load, transformer
from real_server import ask, get, post, server
from tiny_nanogpt import ARGS, CHARACTERS, random_state, save_build, write, write_meta

pytestmark = pytest.mark.usefixtures("one_thread")


def by_formula(state, args, ids, gelu=gelu):
    """Logits (T, V) of the tokens: GPT.forward without dropout. `gelu`: build-nanogpt's differs."""
    T, C, H = len(ids), args["n_embd"], args["n_head"]
    part = lambda name: (state[f"transformer.{name}.weight"], state.get(f"transformer.{name}.bias"))     # noqa: E731
    norm = lambda x, name: layer_norm(x, (C,), *part(name), 1e-5)      # noqa: E731
    x = part("wte")[0][ids] + part("wpe")[0][:T]
    for l in range(args["n_layer"]):
        q, k, v = (head.view(T, H, C // H).transpose(0, 1) for head in linear(norm(x, f"h.{l}.ln_1"), *part(f"h.{l}.attn.c_attn")).split(C, 1))
        scores = (q @ k.mT / (C // H)**0.5).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, C), *part(f"h.{l}.attn.c_proj"))
        x = x + linear(gelu(linear(norm(x, f"h.{l}.ln_2"), *part(f"h.{l}.mlp.c_fc"))), *part(f"h.{l}.mlp.c_proj"))
    return linear(norm(x, "ln_f"), state["lm_head.weight"])


class Case:
    """What families.check compares with: greedy answers by the formula."""

    def __init__(self, state, args, length, count=32, limit=None, gelu=gelu):
        ids, rows = torch.randint(0, limit or args["vocab_size"], (length,), generator=torch.Generator().manual_seed(length)).tolist(), []
        self.prompt = ids[:]
        for _ in range(count):
            rows.append(by_formula(state, args, ids, gelu)[-1, :limit])
            ids.append(int(rows[-1].argmax()))
        self.tokens, self.logits = ids[length:], torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))])
@pytest.mark.parametrize("bias, prefix, sizes", [(True, "", {}), (False, "_orig_mod.", {}), (True, "", {"n_embd": 100, "n_head": 5})])
def test_a_checkpoint_computes_nanogpt_s_formula(bias, prefix, sizes, backend, tmp_path):
    args = ARGS | {"bias": bias} | sizes
    state = random_state(args)
    write_meta(write(tmp_path, state, args, prefix) / "meta.pkl")
    model, cases = load(tmp_path), [Case(state, args, length) for length in (9, 40, 200)]
    assert model.architecture.norm.bias == model.architecture.feed.biased == bias and model.architecture.tied and model.context_length == 512
    check(answers(transformer(model, kernels_of(backend, model.architecture)), cases, count=32), cases, count=32)


@pytest.mark.parametrize("backend", ["reference", pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))])
def test_build_nanogpt_s_checkpoint_is_its_formula(backend, tmp_path, monkeypatch):
    state = random_state(ARGS)
    path = save_build(tmp_path / "log" / "model_05000.pt", monkeypatch, state)
    with pytest.raises(ConfigError, match="the tokenizer of .*model_05000.pt is missing"):
        load(path)
    write_meta(path.with_name("meta.pkl"))
    model, cases = load(path.parent), [Case(state, ARGS, length, gelu=partial(gelu, approximate="tanh")) for length in (9, 40, 200)]
    assert model.description == "build-nanogpt, 3 layers, width 64" and model.context_length == 512 and model.architecture.tied
    check(answers(transformer(model, kernels_of(backend, model.architecture)), cases, count=32), cases, count=32)


def test_build_nanogpt_s_padding_needs_gpt2_s_tokenizer(tmp_path, monkeypatch):
    """build-nanogpt's padded vocabulary needs GPT-2's tokenizer."""
    sizes = {"vocab_size": 50_304, "n_embd": 16, "n_layer": 1, "block_size": 16}
    path = save_build(tmp_path / "log" / "model_00250.pt", monkeypatch, random_state(ARGS | sizes), **sizes)
    with pytest.raises(ConfigError, match="log needs GPT-2's tokenizer.json, or its vocab.json and merges.txt"):
        load(path)
    write_bpe(path.parent)
    assert load(path).architecture.vocab_size == 50_257


@pytest.mark.parametrize("changes, words", [
    (dict(n_embd=66), "config.n_embd is 66; it must be a multiple of 4"), (dict(n_layer=[3]), 'config.n_layer is "list"; it must be an integer'),
    (dict(block_size=Fraction(3)), 'config.block_size is "StandIn"; it must be an integer'), (dict(n_layer=4), "missing transformer.h.3.ln_1.weight")])
def test_wrong_build_nanogpt_sizes_are_named(changes, words, tmp_path, monkeypatch):
    path = save_build(tmp_path / "log" / "model_00250.pt", monkeypatch, **changes)
    write_meta(path.with_name("meta.pkl"))
    with pytest.raises(ConfigError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_a_padded_vocabulary_is_cut(tmp_path):
    """A padded vocabulary is cut to the tokenizer's, so that its ids are never drawn."""
    args = ARGS | {"vocab_size": 64}
    state = random_state(args)
    write_meta(write(tmp_path, state, args) / "meta.pkl")
    case, model = Case(state, args, 20, limit=60), load(tmp_path)
    assert model.architecture.vocab_size == 60
    check(answers(transformer(model, kernels_of("reference", model.architecture)), [case], count=32), [case], count=32)


def test_a_head_of_its_own_is_used(tmp_path):
    state = random_state(ARGS)
    state["lm_head.weight"] = state["lm_head.weight"].flip(0).contiguous()
    write_meta(write(tmp_path, state, ARGS) / "meta.pkl")
    model, case = load(tmp_path), Case(state, ARGS, 20)
    assert not model.architecture.tied
    check(answers(transformer(model, kernels_of("reference", model.architecture)), [case], count=32), [case], count=32)


def test_older_masks_change_nothing(tmp_path):
    """Masks of older checkpoints and a missing optimizer change nothing."""
    state = random_state(ARGS)
    old = {key: value for key, value in ARGS.items() if key not in ("bias", "dropout")}
    masks = {f"transformer.h.{l}.attn.bias": torch.ones(1, 1, 8, 8).tril() for l in range(3)}
    torch.save({"model": state | masks, "model_args": old}, tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl")
    assert load(tmp_path / "ckpt.pt").architecture == load(write(tmp_path, state, ARGS)).architecture


def test_the_vocabulary_is_beside_checkpoint_or_data(tmp_path):
    """The vocabulary is next to the checkpoint or in the data next to its folder."""
    folder = write(tmp_path / "out-plays", random_state(ARGS), ARGS)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    for words in ("the tokenizer of", "60 tokens", str(folder / "meta.pkl"), str(tmp_path / "data/plays/meta.pkl")):
        assert words in str(caught.value)
    write_meta(tmp_path / "data/plays/meta.pkl")
    tokenizer = open_tokenizer(load(folder).text)
    assert tokenizer.decode(tokenizer.encode("To be, or not? \u00e9\n")) == "To be, or not? \u00e9\n"
    with pytest.raises(RequestError, match='no token for "x"'):
        tokenizer.encode("fox")
    assert not tokenizer.has_chat_template and tokenizer.vocab_size == 60 and tokenizer.piece(60) == b""
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.render([Message("user", "To be")])
    write_meta(folder / "meta.pkl", CHARACTERS[:59])
    assert load(folder).architecture.vocab_size == 59 and files_of(folder / "ckpt.pt") == [folder / "ckpt.pt", folder / "meta.pkl"]
    [found] = find_models(tmp_path)
    assert (found.path, found.name) == (folder / "ckpt.pt", "out-plays")


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content, words", [
    (pickle.dumps(Evil()), "it would load builtins.print"), (pickle.dumps({"stoi": {"a": 0}}), "KeyError"), (b"\x80", "is not nanoGPT's vocabulary"),
    (pickle.dumps({"stoi": {"a": 0, "b": 0}, "itos": {0: "b"}}), "one of the ids from 0 on"), (pickle.dumps({"stoi": {"ab": 0}, "itos": {0: "ab"}}), "some characters"),
    (pickle.dumps({"stoi": {"a": 1}, "itos": {1: "a"}}), "from 0 on"), (pickle.dumps({"stoi": {"a": 0}, "itos": {0: "b"}}), "another table"),
    (pickle.dumps({"stoi": {"\ud800": 0}, "itos": {0: "\ud800"}}), "surrogate"), (pickle.dumps([1]), "is not nanoGPT's vocabulary"),
    (pickle.dumps({"stoi": {chr(i): i for i in range(61)}, "itos": dict(enumerate(map(chr, range(61))))}), "has 61 tokens, the model 60")],
    ids=["a call", "no itos", "cut", "one id twice", "two letters", "not from 0", "another itos", "no text", "a list", "too many"])
def test_a_vocabulary_is_only_dict_str_and_int(content, words, tmp_path, capsys):
    write(tmp_path, random_state(ARGS), ARGS)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path)
    assert str(tmp_path / "meta.pkl") in str(caught.value) and str(caught.value).isprintable() and capsys.readouterr().out == ""


GPT2 = ARGS | {"vocab_size": 50_304, "n_embd": 16, "n_layer": 1, "block_size": 16}


def write_bpe(folder, names=("vocab.json", "merges.txt")):
    """GPT-2's alphabet, two merges, names up to 50,256, and the end of a text."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    tokens = [*bytes_to_unicode().values(), "he", "hel"]
    tokens += [f"<{i}>" for i in range(len(tokens), 50_256)] + ["<|endoftext|>"]
    (folder / names[0]).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / names[1]).write_text("#version: 0.2\nh e\nhe l\n")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_s_vocabulary_comes_from_its_files(names, tmp_path):
    """GPT-2's vocabulary comes from its files, which must be there."""
    write(tmp_path, random_state(GPT2), GPT2)
    with pytest.raises(ConfigError, match="needs GPT-2's tokenizer.json, or its vocab.json and merges.txt"):
        load(tmp_path)
    write_bpe(tmp_path, names)
    model = load(tmp_path)
    tokenizer = open_tokenizer(model.text)
    assert model.architecture.vocab_size == 50_257 and model.text.stop_tokens == {50_256} and not tokenizer.has_chat_template
    assert len(tokenizer.encode("hello")) == 3 and tokenizer.decode(tokenizer.encode("hello, \u65e5!")) == "hello, \u65e5!"
    (tmp_path / names[0]).write_text('{"a": "b"}')
    with pytest.raises(ConfigError, match="does not map tokens"):
        load(tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(model_args=None), "is not nanoGPT's: model_args is null"), (dict(model=[1]), "model is a list of 1; it must be a state dict"),
    (dict(model_args=ARGS | {"n_embd": 66}), "n_embd is 66; it must be a multiple of 4"), (dict(model_args=ARGS | {"n_kv_head": 1}), 'has the key "n_kv_head"; known are n_layer'),
    (dict(model_args=ARGS | {"block_size": "512"}), 'block_size is "512"; it must be an integer'), (dict(model_args=ARGS | {"n_layer": 4}), "missing transformer.h.3.ln_1.weight"),
    (dict(model={}), "missing transformer.wte.weight")])
def test_a_wrong_checkpoint_is_named_in_one_line(change, words, tmp_path):
    torch.save({"model": random_state(ARGS), "model_args": ARGS} | change, tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl")
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path)
    assert str(tmp_path / "ckpt.pt") in str(caught.value) and str(caught.value).isprintable()


def test_an_adapter_is_merged(tmp_path):
    state = random_state(ARGS)
    write_meta(write(tmp_path, state, ARGS) / "meta.pkl")
    shapes = {f"transformer.h.{l}.attn.c_attn": (192, 64) for l in range(3)}
    from safetensors.torch import save_file
    dice, adapter = torch.Generator().manual_seed(5), tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.{name}.lora_{part}.weight": torch.randn(shape, generator=dice) * 0.1
               for name, (N, K) in shapes.items() for part, shape in (("A", (4, K)), ("B", (N, 4)))}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}))
    for name in shapes:
        state[f"{name}.weight"] = state[f"{name}.weight"] + 2 * tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
    model, case = load(tmp_path, lora=(str(adapter),)), Case(state, ARGS, 20)
    check(answers(transformer(model, kernels_of("reference", model.architecture)), [case], count=32), [case], count=32)


def test_a_checkpoint_is_served_for_completions(tmp_path):
    folder = write(tmp_path / "out", random_state(ARGS), ARGS)
    write_meta(folder / "meta.pkl")
    with server(folder, "--dtype", "float32") as (_, url):
        assert get(url + "/v1/models")["data"][0]["id"] == "out"
        answer = json.loads(post(url + "/v1/completions", {"prompt": "To be", "max_tokens": 20, "temperature": 0}).read())
        ids, state = [CHARACTERS.index(letter) for letter in "To be"], random_state(ARGS)
        for _ in range(20):
            ids.append(int(by_formula(state, ARGS, ids)[-1].argmax()))
        assert answer["choices"][0]["text"] == "".join(CHARACTERS[token] for token in ids[5:])
        for body in ({"prompt": "a box"}, {"prompt": ""}):
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(url + "/v1/completions", body)
            assert caught.value.code == 400
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(url + "/v1/chat/completions", ask("To be"))
        assert caught.value.code == 400 and b"no chat template" in caught.value.read()
