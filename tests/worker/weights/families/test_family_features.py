"""What only some families have: keys without effect, text models of image models, queries that grow, partial rotary embeddings."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.arrays.packed import RopePairs, unpermute_rope
from chatlm.worker.arrays.rotary import query_scales
from chatlm.worker.kernels.choosing import choose_backend, load_kernels
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.model.blocks.experts import Experts, ExpertsBesideDense, Router
from chatlm.worker.model.blocks.extras import LayerInput
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2, ShortConv
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.ops.attention import mean_squares_reference, norm_qk_reference, scale_rows_reference
from chatlm.worker.ops.basic import gated_add_reference, sparse_routes
from chatlm.worker.weights.formats.configs import OTHERS_AFFAIR
from chatlm.worker.weights.formats.folder.description import hf_blocks, hf_text
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
from flat_models import ModelSpec, model_of
from attention_kinds import attention
from engines import forward_logits, make_batch, make_engine, run, tensors_of
from families import GROWING, TINY, answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, spec_of_changed_gguf, tiny_config, transformer, write_tokenizer
from hub_configs import (
    GRANITE_H_TINY, HUB_CONFIGS, NEMOTRON_NANO_9B, QWEN3_NEXT, QWEN35_4B, QWEN36_35B)
from tiny_gguf import small_gguf_metadata, write_gguf
from works import assignment

pytestmark = pytest.mark.usefixtures("one_thread")


def spec_of(folder, config, context=None):
    (folder / "config.json").write_text(json.dumps(config))
    return hf_blocks(folder / "config.json", context)[1]


# --- LayerNorms and the router of Phi-3.5-MoE ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "cohere2"])
def test_embeddings_follow_the_final_layer_norm(name, tmp_path):
    """The hidden states of embeddings are those after the final layer norm."""
    model, prompt = make_model(name), list(range(3, 43))
    ours = transformer(load(save(model, tmp_path)), load_kernels("cpu"))
    forward_logits(ours, make_batch((prompt, 0, 40, [0, 1, 2]))._replace(states=True))
    with torch.no_grad():
        theirs = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    np.testing.assert_allclose(ours.hidden_states(0, 40), theirs, atol=2e-5)


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3])
def test_a_router_with_jitter_matches_transformers(jitter):
    from transformers.models.phimoe.modeling_phimoe import sparsemixer
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    logits[:20] -= 5            # all below zero
    logits[20:40, 3] = logits[20:40, 7] = 4.0
    logits[40:60] = logits[40:60].round()
    ids, shares = sparse_routes(logits, jitter)
    their_shares, their_ids = sparsemixer(logits, jitter, training=False)
    assert torch.equal(ids, their_ids) and torch.allclose(shares, their_shares)


def test_noise_of_training_is_not_read(tmp_path):
    spec_of(tmp_path, tiny_config("phimoe").to_dict() | {"model_type": "phimoe", "input_jitter_noise": "a"})


# --- Nemotron-H ----------------------------------------------------------------------------------------------------


def test_a_nemotron_h_has_transformers_weights(tmp_path):
    """A published Nemotron-H has as many weights as transformers."""
    import transformers
    spec = spec_of(tmp_path, NEMOTRON_NANO_9B)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    count = sum(math.prod(shape) for shape in spec.shapes().values())
    assert sum(p.numel() for p in made.parameters()) == count and round(count / 1e9, 1) == 8.9
    assert len(spec.layers) == 31 and spec.paged_layers == 4 and {its.rope.size for its in spec.attentions} == {0}
    assert [number for number, layer in enumerate(spec.layers) if not layer.feed] == [3, 7, 11, 16, 21, 24]       # before another Mamba layer, or before attention
    listed = dict(NEMOTRON_NANO_9B)
    del listed["num_hidden_layers"]
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    listed["layers_block_type"] = [names[kind] for kind in listed.pop("hybrid_override_pattern")]
    assert spec_of(tmp_path, listed) == spec


NANO_30B = NEMOTRON_NANO_9B | {
    "hidden_size": 2688, "intermediate_size": 1856, "num_attention_heads": 32, "num_key_value_heads": 2,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "max_position_embeddings": 262_144, "norm_eps": 1e-5, "partial_rotary_factor": 1.0, "rope_theta": 10_000,
    "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5}
SUPER_120B = NANO_30B | {"hidden_size": 4096, "mamba_num_heads": 128, "moe_latent_size": 1024, "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
                         "n_routed_experts": 512, "num_experts_per_tok": 22, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
                         "num_hidden_layers": 88, "hybrid_override_pattern": "MEMEMEM*E" * 8 + "MEMEMEMEMEMEMEME"}


@pytest.mark.parametrize("config, billions, layers", [(NANO_30B, 31.6, 29), (SUPER_120B, 120.7, 48)])
def test_a_nemotron_3_has_transformers_weights(config, billions, layers, tmp_path):
    """A published Nemotron 3 has as many weights as transformers."""
    import transformers
    spec = spec_of(tmp_path, config)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    count = sum(math.prod(shape) for name, shape in spec.shapes().items() if not name.endswith("correction_bias"))
    assert sum(p.numel() for p in made.parameters()) == count and round(count / 1e9, 1) == billions
    assert len(spec.layers) == layers and all(layer.mixer for layer in spec.layers)
    experts = spec.layers[0].feed
    assert experts.router == Router(config["num_experts_per_tok"], "sigmoid", correction_bias=True, scale=2.5)
    assert experts.latent == (config.get("moe_latent_size") or 0) and not_compiled(spec) == ""


def test_consecutive_parts_of_a_kind_are_layers(tmp_path):
    """Parts of one kind after another are layers of their own."""
    spec = spec_of(tmp_path, NANO_30B | {"hybrid_override_pattern": "EM-E*E-M", "num_hidden_layers": 8})
    assert [type(layer.mixer).__name__ for layer in spec.layers] == ["NoneType", "Mamba2", "NoneType", "Attention", "NoneType", "Mamba2"]
    assert [type(layer.feed).__name__ for layer in spec.layers] == ["Experts", "FeedForward", "Experts", "Experts", "FeedForward", "NoneType"]
    assert {layer.feed.width for layer in spec.layers if layer.feed} == {1856}


def test_nemotron_3_s_draft_heads_are_left_out(tmp_path):
    """The draft heads of Nemotron 3 are left out, and its newer names are known."""
    model = make_model("nemotron3")
    plain = tensors_of(load(save(model, tmp_path / "folder")))
    weights = save(model, tmp_path / "newer") / "model.safetensors"
    tensors = load_file(weights)
    drafts = {name.replace("backbone.layers.4", "mtp.layers.1"): tensor.clone() for name, tensor in tensors.items() if ".layers.4." in name}
    save_file({name.replace("backbone.", "model.", 1): tensor for name, tensor in tensors.items()} | drafts, weights)
    metadata, stored = read_gguf(as_gguf(tmp_path / "plain.gguf", model))
    found = {name: tensor.data for name, tensor in stored.items()}
    for layer in (3, 4):        # its attention and its experts are in one block
        found |= {name.replace(f"blk.{layer}.", "blk.5."): tensor.data for name, tensor in stored.items() if name.startswith(f"blk.{layer}.")}
    found |= {"blk.5.nextn.eh_proj.weight": np.zeros((64, 128), np.float32), "blk.5.nextn.enorm.weight": np.ones(64, np.float32)}
    own = {key: value for key, value in metadata.items() if key.startswith("nemotron_h_moe.")} | {
        "nemotron_h_moe.block_count": 6, "nemotron_h_moe.nextn_predict_layers": 1, "nemotron_h_moe.attention.head_count_kv": [0, 0, 0, 2, 0, 2],
        "nemotron_h_moe.feed_forward_length": [0, 48, 0, 0, 48, 48]}
    path = write_gguf(tmp_path / "drafts.gguf", found, own, small_gguf_metadata("gpt-2") | {"general.architecture": "nemotron_h_moe"})
    for ours in (load(tmp_path / "newer"), load(path)):
        assert len(ours.architecture.layers) == 3 and all(torch.equal(tensor, plain[name]) for name, tensor in tensors_of(ours).items())


@pytest.mark.parametrize("key, value, latent", [("moe_latent_size", 33, 33), ("rope.scaling.factor", 2.0, 0)])
def test_nemotron_3_s_latent_size_comes_from_its_file(key, value, latent, tmp_path):
    spec = spec_of_changed_gguf(tmp_path, "nemotron3", {f"nemotron_h_moe.{key}": value})[1]
    assert spec.layers[0].feed.latent == latent


# --- keys that change nothing ------------------------------------------------------------------------------------


INERT = {"logit_scale": 0, "embedding_multiplier": 0.0, "attn_logit_softcapping": None, "rope_scaling_layers": {}, "mtp_layers": [],
         "sliding_window_pattern": "", "use_qk_norm": False, "top_k": 50, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3,
         "id2label": {"0": "A"}, "label2id": {"A": 0},
         "_rope_scaling": {"type": "x"}, "max_window_layers": 28, "forced_eos_token_id": 2, "max_new_tokens": 100}


def test_idle_keys_are_ignored_in_one_named_line(caplog, tmp_path):
    """Keys that change nothing are ignored, and named in one line."""
    expected = spec_of(tmp_path, HUB_CONFIGS["Llama-3.2-1B"])
    caplog.clear()
    with caplog.at_level("INFO", logger="chat_server"):
        assert spec_of(tmp_path, HUB_CONFIGS["Llama-3.2-1B"] | INERT) == expected
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'config.json'}: logit_scale, embedding_multiplier, ")
    assert line.endswith("ignored, since they have no effect here")
    assert all(key in line for key in INERT if INERT[key] is not None)
    caplog.clear()
    with caplog.at_level("INFO", logger="chat_server"):
        for config in HUB_CONFIGS.values():
            if "text_config" not in config:
                spec_of(tmp_path, config)
    assert [line for line in caplog.messages if "change nothing" in line] == []


VALUES = {"attn_implementation": "sdpa", "attn_impl": "flash", "experts_implementation": "grouped_mm", "license": "mit", "language": ["en"],
          "loss_type": "ForCausalLMLoss", "padding_side": "left", "pad_token": "<pad>", "name_or_path": "a/b", "tokenizer_name": "a/b",
          "base_model_name_or_path": "a/b", "keys_to_ignore_at_inference": ["past_key_values"], "pruned_heads": {"0": []},
          "exponential_decay_length_penalty": [4, 1.5]} | dict.fromkeys((
              "max_seq_len", "max_sequence_length", "model_max_length", "n_ctx", "seq_length", "num_logits_to_keep", "num_labels", "ignore_index",
              "cls_token_id", "mask_token_id", "unk_token_id"), 4) | dict.fromkeys((
                  key for key in OTHERS_AFFAIR if re.search("dropout|coef|smoothing|layerdrop|init_std|initializer_factor", key)), 0.1)


def test_keys_of_training_change_no_llama(tmp_path):
    """Keys of others' code and of training change neither a llama here nor one by transformers."""
    import transformers
    keys = {key: VALUES.get(key, True) for key in OTHERS_AFFAIR}
    expected, text = spec_of(tmp_path, HUB_CONFIGS["Llama-3.2-1B"]), torch.arange(20)[None]
    assert spec_of(tmp_path, HUB_CONFIGS["Llama-3.2-1B"] | keys) == expected
    for key in ("no_such_key", "attn_factor", "use_fused_bias"):
        with pytest.raises(ConfigError, match=f"{key} is true; this key is not supported"):
            spec_of(tmp_path, HUB_CONFIGS["Llama-3.2-1B"] | keys | {key: True})
    model = make_model("llama2")
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys | {"attn_implementation": "eager", "experts_implementation": None}))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, return_dict=True).eval()
        assert torch.equal(theirs(text).logits, model(text).logits)


