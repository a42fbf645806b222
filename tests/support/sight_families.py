"""Tiny random models of families that see, beside tiny_sight's: folders, files, and transformers' logits from pixels, which Pillow resizes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import torch

from families import as_gguf, with_exact_angles
from image_conversations import BYTES, SPECIALS, byte_tokenizer
from tiny_sight import TEMPLATE, VOCABULARY, eager, permuted, write

TEXT = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=BYTES, eos_token_id=BYTES + 1,
            pad_token_id=0)
LFM2_PICTURES = dict(tile_size=64, max_image_tokens=16, min_image_tokens=4, min_tiles=2, max_tiles=4, encoder_patch_size=8, downsample_factor=2, max_pixels_tolerance=2.0, do_image_splitting=True,
                     use_thumbnail=True, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=1 / 255)


def token(name):
    return BYTES + SPECIALS.index(name)


def pixels_of(picture):
    return np.frombuffer(picture.pixels, np.uint8).reshape(picture.height, picture.width, 3)


def pillow_resized(image, size, resample):
    from PIL import Image
    return np.asarray(Image.fromarray(image).resize(size, resample))


def make_lfm2_vl(seed=0, normed=True, patch=8, places=36):
    import transformers
    text = TEXT | dict(model_type="lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False, norm_eps=1e-5, conv_L_cache=3)
    vision = dict(model_type="siglip2_vision_model", hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_patches=places, patch_size=patch, layer_norm_eps=1e-6)
    config = transformers.Lfm2VlConfig(text_config=text, vision_config=vision, image_token_id=token("<image>"), projector_hidden_size=80, downsample_factor=2, projector_use_layernorm=normed,
                                     tie_word_embeddings=True)
    return eager(transformers.Lfm2VlForConditionalGeneration, config, seed)


def lfm2_inputs(picture, layout):
    """pixel_values, pixel_attention_mask and spatial_shapes as Lfm2VlImageProcessor has them, of the layout's sizes."""
    image, (size,) = pixels_of(picture), layout.sizes
    resized, tiles = pillow_resized(image, size, 2), []
    if layout.columns:
        tiles = [resized[row * 64:row * 64 + 64, column * 64:column * 64 + 64] for row in range(layout.rows) for column in range(layout.columns)]
        resized = pillow_resized(image, layout.whole, 2)
    values, masks, shapes = [], [], []
    for tile in (*tiles, resized):
        rows, columns = tile.shape[0] // 8, tile.shape[1] // 8
        patches = (tile.reshape(rows, 8, columns, 8, 3).swapaxes(1, 2).reshape(rows * columns, -1) / 255 - 0.5) / 0.5
        values.append(np.pad(patches, ((0, 256 - len(patches)), (0, 0))))
        masks.append(np.arange(256) < len(patches))
        shapes.append((rows, columns))
    return torch.tensor(np.stack(values), dtype=torch.float32), torch.tensor(np.stack(masks)).int(), torch.tensor(shapes)


def lfm2_logits(model, ids, pictures, layouts):
    parts = [lfm2_inputs(picture, layout) for picture, layout in zip(pictures, layouts)]
    values, masks, shapes = (torch.cat(part) for part in zip(*parts))
    return model(input_ids=ids, pixel_values=values, pixel_attention_mask=masks, spatial_shapes=shapes)


def lfm2_mmproj(state, config):
    """Tensors and keys of llama.cpp's mmproj file."""
    prefix, C, p = "model.vision_tower.", config.hidden_size, config.patch_size
    prefix += "vision_model." if f"{prefix}vision_model.post_layernorm.weight" in state else ""
    kernel = state[f"{prefix}embeddings.patch_embedding.weight"].reshape(C, p, p, 3).transpose(0, 3, 1, 2)
    tensors = {"v.patch_embd.weight": np.ascontiguousarray(kernel), "v.patch_embd.bias": state[f"{prefix}embeddings.patch_embedding.bias"],
               "v.position_embd.weight": state[f"{prefix}embeddings.position_embedding.weight"]} | siglip_layers(state, prefix, config.num_hidden_layers)
    for part in ("weight", "bias"):
        names = (("mm.input_norm", "layer_norm"), ("mm.1", "linear_1"), ("mm.2", "linear_2"))
        tensors |= {f"{ours}.{part}": state[name] for ours, theirs in names if (name := f"model.multi_modal_projector.{theirs}.{part}") in state}
    pictures = {key: LFM2_PICTURES[key] for key in ("tile_size", "max_image_tokens", "min_image_tokens", "min_tiles", "max_tiles")}
    return tensors, siglip_numbers(config) | {"image_size": math.isqrt(config.num_patches) * p, "projector.scale_factor": 2} | pictures


