"""Pictures for conversations, and a tokenizer with SmolVLM's special tokens."""

import random

from chatlm.common.messages.requests import TextSpec, Vision
from chatlm.common.vision.pictures import picture

SPECIALS = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
            "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
            "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<|image>", "<image|>", "<|image|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
BYTES = 256
SEES = Vision("idefics3", BYTES + len(SPECIALS), "<image>", 512, 64, 2048)

SEES_LFM2 = Vision("lfm2", BYTES + len(SPECIALS), "<image>", 512, 256, unit=32, fewest=64, tiles=(2, 10), whole_from=2.0)


def picture_of_size(width, height, seed=0):
    return picture(width, height, random.Random(seed).randbytes(3 * width * height))


def byte_tokenizer():
    """A token for each byte, then SPECIALS."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: token for token, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    return made


def seeing_spec(template, vision=SEES):
    return TextSpec("hf", byte_tokenizer().to_str().encode(), template, frozenset([BYTES + 1]), None, BYTES + 1, vision=vision)
