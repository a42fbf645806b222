"""Each family as transformers saves it, against transformers: tiny random models, float32, beyond their windows."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common import memory
from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.kinds import Norm
from chatlm.worker.build import build_engine
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.memory_plan import plan_memory, weight_bytes
from chatlm.worker.model import tensors as model_tensors
from chatlm.worker.model.blocks.experts import Router
from chatlm.worker.model.pages import KvType, PageLayout, group_layers
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ops.basic import experts_reference, sigmoid_routes
from chatlm.worker.ranks.alone import RankAlone
from chatlm.worker.weights.formats.folder.description import hf_blocks, hf_text
from chatlm.worker.weights.formats.gguf.description import gguf_blocks, gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
from chatlm.worker.weights.load import open_model
from engines import forward_logits, make_batch, tensors_of
from families import (CHAT, GGUF_MODELS, LONG, MODELS, TOLERANCE, answers, as_gguf, check, clear_cases, greedy, kernels_of, load, make_model, save, save_packed, spec_of_changed_gguf, tolerance_of, transformer,
                      with_exact_angles, write_tokenizer)
from hub_configs import HUB_CONFIGS, LFM2_CONFIGS, LFM2_MOE, LFM2_MOE_TUNED
from lora import SMOLLM2, random_adapter
from nightly import by_day
from other_names import as_ling, as_minicpm, granite_like_minicpm
from patching import patch
from real_server import ask, events, get, post, server
from tiny_gguf import small_gguf_metadata, write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """name -> (folder, cases), each made once."""
    known = {}

    def make(name, **changes):
        key = name, repr(changes)
        if key not in known:
            model = make_model(name, **changes)
            folder = save(model, tmp_path_factory.mktemp(name), **({"max_shard_size": "60KB"} if name == "qwen3" else {}))
            if name == "phi3-long":         # transformers changes the factors in the middle of an answer; we do not
                model = make_model(name, rope_parameters=LONG | {"short_factor": LONG["long_factor"]})
            if MODELS[name][0].startswith("gemma4"):
                model = with_exact_angles(model)
            known[key] = folder, clear_cases(model)
        return known[key]
    return make


NEEDS_CORE = pytest.mark.skipif(decode_core() is None, reason="not built")
BACKENDS = ["reference", pytest.param("decode_core", marks=NEEDS_CORE)]


OLDER = [name for name in [*MODELS][:[*MODELS].index("granite")] if not name.startswith("gemma4")]    # these have tests of their own by day
BY_DAY = "granite4", "olmo3", "glm4", "lfm2", "lfm2moe", "granite4h", "hunyuan", "olmoe", "gpt2", "pythia", "cohere2", "nemotron-h", "nemotron3-latent"      # which bring what no other had


# By day decode_core's, and torch's where a family has arithmetic of its own: the rest of it reads what these read
BY_TORCH = ("llama3.1", "gemma2", "gemma3", "qwen3moe", "gpt-oss", "nanochat", "phi3-long", *(name for name in BY_DAY if name not in ("granite4", "olmo3", "glm4", "hunyuan")))
FAMILY_AND_BACKEND = [pytest.param(name, backend, marks=[*([NEEDS_CORE] if backend == "decode_core" else []),
                                                         *([] if name in ((*OLDER, *BY_DAY) if backend == "decode_core" else BY_TORCH) else [pytest.mark.slow])])
                      for name in MODELS for backend in ("reference", "decode_core")]


@pytest.mark.parametrize("name, backend", FAMILY_AND_BACKEND)
def test_every_family_matches_transformers(made, name, backend):
    """A folder computes what transformers computes."""
    folder, cases = made(name)
    model = load(folder)
    check(answers(transformer(model, kernels_of(backend, model.architecture)), cases), cases, tolerance=tolerance_of(name))


def factors_of(model):
    return model.architecture.attentions[0].rope.factors


@pytest.mark.parametrize("backend", BACKENDS)
def test_longrope_takes_short_factors_if_short(made, backend, tmp_path):
    """LongRoPE takes its short factors where the context is no longer than the original."""
    model = make_model("phi3-long")
    cases = clear_cases(model, lengths=(9, 40))         # and at most 64 tokens more: transformers stays with the short ones
    short = load(save(model, tmp_path), context_length=128)
    check(answers(transformer(short, kernels_of(backend, short.architecture)), cases), cases)
    long = load(tmp_path, context_length=129)
    assert factors_of(short) != factors_of(long) == factors_of(load(tmp_path))
    page = PageLayout.of(group_layers(short.architecture.by_layer, 0, apart=False), short.architecture.by_layer, KvType("float32")).page_bytes
    for pages, expected in ((8, short), (9, long)):       # where the KV cache makes the context short
        settings = Settings(model=str(tmp_path), dtype="float32", kv_cache_memory=pages * page, max_batch=2)
        made, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
        assert engine.context_length == pages * PAGE_SIZE and factors_of(made) == factors_of(expected)


@pytest.mark.parametrize("name", by_day(["qwen3", "smollm3", "gemma2", "gemma3", "phi3-long", "gpt-oss", "qwen3moe-normed", "granite4", "qwen3moe-dense", "exaone4"], "qwen3"))
def test_cuda_kernels_match_transformers(made, name, request):
    backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="the compiled core is not installed")
    emulated = backends.Emulated(request.getfixturevalue("emulation_library"))
    folder, cases = made(name)
    model = load(folder)
    kernels = emulated.kernels(model.architecture)
    assert kernels.backend.faults == {}         # no reference computes in a kernel's place
    steps = transformer(model, kernels, device=emulated.device)
    check(answers(steps, cases[1:2], chunk=30, count=12), cases[1:2], count=12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ling_2_is_glm_4_5_by_other_names(backend, tmp_path):
    """A folder of Ling 2 computes what transformers computes of the same GLM-4.5, with groups of experts."""
    model = make_model("glm4moe", n_routed_experts=12, n_group=4, topk_group=2)
    as_ling(save(model, tmp_path))
    ling, cases = load(tmp_path), clear_cases(model)
    check(answers(transformer(ling, kernels_of(backend, ling.architecture)), cases), cases)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minicpm_is_granite_with_other_factors(backend, tmp_path):
    """A folder and a GGUF file of a MiniCPM compute what transformers computes of the same Granite."""
    model = granite_like_minicpm()
    folder, cases = as_minicpm(save(model, tmp_path)), clear_cases(model)
    metadata, stored = read_gguf(as_gguf(tmp_path / "granite.gguf", model))
    own = {key.replace("granite.", "minicpm."): value for key, value in metadata.items() if key.startswith("granite.") and "attention.scale" not in key}
    path = write_gguf(tmp_path / "minicpm.gguf", {name: tensor.data for name, tensor in stored.items()}, own, small_gguf_metadata("gpt-2") | {"general.architecture": "minicpm"})
    for ours in (load(folder), load(path)):
        check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases), cases)


def test_a_minicpm_file_without_factors_has_those_of_2b(tmp_path):
    metadata, stored = read_gguf(as_gguf(tmp_path / "granite.gguf", granite_like_minicpm()))
    own = {key.replace("granite.", "minicpm."): value for key, value in metadata.items() if "scale" not in key} | {"general.architecture": "minicpm"}
    _, spec = gguf_blocks(tmp_path / "granite.gguf", own, stored, None)
    assert (spec.input.scale, spec.residual_scale, spec.head.scale) == (12, pytest.approx(1.4 / 2), 4.0)


def test_a_laguna_file_without_a_pattern_has_its_windows(tmp_path):
    """As llama.cpp's converter writes it: every fourth layer has none, from the first on."""
    _, spec = spec_of_changed_gguf(tmp_path, "laguna", {"laguna.attention.sliding_window_pattern": None})
    assert [layer.mixer.window for layer in spec.layers] == [0, 24, 24, 24, 0]


