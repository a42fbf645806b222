"""Scales for cached keys and values, which other servers keep in FP8: they change nothing here, whatever the weights are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.errors import ConfigError
from engines import tensors_of
from families import answers, check, clear_cases, kernels_of, load, make_model, save, transformer
from fp8 import save_fp8

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
NAMES = ["self_attn.kv_scale", "self_attn.k_scale", "self_attn.v_scale", "self_attn.attn.k_scale", "self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale", "self_attn.attn.q_scale",
         "self_attn.attn.prob_scale", "self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale", "self_attn.k_proj.kv_cache_scale", "self_attn.k_zero_point"]
CONFIGS = {"fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}},
           "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": SCHEME}},
           "the cache alone": {"quantization_config": {"kv_cache_scheme": SCHEME, "quant_method": None}}, "at the root": {"kv_cache_scheme": SCHEME, "kv_cache_dtype": "fp8_e4m3"}, "none": {}}


def with_scales(folder, value=torch.tensor([0.25])):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{layer}.{name}": value.clone() for layer in range(4) for name in NAMES}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_key_scales_change_nothing_in_a_float_model(config, tmp_path):
    model = make_model("qwen3")
    folder = with_scales(save(model, tmp_path))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    cases = clear_cases(model, lengths=(9,), count=16)
    ours = load(folder)
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16)


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.ones(2, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int8), torch.ones(1).to(torch.float8_e4m3fn)])
def test_key_scales_of_any_shape_are_passed_over(value, tmp_path):
    """They may be of any type too."""
    folder = save(make_model("llama2"), tmp_path)
    before = tensors_of(load(folder))
    after = tensors_of(load(with_scales(folder, value)))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_key_scales_change_nothing_in_an_fp8_model(tmp_path):
    folder = save_fp8(make_model("llama2"), tmp_path, "fp8")
    before = tensors_of(load(folder))
    after = tensors_of(load(with_scales(folder)))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_nvidia_s_cache_file_leaves_a_float_model_alone(tmp_path):
    """NVIDIA's file is about the cache only."""
    folder = with_scales(save(make_model("llama2"), tmp_path))
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    assert load(folder).description.startswith("llama, 4 layers")


@pytest.mark.parametrize("name", ["self_attn.q_proj.input_scale", "self_attn.other_scale", "mlp.down_proj.weight_scale"])
def test_other_scales_in_a_float_model_are_named(name, tmp_path):
    folder = save(make_model("llama2"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"model.layers.0.{name}": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"unknown model.layers.0.{name}"):
        load(folder)
