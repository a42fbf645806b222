"""Tiny random models that see, as transformers writes them, and what they must compute: transformers is the oracle, from pixels to logits."""

import json

import numpy as np
import torch

from encoders import randomized
from image_conversations import BYTES, SPECIALS, byte_tokenizer

VOCABULARY = BYTES + len(SPECIALS) + 7
TEMPLATE = ("<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
            "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
SHAPES = {  # tile, patch, shuffle, width of the tower, its heads; odd ones are padded
    "smolvlm": (64, 16, 2, 64, 4), "idefics3": (84, 14, 3, 72, 3)}
LONGEST = 3


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
    made._attn_implementation = "eager"
    torch.manual_seed(seed)
    return randomized(maker(made), seed).float()


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