@pytest.mark.parametrize("change, words", [
    ({"dim_model_base": None}, "dim_model_base is missing"), ({"sparse_config": {"kernel_size": 32}}, "sparse_config is .*not supported in a minicpm model"),
    ({"num_experts": 8}, "num_experts is 8")])
def test_what_a_minicpm_cannot_be_is_named(change, words, tmp_path):
    folder = as_minicpm(save(granite_like_minicpm(), tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=words):
        load(folder)


def test_draft_heads_of_ernie_are_not_read(tmp_path):
    folder = save(make_model("ernie-moe"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    drafts = {"model.mtp_block.0.input_layernorm.weight": torch.ones(64), "model.mtp_linear_proj.0.weight": torch.ones(64, 128)}
    save_file(tensors | drafts, folder / "model.safetensors")
    assert len(load(folder).architecture.layers) == 4


def test_draft_heads_of_mixtures_are_not_read(tmp_path):
    """A layer behind the others that only drafts is ignored; one that does not draft is an unknown tensor."""
    folder = save(make_model("glm4moe"), tmp_path)
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers.3."
    draft = {name.replace("model.layers.2.", layer): tensor.clone() for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    save_file(tensors | draft | {f"{layer}eh_proj.weight": torch.ones(64, 128), f"{layer}enorm.weight": torch.ones(64)}, folder / "model.safetensors")
    assert len(load(folder).architecture.layers) == 3
    save_file(tensors | draft, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.layers\.3\."):
        load(folder)


@pytest.mark.parametrize("name, change, words", [
    ("glm4moe-grouped", {"topk_group": 1}, "topk_group is 1; it must be an integer from 2 to 4"),
    ("hunyuan-moe", {"moe_topk": [3, 3, 2]}, r"moe_topk is .*; it must be the same in all layers"),
    ("minimax-m2", {"scoring_func": "softmax"}, "scoring_func is .*softmax.*; it must be one of sigmoid"),
    ("cohere2moe", {"num_shared_experts": 1}, "num_shared_experts is 1; it must be 0"),
    ("cohere2moe", {"prefix_dense_intermediate_size": -1}, "prefix_dense_intermediate_size is -1"), ("cohere2moe-rms", {"rms_norm_eps": "x"}, "rms_norm_eps is"),
    ("ernie-moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing; it must be an integer"), ("ernie-moe", {"moe_norm_min": 0.1}, "moe_norm_min is 0.1"), ("ernie-moe", {"moe_gate": "top2"}, "moe_gate is .*; it must be one of topk"),
    ("laguna", {"gating": False}, "gating is false"), ("laguna", {"gating_types": ["per-element"] * 5}, "gating_types has .*must say the same"),
    ("laguna", {"moe_router_logit_softcapping": 5.0}, "moe_router_logit_softcapping is 5.0; it must be 0"),
    ("laguna", {"num_attention_heads_per_layer": [4, 8, 5, 8, 4]}, r"num_attention_heads_per_layer\[2\] is 5; it must be a multiple of 2"),
    ("laguna", {"moe_apply_router_weight_on_input": True}, "must be false"), ("olmo", {"clip_qkv": -1.0}, "clip_qkv is -1.0"),
    ("olmo", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"), ("cohere2", {"use_qk_norm": True}, "use_qk_norm is true; this key is not supported"),
    ("cohere2moe", {"mlp_layer_types": ["dense", "other"] + ["sparse"] * 4}, "mlp_layer_types")])
def test_what_mixtures_cannot_be_is_named(name, change, words, tmp_path):
    folder = save(make_model(name), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=words):
        load(folder)


def packed_experts(folder):
    return folder, clear_cases(save_packed(folder))


def test_a_folder_of_mxfp4_matches_transformers(tmp_path):
    """A folder of MXFP4 blocks computes what transformers makes of them."""
    folder, cases = packed_experts(tmp_path)
    model = load(folder)
    # these logits have a standard deviation of 4: with AVX-512 one of 49,152 is 1.2e-4 away
    check(answers(transformer(model, kernels_of("reference", model.architecture)), cases), cases, tolerance=4 * TOLERANCE)


@pytest.mark.skipif(decode_core() is None, reason="weights stay as stored only where decode_core runs")
def test_mxfp4_blocks_of_a_folder_stay_packed(tmp_path):
    folder, cases = packed_experts(tmp_path)
    model = load(folder, None)
    assert model.dtype == "bfloat16" and {model.tensors[f"{l}.expert_{part}"].read().kind for l in range(4) for part in ("gate_up", "down")} == {"mxfp4"}
    kernels, prompt = kernels_of("decode_core", model.architecture), cases[1].prompt
    packed = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=4, max_tokens=128, max_rows=8, dtype=model.dtype)
    assert packed.weights["3.expert_down"].nbytes < 7 * 64 * 128 * 0.54         # columns are filled up to 4 blocks
    logits = forward_logits(packed, make_batch((prompt, 0, len(prompt), list(range(4)))))[0]
    assert (logits - cases[1].logits[0]).norm() < 0.06 * cases[1].logits[0].norm()


@pytest.mark.parametrize("change, words", [
    (lambda t, at: t.update({at + "down_proj_scales": t[at + "down_proj_scales"][:, 1:]}), r"unknown .*down_proj_scales \(7, 63, 3\)"),
    (lambda t, at: t.pop(at + "down_proj_scales"), r"missing model.layers.1.mlp.experts.down_proj.weight \(7, 64, 96\)"),
    (lambda t, at: t.update({at + "gate_up_proj_bias": t[at + "gate_up_proj_bias"][:6]}), r"gate_proj.bias is \(6, 96\) instead of \(7, 96\)"),
    (lambda t, at: t.update({at + "down_proj_blocks": t[at + "down_proj_blocks"][..., :8]}), r"unknown .*down_proj_blocks \(7, 64, 3, 8\)")])
def test_mxfp4_tensors_that_do_not_fit_are_named(change, words, tmp_path):
    folder, _ = packed_experts(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=words):
        load(folder)


def test_equal_router_logits_choose_lower_ids(made):
    """Equal router logits choose the experts with lower ids."""
    x, logits, out = torch.ones(1, 4), torch.tensor([[1.0, 2.0, 2.0, 2.0]]), torch.empty(1, 4)
    down = torch.arange(4.0).repeat_interleave(4)[:, None] * torch.ones(16, 2)      # expert e adds e times the same
    experts_reference(x, logits, torch.ones(16, 4), down, out, norm=Norm(None, 0.0), biases=(None, None),
                      activation="swiglu", chosen=2, sum_to_one=True)
    gate = 4 * 4 * torch.sigmoid(torch.tensor(4.0))
    assert torch.allclose(out, 1 + 1.5 * 2 * gate)          # the mean of experts 1 and 2


def test_bfloat16_rounds_gemma_s_embedding_scale(made):
    """bfloat16 follows float32, and rounds the scale of Gemma's embedding."""
    folder, cases = made("gemma2")
    model = load(folder, "bfloat16")
    assert model.dtype == "bfloat16" and tensors_of(model)["0.qkv"].dtype == torch.bfloat16
    fast = Transformer(model.architecture, dict(model.tensors), load_kernels("cpu"), num_pages=80, max_tokens=128, dtype="bfloat16")
    assert fast.outer_step.embedding_scale == 8.0          # sqrt(64)
    prompt = cases[1].prompt
    logits = forward_logits(fast, make_batch((prompt, 0, len(prompt), list(range(3)))))[0]
    assert (logits - cases[1].logits[0]).norm() < 0.05 * cases[1].logits[0].norm()


# --- GGUF --------------------------------------------------------------------------------------------------------


# The tensors are compared with the folder's, so by day one backend computes
AS_GGUF = [pytest.param(name, backend, marks=[*([NEEDS_CORE] if backend == "decode_core" else []), *([] if backend == "decode_core" and name in (
    "llama3.1", "gemma3", "gpt-oss", "granite4", "lfm2", "lfm2moe", "gpt2", "pythia", "cohere2", "phimoe", "nemotron3-latent") else [pytest.mark.slow])])
    for name in GGUF_MODELS for backend in ("reference", "decode_core")]


@pytest.mark.parametrize("name, backend", AS_GGUF)
def test_the_same_model_as_gguf_computes_the_same(made, name, backend, tmp_path):
    changes = GGUF_MODELS[name]
    model, (folder, cases) = make_model(name, **changes), made(name, **changes)
    ours = load(as_gguf(tmp_path / "tiny.gguf", model))
    theirs = tensors_of(ours)
    for key, tensor in tensors_of(load(folder)).items():
        moved = ("mix_in", "taps", "decay", "dt_bias", "mix_out") if name.startswith(("qwen3.5", "qwen3next")) else ()      # value heads have another order
        assert torch.equal(tensor, theirs[key]) or key.rpartition(".")[2] in moved, key
    check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases), cases, tolerance=tolerance_of(name))


@pytest.mark.skipif(decode_core() is None, reason="weights stay as stored only where decode_core runs")
def test_parts_that_begin_within_a_tile_stay_packed(tmp_path):
    """Of four value heads the rows of b and a are four each; in one file these are of another type than b."""
    stored = as_gguf(tmp_path / "packed.gguf", make_model("qwen3.5"), quantized=True)
    metadata, tensors = read_gguf(stored)
    floats = {key: (tensor.data, tensor.tensor_type) if tensor.tensor_type.name == "Q8_0" else tensor.data for key, tensor in tensors.items()}
    floats |= {key: gguf.dequantize(tensor.data, tensor.tensor_type) for key, tensor in tensors.items() if "ssm_alpha" in key}
    numbers = {key: value for key, value in metadata.items() if key.startswith(metadata["general.architecture"] + ".")}
    mixed = write_gguf(tmp_path / "mixed.gguf", floats, numbers, small_gguf_metadata("gpt-2") | {"general.architecture": metadata["general.architecture"]})
    prompt = list(range(3, 43))
    for path in (stored, mixed):
        exact, packed = load(path), load(path, None)
        assert packed.tensors["0.mix_in"].read().kind == "q8_0"
        logits = []
        for model, backend, dtype in ((exact, "reference", "float32"), (packed, "decode_core", None)):
            kernels = kernels_of(backend, model.architecture)
            steps = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=4, num_slots=4, max_tokens=128, max_rows=8, dtype=dtype)
            logits.append(forward_logits(steps, make_batch((prompt, 0, 40, [0, 1, 2]))))
        assert (logits[1] - logits[0]).norm() < 0.1 * logits[0].norm()       # x is int8 there; a lost row makes 0.5 of it


def test_the_draft_head_of_a_gguf_is_left_out(tmp_path):
    metadata, stored = read_gguf(as_gguf(tmp_path / "plain.gguf", make_model("qwen3.5")))
    tensors = {name: tensor.data for name, tensor in stored.items()}
    tensors |= {name.replace("blk.3.", "blk.4."): tensor.data for name, tensor in stored.items() if name.startswith("blk.3.")}
    more = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1, "qwen35.attention.recurrent_layers": [True, True, True, False, False]}
    own = {key: value for key, value in metadata.items() if key.startswith("qwen35.")} | more
    path = write_gguf(tmp_path / "drafts.gguf", tensors, own, small_gguf_metadata("gpt-2") | {"general.architecture": "qwen35"})
    plain, ours = tensors_of(load(tmp_path / "plain.gguf")), load(path)
    assert ours.architecture == load(tmp_path / "plain.gguf").architecture and len(ours.architecture.layers) == 4
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors_of(ours).items())


