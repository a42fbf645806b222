"""Adapters served with their base, unmerged: against peft's merged model, and against what --lora merges."""

import json
import re
import shutil

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.weights.adapters.serving import adapter_reader
from chatlm.worker.weights.formats.nanochat import generations as nanochat
from chatlm.worker.weights.loaded.shards import shard_model, stage_model
from engines import forward_logits, make_batch
from families import GGUF_MODELS, MODELS, answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, transformer
from fp8 import SCHEMES, save_fp8
from lora import OPTIONS, adapt
from nightly import by_day


pytestmark = pytest.mark.usefixtures("one_thread")

SERVED = OPTIONS | {"qwen2": {"targets": ["lm_head", "v_proj", "down_proj"]},
                    "deepseek3": {"targets": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}, "deepseek2-lite": {"targets": ["q_proj", "o_proj"]}}
del SERVED["nanochat"]
SERVED = {name: options for name, options in SERVED.items() if name in ("llama3.1", "gemma3", "phi3", "qwen3", "qwen2", "glm4", "lfm2",
          "qwen3.5", "qwen3.5moe", "gemma4moe", "lfm2moe", "granite4h", "granite4h-dense", "qwen3next", "gpt2", "pythia", "starcoder2", "cohere2", "nemotron-h", "nemotron3", "nemotron3-latent", "deepseek3", "deepseek2-lite")}
ODD = {"phi3": {"head_dim": 24, "hidden_size": 72, "intermediate_size": 100},    # sizes that decode_core pads
       "cohere2": {"head_dim": 20, "hidden_size": 72}}


class WithAdapter:
    """A transformer all of whose rows have the adapter in a folder."""

    def __init__(self, model, folder):
        self.model = model
        model.load_adapter(1, folder)

    def forward(self, batch):
        return forward_logits(self.model, batch._replace(adapters=[1] * len(batch.lengths)))


def backends(model):
    return ["reference"] + ["decode_core"] * (decode_core() is not None and not not_compiled(model.architecture))


@pytest.mark.parametrize("name", by_day(SERVED, "phi3", "qwen2", "nemotron3-latent", "deepseek3"))
def test_a_served_adapter_matches_peft_s_merge(name, tmp_path):
    """An adapter served with its base gives the logits and tokens of PEFT's merged model."""
    model = make_model(name, **ODD.get(name, {}))
    folder = save(model, tmp_path / "base")
    cases = clear_cases(adapt(model, tmp_path / "adapter", size=0.08, **SERVED[name]), lengths=(9, 40))
    ours = load(folder)
    for backend in backends(ours):
        check(answers(WithAdapter(transformer(ours, kernels_of(backend, ours.architecture)), tmp_path / "adapter"), cases), cases,
              tolerance=3e-4 if name == "qwen3next" else 1e-4)


@pytest.mark.parametrize("name", by_day(["llama3.1", "phi3", "glm4", "gemma3", "qwen3.5", "granite4h", "pythia", "cohere2", "nemotron3", "deepseek3"], "llama3.1", "nemotron3"))
def test_an_adapter_served_on_gguf_is_as_merged(name, tmp_path):
    """Floats and packed weights; the rows of q and k lie otherwise in some of the files."""
    model = make_model(name, **{"gemma3": {"query_pre_attn_scalar": 32}, "granite4h": {"shared_intermediate_size": 64},
                               "nemotron3": {"moe_shared_expert_intermediate_size": 64}}.get(name, {}))
    paths = [as_gguf(tmp_path / f"{name}{q}.gguf", model, quantized=q) for q in (False, True)]
    merged = adapt(model, tmp_path / "adapter", **SERVED[name])
    cases = clear_cases(merged, lengths=(9,), count=16)
    for path in paths:
        whole, ours = load(path, lora=(str(tmp_path / "adapter"),)), load(path)
        expected = answers(transformer(whole, kernels_of("reference", whole.architecture)), cases, count=16)
        for backend in backends(ours):
            beside = answers(WithAdapter(transformer(ours, kernels_of(backend, ours.architecture)), tmp_path / "adapter"), cases, count=16)
            for (tokens, logits), (theirs, their_logits) in zip(beside, expected):
                assert tokens == theirs and (logits - their_logits).abs().max() < 3e-4


