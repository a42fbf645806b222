"""Packs matrices with bitsandbytes and compressed-tensors: `python packers_peer.py FOLDER`.

Each folder in it gets model.safetensors with a packed matrix m, config.json, and values.safetensors with what the library makes of it.
`python packers_peer.py --logits MODEL..`: each packed folder gets logits.safetensors, transformers' of the tokens 0 .. 39."""

import json
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file


def write(name, tensors, config, values):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    save_file({f"m.{ending}": tensor.contiguous() for ending, tensor in tensors.items()}, folder / "model.safetensors")
    save_file({"values": values.float().contiguous()}, folder / "values.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def compressed(name, compressor, state, layout, **args):
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    packed = compressor.compress(state, scheme)
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        key: value for key, value in args.items() if key != "scale_dtype"}}}}
    write(name, packed, config, compressor.decompress(packed, scheme)["weight"])


def main():
    torch.manual_seed(0)
    weight = torch.randn(48, 128)       # bitsandbytes' dequantization on a CPU is wrong where rows are no whole blocks of 64
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
            more = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
            write(f"{kind}-{nested}", {"weight": packed, **more}, {"quant_method": "bitsandbytes"}, bnb.dequantize_4bit(packed, state))
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    write("int8", {"weight": codes, "SCB": scales}, {"quant_method": "bitsandbytes"}, codes.float() * scales[:, None] / 127)
    for bits in range(2, 9):
        for symmetric in (True, False):
            groups = weight.view(48, 4, 32)
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = (torch.maximum(-low, high) * 2 if symmetric else high - low) / ((1 << bits) - 1)
            middle = 1 << bits - 1
            zero = torch.zeros(48, 4) if symmetric else (-low / scale).round() - middle
            compressed(f"pack-{bits}-{symmetric}", PackedQuantizationCompressor,
                       {"weight": weight.clone(), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}, "pack-quantized",
                       num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric)
    amax = weight.view(48, 8, 16).abs().amax(-1)
    scale = 448 * 6 / amax.max()
    compressed("nvfp4", NVFP4PackedCompressor, {"weight": weight.clone(), "weight_scale": (amax / 6 * scale).to(torch.float8_e4m3fn).float(),
                                                "weight_global_scale": scale.reshape(1)}, "nvfp4-pack-quantized",
               num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    exponents = torch.floor(torch.log2(weight.view(48, 4, 32).abs().amax(-1))) - 2
    compressed("mxfp4", MXFP4PackedCompressor, {"weight": weight.clone(), "weight_scale": 2 ** exponents}, "mxfp4-pack-quantized",
               num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8)


def logits(folders):
    from transformers import AutoModelForCausalLM
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            save_file({"logits": model(torch.arange(40)[None]).logits[0].contiguous()}, Path(folder) / "logits.safetensors")


if __name__ == "__main__":
    logits(sys.argv[2:]) if sys.argv[1] == "--logits" else main()