def in_file(rows, path):
    """Whether an array or a tensor lies in memory that is mapped from this file, or from one in this folder."""
    begin = torch.as_tensor(rows).data_ptr()
    spans = ((line.split()[0].split("-"), line) for line in open("/proc/self/maps"))
    return any(int(first, 16) <= begin < int(last, 16) and str(path) in line for (first, last), line in spans)


@pytest.mark.skipif(decode_core() is None, reason="the reference reorders its matrices")
@pytest.mark.parametrize("form", ["folder", "blocks"])
def test_matrices_are_packed_from_the_mapped_file(form, tmp_path):
    """Neither q, k and v nor gate and up, nor all experts, are joined first; of what is kept nothing lies in the file."""
    path, matrices = tmp_path / "tiny.gguf", {"0.qkv": 3, "0.gate_up": 2, "0.output": 1}
    if form == "folder":
        path = save(make_model("qwen2").bfloat16(), tmp_path / "folder")
    else:
        as_gguf(path, make_model("gpt-oss"), quantized=True)
        matrices = {"0.qkv": 3, "0.expert_gate_up": 2, "0.expert_down": 1}
    model = load(path, "bfloat16" if form == "folder" else None)
    for name, count in matrices.items():
        read = model.tensors[name].read()
        parts = read if form == "folder" else [rows for _, rows in read.parts]
        assert len(parts) == count and all(in_file(part, path) for part in parts), name
    kernels = load_kernels("cpu", model.architecture, max_tokens=8, max_rows=8)
    weights = Transformer(model.architecture, model.tensors, kernels, num_pages=2, max_tokens=8, max_rows=8, dtype=model.dtype).weights
    assert not [name for name, weight in weights.items() if isinstance(weight, torch.Tensor) and in_file(weight, path)]


