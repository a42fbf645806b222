"""Folders whose tokenizer is a file of sentencepiece or of tiktoken's kind, instead of a tokenizer.json."""

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from chatlm.common.errors import ConfigError
from chatlm.common.hub.repository import TOKENIZERS
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.formats.folder.description import hf_text
from chatlm.worker.weights.text.folder_tokenizers import MAKERS, folder_tokenizer
from chatlm.worker.weights.text.sentencepiece_file import UNIGRAM, model_of, sentencepiece_json
from families import load, make_model, save
from tokenizer_texts import TEXTS

MODELS = Path(__file__).resolve().parent.parent / "fixtures/tokenizers"
EXPECTED = json.loads((MODELS / "ids.json").read_text())


def opened(name, **options):
    return open_tokenizer(TextSpec("hf", sentencepiece_json(MODELS / f"{name}.model", options)))


def is_decomposed(text):
    """`tokenizers` applies a map of characters to whole graphemes, sentencepiece to each character."""
    return any(unicodedata.combining(letter) or 0x1100 <= ord(letter) < 0x1200 or letter in "\u200d\ufe0f" for letter in text)


@pytest.mark.parametrize("name", EXPECTED["ids"])
def test_a_tokenizer_model_gives_sentencepiece_s_ids(name):
    tokenizer = opened(name)
    model = model_of((MODELS / f"{name}.model").read_bytes())
    compared = 0
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][name], strict=True):
        if name == "trimmed" and is_decomposed(text) or name in ("unigram", "trimmed") and "<s>" in text:
            continue        # docs/models/types.md says so
        found = tokenizer.encode(text)
        tie = model.algorithm == UNIGRAM and sum(model.scores[token] for token in found) == pytest.approx(sum(model.scores[token] for token in ids))
        assert found == ids or tie, text
        compared += 1
        if name in ("llama", "gemma"):
            assert tokenizer.decode(ids) == text.replace("\u2581", " "), text
    assert compared > 100


def test_a_letter_repeated_a_million_times_is_survived():
    for name in ("llama", "unigram"):
        tokenizer = opened(name)
        text = "a" * 1_000_000
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_legacy_only_the_beginning_gets_a_space():
    """transformers puts a space before each piece of text between special tokens, unless legacy is false."""
    older = opened("llama").encode_with_specials("<s>a</s>b")
    newer = opened("llama", legacy=False).encode_with_specials("<s>a</s>b")
    pieces = model_of((MODELS / "llama.model").read_bytes()).pieces
    assert [pieces[token] for token in older] == ["<s>", "\u2581a", "</s>", "\u2581b"]
    assert [pieces[token] for token in newer] == ["<s>", "a", "</s>", "b"] or newer[-1] == pieces.index("b")


def test_a_folder_with_a_tokenizer_model_answers(tmp_path):
    """It computes what the same folder with a tokenizer.json computes."""
    size = len(model_of((MODELS / "llama.model").read_bytes()).pieces)
    folder = save(make_model("llama3.2", vocab_size=size), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes((MODELS / "llama.model").read_bytes())
    options = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
               "chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    made = load(folder)
    assert made.text.bos_token == 1 and made.text.eos_token == 2 and made.text.add_bos
    (folder / "tokenizer.json").write_bytes(folder_tokenizer(folder, options)[1])
    assert load(folder).text == made.text
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"add_bos_token": False}))
    (folder / "tokenizer.json").unlink()
    assert not hf_text(folder, size).add_bos


# --- tiktoken's kind ----------------------------------------------------------------------------------------


WORDS = [bytes([byte]) for byte in range(256)] + [b"th", b"he", b" t", b"the", b" the", "\u00e9".encode(), b"12", b"123"]


def tekken(tmp_path, specials=5, **changes):
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None} for rank, word in enumerate(WORDS)]
    content = {"config": {"pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+", "num_vocab_tokens": len(WORDS) + 9,
                          "default_vocab_size": len(WORDS) - 1 + specials, "default_num_special_tokens": specials, "version": "v3"},
               "vocab": vocab, **changes}
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(content))
    return path


def test_a_tekken_json_has_special_tokens_first(tmp_path):
    """Only the first ranks count, as many as the file says."""
    payload = folder_tokenizer(tekken(tmp_path).parent, {})[1]
    tokenizer = open_tokenizer(TextSpec("hf", payload))
    ids = [WORDS.index(word) + 5 for word in (b"the", b" the", b"12", b"3")]        # 123 is beyond the vocabulary's size
    assert tokenizer.encode("the the123") == ids and tokenizer.vocab_size == len(WORDS) + 4
    assert tokenizer.encode_with_specials("<s>the</s>") == [1, ids[0], 2]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def ranks_of(path, words):
    path.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)))
    return path


