"""LoRA adapters as peft saves them, merged at load, and FP8 weights: against peft and against plain arithmetic."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.weights.adapters.lora import other_base
from engines import forward_logits, make_batch, tensors_of
from lora import LINEAR, OPTIONS, adapt
from fp8 import SCHEMES, save_fp8
from families import TOLERANCE, answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, transformer
from nightly import by_day


pytestmark = pytest.mark.usefixtures("one_thread")


# Tolerance of logits. Delta rules amplify what is rounded: transformers' own logits of these models are 2.7e-4 to 6.3e-4 from those
# that it computes in float64, and ours are no farther
ADAPTED = dict.fromkeys(("qwen3.5", "qwen3.5moe", "qwen3next"), 3e-4)

@pytest.mark.parametrize("name", by_day(OPTIONS, *(name for name in OPTIONS if name not in ("glm4", "lfm2", "qwen3.5", "qwen3.5moe", "lfm2moe", "granite4h", "granite4h-dense", "qwen3next", "gemma4", "gemma4moe", "starcoder2", "nemotron-h", "nemotron3-latent"))))
def test_an_adapter_is_merged_as_peft_merges_it(name, tmp_path):
    model = make_model(name)
    folder = save(model, tmp_path / "base")
    merged = adapt(model, tmp_path / "adapter", **OPTIONS[name])
    cases = clear_cases(merged, lengths=(40,), count=16)
    plain, ours = load(folder), load(folder, lora=(str(tmp_path / "adapter"),))
    assert "LoRA adapter merged into" in ours.description
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16, tolerance=ADAPTED.get(name, TOLERANCE))
    changed = [key for key, tensor in tensors_of(ours).items() if not torch.equal(tensor, tensors_of(plain)[key])]
    assert changed and {key.rpartition(".")[2] for key in changed} <= {
        "embed", "head", "qkv", "output", "gate_up", "up", "down", "mix_in", "mix_out", "shared_gate_up", "shared_up", "shared_down",
        "latent_in", "latent_out", "layer_project", "input_gate", "input_out"}


@pytest.mark.parametrize("name", by_day([
    "llama3.1", "gemma3", "phi3", "glm4", "lfm2", "lfm2moe", "granite4h", "granite4h-dense", "qwen3.5", "qwen3.5moe", "qwen3next", "gemma4", "gemma4moe", "gpt2", "pythia", "cohere2", "nemotron-h", "nemotron3"],
    "llama3.1", "gemma3", "phi3", "qwen3.5", "pythia", "nemotron3"))       # whose q and k are permuted, or not; with one matrix for three; with heads in another order
def test_an_adapter_is_merged_into_a_gguf_too(name, tmp_path):
    """An adapter is merged into the same model as GGUF."""
    whole = {"qwen3.5moe": "shared_expert_intermediate_size", "qwen3next": "shared_expert_intermediate_size", "lfm2moe": "moe_intermediate_size", "gemma4moe": "moe_intermediate_size", "nemotron3": "moe_shared_expert_intermediate_size",
             "granite4h": "shared_intermediate_size"}       # of blocks
    changes = {"gemma3": {"query_pre_attn_scalar": 32}, "granite4h-dense": {"position_embedding_type": None}}.get(name, {whole[name]: 64} if name in whole else {})
    lora = (str(tmp_path / "adapter"),)
    model = make_model(name, **changes)
    path, packed = (as_gguf(tmp_path / f"{name}{q}.gguf", model, quantized=q) for q in (False, True))
    plain = tensors_of(load(packed))
    merged = adapt(model, tmp_path / "adapter", **OPTIONS[name])
    cases = clear_cases(merged, lengths=(40,), count=16)
    ours = load(path, lora=lora)
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16, tolerance=ADAPTED.get(name, TOLERANCE))
    if decode_core() and not not_compiled(ours.architecture):        # a packed matrix is packed again
        values, again = tensors_of(load(packed, lora=lora)), load(packed, None, lora=lora)
        for key, given in again.tensors.items():
            if torch.equal(values[key], plain[key]):
                continue
            matrix, row = given.read(), 0
            assert matrix.kind == "q8_0"
            for kind, rows in matrix.parts:
                part = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType.Q8_0))
                exact = values[key][row:row + len(part)]
                row += len(part)
                assert (part - exact).abs().max() <= 0.57 * exact.abs().max() / 127      # half a step, and the rounding to float16


def test_adapters_of_borrowed_keys_are_ignored(tmp_path):
    """Some programs that train give such layers matrices of their own, as the published files do, which nothing reads."""
    model = make_model("gemma4")
    paths = save(model, tmp_path / "base"), as_gguf(tmp_path / "base.gguf", model)
    adapt(model, tmp_path / "adapter")
    lora = (str(tmp_path / "adapter"),)
    wanted = [tensors_of(load(path, lora=lora)) for path in paths]
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    for layer, part, rows in ((7, "k", 64), (7, "v", 64), (5, "k", 32)):
        name = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj.lora_"
        tensors |= {f"{name}A.weight": torch.ones(4, 64), f"{name}B.weight": torch.ones(rows, 4)}
    save_file(tensors, weights)
    for path, before in zip(paths, wanted):
        assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(load(path, lora=lora)).items())
    save_file(tensors | {"base_model.model.model.embed_tokens_per_layer.weight": torch.zeros(288, 256)}, weights)
    with pytest.raises(ConfigError, match="a whole matrix model.embed_tokens_per_layer"):
        load(paths[0], lora=lora)


def test_several_adapters_add_up(tmp_path):
    """Several adapters add up, and the embedding counts once where the head is tied."""
    model = make_model("llama3.2")
    folder = save(model, tmp_path / "base")
    for name, targets in (("one", ["down_proj"]), ("two", ["down_proj", "embed_tokens"])):
        adapt(make_model("llama3.2"), tmp_path / name, targets=targets)
    plain = tensors_of(load(folder))
    sums = tensors_of(load(folder, lora=(str(tmp_path / "one"), str(tmp_path / "two"))))
    for key in ("0.down", "embed"):
        alone = [tensors_of(load(folder, lora=(str(tmp_path / name),)))[key] - plain[key] for name in ("one", "two")]
        torch.testing.assert_close(sums[key] - plain[key], alone[0] + alone[1], atol=1e-6, rtol=0)
    assert (sums["embed"] - plain["embed"]).abs().max() > 0.01


@pytest.mark.parametrize("name, options", by_day([
    ("llama2", {"targets": ["q_proj"]}), ("llama3.2", {"targets": ["q_proj"]}), ("llama3.1", {"targets": ["embed_tokens", "lm_head"]}),
    ("llama3.1", {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}), ("phi3", {"targets": ["qkv_proj"], "modules_to_save": ["down_proj"]})],
    ("llama3.2", {"targets": ["q_proj"]}), ("llama3.1", {"targets": ["q_proj"], "modules_to_save": ["lm_head"]})))
def test_an_adapter_may_have_whole_matrices(name, options, tmp_path):
    """Copies of the base's embedding and head, or what modules_to_save trained."""
    model = make_model(name)
    base, path = save(model, tmp_path / "base"), as_gguf(tmp_path / "base.gguf", model)
    merged = adapt(model, tmp_path / "adapter", embeddings=True, **options)
    cases = clear_cases(merged, lengths=(40,), count=16)
    whole = [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora_" not in key]
    assert whole
    for ours in (load(folder, lora=(str(tmp_path / "adapter"),)) for folder in (base, path)):
        check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16)