@pytest.mark.skipif(decode_core() is None, reason="weights stay as stored only where decode_core runs")
@pytest.mark.parametrize("name", ["smollm3", "gemma3", "phi3", "qwen3moe", "gpt-oss"])
def test_quantized_matrices_compute_their_values(made, name, tmp_path):
    """Matrices that stay quantized compute what their values say."""
    path = as_gguf(tmp_path / "tiny.gguf", make_model(name, **GGUF_MODELS[name]), quantized=True)
    prompt, exact, packed = list(range(3, 43)), load(path), load(path, None)
    experts = packed.architecture.experts and ("mxfp4" if name == "gpt-oss" else "q8_0")
    assert packed.dtype is None and packed.tensors["1.qkv"].read().kind == "q8_0"
    assert packed.tensors["0.expert_gate_up" if experts else "0.gate_up"].read().kind == (experts or "q8_0")
    batch = make_batch((prompt, 0, 40, [0, 1, 2]))
    expected = transformer(exact, kernels_of("reference", exact.architecture)).forward(batch)[0]
    limits = {"max_tokens": 64, "max_rows": 8}
    kernels = load_kernels("cpu", packed.architecture, **limits)
    ours = forward_logits(Transformer(packed.architecture, dict(packed.tensors), kernels, num_pages=4, dtype=None, **limits), batch)[0]
    assert (ours - expected).norm() < 0.06 * expected.norm()        # activations are int8; a wrong row would make it 1


