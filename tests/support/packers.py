"""Tiny models whose matrices are packed as AWQ, GPTQ, compressed-tensors, bitsandbytes and modelopt pack them.

ExportModel from the layouts; tests/peers/test_packers.py compares them with compressed-tensors' and bitsandbytes' own functions."""

import json
import re
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from families import save

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12, -0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def stream(codes, bits):
    """Codes (R, n) as a little-endian stream of 32-bit words along each row."""
    codes = np.asarray(codes, np.int64)
    each = (codes[..., None] >> np.arange(bits) & 1).reshape(len(codes), -1)
    each = np.pad(each, ((0, 0), (0, -each.shape[1] % 32)))
    return torch.from_numpy(np.packbits(each.astype(np.uint8), axis=1, bitorder="little").view(np.int32).copy())


def whole_words(codes, bits):
    """The same with whole codes a word, as older files of compressed-tensors have it."""
    count = 32 // bits
    codes = np.pad(np.asarray(codes, np.uint64), ((0, 0), (0, -codes.shape[1] % count))).reshape(len(codes), -1, count)
    return torch.from_numpy((codes << (bits * np.arange(count)).astype(np.uint64)).sum(-1).astype(np.uint32).view(np.int32))


def grouped(weight, bits, group, symmetric, kind, order=None):
    """Codes (N, K), scales and zero points (N, G), and what they mean, float32."""
    N, K = weight.shape
    groups = np.arange(K) // group if order is None else order
    G, most = groups.max() + 1, (1 << bits) - 1
    scales, zeros = torch.empty(N, G), torch.empty(N, G)
    for g in range(G):
        part = weight[:, groups == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, g] = (torch.maximum(-low, high) * 2 if symmetric else high - low) / most
    scales = scales.clamp(min=1e-4).to(kind)
    for g in range(G):
        low = weight[:, groups == g].amin(1).clamp(max=0)
        zeros[:, g] = (most + 1) // 2 if symmetric else (-low / scales[:, g].float()).round().clamp(0, most)
    wide, at = scales.float()[:, groups], zeros[:, groups]
    codes = ((weight / wide).round() + at).clamp(0, most)
    return SimpleNamespace(codes=codes.int().numpy(), scales=scales, zeros=zeros.int().numpy(), values=(codes - at) * wide)


def pack_awq(weight, group=32, kind=torch.float16):
    its = grouped(weight, 4, group, False, kind)
    order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])

    def words(codes):        # (rows, outputs)
        return stream(codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(codes), -1), 4)

    assert (order == [0, 4, 1, 5, 2, 6, 3, 7]).all()
    return {"qweight": words(its.codes.T), "qzeros": words(its.zeros.T), "scales": its.scales.T.contiguous()}, its.values