def test_whole_matrices_that_do_not_fit_are_refused(tmp_path):
    folder, adapters = save(make_model("llama3.2"), tmp_path / "base"), [tmp_path / "one", tmp_path / "two"]
    for adapter in adapters:
        adapt(make_model("llama3.2"), adapter, targets=["q_proj"], embeddings=True)
    weights, embed = adapters[1] / "adapter_model.safetensors", "base_model.model.model.embed_tokens.weight"
    tensors = load_file(weights)
    for change, loaded, words in (
            ({embed: tensors[embed][:-3].clone()}, adapters[1:], r"whole matrix model.embed_tokens \(285, 64\), which in this model is \(288, 64\)"),
            ({embed: tensors[embed] + 1, "base_model.model.lm_head.weight": tensors[embed] + 1}, adapters,
             "has its own lm_head.weight, and so does an earlier adapter")):
        save_file(tensors | change, weights)
        with pytest.raises(ConfigError, match=words):
            load(folder, lora=tuple(map(str, loaded)))


@pytest.mark.parametrize("wanted, has, told", [
    ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", True), ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-instruct-q4_k_m", False),
    ("unsloth/meta-llama-3.1-8b-instruct-unsloth-bnb-4bit", "Llama-3.1-8B-Instruct-IQ4_XS", False), ("./base/", "base", False),
    ("org/other", "models--org--name/snapshots/12ab", True), ("org/name", "/x/models--org--name/snapshots/12ab", False), (None, "name", False)])