@pytest.mark.parametrize("more", [
    {"use_sliding_window": False, "sliding_window": 4096}, {"use_sliding_window": False, "max_window_layers": 3, "sliding_window": 4096}])
def test_a_window_that_is_switched_off_changes_nothing(more, tmp_path):
    assert spec_of(tmp_path, HUB_CONFIGS["Llama-3.2-1B"] | more) == spec_of(tmp_path, HUB_CONFIGS["Llama-3.2-1B"])


@pytest.mark.parametrize("name", ["falcon_h9", "lfm3", "x\ny"])
def test_an_unknown_family_names_the_supported_ones(name, tmp_path):
    words = f"this server cannot run {' '.join(name.split())} yet; it runs: Llama 2 and 3, SmolLM2, Mistral"
    with pytest.raises(ConfigError, match=words):
        spec_of(tmp_path, {"model_type": name})
    with pytest.raises(ConfigError, match=words):
        spec_of_changed_gguf(tmp_path, "llama2", {"general.architecture": name})


@pytest.mark.parametrize("published, billions", [(GRANITE_H_TINY, 6.9), (QWEN3_NEXT, 79.7), (QWEN35_4B, 4.2), (QWEN36_35B, 34.7)])
def test_published_hybrids_have_transformers_weights(published, billions, tmp_path):
    """Published hybrids have as many weights as transformers, and as their cards say."""
    import transformers
    spec, config = spec_of(tmp_path, published), transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(math.prod(shape) for key, shape in spec.shapes().items() if not (spec.tied and key == "head"))
    assert sum(p.numel() for p in made.parameters()) == count and round(count / 1e9, 1) == billions
    assert [mixer is None for mixer in spec.mixers] == [kind == "full_attention" for kind in config.layer_types]


