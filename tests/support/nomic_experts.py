"""A tiny random NomicBERT with experts (v2-moe), as its makers and llama.cpp's converter write it, and what it computes, from the
formulas: transformers has no such model."""

import json

import torch

import encoders
from tiny_gguf import write_gguf

C, F, L, H, E, CHOSEN, BASE, EPS = 64, 96, 4, 4, 8, 2, 10_000.0, 1e-5
CONFIG = {  # the keys of nomic-embed-text-v2-moe
    "activation_function": "gelu", "attn_pdrop": 0.0, "causal": False, "dense_seq_output": True, "embd_pdrop": 0.0, "expert_choice_router": False, "ffn_div": 1, "fused_bias_fc": True,
    "fused_dropout_add_ln": True, "initializer_range": 0.02, "layer_norm_epsilon": EPS, "max_trained_positions": 512, "mlp_fc1_bias": True, "mlp_fc2_bias": True, "model_type": "nomic_bert",
    "moe_every_n_layers": 2, "moe_impl": "megablocks", "moe_normalize_expert_weights": False, "moe_resid_pdrop": 0.0, "moe_top_k": CHOSEN, "n_embd": C, "n_head": H, "n_inner": F, "n_layer": L,
    "n_positions": 512, "num_experts": E, "num_shared_experts": 0, "pad_token_id": 1, "pad_vocab_size_multiple": 64, "parallel_block": False, "parallel_block_tied_norm": False, "prenorm": False,
    "qkv_proj_bias": True, "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "rotary_emb_base": BASE, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None, "router_aux_loss_coef": 0.1, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.0,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "torch_dtype": "float32", "type_vocab_size": 1, "use_cache": True, "use_flash_attn": True,
    "use_rms_norm": None, "use_xentropy": True, "vocab_size": encoders.ROWS}


def weights(seed=0, experts=E):
    """The model's tensors, random, under their makers' names."""
    dice = torch.Generator().manual_seed(seed)

    def random(*shape, scale=0.15):
        return torch.randn(*shape, generator=dice) * scale

    made = {"embeddings.word_embeddings.weight": random(encoders.ROWS, C, scale=0.3), "embeddings.token_type_embeddings.weight": random(1, C, scale=0.3)}
    norms = ["emb_ln", *(f"encoder.layers.{layer}.norm{number}" for layer in range(L) for number in (1, 2))]
    for name in norms:
        made |= {f"{name}.weight": 1 + random(C, scale=0.3), f"{name}.bias": random(C, scale=0.2)}
    for layer in range(L):
        at = f"encoder.layers.{layer}"
        products = {f"{at}.attn.Wqkv": (3 * C, C), f"{at}.attn.out_proj": (C, C)}
        if layer % 2 == 1:
            made |= {f"{at}.mlp.router.layer.weight": random(experts, C, scale=0.5), f"{at}.mlp.experts.mlp.w1": random(experts * F, C), f"{at}.mlp.experts.mlp.w2": random(experts * F, C),
                     f"{at}.mlp.experts.bias": random(C, scale=0.5)}
        else:
            products |= {f"{at}.mlp.fc1": (F, C), f"{at}.mlp.fc2": (C, F)}
        for name, shape in products.items():
            made |= {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0], scale=0.2)}
    return made


def save_folder(folder, state):
    from safetensors.torch import save_file
    save_file({f"bert.{name}" if name.startswith("e") else name: tensor for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    encoders.write_tokenizer(folder, "xlm-roberta")
    encoders.write_json(folder, **{"modules": encoders.modules("Pooling", "Normalize"), "1_Pooling__config": {"pooling_mode_mean_tokens": True, "word_embedding_dimension": C}})


def save_gguf(path, state, kind="F32"):
    """What llama.cpp's converter writes; it drops the bias of the experts."""
    import gguf
    table, stored, tensors = gguf.get_tensor_name_map(gguf.MODEL_ARCH.NOMIC_BERT_MOE, L), gguf.GGMLQuantizationType[kind], {}
    for name, tensor in state.items():
        if name.endswith("experts.bias"):
            continue
        if ".experts." in name:
            tensor = tensor.reshape(-1, F, C)
            tensor = tensor.transpose(1, 2).contiguous() if name.endswith("w2") else tensor
            name += ".weight"
        key, tensor = table.get_name(name, (".weight", ".bias")), tensor.numpy()
        quantized = tensor.ndim > 1 and kind != "F32" and "types" not in key and "gate_inp" not in key
        tensors[key] = (gguf.quantize(tensor, stored), stored) if quantized else tensor
    numbers = {f"nomic-bert-moe.{key}": value for key, value in {
        "block_count": L, "context_length": 512, "embedding_length": C, "feed_forward_length": F, "attention.head_count": H, "attention.causal": False, "pooling_type": 1,
        "attention.layer_norm_epsilon": EPS, "rope.freq_base": BASE, "expert_count": len(state["encoder.layers.1.mlp.router.layer.weight"]), "expert_used_count": CHOSEN, "moe_every_n_layers": 2}.items()}
    return write_gguf(path, tensors, numbers, encoders.filled(encoders.vocabulary("xlm-roberta"), encoders.ROWS) | {"general.architecture": "nomic-bert-moe"})


def expected(state, ids):
    """The mean of a text's last hidden states, scaled to length 1, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"], EPS)

    def product(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    T, D = len(ids), C // H
    angles = torch.arange(T).double()[:, None] * BASE ** (-torch.arange(0, D, 2).double() / D)

    def rotated(x):     # (T, H, D)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :D // 2], x[..., D // 2:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x = norm(w["embeddings.word_embeddings.weight"][list(ids)] + w["embeddings.token_type_embeddings.weight"][0], "emb_ln")
    for layer in range(L):
        at = f"encoder.layers.{layer}"
        q, k, v = (part.reshape(T, H, D) for part in product(x, f"{at}.attn.Wqkv").chunk(3, 1))
        scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / D**0.5
        attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(T, C)
        x = norm(x + product(attended, f"{at}.attn.out_proj"), f"{at}.norm1")
        if layer % 2 == 1:
            shares = (x @ w[f"{at}.mlp.router.layer.weight"].T).softmax(-1)
            best, chosen = shares.topk(CHOSEN)
            first, second = (w[f"{at}.mlp.experts.mlp.{name}"].reshape(-1, F, C) for name in ("w1", "w2"))
            bias = w.get(f"{at}.mlp.experts.bias", 0.0)
            y = torch.stack([sum(p * torch.nn.functional.gelu(first[e] @ row) @ second[e] for p, e in zip(own, those)) for own, those, row in zip(best, chosen.tolist(), x)]) + bias
        else:
            y = product(torch.nn.functional.gelu(product(x, f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        x = norm(x + y, f"{at}.norm2")
    mean = x.mean(0)
    return (mean / mean.norm()).numpy()
