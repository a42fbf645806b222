"""Packed safetensors that are not what they say: one line that names the tensor, never other numbers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.core import decode_core, installed_core
from chatlm.common.errors import ConfigError
from chatlm.worker.model.transformer import Transformer
from families import kernels_of, load, make_model
from packers import PACKED, packed_model

pytestmark = pytest.mark.usefixtures("one_thread")
UP, NAN = "model.layers.1.mlp.up_proj.", float("nan")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> a folder packed so, which is made once and copied."""
    folders = {}

    def copy(name, place):
        if name not in folders:
            model = make_model("llama3.1", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
            folders[name], _ = packed_model(model, tmp_path_factory.mktemp(name), name)
        return shutil.copytree(folders[name], place / "model")
    return copy


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def configure(folder, edit):
    content = json.loads((folder / "config.json").read_text())
    edit(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


def refusal(folder, dtype=None):
    """What is said of a folder when all of its weights are read."""
    with pytest.raises(ConfigError) as caught:
        model = load(folder, dtype)
        kernels = kernels_of("decode_core" if dtype is None and decode_core() else "reference", model.architecture)
        Transformer(model.architecture, dict(model.tensors), kernels, num_pages=4, max_tokens=32, max_rows=4, dtype=model.dtype)
    text = str(caught.value)
    assert text.isprintable() and str(folder) in text and len(text) < 750
    return text


def put(ending, value, index=0):
    """Give one number of up_proj's tensor this value."""
    def edit(tensors):
        tensors[UP + ending].view(-1)[index] = value
    return edit


def replace(ending, function):
    return lambda tensors: tensors.update({UP + ending: function(tensors[UP + ending])})


SHAPES = [     # packing, what is done to up_proj's tensors, what is said
    ("awq", lambda t: t.pop(UP + "scales"), "up_proj.scales is missing; it must be float32 or float16 or bfloat16 (2, 96)"),
    ("awq", lambda t: t.pop(UP + "qzeros"), "up_proj.qzeros is missing; it must be int32 (2, 12)"),
    ("awq", lambda t: t.pop(UP + "qweight"), 'up_proj.qzeros" is of type int32; it must be'),
    ("awq", replace("qzeros", lambda x: x[:1]), "up_proj.qzeros is int32 (1, 12); it must be int32 (2, 12)"),
    ("awq", replace("scales", lambda x: x[:, :95]), "up_proj.scales is float16 (2, 95); it must be"),
    ("awq", replace("scales", lambda x: x.to(torch.int32)), "up_proj.scales is int32 (2, 96); it must be"),
    ("awq", replace("qweight", lambda x: x.to(torch.int64)), 'up_proj.qweight" is of type int64'),
    ("awq", replace("qweight", lambda x: x[:32]), "up_proj.scales is float16 (2, 96); it must be float32 or float16 or bfloat16 (1, 96)"),
    ("awq", replace("qweight", lambda x: x[None]), "up_proj.qweight is int32 (1, 64, 12); it must be int32 (any, any)"),
    ("gptq-4", lambda t: t.pop(UP + "qzeros"), "up_proj.qzeros is missing; it must be int32 (2, 12)"),
    ("gptq-4", put("g_idx", 2, 5), "up_proj.g_idx has 2; there are 2 groups"),
    ("gptq-desc_act", put("g_idx", -1, 5), "up_proj.g_idx has -1; there are 2 groups"),
    ("gptq-4", replace("g_idx", lambda x: x[:63]), "up_proj.g_idx is int32 (63,); it must be int32 or int64 (64)"),
    ("gptq-4", replace("g_idx", lambda x: x.float()), "up_proj.g_idx is float32 (64,); it must be int32 or int64 (64)"),
    ("gptq-3", replace("qweight", lambda x: x[:-1]), "up_proj.g_idx is int32 (64,); it must be int32 or int64 (53)"),
    ("gptq-4-sym", put("qzeros", 0x12345678), "up_proj.qzeros has several zero points, but quantization_config says that these weights are symmetric"),
    ("ct-4", lambda t: t.pop(UP + "weight_shape"), "up_proj.weight_shape is missing"),
    ("ct-4", replace("weight_shape", lambda x: torch.tensor([96, 72])), "up_proj.weight_packed is int32 (96, 8); it must be 96 rows of 9 words, for 72 inputs of 4 bits"),
    ("ct-4", replace("weight_shape", lambda x: torch.tensor([-1, 64])), "up_proj.weight_shape is [-1, 64]; these are no numbers"),
    ("ct-4", replace("weight_shape", lambda x: torch.tensor([1 << 62, 64])), "these are no numbers of outputs and inputs"),
    ("ct-4", replace("weight_scale", lambda x: x[:, :1]), "up_proj.weight_scale is bfloat16 (96, 1); it must be"),
    ("ct-4-asym", lambda t: t.pop(UP + "weight_zero_point"), "up_proj.weight_zero_point is missing; it must be int32 (any, 2)"),
    ("ct-4-asym", replace("weight_zero_point", lambda x: x[:11]), "up_proj.weight_zero_point is int32 (11, 2); it must be 12 rows of 2 words"),
    ("ct-4-actorder", put("weight_g_idx", 77), "up_proj.weight_g_idx has 77; there are 2 groups"),
    ("ct-int8", lambda t: t.pop(UP + "weight_scale"), "up_proj.weight_scale is missing"),
    ("ct-int8-asym", lambda t: t.pop(UP + "weight_zero_point"), "up_proj.weight_zero_point is missing"),
    ("ct-nvfp4", replace("weight_scale", lambda x: x[:, :3]), "up_proj.weight_scale is float8_e4m3fn (96, 3); it must be float8_e4m3fn (96, 4)"),
    ("ct-nvfp4", lambda t: t.pop(UP + "weight_global_scale"), "up_proj.weight_scale is float8_e4m3fn (96, 4); it must be uint8 (96, 2)"),
    ("ct-mxfp4", lambda t: t.pop(UP + "weight_scale"), "up_proj.weight_scale is missing; it must be uint8 (96, 2)"),
    ("bnb-nf4", replace("weight.quant_map", lambda x: x[:15]), "up_proj.weight.quant_map is float32 (15,); it must be"),
    ("bnb-nf4", replace("weight.nested_quant_map", lambda x: x[:255]), "up_proj.weight.nested_quant_map is float32 (255,); it must be"),
    ("bnb-nf4", lambda t: t.pop(UP + "weight.nested_absmax"), "up_proj.weight.nested_absmax is missing"),
    ("bnb-nf4", replace("weight.absmax", lambda x: x[:-1]), "up_proj.weight.absmax is uint8 (95,); it must be uint8 (96)"),
    ("bnb-nf4", replace("weight.quant_state.bitsandbytes__nf4", lambda x: x[1:]), "quant_state.bitsandbytes__nf4 is uint8"),
    ("bnb-nf4", replace("weight", lambda x: x[1:]), "up_proj.weight is uint8 (3071, 1); it must be 3072 bytes, for 96 x 64 codes"),
    ("bnb-int8", replace("SCB", lambda x: x[1:]), "up_proj.SCB is float32 (95,); it must be")]


@pytest.mark.parametrize("name, edit, words", SHAPES)
def test_tensors_that_do_not_fit_each_other_are_named(name, edit, words, made, tmp_path):
    folder = made(name, tmp_path)
    change(folder, edit)
    assert words in refusal(folder) and words in refusal(folder, "float32")


NUMBERS = [("awq", "scales", NAN), ("awq", "scales", float("inf")), ("gptq-4-sym", "scales", NAN), ("gptq-8", "scales", NAN), ("ct-4", "weight_scale", NAN),
           ("ct-4", "weight_scale", -float("inf")), ("ct-8", "weight_scale", NAN), ("ct-int8", "weight_scale", NAN), ("ct-nvfp4", "weight_global_scale", NAN),
           ("ct-nvfp4", "weight_global_scale", 0.0), ("ct-mxfp4", "weight_scale", 255), ("bnb-nf4-plain", "weight.absmax", NAN),
           ("bnb-nf4", "weight.nested_absmax", NAN), ("bnb-fp4", "weight.quant_map", NAN), ("bnb-int8", "SCB", float("inf"))]


@pytest.mark.parametrize("kernels", ["decode_core", "reference"])
@pytest.mark.parametrize("name, ending, value", NUMBERS)
def test_non_numbers_are_named_with_their_matrix(name, ending, value, kernels, made, tmp_path, monkeypatch):
    if kernels == "decode_core" and decode_core() is None:
        pytest.skip("decode_core is not installed")
    monkeypatch.setenv("CHAT_SERVER_KERNELS", kernels)
    installed_core.cache_clear()
    folder = made(name, tmp_path)
    change(folder, put(ending, value, 1 if ending not in ("weight_global_scale", "weight.nested_absmax") else 0))
    text = refusal(folder)
    assert f"{folder}: {UP}weight has a" in text and "NaN or infinite" in text
    monkeypatch.undo()
    installed_core.cache_clear()


CONFIGS = [
    ("awq", {"group_size": 40}, "down_proj.qweight has 96 input columns, not a multiple of the group size 40"),
    ("awq", {"group_size": 16}, "it must be float32 or float16 or bfloat16 (6, 64)"),
    ("awq", {"group_size": "32"}, 'quantization_config.group_size is "32"; it must be an integer from -1'),
    ("gptq-4", {"bits": 5}, "quantization_config.bits is 5; it must be 2, 3, 4 or 8"),
    ("gptq-4", {"bits": None}, "quantization_config.bits is missing; it must be an integer from 2 to 8"),
    ("gptq-4", {"bits": 8}, "it must be"), ("gptq-4", {"group_size": 64}, "it must be"), ("gptq-4", {"sym": "no"}, "sym is \"no\"; it must be true or false"),
    ("gptq-4", {"dynamic": {"(": {}}}, 'dynamic has "(", which is no regular expression'),
    ("gptq-4", {"dynamic": {"(.+)+x": {"bits": 4}}}, 'dynamic has "(.+)+x", which is no regular expression without repeated groups'),
    ("gptq-4", {"dynamic": {".*" * 7 + "x": {"bits": 4}}}, "and with at most 5 repeats"),
    ("gptq-4", {"dynamic": 3}, "dynamic is 3; it must be an object"),
    ("gptq-4", {"dynamic": {r".*up_proj": {"bits": 2}}}, "up_proj.scales is float16 (2, 96); it must be float32 or float16 or bfloat16 (4, 96)"),
    ("ct-4", {"config_groups": {}}, "num_bits is missing; it must be an integer from 1 to 8"),
    ("ct-4", {"config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4, "type": "int"}}}}, 'has "(", which is no regular expression')]


@pytest.mark.parametrize("name, changes, words", CONFIGS)
def test_settings_that_do_not_fit_tensors_are_named(name, changes, words, made, tmp_path):
    folder = made(name, tmp_path)
    configure(folder, lambda config: config.update(changes))
    assert words in refusal(folder)


def test_every_packing_is_in_a_row_of_these_tests():
    assert {name for name, *_ in SHAPES + NUMBERS} >= {"awq", "gptq-4", "ct-4", "ct-int8", "ct-nvfp4", "ct-mxfp4", "bnb-nf4", "bnb-int8"} <= {*PACKED}