def test_qwen_3_5_s_states_take_these_mebibytes(tmp_path):
    """Published sizes of Qwen3.5 make states of this many mebibytes."""
    assert [spec_of(tmp_path, config).state_bytes / 2**20 for config in (QWEN35_4B, QWEN36_35B)] == [50.25, 62.8125]


def test_granite_4_h_tiny_s_config_is_read(tmp_path):
    spec = spec_of(tmp_path, GRANITE_H_TINY)
    experts = spec.experts
    assert (experts.count, experts.router.chosen, experts.width, experts.shared.width, spec.paged_layers) == (64, 6, 512, 1024, 4)
    assert spec.by_layer[5].rope.size == 0 and spec.state_bytes == 36 * 4 * (48 * 64 * 128 + 3 * (3072 + 2 * 128))
    assert spec_of(tmp_path, GRANITE_H_TINY | {"mamba_d_head": "auto", "time_step_limit": [0.0, math.inf]}) == spec


# --- what decode_core does not compile ---------------------------------------------------------------------------


PLAIN, NORM = attention(4, 4, 16), RmsNorm(1e-5)
SPEC = dict(vocab_size=64, layers=1, width=64, heads=4, kv_heads=4, head_size=16, ffn_size=64, max_positions=64)


@pytest.mark.skipif(decode_core() is None, reason="not built")
@pytest.mark.parametrize("fields, words", [
    ({"mixers": (DeltaRule(4, 2, 4, 16, 8),)}, "for delta rule with head sizes that are not multiples of 16"),
    ({"mixers": (Mamba2(4, 3, 8, 16),)}, "for Mamba layer whose heads or channels are not multiples of 16"),
    ({"mixers": (Mamba2(4, 3, 16, 4),)}, "for Mamba layer whose heads or channels"),
    ({"own_layers": (Layer(PLAIN, Experts(4, 64, Router(2), latent=40)),)}, "for experts that read a width not a multiple of 16")])