def test_an_adapter_may_divide_a_tied_head(tmp_path):
    """An adapter is served with a head that a merged one has divided from the embedding."""
    folder, first, second = tmp_path / "base", tmp_path / "first", tmp_path / "second"
    save(make_model("llama3.2"), folder)
    cases = clear_cases(adapt(make_model("llama3.2"), first, ["lm_head"], size=0.08), lengths=(9,), count=16)
    adapt(make_model("llama3.2"), second, ["lm_head", "v_proj"], size=0.05)
    both, ours = load(folder, lora=(str(first), str(second))), load(folder, lora=(str(first),))
    expected = answers(transformer(both, kernels_of("reference", both.architecture)), cases, count=1)
    for backend in backends(ours):
        beside = answers(WithAdapter(transformer(ours, kernels_of(backend, ours.architecture)), second), cases, count=1)
        assert (beside[0][1] - expected[0][1]).abs().max() < 3e-4


@pytest.mark.parametrize("scheme", by_day(SCHEMES, "deepseek"))
def test_an_adapter_served_on_fp8_matches_peft(scheme, tmp_path):
    """An adapter served with an FP8 base gives what PEFT computes with the weights it stands for."""
    model = make_model("qwen3")
    folder = save_fp8(model, tmp_path / "base", scheme)
    cases = clear_cases(adapt(model, tmp_path / "adapter", size=0.08), lengths=(9, 40))
    ours = load(folder)
    for backend in backends(ours):
        check(answers(WithAdapter(transformer(ours, kernels_of(backend, ours.architecture)), tmp_path / "adapter"), cases), cases)


def nanochat_checkpoint(model, folder, fixture):
    """transformers' NanoChat as upstream saves it, with the tokenizer of a fixture."""
    shutil.copytree(fixture, folder)
    [path] = folder.glob("*/*/model_*.pt")
    state = torch.load(path)
    theirs = model.state_dict()
    torch.save({name: theirs[nanochat.name_in_transformers(name.removeprefix("_orig_mod."))].clone() for name in state}, path)
    return folder


