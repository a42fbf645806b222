"""Long lists of strings in a GGUF file."""

import random
from array import array
from itertools import accumulate

import pytest

from chatlm.worker.weights.formats.gguf.header import LENGTH, Texts
from chatlm.worker.weights.text.control_tokens import misnamed
from chatlm.worker.weights.text.pipelines import CONTROL, NORMAL, USER_DEFINED


def as_in_a_file(spelled: list[bytes]) -> Texts:
    parts = [LENGTH.pack(len(each)) + each for each in spelled]
    return Texts(b"".join(parts), array("Q", accumulate(map(len, parts), initial=0)))


@pytest.mark.parametrize("spelled", [
    [], [b""], [b"", b""], [b"a", b"", b"bc"], ["Ġé".encode(), "日本".encode(), "😀".encode()], [b"a\0b", b"\0"], [b"x" * 300, b"\x01" * 8],
    [b"\xe2\x82", b"\xac", b"\xf0\x9f\x98", b"\x80\xff", b"a\xc3", b"\xa9b"],                   # halves of characters
    [b"\xe2\x82\0", b"\xac"]], ids=lambda spelled: repr(spelled)[:30])
def test_strings_are_decoded_one_by_one(spelled):
    assert list(as_in_a_file(spelled)) == [each.decode("utf-8", "replace") for each in spelled]


def test_random_bytes_are_decoded_one_by_one():
    random.seed(3)
    for _ in range(200):
        spelled = [bytes(random.choices([0, 1, 65, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0xFF], k=random.randrange(6))) for _ in range(9)]
        assert list(as_in_a_file(spelled)) == [each.decode("utf-8", "replace") for each in spelled]


def test_marks_are_found_wherever_they_stand():
    tokens = ["a", "<|im_end|>", "▁<EOT>", "[INST]", "<b>", "_<EOT>", "<|fim_pad|>", "<|x|>", "word", "<unused7>", ""]
    types = [NORMAL] * len(tokens)
    found = [tokens[token] for token in misnamed(tokens, types, [0, 9, None], "[INST] <b> <|x|> word")]
    assert found == ["<|im_end|>", "▁<EOT>", "[INST]", "_<EOT>", "<|fim_pad|>", "<|x|>", "<unused7>"]
    assert misnamed(tokens, [CONTROL] * len(tokens), [9], "[INST]") == []
    assert [tokens[token] for token in misnamed(tokens, [USER_DEFINED] * len(tokens), [], "[INST]")] == ["<|im_end|>", "▁<EOT>", "_<EOT>"]
