"""LoRA adapters for tests: peft's own, and random ones of any shapes."""

import json

import pytest
import torch
from safetensors.torch import save_file


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(model, folder, targets=LINEAR, embeddings=False, size=0.2, **options):
    """Save a random adapter of `model` in `folder` as peft does; returns the model with it, merged by peft. With
    `embeddings` the embedding and the head are saved too."""
    peft = pytest.importorskip("peft", reason="pip install '.[test]' brings it")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6} | options))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(0, size)
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return adapted.merge_and_unload()


NEMOTRON = ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]        # peft allows no out_proj in Mamba layers
OPTIONS = {         # model -> the options of its adapter
    "llama3.1": {"use_rslora": True}, "gemma3": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8}, "alpha_pattern": {"v_proj": 1}},
    "phi3": {"targets": ["qkv_proj", "gate_up_proj"]}, "qwen3": {"targets": r".*\.(q|up)_proj"},
    "qwen2": {"targets": ["embed_tokens", "lm_head", "v_proj"]}, "nanochat": {"targets": "all-linear"}, "glm4": {"targets": ["q_proj", "k_proj", "gate_up_proj"]},
    "lfm2": {"targets": ["q_proj", "in_proj", "out_proj", "w1", "w2"]}, "qwen3.5": {"targets": ["q_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "down_proj"]},
    "qwen3.5moe": {"targets": ["k_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"]},
    "gpt2": {"targets": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, "pythia": {"targets": ["query_key_value", "dense_h_to_4h", "dense"]},
    "starcoder2": {"targets": ["q_proj", "o_proj", "c_fc", "c_proj"]}, "cohere2": {"targets": LINEAR},
    "lfm2moe": {"targets": ["q_proj", "in_proj", "out_proj", "w1"]}, "granite4h": {"targets": ["q_proj", "in_proj", "out_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"]},
    "granite4h-dense": {"targets": ["v_proj", "in_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"]},
    "qwen3next": {"targets": ["q_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"]},
    "gemma4": {"targets": [*LINEAR, "per_layer_model_projection", "per_layer_input_gate", "per_layer_projection"]}, "gemma4moe": {"targets": LINEAR},
    "nemotron-h": {"targets": NEMOTRON}, "nemotron3": {"targets": NEMOTRON}, "nemotron3-latent": {"targets": [*NEMOTRON, "fc1_latent_proj", "fc2_latent_proj"]}}


def shapes_of(base):
    """The layers of a tiny llama, and the shapes of some of its modules, as random_adapter takes them."""
    config = json.loads((base / "config.json").read_text())
    C, F, q = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] * config["head_dim"]
    return config["num_hidden_layers"], {"self_attn.q_proj": (q, C), "mlp.down_proj": (C, F), "mlp.up_proj": (F, C)}


def random_adapter(folder, layers, shapes, seed=0, rank=4, size=0.05, dtype=torch.float32, **config):
    """An adapter as peft saves it, for modules of each layer with these shapes (out, in): name -> shape."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(layers):
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors[f"{name}A.weight"] = (size * torch.randn(rank, columns, generator=random)).to(dtype)
            tensors[f"{name}B.weight"] = (size * torch.randn(rows, rank, generator=random)).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [name.rpartition(".")[2] for name in shapes],
        "base_model_name_or_path": None} | config))
    return folder


SMOLLM2 = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576), "self_attn.o_proj": (576, 576),
           "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536)}