def test_torch_computes_ops_that_decode_core_lacks(fields, words, caplog):
    """torch computes what decode_core has no op for, and the log says so."""
    assert choose_backend("cpu", model_of(ModelSpec(**SPEC))).name != "torch/reference" and not not_compiled(model_of(ModelSpec(**SPEC)))
    assert {name.partition("/")[0] for name in load_kernels("cpu", model_of(ModelSpec(**SPEC))).names.values()} == {"decode_core"}
    assert choose_backend("cpu", model_of(ModelSpec(**SPEC | fields))).name == "torch/reference" and not caplog.messages       # who chooses for good says it
    assert load_kernels("cpu", model_of(ModelSpec(**SPEC | fields))).backend.name == "torch/reference"
    assert [line for line in caplog.messages if words in line and "torch computes instead" in line]


@pytest.mark.parametrize("fields, words", [
    ({"experts": 4, "sigmoid_router": True}, "router of sigmoids"), ({"mixers": (ShortConv(3),)}, "short convolution"),
    ({"mixers": (DeltaRule(4, 2, 4, 16, 32),)}, "delta rule"), ({"mixers": (Mamba2(4, 3, 16, 8),)}, "Mamba layer"),
    ({"layers": 2, "mixers": (ShortConv(3), None), "experts": 4, "sigmoid_router": True}, "short convolution and router of sigmoids"),
    ({"layers": 2, "own_layers": (Layer(None, FeedForward(64, "relu2")), Layer(PLAIN, FeedForward(64, "relu2")))}, ""),
    ({"own_layers": (Layer(PLAIN, Experts(4, 64, Router(2, "sigmoid", groups=(2, 1)), "relu2", latent=32)),)}, "router of sigmoids"),
    ({"output_gate": True}, ""), ({"experts": 4, "shared_size": 64, "shared_gate": True}, "")])
