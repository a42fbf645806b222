"""Makes chatlm/worker/doctor/known_tokenizers.py from tokenizers in packages that pip and npm fetch:

    pip download --no-deps dashscope litellm llama-cpp-python llama-models mistral-common -d FOLDER; npm pack gpt-tokenizer
    # unpack them in FOLDER, each in a folder of its own
    python docs/fingerprints.py FOLDER

Each text of FINGERPRINTED is encoded by tiktoken, or by `tokenizers` with what this program makes of a GGUF file,
and three bytes of a hash of its ids are kept. Nothing else of a tokenizer is.
"""

import base64
import json
import struct
import sys
import textwrap
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tiktoken      # noqa: E402

from chatlm.common.config import Settings      # noqa: E402
from chatlm.common.hub.default_model import fetch_default_model      # noqa: E402
from chatlm.common.hub.find import find_model      # noqa: E402
from chatlm.common.messages.requests import TextSpec      # noqa: E402
from chatlm.common.text.load import open_tokenizer      # noqa: E402
from chatlm.worker.doctor.fingerprints import fingerprint, packed      # noqa: E402
from chatlm.worker.weights.formats.gguf.description import gguf_text      # noqa: E402
from chatlm.worker.weights.formats.gguf.header import FileHeader      # noqa: E402
from chatlm.worker.weights.load import open_model      # noqa: E402
from chatlm.worker.weights.text.pipelines import merges_of_scores, sentencepiece_pipeline      # noqa: E402
from chatlm.worker.weights.text.splits import LLAMA3_SPLIT, O200K_SPLIT, QWEN2_SPLIT, QWEN35_SPLIT      # noqa: E402

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TARGET = ROOT / "chatlm/worker/doctor/known_tokenizers.py"


def ranks_of(path):
    """Read a .tiktoken file, or a file of the same form."""
    return {base64.b64decode(piece): int(rank) for piece, rank in map(str.split, path.read_text().splitlines()) if piece}


def of_tiktoken(ranks, pattern, shift=0, nfc=False):
    encoding = tiktoken.Encoding("known", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        text = unicodedata.normalize("NFC", text) if nfc else text
        return [token + shift for token in encoding.encode(text, disallowed_special=())]
    return encode


def of_tekken(path):
    content = json.loads(path.read_text())
    config = content["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in content["vocab"][:count]}
    return of_tiktoken(ranks, config["pattern"], config["default_num_special_tokens"])


def fields(data):
    """(number, value) of each field of a protobuf message."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 2:
            size = number()
            at += size
            yield key >> 3, data[at - size:at]
        elif key & 7 == 5:
            at += 4
            yield key >> 3, struct.unpack("<f", data[at - 4:at])[0]
        else:
            yield key >> 3, number()


def of_sentencepiece(path):
    pieces = [dict(fields(piece)) for number, piece in fields(path.read_bytes()) if number == 1]
    tokens, scores, types = [piece[1].decode() for piece in pieces], [piece.get(2, 0.0) for piece in pieces], [
        piece.get(3, 1) for piece in pieces]
    pipeline = sentencepiece_pipeline(tokens, merges_of_scores(path, tokens, scores, types), "<unk>", True)
    pipeline["added_tokens"] = [{"id": token, "content": text, "special": True, "normalized": False, "single_word": False,
                                 "lstrip": False, "rstrip": False}
                                for token, (text, kind) in enumerate(zip(tokens, types)) if kind == 3]
    return open_tokenizer(TextSpec("hf", json.dumps(pipeline).encode())).encode


def of_gguf(path):
    return open_tokenizer(open_model(find_model(str(path), Settings()), Settings()).text).encode


def of_vocabulary(path):
    """A GGUF file without tensors, of llama.cpp's tests."""
    return open_tokenizer(gguf_text(path, FileHeader(path).metadata)).encode


def found(folder):
    """name -> a function that encodes."""
    def path(name):
        [first, *_] = sorted(folder.glob(f"**/{name}"))
        return first

    return {
        "SmolLM2": of_gguf(fetch_default_model()),
        "GPT-2": of_tiktoken(ranks_of(path("data/r50k_base.tiktoken")), GPT2_SPLIT),
        "cl100k (GPT-4)": of_tiktoken(ranks_of(path("data/cl100k_base.tiktoken")), LLAMA3_SPLIT),
        "o200k (gpt-oss)": of_tiktoken(ranks_of(path("data/o200k_base.tiktoken")), O200K_SPLIT),
        "Qwen": of_tiktoken(ranks_of(path("qwen.tiktoken")), QWEN2_SPLIT, nfc=True),
        "Qwen 3.5 (with Qwen 3's vocabulary)": of_tiktoken(ranks_of(path("qwen.tiktoken")), QWEN35_SPLIT, nfc=True),
        "Llama 3": of_tiktoken(ranks_of(path("llama_models/llama3/tokenizer.model")), LLAMA3_SPLIT),
        "Llama 4": of_tiktoken(ranks_of(path("llama_models/llama4/tokenizer.model")), O200K_SPLIT),
        "DeepSeek": open_tokenizer(TextSpec("hf", path("deepseek_tokenizer.json").read_bytes())).encode,
        **{name: of_vocabulary(path(f"ggml-vocab-{file}.gguf")) for name, file in (
            ("Llama 2", "llama-spm"), ("Phi 3", "phi-3"), ("Gemma 3 and 4", "gemma-4"), ("Command R", "command-r"), ("StarCoder", "starcoder"),
            ("DeepSeek Coder", "deepseek-coder"))},
        "Mistral 7B v0.1": of_sentencepiece(path("tokenizer.model.v1")),
        "Mistral 7B v0.3": of_sentencepiece(path("mistral_instruct_tokenizer_240323.model.v3")),
        "Mistral Large 2411": of_sentencepiece(path("mistral_instruct_tokenizer_241114.model.v7")),
        "Mistral Nemo (tekken)": of_tekken(path("tekken_240718.json")),
        "Pixtral (tekken)": of_tekken(path("tekken_240911.json"))}


def module(encoders):
    """The text of known_tokenizers.py. Tokenizers with equal fingerprints share a row."""
    rows = {}
    for name, encode in encoders.items():
        rows.setdefault(packed(fingerprint(encode)), []).append(name)
    text = '"""Fingerprints of published tokenizers: docs/fingerprints.py makes this file."""\n\nKNOWN = {\n'
    for spelled, names in rows.items():
        parts = "\n".join(f'        "{part}"' for part in textwrap.wrap(spelled, 98))
        text += f'    "{", ".join(names)}": (\n{parts}),\n'
    return text + "}\n"


if __name__ == "__main__":
    TARGET.write_text(module(found(Path(sys.argv[1]))), encoding="utf-8")
