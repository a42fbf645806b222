"""Tiny random models that see, as transformers writes them, and what they must compute: transformers is the oracle, from pixels to logits."""

import json

import numpy as np
import torch

from encoders import randomized
from image_conversations import BYTES, SPECIALS, byte_tokenizer

VOCABULARY = BYTES + len(SPECIALS) + 4       # of another size the random models are others, and some round more
TEMPLATE = ("<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
            "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
SHAPES = {  # tile, patch, shuffle, width of the tower, its heads; odd ones are padded
    "smolvlm": (64, 16, 2, 64, 4), "idefics3": (84, 14, 3, 72, 3)}
LONGEST = 3


def eager(kind, config, seed):
    """A random model of a class of transformers, with its plain attention."""
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return randomized(kind(config), seed).float()


def make_smolvlm(kind="smolvlm", seed=0):
    import transformers
    tile, patch, shuffle, width, heads = SHAPES[kind]
    text = dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                max_position_embeddings=2048, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=10_000.0), tie_word_embeddings=False, bos_token_id=BYTES,
                eos_token_id=BYTES + 1, pad_token_id=None)
    vision = dict(hidden_size=width, intermediate_size=112, num_hidden_layers=3, num_attention_heads=heads, image_size=tile, patch_size=patch, layer_norm_eps=1e-6)
    names = {"smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration), "idefics3": (transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration)}
    config, maker = names[kind]
    made = config(text_config=text, vision_config=vision, scale_factor=shuffle, image_token_id=BYTES + SPECIALS.index("<image>"), tie_word_embeddings=False, pad_token_id=0)
    return eager(maker, made, seed)


def save_sight(folder, kind, model, splits=True):
    tile = SHAPES[kind][0]
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"eos_token": "<end_of_utterance>"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write(folder / "preprocessor_config.json", {"size": {"longest_edge": LONGEST * tile}, "max_image_size": {"longest_edge": tile}, "do_image_splitting": splits, "image_mean": [0.5, 0.5, 0.5],
                                                "image_std": [0.5, 0.5, 0.5], "resample": 1, "rescale_factor": 1 / 255})


def write(path, value):
    path.write_text(json.dumps(value))


def pixel_values(picture, kind, splits=True):
    """What Pillow's processor makes of a picture."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    tile = SHAPES[kind][0]
    processor = SmolVLMImageProcessorPil(size={"longest_edge": LONGEST * tile}, max_image_size={"longest_edge": tile}, do_image_splitting=splits, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pad=True)
    image = np.frombuffer(picture.pixels, np.uint8).reshape(picture.height, picture.width, 3)
    return processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"]


def expected_logits(model, kind, ids, pictures, splits=True):
    """transformers' logits of a prompt with one id, of <image>, for each row of a picture."""
    ids = torch.tensor([[token if token < VOCABULARY else BYTES + SPECIALS.index("<image>") for token in ids]])
    pixels = [pixel_values(picture, kind, splits)[0] for picture in pictures]
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.cat(pixels)[None] if pixels else None, attention_mask=torch.ones_like(ids)).logits[0].double().numpy()


def permuted(weight, heads):
    """Rows of q or k as llama.cpp's converter orders them."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_model(path, model, store=lambda name, weight: weight):
    """The text model as llama.cpp's converter writes it; store(name, weight): as what a tensor is written, in float32 unless it is given."""
    from tiny_gguf import write_gguf
    config, state = model.config.text_config, {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    vocabulary = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.get)[:BYTES], *SPECIALS, "Ġt", "ĊĊ", *(f"[PAD{n}]" for n in range(2))]     # llama.cpp wants a token of two line feeds
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["Ġ t", "Ċ Ċ"],
                "tokenizer.ggml.token_type": [1] * BYTES + [3] * len(SPECIALS) + [1] * 2 + [5] * 2, "tokenizer.ggml.eos_token_id": BYTES + 1, "tokenizer.ggml.bos_token_id": BYTES,
                "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    numbers = {"llama.block_count": config.num_hidden_layers, "llama.context_length": config.max_position_embeddings, "llama.embedding_length": config.hidden_size,
               "llama.feed_forward_length": config.intermediate_size, "llama.attention.head_count": heads["attn_q"], "llama.attention.head_count_kv": heads["attn_k"],
               "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]), "llama.vocab_size": VOCABULARY}
    prefix, tensors = "model.text_model.", {"output.weight": state["lm_head.weight"]}
    tensors |= {"token_embd.weight": state[f"{prefix}embed_tokens.weight"], "output_norm.weight": state[f"{prefix}norm.weight"]}
    for l in range(config.num_hidden_layers):
        for ours, theirs in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"), ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
                             ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
            weight = state[f"{prefix}layers.{l}.{theirs}.weight"]
            tensors[f"blk.{l}.{ours}.weight"] = permuted(weight, heads[ours]) if ours in heads else weight
    return write_gguf(path, {name: store(name, weight) for name, weight in tensors.items()}, numbers, metadata)


def write_mmproj(path, model, exchanged=False, half=False, longest=None, store=None, **more):
    """What sees, as llama.cpp's converter writes it; `exchanged`: ffn_up and ffn_down as in old files; store: as in write_model."""
    from tiny_gguf import write_gguf
    config, state = model.config.vision_config, {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    prefix = "model.vision_model."
    up, down = ("ffn_down", "ffn_up") if exchanged else ("ffn_up", "ffn_down")
    tensors = {"v.patch_embd.weight": state[f"{prefix}embeddings.patch_embedding.weight"], "v.patch_embd.bias": state[f"{prefix}embeddings.patch_embedding.bias"],
               "v.position_embd.weight": state[f"{prefix}embeddings.position_embedding.weight"], "mm.model.fc.weight": state["model.connector.modality_projection.proj.weight"]}
    for part in ("weight", "bias"):
        tensors[f"v.post_ln.{part}"] = state[f"{prefix}post_layernorm.{part}"]
        for l in range(config.num_hidden_layers):
            for ours, theirs in (("ln1", "layer_norm1"), ("ln2", "layer_norm2"), ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
                                 ("attn_out", "self_attn.out_proj"), (up, "mlp.fc1"), (down, "mlp.fc2")):
                tensors[f"v.blk.{l}.{ours}.{part}"] = state[f"{prefix}encoder.layers.{l}.{theirs}.{part}"]
    if half:
        store = as_half
    vision = {"image_size": config.image_size, "patch_size": config.patch_size, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
              "block_count": config.num_hidden_layers, "attention.head_count": config.num_attention_heads, "attention.layer_norm_epsilon": 1e-6, "projection_dim": model.config.text_config.hidden_size,
              "projector.scale_factor": model.config.scale_factor, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "preproc_image_size": longest or LONGEST * config.image_size}
    numbers = {f"clip.vision.{key}": value for key, value in vision.items()} | {"clip.has_vision_encoder": True, "clip.use_gelu": True, "clip.projector_type": "idefics3"} | more
    return write_gguf(path, {name: store(name, weight) if store else weight for name, weight in tensors.items()}, numbers, {"general.architecture": "clip"})


def as_half(name, weight):
    return weight.astype(np.float16) if weight.ndim > 1 and "patch" not in name else weight