@pytest.mark.skipif(decode_core() is None, reason="not built")
def test_torch_computes_cpu_only_ops_on_a_gpu(fields, words, caplog, monkeypatch):
    """Some ops are compiled for a CPU alone, and torch computes these on a GPU."""
    from chatlm.worker.kernels import devices
    monkeypatch.setattr(devices, "cuda_ops", lambda _: SimpleNamespace())       # as where there is a GPU
    spec = model_of(ModelSpec(**SPEC | fields))
    assert (not_compiled(spec, "cuda"), not_compiled(spec)) == ("", "")
    assert choose_backend("cpu", spec).name != "torch/reference" and not caplog.messages
    assert choose_backend("cuda", spec, says_why=True).name == "decode_core/cuda"
    assert caplog.messages == [f"decode_core/cuda has no kernels for {words}: torch computes only these"] * bool(words)


@pytest.mark.parametrize("fields, words", [
    ({"qk_norm_sizes": (64, 64)}, "norm of all heads together"), ({"q_growth": (0.1, 16)}, "scale of queries by their position"),
    *(({"activation": name}, f"{name} feed-forward") for name in ("gelu", "reglu2", "quick_geglu", "gelu_erf", "gelu_tanh", "gelu_quick")),
    ({"own_layers": (Layer(PLAIN, FeedForward(64), after=(LayerInput(32, 0, 1, NORM),)),)}, "embedding of each layer"),
    ({"own_layers": (Layer(PLAIN, ExpertsBesideDense(4, 64, Router(2), FeedForward(64, prefix="shared_"), NORM)),)}, "scale of experts")])
def test_some_models_are_compiled_for_a_cpu_alone(fields, words):
    assert (not_compiled(model_of(ModelSpec(**SPEC | fields)), "cuda"), not_compiled(model_of(ModelSpec(**SPEC | fields)))) == (f"{words} on a GPU", "")


