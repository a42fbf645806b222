"""How the vocabularies that llama.cpp names cut texts into words, against the package `regex`."""

import unicodedata

import pytest
import regex
from chatlm.common.errors import ConfigError
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.text.splits import GPT2_SPLIT, PIECES_WITH_MERGES, PRE_TOKENIZERS
from tiny_gguf import small_gguf_metadata
from tokenizer_texts import TEXTS, split
from tokenizers import pre_tokenizers

# tokenizer.ggml.pre, as llama.cpp b11434 reads it
NAMES = """a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder deepseek-llm
deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o
gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de
jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe
llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 mmbert modern-bert mpt olmo phi-2 pixtral poro-chat
qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken
tiny_aya trillion ufakzeka viking whitespace youtu""".split()
ROWS = {row: name for name, row in PRE_TOKENIZERS.items() if name != "superbpe"}     # its matches are empty: see below
MORE = ["100000000 1000 10 1", "\u4e00\u4e8c123\u4e09 \uac00\ub098 \u3131 \u0e01\u0e02 \u1780", "<sentinel:12> IMGIMGABZ  \t", "a, b, c. d! \u3002 e",
        "x" * 20 + " " * 600 + "y", "iPhone \u0939\u093f\u0928\u094d\u0926\u0940\n123"]


def cut_by_regex(text, patterns):
    """Each pattern cuts what those before it left; what matches is a piece of its own, and so is what lies between."""
    pieces = [text]
    for pattern in patterns:
        compiled = regex.compile(pattern, regex.V1)
        cut = []
        for piece in pieces:
            at = 0
            for found in compiled.finditer(piece):
                cut += [piece[at:found.start()], found[0]]
                at = found.end()
            cut.append(piece[at:])
        pieces = [piece for piece in cut if piece]
    return pieces


def test_every_name_of_llama_cpp_is_known():
    assert sorted(NAMES) == sorted([*PRE_TOKENIZERS, *PIECES_WITH_MERGES])
    for name in PRE_TOKENIZERS:
        tokenizer = open_tokenizer(gguf_text("x.gguf", small_gguf_metadata(name)))
        for text in ("hello world\n12345", "don't  stop \u00e9\u4e00"):
            assert tokenizer.decode(tokenizer.encode(text)) == text, name


@pytest.mark.parametrize("row", ROWS, ids=list(ROWS.values()))
def test_a_text_is_cut_as_by_regex(row):
    patterns = [*row.splits, *([GPT2_SPLIT + r"|\s+"] if row.gpt2 else [])]
    ours = pre_tokenizers.Sequence([split(pattern) for pattern in patterns])
    left_out = {"Cn", "Co"}                 # the libraries' versions of Unicode differ
    if any(r"\b" in pattern for pattern in patterns):
        left_out |= {"No", "Nl", "Mn"}      # `regex` takes a fraction for a part of a word
    for text in [*TEXTS, *MORE]:
        text = "".join(letter for letter in text if unicodedata.category(letter) not in left_out)
        assert [text[begin:end] for _, (begin, end) in ours.pre_tokenize_str(text) if end > begin] == cut_by_regex(text, patterns), text


def test_superbpe_s_numbers_are_cut_from_their_end(tmp_path):
    steps = pre_tokenizers.Sequence([split(pattern) for pattern in PRE_TOKENIZERS["superbpe"].splits])
    assert [piece for piece, _ in steps.pre_tokenize_str("in 1234567 words") if piece] == ["in ", "1", "234", "567", " words"]


def test_kimi_s_merges_may_follow_from_its_ids():
    """Its converter leaves them out: two neighbours merge if they are a token together, the least id first."""
    metadata = small_gguf_metadata("kimi-k2")
    tokens = [*metadata["tokenizer.ggml.tokens"], "ab", "bc", "abc", "bcd"]
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *[1] * 4]}
    del metadata["tokenizer.ggml.merges"]
    tokenizer = open_tokenizer(gguf_text("x.gguf", metadata))
    assert [tokens[token] for token in tokenizer.encode("abcd")] == ["abc", "d"]
    assert [tokens[token] for token in tokenizer.encode("xbcd")] == ["x", "bcd"]
    with pytest.raises(ConfigError, match="tokenizer.ggml.merges is missing"):
        gguf_text("x.gguf", {**metadata, "tokenizer.ggml.pre": "gpt-2"})


@pytest.mark.parametrize("name", PIECES_WITH_MERGES)
def test_pieces_with_merges_write_spaces_as_marks(name):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5], "tokenizer.ggml.merges": ["a b", "\u2581 ab"],
                "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    tokenizer = open_tokenizer(gguf_text("x.gguf", metadata))
    assert [tokens[token] for token in tokenizer.encode("ab ab\u00e9")] == ["ab", "\u2581ab", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab ab\u00e9")) == "ab ab\u00e9"
