"""tokenizer.json made of nanochat's pickle: equal ids for every text."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import NANOCHAT_CHAT_TOKENS, open_tokenizer
from chatlm.export import tiktoken_json
from chatlm.common.text.load import byte_of_character
from chatlm.export.tiktoken_json import tokenizer_json
from exported import opened
from generations import GENERATIONS
from patching import patch

ROOT = Path(__file__).resolve().parent.parent.parent
DIFFICULT = [       # and all that the export itself compares
    "", " ", "   x", "a  b   c    d", "\t\tif x:\n\t\t\treturn 1\n", "\n\n\n a\r\n\r\n b", "a\u00a0b\u3000c\u2003", "12 1234567 3.14159e-10 ٣٤٥ ½ ² Ⅷ",
    "don't WE'LL I'M it'S 'twas ''s 'ſ 'ﬀ", "Ünïcödé ÀÉ ŽŠ ǅ ﬁn", "e\u0301 \u1112\u1161\u11ab Å", "日本語とEnglishの12混在。中文，标点！한국어 ", "नमस्ते กำลัง العربية עברית",
    "🎉👩‍👩‍👧🏳️‍🌈🇩🇪 ☺️", "\x00\x01\x1c\x7f\x85\ufeff\ufffd\U0010ffff", "<|bos|><|user_start|>x<|assistant_end|>", "x" * 300, " " * 100 + "y", "aaaa" * 50]
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")


def noise(pieces, count=400):
    dice = random.Random(4)
    ranges = (32, 127), (0x80, 0x3000), (0x3000, 0xd7ff), (0xe000, 0x11000), (0x10000, 0x1fa00), (9, 14), (32, 33)
    for _ in range(count):
        yield "".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(dice.randrange(1, 40)))
        yield "".join(dice.choices(pieces, k=dice.randrange(1, 12)))


@pytest.fixture(scope="module")
def trained():
    """A nanochat tokenizer of 4,000 tokens, trained on this program: (ranks by bytes as Latin-1, special tokens)."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "chatlm" / "common").rglob("*.py"))]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bytes_of = {character: chr(byte) for character, byte in byte_of_character().items()}
    ranks = {"".join(map(bytes_of.get, piece)): token for piece, token in made.get_vocab().items()}
    return ranks, {name: len(ranks) + number for number, name in enumerate(NANOCHAT_CHAT_TOKENS)}


def spec_of(ranks, specials):
    return TextSpec("nanochat", json.dumps((PATTERN, ranks, specials)).encode(), bos_token=specials["<|bos|>"])


def compare(spec):
    """Both tokenizers over the hard corpus and over the documents."""
    ours, theirs = open_tokenizer(spec), open_tokenizer(TextSpec("hf", tokenizer_json(spec)))
    pieces = [piece.decode("utf-8", "replace") for piece in ours.pieces.values()]
    texts = [*DIFFICULT, *noise(pieces), *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.specials == {name: theirs.specials[name] for name in ours.specials}
    assert theirs.vocab_size == len(ours.pieces) + len(ours.specials)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_fixtures_tokens_are_the_same(generation, nanochat_fixtures):
    compare(opened(nanochat_fixtures / generation).text)


def test_a_trained_vocabulary_s_tokens_are_the_same(trained):
    compare(spec_of(*trained))


def test_ids_with_holes_stay_as_they_are(trained):
    """rustbpe may give two pairs the same bytes: one of their ids then has no token. Special tokens keep their ids."""
    ranks, specials = trained
    holed = {piece: token + (token > 1000) + (token > 3000) for piece, token in ranks.items()}
    compare(spec_of(holed, {name: token + 5 for name, token in specials.items()}))


def test_a_token_that_no_two_tokens_make_is_found_as_a_word(trained):
    ranks, specials = trained
    shifted = {name: token + 1 for name, token in specials.items()}
    compare(spec_of(ranks | {"\x00\x01\x02qqqzzz": len(ranks)}, shifted))


def test_other_ids_are_refused_before_anything_is_written(trained, monkeypatch):
    """As if tokenizers joined no pairs."""
    patch(monkeypatch, tiktoken_json, "merges_of_ids", lambda *_: [])
    with pytest.raises(ConfigError, match="would have other ids than in tiktoken"):
        tokenizer_json(spec_of(*trained))


def test_all_texts_that_are_no_chats_begin_with_bos(trained):
    spec = dataclasses.replace(spec_of(*trained), add_bos=True)
    pipeline = Tokenizer.from_str(tokenizer_json(spec).decode())
    assert pipeline.encode("a").ids[0] == spec.bos_token != pipeline.encode("a", add_special_tokens=False).ids[0]
