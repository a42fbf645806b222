"""Tiny random models of Qwen3-VL and Qwen3.5: folders, files, and transformers' logits from pixels, which Pillow resizes."""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from image_conversations import BYTES, SPECIALS, byte_tokenizer
from sight_families import pillow_resized, pixels_of, token
from tiny_sight import TEMPLATE, VOCABULARY, eager, write

SIZES = dict(shortest_edge=64 * 64, longest_edge=16 * 256)      # 4 to 16 rows of 16 * 16 pixels
TEXT = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=BYTES, eos_token_id=BYTES + 1,
            pad_token_id=0, rms_norm_eps=1e-6)
TOWER = dict(depth=4, hidden_size=64, intermediate_size=112, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=36)
IDS = dict(image_token_id=token("<|image_pad|>"), vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))


KINDS = "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"      # model_types


def make_qwen(kind, seed=0, hidden=32):
    import transformers
    if kind.startswith("qwen3_vl"):
        rope = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[4, 2, 2], mrope_interleaved=True)
        experts = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=hidden, tie_word_embeddings=False) if kind == "qwen3_vl_moe" else {}
        configure, maker = {"qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
                            "qwen3_vl_moe": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration)}[kind]
        config = configure(text_config=TEXT | dict(num_hidden_layers=3, head_dim=16, rope_parameters=rope) | experts, vision_config=TOWER | dict(deepstack_visual_indexes=[0, 2]),
                           tie_word_embeddings=False, **IDS)
    else:
        rope = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25)
        text = dict(num_hidden_layers=4, head_dim=32, rope_parameters=rope, layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2, linear_num_value_heads=4,
                    linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4)
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32) if kind == "qwen3_5_moe" else {}
        configure, maker = {"qwen3_5": (transformers.Qwen3_5Config, transformers.Qwen3_5ForConditionalGeneration),
                            "qwen3_5_moe": (transformers.Qwen3_5MoeConfig, transformers.Qwen3_5MoeForConditionalGeneration)}[kind]
        odd = {} if experts else dict(hidden_size=72, num_heads=3)      # its heads are padded
        config = configure(text_config=TEXT | text | experts, vision_config=TOWER | odd, tie_word_embeddings=False, **IDS)
    return eager(maker, config, seed)


def save_qwen(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"eos_token": "<end_of_utterance>"})
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"))
    write(folder / "preprocessor_config.json", dict(size=SIZES, patch_size=8, temporal_patch_size=2, merge_size=2, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=1 / 255))


def as_published(folder):
    """The folder of a Qwen3-VL-MoE with its experts' matrices as (E, in, out), as its makers have them."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def save_qwen_with_head(folder, model):
    """A folder of Qwen3.5 with a draft head: a copy of its second layer behind random norms and a random matrix."""
    save_qwen(folder, model)
    path, random = folder / "model.safetensors", torch.Generator().manual_seed(7)
    tensors, C = load_file(path), model.config.text_config.hidden_size
    layer = "model.language_model.layers.1."
    tensors |= {f"mtp.layers.0.{name.removeprefix(layer)}": tensor.clone() for name, tensor in tensors.items() if name.startswith(layer)}
    tensors |= {f"mtp.{name}.weight": torch.randn(C, generator=random) * 0.2 for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    save_file(tensors | {"mtp.fc.weight": torch.randn(C, 2 * C, generator=random) * 0.12}, path, metadata={"format": "pt"})
    return folder


def film(picture, layout):
    """pixel_values (patches, 3 * 2 * 8 * 8) and the grid, as Qwen2VLImageProcessor has them, of the layout's size."""
    (size,) = layout.sizes
    image = (pillow_resized(pixels_of(picture), size, 3) / 255 - 0.5) / 0.5
    rows, columns = size[1] // 8, size[0] // 8
    parts = image.reshape(rows // 2, 2, 8, columns // 2, 2, 8, 3).transpose(0, 3, 1, 4, 6, 2, 5)     # by squares; then color, row, column
    twice = np.stack([parts, parts], axis=5)
    return torch.tensor(twice.reshape(rows * columns, -1), dtype=torch.float32), torch.tensor([[1, rows, columns]])


def qwen_logits(model, ids, pictures, layouts):
    """transformers' logits of a prompt whose ids of rows become those of the image token."""
    seen = torch.tensor([[int(each >= VOCABULARY) for each in ids]])
    ids = torch.tensor([[each if each < VOCABULARY else IDS["image_token_id"] for each in ids]])
    values, grids = (torch.cat(part) for part in zip(*(film(*both) for both in zip(pictures, layouts))))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=values, image_grid_thw=grids, mm_token_type_ids=seen).logits[0].double().numpy()


