"""Long lists of strings in a GGUF file."""

import json
import random
from array import array
from itertools import accumulate

import pytest

from chatlm.worker.weights.formats.gguf.texts import LENGTH, Texts, ends_of_strings
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


def in_a_buffer(spelled: list[bytes], after: bytes = b"\x03\0\0\0\0\0\0\0a") -> tuple[memoryview, int]:
    """The buffer, and where the strings begin in it."""
    before = b"\x07\0"
    return memoryview(before + as_in_a_file(spelled).spelled + after), len(before)


def stated_ends(spelled: list[bytes]) -> list[int]:
    return list(accumulate((LENGTH.size + len(each) for each in spelled), initial=0))


@pytest.mark.parametrize("after", [b"", b"\0" * 70_000, b"\x08\0\0\0\0\0\0\0" * 9, b"\xff" * 9])
@pytest.mark.parametrize("spelled", [
    [], [b""], [b"abc"], [b"a"] * 40_000, [b"word%d" % number for number in range(30_000)], [b""] * 9_000,
    [b"x" * 255] * 900, [b"x" * 256] * 900, [b"a", b"b" * 70_000, b"c"] * 3,
    [b"a\0" * 4, b"\0" * 30, b"\x05\0\0\0\0\0\0\0hello", b"z"] * 2_000],
    ids=lambda spelled: repr(spelled)[:20])
def test_ends_are_where_the_lengths_say(spelled, after):
    buffer, begin = in_a_buffer(spelled, after=after)
    assert list(ends_of_strings(buffer, begin, len(spelled))) == stated_ends(spelled)


def test_ends_of_random_strings_are_where_the_lengths_say():
    random.seed(5)
    for _ in range(300):
        most = random.choice([3, 30, 300, 3_000])
        alphabet = random.choice([b"ab", b"a\0", b"\0", bytes(range(256))])
        count = random.randrange(400)
        spelled = [bytes(random.choices(alphabet, k=random.randrange(most))) for _ in range(count)]
        buffer, begin = in_a_buffer(spelled)
        assert list(ends_of_strings(buffer, begin, len(spelled))) == stated_ends(spelled)


@pytest.mark.parametrize("length", [10, 300, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
def test_a_string_beyond_the_end_is_the_last(length):
    buffer, begin = in_a_buffer([b"word"] * 3_000, after=LENGTH.pack(length) + b"abc")
    ends = ends_of_strings(buffer, begin, 5_000)
    assert list(ends[:-1]) == stated_ends([b"word"] * 3_000)
    assert ends[-1] == min(ends[-2] + LENGTH.size + length, (1 << 64) - 1)


def test_no_string_begins_where_no_length_fits():
    buffer, begin = in_a_buffer([b"word"], after=b"\x03\0\0")
    ends = ends_of_strings(buffer, begin, 9)
    assert len(ends) == 3 and begin + ends[-1] > len(buffer)


@pytest.mark.parametrize("spelled", [
    [], [b""], [b"a b", b'"quoted" \\u0000', b"\x1f\n"], ["Ġé Ġ".encode(), "😀".encode()],
    [b"\x7f", b"a"], [b"a\0"], [b"\xff\xc3", b"\x80"]], ids=repr)
def test_a_list_in_json_is_the_one_that_json_writes(spelled):
    texts = as_in_a_file(spelled)
    assert texts.as_json() == json.dumps(list(texts), ensure_ascii=False)
