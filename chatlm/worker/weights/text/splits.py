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
HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
SIGN_AND_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
DEEPSEEK3_WORDS = rf"{SIGN_AND_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}"
DEEPSEEK3_SPLITS = (r"\p{N}{1,3}", HAN_AND_KANA, DEEPSEEK3_WORDS)
# letters of scripts with upper and lower case, as DeepSeek's first models list them
CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PUNCTUATION = r"[\p{P}$+<=>^~|`]+"
SENTENCES = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
NUMBERS_FROM_THEIR_END = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # 1234567 is 1, 234, 567
JAIS2_SPACES = "|".join([*(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)),
                         r"\s{1,2}(?!\S)", r"\s{1}"])
JAIS2_SPLIT = LLAMA3_SPLIT.replace(r"\s+(?!\S)|\s+", JAIS2_SPACES)
EXAONE_MOE_SPLIT = (rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+")
SPARK_WORDS = rf"{SIGN_AND_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
KOREAN_AND_CHINESE = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+")
SCRIPTS_WITHOUT_SPACES = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
    "\u1100-\u11ff]+")
DEEPSEEK_LLM_SPLITS = (
    r"[\r\n]", rf"\s?[{CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}+")
CHAMELEON_SPLITS = (
    "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]")
KIMI_SPLIT = "|".join((
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    rf"{CONTRACTION}?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    rf"{CONTRACTION}?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", LINES))


def nanochat_split(numbers: str) -> str:
    return (rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|{numbers}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")


NANOCHAT_SPLITS = [nanochat_split(r"\p{N}{1,2}"), nanochat_split(r"\p{N}{1,3}")]

PRE_TOKENIZERS = {name: row for names, row in {  # by tokenizer.ggml.pre
    "default": PreTokenizer((  # llama.cpp's guess for a file that names none
        r"[\p{P}$+<=>^~|]+", GPT2_SPLIT, r"\p{N}+", "[0-9]{3}")),
    # GPT-2's own pattern
    "gpt-2 phi-2 olmo exaone4 granite-docling mpt jais trillion gigachat a.x-4.0 mellum jina-es jina-de "
    "jina-v2-es jina-v2-de roberta-bpe jina-v1-en jina-v2-code": PreTokenizer((), gpt2=True),
    "modern-bert": PreTokenizer((), gpt2=True, nfc=True),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}",), gpt2=True),
    "command-r": PreTokenizer((r"\p{N}",), gpt2=True, nfc=True),
    "falcon": PreTokenizer((PUNCTUATION, GPT2_SPLIT, "[0-9][0-9][0-9]")),
    "chameleon": PreTokenizer(CHAMELEON_SPLITS, gpt2=True, add_bos=True),
    # Llama 3's, of numbers with up to three digits
    "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2 falcon-h1 midm-2.0 jina-v5-nano": PreTokenizer(
        (LLAMA3_SPLIT,), ignore_merges=True, add_bos=True),
    "glm4 glm5": PreTokenizer((LLAMA3_SPLIT,), ignore_merges=True),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((LLAMA3_SPLIT,)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}+")),
                             ignore_merges=True),
    "jais-2": PreTokenizer((JAIS2_SPLIT,)),
    # Qwen 2's, of single digits
    "qwen2 deepseek-r1-qwen": PreTokenizer((QWEN2_SPLIT,), nfc=True),
    "kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2": PreTokenizer((QWEN2_SPLIT,)),
    "ufakzeka": PreTokenizer((QWEN2_SPLIT.removeprefix(f"{CONTRACTION}|"),)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", QWEN2_SPLIT)),
    "qwen35": PreTokenizer((QWEN35_SPLIT,), nfc=True),
    "seed-coder": PreTokenizer((QWEN2_SPLIT.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),)),
    "exaone-moe": PreTokenizer((EXAONE_MOE_SPLIT,)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((nanochat_split(r"\p{N}"),)),
    # those that tell upper from lower case
    "tekken": PreTokenizer((TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 granite-embed-multi-97m": PreTokenizer((O200K_SPLIT,), ignore_merges=True),
    "kanana2 talkie minimax-m2": PreTokenizer((O200K_SPLIT,)),
    "tiny_aya cohere2moe": PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", O200K_SPLIT)),
    "youtu": PreTokenizer((KOREAN_AND_CHINESE, O200K_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")),
                          ignore_merges=True),
    "kimi-k2": PreTokenizer((KIMI_SPLIT,)),
    # DeepSeek's
    "hunyuan-dense deepseek-v3 joyai-llm hy_v4": PreTokenizer(DEEPSEEK3_SPLITS),
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", HAN_AND_KANA, SPARK_WORDS, r"\p{N}")),
    "afmoe": PreTokenizer((NUMBERS_FROM_THEIR_END, SCRIPTS_WITHOUT_SPACES, DEEPSEEK3_WORDS)),
    "deepseek-llm": PreTokenizer(DEEPSEEK_LLM_SPLITS),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
                                    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")),
    # those whose tokens may hold several words
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "poro-chat bloom gpt3-finnish": PreTokenizer((SENTENCES,)),
    "viking": PreTokenizer((SENTENCES, r"\p{N}")),
    "whitespace": PreTokenizer((r"\S+",))}.items()
    for name in names.split()}
PIECES_WITH_MERGES = (  # names of vocabularies of pieces, not of bytes: a space is U+2581
    "gemma4", "granite-embed-multi-311m", "mmbert", "sarvam-moe")
MADE_MERGES = ("kimi-k2",)  # whose files may lack merges, which then follow from the ids
# Published ones need no trial. A tokenizer.json may contain their line breaks unescaped.
KNOWN_SPLITS = {spelled for pattern in (*NANOCHAT_SPLITS, *(
    pattern for row in PRE_TOKENIZERS.values() for pattern in row.splits))
    for spelled in (pattern, pattern.replace(r"\r", "\r").replace(r"\n", "\n"))}
