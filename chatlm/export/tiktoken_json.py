"""nanochat's tokenizer, a pickle of tiktoken, as a tokenizer.json with the same ids for every text.

tiktoken joins any two neighbours whose bytes together are a token, the token with the least id first.
tokenizers has a list of pairs instead, and joins the first of the list first. So each way to cut a token into
two tokens is a pair, in the order of the tokens' ids. A word that is a token as a whole is that token in
both."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence as Seq
from typing import Any

from chatlm.common.errors import ConfigError, shown
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import NANOCHAT_CHAT_TOKENS, in_characters, open_tokenizer
from chatlm.worker.weights.text.pipelines import begins_with, merges_of_ids, special_token

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = NANOCHAT_CHAT_TOKENS

# nanochat has no role for a system message: it is put before the first message of the user
CHAT_TEMPLATE = """\
{{- '<|bos|>' }}
{%- set turns = messages %}
{%- set before = '' %}
{%- if messages | length > 1 and messages[0].role == 'system' and messages[1].role == 'user' %}
    {%- set turns = messages[1:] %}
    {%- set before = messages[0].content + '\\n\\n' %}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '<|user_start|>' + (before if loop.first else '') + message.content + '<|user_end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant_start|>' + message.content + '<|assistant_end|>' }}
    {%- else %}
        {{- raise_exception('this model accepts a system message only as the first message') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant_start|>' }}
{%- endif %}"""


def tokenizer_json(text: TextSpec) -> bytes:
    """The tokenizer.json of a nanochat TextSpec. ConfigError if some text would have other ids."""
    pattern, ranks, specials = json.loads(text.payload)  # bytes are Latin-1 characters
    by_id = sorted(ranks.items(), key=lambda item: item[1])
    vocabulary = {in_characters(piece.encode("latin-1")): token for piece, token in by_id}
    made: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [special_token(token, name)
                         for name, token in sorted(specials.items(), key=by_value)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": begins_with(BOS, specials[BOS]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                    "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": vocabulary,
                  "merges": merges_of_ids("the tokenizer", [*vocabulary])}}
    if not follow_each_other(vocabulary, specials):  # tokenizers numbers added tokens by itself, unless the
        made["model"]["vocab"] = vocabulary | specials  # vocabulary has them
    data = json.dumps(made, ensure_ascii=False).encode()
    refuse_other_ids(text, data, by_id)
    return data


def by_value(item: tuple[str, int]) -> int:
    return item[1]


def follow_each_other(vocabulary: Mapping[str, int], specials: Mapping[str, int]) -> bool:
    """Are the ids those that tokenizers would give: all tokens, then the special ones?"""
    return [*vocabulary.values(), *sorted(specials.values())] == list(range(len(vocabulary) + len(specials)))


SAMPLES = 2000  # texts of a few random tokens each
ODD_TEXTS = (
    "", " ", "  \n \t\r\n ", "don't WE'LL ſ'ſ", "1234567 ١٢٣ Ⅷ½", "a\u0301 e\u200d\u00a0\u3000x",
    "日本語のテキスト", "👩\u200d👩\u200d👧🏳\ufe0f\u200d🌈", "\ufeff\u0000\u0085\u2028", "a" * 25, "ﬁﬂ ﷺ İıßẞ",
    "    def f(x):\n\treturn x**2  # ok\n\n\n", "<|bos|><|user_start|>", "नमस्ते สวัสดี مرحبا",
    "\U0001f1e9\U0001f1ea\ud7ff\ue000\U0010ffff")


def refuse_other_ids(text: TextSpec, data: bytes, by_id: Seq[tuple[str, int]]):
    """Compare both tokenizers, over texts made of the vocabulary itself. A difference would make a model that
    answers worse, and nobody would know why."""
    ours = open_tokenizer(text)
    theirs = open_tokenizer(TextSpec("hf", data))
    dice = random.Random(96)
    pieces = [piece.encode("latin-1").decode("utf-8", "replace") for piece, _ in by_id]
    texts = [*ODD_TEXTS, "".join(pieces), " ".join(pieces)]
    texts += ["".join(dice.choices(pieces, k=dice.randint(2, 12))) for _ in range(SAMPLES)]
    for sample in texts:
        if ours.encode(sample) != theirs.encode(sample):
            raise ConfigError("the tokenizer cannot be written as a tokenizer.json: "
                              f"{shown(sample)} would have other ids than in tiktoken")
