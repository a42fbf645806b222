"""Latent attention (MLA) in files: heads' keys and values in one matrix or two, FP8, adapters, draft heads, and what is refused."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.config import Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.build import build_engine
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.adapters.serving import adapter_reader
from chatlm.worker.weights.formats.folder.description import hf_blocks
from chatlm.worker.weights.formats.gguf.file import read_gguf
from engines import forward_logits, make_batch, tensors_of
from families import answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, transformer
from fp8 import save_fp8
from lora import adapt
from real_server import get, post, server
from sick_models import diagnose
from tiny_gguf import small_gguf_metadata, write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")


BACKENDS = ["reference", *["decode_core"] * (decode_core() is not None)]


def test_keys_and_values_in_one_matrix_are_those_in_two(tmp_path):
    """A GGUF file of before 2025 gives the tensors of one of today."""
    model = make_model("deepseek3")
    one = load(as_gguf(tmp_path / "one.gguf", model, whole=True))
    two = load(as_gguf(tmp_path / "two.gguf", model))
    assert one.architecture == two.architecture
    assert all(torch.equal(tensor, tensors_of(two)[name]) for name, tensor in tensors_of(one).items())


@pytest.mark.skipif(decode_core() is None, reason="weights stay as stored only where decode_core runs")
@pytest.mark.parametrize("whole", [False, True], ids=["two matrices", "one"])
def test_packed_heads_compute_their_values(tmp_path, whole):
    """Heads' matrices of a quantized file stay packed, and compute what their values say."""
    path = as_gguf(tmp_path / "tiny.gguf", make_model("deepseek3", kv_lora_rank=64), quantized=True, whole=whole)
    exact, packed = load(path), load(path, None)
    assert {packed.tensors[f"1.{name}"].read().kind for name in ("k_up", "v_up", "queries_up")} == {"q8_0"}
    batch = make_batch((list(range(3, 43)), 0, 40, [0, 1, 2]))
    expected = transformer(exact, kernels_of("reference", exact.architecture)).forward(batch)[0]
    limits = {"max_tokens": 64, "max_rows": 8}
    kernels = load_kernels("cpu", packed.architecture, **limits)
    ours = forward_logits(Transformer(packed.architecture, dict(packed.tensors), kernels, num_pages=4, dtype=None, **limits), batch)[0]
    assert (ours - expected).norm() < 0.06 * expected.norm()        # activations are int8; a wrong row would make it 1


@pytest.mark.parametrize("form", ["folder", "file", "older file"])
def test_the_doctor_reads_heads_of_latents(tmp_path, form):
    """`check` looks at all weights of latent attention, also where a file has keys and values in one matrix."""
    model = make_model("glm-flash")
    path = save(model, tmp_path / "model") if form == "folder" else as_gguf(tmp_path / "model.gguf", model, quantized=True, whole=form == "older file")
    diagnosis = diagnose(path)
    assert (diagnosis.refused, [found.what for found in diagnosis.findings if found.severity == "error" or "itself failed" in found.what]) == ("", [])


def test_fp8_blocks_may_end_within_a_matrix(tmp_path):
    """A folder in FP8 whose kv_a and heads are no multiples of a block computes what its values say."""
    model = make_model("deepseek3", seed=3)
    folder = save_fp8(model, tmp_path, "deepseek")      # which rounds the model too
    cases = clear_cases(model, lengths=(9, 40))
    ours = load(folder)
    assert "from FP8" in ours.description
    for backend in BACKENDS:
        check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases), cases)


def test_queries_of_mistral_4_grow(tmp_path):
    """Beyond its first context Mistral 4's whole queries grow, in a folder and in a file that cannot say it."""
    rope = make_model("mistral4").config.rope_parameters | {"original_max_position_embeddings": 64}
    model = make_model("mistral4", rope_parameters=rope)
    cases = clear_cases(model, lengths=(9, 150))
    assert load(save(model, tmp_path / "model")).context_length == 64       # unless more is asked for
    for path in tmp_path / "model", as_gguf(tmp_path / "model.gguf", model):
        ours = load(path, context_length=512)
        assert ours.architecture.attentions[0].scores.growth == pytest.approx((0.1, 64))
        for backend in BACKENDS:
            check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases), cases)


