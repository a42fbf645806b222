"""Texts that are hard to tokenize, and a corpus to train tiny tokenizers on."""

import random
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
CORPUS = [*(line for path in (*DOCUMENTS, Path(__file__)) for line in path.read_text(encoding="utf-8").splitlines()),
          *["日本語のテキスト 中文 한국어 텍스트 français, naïve Zürich don't WE'LL i'm 1234 567 ½ ² ٣٤٥", "  \t  \n\n", "HTTPServer iPhone"] * 9]
DIFFICULT = [
    "", " ", "  ", "   x", "x   ", "a  b   c    d", "\t\tif x:\n\t\t\treturn 1\n", "\n\n\n a\r\n\r\n b", "a\u00a0b\u3000c\u2003",
    "1", "12", "1234567", "3.14159e-10", "٣٤٥ ½ ² Ⅷ", "x1y22z333", "don't WE'LL I'M it'S 'twas ''s 'ſ", "Ünïcödé ÀÉ ŽŠ ǅ ﬁn",
    "e\u0301 a\u0308 \u1112\u1161\u11ab ﬀ Å", "日本語とEnglishの12混在。中文，标点！한국어 ", "नमस्ते दुनिया กำลัง العربية עברית",
    "🎉👩‍👩‍👧🏳️‍🌈🇩🇪 🦙.cpp ☺️", "\x00\x01\x1c\x7f\x85\ufeff\ufffd\U0010ffff", "<|im_start|>user\n<s>[INST]</s><0x0A>", "HTTPServerError camelCaseXMLHttp",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # ok\n", "/usr/bin/env\n//comment/\n", "___ --- === !!! ...\n...", "x" * 300, " " * 100 + "y",
    "".join(CORPUS[:40])]


def noise(count=150):
    dice = random.Random(4)
    alphabets = [" \t\n\r", "ab 'sS", "0189 ,.½", "日本 中é", "e\u0301a\u0308ﬁ", "🎉👩\u200d\ufe0f ", "<|>/s_- ", "\x00\x1c\x85\u3000 a", "Aa Bb \u01c5ß"]
    for _ in range(count):
        letters = dice.choice(alphabets) + dice.choice(alphabets)
        yield "".join(dice.choices(letters, k=dice.randrange(1, 40)))
    for _ in range(20):
        yield "".join(chr(dice.choice([dice.randrange(32, 127), dice.randrange(0x80, 0xd800), dice.randrange(0xe000, 0x1fa00)]))
                      for _ in range(60))


TEXTS = [*DIFFICULT, *noise()]


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")