def test_an_adapter_of_another_model_is_reported(wanted, has, told):
    assert ("this adapter was made for" in other_base(wanted, (has,))) == told


def test_an_adapter_s_base_is_compared_by_name(tmp_path, caplog):
    """The base of an adapter is compared with the name of a folder and of a GGUF."""
    model = make_model("llama2")
    base, path = save(model, tmp_path / "base"), as_gguf(tmp_path / "base-F16.gguf", model)
    adapt(model, tmp_path / "adapter", targets=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    for name, count in (("org/base", 0), ("org/other", 2)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
        for folder in (base, path):
            load(folder, lora=(str(tmp_path / "adapter"),))
        assert caplog.text.count('this adapter was made for "org/other"') == count


def broken_adapters(folder):
    """(the words of the error) after each change of a good adapter."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors, good = json.loads(path.read_text()), load_file(weights), weights.read_bytes()
    for change, words in (
            ({"peft_type": "IA3"}, 'peft_type is "IA3"; it must be one of LORA'), ({"r": 8}, r"shapes \[\(4, 64\), \(64, 4\)\]; with rank 8 they must"),
            ({"r": 0}, "r is 0; it must be an integer from 1"), ({"r": None}, "r is missing"), ({"use_dora": True}, "use_dora is true; such adapters"),
            ({"modules_to_save": ["lm_head"]}, "lm_head\" of modules_to_save is missing"), ({"bias": "all"}, 'bias is "all"'),
            ({"layer_replication": [[0, 2]]}, "layer_replication is"), ({"a_new_key": 0.5}, "a_new_key is 0.5; such adapters are not supported"),
            ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa", which changed the base model too'),
            ({"target_modules": ["k_proj"]}, "layers.0.self_attn.q_proj is not among the target_modules of adapter_config.json, which are k_proj"),
            ({"rank_pattern": {"q_proj": "x"}}, 'rank_pattern.q_proj is "x"; it must be'), ({"rank_pattern": [1]}, "rank_pattern is a list of 1")):
        path.write_text(json.dumps(config | change))
        yield words
    path.write_text(json.dumps(config))
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, words in (({first: tensors[first][:, :5].clone()}, r"q_proj has lora_A and lora_B of the shapes"),
                          ({first: None}, "q_proj has lora_A and lora_B of the shapes"),
                          ({first.replace("layers.0", "layers.9").replace("_A", f"_{end}"): torch.zeros(4, 64) for end in "AB"},
                           "layers.9.self_attn.q_proj is not a weight matrix of this model; it has model.embed_tokens, "),
                          ({first.replace("lora_A", "lora_magnitude_vector"): torch.zeros(4)}, "is neither lora_A nor lora_B nor a model's matrix"),
                          (dict.fromkeys(tensors), "has no tensors")):
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, weights)
        yield words
    weights.write_bytes(good[:40])
    yield "adapter_model.safetensors is truncated: it has 40 bytes"
    weights.unlink()
    yield "cannot read .*adapter_model.safetensors"
    path.unlink()
    yield "cannot read .*adapter_config.json"


def test_a_wrong_adapter_is_named_in_one_line(tmp_path, nanochat_fixtures):
    """Whatever is wrong with an adapter is one line that names it."""
    folder, adapter = save(make_model("llama2"), tmp_path / "base"), tmp_path / "adapter"
    adapt(make_model("llama2"), adapter, targets=["q_proj"])
    load(folder, lora=(str(adapter),))
    assert "merged into 4 matrices" in load(nanochat_fixtures / "gen5", lora=(str(adapter),)).description   # its q_proj have the same shapes
    for words in broken_adapters(adapter):
        with pytest.raises(ConfigError, match=words) as caught:
            load(folder, lora=(str(adapter),))
        assert str(adapter) in str(caught.value) and str(caught.value).isprintable()


# --- FP8 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp8_weights_are_multiplied_by_their_scales(scheme, tmp_path):
    model = make_model("llama2", intermediate_size=112)         # 112 is no multiple of 32: the last block is smaller
    ours = load(save_fp8(model, tmp_path, scheme))
    cases = clear_cases(model, lengths=(40,), count=16)
    assert "from FP8" in ours.description
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16)


def test_an_adapter_is_added_to_what_fp8_means(tmp_path):
    model = make_model("qwen3")
    folder = save_fp8(model, tmp_path / "base", "deepseek")
    cases = clear_cases(adapt(model, tmp_path / "adapter"), lengths=(9,), count=16)
    ours = load(folder, lora=(str(tmp_path / "adapter"),))
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16)


SPARSE = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}}}
WIDE = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 16}}}}


@pytest.mark.parametrize("config, words", [
    ({"quant_method": "torchao", "bits": 4}, r'quant_method is "torchao"; these packed weights are read: AWQ \(gemm, .*Otherwise use the unquantized model or a GGUF'),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, 'version is "gemv", of which only gemm is read'),
    ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, 'version is "gemv_fast", of which only gemm'),
    ({"quant_method": "awq", "bits": 3}, "bits is 3, and AWQ is read with 4"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, 'checkpoint_format is "marlin"'),
    ({"quant_method": 7}, "quant_method is 7"), ({}, "quant_method is null"), ([1], "quant_method is null"),
    (SPARSE, 'quant_method is "compressed-tensors" of format "marlin-24"'),
    (WIDE, 'the weights of "group_0" are of type "int" with 16 bits'),
    ({"quant_method": "fp8", "weight_block_size": [64]}, "weight_block_size is a list of 1; it must be a list of 2 integers"),
    ({"quant_method": "fp8", "weight_block_size": [64, 32]}, r"the scales of model.layers.0.self_attn.q_proj.weight \(64, 64\) are \(2, 2\); "
                                                             "there must be 1, one for each row, or one for each block of 64 x 32")])
def test_other_quantizations_are_one_clear_line(config, words, tmp_path):
    folder = save_fp8(make_model("llama2"), tmp_path, "deepseek")
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    with pytest.raises(ConfigError, match=words) as caught:
        tensors_of(load(folder))
    assert str(folder) in str(caught.value) and str(caught.value).isprintable()


def test_fp8_weights_without_scales_are_refused(tmp_path):
    folder = save_fp8(make_model("llama2"), tmp_path, "fp8")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match='"model.layers.1.mlp.up_proj.weight" is of type float8_e4m3fn; .*or FP8 with a tensor of scales'):
        load(folder)


# --- norms -------------------------------------------------------------------------------------------------------

NORMS = {"llama2": ["input_layernorm", "post_attention_layernorm", "norm"], "gemma3": ["pre_feedforward_layernorm", "q_norm", "model.norm"], "qwen3": ["k_norm"],
         "qwen3.5": ["input_layernorm", "q_norm", "norm"], "gpt2": ["ln_1", "ln_f"], "olmo2": ["post_attention_layernorm", "q_norm"]}


@pytest.mark.parametrize("name", NORMS)
def test_trained_norms_replace_the_model_s(name, tmp_path):
    """Vectors of modules_to_save, with their biases; Gemma's norms multiply by 1 + w, which a GGUF file has summed up."""
    model = make_model(name, **{"gemma3": {"query_pre_attn_scalar": 32}}.get(name, {}))
    paths = [save(model, tmp_path / "base"), as_gguf(tmp_path / "base.gguf", model)]
    if name != "gpt2":
        paths.append(as_gguf(tmp_path / "packed.gguf", model, quantized=True))
    targets = OPTIONS[name]["targets"] if name in ("gpt2", "qwen3.5") else ["v_proj"]
    merged = adapt(model, tmp_path / "adapter", targets=targets, size=0.4, modules_to_save=NORMS[name], fan_in_fan_out=name == "gpt2")
    vectors = [key for key, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items() if tensor.ndim == 1]
    assert vectors and any(key.endswith(".bias") for key in vectors) == (name == "gpt2")
    prompt = list(range(3, 43))
    with torch.no_grad():
        expected = merged(torch.tensor([prompt])).logits[0, -1]
    found = []
    for path in paths:
        ours = load(path, lora=(str(tmp_path / "adapter"),))
        backends = ("reference", "decode_core") if decode_core() and not not_compiled(ours.architecture) else ("reference",)
        found += [forward_logits(transformer(ours, kernels_of(backend, ours.architecture)), make_batch((prompt, 0, 40, [0, 1, 2])))[0] for backend in backends]
        spoiled = (found[-1] - expected).abs().max() / expected.abs().max()
        assert spoiled < (0.2 if "packed" in path.name else 1e-4), path
    if len(paths) > 2:      # a norm is exact in a packed file too
        key = next(key for key in tensors_of(load(paths[2])) if key.endswith("norm") and not torch.equal(tensors_of(load(paths[2]))[key], tensors_of(load(paths[2], lora=(str(tmp_path / "adapter"),)))[key]))
        assert torch.equal(*(tensors_of(load(path, lora=(str(tmp_path / "adapter"),)))[key] for path in paths[1:]))


def test_vectors_that_do_not_fit_are_refused(tmp_path):
    """Vectors that do not fit are refused, and none is served unmerged."""
    model = make_model("llama2")
    paths = save(model, tmp_path / "base"), as_gguf(tmp_path / "base.gguf", model)
    adapt(model, tmp_path / "adapter", targets=["v_proj"], modules_to_save=["input_layernorm"])
    for path in paths:
        ours = load(path)
        with pytest.raises(ConfigError, match="input_layernorm .modules_to_save., which cannot be served without merging"):
            transformer(ours, kernels_of("reference", ours.architecture)).load_adapter(1, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors, name = load_file(weights), "base_model.model.model.layers.0.input_layernorm.weight"
    for change, words in (({name: torch.ones(65)}, r"a whole vector model.layers.0.input_layernorm \(65,\), which in this model is \(64,\)"),
                          ({name: torch.ones(64, 1)}, r"a whole matrix model.layers.0.input_layernorm \(64, 1\)"),
                          ({name: torch.full((64,), float("nan"))}, "has a value that is NaN or infinite"), ({name: torch.ones(2, 2, 2)}, "nor a model's matrix or vector"),
                          ({name.replace("input_layernorm", "other"): torch.ones(64)}, "a whole vector model.layers.0.other .64,., which in this model does not exist"),
                          ({name.replace("weight", f"lora_{end}.weight"): torch.ones(shape) for end, shape in (("A", (4, 64)), ("B", (64, 4)))},
                           "input_layernorm is not a weight matrix of this model; it has model.embed_tokens, ")):
        save_file(tensors | change, weights)
        for path in paths:
            with pytest.raises(ConfigError, match=words):
                load(path, lora=(str(tmp_path / "adapter"),))