def test_the_ops_of_these_models_do_what_they_say():
    x, added, gate, out = torch.ones(2, 3), torch.full((2, 3), 4.0), torch.tensor([[0.0], [-50.0]]), torch.empty(2, 3)
    gated_add_reference(x, added, gate, out)
    assert out.tolist() == [[3.0] * 3, [1.0] * 3]
    torch.manual_seed(0)
    qkv, q_norm, k_norm, means = torch.randn(3, 12), torch.randn(6), torch.randn(4), torch.empty(3, 2)
    q, k, v = qkv.clone().split((6, 4, 2), 1)
    mean_squares_reference(qkv, q_norm, k_norm, (6, 4), means)
    norm_qk_reference(qkv, q_norm, k_norm, means, 1e-3, qkv)
    expected = [torch.nn.functional.rms_norm(part, part.shape[1:], weight, 1e-3) for part, weight in ((q, q_norm), (k, k_norm))]
    assert torch.allclose(qkv, torch.cat([*expected, v], 1), atol=1e-6)
    scales, q = query_scales((0.5, 4), 8), torch.full((2, 2), 2.0)
    scale_rows_reference(q, torch.from_numpy(scales), torch.tensor([3, 4]), out=q)
    assert torch.allclose(q, torch.tensor([[2.0] * 2, [2 * (1 + 0.5 * np.log(2))] * 2]).float())


# --- rotary embeddings -------------------------------------------------------------------------------------------


def test_partial_rotary_pairs_are_put_in_order():
    """Rotary pairs of a part of each head are put in order."""
    rows = torch.arange(12)[:, None] * torch.ones(12, 2)
    assert unpermute_rope(rows.numpy(), RopePairs(6, 4))[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert unpermute_rope(rows[:, 0].numpy(), RopePairs(12, 12)).tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert unpermute_rope(rows, None) is rows


@pytest.mark.parametrize("context", [None, 4096, 131072, 262144, 10**6])
def test_dynamic_scaling_is_that_of_the_context(context, tmp_path):
    """Dynamic scaling is that of transformers at the length of the context."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = HUB_CONFIGS["Llama-3.2-1B"] | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    spec = spec_of(tmp_path, config, context)
    length = min(max(context or 0, 131072), 4 * 131072)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](transformers.AutoConfig.from_pretrained(tmp_path), seq_len=length)
    np.testing.assert_allclose(spec.by_layer[0].rope.frequencies, expected, rtol=2e-6)
    assert spec.max_positions == length


@pytest.mark.parametrize("backend", ["reference", "decode_core"])
def test_a_partly_rotated_llama_matches_phi3(backend, tmp_path):
    """transformers' llama rotates all of a head; phi3 is a llama with fused matrices, and rotates as much as configured."""
    model = make_model("phi3", sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    cases = clear_cases(model, lengths=(9, 40))
    save(model, tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        parts = {"self_attn.qkv_proj": (("q", "k", "v"), (64, 32, 32)), "mlp.gate_up_proj": (("gate", "up"), (96, 96))}
        fused = next((part for part in parts if part in name), None)
        if fused:
            names, sizes = parts[fused]
            tensors |= {name.replace(fused, f"{fused.split('.')[0]}.{own}_proj"): part.clone() for own, part in zip(names, tensor.split(sizes))}
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    keys = {"sliding_window", "original_max_position_embeddings", "rope_parameters", "embd_pdrop", "resid_pdrop"}
    config = {key: value for key, value in json.loads((tmp_path / "config.json").read_text()).items() if key not in keys}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama", "partial_rotary_factor": 0.5, "rope_theta": 1e4}))
    ours = load(tmp_path)
    assert ours.architecture.attentions[0].rope.size == 8
    check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases), cases)


def growth_of(model):
    return model.architecture.attentions[0].scores.growth


@pytest.mark.slow
def test_ministral_s_queries_grow_in_long_contexts(tmp_path):
    """Ministral's queries grow where the context is longer than the original."""
    model = make_model("ministral3", rope_parameters=GROWING)
    folder, cases = save(model, tmp_path), clear_cases(model)           # of up to 364 tokens: three times the original
    short = load(folder)
    assert (growth_of(short), short.context_length) == ((), 128) == (growth_of(load(folder, context_length=128)), 128)
    long = load(folder, context_length=512)
    assert growth_of(long) == (0.4, 128) and not not_compiled(long.architecture)
    check(answers(transformer(long, load_kernels("cpu", long.architecture, max_tokens=128, max_rows=8)), cases), cases)
    check(answers(transformer(short, kernels_of("reference", short.architecture)), cases[:1], count=20), cases[:1], count=20)
    packed = load(as_gguf(tmp_path / "tiny.gguf", model), context_length=512)
    assert growth_of(packed) == pytest.approx((0.4, 128)) and packed.architecture.attentions[0].rope.scale == long.architecture.attentions[0].rope.scale == 1.0
    assert load(tmp_path / "tiny.gguf").context_length == 128


# --- text models of image models ---------------------------------------------------------------------------------


IMAGES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, num_channels=3)
QWEN_IMAGES = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=4)
TEXT = {key: value for key, value in TINY.items() if not key.endswith("token_id")}
BOTH = {        # model_type -> (text_config, the rest)
    "llava": (TEXT | {"model_type": "llama"}, {"vision_config": IMAGES | {"model_type": "clip_vision_model"}, "image_token_index": 280}),
    "mistral3": (TEXT | {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
                 {"vision_config": IMAGES | {"model_type": "pixtral", "head_dim": 16}, "image_token_index": 280, "tie_word_embeddings": False}),
    "smolvlm": (TEXT | {"model_type": "llama"},
                {"vision_config": IMAGES | {"model_type": "smolvlm_vision"}, "image_token_id": 280, "scale_factor": 2}),
    "qwen2_5_vl": (TEXT | {"bos_token_id": 256, "eos_token_id": 257,
                           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
                   {"vision_config": QWEN_IMAGES, "image_token_id": 280}),
    "qwen3_vl": (TEXT | {"head_dim": 32,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
                 {"vision_config": QWEN_IMAGES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}, "image_token_id": 280})}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_an_image_model_s_text_model_is_served(name, tmp_path):
    import transformers
    text, rest = BOTH[name]
    config = transformers.AutoConfig.for_model(name, text_config=text, **rest)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(0, 0.45 if "embed_tokens" in key or "lm_head" in key else 0.12) if weight.ndim > 1 else weight.add_(
                torch.randn_like(weight), alpha=0.3)
    cases = clear_cases(model)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    ours = load(tmp_path)
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases), cases)