def test_an_adapter_of_all_matrices_is_merged_as_by_peft(tmp_path):
    """An adapter of every matrix of attention, that of keys and values too, is merged as peft does."""
    model = make_model("deepseek3")
    folder = save(model, tmp_path / "base")
    merged = adapt(model, tmp_path / "adapter", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], size=0.05)
    cases = clear_cases(merged, lengths=(9, 40))
    ours = load(folder, lora=(str(tmp_path / "adapter"),))
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases), cases)


def test_an_adapter_of_keys_and_values_is_only_merged(tmp_path):
    """ModelOrAdapter beside its base, an adapter of heads' keys and values is refused with its name."""
    model = make_model("deepseek3")
    base = save(model, tmp_path / "base"), as_gguf(tmp_path / "base.gguf", model)
    adapt(model, tmp_path / "adapter", ["kv_b_proj"], size=0.05)
    for path in base:
        with pytest.raises(ConfigError, match="kv_b_proj"):
            adapter_reader(load(path))(tmp_path / "adapter")


def test_a_draft_head_is_left_out_with_its_scales(tmp_path):
    """A folder in FP8 with a draft head after the last layer is the model without it."""
    model = make_model("deepseek3")
    folder = save_fp8(model, tmp_path, "deepseek")
    [path] = folder.glob("*.safetensors")
    plain = load(folder)
    before = {name: tensor.clone() for name, tensor in tensors_of(plain).items()}
    state = load_file(path)
    drafts = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in state.items() if ".layers.2." in name}
    drafts["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(state | drafts, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    ours = load(folder)
    assert ours.architecture == plain.architecture
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(ours).items())


