"""How published vocabularies cut text into words, by regular expressions."""

from __future__ import annotations

from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """How a byte-level vocabulary cuts a text into words, before its merges."""

    splits: tuple[str, ...]      # each pattern cuts what those before it left
    gpt2: bool = False           # GPT-2's own pattern, built into `tokenizers`, comes last
    nfc: bool = False            # the text becomes NFC first
    ignore_merges: bool = False  # a word that is in the vocabulary is one token
    add_bos: bool = False        # if the file does not say


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3_SPLIT = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES}"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35_SPLIT = QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+", 1).replace(r"\s\p{L}", r"\s\p{L}\p{M}")
TEKKEN_SPLIT = rf"{UPPER}*{LOWER}+|{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}"
O200K_SPLIT = (rf"{UPPER}*{LOWER}+{CONTRACTION}?|{UPPER}+{LOWER}*{CONTRACTION}?|\p{{N}}{{1,3}}"
               rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}")
DEEPSEEK3_SPLITS = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}"))
PRE_TOKENIZERS = {name: row for names, row in {  # by tokenizer.ggml.pre
    "default": PreTokenizer((  # llama.cpp's guess for a file that names none
        r"[\p{P}$+<=>^~|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+", "[0-9]{3}")),
    "gpt-2 phi-2": PreTokenizer((), gpt2=True),
    "modern-bert": PreTokenizer((), gpt2=True, nfc=True),
    "smollm starcoder refact": PreTokenizer((r"\p{N}",), gpt2=True),
    "command-r": PreTokenizer((r"\p{N}",), gpt2=True, nfc=True),
    "olmo exaone4 granite-docling": PreTokenizer((), gpt2=True),
    "glm4": PreTokenizer((LLAMA3_SPLIT,), ignore_merges=True),
    "seed-coder": PreTokenizer((QWEN2_SPLIT.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),)),
    "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2": PreTokenizer(
        (LLAMA3_SPLIT,), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((LLAMA3_SPLIT,)),
    "qwen2 deepseek-r1-qwen": PreTokenizer((QWEN2_SPLIT,), nfc=True),
    "qwen35": PreTokenizer((QWEN35_SPLIT,), nfc=True),
    "hunyuan-dense deepseek-v3": PreTokenizer(DEEPSEEK3_SPLITS),
    "tekken": PreTokenizer((TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4": PreTokenizer((O200K_SPLIT,), ignore_merges=True),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
                                    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"))}.items()
    for name in names.split()}
NANOCHAT_SPLITS = [rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,{digits}}}"
                   r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+" for digits in (2, 3)]
# Published ones need no trial. A tokenizer.json may contain their line breaks unescaped.
KNOWN_SPLITS = {spelled for pattern in (*NANOCHAT_SPLITS, *(
    pattern for row in PRE_TOKENIZERS.values() for pattern in row.splits))
    for spelled in (pattern, pattern.replace(r"\r", "\r").replace(r"\n", "\n"))}