# --- tokens that are never drawn ---------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [False, True])
def test_suppressed_tokens_are_never_drawn(tmp_path, drafts):
    """As transformers' generate has it, which suppresses those that it would have drawn, again and again."""
    model, prompt, suppressed = make_model("llama3.2"), [5, 6, 7, 5, 6, 7, 5, 6], []
    works = [assignment("a", tuple(prompt), SamplingParams(temperature=0.0), 24, ignore_eos=True)]
    for n in range(4):
        folder = save(model, tmp_path / str(n))
        settings = folder / "generation_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"suppress_tokens": [*suppressed, -1, 10**6]}))
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=int), do_sample=False, max_new_tokens=24,
                                suppress_tokens=[*suppressed] or None, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
        engine = make_engine(folder)
        engine.drafts = drafts
        assert run(engine, works).tokens["a"] == theirs and not {*theirs} & {*suppressed}
        suppressed += [theirs[0], theirs[9]]
    file = as_gguf(tmp_path / "tiny.gguf", model, metadata=small_gguf_metadata("gpt-2") | {"tokenizer.ggml.suppress_tokens": suppressed})
    assert gguf_text(file, read_gguf(file)[0]).suppressed == {*suppressed}


@pytest.mark.parametrize("stated, words", [(5, "suppress_tokens is 5; it must be a list of integers"), ([1, "2"], 'suppress_tokens[1] is "2"; it must be an integer'),
                                           ([*range(300)], "suppress_tokens has all 288 tokens; at least one must be left"), (None, ""), ([], ""), ([-1, 288], "")])
def test_a_wrong_list_of_suppressed_tokens_is_named(stated, words, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": stated}))
    if not words:
        assert hf_text(tmp_path, 288).suppressed == frozenset()
        return
    with pytest.raises(ConfigError) as caught:
        hf_text(tmp_path, 288)
    assert words in str(caught.value) and "generation_config.json" in str(caught.value)
