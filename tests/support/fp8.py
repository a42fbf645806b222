"""Models whose matrices are saved in FP8, of every scheme that is read."""

import json
import re

import torch
from safetensors.torch import load_file, save_file

from families import save


def to_fp8(weight, scheme, dtype=torch.float8_e4m3fn):
    """(FP8 weights, their scales, what they mean): each scale is what its group's largest value needs."""
    N, K = weight.shape
    rows, columns = {"tensor": (N, K), "channel": (1, K), "block": (32, 32)}[scheme]
    scale = torch.stack([torch.stack([block.abs().max() / 300 for block in band.split(columns, 1)]) for band in weight.split(rows)])
    whole = scale.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
    packed = (weight / whole).to(dtype)
    return packed, scale, packed.float() * whole


SCHEMES = {         # name -> (groups of weights, name of the scales, quantization_config)
    "deepseek": ("block", "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}),
    "fp8": ("tensor", "weight_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    "fbgemm": ("channel", "weight_scale", {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}),
    **{f"compressed-{kind}": (kind, "weight_scale", {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
       "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": kind,
                                                                        "block_structure": [32, 32] if kind == "block" else None}}}})
       for kind in ("tensor", "channel", "block")}}


def weight_of(weights, key):
    """A parameter by its name in a folder, which has a matrix for each expert."""
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", key)
    if not expert:
        return weights[key].data
    layer, number, part = expert[1], int(expert[2]), expert[3]
    if part == "down":
        return weights[f"{layer}.down_proj"].data[number]
    return weights[f"{layer}.gate_up_proj"].data[number].chunk(2)[part == "up"]


def save_fp8(model, folder, scheme):
    """Save `model` with its layers' matrices in FP8, and give it the values that those mean."""
    kind, name, config = SCHEMES[scheme]
    save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    weights = dict(model.named_parameters())
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        tensors[key], scale, values = to_fp8(tensors[key], kind)
        tensors[key.replace("weight", name)] = (scale.reshape(()) if kind == "tensor" else scale).contiguous()
        if scheme == "fp8":
            tensors[key.replace("weight", "input_scale")] = torch.tensor(0.5)
        weight_of(weights, key).copy_(values)
    save_file(tensors, folder / "model.safetensors")
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    return folder