DEEPSEEK = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128, "attn_factor": 0.8782488562869419}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rope", [DEEPSEEK, DEEPSEEK | {"attn_factor": 1.0, "attention_factor": 1.1386294361119891}], ids=["attn", "attention"])
def test_deepseek_s_qwen3_is_one_as_folder_and_gguf(rope, backend, tmp_path, caplog):
    """attn_factor, of which today's converter makes yarn_attn_factor: neither transformers nor llama.cpp uses it."""
    model = make_model("qwen3", rope_parameters=rope)
    cases = clear_cases(model, lengths=(9, 300), count=16)
    with caplog.at_level("INFO", logger="chat_server"):
        both = load(save(model, tmp_path)), load(as_gguf(tmp_path / "tiny.gguf", model))
    assert caplog.text.count("has attn_factor 0.878, which is not used") == (0 if "attention_factor" in rope else 2)
    assert caplog.text.count("which is not used") == (0 if "attention_factor" in rope else 2)
    for ours in both:
        check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases, count=16), cases, count=16)


# --- memory ------------------------------------------------------------------------------------------------------


def built(caplog, path, free, monkeypatch, **settings):
    """What the log says about memory when this model is built with this many bytes free."""
    patch(monkeypatch, memory, "available_memory", lambda: free)
    settings = Settings(model=str(path), **{"kv_cache_memory": 16 << 20, "verbose": True, **settings})
    caplog.clear()
    with caplog.at_level("INFO", logger="chat_server"):
        model, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    return model, engine, next(line for line in caplog.messages if line.startswith("The model"))


def test_a_line_says_first_whether_the_model_fits(default_model_path, caplog, monkeypatch, tmp_path):
    """A line says before loading whether the model fits, and which flag helps."""
    settings = Settings(model=str(default_model_path))
    model = open_model(resolve_model(settings), settings)
    kernels = load_kernels("cpu", model.architecture)
    plan = plan_memory(model, model.architecture, kernels, group_layers(model.architecture.by_layer, 0, apart=False), kernels.kv_type("auto", model.dtype),
                       RankAlone(), settings, torch.device("cpu"), {"max_tokens": 256 + 64, "max_rows": 64})
    _, engine, line = built(caplog, default_model_path, 4 << 30, monkeypatch)
    held = sum({id(weight): weight.nbytes for weight in engine.transformer.weights.values()}.values())
    assert "adapters" not in line
    one = random_adapter(tmp_path / "one", 30, SMOLLM2, rank=16)
    assert " + adapters 0.02 GB + drafts 0.03 GB + activations " in built(caplog, default_model_path, 4 << 30, monkeypatch, adapter=(f"one={one}",))[2]
    if decode_core():
        assert 0.97 < plan.weights / held < 1.03
    assert plan.activations == sum(buffer.nbytes for buffer in engine.transformer.buffers.values())
    assert "The model fits: weights 0.1 GB" in line.replace("0.10", "0.1").replace("0.09", "0.1") and line.endswith("4.29 GB are free on cpu")
    reads = []
    patch(monkeypatch, model_tensors, "read_ahead", lambda *_: reads.append(1) or iter(()))
    with pytest.raises(ConfigError, match=r"the model does not fit: weights .* free on cpu. Try a smaller model"):       # its matrices are packed already
        built(caplog, default_model_path, 50 << 20, monkeypatch)
    quantize = " or --quantize q4_0" if decode_core() else ""
    with pytest.raises(ConfigError, match=f"Try --dtype bfloat16 or --num-workers 1{quantize} or a smaller model"):
        built(caplog, default_model_path, 50 << 20, monkeypatch, dtype="float32", num_workers=2)
    assert not reads
    monkeypatch.undo()
    *_, line = built(caplog, default_model_path, 300 << 20, monkeypatch, kv_cache_memory=1 << 30)
    assert "The model may not fit: " in line and "M or a shorter --context-length helps" in line and "--kv-cache-memory 1" in line
    *_, line = built(caplog, default_model_path, 4 << 30, monkeypatch, prefix_memory=500_000_000)
    parts = [float(number) for number in re.findall(r"([\d.]+) GB", line)]
    assert " + prefixes 0.50 GB = " in line and abs(sum(parts[:5]) - parts[5]) < 0.03
    *_, line = built(caplog, default_model_path, 700 << 20, monkeypatch, prefix_memory=700 << 20)
    assert re.search(r"The model may not fit: .* --prefix-memory [3-5]\d\dM helps$", line)
    pages = [built(caplog, default_model_path, 2 << 30, monkeypatch, kv_cache_memory=None, prefix_memory=size)[1].pool.num_pages for size in (0, 1 << 30)]
    assert 0 < pages[1] < pages[0]


