"""Folders of packed safetensors compute what their format means, in tiles of their own size and multiplied out."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.loaded.shards import shard_model
from chatlm.worker.weights.packed.quantization import Quantization, ct_group
from engines import forward_logits, make_batch, tensors_of
from families import TOLERANCE, answers, check, clear_cases, kernels_of, load, make_model, transformer
from lora import adapt
from packers import PACKED, pack_ct, pack_gptq, packed_model

pytestmark = pytest.mark.usefixtures("one_thread")
needs_core = pytest.mark.skipif(decode_core() is None, reason="weights stay packed only where decode_core runs")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
WIDE = {"ct-int8": "i8_row"}       # tiles of matrices with 256 columns, where they differ


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_match_transformers(name, tmp_path):
    """Packed weights compute what transformers makes of their values."""
    folder, meant = packed_model(make_model("llama3.1", **SIZES), tmp_path, name)
    cases = clear_cases(meant, lengths=(40,), count=16)
    ours = load(folder)
    assert ", from " in ours.description and "all matrices multiplied out" in ours.description
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16)


@needs_core
@pytest.mark.parametrize("name", [name for name, row in PACKED.items() if row.tiles])
def test_tiles_hold_exactly_a_packed_file_s_numbers(name, tmp_path):
    folder, meant = packed_model(make_model("llama3.1", **SIZES), tmp_path, name)
    model, values = load(folder, None), tensors_of(load(folder))
    read = {key: tensor.read() for key, tensor in model.tensors.items()}
    packed = {key: matrix for key, matrix in read.items() if hasattr(matrix, "parts")}
    tiles = PACKED[name].tiles
    assert {matrix.kind for matrix in packed.values()} == {tiles, WIDE.get(name, tiles)} and len(packed) == 4 * len(model.architecture.layers)
    assert packed["0.down"].kind == WIDE.get(name, tiles)
    kernels = load_kernels("cpu", model.architecture, max_tokens=128, max_rows=8, fine=True)      # activations of 16 bits
    made = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=8, max_tokens=128, max_rows=8, dtype=model.dtype)
    for key in ("0.output", "0.down"):
        matrix, want = made.weights[key], values[key].numpy()
        rounded = 2.0 ** -11 if name in ("ct-int8", "bnb-int8") and matrix.kind == "q8_0" else 0      # scales of float32
        assert (np.abs(matrix.dequantize() - want) <= rounded * np.abs(want)).all()
    case, = clear_cases(meant, lengths=(40,), count=4)
    logits = forward_logits(made, make_batch((case.prompt, 0, 40, list(range(4)))))[0]
    assert (logits - case.logits[0]).norm() < 0.002 * case.logits[0].norm()         # keys and values are float16


FAMILIES = {        # a family, how it is packed, its matrices, changes of its config
    "experts": ("qwen3moe", "awq", r".*_proj\.weight", {}), "fused": ("phi3", "gptq-4", r".*_proj\.weight", {}),
    "adjacent pairs": ("glm4", "ct-4-asym", r".*_proj\.weight", {}), "grouped heads": ("pythia", "awq", r".*(query_key_value|dense\w*)\.weight", {"intermediate_size": 128}),
    "gates and ups fused": ("granite4-dense", "gptq-4-sym", r".*(_proj|put_linear)\.weight", {"shared_intermediate_size": 64}), "transposed": ("gemma3", "bnb-nf4", r".*_proj\.weight", {}),
    "a router": ("qwen3moe", "ct-8", r".*(_proj|mlp\.gate)\.weight", {}), "linear attention": ("qwen3.5", "ct-4", r".*\.(in_proj_(qkv|z|a|b)|\w+_proj)\.weight", {}),
    "turned": ("gpt2", "gptq-4", r".*\.c_(attn|proj|fc)\.weight", {}),
    "a head": ("qwen3", "ct-4-asym", r"(.*_proj|lm_head)\.weight", {"tie_word_embeddings": False}),
    "an embedding": ("qwen3", "ct-8", r"(.*_proj|lm_head|.*embed_tokens)\.weight", {"tie_word_embeddings": False})}


@pytest.mark.parametrize("case", FAMILIES)
def test_other_packed_families_compute_their_values(case, tmp_path):
    """Packed weights of other families compute what their values do."""
    name, packing, which, changes = FAMILIES[case]
    folder, meant = packed_model(make_model(name, **changes), tmp_path, packing, which=which)
    cases = clear_cases(meant, lengths=(40,), count=8)
    ours = load(folder)
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=8), cases, count=8,
          tolerance=3e-4 if name == "qwen3.5" else TOLERANCE)       # test_adapters.py says why
    if decode_core():
        model = load(folder, None)
        if PACKED[packing].tiles:
            assert any(PACKED[packing].tiles in getattr(tensor.read(), "kind", "") for tensor in model.tensors.values())
        made = Transformer(model.architecture, dict(model.tensors), kernels_of("decode_core", model.architecture), num_pages=8, num_slots=8, max_tokens=128, max_rows=8,
                           dtype=model.dtype)
        logits = forward_logits(made, make_batch((cases[0].prompt, 0, 40, list(range(4)))))[0]
        assert (logits - cases[0].logits[0]).norm() < 0.06 * cases[0].logits[0].norm()


def tiny(tmp_path, name, **options):
    return packed_model(make_model("llama3.1", **SIZES), tmp_path, name, **options)


def rewrite(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def same_values(folder, other):
    """Do two folders' models have the same numbers?"""
    ours, theirs = tensors_of(load(folder)), tensors_of(load(other))
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name, file, config", [
    ("gptq-4", "quantize_config.json", {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
    ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    ("modelopt-nvfp4", "hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}})])
def test_settings_may_be_in_a_file_of_their_own(name, file, config, tmp_path):
    folder, _ = tiny(tmp_path, name)
    rewrite(folder / "config.json", lambda content: content.pop("quantization_config") and None)
    with pytest.raises(ConfigError, match="is of type (int32|uint8|float8_e4m3fn); it must be float32"):
        load(folder)
    (folder / file).write_text(json.dumps(config))
    assert same_values(folder, tmp_path / "plain")


def test_an_image_model_s_settings_have_two_places(tmp_path):
    """An image model's settings are read in either place."""
    folder, _ = tiny(tmp_path, "awq")
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    tensors["vision_tower.layer.self_attn.q_proj.weight"] = torch.ones(4, 4)
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    for outer in (True, False):
        packing = {"quantization_config": text["quantization_config"]} if outer else {}
        inner = {key: value for key, value in text.items() if key != "quantization_config" or not outer}
        (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": inner, "vision_config": {}, **packing}))
        assert same_values(folder, tmp_path / "plain")


def test_compressed_groups_may_differ_in_format(tmp_path):
    """Groups of compressed tensors may differ also in format."""
    folder, _ = tiny(tmp_path, "ct-4-asym", which=r".*mlp\..*_proj\.weight")
    packed, plain = (load_file(tmp_path / place / "model.safetensors") for place in ("packed", "plain"))
    for name in [name for name in plain if "self_attn" in name and name.endswith("_proj.weight")]:
        module = name.removesuffix("weight")
        if "q_proj" in name:        # by name, 8 bits in words
            made, plain[name] = pack_ct(plain[name], bits=8)
        elif "o_proj" in name:      # by class, float8
            scale = plain[name].abs().amax() / 400
            made = {"weight": (plain[name] / scale).to(torch.float8_e4m3fn), "weight_scale": scale.reshape(1)}
            plain[name] = made["weight"].float() * scale
        else:
            continue                # ignored
        del packed[name]
        packed |= {module + ending: tensor for ending, tensor in made.items()}
    for place, tensors in (("packed", packed), ("plain", plain)):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / place / "model.safetensors")

    def more(content):
        groups = content["quantization_config"]["config_groups"]
        groups["group_0"]["targets"] = ["re:.*mlp.*"]
        groups["group_1"] = {"targets": [f"model.layers.{l}.self_attn.q_proj" for l in range(2)], "format": "pack-quantized",
                             "weights": {"type": "int", "num_bits": 8, "group_size": 32, "strategy": "group", "symmetric": True}}
        groups["group_2"] = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "tensor"}}
        content["quantization_config"] |= {"format": "mixed-precision", "ignore": ["lm_head", "re:.*[kv]_proj"]}
    rewrite(folder / "config.json", more)
    assert same_values(folder, tmp_path / "plain") and ", from FP8" in load(folder).description


@pytest.mark.parametrize("module, group", [("model.layers.0.mlp.up_proj", "b"), ("model.layers.0.self_attn.o_proj", "c"), ("lm_head", "d")])
def test_a_compressed_module_has_the_group_that_names_it(module, group):
    """A class comes after names, and is not the first group."""
    targets = {"a": ["Embedding"], "b": ["re:.*mlp.*"], "c": ["Linear"], "d": ["lm_head"]}
    stated = {"config_groups": {name: {"targets": of_it, "weights": {}} for name, of_it in targets.items()}}
    assert ct_group(Quantization(Path("config.json"), "quantization_config", stated), module).name == group


def test_rules_of_gptq_change_or_leave_out_modules(tmp_path):
    folder, _ = tiny(tmp_path, "gptq-4", which=r".*mlp\..*_proj\.weight")
    packed, plain = (load_file(tmp_path / place / "model.safetensors") for place in ("packed", "plain"))
    for name in [name for name in plain if name.endswith("o_proj.weight")]:
        made, plain[name] = pack_gptq(plain.pop(name), bits=8, group=64, symmetric=True)
        del packed[name]
        packed |= {name.removesuffix("weight") + ending: tensor for ending, tensor in made.items()}
    for place, tensors in (("packed", packed), ("plain", plain)):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / place / "model.safetensors")
    rewrite(folder / "config.json", lambda content: content["quantization_config"].update(
        dynamic={r"-:.*[qkv]_proj": {}, r"+:.*\.o_proj": {"bits": 8, "group_size": 64, "sym": True}}))
    assert same_values(folder, tmp_path / "plain")