GEMMA3_PICTURES = dict(size={"height": 64, "width": 64}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=1 / 255)


def make_gemma3(seed=0):
    import transformers
    text = TEXT | dict(model_type="gemma3_text", num_hidden_layers=6, head_dim=16, layer_types=["sliding_attention"] * 5 + ["full_attention"], sliding_window=24,
                       query_pre_attn_scalar=16, rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}, "full_attention": {"rope_type": "default", "rope_theta": 1e6}})
    vision = dict(model_type="siglip_vision_model", hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, layer_norm_eps=1e-6,
                  vision_use_head=False)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=token("<image_soft_token>"), boi_token_index=token("<start_of_image>"),
                                       eoi_token_index=token("<end_of_image>"))
    return eager(transformers.Gemma3ForConditionalGeneration, config, seed)


def gemma3_logits(model, ids, pictures, layouts):
    values = torch.tensor(np.stack([(pillow_resized(pixels_of(picture), (64, 64), 2).transpose(2, 0, 1) / 255 - 0.5) / 0.5 for picture in pictures]), dtype=torch.float32)
    return model(input_ids=ids, pixel_values=values, token_type_ids=(ids == token("<image_soft_token>")).long(), attention_mask=torch.ones_like(ids))


def gemma3_mmproj(state, config):
    prefix = "model.vision_tower."
    prefix += "vision_model." if f"{prefix}vision_model.post_layernorm.weight" in state else ""
    tensors = {"v.patch_embd.weight": state[f"{prefix}embeddings.patch_embedding.weight"], "v.patch_embd.bias": state[f"{prefix}embeddings.patch_embedding.bias"],
               "v.position_embd.weight": state[f"{prefix}embeddings.position_embedding.weight"], "mm.input_projection.weight": state["model.multi_modal_projector.mm_input_projection_weight"],
               "mm.soft_emb_norm.weight": 1 + state["model.multi_modal_projector.mm_soft_emb_norm.weight"]} | siglip_layers(state, prefix, config.num_hidden_layers)
    return tensors, siglip_numbers(config) | {"image_size": 64, "projector.scale_factor": 2}


GEMMA4_PICTURES = dict(max_soft_tokens=20, patch_size=8, pooling_kernel_size=3, resample=3, rescale_factor=1 / 255, image_mean=[0.0] * 3, image_std=[1.0] * 3)
LOCAL, FULL = "sliding_attention", "full_attention"


def make_gemma4(seed=0, two_sided=True, small=False, clipped=False):
    """small: with inputs of each layer, as E2B."""
    import transformers
    text = TEXT | dict(model_type="gemma4_text", num_hidden_layers=6, layer_types=[LOCAL] * 5 + [FULL], head_dim=16, global_head_dim=32, num_global_key_value_heads=1, num_kv_shared_layers=0,
                       hidden_size_per_layer_input=16 * small, vocab_size_per_layer_input=VOCABULARY, sliding_window=24, attention_k_eq_v=False, use_double_wide_mlp=False, enable_moe_block=False,
                       use_bidirectional_attention="vision" if two_sided else None, pad_token_id=0,
                       rope_parameters={LOCAL: dict(rope_type="default", rope_theta=1e4), FULL: dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6)})
    vision = dict(hidden_size=80 if clipped else 72, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=16 if clipped else 24, patch_size=8, pooling_kernel_size=3, position_embedding_size=64,
                  standardize=not small, use_clipped_linears=clipped, rope_parameters=dict(rope_type="axial", rope_theta=100.0))
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, image_token_id=token("<|image|>"), boi_token_id=token("<|image>"), eoi_token_id=token("<image|>"))
    model = eager(transformers.Gemma4ForConditionalGeneration, config, seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("std_bias", "std_scale")):
                buffer.normal_(0.5, 0.3)
            if name.endswith(("input_min", "output_min")):
                buffer.fill_(-0.7)
            if name.endswith(("input_max", "output_max")):
                buffer.fill_(0.8 if "up_proj" in name and "output" in name else 0.6)
        for name, weight in model.named_parameters():  # scores are not divided by sqrt(D): larger ones magnify what float32 rounds
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.mul_(0.5)
    with_exact_angles(SimpleNamespace(model=model.model.language_model, config=config.text_config))
    return model