@pytest.mark.skipif(decode_core() is None, reason="only decode_core quantizes")
@pytest.mark.parametrize("kind, kl", [("q8_0", ""), ("q4_k", ""), ("q4_0", ""), ("q3_k", "is 1.05"), ("q2_k", "is 6.2")])
def test_what_quantizing_costs_is_known_beforehand(kind, kl, tmp_path, caplog):
    """What quantized floats will take and lose is known before they are read."""
    settings = Settings(model=str(save(make_model("llama2", hidden_size=256, intermediate_size=512), tmp_path)), quantize=kind)
    source = resolve_model(settings)
    needed = weight_bytes(open_model(source, settings), kind)
    _, engine = build_engine(source, settings, torch.device("cpu"))
    held = sum({id(weight): weight.nbytes for weight in engine.transformer.weights.values()}.values())
    assert 0.85 < needed / held < 1.1
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING" and "--quantize" in record.message]
    assert len(warnings) == bool(kl) and all(f"--quantize {kind}" in warning and kl in warning for warning in warnings)


# --- config.json as published ------------------------------------------------------------------------------------


def spec_of(folder, config, context=None):
    (folder / "config.json").write_text(json.dumps(config))
    return hf_blocks(folder / "config.json", context)[1]


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_published_configs_read_as_in_transformers(name, tmp_path):
    """Published configs mean what transformers takes them to mean."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding
    spec = spec_of(tmp_path, HUB_CONFIGS[name], 4096)
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIGS[name]).replace('"su"', '"longrope"'))   # the only name it knows
    whole = transformers.AutoConfig.from_pretrained(tmp_path)
    config = whole.get_text_config()
    tied = getattr(config, "tie_word_embeddings", whole.tie_word_embeddings)
    attn, experts = spec.attentions[0], spec.experts
    assert (spec.vocab_size, len(spec.layers), spec.width, attn.heads, attn.kv_heads, spec.feed.width, spec.tied) == (
        config.vocab_size, config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        getattr(config, "moe_intermediate_size", config.intermediate_size), tied)
    assert spec.norm.eps * spec.residual_scale**2 == pytest.approx(config.rms_norm_eps)
    assert ((experts.count, experts.router.chosen, experts.router.sum_to_one) if experts else (0, 0, True)) == (
        getattr(config, "num_local_experts", getattr(config, "num_experts", 0)), getattr(config, "num_experts_per_tok", 0), getattr(config, "norm_topk_prob", True))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    activations = {"silu": "clamped_swiglu" if hasattr(config, "swiglu_limit") else "swiglu", "relu2": "relu2"}
    assert attn.head_size == head_size and spec.feed.activation == activations.get(getattr(config, "hidden_act", ""), "geglu")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    assert spec.windows == tuple(window * (kind == "sliding_attention") for kind in kinds)
    unrotated = tuple(l for l, its in enumerate(spec.by_layer) if its.rope.size == 0)
    assert unrotated == tuple(l for l, rotated in enumerate(getattr(config, "no_rope_layers", [])) if not rotated)
    nested = "full_attention" in config.rope_parameters
    for layer in sorted({0, 5, len(spec.layers) - 1} - set(unrotated)):
        rope = config.rope_parameters[kinds[layer]] if nested else config.rope_parameters
        if rope.get("alpha"):
            expected, scale = HunYuanDenseV1RotaryEmbedding.compute_ntk_alpha_rope_parameters(config)
        elif rope["rope_type"] == "default":
            size = int(head_size * (rope.get("partial_rotary_factor") or 1))
            expected, scale = rope["rope_theta"] ** -(np.arange(0, size, 2) / size), 1.0
        else:
            expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=4096, **({"layer_type": kinds[layer]} if nested else {}))
        np.testing.assert_allclose(spec.by_layer[layer].rope.frequencies, expected, rtol=2e-6)
        assert spec.by_layer[layer].rope.scale == pytest.approx(scale)
    longest = {"Qwen2.5 with YaRN, as its card says": 131072, "Ministral-3-3B, with images": 16384}
    assert spec.max_positions == longest.get(name, config.max_position_embeddings)


@pytest.mark.parametrize("name, width, ffn", [("LFM2-350M", 1024, 4608), ("LFM2-700M", 1536, 6912), ("LFM2-1.2B", 2048, 8192),
                                              ("LFM2-2.6B", 2048, 10752)])
def test_lfm2_configs_read_as_in_transformers(name, width, ffn, tmp_path):
    """Published configs of LFM2 mean what transformers takes them to mean."""
    import transformers
    spec, config = spec_of(tmp_path, LFM2_CONFIGS[name]), transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    assert (spec.width, spec.feed.width) == (width, ffn) == (config.hidden_size, made.model.layers[0].feed_forward.w1.out_features)
    assert [mixer is None for mixer in spec.mixers] == [kind == "full_attention" for kind in config.layer_types]
    attn = spec.attentions[0]
    assert (len(spec.layers), spec.vocab_size, attn.heads, attn.kv_heads, attn.head_size, spec.norm.eps, spec.tied, attn.rope.base, spec.max_positions) == (
        config.num_hidden_layers, 65536, width // 64, 8, 64, 1e-5, True, 1e6, 128000)
    assert sum(p.numel() for p in made.parameters()) == sum(int(np.prod(shape)) for key, shape in spec.shapes().items() if key != "head")
    assert spec.state_bytes == 4 * 2 * width * sum(map(bool, spec.mixers))


@pytest.mark.parametrize("published", [LFM2_MOE, LFM2_MOE_TUNED])
def test_lfm2_moe_s_config_reads_as_in_transformers(published, tmp_path):
    """The published config of LFM2-MoE means what transformers takes it to mean."""
    import transformers
    spec, config = spec_of(tmp_path, published), transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    sizes = {key: int(np.prod(shape)) for key, shape in spec.shapes().items() if key != "head"}
    assert sum(p.numel() for p in made.parameters()) == sum(size for key, size in sizes.items() if not key.endswith("correction_bias"))
    assert round(sum(sizes.values()) / 1e9, 1) == 8.3           # as its card says
    assert (spec.experts.count, spec.experts.width, [layer.feed.width for layer in spec.layers[:3]]) == (32, 1792, [7168, 7168, 1792])
    assert spec.tied and spec.by_layer[2].rope.base == 1e6 and spec.experts.router == Router(4, "sigmoid", correction_bias=True, scale=published["routed_scaling_factor"])
    assert spec.paged_layers == 6 and spec.state_bytes == 18 * 4 * 2 * 2048


def test_a_choosing_bias_is_not_in_the_shares():
    """Sigmoids choose with a bias that the shares do not have."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.0]])
    for bias, chosen in ((None, [0, 1]), (torch.tensor([-1.0, 0.0, 0.9, 0.0]), [2, 1])):
        ids, shares = sigmoid_routes(logits, 2, True, bias)
        scores = torch.sigmoid(logits[0])
        assert ids.tolist() == [chosen]
        assert torch.allclose(shares[0], scores[chosen] / scores[chosen].sum())


