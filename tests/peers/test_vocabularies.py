"""Real vocabularies: Mistral's, from mistral-common's package, and those of llama.cpp's tests, give the ids of their own programs."""

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
from chatlm.worker.weights.text.sentencepiece_file import sentencepiece_json
from chatlm.worker.weights.text.tiktoken_file import tekken_json
from peer_packages import llama_cpp, made_venv
from tokenizer_texts import TEXTS

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
BETWEEN = "\n__ggml_vocab_test__\n"
MISTRAL = ("tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2", "mistral_instruct_tokenizer_240323.model.v3",
           "mistral_instruct_tokenizer_241114.model.v7", "mistral_instruct_tokenizer_241114.model.v7m1", "tekken_240718.json", "tekken_240911.json")


def hard_texts(count=5000):
    """The texts that all tokenizers are tested with, and random ones of their letters."""
    dice = random.Random(100)
    letters = "".join(TEXTS)
    drawn = ("".join(dice.choices(letters, k=dice.randint(1, 60))) for _ in range(count - len(TEXTS)))
    return [text for text in (*TEXTS, *drawn) if "\0" not in text]


@pytest.fixture(scope="module")
def peer():
    python = made_venv("vocabularies", "vocabularies.txt")
    [packages] = (python.parent.parent / "lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return python, packages / "mistral_common/data"


@pytest.mark.parametrize("name", MISTRAL)
def test_mistral_s_files_give_their_programs_ids(peer, name):
    python, folder = peer
    path = folder / name
    texts = hard_texts()
    make = tekken_json if name.endswith(".json") else sentencepiece_json
    tokenizer = open_tokenizer(TextSpec("hf", make(path, {})))
    done = subprocess.run([python, HERE / "vocabularies_peer.py", path], input=json.dumps(texts), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for text, ids in zip(texts, json.loads(done.stdout), strict=True):
        assert tokenizer.encode(text) == ids, text


def test_llama_cpp_s_vocabularies_give_its_ids(tmp_path):
    """Its repository has texts, and the ids that the originals give them, beside each vocabulary."""
    folder = llama_cpp(tmp_path, "models/ggml-vocab-") / "models"
    compared = 0
    for expected in sorted(folder.glob("*.out")):
        path = expected.with_suffix("")
        tokenizer = open_tokenizer(gguf_text(path, read_gguf(path)[0]))
        texts = Path(f"{path}.inp").read_text(encoding="utf-8").split(BETWEEN)
        for text, line in zip(texts, expected.read_text().splitlines()):
            if "qwen35" in path.name and not unicodedata.is_normalized("NFC", text):
                continue        # Qwen's own tokenizer composes letters and accents, llama.cpp does not
            assert tokenizer.encode(text) == [int(token) for token in line.split()], (path.name, text)
            compared += 1
    assert compared > 600