def gemma4_logits(model, ids, pictures, layouts, p=8):
    """pixel_values and image_position_ids as Gemma4ImageProcessor has them."""
    values, places = [], []
    for picture, layout in zip(pictures, layouts):
        (width, height), = layout.sizes
        rows, columns = height // p, width // p
        tile = pillow_resized(pixels_of(picture), (width, height), 3) / 255
        patches = tile.reshape(rows, p, columns, p, 3).swapaxes(1, 2).reshape(rows * columns, -1)
        own = np.stack(np.meshgrid(np.arange(columns), np.arange(rows), indexing="xy"), axis=-1).reshape(-1, 2)
        missing = 180 - len(patches)
        values.append(np.pad(patches, ((0, missing), (0, 0))))
        places.append(np.pad(own, ((0, missing), (0, 0)), constant_values=-1))
    return model(input_ids=ids, pixel_values=torch.tensor(np.stack(values), dtype=torch.float32), image_position_ids=torch.tensor(np.stack(places)), attention_mask=torch.ones_like(ids),
                 mm_token_type_ids=(ids == token("<|image|>")).long())


def gemma4_mmproj(state, config):
    prefix, C, p = "model.vision_tower.", config.hidden_size, config.patch_size
    kernel = state[f"{prefix}patch_embedder.input_proj.weight"].reshape(C, p, p, 3).transpose(0, 3, 1, 2)
    tensors = {"v.patch_embd.weight": np.ascontiguousarray(kernel), "v.position_embd.weight": state[f"{prefix}patch_embedder.position_embedding_table"],
               "mm.input_projection.weight": state["model.embed_vision.embedding_projection.weight"]}
    tensors |= {f"v.{name}": state[f"{prefix}{name}"] for name in ("std_bias", "std_scale") if config.standardize}
    for l in range(config.num_hidden_layers):
        for ours, theirs in (("ln1", "input_layernorm"), ("ln2", "pre_feedforward_layernorm"), ("attn_post_norm", "post_attention_layernorm"), ("ffn_post_norm", "post_feedforward_layernorm"),
                             ("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"), ("attn_q", "self_attn.q_proj.linear"), ("attn_k", "self_attn.k_proj.linear"),
                             ("attn_v", "self_attn.v_proj.linear"), ("attn_out", "self_attn.o_proj.linear"), ("ffn_gate", "mlp.gate_proj.linear"), ("ffn_up", "mlp.up_proj.linear"),
                             ("ffn_down", "mlp.down_proj.linear")):
            tensors[f"v.blk.{l}.{ours}.weight"] = state[f"{prefix}encoder.layers.{l}.{theirs}.weight"]
            module = f"{prefix}encoder.layers.{l}.{theirs.removesuffix('.linear')}"
            tensors |= {f"v.blk.{l}.{ours}.{bound}": state[f"{module}.{bound}"].reshape(1) for bound in ("input_min", "input_max", "output_min", "output_max") if f"{module}.{bound}" in state}
    numbers = {"patch_size": p, "embedding_length": C, "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers, "attention.head_count": config.num_attention_heads,
               "attention.layer_norm_epsilon": config.rms_norm_eps, "image_size": 224, "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "max_soft_tokens": 20}
    return tensors, numbers


def make_gemma4_unified(seed=0):
    """Without a tower, as the 12B model."""
    import transformers
    text = TEXT | dict(
        model_type="gemma4_unified_text", num_hidden_layers=6, layer_types=[LOCAL] * 5 + [FULL], head_dim=16, global_head_dim=32, num_global_key_value_heads=1, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, sliding_window=24, use_bidirectional_attention="vision",
        rope_parameters={LOCAL: dict(rope_type="default", rope_theta=1e4), FULL: dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6)})
    vision = dict(patch_size=8, pooling_kernel_size=3, mm_embed_dim=80, mm_posemb_size=40, output_proj_dims=80)
    config = transformers.Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config=None, image_token_id=token("<|image|>"))
    model = eager(transformers.Gemma4UnifiedForConditionalGeneration, config, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.mul_(0.5)
    with_exact_angles(SimpleNamespace(model=model.model.language_model, config=config.text_config))
    return model


def unified_logits(model, ids, pictures, layouts):
    values, places = [], []
    for picture, layout in zip(pictures, layouts):
        (width, height), = layout.sizes
        rows, columns = height // 24, width // 24
        patches = (pillow_resized(pixels_of(picture), (width, height), 3) / 255).reshape(rows, 24, columns, 24, 3).swapaxes(1, 2).reshape(rows * columns, -1)
        own = np.stack(np.meshgrid(np.arange(columns), np.arange(rows), indexing="xy"), axis=-1).reshape(-1, 2)
        values.append(np.pad(patches, ((0, 20 - len(patches)), (0, 0))))
        places.append(np.pad(own, ((0, 20 - len(patches)), (0, 0)), constant_values=-1))
    return model(input_ids=ids, pixel_values=torch.tensor(np.stack(values), dtype=torch.float32), image_position_ids=torch.tensor(np.stack(places)), attention_mask=torch.ones_like(ids),
                 mm_token_type_ids=(ids == token("<|image|>")).long())


def unified_mmproj(state, config):
    """The columns of what reads pixels are by color first there."""
    planar = np.arange(3 * 24 * 24).reshape(24, 24, 3).transpose(2, 0, 1).reshape(-1)
    own = {name.removeprefix("model.vision_embedder."): tensor for name, tensor in state.items() if "vision_embedder" in name} or {
        name.removeprefix("model.embed_vision."): tensor for name, tensor in state.items() if "embed_vision" in name}
    project = next(tensor for name, tensor in state.items() if name.endswith("embedding_projection.weight"))
    tensors = {"v.patch_embd.weight": own["patch_dense.weight"][:, planar], "v.patch_embd.bias": own["patch_dense.bias"], "v.position_embd.weight": own["pos_embedding"].swapaxes(0, 1),
               "mm.input_projection.weight": project}
    for number, name in enumerate(("patch_ln1", "patch_ln2", "pos_norm"), 1):
        tensors |= {f"v.patch_norm.{number}.{part}": own[f"{name}.{part}"][planar if number == 1 else slice(None)] for part in ("weight", "bias")}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return tensors, {"patch_size": 8, "embedding_length": 80, "block_count": 0, "feed_forward_length": 0, "attention.head_count": 0, "image_size": 224, "max_soft_tokens": 20}


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PIXTRAL_PICTURES = dict(size=dict(longest_edge=80), patch_size=8, resample=3, image_mean=CLIP_MEAN, image_std=CLIP_STD, rescale_factor=1 / 255)


def make_pixtral(text="mistral", seed=0, biased=False, activation="silu"):
    """A model with a Pixtral tower, whose projector has the eps of the text model, not of the tower."""
    import transformers
    rope = dict(rope_type="default", rope_theta=10_000.0)
    if text == "ministral3":
        rope = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=512, llama_4_scaling_beta=0.4)
    latents = {}
    if text == "mistral4":
        latents = dict(num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=8,
                       num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=32, n_group=1, topk_group=1)
        rope = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=512, llama_4_scaling_beta=0.1,
                    partial_rotary_factor=0.5)
    own = TEXT | ({} if latents else dict(head_dim=16, sliding_window=None)) | dict(model_type=text, num_hidden_layers=2, rms_norm_eps=1e-3, rope_parameters=rope, tie_word_embeddings=False) | latents
    vision = dict(model_type="pixtral", hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, head_dim=16, image_size=80, patch_size=8, hidden_act=activation,
                  rope_parameters=dict(rope_type="axial", rope_theta=10_000.0))
    config = transformers.Mistral3Config(text_config=own, vision_config=vision, image_token_index=token("[IMG]"), spatial_merge_size=2, multimodal_projector_bias=biased, tie_word_embeddings=False)
    return eager(transformers.Mistral3ForConditionalGeneration, config, seed)