@pytest.mark.parametrize("upstream", by_day([False, True], True), ids=["transformers", "upstream"])
def test_an_adapter_served_on_nanochat_matches_peft(upstream, tmp_path, nanochat_fixtures, monkeypatch):
    """Of transformers' names and of upstream's; and so does what is merged at load. transformers rotates in float32, the first generation in bfloat16."""
    monkeypatch.setitem(nanochat.GENERATIONS, 1, nanochat.GENERATIONS[1]._replace(rope_bfloat16=False))
    model = make_model("nanochat", attention_bias=False, vocab_size=283, intermediate_size=256, rms_norm_eps=1.1920929e-07)
    folder, adapter = nanochat_checkpoint(model, tmp_path / "base", nanochat_fixtures / "gen1"), tmp_path / "adapter"
    cases = clear_cases(adapt(model, adapter, "all-linear", size=0.08), lengths=(9, 40))
    if upstream:
        names = {theirs: ours for ours in ("transformer.h", "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
                 for theirs in (nanochat.IN_TRANSFORMERS[ours],)}
        tensors = {}
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            tensors[name] = tensor
        save_file(tensors, adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_q", "c_k", "c_v", "c_proj", "c_fc", "lm_head"]}))
    ours, merged = load(folder), load(folder, lora=(str(adapter),))
    for backend in backends(ours):
        kernels = kernels_of(backend, ours.architecture)
        check(answers(WithAdapter(transformer(ours, kernels), adapter), cases), cases)
    check(answers(transformer(merged, kernels_of("reference", ours.architecture)), cases), cases)


@pytest.mark.parametrize("name", by_day(["llama3.1", "phi3", "qwen3.5", "lfm2", "granite4h", "nemotron3-latent"], "llama3.1", "qwen3.5", "nemotron3-latent"))
def test_ranks_have_their_parts_of_an_adapter(name, tmp_path):
    """What each rank's part adds to its part of a product is that part of what the whole adds."""
    model = make_model(name)
    folder = save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", **SERVED[name])
    plain, merged = load(folder), load(folder, lora=(str(tmp_path / "adapter"),))
    for stage in range(2):
        for rank in range(2):
            base, changed = (shard_model(stage_model(it, stage, 2), rank, 2) for it in (plain, merged))
            added = adapter_reader(base)(tmp_path / "adapter")
            assert added
            for own, tensor in base.tensors.items():
                if own.endswith("bias") or len(tensor.cut.shape) != 2:
                    continue
                before, after = (numpy.concatenate(read) if isinstance(read := it.tensors[own].read(), tuple) else read for it in (base, changed))
                its = added.get(own)
                delta = (its.b * its.scales) @ its.a if its else 0
                numpy.testing.assert_allclose(before + delta, after, atol=1e-5, rtol=0)


def linear_modules(model):
    """An expression for a model's linear modules but its tower's, which nobody serves. In models with Mamba layers peft refuses to adapt out_proj."""
    types = torch.nn.Linear, transformers.pytorch_utils.Conv1D
    refused = ("lm_head", "out_proj") if model.config.model_type == "nemotron_h" else ("lm_head",)
    return "|".join(re.escape(name) for name, module in model.named_modules() if isinstance(module, types) and not name.endswith(refused) and "vis" not in name)


SERVED_IN_PART = {          # what of such an adapter can only be merged: what every rank computes as a whole, or routes by
    "gemma4": "per_layer_input_gate", "gemma4moe": "router.proj", "phimoe": "mlp.router", "phimoe-plain": "mlp.router",
    **dict.fromkeys(("deepseek3", "deepseek3-plain", "deepseek2-lite", "deepseek2-grouped", "glm-flash", "youtu", "mistral4", "minicpm3", "kimi2"), "kv_b_proj"),
    **dict.fromkeys(("qwen2moe", "qwen3.5moe"), "shared_expert_gate")}


@pytest.mark.parametrize("name", by_day(MODELS, "gemma4", "granite4-dense", "nemotron3", "phimoe", "qwen3.5moe", "gpt2"))
def test_an_all_linear_adapter_is_served_or_refused(name, tmp_path):
    """An adapter of every linear module is merged and served or refused by name."""
    for kind, changes in (("folder", {}), *([("file", GGUF_MODELS[name])] if name in GGUF_MODELS else [])):
        if name == "phi3-long":
            changes = changes | {"max_position_embeddings": 128}      # else transformers chooses its factors by the prompt's length
        model = make_model(name, **changes)
        base = save(model, tmp_path / "base") if kind == "folder" else as_gguf(tmp_path / "base.gguf", model)
        adapter = tmp_path / f"adapter of {kind}"
        merged = adapt(model, adapter, targets=linear_modules(model), size=0.08, fan_in_fan_out=name.startswith("gpt2"))
        ids = [7 * place % 256 for place in range(20)]
        with torch.no_grad():
            expected = merged(torch.tensor([ids])).logits[0, -1]
        batch = make_batch((ids, 0, len(ids), [0, 1]))
        if json.loads((adapter / "adapter_config.json").read_text()).get("target_parameters"):      # peft adapts the experts' matrices too
            for read in (lambda: load(base, lora=(str(adapter),)), lambda: adapter_reader(load(base))(adapter)):
                with pytest.raises(ConfigError, match="target_parameters is a list of 2; such adapters are not supported"):
                    read()
            continue
        ours = load(base, lora=(str(adapter),))
        assert (forward_logits(transformer(ours, kernels_of("reference", ours.architecture)), batch)[0] - expected).abs().max() < 5e-4, kind
        ours = load(base)
        beside = transformer(ours, kernels_of("reference", ours.architecture))
        if name in SERVED_IN_PART:
            with pytest.raises(ConfigError, match=rf"changes model\.layers\.0\..*{SERVED_IN_PART[name]}, which cannot be done without merging; --lora merges it"):
                beside.load_adapter(1, adapter)
        else:
            assert (forward_logits(WithAdapter(beside, adapter).model, batch._replace(adapters=[1]))[0] - expected).abs().max() < 5e-4, kind


def test_nemotron_adapters_may_use_nvidia_s_names(tmp_path):
    """Adapters of Nemotron may name its parts as NVIDIA does, and a part that does not exist is named."""
    model = make_model("nemotron3")
    folder = save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", targets=["in_proj", "o_proj", "up_proj"])
    read = adapter_reader(load(folder))
    expected = read(tmp_path / "adapter")
    assert set(expected) == {"0.mix_in", "1.mix_in", "2.output", "0.shared_up", "2.shared_up"}
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors = {name.replace("base_model.model.model.", "base_model.model.backbone."): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    for name, matrix in read(tmp_path / "adapter").items():
        assert all(numpy.array_equal(ours, theirs) for ours, theirs in zip(matrix, expected[name])), name
    save_file({name.replace("layers.0.", "layers.5."): tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(ConfigError, match=r"model\.layers\.5\.mixer\.in_proj is not a weight matrix of this model; it has model\.embeddings"):
        read(tmp_path / "adapter")


def test_adapters_change_a_nemotron_without_mamba(tmp_path):
    """Adapters of a Nemotron without Mamba layers change the parts that they name."""
    model = make_model("nemotron-h", layers_block_type=["full_attention", "mlp", "full_attention", "mlp"])
    adapt(model, tmp_path / "adapter", targets=["o_proj", "up_proj"])
    expected = {"0.output", "0.up", "1.output", "1.up"}
    assert set(adapter_reader(load(save(model, tmp_path / "base")))(tmp_path / "adapter")) == expected
    assert set(adapter_reader(load(as_gguf(tmp_path / "base.gguf", model)))(tmp_path / "adapter")) == expected


def broken(folder):
    """(how to break a good adapter, what the error says)"""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors, good = load_file(weights), json.loads(config.read_text())
    first = next(iter(tensors))

    def rewrite(change=None, **keys):
        save_file(tensors | (change or {}), weights)
        config.write_text(json.dumps(good | keys))

    yield (lambda: rewrite(use_dora=True)), "use_dora is true; such adapters are not supported"
    yield (lambda: rewrite({first: tensors[first][:, :-1].clone()}, base_model_name_or_path="some/Llama-3.2-1B")), (
        "of the shapes .* was made for .*Llama-3.2-1B.*, but the model is base")
    yield (lambda: rewrite({first: tensors[first][:, :-1].clone()})), "of the shapes"
    yield (lambda: rewrite({"base_model.model.lm_head.weight": torch.zeros(288, 64)}, modules_to_save=["lm_head"])), (
        r"whole matrix lm_head \(modules_to_save\), which cannot be served without merging; --lora merges it")
    yield (lambda: rewrite({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 288),
                            "base_model.model.model.embed_tokens.lora_embedding_B": torch.zeros(64, 4)},
                           target_modules=[*good["target_modules"], "embed_tokens"])), "changes model.embed_tokens, which cannot be done without merging"
    yield weights.unlink, "cannot read|No such file"


def test_what_must_be_merged_is_one_line(tmp_path):
    model = make_model("llama3.1")
    folder = save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", targets=["q_proj"])
    read = adapter_reader(load(folder))
    assert set(read(tmp_path / "adapter")) == {f"{layer}.qkv" for layer in range(4)}
    for spoil, words in broken(tmp_path / "adapter"):
        spoil()
        with pytest.raises(ConfigError, match=words) as caught:
            read(tmp_path / "adapter")
        assert "\n" not in str(caught.value)


def test_an_adapter_of_routed_experts_is_one_line(tmp_path):
    model = make_model("qwen3moe")
    folder = save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", targets=["q_proj"])
    config, weights = (tmp_path / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    expert = "base_model.model.model.layers.0.mlp.experts.2.up_proj"
    save_file(load_file(weights) | {f"{expert}.lora_A.weight": torch.zeros(4, 64), f"{expert}.lora_B.weight": torch.zeros(64, 4)}, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "up_proj"]}))
    with pytest.raises(ConfigError, match=r"changes .*experts.*, which cannot be done without merging; --lora merges it") as caught:
        adapter_reader(load(folder))(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_a_fitting_adapter_of_another_base_is_served(tmp_path, caplog):
    """An adapter that fits but names another base is served with a warning, unless the operator gives the
    model that name."""
    model = make_model("llama3.1")
    folder = save(model, tmp_path / "base")
    adapt(model, tmp_path / "adapter", targets=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    for name in ("some/Llama-3.2-1B", "/content/model"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
        assert adapter_reader(load(folder, served_model_name=(name,)))(tmp_path / "adapter") and "was made for" not in caplog.text
        assert adapter_reader(load(folder))(tmp_path / "adapter")
        assert f'this adapter was made for "{name}" (base_model_name_or_path), but the model is base: unless' in caplog.text
        caplog.clear()