def pack_gptq(weight, bits=4, group=32, symmetric=False, later=False, desc_act=False, kind=torch.float16):
    K = weight.shape[1]
    order = np.random.default_rng(3).permutation(K) // group if desc_act else None
    its = grouped(weight, bits, group, symmetric, kind, order)
    stored = (its.zeros - (not later)) & ((1 << bits) - 1)
    return {"qweight": stream(its.codes, bits).T.contiguous(), "qzeros": stream(stored.T, bits), "scales": its.scales.T.contiguous(),
            "g_idx": torch.from_numpy(np.arange(K) // group if order is None else order).int()}, its.values


def pack_ct(weight, bits=4, group=32, symmetric=True, words=stream, desc_act=False, kind=torch.bfloat16):
    N, K = weight.shape
    order = np.random.default_rng(3).permutation(K) // group if desc_act else None
    its = grouped(weight, bits, group or K, symmetric, kind, order)
    tensors = {"weight_packed": words(its.codes, bits), "weight_scale": its.scales, "weight_shape": torch.tensor([N, K])}
    if not symmetric:
        tensors["weight_zero_point"] = words(its.zeros.T, bits).T.contiguous()
    if desc_act:
        tensors["weight_g_idx"] = torch.from_numpy(order).int()
    return tensors, its.values


def pack_ct_int8(weight, group=0, symmetric=True, kind=torch.float32):
    its = grouped(weight, 8, group or weight.shape[1], symmetric, kind)
    tensors = {"weight": torch.from_numpy((its.codes - 128).astype(np.int8)), "weight_scale": its.scales}
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy((its.zeros - 128).astype(np.int8))
    return tensors, its.values


def nearest(values, levels):
    return (values[..., None] - torch.as_tensor(levels)).abs().argmin(-1)


def pairs(codes):
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def pack_nvfp4(weight, modelopt=False):
    N, K = weight.shape
    groups = weight.view(N, K // 16, 16)
    amax = groups.abs().amax(-1)
    factor = amax.max() / (6 * 448)
    scales = (amax / 6 / factor).to(torch.float8_e4m3fn)
    whole = scales.float() * factor if modelopt else scales.float() / (1 / factor)
    codes = nearest(groups / whole.clamp(min=1e-20)[..., None], E2M1)
    values = (torch.tensor(E2M1)[codes] * whole[..., None]).view(N, K)
    packed = pairs(codes.view(N, K))
    if modelopt:
        return {"weight": packed, "weight_scale": scales, "weight_scale_2": factor.reshape(()), "input_scale": torch.tensor(0.5)}, values
    return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": (1 / factor).reshape(1),
            "input_global_scale": torch.tensor([2.0])}, values


def pack_mxfp4(weight, modelopt=False):
    N, K = weight.shape
    groups = weight.view(N, K // 32, 32)
    exponents = (torch.floor(torch.log2(groups.abs().amax(-1))) - 2).clamp(-127, 127)
    codes = nearest(groups / 2 ** exponents[..., None], E2M1)
    values = (torch.tensor(E2M1)[codes] * 2 ** exponents[..., None]).view(N, K)
    return {"weight" if modelopt else "weight_packed": pairs(codes.view(N, K)), "weight_scale": (exponents + 127).to(torch.uint8)}, values


def dynamic_map():
    """256 levels, denser around 0, as bitsandbytes packs absmax with."""
    return torch.linspace(-1, 1, 256).pow(3)


def pack_bnb4(weight, name="nf4", nested=True, block=64):
    N, K = weight.shape
    levels, flat = {"nf4": NF4, "fp4": FP4}[name], weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": name, "blocksize": block, "dtype": "float16", "shape": [N, K]}
    tensors = {"weight.quant_map": torch.tensor(levels)}
    if nested:
        offset = float(absmax.mean())
        rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        outer = rest.abs().amax(1)
        codes = nearest(rest / outer[:, None], dynamic_map()).flatten()[:len(absmax)]
        absmax = dynamic_map()[codes] * outer.repeat_interleave(256)[:len(absmax)] + torch.tensor(offset)
        tensors |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": outer, "weight.nested_quant_map": dynamic_map()}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["weight.absmax"] = absmax
    codes = nearest(blocks / absmax[:, None].clamp(min=1e-20), levels)
    values = (torch.tensor(levels)[codes] * absmax[:, None]).flatten()[:N * K].view(N, K)
    flat = torch.nn.functional.pad(codes.flatten()[:N * K], (0, N * K % 2))
    packed = (flat[::2] << 4 | flat[1::2]).to(torch.uint8)[:, None]
    text = json.dumps(state).encode()
    return tensors | {"weight": packed, f"weight.quant_state.bitsandbytes__{name}": torch.tensor(list(text), dtype=torch.uint8)}, values


def pack_bnb8(weight):
    absmax = weight.abs().amax(1)
    codes = (weight * 127 / absmax[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}, codes.float() * absmax[:, None] / 127


INT8_INPUTS = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


def ct_config(layout, inputs=None, **weights):
    return {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"], "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": inputs, "weights": {"type": "int", "strategy": "group", **weights}}}}


def gptq_config(bits=4, group=32, symmetric=False, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False, **more}


def row(pack, config, tiles=None, **options):
    return SimpleNamespace(pack=lambda weight: pack(weight, **options), config=config, tiles=tiles)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
PACKED = {      # name -> how a matrix becomes its tensors, the config, the type of its tiles
    "awq": row(pack_awq, AWQ, "u4_g32"),
    "awq-64": row(pack_awq, AWQ | {"group_size": 64}, "u4_g32", group=64),
    "awq-128": row(pack_awq, AWQ | {"group_size": 128}, "u4_g128", group=128),
    **{f"gptq-{bits}{'-sym' if symmetric else ''}": row(pack_gptq, gptq_config(bits, symmetric=symmetric), tiles, bits=bits, symmetric=symmetric)
       for bits, symmetric, tiles in ((2, True, "q4_0"), (3, True, "q4_0"), (4, True, "q4_0"), (8, True, "q8_0"),
                                      (2, False, "u4_g32"), (3, False, "u4_g32"), (4, False, "u4_g32"), (8, False, None))},
    "gptq-v2": row(pack_gptq, gptq_config(checkpoint_format="gptq_v2"), "u4_g32", later=True),
    "gptq-128": row(pack_gptq, gptq_config(group=128), "u4_g128", group=128),
    "gptq-desc_act": row(pack_gptq, gptq_config(desc_act=True), None, desc_act=True),
    "ct-4": row(pack_ct, ct_config("pack-quantized", num_bits=4, group_size=32), "q4_0"),
    "ct-4-channel": row(pack_ct, ct_config("pack-quantized", num_bits=4, strategy="channel"), "q4_0", group=0),
    "ct-4-asym": row(pack_ct, ct_config("pack-quantized", num_bits=4, group_size=32, symmetric=False), "u4_g32", symmetric=False),
    "ct-4-asym-channel": row(pack_ct, ct_config("pack-quantized", num_bits=4, strategy="channel", symmetric=False), "u4_g128", group=0, symmetric=False),
    "ct-4-actorder": row(pack_ct, ct_config("pack-quantized", num_bits=4, group_size=32, actorder="group"), None, desc_act=True),
    "ct-3": row(pack_ct, ct_config("pack-quantized", num_bits=3, group_size=32), "q4_0", bits=3),
    "ct-3-old": row(pack_ct, ct_config("pack-quantized", num_bits=3, group_size=32, symmetric=False), "u4_g32", bits=3, symmetric=False, words=whole_words),
    "ct-5": row(pack_ct, ct_config("pack-quantized", num_bits=5, group_size=32), None, bits=5),
    "ct-8": row(pack_ct, ct_config("pack-quantized", num_bits=8, group_size=32), "q8_0", bits=8),
    "ct-int8": row(pack_ct_int8, ct_config("int-quantized", INT8_INPUTS, num_bits=8, strategy="channel"), "q8_0"),
    "ct-int8-asym": row(pack_ct_int8, ct_config("int-quantized", INT8_INPUTS, num_bits=8, strategy="channel", symmetric=False), None, symmetric=False),
    "ct-nvfp4": row(pack_nvfp4, ct_config("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16), None),
    "ct-mxfp4": row(pack_mxfp4, ct_config("mxfp4-pack-quantized", type="float", num_bits=4, group_size=32), "mxfp4"),
    "modelopt-nvfp4": row(pack_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, None, modelopt=True),
    "modelopt-mxfp4": row(pack_mxfp4, {"quant_method": "modelopt", "quant_algo": "MXFP4"}, "mxfp4", modelopt=True),
    "bnb-nf4": row(pack_bnb4, BNB4, None), "bnb-nf4-plain": row(pack_bnb4, BNB4, None, nested=False),
    "bnb-fp4": row(pack_bnb4, BNB4 | {"bnb_4bit_quant_type": "fp4"}, None, name="fp4", nested=False),
    "bnb-int8": row(pack_bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "q8_0")}


def pack_folder(plain, folder, scheme, which=r".*_proj\.weight"):
    """A folder of floats with its matrices packed, in `folder`; those of `plain` become the values that these mean."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(plain / "model.safetensors")
    packed = dict(tensors)
    for name in [name for name in tensors if re.fullmatch(which, name)]:
        turned = re.search(r"\.c_(attn|proj|fc)\.weight$", name)        # GPT-2's, of which packers make Linears
        made, values = scheme.pack(tensors[name].T.contiguous().float() if turned else tensors[name].float())
        values = values.T if turned else values
        del packed[name]
        packed |= {name.removesuffix("weight") + ending: tensor for ending, tensor in made.items()}
        tensors[name] = values.contiguous()
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config}))
    return folder


def packed_model(model, place, name, **options):
    """`model` packed as `name` says -> (its folder, transformers' model of what it means)."""
    from transformers import AutoModelForCausalLM
    with torch.no_grad():
        for weight in model.parameters():       # what stays floats is bfloat16 here
            weight.copy_(weight.bfloat16())
    save(model, place / "plain")
    folder = pack_folder(place / "plain", place / "packed", PACKED[name], **options)
    return folder, AutoModelForCausalLM.from_pretrained(place / "plain", dtype=torch.float32).eval()


def default_model_folder(place):
    """The default model as a folder of bfloat16."""
    from chatlm.common.hub.default_model import fetch_default_model
    from engines import tensors_of
    from families import load
    model = load(fetch_default_model())
    spec, tensors, state = model.architecture, tensors_of(model), {}
    attn, width = spec.attention, spec.feed_width
    queries, keys = attn.heads * attn.head_size, attn.kv_heads * attn.head_size
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        rows = {"qkv": [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)],
                "gate_up": [("mlp.gate_proj", width), ("mlp.up_proj", width)], "output": [("self_attn.o_proj", spec.width)],
                "down": [("mlp.down_proj", spec.width)], "attention_norm": [("input_layernorm", spec.width)],
                "ffn_norm": [("post_attention_layernorm", spec.width)]}.get(part)
        outer = {"embed": "model.embed_tokens", "final_norm": "model.norm"}
        prefix = f"model.layers.{layer}." if layer else ""
        for its, part in zip(rows or [(outer.get(part), len(tensor))], tensor.split([count for _, count in rows] if rows else len(tensor))):
            state[f"{prefix}{its[0]}.weight"] = part.bfloat16().contiguous()
    place.mkdir(parents=True)
    save_file(state, place / "model.safetensors", {"format": "pt"})
    (place / "tokenizer.json").write_bytes(model.text.payload)
    (place / "chat_template.jinja").write_text(str(model.text.chat_template))
    ends = sorted(model.text.stop_tokens)
    (place / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": spec.vocab_size, "hidden_size": spec.width, "intermediate_size": width,
        "num_hidden_layers": len(model.architecture.layers), "num_attention_heads": attn.heads, "num_key_value_heads": attn.kv_heads, "head_dim": attn.head_size,
        "max_position_embeddings": spec.max_positions, "rope_theta": 1e5, "rms_norm_eps": spec.norm.eps, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": model.text.bos_token, "eos_token_id": ends}))
    return place