def pixtral_logits(model, ids, pictures, layouts):
    """pixel_values, with zeros at the right and below, and image_sizes, as PixtralImageProcessor has them."""
    images = [(pillow_resized(pixels_of(picture), layout.sizes[-1], 3) / 255 - CLIP_MEAN) / CLIP_STD for picture, layout in zip(pictures, layouts)]
    sizes = [image.shape[:2] for image in images]
    height, width = map(max, zip(*sizes))
    values = np.stack([np.pad(image, ((0, height - len(image)), (0, width - image.shape[1]), (0, 0))) for image in images])
    return model(input_ids=ids, pixel_values=torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32), image_sizes=torch.tensor(sizes))


def pixtral_mmproj(state, config):
    prefix, projector = "model.vision_tower.", "model.multi_modal_projector."
    names = {"v.patch_embd": f"{prefix}patch_conv", "v.pre_ln": f"{prefix}ln_pre", "mm.input_norm": f"{projector}norm", "mm.patch_merger": f"{projector}patch_merger.merging_layer",
             "mm.1": f"{projector}linear_1", "mm.2": f"{projector}linear_2"}
    names |= {f"v.blk.{l}.{ours}": f"{prefix}transformer.layers.{l}.{theirs}" for l in range(config.num_hidden_layers) for ours, theirs in (
        ("ln1", "attention_norm"), ("ln2", "ffn_norm"), ("attn_q", "attention.q_proj"), ("attn_k", "attention.k_proj"), ("attn_v", "attention.v_proj"), ("attn_out", "attention.o_proj"),
        ("ffn_gate", "feed_forward.gate_proj"), ("ffn_up", "feed_forward.up_proj"), ("ffn_down", "feed_forward.down_proj"))}
    tensors = {f"{ours}.{part}": state[f"{theirs}.{part}"] for ours, theirs in names.items() for part in ("weight", "bias") if f"{theirs}.{part}" in state}
    tensors = {name: permuted(weight, config.num_attention_heads) if "attn_q" in name or "attn_k" in name else weight for name, weight in tensors.items()}
    tensors["v.token_embd.img_break"] = state["model.language_model.embed_tokens.weight"][token("[IMG_BREAK]")]
    return tensors, {"patch_size": 8, "image_size": 80, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
                     "attention.head_count": config.num_attention_heads, "attention.layer_norm_epsilon": 1e-5, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "spatial_merge_size": 2}