def test_kimi_s_tokens_are_named_by_its_config(tmp_path):
    ranks_of(tmp_path / "tiktoken.model", WORDS)
    named = {str(len(WORDS)): {"content": "[BOS]"}, str(len(WORDS) + 2): {"content": "<|im_end|>"}}
    tokenizer = open_tokenizer(TextSpec("hf", folder_tokenizer(tmp_path, {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": named})[1]))
    assert tokenizer.vocab_size == len(WORDS) + 256 and tokenizer.specials["<|im_end|>"] == len(WORDS) + 2
    assert tokenizer.specials[f"<|reserved_token_{len(WORDS) + 1}|>"] == len(WORDS) + 1
    assert tokenizer.encode("the123") == [WORDS.index(b"the"), WORDS.index(b"123")]
    with pytest.raises(ConfigError, match='the tokenizer_class "Other" of tokenizer_config.json is not known'):
        folder_tokenizer(tmp_path, {"tokenizer_class": "Other"})


def test_qwen_s_tokens_follow_its_ranks(tmp_path):
    ranks_of(tmp_path / "qwen.tiktoken", WORDS)
    tokenizer = open_tokenizer(TextSpec("hf", folder_tokenizer(tmp_path, {})[1]))
    assert tokenizer.specials["<|im_end|>"] == len(WORDS) + 2
    assert tokenizer.encode("e\u0301 the") == [WORDS.index("\u00e9".encode()), WORDS.index(b" the")]


# --- broken files -------------------------------------------------------------------------------------------


def test_the_download_knows_the_same_files():
    assert TOKENIZERS == ("tokenizer.json", *MAKERS)


LLAMA = (MODELS / "llama.model").read_bytes()


def in_message(number, data):
    """A field of bytes in a message of protocol buffers."""
    return bytes([number << 3 | 2, len(data)]) + data


NOT_A_NUMBER = b"\x00\x00\xc0\x7f"
NO_MODEL = "tokenizer.model is no model of sentencepiece"
REMOVED_SPACES = (MODELS / "gemma.model").read_bytes() + b"\x1a\x02\x20\x01"  # with pieces of many spaces
BROKEN_FILES = [
    ("tokenizer.model", b"", "has no pieces"),
    ("tokenizer.model", LLAMA[:5000], NO_MODEL + ", or is cut off"),
    ("tokenizer.model", b"\xff" * 40, NO_MODEL),
    ("tokenizer.model", b"{}", NO_MODEL),
    # a piece, the trainer and the normalizer as numbers; a text and a score, too
    *(("tokenizer.model", data, NO_MODEL) for data in (
        b"\x08\x01", b"\x10\x01", b"\x18\x01",
        in_message(1, b"\x08\x05"), in_message(1, in_message(1, b"a") + b"\x10\x01"),
        in_message(1, in_message(1, b"a") + in_message(3, b"x")),
        in_message(1, in_message(1, b"a") + b"\x15" + NOT_A_NUMBER),
        in_message(2, in_message(3, b"unigram")),
        in_message(3, b"\x10\x07"), in_message(3, in_message(3, b"x")))),
    ("tokenizer.model", LLAMA + b"\x12\x02\x18\x04", "its model_type is char; it must be bpe or unigram"),
    ("tokenizer.model", LLAMA + b"\x12\x05\x18\x02\xc0\x01\x01", "treat_whitespace_as_suffix is true"),
    ("tokenizer.model", LLAMA + LLAMA, "two of its pieces have the same text"),
    # sentencepiece cuts it out before it normalizes; here ids would differ in silence
    ("tokenizer.model", REMOVED_SPACES, "its normalizer would change the user-defined piece"),
    ("tekken.json", b"{}", "is no tekken.json"),
    ("tekken.json", b"[1]", "tekken.json"),
    ("tekken.json", b"{", "tekken.json"),
    ("tekken.json", b'{"config": {"pattern": "x", "default_num_special_tokens": 2, "default_vocab_size": 9},'
                    b' "vocab": []}', "or some are missing"),
    ("qwen.tiktoken", b"", "has no tokens"),
    ("qwen.tiktoken", b"AA== 0\nAQ== 2\n", "line 2: ranks must follow each other"),
    ("qwen.tiktoken", b"not base64! 0\n", "line 1"),
    ("qwen.tiktoken", b"AA== 0\nAA== 1\n", "two of its tokens are the same"),
]


@pytest.mark.parametrize("name, data, words", BROKEN_FILES)
def test_a_broken_file_is_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as error:
        folder_tokenizer(tmp_path, {})
    assert words in str(error.value)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_any_says_what_it_has(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"x")
    words = "has no tokenizer.json; it has spiece.model, which this server does not read"
    with pytest.raises(ConfigError, match=words):
        folder_tokenizer(tmp_path, {})