def test_sigmoids_choose_in_the_best_groups():
    """Sigmoids choose in the groups whose two best have the largest sum."""
    logits = torch.tensor([[3.0, -3.0, 0.5, 0.4, 0.9, -2.0]])      # sigmoids: 0.95 + 0.05, 0.62 + 0.60, 0.71 + 0.12
    for groups, chosen in (((1, 1), [0, 4]), ((3, 1), [2, 3]), ((3, 2), [0, 2]), ((3, 3), [0, 4])):
        ids, shares = sigmoid_routes(logits, 2, False, None, groups, 2.5)
        assert ids.tolist() == [chosen] and torch.allclose(shares, 2.5 * torch.sigmoid(logits[:, chosen]))
        shares = sigmoid_routes(logits, 2, True, None, groups, 2.5)[1]
        assert shares.sum() == pytest.approx(2.5)
    ids, _ = sigmoid_routes(torch.zeros(1, 6), 2, True, torch.zeros(6), (3, 1))     # of equal ones the first
    assert ids.tolist() == [[0, 1]]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}


@pytest.mark.parametrize("rope", [
    YARN, YARN | {"truncate": False}, YARN | {"beta_fast": 16, "beta_slow": 2}, YARN | {"attention_factor": 1.5},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}, YARN | {"attn_factor": 0.8782488562869419, "extrapolation_factor": 1, "finetuned": True},
    {"rope_type": "linear", "factor": 3, "rope_theta": 1e4, "original_max_position_embeddings": 2048, "finetuned": False}, {"rope_type": "linear", "factor": 3, "rope_theta": 1e4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e6,
     "original_max_position_embeddings": 8192}])
def test_every_option_of_a_rope_type_is_transformers(rope, tmp_path):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    base = HUB_CONFIGS["Llama-3.2-1B"] | {"rope_scaling": None, "rope_parameters": rope}
    found = spec_of(tmp_path, base).by_layer[0].rope
    expected, expected_scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](transformers.AutoConfig.from_pretrained(tmp_path))
    np.testing.assert_allclose(found.frequencies, expected, rtol=2e-6)
    assert found.scale == pytest.approx(expected_scale)


# --- what is not known is refused --------------------------------------------------------------------------------


# --- folders -----------------------------------------------------------------------------------------------------


def chats_as_transformers(folder, model, bos):
    """Serve a folder as a user starts it, and compare an answer with transformers' tokenizer, template and model."""
    import transformers
    messages = [{"role": "user", "content": "Hi there, what is 2 + 2? 你好!"}]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=bos,
                                                     chat_template=(folder / "chat_template.jinja").read_text())
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens, _ = greedy(model, [prompt], 20)
    ids = tokens[0].tolist()
    with server(folder, "--dtype", "float32") as (_, url):
        answer = events(post(url + "/chat/completions", ask(messages[0]["content"], max_tokens=20, ignore_eos=True)))
        assert answer[-1]["usage"]["prompt_tokens"] == len(prompt) and answer[-1]["usage"]["completion_tokens"] == 20
        text = open_tokenizer(hf_text(folder, model.config.vocab_size)).decode(ids)
        assert "".join(event.get("token", "") for event in answer) == text
        assert get(url + "/v1/models")["data"][0]["id"] == folder.name


@pytest.mark.parametrize("name", by_day(["qwen3", "gemma3"], "qwen3"))       # in several files, in one
def test_a_folder_is_served_and_chats(made, name):
    chats_as_transformers(made(name)[0], make_model(name), "<s>")