def siglip_layers(state, prefix, layers):
    tensors = {}
    for part in ("weight", "bias"):
        tensors[f"v.post_ln.{part}"] = state[f"{prefix}post_layernorm.{part}"]
        for l in range(layers):
            for ours, theirs in (("ln1", "layer_norm1"), ("ln2", "layer_norm2"), ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
                                 ("attn_out", "self_attn.out_proj"), ("ffn_up", "mlp.fc1"), ("ffn_down", "mlp.fc2")):
                tensors[f"v.blk.{l}.{ours}.{part}"] = state[f"{prefix}encoder.layers.{l}.{theirs}.{part}"]
    return tensors


def siglip_numbers(config):
    return {"patch_size": config.patch_size, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
            "attention.head_count": config.num_attention_heads, "attention.layer_norm_epsilon": config.layer_norm_eps, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


# kind -> how to make it, its preprocessor_config.json, the marker of its template, transformers' outputs, its mmproj and that one's type
FAMILIES = {"lfm2_vl": (make_lfm2_vl, LFM2_PICTURES, "<image>", lfm2_logits, lfm2_mmproj, "lfm2"),
            "lfm2_vl-bare": (lambda: make_lfm2_vl(normed=False), LFM2_PICTURES, "<image>", lfm2_logits, lfm2_mmproj, "lfm2"),
            "gemma3": (make_gemma3, GEMMA3_PICTURES, "<start_of_image>", gemma3_logits, gemma3_mmproj, "gemma3"),
            "gemma4": (make_gemma4, GEMMA4_PICTURES, "<|image|>", gemma4_logits, gemma4_mmproj, "gemma4v"),
            "gemma4-small": (lambda: make_gemma4(two_sided=False, small=True, clipped=True), GEMMA4_PICTURES, "<|image|>", gemma4_logits, gemma4_mmproj, "gemma4v"),
            "gemma4-unified": (make_gemma4_unified, GEMMA4_PICTURES, "<|image|>", unified_logits, unified_mmproj, "gemma4uv"),
            "pixtral": (make_pixtral, PIXTRAL_PICTURES, "[IMG]", pixtral_logits, pixtral_mmproj, "pixtral"),
            "pixtral-ministral3": (lambda: make_pixtral("ministral3", biased=True, activation="gelu"), PIXTRAL_PICTURES, "[IMG]", pixtral_logits, pixtral_mmproj, "pixtral")}
IMAGE_TOKENS = {"gemma3": "<image_soft_token>"} | dict.fromkeys(("gemma4", "gemma4-small", "gemma4-unified"), "<|image|>") | dict.fromkeys(("pixtral", "pixtral-ministral3"), "[IMG]")
MODEL_TYPES = {kind: {"gemma4-unified": "gemma4_unified", "pixtral": "mistral3", "pixtral-ministral3": "mistral3"}.get(kind, kind.partition("-")[0]) for kind in FAMILIES}
CONVERTED = "qwen3_vl_moe", "pixtral", "pixtral-ministral3"      # by llama.cpp's converter, of FAMILIES or of those that sight_qwen makes


def save_family(folder, kind, model, **more):
    _, pictures, marker, *_ = FAMILIES[kind]
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"eos_token": "<end_of_utterance>"})
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<image>", marker))
    write(folder / "preprocessor_config.json", pictures | more)