def test_packers_zero_biases_are_left_out(tmp_path):
    folder, _ = packed_model(make_model("llama2", **SIZES), tmp_path, "gptq-4")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.bias"
    save_file(tensors | {name: torch.zeros(256)}, folder / "model.safetensors")
    assert same_values(folder, tmp_path / "plain")
    save_file(tensors | {name: torch.ones(256)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"unknown {name} \(256,\)"):
        load(folder)


@needs_core
def test_a_matrix_with_odd_scales_is_multiplied_out(tmp_path):
    """A matrix whose scales are no float16 is multiplied out alone."""
    folder, _ = tiny(tmp_path, "ct-4")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.1.mlp.down_proj."
    for value in (3e-7, 1e6):
        tensors[module + "weight_scale"][5, 1] = value
        save_file(tensors, folder / "model.safetensors")
        model = load(folder, None)
        assert getattr(model.tensors["0.down"].read(), "kind", "") == "q4_0"
        read, = model.tensors["1.down"].read()
        want = torch.from_numpy(floats(load(folder).tensors["1.down"].read()[0]))
        assert torch.equal(torch.from_numpy(floats(read)), want.bfloat16().float())
        assert torch.equal(want[:5], plain[module + "weight"][:5]) and not torch.equal(want[5], plain[module + "weight"][5])


@needs_core
@pytest.mark.parametrize("name", ["awq", "gptq-4-sym", "awq-128", "ct-int8"])
def test_ranks_share_packed_matrices(name, tmp_path):
    folder, _ = tiny(tmp_path, name)
    model, plain = load(folder, None), load(tmp_path / "plain")
    for tp in (2, 4) if name != "awq-128" else (2,):
        for rank in range(tp):
            ours, theirs = (shard_model(each, rank, tp) for each in (model, plain))
            for key in ("0.output", "0.down", "1.gate_up", "1.qkv"):
                read, want = ours.tensors[key].read(), np.concatenate([np.atleast_2d(part) for part in theirs.tensors[key].read()]).reshape(
                    ours.tensors[key].cut.shape)
                found = values_of(read)
                exact = hasattr(read, "parts")
                rounded = 2.0 ** -11 if name == "ct-int8" else 0        # scales of float32; a rank's share of 256 columns is of Q8_0
                assert found.shape == want.shape and (np.abs(found - want) <= (rounded if exact else 2.0 ** -8) * np.abs(want)).all()
                assert exact or key in ("0.output", "0.down")       # where the cut divides a block


def values_of(read):
    if not hasattr(read, "parts"):
        return np.concatenate([floats(part) for part in (read if isinstance(read, tuple) else (read,))]).reshape(-1, read[0].shape[-1])
    from chatlm.worker.arrays.packed import dequantize
    return np.concatenate([dequantize(SimpleNamespace(name=kind.upper()), rows).reshape(len(rows), -1) for kind, rows in read.parts])


@needs_core
@pytest.mark.parametrize("name", ["awq", "ct-8", "gptq-desc_act"])
def test_packed_heads_of_odd_sizes_are_computed_too(name, tmp_path):
    folder, meant = packed_model(make_model("llama3.1", hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=24, num_attention_heads=4,
                                            num_key_value_heads=2), tmp_path, name)
    case, = clear_cases(meant, lengths=(40,), count=4)
    model = load(folder, None)
    made = Transformer(model.architecture, dict(model.tensors), kernels_of("decode_core", model.architecture), num_pages=8, max_tokens=128, max_rows=8, dtype=model.dtype)
    logits = forward_logits(made, make_batch((case.prompt, 0, 40, list(range(4)))))[0]
    assert (logits - case.logits[0]).norm() < 0.06 * case.logits[0].norm()


def test_an_adapter_is_merged_into_packed_weights(tmp_path):
    """An adapter is merged into what packed weights mean."""
    folder, meant = packed_model(make_model("qwen3"), tmp_path, "awq")
    merged = adapt(meant, tmp_path / "adapter")
    cases = clear_cases(merged, lengths=(9,), count=16)
    for dtype in ("float32", None):
        ours = load(folder, dtype, lora=(str(tmp_path / "adapter"),))
        kernels = kernels_of("reference" if dtype else "decode_core" if decode_core() else "reference", ours.architecture)
        made = Transformer(ours.architecture, dict(ours.tensors), kernels, num_pages=80, max_tokens=128, max_rows=8, dtype=ours.dtype)
        if dtype:
            check(answers(made, cases, count=16), cases, count=16)
        else:
            (_, logits), = answers(made, cases, count=1)
            assert (logits[0] - cases[0].logits[0]).norm() < 0.06 * cases[0].logits[0].norm()