@pytest.mark.slow
def test_a_folder_with_smollm2_s_template_chats(default_model_path, tmp_path):
    text = gguf_text(default_model_path, read_gguf(default_model_path)[0])
    model = make_model("llama3.2", vocab_size=49152, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(text.payload)
    (tmp_path / "chat_template.jinja").write_text(text.chat_template)
    chats_as_transformers(tmp_path, model, "<|im_start|>")


def text_of(folder, vocab_size=288):
    return hf_text(folder, vocab_size)


def test_files_beside_weights_decide_rendering_and_stops(tmp_path):
    """The files next to the weights determine how to render and when to stop."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3, "bos_token_id": 7}')
    text = text_of(tmp_path)
    assert (text.bos_token, text.eos_token, text.stop_tokens, text.add_bos) == (256, 257, {257, 3}, True)
    assert text.chat_template == CHAT and text.payload == (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 5, 6]}')
    assert text_of(tmp_path).stop_tokens == {257, 3, 5, 6}
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "chat_template": "unused"}')
    text = text_of(tmp_path)
    assert (text.bos_token, text.add_bos, text.chat_template) == (7, False, CHAT)
    (tmp_path / "chat_template.jinja").unlink()
    assert text_of(tmp_path).chat_template == "unused"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": [
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]}))
    template = text_of(tmp_path).chat_template
    assert "plain" in template and "tools" in template and text_of(tmp_path).bos_token == 256
    (tmp_path / "tokenizer_config.json").unlink()
    assert text_of(tmp_path).chat_template is None


def test_tokens_without_a_row_are_left_out(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert b"<|assistant|>" in text_of(tmp_path, 260).payload and b"<|assistant|>" not in text_of(tmp_path, 259).payload
    with pytest.raises(ConfigError, match="tokenizer.json has 256 tokens, the model 255"):
        text_of(tmp_path, 255)


def test_only_the_text_model_is_served_of_images(made, tmp_path):
    """The text model of a folder with images is served alone."""
    folder, cases = made("gemma3")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}}))
    write_tokenizer(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for old, new in (("model.", "language_model.model."), ("model.", "model.language_model.")):
        renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
        save_file(renamed | {"vision_tower.a": torch.zeros(2), "multi_modal_projector.b": torch.zeros(2)}, tmp_path / "model.safetensors")
        model = load(tmp_path)
        check(answers(transformer(model, kernels_of("reference", model.architecture)), cases[:1], count=3), cases[:1], count=3)


def broken_folders(folder):
    """(what is broken, the words of the error) after each change of a good folder."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    good, tensors = weights.read_bytes(), load_file(weights)
    for change, words in ((lambda t: t.pop("model.norm.weight"), r"missing model.norm.weight \(64,\)"),
                          (lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(2)}), "unknown model.layers.0.extra.weight"),
                          (lambda t: t.update({"model.norm.weight": torch.zeros(65)}), r"model.norm.weight is \(65,\) instead of \(64,\)"),
                          (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.float8_e4m3fn)}),
                           '"model.norm.weight" is of type float8_e4m3fn; it must be float32, float16 or bfloat16')):
        changed = dict(tensors)
        change(changed)
        save_file(changed, weights)
        yield words
    for data in (good[:-100], good[:50], b"", b"\xff" * 100):
        weights.write_bytes(data)
        yield "model.safetensors is not a readable safetensors file" if data[:1] == b"\xff" else f"is truncated: it has {len(data):,} bytes"
    weights.unlink()
    (folder / "other.safetensors").write_bytes(good)
    yield "it must have model.safetensors, which is missing; it has other.safetensors"
    for content, words in (("{}", "weight_map must map"), ("[1]", "holds a list of 1; it must hold an object"), ("{", "is truncated: it has 1 bytes"),
                           ('{"weight_map": {"a": "../other.safetensors"}}', "to a file name in this folder"),
                           ('{"weight_map": {"a": 3}}', "weight_map must map"),
                           ('{"weight_map": {"a": "lost.safetensors"}}', "index.json names lost.safetensors, which is missing; it has other.safetensors")):
        index.write_text(content)
        yield words
    index.unlink()
    weights.write_bytes(good)
    for name, content, words in (("tokenizer.json", "{", "truncated"), ("tokenizer.json", "{}", "tokenizer is broken"), ("tokenizer_config.json", "[]", "it must hold an object"),
                                 ("generation_config.json", '{"eos_token_id": [288]}', r"eos_token_id\[1\] is 288; it must be an integer from 0 to 287"),
                                 ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is 5; it must be a text"),
                                 ("config.json", "[" * 100_000, "is not valid JSON")):
        before = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_text(content)
        if "chat" in words:
            (folder / "chat_template.jinja").unlink()
        yield words
        (folder / name).write_bytes(before)
    (folder / "tokenizer.json").unlink()
    yield "has no tokenizer.json; it has config.json, generation_config.json"


def test_a_broken_folder_is_named_in_one_line(tmp_path):
    """Whatever is broken in a folder is one line that names it."""
    folder = save(make_model("llama3.2"), tmp_path)
    load(folder)
    for words in broken_folders(folder):
        with pytest.raises(ConfigError, match=words) as caught:
            load(folder)
        assert str(folder) in str(caught.value) and str(caught.value).isprintable()
    with pytest.raises(ConfigError, match="-s 3: only for nanochat"):
        load(folder, step=3)