def text_model(model):
    """The text model alone. Of Qwen3-VL it is a Qwen3, with experts or without."""
    import transformers
    config = model.config.text_config
    if config.model_type == "qwen3_vl_text":
        text = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, num_hidden_layers=3, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=10_000.0), tie_word_embeddings=False))
        text.config.model_type = "qwen3vl"      # as files call it
    elif config.model_type == "qwen3_vl_moe_text":
        experts = {key: getattr(config, key) for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
        text = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **experts, num_hidden_layers=3, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
                                                                            tie_word_embeddings=False))
        text.config.model_type = "qwen3vlmoe"
    else:
        text = transformers.AutoModelForCausalLM.from_config(config)
    text = text.float()
    text.load_state_dict({name.replace("model.language_model.", "model."): tensor for name, tensor in model.state_dict().items() if "visual" not in name})
    return text.eval()


def write_qwen(folder, model):
    """The text model and its mmproj, as llama.cpp's converter writes them, in float32; the path of the former."""
    from families import GGUF_ARCHITECTURES, as_gguf
    from tiny_gguf import write_gguf
    config, tower, text = model.config.text_config, model.config.vision_config, text_model(model)
    architecture = GGUF_ARCHITECTURES.get(text.config.model_type, text.config.model_type)
    deep = getattr(tower, "deepstack_visual_indexes", None) or []
    vocabulary = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    spare = VOCABULARY - BYTES - len(SPECIALS) - 1
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": [*sorted(vocabulary, key=vocabulary.get)[:BYTES], *SPECIALS, "Ġt", *(f"[PAD{n}]" for n in range(spare))],
                "tokenizer.ggml.merges": ["Ġ t"], "tokenizer.ggml.token_type": [1] * BYTES + [3] * len(SPECIALS) + [1] + [5] * spare, "tokenizer.ggml.eos_token_id": BYTES + 1,
                "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
                f"{architecture}.rope.dimension_sections": [*config.rope_parameters["mrope_section"], 0], f"{architecture}.n_deepstack_layers": len(deep)}
    as_gguf(folder / "tiny-F32.gguf", text, metadata=metadata)
    state = {name.removeprefix("model.visual."): tensor.float().numpy() for name, tensor in model.state_dict().items() if "visual" in name}
    kernel = state["patch_embed.proj.weight"]
    tensors = {"v.patch_embd.weight": kernel[:, :, 0], "v.patch_embd.weight.1": kernel[:, :, 1], "v.patch_embd.bias": state["patch_embed.proj.bias"], "v.position_embd.weight": state["pos_embed.weight"]}
    names = {"v.post_ln": "merger.norm", "mm.0": "merger.linear_fc1", "mm.2": "merger.linear_fc2"}
    names |= {f"v.blk.{l}.{ours}": f"blocks.{l}.{theirs}" for l in range(tower.depth) for ours, theirs in (
        ("ln1", "norm1"), ("ln2", "norm2"), ("attn_qkv", "attn.qkv"), ("attn_out", "attn.proj"), ("ffn_up", "mlp.linear_fc1"), ("ffn_down", "mlp.linear_fc2"))}
    names |= {f"v.deepstack.{layer}.{ours}": f"deepstack_merger_list.{i}.{theirs}" for i, layer in enumerate(deep) for ours, theirs in (("norm", "norm"), ("fc1", "linear_fc1"), ("fc2", "linear_fc2"))}
    tensors |= {f"{ours}.{part}": state[f"{theirs}.{part}"] for ours, theirs in names.items() for part in ("weight", "bias")}
    numbers = {"patch_size": 8, "image_size": 48, "embedding_length": tower.hidden_size, "feed_forward_length": tower.intermediate_size, "block_count": tower.depth, "attention.head_count": tower.num_heads,
               "attention.layer_norm_epsilon": 1e-6,
               "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "spatial_merge_size": 2, "is_deepstack_layers": [layer in deep for layer in range(tower.depth)], "projection_dim": config.hidden_size,
               "image_min_pixels": 64 * 64, "image_max_pixels": 16 * 256}
    write_gguf(folder / "mmproj-tiny-F32.gguf", tensors, {f"clip.vision.{key}": value for key, value in numbers.items()} | {"clip.has_vision_encoder": True, "clip.use_gelu": True, "clip.projector_type": "qwen3vl_merger"},
               {"general.architecture": "clip"})
    return folder / "tiny-F32.gguf"