def family_logits(model, kind, ids, pictures, layouts):
    """transformers' logits of a prompt whose ids of rows become those of the image token."""
    ids = torch.tensor([[each if each < VOCABULARY else token(IMAGE_TOKENS.get(kind, "<image>")) for each in ids]])
    with torch.no_grad():
        return FAMILIES[kind][3](model, ids, pictures, layouts).logits[0].double().numpy()


def write_family(folder, kind, model, quantized=False, store=lambda name, weight: weight, **more):
    """The text model and its mmproj, as llama.cpp's converter writes them; the path of the former.

    The model's matrices are in float32 or, quantized, in Q8_0; store(name, weight): as what a tensor of the mmproj is written."""
    from tiny_gguf import write_gguf
    import transformers
    _, _, marker, _, mmproj, projector = FAMILIES[kind]
    text = transformers.AutoModelForCausalLM.from_config(model.config.text_config).float()
    state = {name.replace("model.language_model.", "model."): tensor for name, tensor in model.state_dict().items() if "vision" not in name and "multi_modal" not in name}  # embed_vision too
    text.load_state_dict(state, strict=True)
    vocabulary = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    spare = VOCABULARY - BYTES - len(SPECIALS) - 1
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": [*sorted(vocabulary, key=vocabulary.get)[:BYTES], *SPECIALS, "Ġt", *(f"[PAD{n}]" for n in range(spare))],
                "tokenizer.ggml.merges": ["Ġ t"], "tokenizer.ggml.token_type": [1] * BYTES + [3] * len(SPECIALS) + [1] + [5] * spare, "tokenizer.ggml.eos_token_id": BYTES + 1,
                "tokenizer.ggml.bos_token_id": BYTES, "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE.replace("<image>", marker)}
    path = folder / "tiny-F32.gguf"
    as_gguf(path, text.eval(), quantized, metadata=metadata)
    tensors, numbers = mmproj({name: tensor.float().numpy() for name, tensor in model.state_dict().items()}, model.config.vision_config)
    numbers |= {"projection_dim": model.config.text_config.hidden_size}     # which llama.cpp requires
    write_gguf(folder / "mmproj-tiny-F32.gguf", {name: store(name, weight) for name, weight in tensors.items()},
               {f"clip.vision.{key}": value for key, value in numbers.items()} | {"clip.has_vision_encoder": True, f"clip.use_{'silu' if kind == 'pixtral' else 'gelu'}": True, "clip.projector_type": projector} | more,
               {"general.architecture": "clip"})
    return path