def test_a_draft_head_of_a_gguf_file_is_left_out(tmp_path):
    model = make_model("glm-flash")
    metadata, stored = read_gguf(as_gguf(tmp_path / "plain.gguf", model))
    tensors = {name: tensor.data for name, tensor in stored.items()}
    tensors |= {name.replace("blk.2.", "blk.3."): tensor.data for name, tensor in stored.items() if name.startswith("blk.2.")}
    tensors["blk.3.nextn.eh_proj.weight"] = numpy.zeros((64, 128), numpy.float32)
    own = {key: value for key, value in metadata.items() if key.startswith("deepseek2.")}
    own |= {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    del own["deepseek2.expert_gating_func"]         # as in files of GLM-4.7-Flash before 21 January 2026
    path = write_gguf(tmp_path / "drafts.gguf", tensors, own, small_gguf_metadata("gpt-2") | {"general.architecture": "deepseek2"})
    assert load(path).architecture == load(tmp_path / "plain.gguf").architecture


def config_of(name, **changes):
    config = make_model(name).config.to_dict() | {"model_type": make_model(name).config.model_type}
    return {key: value for key, value in (config | changes).items() if value is not ...}


def error_of(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        hf_blocks(folder / "config.json", None)
    return str(caught.value)


@pytest.mark.parametrize("name, changes, words", [
    ("deepseek3", {"scoring_func": "softmax"}, 'scoring_func is "softmax"; it must be one of sigmoid'),
    ("deepseek3", {"topk_method": "greedy"}, 'topk_method is "greedy"; it must be one of noaux_tc'),
    ("deepseek2-lite", {"topk_method": "noaux_tc"}, 'topk_method is "noaux_tc"; it must be one of greedy, group_limited_greedy'),
    ("deepseek3", {"moe_layer_freq": 2}, "moe_layer_freq is 2; it must be 1"),
    ("deepseek3", {"num_key_value_heads": 2}, "num_key_value_heads is 2; it must be 4"),
    ("deepseek3", {"kv_lora_rank": 0}, "kv_lora_rank is 0; it must be an integer from 1"),
    ("deepseek3", {"qk_rope_head_dim": 7}, "head_dim is 7; it must be a multiple of 2"),
    ("glm-flash", {"mlp_layer_types": ["dense"]}, "mlp_layer_types is a list of 1; it must be a list of 3"),
    ("deepseek3", {"model_type": "deepseek_v32", "index_topk": 2048}, "cannot run deepseek_v32: beyond index_topk tokens its layers see only the keys"),
    ("deepseek3", {"model_type": "glm_moe_dsa"}, "cannot run glm_moe_dsa: beyond index_topk"),
    ("deepseek3", {"model_type": "kimi_linear"}, "cannot run kimi_linear: most of its layers are Kimi Delta Attention (KDA)"),
    ("deepseek3", {"index_topk": 2048}, "index_topk is 2048; this key is not supported in a deepseek_v3 model")])
def test_what_is_computed_otherwise_is_refused(name, changes, words, tmp_path):
    """A config that asks for other arithmetic is refused with the key and what it may have."""
    assert words in error_of(tmp_path, config_of(name, **changes))


@pytest.mark.parametrize("key, value, words", [
    ("attention.key_length_mla", 16, "key_length_mla is 16; it must be an integer from 17"),
    ("attention.kv_lora_rank", None, "kv_lora_rank is missing"), ("expert_gating_func", 3, "expert_gating_func is 3; it must be an integer from 1 to 2")])
def test_bad_metadata_are_named(key, value, words, tmp_path):
    metadata, stored = read_gguf(as_gguf(tmp_path / "plain.gguf", make_model("deepseek3")))
    own = {name: number for name, number in metadata.items() if name.startswith("deepseek2.")} | {f"deepseek2.{key}": value}
    own = {name: number for name, number in own.items() if number is not None}
    path = write_gguf(tmp_path / "bad.gguf", {name: tensor.data for name, tensor in stored.items()}, own,
                      small_gguf_metadata("gpt-2") | {"general.architecture": "deepseek2"})
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_an_indexer_in_a_gguf_file_is_refused(tmp_path):
    model = make_model("deepseek3")
    metadata, stored = read_gguf(as_gguf(tmp_path / "plain.gguf", model))
    own = {name.replace("deepseek2.", "deepseek32."): number for name, number in metadata.items() if name.startswith("deepseek2.")}
    path = write_gguf(tmp_path / "dsa.gguf", {name: tensor.data for name, tensor in stored.items()}, own,
                      small_gguf_metadata("gpt-2") | {"general.architecture": "deepseek32"})
    with pytest.raises(ConfigError, match="cannot run deepseek32: beyond index_topk"):
        load(path)


@torch.no_grad()
def likeliest(model, tokens, count):
    """The tokens that transformers writes after these."""
    found = [*tokens]
    for _ in range(count):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(tokens):]


def test_a_server_keeps_latents_in_8_bits(tmp_path):
    """A server with q8_0 pages of latents answers alike from the cache, and says that a token takes 34 bytes for 32 numbers."""
    folder = save(make_model("kimi2"), tmp_path / "model")
    body = {"prompt": "Latents are small. " * 4, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with server(folder, "--dtype", "float32", "--kv-cache-dtype", "q8_0") as (_, url):
        first, again = (json.load(post(url + "/v1/completions", body)) for _ in range(2))
        assert first["choices"] == again["choices"] and again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        [worker] = get(url + "/stats")["workers"]
        assert worker["kv_token_bytes"] == 3 * (64 + 32) * 34 // 32


@pytest.mark.parametrize("more", [(), ("--tp", "2")], ids=["alone", "two ranks"])
def test_a_server_answers_as_transformers(tmp_path, more):
    """A server of a tiny GLM-4.7-Flash writes what transformers writes, also for a prompt in the cache, and says what a token takes."""
    model = make_model("glm-flash")
    folder = save(model, tmp_path / "model")
    text = "Latents are small. " * 4
    tokenizer = open_tokenizer(load(folder).text)
    expected = tokenizer.decode(likeliest(model, [256, *tokenizer.encode(text)], 12))
    with server(folder, "--dtype", "float32", *more) as (_, url):
        for _ in range(2):
            answer = json.load(post(url + "/v1/completions", {"prompt": text, "max_tokens": 12, "temperature": 0, "ignore_eos": True}))
            assert answer["choices"][0]["text"].rstrip("\ufffd") == expected.rstrip("\ufffd")     # a character may be cut
        [worker] = get(url + "/stats")["workers"]
        assert worker["kv_token_bytes"] == 3 * (48 + 16) * 4


def test_latents_that_cannot_be_turned_are_refused(tmp_path):
    """If a part of latents is no power of two, q8_0 pages of them are refused before anything is loaded."""
    settings = Settings(model=str(save(make_model("youtu"), tmp_path)), kv_cache_dtype="q8_0", kv_cache_memory=1 << 20)
    with pytest.raises(ConfigError, match="--kv-cache-dtype q8_0: all layers have parts of latents of 16, 48; q8_0 needs parts of latents whose size is a power of two"):
        build_engine(resolve_model(settings), settings, torch.device("cpu"))
