"""The model of bench/large_model.py as folders that vLLM and OpenVINO GenAI read.

    python bench/rival_folders.py FOLDER        # FOLDER/large-F16.gguf exists
    optimum-cli export openvino -m FOLDER/large-hf --task text-generation-with-past --weight-format int8 FOLDER/large-openvino

FOLDER/large-hf has the weights in float16. FOLDER/large-w8a8 has them as 8-bit integers with one scale a row, in
the format of compressed-tensors, with activations that are quantized by the token: vLLM's fastest on a CPU.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402
from large_model import FFN, HEADS, KV_HEADS, LAYERS, WIDTH    # noqa: E402

NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT8 | {"strategy": "channel"},
                                  "input_activations": INT8 | {"strategy": "token", "dynamic": True}}}}


def name_of(tensor):
    if tensor == "token_embd.weight":
        return "model.embed_tokens.weight"
    if tensor == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = tensor.split(".")
    return f"model.layers.{layer}.{NAMES[kind]}.weight"


def config(vocab, **more):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FFN,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": vocab,
            "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1,
            "eos_token_id": 2, **more}


def write(folder, tensors, about, tokenizer):
    from safetensors.numpy import save_file
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(about, indent=1))
    tokenizer.save_pretrained(folder)


def main():
    import gguf
    from transformers import AutoTokenizer
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    small = Path(fetch_default_model())
    tokenizer = AutoTokenizer.from_pretrained(small.parent, gguf_file=small.name)
    plain = {}
    packed = {}
    for tensor in gguf.GGUFReader(folder / "large-F16.gguf").tensors:
        name = name_of(tensor.name)
        values = numpy.array(tensor.data, numpy.float16)
        plain[name] = values
        if "proj" not in name:
            packed[name] = values
            continue
        wide = values.astype(numpy.float32)
        scale = numpy.maximum(numpy.abs(wide).max(1, keepdims=True), 1e-9) / 127
        packed[name] = numpy.rint(wide / scale).astype(numpy.int8)
        packed[f"{name}_scale"] = scale.astype(numpy.float32)
    vocab = len(plain["model.embed_tokens.weight"])
    write(folder / "large-hf", plain, config(vocab), tokenizer)
    write(folder / "large-w8a8", packed, config(vocab, quantization_config=QUANTIZATION), tokenizer)
    for made in ("large-hf", "large-w8a8"):
        print(f"{folder / made}: {(folder / made / 'model.safetensors').stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
